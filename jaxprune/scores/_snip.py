import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss
from jaxprune._tree import Params, Score, Scores
from jaxprune.scores._taylor import changes


def snip(loss: Callable[..., jax.Array]) -> Score:
    r"""Scores a connection by its share in the sensitivity of the loss to gates on all of them.

    .. math:: s_i = |w_i g_i| \big/ \sum_j |w_j g_j|, \qquad g = \partial L / \partial w

    Args:
      loss: maps ``(params, *batch)`` to a scalar; the params are untrained in the paper.

    Returns:
      A function of ``(params, *batch)`` that returns one float32 score per weight; higher is kept.
      If the gradient is zero everywhere, scores are NaN.

    Examples:
      >>> loss = lambda w, x: jnp.sum(w * x)
      >>> snip(loss)(jnp.array([1.0, -2.0]), jnp.array([6.0, 1.0])).tolist()
      [0.75, 0.25]

    References:
      Lee et al, `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019
    """
    return functools.partial(_snip, loss)


@_loss.checked("snip")
def _snip(loss: _loss.Loss, params: Params, *batch: Any) -> Scores:
    scores = changes("snip", loss, params, *batch)
    total = sum(jnp.sum(s) for s in jax.tree.leaves(scores))
    return jax.tree.map(lambda s: s / total, scores)
