"""Patterns: which cells of a leaf are kept or pruned together.

A pattern pools the scores of a leaf to one score per cell, :func:`jaxprune.select` chooses among
the cells, and the pattern spreads the kept cells over the leaf. Equal arguments give the same
pattern object, so that `select` compiles once. A `ValueError` is raised for arguments that fit no
leaf, and by `select` for a leaf that a pattern does not fit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _sums, _threshold


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Describes the cells of a leaf; all weights of a cell are kept or pruned together.

    A sparsity counts cells: ``select`` prunes ``round(sparsity * n)`` of n cells. All functions are
    traced, and the pattern is a static argument: make it once, not in every call.

    Attributes:
      pool: ``pool(scores) -> array`` returns one score per cell. It raises a `ValueError` if the
        leaf does not fit; `select` adds the path.
      spread: ``spread(kept, shape) -> mask`` returns the mask of a leaf of this shape.
      limit: ``limit(scores, within, fraction) -> bool array`` returns which cells may be kept at
        all, given the scores of the cells, which of them compete (`None` for all), and the fraction
        to keep. With `None`, all may.
      share: the fraction of cells that ``limit`` lets through, if it is constant; ``select`` then
        needs no sparsity.
      chunk: how many consecutive inputs, along the second-last axis, must be seen to choose cells
        among them; `None` for all of them. Layerwise methods choose chunk by chunk.

    Examples:
      >>> def spread(kept, shape):
      ...     return jnp.broadcast_to(kept[:, None], shape)
      >>> rows = Pattern(pool=lambda scores: scores.sum(axis=1), spread=spread)
      >>> print(jp.select(jnp.arange(8.0).reshape(4, 2), 0.5, pattern=rows)[:, 0])
      [False False  True  True]
    """

    pool: Callable[[jax.Array], jax.Array]
    spread: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    limit: Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array] | None = None
    share: float | None = None
    chunk: int | None = None


#: Every weight is a cell of its own.
unstructured = Pattern(pool=lambda scores: scores, spread=lambda kept, shape: kept, chunk=1)


def _limit_of_output(scores: jax.Array, within: jax.Array | None, fraction: jax.Array) -> jax.Array:
    shape, outputs = scores.shape, scores.shape[-1]
    kept = jnp.round(fraction * scores.size).astype(jnp.int64)
    ends = jnp.arange(outputs + 1) * kept // outputs
    keep = ends[1:] - ends[:-1]  # to an exact total
    index = jnp.uint32(0) if scores.size < _threshold.UINT32_END else jnp.uint64(0)
    key = _threshold.ordered(scores, within).reshape(-1, outputs)
    tie = _threshold.hashed(shape, index).reshape(-1, outputs)

    def threshold(key: jax.Array, keep: jax.Array) -> jax.Array:
        """Returns the largest number that ``keep`` keys of each output reach."""
        bits = key.dtype.itemsize * 8

        def settle(i: jax.Array, low: jax.Array) -> jax.Array:
            middle = low | (jnp.ones((), key.dtype) << (bits - 1 - i).astype(key.dtype))
            count = jnp.sum(key >= middle[None], 0, dtype=jnp.int64)
            return jnp.where(count >= keep, middle, low)

        return jax.lax.fori_loop(0, bits, settle, jnp.zeros(outputs, key.dtype))

    least = threshold(key, keep)
    above, equal = key > least[None], key == least[None]
    missing = keep - jnp.sum(above, 0, dtype=jnp.int64)
    tie = jnp.where(equal, tie, 0)
    chosen = equal & (tie >= threshold(tie, missing)[None]) & (missing > 0)[None] & (key > 0)
    return (above | chosen).reshape(shape)


#: Every weight is a cell, and every output, an index on the last axis, keeps equally many; where
#: these do not divide, one more or less.
per_output = Pattern(unstructured.pool, unstructured.spread, _limit_of_output, chunk=1)


