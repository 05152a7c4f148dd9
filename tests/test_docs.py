"""The documentation: its code runs, its site builds, and nothing public is left out of it."""

import contextlib
import dataclasses
import doctest
import importlib.util
import io
import pathlib
import re
import shlex
import subprocess
import sys
import types

import jax
import pytest
from helpers import slow_unless

import jaxprune as jp

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if not p.name.startswith("_"))
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
FENCE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Gives the language, first line and text of every block that runs, includes in place."""
    text = INCLUDE.sub(lambda m: (DOCS / m[1]).read_text(), page.read_text())
    for match in FENCE.finditer(text):
        yield match[1], text.count("\n", 0, match.start()) + 2, match[2]


def run_python(text, namespace, where, line):
    """Runs a block, and if it is a session, compares what it prints."""
    if text.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(text, namespace, where, where, line - 1)
        said = io.StringIO()
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.write, clear_globs=False)
        assert not said.getvalue(), said.getvalue()
        namespace.update(test.globs)
    else:
        exec(compile("\n" * (line - 1) + text, where, "exec"), namespace)


def run_shell(text):
    """Runs the lines that call jaxprune on files that exist."""
    from jaxprune.__main__ import main

    for line in text.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:3] == ["python", "-m", "jaxprune"] and pathlib.Path(words[4]).exists():
            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = main(words[3:])
            assert code == (words[3] == "diff"), (line, code)
            assert said.getvalue()


RUN = [p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *PAGES] if any(blocks(p))]
FAST = ["README.md", *(f"docs/guide/{name}.md" for name in ("score", "schedule", "fine_tuning"))]


@pytest.mark.filterwarnings("ignore:round_to")  # says what it changed, as the pages tell
@pytest.mark.parametrize("name", slow_unless(FAST, RUN))
def test_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("__docs__")  # dataclasses and flax modules look their module up
    monkeypatch.setitem(sys.modules, "__docs__", module)
    with jax.numpy_rank_promotion("allow"):  # as a reader has it
        for language, line, text in blocks(ROOT / name):
            if language == "python":
                run_python(text, vars(module), str(ROOT / name), line)
            else:
                run_shell(text)
    plt.close("all")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is missing: pip install jaxprune[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_site_is_whole(site):
    for page in PAGES:
        assert (site / page.relative_to(DOCS).with_suffix(".html")).exists()


RESOURCE = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\b(?:src|srcset|data)="
    r"[\"']?(?:https?:)?//[^\"'> ]*"
    r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*?\bhref=[\"']?(?:https?:)?//[^\"'> ]*",
    re.IGNORECASE,
)
IMPORT = re.compile(r"@import\s+(?:url\()?[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//")


def test_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        assert not RESOURCE.search(page.read_text()), page
        text = re.sub("<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert "\\(" not in text and "$$" not in text, page  # every equation is MathML
        assert "][jaxprune" not in text, page  # every reference is a link
    for sheet in site.rglob("*.css"):
        assert not IMPORT.search(sheet.read_text()), sheet
    assert (site / "search" / "search_index.js").exists()


def test_resources_are_told_from_links():
    assert RESOURCE.search('<link rel="stylesheet" href="https://fonts.example/a.css">')
    assert RESOURCE.search("<script src=//cdn.example/a.js></script>")
    assert RESOURCE.search('<img alt="a" src="http://example.org/a.png">')
    assert not RESOURCE.search('<a href="https://arxiv.org"><img src="a.png"></a>')
    assert IMPORT.search("src: url(https://fonts.example/a.woff2)")


def public():
    """Maps every public name below `jaxprune.` to what it names."""
    exported = {name: getattr(jp, name) for name in jp.__all__}
    is_module = lambda thing: isinstance(thing, types.ModuleType)
    functions = {name: thing for name, thing in exported.items() if not is_module(thing)}
    entries = dict(functions)
    for module_name, module in exported.items():
        if is_module(module):
            names = getattr(module, "__all__", None) or [
                name
                for name, thing in vars(module).items()
                if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
            ]
            things = {f"{module_name}.{name}": getattr(module, name) for name in names}
            entries |= {n: thing for n, thing in things.items() if thing not in functions.values()}
    return entries


def is_record(thing):
    return isinstance(thing, type) and (dataclasses.is_dataclass(thing) or issubclass(thing, tuple))


def test_reference_names_everything(site):
    text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    anchors = set(re.findall(r'id="jaxprune\.([\w.]+)"', text))
    missing = public().keys() - anchors
    assert not missing, sorted(missing)


def test_docstring_has_an_example():
    names = {n for n, thing in public().items() if callable(thing) and not is_record(thing)}
    assert len(names) > 50
    assert not [name for name in sorted(names) if ">>>" not in (public()[name].__doc__ or "")]
