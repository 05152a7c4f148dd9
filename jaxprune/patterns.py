"""What a mask may look like inside one leaf.

A pattern pools the scores of a leaf to those of its units, among which :func:`jaxprune.select`
chooses, and spreads the kept units back over the leaf.

>>> import jax, jax.numpy as jnp
>>> import jaxprune as jp
>>> scores = jax.random.uniform(jax.random.key(0), (64, 16))
>>> masks = jp.select(scores, pattern=n_of_m(2, 4))
>>> bool((masks.reshape(16, 4, 16).sum(1) == 2).all())
True
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
    """Units inside a leaf, each of which stays or leaves as a whole.

    A sparsity counts units: of n units, ``select`` removes ``round(sparsity * n)``.

    Attributes:
      pool: maps the scores of a leaf to one score per unit; a `ValueError` says that they do not
        fit, and `select` adds the path.
      spread: maps the kept units, and the leaf's shape, to the leaf's mask.
      limit: maps the scores of the units, which of them compete (`None` for all), and the fraction
        to keep, to those that may be kept at all; `None` if that is any of them.
      share: the fraction of the units that ``limit`` lets through, if it is always the same: then
        ``select`` needs no sparsity.

    Examples:
      >>> import jaxprune as jp
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


def _same(scores: jax.Array) -> jax.Array:
    return scores


