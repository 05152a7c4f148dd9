"""What pruning saved: weights, bytes, FLOPs, time."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _program, _timing, _tree
from jaxprune._table import Shown, Table, spell


def sparsity(masks: Any) -> float:
    """Gives the fraction of prunable weights that are removed; leaves without a mask do not count.

    Raises:
      ValueError: if there is no mask.

    Examples:
      >>> sparsity({"w": jnp.array([True, False]), "b": None})
      0.5
    """
    leaves = jax.tree.leaves(masks)
    total = sum(math.prod(m.shape) for m in leaves)
    if not total:
        raise ValueError("sparsity needs at least one mask, got none.")
    if _tree.is_traced(masks):
        return 1 - sum(jnp.sum(m, dtype=jnp.float32) for m in leaves) / total
    return 1 - sum(int(jnp.count_nonzero(m)) for m in leaves) / total


def compression(params: Any, masks: Any) -> float:
    """Gives all params over those kept; leaves without a mask (biases, norms) count as kept.

    Examples:
      >>> compression({"w": jnp.ones(6), "b": jnp.ones(2)}, {"w": jnp.arange(6) < 2, "b": None})
      2.0
    """
    table = summary(params, masks)
    return table.size / max(table.kept, 1)


def stored_bytes(params: Any, masks: Any) -> int:
    r"""Counts the bytes that a file of the kept weights needs.

    A leaf with a mask takes its kept weights and one bit for each weight,
    :math:`b k + \lceil n / 8 \rceil`, where that is less than the :math:`b n` of the whole leaf.

    Raises:
      ValueError: for masks of other paths or shapes.
      TypeError: for masks that are not bool.

    Examples:
      >>> stored_bytes({"w": jnp.ones(16), "b": jnp.ones(2)}, {"w": jnp.arange(16) < 4, "b": None})
      26
    """
    total = 0
    leaves = jax.tree.leaves(params)
    for leaf, mask in zip(leaves, _tree.align_masks(params, masks), strict=True):
        size, itemsize = math.prod(jnp.shape(leaf)), _tree.dtype(leaf).itemsize
        kept = size if mask is None else int(jnp.count_nonzero(mask))
        total += min(size * itemsize, kept * itemsize + -(-size // 8))
    return total


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a :class:`Summary`.

    Attributes:
      path: where it is.
      shape: its shape.
      size: its weights.
      kept: those that are kept.
      masked: whether it has a mask.
      bytes: those of the array, zeros included.
      note: what looks odd.

    Examples:
      >>> summary({"w": jnp.ones(2)}, {"w": jnp.array([True, False])}).rows[0].kept
      1
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    masked: bool
    bytes: int
    note: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Shown):
    """What :func:`summary` found; shows as a table.

    Examples:
      >>> found = summary({"w": jnp.ones(2)}, {"w": jnp.array([True, False])})
      >>> found.size, found.kept, len(found.rows)
      (2, 1, 1)
    """

    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        """All weights."""
        return sum(row.size for row in self.rows)

    @property
    def kept(self) -> int:
        """All weights that are kept."""
        return sum(row.kept for row in self.rows)

    def _show(self) -> list[Table]:
        rows = []
        for r in self.rows:
            removed = f"{1 - r.kept / max(r.size, 1):.2%}" if r.masked else "-"
            counts = f"{r.kept:,} of {r.size:,}", removed
            rows.append((r.path, spell(r.shape), *counts, f"{r.bytes:,}", r.note))
        counts = f"{self.kept:,} of {self.size:,}", f"{1 - self.kept / max(self.size, 1):.2%}"
        rows.append(("total", "", *counts, f"{sum(r.bytes for r in self.rows):,}", ""))
        header = ("path", "shape", "kept", "sparsity", "bytes", "")
        return [Table(header, rows, left=(0, 1, 5), total=True)]


def summary(params: Any, masks: Any = None) -> Summary:
    """Tabulates shape, kept weights, sparsity and bytes of every leaf, with totals.

    Bytes are those of the arrays as they are, zeros included: masks alone save none. A 2-D leaf
    that is named bias or scale and masked is flagged: it looks like a stack of layers, and
    ``select`` wants to know with ``stacked=``. Masks also show alone: ``summary(masks)``.

    Raises:
      ValueError: for masks of other paths or shapes.
      TypeError: for masks that are not bool.

    Examples:
      >>> print(summary({"w": jnp.ones((2, 2))}, {"w": jnp.array([[True, False]] * 2)}))
      path   shape    kept  sparsity  bytes
      ─────────────────────────────────────
      w      2×2    2 of 4    50.00%     16
      ─────────────────────────────────────
      total         2 of 4    50.00%     16
    """
    if masks is None:
        masks = jax.tree.map(lambda x: x if _tree.dtype(x) == jnp.bool_ else None, params)
    rows = []
    aligned = zip(_tree.named_leaves(params), _tree.align_masks(params, masks), strict=True)
    for (path, leaf), mask in aligned:
        size = math.prod(jnp.shape(leaf))
        kept = size if mask is None else int(jnp.count_nonzero(mask))
        last = path.split("/")[-1]
        odd = mask is not None and jnp.ndim(leaf) == 2 and last in ("bias", "scale")
        note = "a stack of layers? see select(stacked=)" if odd else ""
        rows.append(
            Row(
                path,
                jnp.shape(leaf),
                size,
                kept,
                mask is not None,
                size * _tree.dtype(leaf).itemsize,
                note,
            )
        )
    return Summary(tuple(rows))


def flops(fn: Callable[..., Any], params: Any, *inputs: Any, masks: Any = None) -> float:
    r"""Counts the floating-point operations of ``fn(params, *inputs)``: two per multiply-add.

    Matmuls and convolutions are counted, wherever they are (einsum, attention, inside `scan`, once
    per step). With masks those of nonzero weights alone: a weight of a convolution counts once per
    output position. Of a `cond` the dearest branch counts, a `while` loop counts as one round.

    Args:
      fn: the function to trace; nothing is computed.
      params: arrays or shapes.
      *inputs: arrays or shapes.
      masks: masks of the params.

    Raises:
      ValueError: for masks of other paths or shapes.
      TypeError: for masks that are not bool.

    Examples:
      >>> f = lambda w, x: x @ w
      >>> flops(f, jnp.ones((3, 2)), jnp.ones((5, 3)))
      60.0
      >>> flops(f, jnp.ones((3, 2)), jnp.ones((5, 3)), masks=jnp.array([[True, False]] * 3))
      30.0
    """
    costs = _program.contractions(fn, params, *inputs, masks=masks)
    _program.warn_of_loops(costs, stacklevel=2)
    return 2.0 * _program.total(costs, _kept_macs)


def _kept_macs(contraction: _program.Contraction) -> float:
    return contraction.macs() * contraction.kept


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one leaf of the params costs, of a :class:`Layers`; the path is `None` for the others.

    Examples:
      >>> layers(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((5, 3))).rows[0].flops
      60
    """

    path: str | None
    shape: tuple[int, ...]
    params: int
    flops: float
    activations: int


