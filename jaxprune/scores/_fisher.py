import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _tree
from jaxprune._tree import Params, Score, Scores, Tree


def fisher(loss: Callable[..., jax.Array]) -> Score:
    r"""Scores a weight by the growth of the loss without it, with the Fisher as curvature.

    .. math:: s_i = \tfrac{1}{2} w_i^2 \, \frac{1}{m} \sum_{n=1}^{m} g_{n,i}^2,
        \qquad g_n = \partial_w L(w, x_n)

    This is :func:`obd` with the diagonal of the empirical Fisher information instead of the
    Hessian. It is never negative, and costs only gradients. Both agree if the loss is a negative
    log-likelihood and the network predicts well. For other losses the gradients also contain the
    remaining errors.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, the mean over examples. It is called with one
        example at a time, as a batch of one, so batch norm must be in inference mode.

    Returns:
      A function of ``(params, *batch)`` that returns one float32 score per weight; higher is kept.
      All arrays of the batch must have the examples along their first axis.

    Raises:
      ValueError: if batch arrays have different lengths; outside jit also if gradients are not
        finite, or 0 everywhere.

    Examples:
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> fisher(loss)(jnp.array([1.0, -2.0]), jnp.array([[1.0, 1.0], [3.0, 1.0]])).tolist()
      [2.5, 2.0]

    References:
      Theis et al, `Faster gaze prediction with dense networks and Fisher pruning
      <https://arxiv.org/abs/1801.05787>`_, 2018 (there on gates of feature maps)
    """
    return functools.partial(_fisher, loss)


@_loss.checked("fisher", compiled=False, examples=True, curvature=True)
def _fisher(loss: _loss.Loss, params: Params, *batch: Any) -> tuple[Scores, Tree]:
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    count = len(jax.tree.leaves(batch)[0])
    squares = _loss.fold(functools.partial(_add, loss), _loss.zeros(params), count, params, batch)
    return _scores(params, squares, jax.device_put(np.float32(count)))


def _add(loss: _loss.Loss, squares: Tree, i: jax.Array, params: Params, batch: Tree) -> Tree:
    grads = _loss.grad("fisher", loss, params, *_loss.example(batch, i))
    return jax.tree.map(lambda s, g: s + g.astype(jnp.float32) ** 2, squares, grads)


@jax.jit
def _scores(params: Params, squares: Tree, count: jax.Array) -> tuple[Scores, Tree]:
    fisher = jax.tree.map(lambda s: s / count, squares)
    scores = _tree.map_floating(lambda w, h: h * w.astype(jnp.float32) ** 2 / 2, params, fisher)
    return scores, _loss.largest(fisher)
