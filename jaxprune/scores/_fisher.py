import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _tree


def fisher(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    r"""Scores a weight by how much the loss would grow without it, with the Fisher as curvature.

    .. math:: s_i = \tfrac{1}{2} w_i^2 \, \frac{1}{m} \sum_{n=1}^{m} g_{n,i}^2,
        \qquad g_n = \partial_w L(w, x_n)

    That is :func:`obd` with the diagonal of the empirical Fisher information instead of the
    Hessian: never negative, and as cheap as the gradients. Both agree where the loss is a negative
    log-likelihood and the network predicts well; for other losses the gradients also measure the
    errors that are left.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, the mean over examples. It is called with one
        example at a time, as a batch of one: batch norm needs its inference mode.

    Returns:
      A function of ``(params, *batch)`` giving one float32 score per weight; higher is kept. All
      arrays of the batch have the examples along their first axis. Gradients are taken one after
      the other: a thousand examples cost a thousand gradients of one example.

    Raises:
      ValueError: for batch arrays of different lengths and (outside jit) gradients that are not
        finite, or 0 everywhere.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> fisher(loss)(jnp.array([1.0, -2.0]), jnp.array([[1.0, 1.0], [3.0, 1.0]])).tolist()
      [2.5, 2.0]

    References:
      Theis et al, `Faster gaze prediction with dense networks and Fisher pruning
      <https://arxiv.org/abs/1801.05787>`_, 2018 (there on gates of feature maps)
    """
    return functools.partial(_checked, loss)


def _checked(loss, params, *batch):
    _tree.check_params(params)
    _loss.check_examples("fisher", batch)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    count = len(jax.tree.leaves(batch)[0])
    zeros = _tree.map_floating(lambda w: jnp.zeros_like(w, jnp.float32), params)
    add = functools.partial(_add, loss, params, batch)
    squares = _loss.fold(add, zeros, count, _tree.is_traced(params, batch))
    scores, largest = _scores(params, squares, count)
    _loss.check_curvature("fisher", largest)
    return scores


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _add(loss, params, batch, squares, i):
    grads = _loss.grad("fisher", loss, params, *_loss.example(batch, i))
    return jax.tree.map(lambda s, g: s + g.astype(jnp.float32) ** 2, squares, grads)


@jax.jit
def _scores(params, squares, count):
    fisher = jax.tree.map(lambda s: s / count, squares)
    scores = jax.tree.map(
        lambda h, w: h * w.astype(jnp.float32) ** 2 / 2, fisher, _tree.floating(params)
    )
    return scores, _loss.largest(fisher)
