"""Magnitude pruning and comparison of checkpoints of any size, a piece at a time.

The masks are those of ``select(scores.magnitude(params), ...)``, bit for bit. The magnitudes of
float32 order as their bits do. The threshold that keeps the right number is found 16 bits at a
time: a pass over the tensors counts how often each value of the 16 occurs. Equal magnitudes are
ranked by a hash of their index, in the same way; the passes end as soon as the count is right.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import _select, _threshold
from jaxprune._files.safetensors import Tensor

_PIECE = 1 << 20  # entries in memory at once
_INFINITY = 0x7F800000  # the bits of +inf
_NOTHING = 0xFFFFFFFF  # above the bits of any magnitude

Runs = list[tuple[int, int]]


class Limit(NamedTuple):
    """At most ``n`` kept of every ``m`` along an axis, as in ``patterns.n_of_m``."""

    n: int
    m: int
    axis: int


class Cut(NamedTuple):
    """What of a tensor stays: magnitudes above ``key``, and those equal to it from ``rank`` up.

    ``first`` is the tensor's first index among all weights that compete; ``wide`` whether those
    need 64 bits.
    """

    first: int
    key: int
    rank: int
    wide: bool


def select(
    tensors: Sequence[Tensor],
    sparsity: float,
    scope: str,
    limit: Limit | None = None,
    expect: Callable[[int], object] = lambda n: None,
) -> dict[str, Cut]:
    """Finds which weights to keep, by tensor.

    Args:
      tensors: those to prune, in the order of the leaves of a tree.
      sparsity: the fraction to remove.
      scope: ``"global"``, ``"layer"`` or ``"erk"``.
      limit: n:m.
      expect: hears, before a pass, how many bytes it will read.

    Raises:
      ValueError: for weights that are not finite.
    """
    share = 1.0 if limit is None else limit.n / limit.m
    paths, sizes = [t.path for t in tensors], [t.size for t in tensors]
    budget = _select.budget(scope, sparsity, paths, sizes, [t.shape for t in tensors], share)
    firsts = np.cumsum([0, *sizes]).tolist()
    group = [0] * len(tensors) if scope == "global" else range(len(tensors))
    cuts: dict[str, Cut] = {}
    for g, keep in enumerate(budget.tolist()):
        members = [
            (t, first) for t, first, at in zip(tensors, firsts, group, strict=False) if at == g
        ]
        key, rank = _cut(members, keep, limit, firsts[-1] >= 2**32, expect)
        cuts |= {t.path: Cut(first, key, rank, firsts[-1] >= 2**32) for t, first in members}
    return cuts


def _cut(
    members: list[tuple[Tensor, int]],
    keep: int,
    limit: Limit | None,
    wide: bool,
    expect: Callable[[int], object],
) -> tuple[int, int]:
    def keys() -> Iterator[np.ndarray]:
        expect(sum(t.bytes for t, _ in members))
        for tensor, _ in members:
            for _, _, key, allowed in _pieces(tensor, limit):
                yield key.reshape(-1) if allowed is None else key[allowed]

    def ranks() -> Iterator[np.ndarray]:
        expect(sum(t.bytes for t, _ in members))
        for tensor, first in members:
            for runs, _, key, allowed in _pieces(tensor, limit):
                tie = key == threshold if allowed is None else (key == threshold) & allowed
                yield _hash(runs, first, wide)[tie.reshape(-1)]

    sizes = [t.size if limit is None else t.size // limit.m * limit.n for t, _ in members]
    keep = min(keep, sum(sizes))
    # What float32 holds of bfloat16 and shorter types has only zeros in the lower half.
    short = all(jnp.finfo(t.entries).nmant <= 7 for t, _ in members)
    threshold, count, above = _search(keys, (16,) if short else (16, 0), keep)
    if count == keep:
        return threshold if keep else _NOTHING, 0
    shifts = (48, 32, 16, 0) if wide else (16, 0)
    return threshold, _search(ranks, shifts, keep - above)[0]


def _search(
    read: Callable[[], Iterable[np.ndarray]], shifts: Sequence[int], keep: int
) -> tuple[int, int, int]:
    """Finds the largest threshold that at least ``keep`` values reach.

    Returns:
      The threshold, how many reach it, and how many pass it.
    """
    threshold, above = 0, 0
    for shift in shifts:
        counts = np.zeros(1 << 16, np.int64)
        for values in read():
            if shift != shifts[0]:
                values = values[values >> (shift + 16) == threshold >> (shift + 16)]
            digits = (values >> shift) & 0xFFFF
            counts += np.bincount(digits.astype(np.intp), minlength=1 << 16)
        reach = np.append(above + np.cumsum(counts[::-1])[::-1], above)
        digit = int(np.flatnonzero(reach[:-1] >= keep)[-1])
        threshold |= digit << shift
        count, above = int(reach[digit]), int(reach[digit + 1])
        if count == keep:
            break
    return threshold, count, above


def prune(
    tensor: Tensor, cut: Cut, limit: Limit | None, kept: dict[str, int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Gives the tensor, zeros for what goes, as ``(start, entries)``; counts what is kept."""
    kept[tensor.path] = 0
    for runs, values, key, allowed in _pieces(tensor, limit):
        stays, tie = key > cut.key, key == cut.key
        if cut.rank and tie.any():
            tie &= (_hash(runs, cut.first, cut.wide) >= cut.rank).reshape(key.shape)
        stays |= tie
        if allowed is not None:
            stays &= allowed
        kept[tensor.path] += int(np.count_nonzero(stays))
        bits = values.view(f"u{values.itemsize}")
        bits *= stays.reshape(-1)
        for start, stop in runs:
            yield start, values[: stop - start]
            values = values[stop - start :]


