"""Magnitude pruning and comparison of checkpoints of any size, a piece at a time.

The masks are those of ``select(scores.magnitude(params), ...)``, bit for bit. Magnitudes of
float32 order as their bits do, so the smallest magnitude that is kept is found as an integer, 16
bits at a time: a pass over the tensors counts how often each value of the 16 bits occurs. Weights
of equal magnitude are ranked by a hash of their index, which is searched in the same way. The
passes end as soon as the count is right.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import _select, _threshold
from jaxprune._files.checkpoint import FileError, Tensor, Tick

_PIECE = 1 << 20  # entries that are in memory at a time
_INFINITY = 0xFF800000  # the key of +inf
_NOTHING = 0xFFFFFFFF  # above the key of any weight

Runs = list[tuple[int, int]]  # of entries of a flat tensor, as (start, stop)


class NOfM(NamedTuple):
    """At most ``n`` kept of every ``m`` along an axis, as in ``patterns.n_of_m``; 1:1 keeps all."""

    n: int
    m: int
    axis: int = -2


class Threshold(NamedTuple):
    """Keeps the weights with larger keys, and of those with this key the ranks from ``rank`` up."""

    key: int
    rank: int
    first: Any  # index of the tensor's first weight among all weights to prune: uint32 or uint64


def thresholds(
    tensors: Sequence[Tensor], sparsity: float, scope: str, pattern: NOfM, expect: Tick
) -> dict[str, Threshold]:
    """Finds which weights to keep, for tensors in the order of the leaves of a tree.

    Before a pass over tensors, ``expect`` is called with the number of bytes that it will read.
    """
    n, m, _ = pattern
    paths, sizes = [t.path for t in tensors], [t.size for t in tensors]
    budget = _select.budget(scope, sparsity, paths, sizes, [t.shape for t in tensors], n / m)
    firsts = np.cumsum([0, *sizes], dtype=_index_dtype(sum(sizes)))
    members = list(zip(tensors, firsts[:-1], strict=True))
    pools = [members] if scope == "global" else [[member] for member in members]
    result: dict[str, Threshold] = {}
    for pool, keep in zip(pools, budget.tolist(), strict=True):
        keep = min(keep, sum(t.size // m * n for t, _ in pool))
        key, rank = _key_and_rank(pool, keep, pattern, expect)
        result |= {t.path: Threshold(key, rank, first) for t, first in pool}
    return result


def _key_and_rank(
    pool: Sequence[tuple[Tensor, Any]], keep: int, pattern: NOfM, expect: Tick
) -> tuple[int, int]:
    def keys_or_ranks(tie: int | None) -> Iterator[np.ndarray]:
        """Yields the keys of all weights, or the ranks of those that have this key."""
        expect(sum(t.bytes for t, _ in pool))
        for tensor, first in pool:
            for runs, _, key in _pieces(tensor, pattern):
                key = key.reshape(-1)
                yield key if tie is None else _ranks(runs, first)[key == tie]

    # As float32, bfloat16 and shorter types have zeros in the lower half of their bits.
    short = all(jnp.finfo(t.entries).nmant <= 7 for t, _ in pool)
    key, reaching, above = _search(lambda: keys_or_ranks(None), (16,) if short else (16, 0), keep)
    if reaching == keep:
        return key if keep else _NOTHING, 0
    shifts = (48, 32, 16, 0) if pool[0][1].dtype == np.uint64 else (16, 0)
    return key, _search(lambda: keys_or_ranks(key), shifts, keep - above)[0]


def _search(
    read: Callable[[], Iterable[np.ndarray]], shifts: Sequence[int], keep: int
) -> tuple[int, int, int]:
    """Returns the largest threshold that ``keep`` values reach, how many reach and exceed it."""
    threshold, above = 0, 0
    for shift in shifts:
        counts = np.zeros(1 << 16, np.int64)
        for values in read():
            if shift != shifts[0]:  # only those that agree in the bits found so far
                values = values[values >> (shift + 16) == threshold >> (shift + 16)]
            digits = (values >> shift) & 0xFFFF
            counts += np.bincount(digits.astype(np.intp), minlength=1 << 16)
        reaching = np.append(above + np.cumsum(counts[::-1])[::-1], above)  # by digit
        digit = int(np.flatnonzero(reaching[:-1] >= keep)[-1])
        threshold |= digit << shift
        count, above = int(reaching[digit]), int(reaching[digit + 1])
        if count == keep:
            break
    return threshold, count, above


def pruned(
    tensor: Tensor, threshold: Threshold, pattern: NOfM, kept: dict[str, int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the pruned tensor as ``(start, entries)``, and adds the number of kept weights."""
    kept[tensor.path] = 0
    for runs, entries, key in _pieces(tensor, pattern):
        mask, tie = key > threshold.key, key == threshold.key
        if threshold.rank and tie.any():
            tie &= (_ranks(runs, threshold.first) >= threshold.rank).reshape(key.shape)
        mask |= tie
        kept[tensor.path] += int(np.count_nonzero(mask))
        bits = entries.view(f"u{entries.itemsize}")  # times a bit: -1.0 becomes 0.0, not -0.0
        bits *= mask.reshape(-1)
        for start, stop in runs:
            yield start, entries[: stop - start]
            entries = entries[stop - start :]


