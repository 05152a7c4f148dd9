"""Numbers and tables: sparsity, bytes, FLOPs, time and memory."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _tree
from jaxprune._table import Shown, Table, spell
from jaxprune._tree import Masks, Params

__all__ = ["Latency", "Layer", "Layers", "Memory", "Row", "Summary", "Timing", "compression"]
__all__ += ["Table", "flops", "latency", "layers", "memory", "sparsity", "stored_bytes", "summary"]


def sparsity(masks: Masks) -> float | jax.Array:
    """Returns the fraction of prunable weights that are pruned.

    Leaves without a mask do not count. Traced masks give a float32 scalar.

    Raises:
      ValueError: if there is no mask.
      TypeError: for a leaf that is not a bool array.

    Examples:
      >>> sparsity({"w": jnp.array([True, False]), "b": None})
      0.5
    """
    leaves = dict(_tree.named_leaves(masks))
    for path, mask in leaves.items():
        if not isinstance(mask, _tree.ARRAYS) or _tree.dtype(mask) != jnp.bool_:
            got = _tree.dtype(mask) if isinstance(mask, _tree.ARRAYS) else type(mask).__name__
            raise TypeError(f"{_tree.show(path)}: masks must be bool arrays, got {got}.")
    total = sum(math.prod(jnp.shape(m)) for m in leaves.values())
    if not total:
        raise ValueError("masks: must hold at least one mask, got none.")
    kept = _counts(list(leaves.values()))
    if _tree.is_traced(kept):
        with jax.enable_x64(True):  # pruned weights, so that none of them is exactly 0
            return ((total - jnp.sum(kept)) / total).astype(jnp.float32)
    return (total - int(np.sum(kept))) / total


def _counts(masks: Sequence[Any]) -> Any:
    """Counts the kept weights of each mask.

    On the host, because a program for each shape takes seconds to compile, unless masks would take
    long to get there: then by one program for all.
    """
    if not masks:
        return np.zeros(0, np.int64)
    if not _tree.is_traced(masks) and _is_near(masks):
        return np.array([np.count_nonzero(m) for m in jax.device_get(masks)])
    with jax.enable_x64(True):
        counts = _counted(masks)
    return counts if _tree.is_traced(counts) else jax.device_get(counts)


@jax.jit
def _counted(masks: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([_mesh.replicated(jnp.sum(m, dtype=jnp.int64)) for m in masks])


def _is_near(masks: Sequence[Any]) -> bool:
    """Returns whether masks are on this host, or on devices of it and small enough to copy."""
    away = [m for m in masks if not _mesh.on_host(m)]
    return all(m.is_fully_addressable for m in away) and sum(m.size for m in away) < 2**28


def compression(params: Params, masks: Masks) -> float:
    """Returns the number of params divided by the number kept.

    Leaves without a mask (biases, norms) count as kept.

    Examples:
      >>> compression({"w": jnp.ones(6), "b": jnp.ones(2)}, {"w": jnp.arange(6) < 2, "b": None})
      2.0
    """
    table = summary(params, masks)
    return table.size / max(table.kept, 1)


def stored_bytes(params: Params, masks: Masks) -> int:
    r"""Counts the bytes that a file of the kept weights needs.

    A leaf of n weights of b bytes with a mask takes its k kept weights and one bit for each weight,
    :math:`b k + \lceil n / 8 \rceil`, where that is less than the :math:`b n` of the dense leaf.

    Examples:
      >>> stored_bytes({"w": jnp.ones(16), "b": jnp.ones(2)}, {"w": jnp.arange(16) < 4, "b": None})
      26
    """
    return sum(
        min(row.bytes, row.kept * (row.bytes // max(row.size, 1)) + -(-row.size // 8))
        for row in _rows(params, masks)
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a :class:`Summary`.

    Attributes:
      path: the path of the leaf.
      shape: its shape.
      size: its number of weights.
      kept: the number of weights that are kept.
      masked: whether it has a mask.
      bytes: the bytes of the array, zeros included.
      note: a hint, if the mask looks wrong.
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
    """The result of :func:`summary`; prints as a table."""

    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(row.size for row in self.rows)

    @property
    def kept(self) -> int:
        """The number of weights that are kept."""
        return sum(row.kept for row in self.rows)

    def _show(self) -> list[Table]:
        total = Row("total", (), self.size, self.kept, True, sum(r.bytes for r in self.rows))
        rows = []
        for r in (*self.rows, total):
            shape = "" if r is total else spell(r.shape)
            removed = f"{1 - r.kept / max(r.size, 1):.2%}" if r.masked else "-"
            counts = f"{r.kept:,} of {r.size:,}", removed, f"{r.bytes:,}"
            rows.append((r.path, shape, *counts, r.note))
        header = ("path", "shape", "kept", "sparsity", "bytes", "")
        return [Table(header, rows, left=(0, 1, 5), total=True)]


def summary(params: Params, masks: Masks | None = None) -> Summary:
    """Tabulates shape, kept weights, sparsity and bytes of every leaf, with totals.

    Bytes are those of the dense arrays, zeros included: masks alone save none. A masked 2-D leaf
    named bias or scale is flagged, because it looks like a stack of layers: pass ``stacked=`` to
    ``select``. ``summary(masks)`` also works without params.

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
    return Summary(tuple(_rows(params, masks)))


