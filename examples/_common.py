"""What the examples share: options of the command line, tables, and the style of pictures."""

import argparse
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # pictures are written to files, so that no display is needed
import matplotlib.pyplot as plt  # noqa: E402

# The palette of Okabe and Ito, which is colour-blind safe.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
YELLOW, ORANGE, VERMILION, PURPLE = "#F0E442", "#E69F00", "#D55E00", "#CC79A7"


def parser(description: str, seeds: int | None = 3) -> argparse.ArgumentParser:
    """Returns a parser with the shared options `--data`, `--out`, and `--seeds` or `--seed`.

    Args:
      description: the docstring of the example.
      seeds: the default number of seeds; `None` for an example that runs one seed.
    """
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--data", metavar="DIR", help="folder with MNIST files (IDX format); default: digits"
    )
    if seeds is None:
        options.add_argument("--seed", type=int, default=0)
    else:
        options.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
    options.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("outputs"), help="folder for the results"
    )
    return options


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Formats the mean over seeds ± the standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {std:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table: the first column is aligned left, the others right."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells):
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)])} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def tidy(axes: Any) -> None:
    """Adds a faint grid, and hides the upper and right spines."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def error_bars(axes: Any, x: Sequence[float], runs: Any, style: tuple[str, str], **options) -> None:
    """Draws the mean over seeds with its standard deviation.

    Args:
      axes: of matplotlib.
      x: positions.
      runs: values of shape (positions, seeds).
      style: color and marker.
      **options: of `axes.errorbar`.
    """
    runs = np.asarray(runs)
    std = runs.std(1, ddof=1) if runs.shape[1] > 1 else np.zeros(len(runs))
    color, marker = style
    drawn = {"color": color, "marker": marker, "markersize": 5, "capsize": 3} | options
    axes.errorbar(x, runs.mean(1), std, **drawn)


def compression_axis(axes: Any, compressions: Sequence[float]) -> None:
    """Makes a logarithmic x-axis with a tick at each compression, and a y-axis in percent."""
    axes.set_xscale("log")
    axes.set_xticks(compressions, [f"{c:.3g}×" for c in compressions])
    axes.minorticks_off()
    axes.set_xlabel("compression (params / kept params)")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
    tidy(axes)


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a picture, and prints its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")
