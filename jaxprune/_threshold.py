r"""Finds the largest scores of a pytree exactly, without sorting or gathering.

The bits of floats order like integers once the negative ones are reflected: this is the key of a
score. Scores of equal keys are ranked by a hash of their index. The key and the rank from which on
the right number is kept are found two bits at a time, from the top: each round counts the scores
that reach three candidates in one pass over the leaves, and needs one scalar sum across a mesh. The
search ends as soon as the count is right.

A program of many leaves must compile fast. XLA compiles equal kernels once, so what differs between
leaves of one shape, their first index, is an operand and not a constant. On one device, the
smallest leaves are copied to one array and count as one leaf.

Shapes: ``g`` pools that compete separately, ``c`` candidates. Everything here is traced under
``jax.enable_x64(True)``, because counts exceed :math:`2^{31}`.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BITS = 2  # settled per round; more candidates a round cost more than the rounds they save
_COPIED = 1 << 22  # scores of small leaves are copied at most, or if that is more, every 16th
_FEW = 32  # leaves, the largest ones, are never copied
_INT32_END, UINT32_END = 2**31, 2**32  # from here on, counts and indices take 64 bits

Marks = list[jax.Array]  # (c,) bool arrays of the shape of a leaf
Pair = tuple[jax.Array, jax.Array]  # keys and ranks
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # shift, key (g,), rank (g,), count (g,)


def largest(
    scores: Sequence[jax.Array],
    within: Sequence[jax.Array | None],
    keep: jax.Array,
    pools: tuple[int, ...],
    one_device: bool,
) -> list[jax.Array]:
    """Marks the ``keep[g]`` largest scores of every pool; NaN counts as lowest.

    Args:
      scores: leaves of any shapes, all of the :func:`comparable` dtype.
      within: for each leaf, which scores compete; `None` for all of them.
      keep: shape (g,), int64; a number above that of the competing scores keeps them all.
      pools: for each leaf, the pool in which it competes.
      one_device: whether all leaves lie on one device, so that it costs no gather to join them.

    Returns:
      One bool array per leaf.
    """
    sizes = [s.size for s in scores]
    offsets = [0, *itertools.accumulate(sizes)]
    index = jnp.uint32 if offsets[-1] < UINT32_END else jnp.uint64
    key = jnp.uint32 if scores[0].dtype == jnp.float32 else jnp.uint64
    bits = jnp.iinfo(index).bits  # of ranks, which are settled after the keys
    small = _small(sizes) if one_device and keep.size == 1 else []
    large = [i for i in range(len(sizes)) if i not in small]
    pool_of = np.array([pools[i] for i in large] + [0] * bool(small))
    values, valid = [scores[i] for i in large], [within[i] for i in large]
    places: list[jax.Array] = []
    if small:
        values.append(jnp.concatenate([scores[i].ravel() for i in small]))
        valid.append(_join_masks([within[i] for i in small], [sizes[i] for i in small]))

    def firsts(leaves: Sequence[int], never: jax.Array) -> list[jax.Array]:
        """Returns the first index of each leaf; a constant would become part of the kernels."""
        if not leaves:
            return []
        actual = [index(offsets[i]) for i in leaves]
        return lax.cond(never, lambda: [index(0) for _ in leaves], lambda: actual)

    if small:
        some = scores[small[0]].ravel()[0]
        starts = firsts(small, (some > 0) & (some < 0))  # never, but XLA cannot see it
        indices = [
            start + lax.iota(index, sizes[i]) for i, start in zip(small, starts, strict=True)
        ]
        places = [jnp.concatenate(indices)]

    def total(counts: Sequence[jax.Array]) -> jax.Array:  # one (c,) per piece -> (g, c)
        zeros = jnp.zeros((*keep.shape, *counts[0].shape), jnp.int64)
        return zeros.at[pool_of].add(jnp.stack(counts))

    def move(keys: jax.Array, ranks: jax.Array, steps: jax.Array, shift: jax.Array) -> Pair:
        to_key = steps.astype(key) << jnp.maximum(shift - bits, 0).astype(key)
        to_rank = steps.astype(index) << jnp.minimum(shift, bits - _BITS).astype(index)
        zero = jnp.zeros((), index)
        first = shift >= bits
        return keys + jnp.where(first, to_key, key(0)), ranks + jnp.where(first, zero, to_rank)

    def narrow(state: State) -> State:
        shift, keys, ranks, count = state
        candidates = move(keys[:, None], ranks[:, None], jnp.arange(1, 2**_BITS)[None], shift)
        # False, but XLA cannot see it: it would compute the keys and hashes of large leaves before
        # the loop and keep them, since they do not change.
        never = count[0] < 0
        pieces = zip(values, valid, [*firsts(large, never), *places], pool_of, strict=True)
        marked = [
            _reach(v, w, place, *(c[g] for c in candidates), never if i < len(large) else False)
            for i, (v, w, place, g) in enumerate(pieces)
        ]
        counts = total([_count(m) for m in marked])
        passed = jnp.sum(counts >= keep[:, None], axis=1)  # counts fall along c
        counts = jnp.concatenate([count[:, None], counts], axis=1)
        count = jnp.take_along_axis(counts, passed[:, None], axis=1)[:, 0]
        return shift - _BITS, *move(keys, ranks, passed, shift), count

    def unsettled(state: State) -> jax.Array:
        shift, *_, count = state
        return (shift >= 0) & jnp.any(count > keep)

    # A second count, because XLA on CPU would keep the integers that it sums for a single one.
    competing = [
        jnp.array([v.size], jnp.int64) if w is None else _count([w, ~w])[:1]
        for v, w in zip(values, valid, strict=True)
    ]
    count = total(competing)[:, 0]
    keep = jnp.minimum(keep, count)
    start = jnp.int32(jnp.iinfo(key).bits + bits - _BITS)
    zeros = jnp.zeros(keep.shape, key), jnp.zeros(keep.shape, index)
    _, keys, ranks, count = lax.while_loop(unsettled, narrow, (start, *zeros, count))
    starts = firsts(range(len(sizes)), count[0] < 0)
    keys = jnp.maximum(keys, 1)  # 0 is the key of scores that do not compete
    return [
        _reach(s, w, first, keys[g][None], ranks[g][None], False)[0]
        for s, w, first, g in zip(scores, within, starts, pools, strict=True)
    ]


def _small(sizes: Sequence[int]) -> list[int]:
    """Lists the leaves to copy: the smallest beside a few large ones, as many as may be copied."""
    room, small = max(sum(sizes) // 16, _COPIED), []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__)[:-_FEW]:
        room -= sizes[i]
        if room >= 0 and sizes[i]:
            small.append(i)
    return sorted(small)


def _join_masks(masks: Sequence[jax.Array | None], sizes: Sequence[int]) -> jax.Array | None:
    if all(m is None for m in masks):
        return None
    whole = zip(masks, sizes, strict=True)
    return jnp.concatenate([jnp.ones(n, bool) if m is None else m.ravel() for m, n in whole])


@jax.jit  # traced once for all leaves of one shape
def _reach(
    s: jax.Array,
    within: jax.Array | None,
    first: jax.Array,  # the index of the first score, or the indices of all of them
    keys: jax.Array,
    ranks: jax.Array,
    never: Any,
) -> Marks:
    """Marks the scores above each key, and of those with this key the ones that reach the rank."""
    key, first = ordered(jnp.where(never, 0, s), within), first + jnp.asarray(never, first.dtype)
    order = mix(first) if first.ndim else hashed(s.shape, first)
    pairs = zip(keys, ranks, strict=True)
    return [(key > k) | ((key == k) & (order >= rank)) for k, rank in pairs]


def all_finite(scores: Sequence[jax.Array], within: Sequence[jax.Array | None]) -> jax.Array:
    """Returns whether all scores that compete are finite."""
    return functools.reduce(operator.and_, map(_all_finite, scores, within))


@jax.jit
def _all_finite(s: jax.Array, within: jax.Array | None) -> jax.Array:
    finite = jnp.isfinite(s)
    return jnp.all(finite if within is None else finite | ~within)


def comparable(dtypes: Iterable[Any]) -> Any:
    """Returns the dtype, float32 or float64, in which all scores keep their order; else `None`."""
    wide: Any = np.float32
    for dtype in dtypes:
        if dtype in (np.float64, np.int32, np.uint32):
            wide = np.float64
        elif dtype != np.float32 and not (_is_real(dtype) and dtype.itemsize <= 2):
            return None
    return wide


def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def ordered(scores: jax.Array, within: jax.Array | None) -> jax.Array:
    """Maps floats to unsigned integers in order: 0 if they do not compete, NaN, -inf, …, inf."""
    bits = jnp.finfo(scores.dtype).bits
    unsigned = jnp.uint32 if bits == 32 else jnp.uint64
    sign, infinity = unsigned(1 << (bits - 1)), jnp.array(jnp.inf, scores.dtype)
    raw = lax.bitcast_convert_type(scores, unsigned)
    key = jnp.where(raw >= sign, -raw, raw | sign)  # -0.0 and 0.0 have the same key
    key = jnp.where(key > (lax.bitcast_convert_type(infinity, unsigned) | sign), unsigned(1), key)
    return key if within is None else jnp.where(within, key, unsigned(0))


def hashed(shape: tuple[int, ...], offset: jax.Array) -> jax.Array:
    """Hashes the global flat index of every entry, one to one, to the dtype of ``offset``."""
    dtype, index = offset.dtype.type, offset
    for axis in range(len(shape)):
        stride = dtype(math.prod(shape[axis + 1 :]))
        index = index + stride * lax.broadcasted_iota(dtype, shape, axis)
    return mix(index)


def mix(index: Any) -> Any:
    """Hashes integers of 32 or 64 bits, one to one; takes arrays of JAX and of NumPy."""
    dtype = index.dtype.type
    # Odd factors and shifted xors are invertible: the finalizers of MurmurHash3 and SplitMix64.
    if dtype == jnp.uint32:
        constants = (16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)
    else:
        constants = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)
    for shift, factor in constants:
        index = (index ^ (index >> dtype(shift))) * dtype(factor)
    return index


def _count(marks: Sequence[jax.Array]) -> jax.Array:
    """Counts the true entries of arrays of one shape, in one pass: shape (c,), int64."""
    dtype = jnp.int32 if marks[0].size < _INT32_END else jnp.int64

    def separate(*ones: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(o, dtype=dtype) for o in ones)

    def joint(*ones: jax.Array) -> Any:
        add = lambda a, b: tuple(map(operator.add, a, b))  # noqa: E731
        return tuple(lax.reduce(ones, (dtype(0),) * len(ones), add, tuple(range(ones[0].ndim))))

    # On one CPU, XLA fuses only the joint reduction with its operands (faster, no temporaries);
    # on a mesh, it makes one all-reduce only of plain sums.
    ones = [m.astype(dtype) for m in marks]
    if jax.device_count() > 1:
        counts = separate(*ones)
    else:
        counts = lax.platform_dependent(*ones, cpu=joint, default=separate)
    return jnp.stack(counts).astype(jnp.int64)
