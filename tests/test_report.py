import html.parser
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plot import table

import jaxprune as jp

PARAMS = {f"layer <{i}> with a long name": np.full((16, 16), i + 1, "float32") for i in range(30)}


def network(params, x):
    for w in params.values():
        x = jax.nn.relu(x @ w)
    return x


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    x = jnp.ones((2, 16))
    groups = jp.find_groups(network, PARAMS, x)
    scores = jp.scores.random(PARAMS, jax.random.key(0))
    masks = groups.select(scores, 0.5)
    plan = jp.shrink(network, PARAMS, masks, x)[2]
    curves = table()
    last = np.arange(len(curves["error"])) == len(curves["error"]) - 1
    curves["error"] = np.where(last, "ValueError: no <script>alert(1)</script>", "")
    return jp.report(
        tmp_path_factory.mktemp("report") / "new" / "report.html",
        title="A & B",
        summary=jp.summary(PARAMS, masks),
        curves=curves,
        layers=jp.metrics.layers(network, PARAMS, x, masks=masks),
        groups=groups,
        plan=plan,
        settings={"epochs": 10, "optimizer": "adam <1e-3>"},
        data={"x": np.arange(3), "y": np.float32(1)},
    )


def test_report_stands_alone(path):
    page = path.read_text()
    for name in ("Summary", "Curves", "Layers", "Groups", "Plan", "Settings", "Data", "Versions"):
        assert f"<h2>{name}</h2>" in page
    names = re.sub(r'(xmlns(:\w+)?|rdf:\w+)="[^"]*"', "", page)  # names, which nothing fetches
    names = re.sub(r"<metadata>.*?</metadata>", "", names, flags=re.S)
    assert not re.findall(r'(?:src|href|url\()\s*=?\s*["(]?(?!#|data:)[^"\s]*//[^"\s]*', names)
    assert "<script" not in page and "&lt;script&gt;" in page and "A &amp; B" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', page)) <= set(ids)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_report_is_balanced(path):
    class Parser(html.parser.HTMLParser):
        open = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Parser()
    parser.feed(path.read_text())
    assert not parser.open


def test_data_hash_tells_arrays_apart(tmp_path):
    def digest(x):
        return re.findall("[0-9a-f]{64}", jp.report(tmp_path / "r.html", data=x).read_text())

    integers = np.arange(4, dtype=np.int32)
    assert digest(integers) == digest(jnp.asarray(integers)) != digest(integers.astype(float))
    assert digest(np.zeros((2, 3))) != digest(np.zeros((3, 2)))
    assert len(digest([np.zeros(0), jnp.ones(2, jnp.bfloat16)])) == 2


def test_wrong_parts_are_named(tmp_path):
    with pytest.raises(TypeError, match="summary must be of type Summary, got dict"):
        jp.report(tmp_path / "r.html", summary=PARAMS)
    assert not list(tmp_path.iterdir())


def chromium(*options):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_report_in_a_browser(path, width, tmp_path):
    probe = """<script>document.title = JSON.stringify([
        document.documentElement.scrollWidth, innerWidth,
        Math.min(...[...document.querySelectorAll("td, .grid svg text")].map(
            e => e.getBoundingClientRect().height)),
        document.querySelectorAll("svg").length])</script></body>"""
    page = tmp_path / "page.html"
    page.write_text(path.read_text().replace("</body>", probe))
    frame = tmp_path / "frame.html"  # a window is at least 500 pixels wide, a frame may be less
    frame.write_text(
        f'<iframe src="page.html" style="width: {width}px; height: 900px; border: 0" '
        'onload="document.title = contentDocument.title"></iframe>'
    )
    found = chromium(
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
        "--dump-dom",
        frame.as_uri(),
    )
    assert "CONSOLE" not in found.stderr
    inner, outer, smallest, pictures = map(
        float, re.search(r"<title>\[(.*?)\]", found.stdout)[1].split(",")
    )
    assert inner <= outer == width, "the page scrolls sideways"
    assert smallest >= 9, "text is too small to read"
    assert pictures == 5


@pytest.mark.slow
def test_report_prints(path, tmp_path):
    chromium(f"--print-to-pdf={tmp_path / 'report.pdf'}", path.as_uri())
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
