import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _tree
from jaxprune._tree import Params, Score, Scores


def taylor(loss: Callable[..., jax.Array]) -> Score:
    r"""Scores a weight by the change of the loss without it, to first order.

    .. math:: s_i = |w_i \, \partial L / \partial w_i|

    Args:
      loss: maps ``(params, *batch)`` to a scalar.

    Returns:
      A function of ``(params, *batch)`` that returns one float32 score per weight; higher is kept.

    Examples:
      >>> loss = lambda w, x: jnp.sum(w * x)
      >>> taylor(loss)(jnp.array([1.0, -2.0]), jnp.array([3.0, 1.0])).tolist()
      [3.0, 2.0]

    References:
      Molchanov et al, `Importance Estimation for Neural Network Pruning
      <https://arxiv.org/abs/1906.10771>`_, 2019 (there squared, and on gates)
    """
    return functools.partial(_taylor, loss)


@_loss.checked("taylor")
def _taylor(loss: _loss.Loss, params: Params, *batch: Any) -> Scores:
    return changes("taylor", loss, params, *batch)


def changes(name: str, loss: _loss.Loss, params: Params, *batch: Any) -> Scores:
    """Returns the size of weight times gradient; messages have the name of the criterion."""

    def change(g: jax.Array, w: jax.Array) -> jax.Array:  # cast first: in float16 1e-4 * 1e-4 is 0
        return jnp.abs(jnp.asarray(w, jnp.float32) * g.astype(jnp.float32))

    return jax.tree.map(change, _loss.grad(name, loss, params, *batch), _tree.floating(params))
