"""Writes the tables of the README and of the pages from stored results, and draws the picture.

    python examples/benchmarks.py --out docs/results
    python examples/curves.py --out docs/results
    python examples/tpu_pod.py --json docs/results/tpu_pod.json
    python docs/_make/figures.py

The first three commands store the results. A test compares the tables with them.
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCS, STORED = ROOT / "docs", ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "examples"), str(pathlib.Path(__file__).parent)]

import _bench  # noqa: E402
import _first  # noqa: E402
import _scaling  # noqa: E402
import benchmarks  # noqa: E402
import picture  # noqa: E402
import results  # noqa: E402

MARKED = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


def pages():
    """Returns the text of each file that is written, by path."""
    run, rows = _bench.load(STORED / "benchmarks.json")
    texts = {
        DOCS / "_benchmarks.md": every_table(run, rows),
        DOCS / "_growth.md": growth(rows),
        DOCS / "_curves.md": results.table(STORED / "curves.csv"),
    }
    for part in ("networks", "scores"):
        texts[DOCS / f"_{part}.md"] = _bench.table([row for row in rows if row.part == part])
    readme = (ROOT / "README.md").read_text()
    pods = json.loads((STORED / "tpu_pod.json").read_text())
    texts[ROOT / "README.md"] = MARKED.sub(lambda _: five_rows(run, rows, pods) + "\n", readme)
    return {path: text.rstrip("\n") + "\n" for path, text in texts.items()}


def every_table(run, rows):
    """Formats all tables, each under the docstring of its part."""
    texts = [_bench.describe(run) + "."]
    for part in dict.fromkeys(row.part for row in rows):
        measured = [row for row in rows if row.part == part]
        function = next(
            getattr(m, part) for m in (benchmarks, _scaling, _first) if hasattr(m, part)
        )
        texts.append(f"## {part.capitalize()}\n\n{_bench.sentences(function)}")
        texts += [_bench.table(measured), _bench.growth(measured).strip()]
    return "\n\n".join(filter(None, texts))


def growth(rows):
    """Formats the exponents of the parts that are drawn."""
    lines = []
    for part in _scaling.DRAWN:
        exponents = _bench.growth([row for row in rows if row.part == part]).strip()
        if exponents:
            lines.append((part, exponents.removeprefix("growth: ")))
    return _bench.markdown(("part", "time"), lines)


def five_rows(run, rows, pods):
    """Formats the table of the README."""

    def row(part, name, at=None):
        return next(r for r in rows if (r.part, r.name, r.at) == (part, name, at))

    def memory(program):
        return next(p["total"] for p in pods if (p["model"], p["program"]) == ("70B", program))

    gradual, adam = memory("gradual"), memory("Adam")
    lines = [
        (name, figures(r.seconds, r.bytes), reference + figures(r.plain_seconds, r.plain_bytes), by)
        for name, reference, r in (
            ("`jp.select`, 25M weights", "sorting: ", row("params", "select", 25e6)),
            (
                "Adam step with `jp.enforce`, 10M params",
                "plain: ",
                row("links", "enforce, step", 1e7),
            ),
            (
                "ResNet-50, half of each layer removed",
                "dense: ",
                row("networks", "ResNet-50, batch 1, vs dense"),
            ),
            (
                "`python -m jaxprune prune`, 25M weights",
                "reading, sorting: ",
                row("files", "prune", 25e6),
            ),
        )
        for by in [compared(r.ratio)]
    ]
    lines.append(
        (
            "Adam step with `jp.gradual`, 70B, 256 TPU chips",
            f"{gradual:.2f} GiB per chip",
            f"plain: {adam:.2f} GiB per chip",
            f"{gradual / adam - 1:.0%} more memory",
        )
    )
    table = _bench.markdown(("measured", "jaxprune", "plain JAX", "compared"), lines)
    return f"{table}\n\n{_bench.describe(run)}."


def figures(seconds, size):
    """Formats a time, and the memory if it was measured."""
    return ", ".join(filter(None, [_bench.spell_seconds(seconds), _bench.si(size, "B")]))


def compared(ratio):
    """Formats a ratio of times in words."""
    if ratio < 0.8:
        return f"{1 / ratio:.2g}× faster"
    return f"{abs(ratio - 1):.0%} {'slower' if ratio > 1 else 'faster'}"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    picture.main()
