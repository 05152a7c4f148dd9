import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _tree


def gradient(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    r"""Scores a weight by the size of its gradient.

    .. math:: s_i = |\partial L / \partial w_i|

    Used like ``jax.grad``: ``gradient(loss)(params, *batch)``.

    Args:
      loss: maps ``(params, *batch)`` to a scalar.

    Returns:
      A function of ``(params, *batch)`` giving one float32 score per weight; higher is kept.

    Raises:
      TypeError: for a loss that is not scalar.

    Examples:
      >>> loss = lambda w, x: jnp.sum(w * x)
      >>> gradient(loss)(jnp.array([1.0, -2.0]), jnp.array([3.0, -1.0])).tolist()
      [3.0, 1.0]
    """
    return functools.partial(_tree.checked, _gradient, loss)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(loss, params, *batch):
    grads = _loss.grad("gradient", loss, params, *batch)
    return jax.tree.map(
        # Reading w gives the score its sharding.
        lambda g, w: jnp.where(jnp.isnan(w), jnp.nan, jnp.abs(g.astype(jnp.float32))),
        grads,
        _tree.floating(params),
    )
