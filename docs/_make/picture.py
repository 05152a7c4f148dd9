"""Draws the picture of the README from stored results: ``python docs/_make/picture.py``.

The left panel shows docs/results/curves.csv, which ``python examples/curves.py --out docs/results``
writes; the right panel shows docs/results/benchmarks.json of ``examples/benchmarks.py``.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

import jaxprune as jp

DOCS = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(DOCS.parent / "examples"))

import _bench  # noqa: E402
from _common import BLUE, GREEN, ORANGE, VERMILION, plt  # noqa: E402

INK, GRAY = "#222222", "#8a8a8a"
METHODS = {
    "random": (GRAY, "X"),
    "magnitude": (BLUE, "o"),
    "L1 filters": (VERMILION, "s"),
    "SynFlow": (ORANGE, "D"),
    "gradual": (GREEN, "^"),
}
COMPRESSIONS = (4, 8, 16, 32, 64)
NETWORKS = ("ResNet-50", "ViT-S/16", "VGG-16")
BARS = {"dense": "#c4c8ce", "shrunk": BLUE, "hand-written": "#9ccbe8"}


def errors(mean, method):
    """Returns compressions, test errors in percent, and their standard deviations."""
    wanted = np.round(1 / (1 - mean["sparsity"])).astype(int)
    rows = (mean["method"] == method) & np.isin(wanted, COMPRESSIONS)
    return mean["compression"][rows], 100 * (1 - mean["after"][rows]), 100 * mean["after_std"][rows]


def spread(heights, gap=1.35):
    """Moves labels on a logarithmic axis apart, so that neighbours differ by a factor."""
    names = sorted(heights, key=heights.get)
    for low, high in zip(names, names[1:], strict=False):
        missing = max(gap * heights[low] / heights[high], 1) ** 0.5
        heights[low] /= missing
        heights[high] *= missing
    return heights


def draw_errors(axes, mean):
    """Draws test error against compression, mean ± standard deviation over seeds."""
    dense = 100 * (1 - mean["after"][mean["method"] == "dense"][0])
    axes.axhline(dense, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.text(108, dense, "dense", color=INK, va="center", backgroundcolor="white")
    lines = {method: errors(mean, method) for method in METHODS}
    heights = spread({method: error[-1] for method, (_, error, _) in lines.items()})
    for method, (compression, error, std) in lines.items():
        color, marker = METHODS[method]
        low = np.minimum(std, error - 0.1)  # keeps the lower end positive, for the logarithm
        axes.errorbar(
            compression,
            error,
            (low, std),
            color=color,
            marker=marker,
            markersize=5.5,
            linewidth=1.8,
            elinewidth=1,
            capsize=2.5,
        )
        at = compression[-1] * 1.13, heights[method]
        axes.text(*at, method, color=color, va="center", fontweight="bold")
    axes.set(xscale="log", yscale="log", xlim=(3.4, 178), ylim=(0.45, 120))
    axes.set_xticks(COMPRESSIONS, [f"{c}×" for c in COMPRESSIONS])
    axes.set_yticks([1, 3, 10, 30, 100], ["1 %", "3 %", "10 %", "30 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlabel("compression of a small CNN")
    axes.set_title("Test error after pruning", loc="left", fontweight="bold")
    axes.grid(color="#e6e6e6", linewidth=0.8)


def draw_times(axes, rows):
    """Draws the time of a dense, a shrunk and a hand-written network, batch 1."""
    by_name = {row.name: row for row in rows if row.part == "networks"}
    for i, network in enumerate(NETWORKS):
        dense, by_hand = (by_name[f"{network}, batch 1, vs {w}"] for w in ("dense", "hand-written"))
        times = (dense.plain_seconds, dense.seconds, by_hand.plain_seconds)
        for j, (kind, seconds) in enumerate(zip(BARS, times, strict=True)):
            y, ms = i + 0.27 * (j - 1), 1e3 * seconds
            axes.barh(y, ms, 0.25, color=BARS[kind])
            words = [f" {ms:.0f} ms"]
            if i == 0:  # the first bars name the colors
                words.append(kind)
            if kind == "shrunk":
                words.append(f"{dense.plain_seconds / dense.seconds:.1f}× faster")
            axes.text(ms, y, "  ".join(words), va="center", color=INK)
    axes.set_yticks(range(len(NETWORKS)), NETWORKS)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("time per image, ms")
    axes.set_title("Time with half of each layer removed", loc="left", fontweight="bold")
    axes.margins(x=0.14)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)


def main():
    """Writes docs/overview.png."""
    mean = jp.curves.over_seeds(jp.curves.load(DOCS / "results" / "curves.csv"))
    _, rows = _bench.load(DOCS / "results" / "benchmarks.json")
    style = {"font.size": 10, "axes.titlesize": 11, "text.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style | {"xtick.color": INK, "ytick.color": INK}):
        options = {"layout": "constrained", "width_ratios": (1.12, 1)}
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.9), **options)
        figure.get_layout_engine().set(wspace=0.06)
        draw_errors(left, mean)
        draw_times(right, rows)
        for axes in (left, right):
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(DOCS / "overview.png", dpi=180, facecolor="white")
    with Image.open(DOCS / "overview.png") as image:
        small = image.convert("RGB").quantize(128)
    small.save(DOCS / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
