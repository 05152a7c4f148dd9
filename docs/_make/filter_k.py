"""Draws the slices that are removed with filter k: ``python docs/_make/filter_k.py``.

The slices are those that `find_groups` finds in a small convolutional network.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import linen as nn

import jaxprune as jp

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402

K = 2
INK, LINE, COLORS = "#010203", "#808080", ("#E69F00", "#0072B2")


class Network(nn.Module):
    """Two convolutions, the first followed by batch norm, and a dense layer after a flatten."""

    @nn.compact
    def __call__(self, x):
        """Returns five logits for each image."""
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x)))
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def removed():
    """Returns, for filter k of each convolution, the indices that are removed with it."""
    x = jnp.ones((1, 4, 4, 3))
    params = Network().init(jax.random.key(0), x)
    groups = jp.find_groups(Network().apply, params, x)
    units = []
    for kernel in ("params/Conv_0/kernel", "params/Conv_1/kernel"):
        unit = groups.unit[kernel][3][K]
        units.append({p: [np.flatnonzero(u == unit) for u in groups.unit[p]] for p in groups.unit})
    return units


def cells(axes, x, y, rows, columns, colour, label, side=0.3):
    """Draws a matrix, its first axis downwards; ``colour(row, column)`` is that of a cell."""
    for i in range(rows):
        for j in range(columns):
            at = x + j * side, y - (i + 1) * side
            fill = colour(i, j) or "none"
            axes.add_patch(plt.Rectangle(at, side, side, fc=fill, ec=LINE, lw=0.7))
    axes.text(x, y + 0.1, label, color=INK, fontsize=10, va="bottom")


def draw(axes, units):
    """Draws the layers from top to bottom, and colors the slices of both units."""

    def colour(path, *shown):  # the axes that are drawn downwards and to the right
        def fill(*index):
            for unit, name in zip(units, COLORS, strict=True):
                for axis, i in zip(shown, index[-len(shown) :], strict=True):
                    if i in unit[path][axis]:
                        return name
            return None

        return fill

    for y, name, text in (
        (9.75, COLORS[0], "removed with filter k of conv 1"),
        (9.3, COLORS[1], "removed with filter k of conv 2"),
    ):
        axes.add_patch(plt.Rectangle((0, y - 0.12), 0.3, 0.3, fc=name, ec=LINE, lw=0.7))
        axes.text(0.45, y, text, color=INK, fontsize=11, va="center")
    cells(axes, 0, 8.4, 3, 6, colour("params/Conv_0/kernel", 2, 3), "conv 1: in × out, of 3 × 3")
    cells(axes, 2.4, 8.4, 1, 6, colour("params/Conv_0/bias", 0), "bias")
    for x, y, name, kind in (
        (0, 6.75, "scale", "params"),
        (2.4, 6.75, "bias", "params"),
        (0, 5.9, "mean", "batch_stats"),
        (2.4, 5.9, "var", "batch_stats"),
    ):
        label = f"batch norm: {name}" if name == "scale" else name
        cells(axes, x, y, 1, 6, colour(f"{kind}/BatchNorm_0/{name}", 0), label)
    cells(axes, 0, 4.85, 6, 4, colour("params/Conv_1/kernel", 2, 3), "conv 2: in × out, of 3 × 3")
    cells(axes, 2.4, 4.85, 1, 4, colour("params/Conv_1/bias", 0), "bias")
    size = len(units[1]["params/Dense_0/kernel"][0])
    fill = colour("params/Dense_0/kernel", 0, 1)
    cells(axes, 0, 2.45, 16, 5, fill, "dense, after a flatten: positions × 4 in, 5 out", side=0.15)
    axes.text(1, 1.3, f"one row for each\nof {size} positions", color=INK, fontsize=10, va="center")
    axes.set_xlim(-0.05, 4.3)
    axes.set_ylim(-0.1, 10)
    axes.set_aspect("equal")
    axes.axis("off")


def main():
    """Writes docs/filter_k.svg."""
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "filter_k"
    figure, axes = plt.subplots(figsize=(4.35, 10.1))
    figure.subplots_adjust(0, 0, 1, 1)
    draw(axes, removed())
    path = pathlib.Path(__file__).parent.parent / "filter_k.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})
    text = path.read_text().replace(INK, "var(--ink)")
    style = (
        "<style>svg { --ink: #222 } @media (prefers-color-scheme: dark) { svg { --ink: #eee } }"
        " svg text { font-family: system-ui, sans-serif !important }</style>"
    )
    path.write_text(re.sub(r"(<svg[^>]*>)", rf"\1{style}", text, count=1))


if __name__ == "__main__":
    main()