def _same_mask(kept: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return kept


#: Every weight is a unit of its own.
unstructured = Pattern(_same, _same_mask)


def block(shape: Sequence[int]) -> Pattern:
    """Keeps or removes whole blocks, tiles of the last axes of a leaf.

    A block scores the mean of its weights. Where the shape of a leaf is no multiple of the block,
    the last ones are smaller, and count as much: the sparsity is a fraction of blocks.

    Args:
      shape: the lengths of a block, along as many of the last axes.

    Raises:
      ValueError: for lengths below 1; and from ``select``, for a leaf of fewer axes.

    Examples:
      >>> import jaxprune as jp
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
        raise ValueError(f"block needs lengths of at least 1, such as (16, 16), got {shape!r}.")

    def pool(scores):
        first = scores.ndim - len(lengths)
        if first < 0:
            raise ValueError(
                f"blocks of {lengths} need {len(lengths)} axes, got shape {scores.shape}."
            )
        count = np.ones((1,) * first, np.float32)
        for n, length in zip(scores.shape[first:], lengths, strict=True):
            full = np.minimum(length, n - length * np.arange(-(-n // length)))
            count = np.multiply.outer(count, full.astype(np.float32))
        return _sums.exact_block_sum(scores, lengths) / count

    def spread(kept, shape):
        return _sums.spread_blocks(kept, lengths, shape)

    return Pattern(pool, spread)


def axis(*axes: int) -> Pattern:
    """Keeps or removes whole slices along an axis of a leaf.

    A slice scores the mean of its weights. Of a dense kernel, ``axis(-1)`` takes columns, of a
    convolution filters. With several axes a slice is one index of each: ``axis(-2, -1)`` takes the
    2-D kernels of a convolution, ``axis(0, -1)`` the columns of every layer of a stack. The
    sparsity is a fraction of slices. Each leaf is masked alone: for slices of several leaves that
    leave together, see :func:`jaxprune.find_groups`.

    Args:
      *axes: one or more.

    Raises:
      ValueError: for no axis; and from ``select``, for a leaf without it.

    Examples:
      >>> import jaxprune as jp
      >>> scores = jnp.array([[1.0, 4.0, 2.0], [3.0, 2.0, 4.0]])
      >>> print(jp.select(scores, 1 / 3, pattern=axis(-1)).astype(int))
      [[0 1 1]
       [0 1 1]]

    References:
      Mao et al, `Exploring the Regularity of Sparse Structure in Convolutional Neural Networks
      <https://arxiv.org/abs/1705.08922>`_, 2017
    """
    if not axes:
        raise ValueError("axis needs at least one axis, such as axis(-1).")

    def others(shape):
        if not all(-len(shape) <= a < len(shape) for a in axes):
            raise ValueError(f"slices along axes {axes} need such axes, got shape {shape}.")
        return tuple(set(range(len(shape))) - {a % len(shape) for a in axes})

    def pool(scores):
        away = others(scores.shape)
        return _sums.exact_sum(scores, away) / max(math.prod(scores.shape[a] for a in away), 1)

    def spread(kept, shape):
        return jnp.broadcast_to(jnp.expand_dims(kept, others(shape)), shape)

    return Pattern(pool, spread)


def n_of_m(n: int | None, m: int, axis: int = -2, *, pad: bool = False) -> Pattern:
    r"""Keeps at most n of every m consecutive weights along an axis.

    ``select(scores, pattern=n_of_m(2, 4))`` keeps the best two of every four. With a sparsity as
    well, those compete, and ``select`` keeps as many of them as it asks for. Ties are broken by a
    hash of the position.

    With `None` for n, it is the least that the sparsity s allows: :math:`n = \lceil (1 - s) m
    \rceil`, to :math:`10^{-6} m`. So the pattern tightens as s rises: 3:4 at 0.25, 2:4 at 0.5.

    Args:
      n: how many are kept, at most.
      m: of how many.
      axis: the axis along which they lie. The default is the input axis of a Flax dense kernel and
        of a convolution, with or without a leading axis of layers.
      pad: takes a leaf whose axis m does not divide as if zeros followed, so that the last weights
        along it, fewer than m, keep n of them as well.

    Raises:
      ValueError: unless 0 < n <= m; and from ``select``, for a leaf whose axis m does not divide.

    Examples:
      >>> import jaxprune as jp
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
        raise ValueError(f"n_of_m keeps n of m weights and needs 0 < n <= m, got {n=} and {m=}.")
    return _n_of_m(n, m, axis, pad)


@functools.cache  # the same pattern is the same object, so that `select` does not compile again
def _n_of_m(n: int | None, m: int, axis: int, pad: bool) -> Pattern:
    def check(scores):
        exists = -scores.ndim <= axis < scores.ndim
        if not exists or (scores.shape[axis] % m and not pad):
            raise ValueError(
                f"{'n' if n is None else n}:{m} sparsity needs axis {axis} divisible by {m}, got "
                f"shape {scores.shape}.{' Fill it up with `n_of_m(..., pad=True)`.' * exists}"
            )
        return scores

    def limit(scores, within, fraction):
        most = jnp.ceil((fraction - 1e-6) * m) if n is None else n  # a float32 sparsity is rounded
        shape, at = scores.shape, axis % scores.ndim
        groups = (*shape[:at], -(-shape[at] // m), m, *shape[at + 1 :])
        missing = [(0, -shape[at] % m if i == at else 0) for i in range(len(shape))]

        def grouped(x):
            return jnp.pad(x, missing).reshape(groups)

        index = jnp.uint32(0) if math.prod(shape) < _threshold.UINT32_END else jnp.uint64(0)
        key = grouped(_threshold.ordered(scores, within))  # 0 is never kept
        tie = grouped(_threshold.hashed(shape, index))
        other, other_tie = jnp.expand_dims(key, at + 2), jnp.expand_dims(tie, at + 2)
        key, tie = jnp.expand_dims(key, at + 1), jnp.expand_dims(tie, at + 1)
        better = (other > key) | ((other == key) & (other_tie > tie))
        kept = (jnp.sum(better, at + 1, dtype=jnp.int32) < most) & (key > 0).squeeze(at + 1)
        kept = kept.reshape(*shape[:at], groups[at] * m, *shape[at + 1 :])
        return jax.lax.slice_in_dim(kept, 0, shape[at], axis=at)

    return Pattern(check, _same_mask, limit, None if n is None else n / m)
