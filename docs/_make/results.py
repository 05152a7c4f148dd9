"""A table that pages include: ``python docs/_make/results.py outputs/curves.csv``, or criteria."""

import pathlib
import sys

import numpy as np

import jaxprune as jp

INTRODUCTION = """\
`python examples/{example}.py`: a CNN of two convolutions and two dense layers, on the digits of
scikit-learn. Test accuracy in % after fine-tuning, mean ± standard deviation over {seeds}
seeds, 360 test images: differences below a point are noise, and so small a set proves little.
Every method takes the same number of training steps. The dense network reaches {dense} %.

"""


def main(path):
    """Writes the table of an example beside the pages that include it."""
    path = pathlib.Path(path)
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
    target = pathlib.Path(__file__).parent.parent / f"_{path.stem}.md"
    target.write_text(introduction + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