def _pieces(
    tensor: Tensor, limit: Limit | None
) -> Iterator[tuple[Runs, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Reads a tensor in pieces of whole groups: where, entries, magnitudes, and which compete.

    The magnitudes, as bits of float32, have axes ``(groups, m, width)``.
    """
    m, width = 1, 1
    if limit is not None:
        m, axis = limit.m, limit.axis % len(tensor.shape)
        width = int(np.prod(tensor.shape[axis + 1 :], dtype=np.int64))
    for runs in _runs(tensor.size, m, width):
        parts = [tensor.read(start, stop) for start, stop in runs]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        with np.errstate(all="ignore"):
            key = values.astype(np.float32).view(np.uint32)
        key &= 0x7FFFFFFF
        if key.max() >= _INFINITY:
            raise ValueError(
                f"{tensor.path}: holds weights that are NaN or infinite in float32, and they have "
                "no magnitude to prune by. Repair them, or leave the tensor out with --exclude."
            )
        key = key.reshape(-1, m, width if len(runs) == 1 else len(parts[0]))
        allowed = None
        if limit is not None:
            tie = _hash(runs, 0, tensor.size >= 2**32).reshape(key.shape)
            allowed = _best(limit.n, key, tie)
        yield runs, values, key, allowed


def _runs(size: int, m: int = 1, width: int = 1) -> Iterator[Runs]:
    """Cuts a flat tensor into pieces of m rows of one width, or of many such groups."""
    group = m * width
    if group <= _PIECE:
        step = _PIECE // group * group
        for start in range(0, size, step):
            yield [(start, min(start + step, size))]
        return
    step = max(_PIECE // m, 1)
    for top in range(0, size, group):
        for left in range(0, width, step):
            right = min(left + step, width)
            yield [(row + left, row + right) for row in range(top, top + group, width)]


def _best(n: int, key: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """Marks the n largest of every m along the middle axis."""
    rank = np.zeros(key.shape, np.int32)
    for step in range(1, key.shape[1]):
        other, other_tie = np.roll(key, step, 1), np.roll(tie, step, 1)
        rank += (other > key) | ((other == key) & (other_tie > tie))
    return rank < n


def _hash(runs: Runs, first: int, wide: bool) -> np.ndarray:
    dtype = np.uint64 if wide else np.uint32
    index = [np.arange(first + start, first + stop, dtype=dtype) for start, stop in runs]
    # With no axes to walk it takes the indices themselves, and NumPy arrays as well as JAX's.
    return _threshold.hashed((), np.concatenate(index))  # type: ignore[arg-type, return-value]


def zeros(tensor: Tensor) -> int | None:
    """Counts zeros; `None` where entries are packed."""
    if tensor.packed:
        return None
    pieces = (tensor.read(*run) for (run,) in _runs(tensor.size))
    return sum(int(np.count_nonzero(piece == 0)) for piece in pieces)


class Change(NamedTuple):
    """How two tensors differ: each entry counts once; ``largest`` is the largest change."""

    zeroed: int
    revived: int
    changed: int
    largest: float


def compare(a: Tensor, b: Tensor) -> Change:
    """Counts what became zero, what no longer is, and what else has other bits."""
    zeroed = revived = changed = 0
    largest: float = 0
    for ((start, stop),) in _runs(a.size):
        before, after = a.read(start, stop), b.read(start, stop)
        bits = f"u{a.entries.itemsize}"
        differ = before.view(bits) != after.view(bits)
        if not differ.any():
            continue
        before, after = before[differ], after[differ]
        gone, back = (before != 0) & (after == 0), (before == 0) & (after != 0)
        zeroed += int(np.count_nonzero(gone))
        revived += int(np.count_nonzero(back))
        changed += int(np.count_nonzero(~(gone | back)))
        largest = np.maximum(largest, _distance(before, after)).item()  # NaN stays
    if a.packed:
        return Change(0, 0, zeroed + revived + changed, float("nan"))
    return Change(zeroed, revived, changed, largest)


def _distance(a: np.ndarray, b: np.ndarray) -> Any:
    if a.dtype.kind in "iu":  # exactly, where float64 would round
        high, low = np.maximum(a, b), np.minimum(a, b)
        return (high.view(f"u{a.itemsize}") - low.view(f"u{a.itemsize}")).max()
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        return np.abs(a.astype(wide) - b.astype(wide)).max()
