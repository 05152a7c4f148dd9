"""Storing, comparing and quoting of benchmarks; nothing is measured."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs" / "_make")]

import _bench  # noqa: E402
import figures  # noqa: E402
from _bench import Row  # noqa: E402

MACHINE = _bench.machine()
ROWS = [
    Row("params", "select", 1e6, 0.01, 1.0, 0.01, 1e6, 5e6),
    Row("params", "select", 4e6, 0.04, 4.0, 0.01, 4e6, 2e7),
    Row("oracle", "filters", None, 2.0),
]


def test_a_run_comes_back(tmp_path):
    path = tmp_path / "new" / "benchmarks.json"
    _bench.store(path, MACHINE, ROWS)
    run, rows = _bench.load(path)
    assert rows == ROWS
    assert {**run} == MACHINE
    assert [p.name for p in path.parent.iterdir()] == ["benchmarks.json"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": "other"}', "the format must be"),
        (json.dumps({"format": _bench.FORMAT}), "KeyError"),
        (json.dumps({"format": _bench.FORMAT, "rows": [{"part": "a", "speed": 3}]}), "speed"),
        (json.dumps({"format": _bench.FORMAT, "rows": []}), "KeyError"),
    ],
)
def test_another_file_is_an_error_that_names_it(tmp_path, text, why):
    path = tmp_path / "benchmarks.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a stored run") as error:
        _bench.load(path)
    assert str(path) in str(error.value) and why in str(error.value)


def test_changes_are_those_of_ratios(tmp_path, capsys):
    path = tmp_path / "benchmarks.json"
    assert _bench.previous(path) == {}
    _bench.store(path, MACHINE, ROWS)
    previous = _bench.previous(tmp_path / "none.json", path)
    assert str(path) in capsys.readouterr().out

    slower_machine = ROWS[0]._replace(seconds=0.03, plain_seconds=3.0)
    assert _bench.changes(slower_machine, previous) == ["+0%", "+0%"]
    assert _bench.changes(ROWS[0]._replace(ratio=0.0119), previous) == ["+19%", "+0%"]
    assert _bench.changes(ROWS[0]._replace(ratio=0.0121, bytes=2e6), previous) == [
        "+21% !",
        "+100% !",
    ]
    assert _bench.changes(ROWS[0]._replace(ratio=0.0083), previous) == ["-17% !", "+0%"]
    assert _bench.changes(ROWS[2]._replace(seconds=3.0), previous) == ["+50% !", ""]
    assert _bench.changes(ROWS[0]._replace(at=2e6), previous) == ["new", ""]


def test_table_has_what_was_measured():
    assert _bench.table(ROWS[:1], {}).splitlines() == [
        "| measured   |  time | reference | ratio | change | memory | reference | ratio |",
        "| ---------- | ----: | --------: | ----: | -----: | -----: | --------: | ----: |",
        "| select, 1M | 10 ms |       1 s |  0.01 |    new |   1 MB |      5 MB |   0.2 |",
    ]
    assert "memory" not in _bench.table(ROWS[2:])
    assert "n^1.00" in _bench.growth(ROWS)


def test_what_is_quoted_is_what_is_stored():
    for path, text in figures.pages().items():
        assert path.read_text() == text, f"{path} differs: run docs/_make/figures.py"


def test_memory_on_pods_is_quoted_as_stored():
    page = (ROOT / "docs" / "results" / "tpu_pod.md").read_text()
    for pod in json.loads((ROOT / "docs" / "results" / "tpu_pod.json").read_text()):
        assert f" {pod['total']:.2f} " in page, pod
