import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _tree
from jaxprune._tree import Params, Score, Scores


def gradient(loss: Callable[..., jax.Array]) -> Score:
    r"""Scores a weight by the size of its gradient.

    .. math:: s_i = |\partial L / \partial w_i|

    Args:
      loss: maps ``(params, *batch)`` to a scalar.

    Returns:
      A function of ``(params, *batch)`` that returns one float32 score per weight; higher is kept.

    Examples:
      >>> loss = lambda w, x: jnp.sum(w * x)
      >>> gradient(loss)(jnp.array([1.0, -2.0]), jnp.array([3.0, -1.0])).tolist()
      [3.0, 1.0]
    """
    return functools.partial(_gradient, loss)


@_loss.checked("gradient")
def _gradient(loss: _loss.Loss, params: Params, *batch: Any) -> Scores:
    def score(g: jax.Array, w: jax.Array) -> jax.Array:  # reading w keeps its sharding
        return jnp.where(jnp.isnan(w), jnp.nan, jnp.abs(g.astype(jnp.float32)))

    grads = _loss.grad("gradient", loss, params, *batch)
    return jax.tree.map(score, grads, _tree.floating(params))