@dataclasses.dataclass(frozen=True, repr=False)
class Layers(Shown):
    """What :func:`layers` found; shows as a table.

    Examples:
      >>> found = layers(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((5, 3)))
      >>> sum(row.params for row in found.rows)
      6
    """

    rows: tuple[Layer, ...]
    loops: tuple[str, ...] = ()  # counted once

    def _show(self) -> list[Table | str]:
        params = sum(r.params for r in self.rows)
        flops = sum(r.flops for r in self.rows)
        activations = sum(r.activations for r in self.rows)
        rows = []
        for r in self.rows:
            rows.append(
                (
                    "(no params)" if r.path is None else _tree.show(r.path),
                    "" if r.path is None else spell(r.shape),
                    f"{r.params:,}",
                    f"{r.params / max(params, 1):.1%}",
                    f"{r.flops:,.0f}",
                    f"{r.flops / max(flops, 1):.1%}",
                    f"{r.activations:,}",
                )
            )
        rows.append(("total", "", f"{params:,}", "", f"{flops:,.0f}", "", f"{activations:,}"))
        header = ("path", "shape", "params", "", "FLOPs", "", "activations")
        table = Table(header, rows, left=(0, 1), total=True)
        notes = [f"{loop} is counted once: its trip count is unknown." for loop in self.loops]
        return [table, *notes]


