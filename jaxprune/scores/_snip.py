import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune.scores._taylor import _taylor


def snip(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    r"""Scores a connection by its share in the loss's sensitivity to gates on all of them.

    .. math:: s_i = |w_i g_i| \big/ \sum_j |w_j g_j|, \qquad g = \partial L / \partial w

    Used like ``jax.grad``: ``snip(loss)(params, *batch)``, on untrained params.

    Args:
      loss: maps ``(params, *batch)`` to a scalar.

    Returns:
      A function of ``(params, *batch)`` giving one float32 score per weight; higher is kept. A
      gradient of zero everywhere gives NaN.

    Raises:
      TypeError: for a loss that is not scalar.

    Examples:
      >>> loss = lambda w, x: jnp.sum(w * x)
      >>> snip(loss)(jnp.array([1.0, -2.0]), jnp.array([6.0, 1.0])).tolist()
      [0.75, 0.25]

    References:
      Lee et al, `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019
    """
    return functools.partial(_tree.checked, _snip, loss)


@functools.partial(jax.jit, static_argnums=0)
def _snip(loss, params, *batch):
    scores = _taylor("snip", loss, params, *batch)
    total = sum(jnp.sum(s) for s in jax.tree.leaves(scores))
    return jax.tree.map(lambda s: s / total, scores)