def block(shape: Sequence[int]) -> Pattern:
    """Keeps or prunes entire blocks: tiles of the last axes of a leaf.

    The score of a block is the mean of its weights. If a shape is not a multiple of the block,
    trailing blocks are smaller but count as full blocks.

    Args:
      shape: the lengths of a block, at least 1, along as many of the last axes.

    Returns:
      A pattern for :func:`jaxprune.select`.

    Examples:
      >>> scores = jnp.array([[1.0, 1.0, 5.0], [1.0, 9.0, 5.0], [0.0, 0.0, 1.0]])
      >>> print(jp.select(scores, 0.5, pattern=block((2, 2))).astype(int))
      [[1 1 1]
       [1 1 1]
       [0 0 0]]

    References:
      Narang et al, `Block-Sparse Recurrent Neural Networks
      <https://arxiv.org/abs/1711.02782>`_, 2017 (there the largest weight of a block counts)
    """
    lengths = tuple(shape)
    if not lengths or min(lengths) < 1:
        raise ValueError(
            f"block: shape must hold lengths of at least 1, got {shape!r}. Use e.g. (16, 16)."
        )
    return _block(lengths)


@functools.cache
def _block(lengths: tuple[int, ...]) -> Pattern:
    def pool(scores: jax.Array) -> jax.Array:
        first = scores.ndim - len(lengths)
        if first < 0:
            needed = f"at least {len(lengths)} axes for blocks of {lengths}"
            raise ValueError(f"scores must have {needed}, got shape {scores.shape}.")
        count = np.ones((1,) * first, np.float32)
        for n, length in zip(scores.shape[first:], lengths, strict=True):
            full = np.minimum(length, n - length * np.arange(-(-n // length)))
            count = np.multiply.outer(count, full.astype(np.float32))
        # Behind a barrier, or some programs multiply by the reciprocal of a constant and others
        # divide: then the last bit would choose between blocks.
        return _sums.exact_block_sum(scores, lengths) / jax.lax.optimization_barrier(count)

    chunk = lengths[-2] if len(lengths) > 1 else 1
    return Pattern(pool, lambda kept, shape: _sums.spread_blocks(kept, lengths, shape), chunk=chunk)


def axis(*axes: int) -> Pattern:
    """Keeps or prunes entire slices along an axis of a leaf.

    The score of a slice is the mean of its weights. ``axis(-1)`` prunes columns of a dense kernel
    and filters of a convolution. With several axes a slice has one index on each: ``axis(-2, -1)``
    prunes the 2-D kernels of a convolution, ``axis(0, -1)`` the columns of every layer of a stack.
    Each leaf is masked separately: for slices of several leaves that are removed together, see
    :func:`jaxprune.find_groups`.

    Args:
      *axes: one or more.

    Returns:
      A pattern for :func:`jaxprune.select`.

    Examples:
      >>> scores = jnp.array([[1.0, 4.0, 2.0], [3.0, 2.0, 4.0]])
      >>> print(jp.select(scores, 1 / 3, pattern=axis(-1)).astype(int))
      [[0 1 1]
       [0 1 1]]

    References:
      Mao et al, `Exploring the Regularity of Sparse Structure in Convolutional Neural Networks
      <https://arxiv.org/abs/1705.08922>`_, 2017
    """
    if not axes:
        raise ValueError("axis must get at least one axis, got none. Use e.g. axis(-1).")
    return _axis(axes)


@functools.cache
def _axis(axes: tuple[int, ...]) -> Pattern:
    def others(shape: tuple[int, ...]) -> tuple[int, ...]:
        if not all(-len(shape) <= a < len(shape) for a in axes):
            raise ValueError(f"scores must have the axes {axes} of the slices, got shape {shape}.")
        return tuple(set(range(len(shape))) - {a % len(shape) for a in axes})

    def pool(scores: jax.Array) -> jax.Array:
        summed = others(scores.shape)
        return _sums.exact_sum(scores, summed) / max(math.prod(scores.shape[a] for a in summed), 1)

    def spread(kept: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(jnp.expand_dims(kept, others(shape)), shape)

    return Pattern(pool, spread, chunk=1 if -2 in axes else None)


def n_of_m(n: int | None, m: int, axis: int = -2, *, pad: bool = False) -> Pattern:
    r"""Keeps at most n of every m consecutive weights along an axis.

    ``select(scores, pattern=n_of_m(2, 4))`` keeps the best two of each chunk of four. If a sparsity
    is given too, these compete, and ``select`` keeps as many of them as the sparsity allows. Ties
    are broken by a hash of the position.

    If n is `None`, it follows from the sparsity s: :math:`n = \lceil (1 - s) m \rceil`, to
    :math:`10^{-6} m`. The pattern then tightens as s rises: 3:4 at 0.25, 2:4 at 0.5.

    Args:
      n: the largest number of weights that a chunk keeps, or `None`; 0 < n <= m.
      m: the number of weights in a chunk.
      axis: the axis along which chunks lie. The default is the input axis of a Flax dense kernel
        and of a convolution, with or without a leading axis of layers.
      pad: pads an axis whose length is not a multiple of m with zeros; the last, shorter chunk also
        keeps up to n weights.

    Returns:
      A pattern for :func:`jaxprune.select`.

    Examples:
      >>> scores = jnp.array([[1.0, 4.0, 2.0, 3.0, 5.0, 7.0, 8.0, 6.0]])
      >>> print(jp.select(scores, pattern=n_of_m(2, 4, axis=-1)).astype(int))
      [[0 1 0 1 0 1 1 0]]

    References:
      Mishra et al, `Accelerating Sparse Deep Neural Networks
      <https://arxiv.org/abs/2104.08378>`_, 2021

      Kao et al, `Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask
      <https://arxiv.org/abs/2209.07617>`_, 2022 (n that falls while training)
    """
    if not 0 < (m if n is None else n) <= m:
        raise ValueError(f"n_of_m: n and m must satisfy 0 < n <= m, got {n=} and {m=}.")
    return _n_of_m(n, m, axis, pad)


@functools.cache
def _n_of_m(n: int | None, m: int, axis: int, pad: bool) -> Pattern:
    def check(scores: jax.Array) -> jax.Array:
        exists = -scores.ndim <= axis < scores.ndim
        if not exists or (scores.shape[axis] % m and not pad):
            raise ValueError(
                f"axis {axis} must be divisible by {m} for {'n' if n is None else n}:{m} sparsity, "
                f"got shape {scores.shape}.{' Pad it with `n_of_m(..., pad=True)`.' * exists}"
            )
        return scores

    def limit(scores: jax.Array, within: jax.Array | None, fraction: jax.Array) -> jax.Array:
        # A float32 sparsity is rounded, hence the tolerance.
        most = jnp.ceil((fraction - 1e-6) * m).astype(jnp.int32) if n is None else n
        shape, at = scores.shape, axis % scores.ndim
        chunks = (*shape[:at], -(-shape[at] // m), m, *shape[at + 1 :])
        missing = [(0, -shape[at] % m if i == at else 0) for i in range(len(shape))]

        def chunked(x: jax.Array) -> jax.Array:
            return jnp.pad(x, missing).reshape(chunks)

        index = jnp.uint32(0) if math.prod(shape) < _threshold.UINT32_END else jnp.uint64(0)
        key = chunked(_threshold.ordered(scores, within))  # 0, as in the padding, is never kept
        tie = chunked(_threshold.hashed(shape, index))
        # All pairs of a chunk are compared: m is small, and nothing has to be sorted.
        other, other_tie = jnp.expand_dims(key, at + 2), jnp.expand_dims(tie, at + 2)
        key, tie = jnp.expand_dims(key, at + 1), jnp.expand_dims(tie, at + 1)
        better = (other > key) | ((other == key) & (other_tie > tie))
        kept = (jnp.sum(better, at + 1, dtype=jnp.int32) < most) & (key > 0).squeeze(at + 1)
        kept = kept.reshape(*shape[:at], chunks[at] * m, *shape[at + 1 :])
        return jax.lax.slice_in_dim(kept, 0, shape[at], axis=at)

    share = None if n is None else n / m
    return Pattern(check, unstructured.spread, limit, share, m if axis in (0, -2) else 1)