def layers(fn: Callable[..., Any], params: Any, *inputs: Any, masks: Any = None) -> Layers:
    """Tabulates params, FLOPs and activations of every weight that a matmul or convolution reads.

    Activations are the entries of the results. What the weights of a network cost to store and what
    they cost to run are two things: of VGG-16 the dense layers hold 89 % of the weights and do less
    than 1 % of the multiply-adds, so that pruning them saves storage and no time. Where two params
    meet in one product, the first is charged; products of activations stand in a row of their own.

    Args:
      fn: the function to trace; nothing is computed.
      params: arrays or shapes.
      *inputs: arrays or shapes.
      masks: masks of the params, to count kept weights alone.

    Examples:
      >>> print(layers(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((5, 3))))
      path   shape  params          FLOPs          activations
      ────────────────────────────────────────────────────────
      w      3×2         6  100.0%     60  100.0%           10
      ────────────────────────────────────────────────────────
      total              6             60                   10
    """
    leaves = dict(_tree.named_leaves(params))
    kept = dict.fromkeys(leaves)
    if masks is not None:
        kept = dict(zip(leaves, _tree.align_masks(params, masks), strict=True))
    costs = _program.contractions(fn, params, *inputs, masks=masks)
    _program.warn_of_loops(costs, stacklevel=2)
    charged: dict[str | None, list[_program.Contraction]] = {}
    for c in _program.dearest(costs, _kept_macs):
        charged.setdefault(c.paths[0] if c.paths else None, []).append(c)
    rows = []
    for path, contractions in charged.items():
        shape: tuple[int, ...] = ()
        size = 0
        if path is not None:
            shape, mask = jnp.shape(leaves[path]), kept[path]
            size = math.prod(shape) if mask is None else int(jnp.count_nonzero(mask))
        flops = 2 * sum(map(_kept_macs, contractions))
        rows.append(Layer(path, shape, size, flops, sum(c.outputs for c in contractions)))
    return Layers(tuple(rows), tuple(_program.loops(costs)))


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one function takes at one batch size, of a :class:`Latency`, in seconds.

    Examples:
      >>> found = latency({"dense": (lambda w, x: x @ w, jnp.ones((4, 4)))}, jnp.ones((8, 4)))
      >>> 0 < found.rows[0].median < 1
      True
    """

    name: str
    batch: int
    median: float
    quartiles: tuple[float, float]


@dataclasses.dataclass(frozen=True, repr=False)
class Latency(Shown):
    """What :func:`latency` measured; shows as a table.

    Examples:
      >>> found = latency({"dense": (lambda w, x: x @ w, jnp.ones((4, 4)))}, jnp.ones((8, 4)))
      >>> found.speedup("dense", batch=8)
      1.0
    """

    rows: tuple[Timing, ...]

    def speedup(self, name: str, batch: int) -> float:
        """Gives the median time of the first function over that of another."""
        times = {(row.name, row.batch): row.median for row in self.rows}
        return times[self.rows[0].name, batch] / times[name, batch]

    def _show(self) -> list[Table]:
        rows = []
        for row in self.rows:
            low, high = row.quartiles
            rows.append(
                (
                    row.name,
                    str(row.batch),
                    f"{row.median * 1e3:.3f} ms",
                    f"{low * 1e3:.3f} - {high * 1e3:.3f}",
                    f"{row.batch / row.median:,.0f}",
                    f"{self.speedup(row.name, row.batch):.2f}x",
                )
            )
        return [Table(("function", "batch", "median", "quartiles", "examples/s", "speed-up"), rows)]


def latency(
    functions: Mapping[str, tuple[Callable[..., Any], Any]], *inputs: Any, rounds: int = 30
) -> Latency:
    """Measures functions side by side, compilation excluded, at batch 1 and at the given batch.

    Every round calls each function once, so that what else the machine does falls on all alike.

    Args:
      functions: for every name ``(fn, params)``; the first is what others are compared with.
      *inputs: arrays whose first axis is the batch.
      rounds: how often to call each.

    Raises:
      ValueError: without inputs that have a first axis.

    Examples:
      >>> small = latency({"dense": (lambda w, x: x @ w, jnp.ones((4, 4)))}, jnp.ones((8, 4)))
      >>> [(row.name, row.batch) for row in small.rows]
      [('dense', 1), ('dense', 8)]
    """
    sizes = [jnp.shape(x)[0] for x in jax.tree.leaves(inputs) if jnp.ndim(x)]
    if not sizes:
        raise ValueError("latency needs inputs whose first axis is the batch, got none.")
    batch = sizes[0]
    first = jax.tree.map(lambda x: x[:1] if jnp.ndim(x) and len(x) == batch else x, inputs)
    jitted = {name: (jax.jit(fn), params) for name, (fn, params) in functions.items()}
    rows = []
    for size, args in {1: first, batch: inputs}.items():
        for name, times in _timing.interleave(jitted, args, rounds).items():
            low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
            rows.append(Timing(name, size, median, (low, high)))
    return Latency(tuple(rows))


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a function needs, in bytes.

    Attributes:
      params: the params.
      peak: what running it takes at once: params, inputs, outputs and intermediate values.

    Examples:
      >>> found = memory(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((5, 3)))
      >>> found.params < found.peak
      True
    """

    params: int
    peak: int


def memory(fn: Callable[..., Any], params: Any, *inputs: Any) -> Memory:
    """Gives the bytes of the params, and those that the compiled function needs at once.

    The peak is the compiler's: arguments, results, and the temporary buffers at their fullest.

    Args:
      fn: the function to compile; nothing is computed.
      params: arrays or shapes.
      *inputs: arrays or shapes.

    Examples:
      >>> memory(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((5, 3))).params
      24
    """
    leaves = jax.tree.leaves(params)
    stored = sum(math.prod(jnp.shape(w)) * _tree.dtype(w).itemsize for w in leaves)
    found: Any = jax.jit(fn).lower(params, *inputs).compile().memory_analysis()
    peak = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return Memory(stored, peak - found.alias_size_in_bytes)