def _rows(params: Params, masks: Masks) -> list[Row]:
    """Lists the shape, the kept weights and the bytes of every leaf."""
    rows = []
    aligned = _tree.align_masks(params, masks)
    counts = iter(_counts([mask for mask in aligned if mask is not None]).tolist())
    for (path, leaf), mask in zip(_tree.named_leaves(params), aligned, strict=True):
        shape, masked = jnp.shape(leaf), mask is not None
        size = math.prod(shape)
        kept = next(counts) if masked else size
        odd = masked and len(shape) == 2 and path.split("/")[-1] in ("bias", "scale")
        note = "a stack of layers? see select(stacked=)" if odd else ""
        rows.append(Row(path, shape, size, kept, masked, size * _tree.dtype(leaf).itemsize, note))
    return rows


def flops(
    apply_fn: Callable[..., Any], params: Params, *inputs: Any, masks: Masks | None = None
) -> float:
    r"""Counts the floating-point operations of ``apply_fn(params, *inputs)``, two per multiply-add.

    Matmuls and convolutions are counted, also those of an einsum, of attention, and of a `scan`,
    once per step. With masks, only the multiply-adds of kept weights are counted; a weight of a
    convolution counts once per output position. For `cond` the most expensive branch is counted; a
    `while` loop counts as one iteration, with a warning. ``groups.costs``, ``units.flops`` and
    ``groups.select(cost="flops")`` count in the same way.

    Args:
      apply_fn: the function to trace; nothing is computed.
      params: arrays or shapes.
      *inputs: arrays or shapes.
      masks: masks of the params, as for :func:`summary`.

    Examples:
      >>> f = lambda w, x: x @ w
      >>> flops(f, jnp.ones((3, 2)), jnp.ones((5, 3)))
      60.0
      >>> flops(f, jnp.ones((3, 2)), jnp.ones((5, 3)), masks=jnp.array([[True, False]] * 3))
      30.0
    """
    costs = _program.contractions(apply_fn, params, *inputs, masks=masks)
    _program.warn_of_loops(costs, stacklevel=2)
    return 2.0 * _program.total(costs)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The cost of one leaf of the params, in a :class:`Layers`.

    Attributes:
      path: the path of the leaf, or `None` for products of activations.
      shape: its shape.
      params: the number of weights that are kept.
      flops: the FLOPs of the products that it is a factor of.
      activations: the entries of their results.
    """

    path: str | None
    shape: tuple[int, ...]
    params: int
    flops: float
    activations: int


@dataclasses.dataclass(frozen=True, repr=False)
class Layers(Shown):
    """The result of :func:`layers`; prints as a table.

    Attributes:
      rows: one for each leaf.
      loops: the `while` loops that are counted as one iteration.
    """

    rows: tuple[Layer, ...]
    loops: tuple[str, ...] = ()

    def _show(self) -> list[Table | str]:
        params = sum(r.params for r in self.rows)
        flops = sum(r.flops for r in self.rows)
        activations = sum(r.activations for r in self.rows)
        rows = []
        for r in self.rows:
            name = ("(no params)", "") if r.path is None else (_tree.show(r.path), spell(r.shape))
            shares = f"{r.params / max(params, 1):.1%}", f"{r.flops / max(flops, 1):.1%}"
            counts = f"{r.params:,}", shares[0], f"{r.flops:,.0f}", shares[1], f"{r.activations:,}"
            rows.append((*name, *counts))
        rows.append(("total", "", f"{params:,}", "", f"{flops:,.0f}", "", f"{activations:,}"))
        header = ("path", "shape", "params", "", "FLOPs", "", "activations")
        notes = [f"{x} is counted once, because its trip count is unknown." for x in self.loops]
        return [Table(header, rows, left=(0, 1), total=True), *notes]


def layers(
    apply_fn: Callable[..., Any], params: Params, *inputs: Any, masks: Masks | None = None
) -> Layers:
    """Tabulates params, FLOPs and activations of every weight that a matmul or convolution reads.

    Storage and compute differ: in VGG-16 the dense layers hold 89 % of the weights but do less than
    1 % of the multiply-adds, so that pruning them saves storage and no time. A product of two
    params is charged to the first; products of activations have a row of their own. FLOPs are
    counted as by :func:`flops`, from the same arguments; activations are the entries of the
    results.

    Examples:
      >>> print(layers(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((5, 3))))
      path   shape  params          FLOPs          activations
      ────────────────────────────────────────────────────────
      w      3×2         6  100.0%     60  100.0%           10
      ────────────────────────────────────────────────────────
      total              6             60                   10
    """
    dense = jax.tree.map(lambda w: None, params)
    leaves = {row.path: row for row in _rows(params, dense if masks is None else masks)}
    costs = _program.contractions(apply_fn, params, *inputs, masks=masks)
    _program.warn_of_loops(costs, stacklevel=2)
    charged: dict[str | None, list[_program.Contraction]] = {}
    for c in _program.most_expensive(costs):
        charged.setdefault(c.paths[0] if c.paths else None, []).append(c)
    rows = []
    for path, contractions in charged.items():
        shape, kept = ((), 0) if path is None else (leaves[path].shape, leaves[path].kept)
        outputs = sum(c.outputs for c in contractions)
        rows.append(Layer(path, shape, kept, 2 * _program.total(contractions), outputs))
    return Layers(tuple(rows), tuple(_program.loops(costs)))


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one function at one batch size, in a :class:`Latency`, in seconds."""

    name: str
    batch: int
    median: float
    quartiles: tuple[float, float]


