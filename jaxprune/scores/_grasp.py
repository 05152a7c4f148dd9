import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss
from jaxprune._tree import Params, Score, Scores, Tree


def grasp(loss: Callable[..., jax.Array]) -> Score:
    r"""Scores a weight by how much its removal reduces the gradient flow.

    .. math:: s = w \odot H g, \qquad g = \partial_w L, \quad H = \partial_w^2 L

    The paper uses the opposite sign, and removes the weights with the largest scores. It also
    divides the logits by a temperature of 200: do this inside the loss.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, twice differentiable.

    Returns:
      A function of ``(params, *batch)`` that returns one float32 score per weight; higher is kept.

    Raises:
      ValueError: outside jit, if the curvature is not finite, or 0 everywhere.
      TypeError: if the loss is not twice differentiable.

    Examples:
      >>> loss = lambda w: jnp.sum(w**2 * jnp.array([1.0, 2.0])) / 2
      >>> grasp(loss)(jnp.array([3.0, -1.0])).tolist()
      [9.0, 4.0]

    References:
      Wang et al, `Picking Winning Tickets Before Training by Preserving Gradient Flow
      <https://arxiv.org/abs/2002.07376>`_, 2020
    """
    return functools.partial(_grasp, loss)


@_loss.checked("grasp", curvature=True)
def _grasp(loss: _loss.Loss, params: Params, *batch: Any) -> tuple[Scores, Tree]:
    scalar, floats = _loss.of_floats("grasp", loss, params, *batch)
    grads = jax.grad(scalar)
    with _loss.differentiating("grasp", scalar, floats):
        _, curvature = jax.jvp(grads, (floats,), (grads(floats),))
    scores = jax.tree.map(
        lambda hg, w: w.astype(jnp.float32) * hg.astype(jnp.float32), curvature, floats
    )
    return scores, _loss.largest(curvature)
