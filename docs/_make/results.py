"""Writes a table that pages include: ``python docs/_make/results.py outputs/criteria.csv``."""

import pathlib
import sys

import numpy as np

import jaxprune as jp

INTRODUCTION = """\
`python examples/{example}.py`: a CNN of two convolutions and two dense layers, on the digits of
scikit-learn. Test accuracy in % after fine-tuning, mean ± standard deviation over {seeds} seeds.
There are 360 test images, so differences below a point are noise. Each method takes the same number
of training steps. The dense network reaches {dense} %.

"""


def table(path):
    """Returns the introduction and the table of a stored sweep."""
    mean = jp.curves.over_seeds(jp.curves.load(path))
    pairs = zip(100 * mean["after"], 100 * mean["after_std"], strict=True)
    percent = [f"{middle:.1f} ± {spread:.1f}" for middle, spread in pairs]
    sparsities = sorted(set(mean["sparsity"][mean["method"] != "dense"].tolist()))
    lines = [
        "| method | " + " | ".join(f"{1 / (1 - s):.3g}×" for s in sparsities) + " |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    for method in dict.fromkeys(mean["method"].tolist()):
        rows = np.flatnonzero(mean["method"] == method)
        if method == "dense":
            introduction = INTRODUCTION.format(
                example=path.stem, seeds=mean["seeds"][rows[0]], dense=percent[rows[0]]
            )
            continue
        lines.append(f"| {method} | " + " | ".join(percent[r] for r in rows) + " |")
    return introduction + "\n".join(lines) + "\n"


if __name__ == "__main__":
    source = pathlib.Path(sys.argv[1])
    (pathlib.Path(__file__).parent.parent / f"_{source.stem}.md").write_text(table(source))