def _pieces(tensor: Tensor, pattern: NOfM) -> Iterator[tuple[Runs, np.ndarray, np.ndarray]]:
    """Yields where a piece is, its entries, and their keys, of shape (chunks, m, width).

    The key is the magnitude as bits of float32, and one more bit. It is 0 for weights that the
    pattern removes, so that they do not compete.
    """
    n, m, axis = pattern
    width = math.prod(tensor.shape[axis % len(tensor.shape) + 1 :])
    for runs in _runs(tensor.size, m, width):
        parts = [tensor.read(start, stop) for start, stop in runs]
        entries = parts[0] if len(parts) == 1 else np.concatenate(parts)
        with np.errstate(all="ignore"):
            key = entries.astype(np.float32).view(np.uint32)
        key |= 0x80000000
        if key.max() >= _INFINITY:
            raise FileError(
                f"{tensor.file}: {tensor.path}: weights must be finite in float32, got NaN or "
                "infinity. Repair them, or leave out this tensor with --exclude."
            )
        key = key.reshape(-1, m, width if len(runs) == 1 else len(parts[0]))
        if n < m:
            ranks = _ranks(runs, _index_dtype(tensor.size)(0))
            key *= _largest(n, key, ranks.reshape(key.shape))
        yield runs, entries, key


def _runs(size: int, m: int = 1, width: int = 1) -> Iterator[Runs]:
    """Cuts a flat tensor into pieces that hold entire chunks.

    Along the axis of a pattern, neighbours are ``width`` entries apart, so ``m * width`` entries
    hold ``width`` chunks. Where these fit, a piece is one run. Where they do not, it is ``m`` short
    runs, here for m = 2::

        row 0  ░░░░▓▓▓▓░░░░░░░░   the piece ▓ is [(4, 8), (20, 24)]
        row 1  ░░░░▓▓▓▓░░░░░░░░
    """
    rows = m * width
    if rows <= _PIECE:
        step = _PIECE // rows * rows
        for start in range(0, size, step):
            yield [(start, min(start + step, size))]
        return
    step = max(_PIECE // m, 1)
    for top in range(0, size, rows):
        for left in range(0, width, step):
            right = min(left + step, width)
            yield [(row + left, row + right) for row in range(top, top + rows, width)]


def _largest(n: int, key: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Marks the n largest of every m along the middle axis; equal keys are ordered by rank."""
    larger = np.zeros(key.shape, np.int32)
    for step in range(1, key.shape[1]):
        other, other_rank = np.roll(key, step, 1), np.roll(ranks, step, 1)
        larger += (other > key) | ((other == key) & (other_rank > ranks))
    return larger < n


def _index_dtype(size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint32 if size < _threshold.UINT32_END else np.uint64


def _ranks(runs: Runs, first: Any) -> np.ndarray:
    """Returns the ranks of entries among equal ones: hashes of their indices, from ``first`` on."""
    indices = [np.arange(start, stop, dtype=first.dtype) for start, stop in runs]
    return _threshold.mix(first + np.concatenate(indices))


def zeros(tensor: Tensor) -> int | None:
    """Counts the zeros; `None` for packed entries."""
    if tensor.packed:
        return None
    pieces = (tensor.read(*run) for (run,) in _runs(tensor.size))
    return sum(int(np.count_nonzero(piece == 0)) for piece in pieces)


class Changes(NamedTuple):
    """The number of entries that differ, each counted once, and their largest difference."""

    zeroed: int
    revived: int
    changed: int
    largest: float


def changes(a: Tensor, b: Tensor) -> Changes:
    """Counts the entries that became zero, were zero, or have other bits."""
    counts = np.zeros(3, np.int64)
    largest: float = 0
    for ((start, stop),) in _runs(a.size):
        before, after = a.read(start, stop), b.read(start, stop)
        bits = f"u{a.entries.itemsize}"
        differ = before.view(bits) != after.view(bits)
        if not differ.any():
            continue
        before, after = before[differ], after[differ]
        to_zero, from_zero = (before != 0) & (after == 0), (before == 0) & (after != 0)
        counts += [np.count_nonzero(s) for s in (to_zero, from_zero, ~(to_zero | from_zero))]
        largest = np.maximum(largest, _distance(before, after)).item()  # NaN stays
    if a.packed:
        return Changes(0, 0, int(counts.sum()), float("nan"))
    return Changes._make([*counts.tolist(), largest])


def _distance(a: np.ndarray, b: np.ndarray) -> Any:
    if a.dtype.kind in "iu":  # exactly, where float64 would round
        high, low = np.maximum(a, b), np.minimum(a, b)
        return (high.view(f"u{a.itemsize}") - low.view(f"u{a.itemsize}")).max()
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        return np.abs(a.astype(wide) - b.astype(wide)).max()
