r"""Finds the largest scores of a pytree exactly, without sorting, concatenating or gathering.

The bits of floats order like integers once the negative ones are reflected. The threshold that
keeps the right number is found two bits at a time, from the top: each round counts the scores above
three candidates in one pass over the leaves, and needs one scalar sum across a mesh. Scores that
tie at the threshold are ranked by a hash of their index, found in the same way. The search ends as
soon as the count is right.

Shapes: ``g`` pools that compete separately, ``c`` candidates. Everything here is traced under
``jax.enable_x64(True)``, because counts exceed :math:`2^{31}`.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_BITS = 2  # settled per round; more candidates a round cost more than the rounds they save
_INFINITY = 0xFF800000  # the key of +inf
_INT32_END, UINT32_END = 2**31, 2**32  # from here on, counts and indices take 64 bits

Marks = list[jax.Array]  # (c,) bool arrays of the shape of a leaf
State = tuple[jax.Array, jax.Array, jax.Array]  # shift, lower bound (g,), its count (g,)


def largest(
    scores: Sequence[jax.Array],
    within: Sequence[jax.Array | None],
    keep: jax.Array,
    pool: tuple[int, ...],
) -> tuple[list[jax.Array], jax.Array]:
    """Marks the ``keep[g]`` largest scores of every pool; NaN counts as lowest.

    Args:
      scores: float32 leaves, of any shapes.
      within: for each leaf, which scores compete; `None` for all of them.
      keep: shape (g,), int64; a number above that of the competing scores keeps them all.
      pool: for each leaf, the pool in which it competes.

    Returns:
      One bool array per leaf; the number of competing scores per leaf that are not finite.
    """
    offsets = [0, *itertools.accumulate(s.size for s in scores)]
    index_dtype = jnp.uint32 if offsets[-1] < UINT32_END else jnp.uint64

    def total(counts: Sequence[jax.Array]) -> jax.Array:  # one (c,) per leaf -> (g, c)
        zeros = jnp.zeros((*keep.shape, *counts[0].shape), jnp.int64)
        return zeros.at[jnp.array(pool)].add(jnp.stack(counts))

    def search(marks: Callable[..., Marks], dtype: Any, count: jax.Array) -> Sequence[jax.Array]:
        """Finds the largest threshold of each pool that still marks at least ``keep`` scores."""
        steps = jnp.arange(1, 2**_BITS, dtype=dtype)

        def narrow(state: State) -> State:
            shift, low, count = state
            candidates = low[:, None] + (steps[None] << shift.astype(dtype))
            # False, but XLA cannot see it: it would compute the keys and hashes of all leaves
            # before the loop and keep them, since they do not change.
            never = count[0] < 0
            counts = total([_count(marks(i, candidates[g], never)) for i, g in enumerate(pool)])
            passed = jnp.sum(counts >= keep[:, None], axis=1)  # counts fall along c
            counts = jnp.concatenate([count[:, None], counts], axis=1)
            count = jnp.take_along_axis(counts, passed[:, None], axis=1)[:, 0]
            return shift - _BITS, low + (passed.astype(dtype) << shift.astype(dtype)), count

        def unsettled(state: State) -> jax.Array:
            shift, _, count = state
            return (shift >= 0) & jnp.any(count > keep)

        start = jnp.int32(jnp.iinfo(dtype).bits - _BITS), jnp.zeros(keep.shape, dtype), count
        return lax.while_loop(unsettled, narrow, start)[1:]

    def above(i: int, thresholds: jax.Array, never: Any) -> Marks:
        key = ordered(jnp.where(never, 0, scores[i]), within[i])
        return [key >= t for t in thresholds]

    def kept(i: int, ranks: jax.Array, never: Any) -> Marks:
        key = ordered(jnp.where(never, 0, scores[i]), within[i])
        order = hashed(scores[i].shape, index_dtype(offsets[i]) + never)
        tie, more = key == thresholds[pool[i]], key > thresholds[pool[i]]
        return [more | (tie & (order >= rank)) for rank in ranks]

    def competing(i: int) -> Marks:  # and those of them that are not finite
        (valid,) = above(i, jnp.ones(1, jnp.uint32), False)
        return [valid, valid & ~jnp.isfinite(scores[i])]

    first = [_count(competing(i)) for i in range(len(scores))]
    count = total(first)[:, 0]
    keep = jnp.minimum(keep, count)
    thresholds, count = search(above, jnp.uint32, count)
    thresholds = jnp.maximum(thresholds, 1)  # 0 is the key of scores that do not compete
    ranks, count = search(kept, index_dtype, count)
    masks = [kept(i, ranks[g][None], count[0] < 0)[0] for i, g in enumerate(pool)]
    return masks, jnp.stack(first)[:, 1]


def ordered(scores: jax.Array, within: jax.Array | None) -> jax.Array:
    """Maps float32 to uint32 in order: 0 for scores that do not compete, then NaN, -inf, …, inf."""
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    key = jnp.where(bits >> 31 == 1, -bits, bits | 0x80000000)  # -0.0 and 0.0 both give 0x80000000
    key = jnp.where(key > _INFINITY, jnp.uint32(1), key)
    return key if within is None else jnp.where(within, key, jnp.uint32(0))


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
