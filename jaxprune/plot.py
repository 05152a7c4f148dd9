"""Figures of pruning results, with matplotlib (``pip install "jaxprune[plot]"``).

Every function draws into ``axes``, or into a new figure, and returns the axes for restyling and
saving: ``jp.plot.mask(masks["w"]).figure.savefig("mask.svg")``. The colours are colour-blind safe
on light and dark backgrounds. Text has the colour of matplotlib's settings; for a dark background
use ``plt.style.use("dark_background")``.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import _tree
from jaxprune import curves as _curves
from jaxprune._tree import Masks, Scores
from jaxprune.groups import Groups

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_GRAY = "#808080"
_LABELS = {
    "compression": "compression\n(all params / kept params)",
    "theoretical_speedup": "theoretical speed-up\n(dense FLOPs / FLOPs of kept weights)",
    "measured_speedup": "measured speed-up\n(dense time / pruned time)",
    "stored_bytes": "stored size (bytes)",
    "params": "kept params",
    "flops": "FLOPs of kept weights",
    "sparsity": "sparsity",
    "before": "quality before fine-tuning",
    "after": "quality after fine-tuning",
    "change": "change in quality after fine-tuning",
}


def _matplotlib() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(
            'jaxprune.plot needs matplotlib: pip install "jaxprune[plot]".'
        ) from error
    return matplotlib


def _new(axes: Any, size: tuple[float, float]) -> Any:
    if axes is not None:
        return axes
    return _matplotlib().pyplot.subplots(figsize=size, layout="constrained")[1]


def _ink() -> str:
    """Returns the colour of text, which contrasts with the background of the current style."""
    return _matplotlib().rcParams["text.color"]


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def _tidy(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def curves(
    table: Mapping[str, np.ndarray], x: str = "compression", y: str = "after", *, axes: Any = None
) -> Any:
    r"""Draws quality against efficiency: mean and spread over seeds for each method.

    The band is one standard deviation wide on either side. With fewer than five sparsities or
    three seeds, a note in the figure says that these are too few to compare methods.

    Args:
      table: the result of :func:`jaxprune.curves.sweep`.
      x: the column on the horizontal axis, such as ``"compression"``, ``"params"`` or
        ``"measured_speedup"``.
      y: the column on the vertical axis: ``"after"``, ``"before"`` or ``"change"``.
      axes: the axes to draw into.

    Raises:
      ValueError: if ``x`` or ``y`` is not a column of the table.

    Examples:
      >>> table = {"method": ["dense", "magnitude"], "sparsity": [0, 0.5], "seed": [0, 0]}
      >>> table |= dict.fromkeys(_curves.MEASURES, [1.0, 2.0]) | {"error": ["", ""]}
      >>> curves({name: np.array(column) for name, column in table.items()}).get_xlabel()
      'compression\n(all params / kept params)'
    """
    mean = _curves.over_seeds(table)
    for name in (x, y):
        if name not in _LABELS:
            raise ValueError(f"x and y must be among {', '.join(_LABELS)}, got {name!r}.")
    axes = _new(axes, (7.5, 4.5))
    lines = itertools.cycle(np.repeat(("-", "--", ":"), len(_COLORS)))
    styles = zip(itertools.cycle(_COLORS), itertools.cycle("osD^vPX<>"), lines, strict=False)
    for name in dict.fromkeys(mean["method"].tolist()):
        rows = (mean["method"] == name) & (mean["seeds"] > 0)
        rows = np.flatnonzero(rows)[np.argsort(mean["sparsity"][rows])]
        if not len(rows):
            continue
        at, quality, spread = mean[x][rows], mean[y][rows], mean[f"{y}_std"][rows]
        if name == _curves.DENSE:
            for level, width in zip(quality, spread, strict=True):
                axes.axhline(level, color=_GRAY, linestyle="--", label=name, zorder=1)
                axes.axhspan(level - width, level + width, color=_GRAY, alpha=0.15, linewidth=0)
            continue
        if name == "random":
            line, color, marker = "-", _ink(), "x"
        else:
            color, marker, line = next(styles)
        axes.plot(at, quality, line, color=color, marker=marker, markersize=5, label=name)
        if (np.diff(at) > 0).all() or (np.diff(at) < 0).all():
            axes.fill_between(at, quality - spread, quality + spread, color=color, alpha=0.15, lw=0)
        else:  # measured speed-up does not always grow with sparsity
            axes.errorbar(at, quality, spread, color=color, alpha=0.4, linestyle="none", capsize=2)
    if x == "sparsity":
        _percent(axes.xaxis)
    elif x in ("params", "flops", "stored_bytes"):
        ticker = _matplotlib().ticker
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter())
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_inverted(True)  # savings grow to the right, as in the other figures
    else:
        _doublings(axes)
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel(_LABELS[y])
    if warning := _few(table, mean):
        axes.set_title(warning, fontsize="small", style="italic", loc="left")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _tidy(axes)


def _few(table: Mapping[str, np.ndarray], mean: Mapping[str, np.ndarray]) -> str:
    """Returns a note on failed points, and on too few points for a comparison."""
    rows = (mean["method"] != _curves.DENSE) & (mean["seeds"] > 0)
    points = min(np.unique(mean["method"][rows], return_counts=True)[1], default=0)
    seeds = min(mean["seeds"][rows], default=0)
    failed = int((table["error"] != "").sum())
    notes = [f"failed points: {failed}"] if failed else []
    if points < 5 or seeds < 3:
        notes.append(f"{points} sparsities, {seeds} seeds; a comparison needs 5 and 3")
    return "; ".join(notes)


def _doublings(axes: Any) -> None:
    """Sets ticks at powers of two, or linear ticks if the range is narrow."""
    low, high = axes.get_xlim()
    if low > 0 and high / low > 4:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(_matplotlib().ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}×")


def sparsity(masks: Masks, *, before: Masks = None, axes: Any = None) -> Any:
    """Draws the sparsity of every leaf that has a mask, and that in the masks ``before``.

    Raises:
      ValueError: if there is no mask.

    Examples:
      >>> axes = sparsity({"w": np.array([True, False])})
      >>> [label.get_text() for label in axes.get_yticklabels()]
      ['w']
    """
    removed = _removed(masks)
    if not removed:
        raise ValueError("masks: must hold at least one mask with weights, got none.")
    axes = _new(axes, (7, 1.3 + 0.28 * len(removed)))
    rows = np.arange(len(removed))
    bars = axes.barh(rows, list(removed.values()), height=0.7, color=_COLORS[0], label="after")
    axes.bar_label(bars, [f"{r:.1%}" for r in removed.values()], padding=8, fontsize="small")
    if before is not None:
        earlier = _removed(before)
        marks = [earlier.get(path, np.nan) for path in removed]
        axes.plot(marks, rows, "D", color=_COLORS[4], markeredgecolor=_ink(), label="before")
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
        axes.legend(frameon=False, fontsize="small", **above)
    axes.set_yticks(rows, [_tree.show(path) for path in removed], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xticks(np.linspace(0, 1, 6))
    _percent(axes.xaxis)
    axes.set_xlabel("sparsity (pruned weights / weights)")
    _tidy(axes).grid(axis="y", visible=False)
    return axes


def _removed(masks: Masks) -> dict[str, float]:
    leaves = {path: _kept(_tree.show(path), m) for path, m in _tree.named_leaves(masks)}
    return {path: 1 - float(np.mean(m)) for path, m in leaves.items() if m.size}


def _kept(path: str, mask: Any) -> np.ndarray:
    """Reads one mask; raises a `TypeError` for anything else."""
    kept = np.asarray(mask) if hasattr(mask, "__array__") or isinstance(mask, list) else None
    if kept is None or kept.dtype != bool:
        raise TypeError(f"{path}: must be a mask, an array of bool, got {_tree.brief(mask)}.")
    return kept


def mask(mask: Any, *, axes: Any = None) -> Any:
    """Draws the mask of one leaf: kept weights in colour.

    The last two axes of the leaf span the figure. The other axes are drawn inside its entries: a
    convolution kernel (height, width, inputs, outputs) appears as a grid of small filters, inputs ×
    outputs. If there are more weights than pixels, the shade is the share of kept weights.

    Raises:
      ValueError: for a mask of size zero.
      TypeError: for anything but one array of bool.

    Examples:
      >>> mask(np.array([[True, False]])).get_title()
      '50% of 2 kept'
    """
    kept = _kept("mask", mask)
    if not kept.size:
        raise ValueError(f"mask: must hold at least one weight, got shape {kept.shape}.")
    *inside, rows, columns = (1,) * (4 - kept.ndim) + kept.shape
    down, across = math.prod(inside[:-1]), inside[-1]
    if down == 1:  # matrices of a stack are drawn one below the other
        down, across = across, 1
    tiles = kept.reshape(down, across, rows, columns).transpose(2, 0, 3, 1)
    image = _pooled(_pooled(tiles.reshape(rows * down, columns * across), 0), 1)
    axes = _new(axes, (6, 4.5 if kept.ndim > 1 else 1.6))
    colors = [f"{_COLORS[0]}00", _COLORS[0]]  # from transparent
    shades = _matplotlib().colors.LinearSegmentedColormap.from_list("kept", colors)
    options = {"vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    axes.imshow(image, shades, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), **options)
    cell = f", {down}×{across} in each" if down * across > 1 else ""
    axes.set_xlabel(f"index of the last axis{cell}")
    axes.set_ylabel("index of the second-to-last axis" if kept.ndim > 1 else "")
    axes.set_yticks(axes.get_yticks() if kept.ndim > 1 else [])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_title(f"{100 * kept.mean():.3g}% of {kept.size:,} kept", fontsize="medium")
    return axes


def _pooled(image: np.ndarray, axis: int, pixels: int = 1024) -> np.ndarray:
    starts = np.arange(0, image.shape[axis], -(-image.shape[axis] // pixels))
    sizes = np.diff([*starts, image.shape[axis]])
    sums = np.add.reduceat(image, starts, axis, dtype=np.float32)
    return sums / np.expand_dims(sizes, 1 - axis)


def scores(scores: Scores, masks: Masks, *, axes: Any = None) -> Any:
    """Draws a histogram of the scores of kept and pruned weights, with the threshold between them.

    The threshold is drawn if all leaves share one, as in masks of :func:`jaxprune.select` with
    ``scope="global"``. With one threshold per leaf the two histograms overlap.

    Raises:
      ValueError: for masks of other paths or shapes, no mask, or scores that are not finite.

    Examples:
      >>> axes = scores({"w": np.array([1.0, 4.0])}, {"w": np.array([False, True])})
      >>> axes.get_ylabel()
      'weights per bin'
    """
    pairs = [
        (np.asarray(s, np.float64).ravel(), np.asarray(m).ravel())
        for s, m in zip(jax.tree.leaves(scores), _tree.align_masks(scores, masks), strict=True)
        if m is not None
    ]
    pairs = [(score, kept) for score, kept in pairs if score.size]
    if not pairs:
        raise ValueError("masks: must hold at least one mask with weights, got none.")
    score, kept = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    if not np.isfinite(score).all():
        raise ValueError("scores: must be finite, got NaN or infinity. Check the loss.")
    axes = _new(axes, (7, 4))
    positive = score[score > 0]
    logarithmic = bool((score >= 0).all() and len(positive) and positive.min() < positive.max())
    if logarithmic:
        low = np.quantile(positive, 0.001)  # a few scores near zero would fill most of the figure
        edges = np.geomspace(low, positive.max(), 81)
        axes.set_xscale("log")
    else:
        edges = np.linspace(score.min(), score.max() + (score.min() == score.max()), 81)
    parts = {"pruned": (score[~kept], _COLORS[1]), "kept": (score[kept], _COLORS[0])}
    values = [np.clip(part, edges[0], edges[-1]) for part, _ in parts.values()]
    labels = [f"{name}: {len(part):,}" for name, (part, _) in parts.items()]
    axes.hist(values, edges, stacked=True, color=[c for _, c in parts.values()], label=labels)
    if len(values[0]) and len(values[1]) and score[~kept].max() <= score[kept].min():
        threshold = score[kept].min()
        axes.axvline(threshold, color=_ink(), linestyle="--", label=f"threshold: {threshold:.3g}")
    clipped = (score < edges[0]).sum()
    axes.set_xlabel(f"score ({clipped:,} smaller, in the first bin)" if clipped else "score")
    axes.set_ylabel("weights per bin")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, fontsize="small")
    return _tidy(axes)


def groups(groups: Groups, *, axes: Any = None) -> Any:
    r"""Draws the groups: one column for every group, one dot for every leaf that it spans.

    The dot shows the axes along which the units of the group lie. Leaves are listed in the order in
    which the program uses them. Squares in the first column are pinned axes.

    Examples:
      >>> params = {"in": jax.ShapeDtypeStruct((3, 8), "float32")}
      >>> params["out"] = jax.ShapeDtypeStruct((8, 2), "float32")
      >>> pair = jp.find_groups(lambda p, x: x @ p["in"] @ p["out"], params, np.ones((1, 3)))
      >>> [label.get_text() for label in groups(pair).get_xticklabels()]
      ['pinned', '8\nunits']
    """
    paths = list(groups.unit)
    row = {path: i for i, path in enumerate(paths)}
    axes = _new(axes, (4 + 0.6 * len(groups.groups), 1.2 + 0.3 * len(paths)))
    dot = {"ha": "center", "va": "center", "fontsize": "x-small"}
    for path, axis, *_ in groups.pinned:
        at = 0.22 * (axis - (len(groups.unit[path]) - 1) / 2)
        axes.plot(at, row[path], "s", color=_GRAY, markersize=11)
        axes.text(at, row[path], str(axis), color="white", **dot)
    for column, group in enumerate(groups.groups, 1):
        color = _COLORS[(column - 1) % len(_COLORS)]
        members: dict[str, list[int]] = {}
        for path, axis, _ in group.members:
            members.setdefault(path, []).append(axis)
        ends = [row[path] for path in members]
        axes.plot([column] * 2, [min(ends), max(ends)], color=color, linewidth=2)
        for path, cut in members.items():
            axes.plot(column, row[path], "o", color=color, markersize=13)
            axes.text(column, row[path], ",".join(map(str, sorted(set(cut)))), color="white", **dot)
    labels = ["pinned", *(f"{len(group.units):,}\nunits" for group in groups.groups)]
    axes.set_xticks(range(len(labels)), labels, fontsize="small")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(paths)), [_tree.show(path) for path in paths], fontsize="small")
    axes.set_xlim(-0.6, len(groups.groups) + 0.6)
    axes.set_ylim(len(paths) - 0.4, -0.6)
    axes.set_xlabel("dots: axes of the units of a group\nsquares: pinned axes", fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def training(
    steps: Sequence[int], sparsity: Sequence[float], loss: Sequence[float], *, axes: Any = None
) -> Any:
    """Draws sparsity and loss over the steps of training.

    Args:
      steps: the steps at which both were recorded.
      sparsity: the sparsity at each step, from ``jp.metrics.sparsity(jp.get_masks(opt_state))``.
      loss: the loss at each step.
      axes: the axes to draw the loss into; a second vertical axis shows the sparsity.

    Examples:
      >>> training([0, 10], [0.0, 0.9], [2.3, 0.4]).get_ylabel()
      'loss (solid)'
    """
    axes = _new(axes, (7, 4))
    axes.plot(steps, loss, color=_COLORS[0])
    axes.set_xlabel("step")
    axes.set_ylabel("loss (solid)")
    other = axes.twinx()
    other.plot(steps, sparsity, "--", color=_COLORS[1], drawstyle="steps-post")
    other.set_ylim(0, 1)
    _percent(other.yaxis)
    other.set_ylabel("sparsity (dashed)")
    other.spines["top"].set_visible(False)
    return _tidy(axes)
