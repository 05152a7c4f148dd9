"""Finds the largest scores on the host: the masks of `_threshold`, without a program to compile.

A random sample brackets the threshold. One pass counts the scores above the bracket and copies
those inside it, a small part, which is partitioned. Scores that tie at the threshold are ranked by
the hash of their index, and the ranks are searched in the same way.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import _threshold

_CHUNK = 1 << 16  # entries at a time, so that all passes over them hit the cache
_SAMPLE = 1 << 16
_MANY = 4 * _SAMPLE  # fewer values are partitioned without a bracket

Read = Callable[[], Iterable[np.ndarray]]  # a pass over some values, in pieces


class _Leaf(NamedTuple):
    scores: np.ndarray  # flat, like all others
    within: np.ndarray | None
    first: Any  # the index of the first score among all: uint32 or uint64
    mask: np.ndarray  # the result


def largest(
    scores: Sequence[np.ndarray],
    within: Sequence[np.ndarray | None],
    keep: np.ndarray,
    pools: Sequence[int],
) -> tuple[list[np.ndarray], bool]:
    """Marks the ``keep[g]`` largest scores of every pool, like :func:`_threshold.largest`.

    Returns the masks, and whether all competing scores are finite; if not, the masks are void.
    """
    dtype = _threshold.comparable(s.dtype for s in scores)
    masks = [np.zeros(s.shape, bool) for s in scores]
    firsts = np.cumsum([0, *(s.size for s in scores)], dtype=np.uint64)
    index = np.uint32 if firsts[-1] < _threshold.UINT32_END else np.uint64
    leaves = [
        _Leaf(s.reshape(-1), None if w is None else w.reshape(-1), first, m.reshape(-1))
        for s, w, first, m in zip(scores, within, firsts.astype(index), masks, strict=False)
    ]
    members: dict[int, list[_Leaf]] = {}
    for leaf, pool in zip(leaves, pools, strict=True):
        members.setdefault(pool, []).append(leaf)
    finite = [_mark(members[pool], wanted, dtype) for pool, wanted in enumerate(keep.tolist())]
    return masks, all(finite)


def _mark(leaves: Sequence[_Leaf], keep: int, dtype: Any) -> bool:
    """Marks the largest scores of a pool; returns whether all that compete are finite."""
    finite = 0

    def all_values() -> Iterator[np.ndarray]:
        nonlocal finite
        finite = 0
        for leaf in leaves:
            for _, values in _chunks(leaf, dtype):
                finite += _count(np.isfinite(values))
                yield values

    def tied() -> Iterator[np.ndarray]:
        for leaf in leaves:
            for start, values in _chunks(leaf, dtype):
                tie = values == threshold
                if tie.any():
                    yield _ranks(leaf, start, tie)

    count = sum(x.scores.size if x.within is None else _count(x.within) for x in leaves)
    threshold, rank = dtype(np.finfo(dtype).min), None
    if 0 < keep < count:
        threshold, above, ties = _kth(all_values, count, keep, _sample(leaves, count, dtype))
        if finite == count and keep - above < ties:
            index = leaves[0].first.dtype
            spread = np.arange(_SAMPLE if ties > _MANY else 0, dtype=index)  # as hashes are
            spread *= index.type(np.iinfo(index).max // _SAMPLE)
            rank, *_ = _kth(tied, ties, keep - above, spread)
    else:
        collections.deque(all_values(), 0)
    if finite < count or not keep:
        return finite == count
    for leaf in leaves:
        for start, values in _chunks(leaf, dtype):
            part = leaf.mask[start : start + len(values)]
            np.greater_equal(values, threshold, out=part)
            if rank is not None:
                tie = values == threshold
                if tie.any():
                    part[tie] = _ranks(leaf, start, tie) >= rank
    return True


def _chunks(leaf: _Leaf, dtype: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yields where a chunk starts, and its scores; those that do not compete become NaN.

    Comparisons with NaN are false. It is faster to set all bits, which is a NaN, than to select.
    """
    bits = np.dtype(f"i{np.dtype(dtype).itemsize}")
    for start in range(0, leaf.scores.size, _CHUNK):
        values = leaf.scores[start : start + _CHUNK].astype(dtype, copy=False)
        if leaf.within is not None:
            unset = leaf.within[start : start + _CHUNK].astype(bits) - bits.type(1)
            values = (values.view(bits) | unset).view(dtype)
        yield start, values


def _count(marks: np.ndarray) -> int:
    return int(np.count_nonzero(marks))


def _ranks(leaf: _Leaf, start: int, tie: np.ndarray) -> np.ndarray:
    """Returns the ranks of the scores that tie, among a leaf's scores from ``start`` on."""
    indices = start + (np.arange(len(tie)) if tie.all() else np.flatnonzero(tie))
    return _threshold.mix(leaf.first + indices.astype(leaf.first.dtype))


def _sample(leaves: Sequence[_Leaf], count: int, dtype: Any) -> np.ndarray:
    """Draws competing scores at random; strided ones could all lie in one column."""
    random = np.random.default_rng(0)  # decides the time, not the result
    total = sum(leaf.scores.size for leaf in leaves)
    drawn = []
    for leaf in leaves if count > _MANY else []:
        at = random.integers(0, leaf.scores.size, _SAMPLE * leaf.scores.size // total)
        valid = slice(None) if leaf.within is None else leaf.within[at]
        drawn.append(leaf.scores[at][valid].astype(dtype))
    return np.concatenate([np.empty(0, dtype), *drawn])


def _kth(read: Read, count: int, k: int, sample: np.ndarray) -> tuple[Any, int, int]:
    """Returns the k-th largest of ``count`` values, how many exceed it, and how many equal it.

    Four standard deviations of the sample around its own k-th largest value make the bracket. The
    values inside are copied and partitioned. Its ends are not copied, because all may equal them.
    """
    info = np.finfo(sample.dtype) if sample.dtype.kind == "f" else np.iinfo(sample.dtype)
    extremes = np.array([info.min, info.max], sample.dtype)
    ordered = np.insert(extremes, 1, np.sort(sample))
    middle, margin = (1 - k / count) * len(sample), 2 * len(sample) ** 0.5
    ends = np.clip([middle - margin, middle + margin + 2], 0, len(sample) + 1).astype(int)
    for low, high in ordered[ends], extremes:  # the second one is hardly ever needed
        reach, between = 0, []
        for values in read():
            reaching = values >= high
            reach += _count(reaching)
            between.append(values[(values > low) > reaching])
        inside = np.concatenate(between)
        place = reach + inside.size - k
        if k > reach and place >= 0:
            inside.partition(place)
            kth = inside[place]
            above = reach + _count(inside > kth)
            return kth, above, _count(inside == kth)
        kth = high if k <= reach else low
        above = sum(_count(values > kth) for values in read())
        ties = sum(_count(values == kth) for values in read())
        if above < k <= above + ties:
            break
    return kth, above, ties