@dataclasses.dataclass(frozen=True, repr=False)
class Latency(Shown):
    """The result of :func:`latency`; prints as a table."""

    rows: tuple[Timing, ...]

    def speedup(self, name: str, batch: int) -> float:
        """Returns the median time of the first function divided by that of another."""
        times = {(row.name, row.batch): row.median for row in self.rows}
        return times[self.rows[0].name, batch] / times[name, batch]

    def _show(self) -> list[Table]:
        rows = []
        for row in self.rows:
            times = [f"{x * 1e3:.3f}" for x in (row.median, *row.quartiles)]
            rates = f"{row.batch / row.median:,.0f}", f"{self.speedup(row.name, row.batch):.2f}x"
            cells = str(row.batch), f"{times[0]} ms", f"{times[1]} - {times[2]}"
            rows.append((row.name, *cells, *rates))
        return [Table(("function", "batch", "median", "quartiles", "examples/s", "speed-up"), rows)]


def latency(
    functions: Mapping[str, tuple[Callable[..., Any], Params]], *inputs: Any, rounds: int = 30
) -> Latency:
    """Measures the times of several functions, at batch 1 and at the given batch.

    Compilation is excluded. Every round calls each function once, so that background load affects
    all functions equally.

    Args:
      functions: for every name ``(apply_fn, params)``; the others are compared with the first.
      *inputs: arrays whose first axis is the batch.
      rounds: the number of calls of each function.

    Raises:
      ValueError: without inputs that have a first axis.
      TypeError: for anything but a mapping to pairs of a function and its params.

    Examples:
      >>> times = latency({"dense": (lambda w, x: x @ w, jnp.ones((4, 4)))}, jnp.ones((8, 4)))
      >>> [(row.name, row.batch) for row in times.rows], times.speedup("dense", batch=8)
      ([('dense', 1), ('dense', 8)], 1.0)
    """
    if not isinstance(functions, Mapping) or not all(map(_is_pair, functions.values())):
        raise TypeError(
            "functions: must map names to pairs `(apply_fn, params)`, got "
            f"{_kind(functions)}. Write {{'dense': (apply_fn, params)}}."
        )
    sizes = [jnp.shape(x)[0] for x in jax.tree.leaves(inputs) if jnp.ndim(x)]
    if not sizes:
        raise ValueError("inputs: must have a first axis, the batch, got none that has.")
    batch = sizes[0]
    first = jax.tree.map(
        lambda x: jax.lax.slice_in_dim(x, 0, 1) if jnp.ndim(x) and len(x) == batch else x, inputs
    )
    jitted = {name: (jax.jit(apply_fn), params) for name, (apply_fn, params) in functions.items()}
    rows = []
    for size, args in {1: first, batch: inputs}.items():
        for name, times in interleave(jitted, args, rounds).items():
            low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
            rows.append(Timing(name, size, median, (low, high)))
    return Latency(tuple(rows))


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple | list) and len(x) == 2 and callable(x[0])


def _kind(functions: Any) -> str:
    if not isinstance(functions, Mapping):
        return type(functions).__name__
    return f"{{{', '.join(f'{name!r}: {type(x).__name__}' for name, x in functions.items())}}}"


def interleave(
    functions: Mapping[str, tuple[Callable[..., Any], Params]], args: Any, rounds: int
) -> dict[str, list[float]]:
    """Calls each function once a round, after a first one; returns the seconds by name.

    Every other round goes backwards: later functions find a warmer machine.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions.items())
    for i in range(rounds + 1):
        for name, (apply_fn, params) in order if i % 2 else order[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(apply_fn(params, *args))
            if i:
                times[name].append(time.perf_counter() - start)
    return times


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory that a function needs, in bytes.

    Attributes:
      params: the bytes of the params.
      peak: the most bytes in use at one time: params, inputs, outputs and intermediate values.
    """

    params: int
    peak: int


def memory(apply_fn: Callable[..., Any], params: Params, *inputs: Any) -> Memory:
    """Returns the bytes of the params, and the peak memory of the compiled function.

    The peak is the compiler's estimate: arguments, results, and the largest temporary buffers.
    Arrays may be shapes: nothing is computed.

    Examples:
      >>> memory(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((5, 3))).params
      24
    """
    stored = sum(row.bytes for row in _rows(params, jax.tree.map(lambda w: None, params)))
    used: Any = jax.jit(apply_fn).lower(params, *inputs).compile().memory_analysis()
    peak = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    return Memory(stored, peak - used.alias_size_in_bytes)
