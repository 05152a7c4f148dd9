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
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune import _threshold


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Units inside a leaf, all of one size.

    Attributes:
      pool: maps the scores of a leaf to one score per unit; a `ValueError` says that they do not
        fit, and `select` adds the path.
      spread: maps the kept units, and the leaf's shape, to the leaf's mask.
      limit: maps the scores of the units, and which of them compete or `None` for all, to those
        that may be kept at all; `None` if that is any of them.
      share: the fraction of the units that ``limit`` lets through.

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
    limit: Callable[[jax.Array, jax.Array | None], jax.Array] | None = None
    share: float = 1.0


def _same(scores: jax.Array) -> jax.Array:
    return scores


def _same_mask(kept: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return kept


#: Every weight is a unit of its own.
unstructured = Pattern(_same, _same_mask)


def n_of_m(n: int, m: int, axis: int = -2) -> Pattern:
    """Keeps at most n of every m consecutive weights along an axis.

    ``select(scores, pattern=n_of_m(2, 4))`` keeps the best two of every four. With a sparsity as
    well, those compete, and ``select`` keeps as many of them as it asks for. Ties are broken by a
    hash of the position.

    Args:
      n: how many are kept, at most.
      m: of how many.
      axis: the axis along which they lie. The default is the input axis of a Flax dense kernel and
        of a convolution, with or without a leading axis of layers.

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
    """
    if not 0 < n <= m:
        raise ValueError(f"n_of_m keeps n of m weights and needs 0 < n <= m, got {n=} and {m=}.")
    return _n_of_m(n, m, axis)


@functools.cache  # the same pattern is the same object, so that `select` does not compile again
def _n_of_m(n: int, m: int, axis: int) -> Pattern:
    def check(scores):
        if not -scores.ndim <= axis < scores.ndim or scores.shape[axis] % m:
            raise ValueError(
                f"{n}:{m} sparsity needs axis {axis} divisible by {m}, got shape {scores.shape}."
            )
        return scores

    def limit(scores, within):
        shape, at = scores.shape, axis % scores.ndim
        groups = (*shape[:at], shape[at] // m, m, *shape[at + 1 :])
        index = jnp.uint32(0) if math.prod(shape) < 2**32 else jnp.uint64(0)
        key = _threshold.ordered(scores, within).reshape(groups)
        tie = _threshold.hashed(shape, index).reshape(groups)
        other, other_tie = jnp.expand_dims(key, at + 2), jnp.expand_dims(tie, at + 2)
        key, tie = jnp.expand_dims(key, at + 1), jnp.expand_dims(tie, at + 1)
        better = (other > key) | ((other == key) & (other_tie > tie))
        kept = (jnp.sum(better, at + 1, dtype=jnp.int32) < n) & (key > 0).squeeze(at + 1)
        return kept.reshape(shape)

    return Pattern(check, _same_mask, limit, n / m)
