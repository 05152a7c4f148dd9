"""Pages quote what is stored: ``python docs/_make/figures.py`` after a run of the benchmarks.

    python examples/benchmarks.py --out docs/results

writes docs/results/benchmarks.json. This makes of it the tables that pages include, and the one in
README.md, between two comments.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import _bench  # noqa: E402
import _scaling  # noqa: E402
import benchmarks  # noqa: E402

MARKED = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)
README = (  # what, beside what, part, name, sizes
    ("exact global mask", "sorting all scores", "params", "select", (25e6,)),
    ("the same, in one jit with the score", "the same", "params", "fused", (25e6,)),
    ("all scores equal, 21M", "the same", "patterns", "all scores equal", (20 * 2**20,)),
    ("a mask of each layer, 21M", "sorting each layer", "patterns", "each layer", (20 * 2**20,)),
    ("2:4, 21M", "sorting every four twice", "patterns", "2:4", (20 * 2**20,)),
    ("Adam with `enforce`, a step", "plain Adam", "links", "enforce, step", (1e7, 1e8)),
    ("the optimizer alone", "plain Adam", "links", "enforce, optimizer", (1e7, 1e8)),
    ("Adam with `gradual`, a step", "plain Adam", "links", "gradual, none due, step", (1e7, 1e8)),
    ("SynFlow, 100 rounds, 1M", "the same, a round after another", "rounds", "SynFlow", (100,)),
    ("oracle, 192 filters", "an evaluation for each", "oracle", None, (None,)),
    ("file with a tenth of the weights", "all, by NumPy", "compact", "masks.save", (25e6,)),
    ("pruning a file", "reading it whole, sorting", "files", "prune", (25e6, 1e8)),
)


def pages():
    """Gives the text of everything that is made, by its path."""
    run, rows = _bench.load(ROOT / "docs" / "results" / "benchmarks.json")
    made = {ROOT / "docs" / "_benchmarks.md": every(run, rows)}
    made[ROOT / "docs" / "_growth.md"] = growth(rows)
    for part in ("networks", "scores"):
        made[ROOT / "docs" / f"_{part}.md"] = _bench.table([r for r in rows if r.part == part])
    readme = (ROOT / "README.md").read_text()
    table = f"{quoted(run, rows)}\n\n{_bench.table([r for r in rows if r.part == 'networks'])}\n"
    made[ROOT / "README.md"] = MARKED.sub(lambda _: table, readme)
    return {path: text.rstrip("\n") + "\n" for path, text in made.items()}


def every(run, rows):
    """Writes all tables, under what the parts say of themselves."""
    texts = [_bench.describe(run) + "."]
    for part in dict.fromkeys(row.part for row in rows):
        found = [row for row in rows if row.part == part]
        function = getattr(benchmarks, part, None) or getattr(_scaling, part)
        text = " ".join(function.__doc__.split())
        texts.append(f"## {part.capitalize()}\n\n{text}\n\n{_bench.table(found)}")
        texts.append(_bench.growth(found).strip())
    return "\n\n".join(filter(None, texts))


def growth(rows):
    """Writes the exponents of what grows."""
    found = {part: [row for row in rows if row.part == part] for part in _scaling.DRAWN}
    lines = [
        (part, said.removeprefix("growth: "))
        for part in found
        if (said := _bench.growth(found[part]).strip())
    ]
    return _bench.markdown(("part", "time"), lines)


def quoted(run, rows):
    """Writes the table of the README."""
    lines = []
    for what, beside, part, name, sizes in README:
        found = [
            next(r for r in rows if r.part == part and name in (None, r.name) and r.at == at)
            for at in sizes
        ]
        if part in ("params", "links", "files", "compact"):
            what += f", {' / '.join(_bench.si(row.at) for row in found)}"
        cells = [_bench.cells(row) for row in found]
        lines.append([what, beside, *(" / ".join(c[i] for c in cells) for i in (1, 3, 7))])
    table = _bench.markdown(
        ("what", "beside plain JAX", "time", "time ratio", "memory ratio"), lines
    )
    return f"{_bench.describe(run)}.\n\n{table}"


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
