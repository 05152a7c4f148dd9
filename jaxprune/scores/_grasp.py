import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _tree


def grasp(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    r"""Scores a weight by how much removing it would hurt the gradient flow.

    .. math:: s = w \odot H g, \qquad g = \partial_w L, \quad H = \partial_w^2 L

    The paper's score has the opposite sign, and there the largest are removed. Divide the logits by
    a temperature (200 in the paper) inside the loss.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, twice differentiable.

    Returns:
      A function of ``(params, *batch)`` giving one float32 score per weight; higher is kept.

    Raises:
      ValueError: (outside jit) for a curvature that is not finite, or 0 everywhere.
      TypeError: for a loss that is not scalar, or not differentiable twice.

    Examples:
      >>> loss = lambda w: jnp.sum(w**2 * jnp.array([1.0, 2.0])) / 2
      >>> grasp(loss)(jnp.array([3.0, -1.0])).tolist()
      [9.0, 4.0]

    References:
      Wang et al, `Picking Winning Tickets Before Training by Preserving Gradient Flow
      <https://arxiv.org/abs/2002.07376>`_, 2020
    """
    return functools.partial(_checked, loss)


def _checked(loss, params, *batch):
    _tree.check_params(params)
    scores, largest = _grasp(loss, params, *batch)
    _loss.check_curvature("grasp", largest)
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _grasp(loss, params, *batch):
    scalar, floats = _loss.of_floats("grasp", loss, params, *batch)
    grads = jax.grad(scalar)
    with _loss.differentiating("grasp", scalar, floats):
        _, curvature = jax.jvp(grads, (floats,), (grads(floats),))
    scores = jax.tree.map(
        lambda hg, w: w.astype(jnp.float32) * hg.astype(jnp.float32), curvature, floats
    )
    return scores, _loss.largest(curvature)
