import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _tree


def obd(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    r"""Scores a weight by how much the loss would grow without it, to second order.

    .. math:: s_i = \tfrac{1}{2} h_i w_i^2, \qquad h_i = \partial^2 L / \partial w_i^2

    The diagonal is exact and costs one Hessian-vector product per weight: for small networks. Use
    :func:`obd_hutchinson` or :func:`fisher` for others. The gradient counts as zero, as it is at a
    minimum; outside jit a warning says if it is not: if :math:`\sum_i |w_i g_i|` is larger than
    :math:`\sum_i |s_i|`. A negative curvature gives a negative score: such a weight leaves early.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, twice differentiable.

    Returns:
      A function of ``(params, *batch)`` giving one float32 score per weight; higher is kept.

    Raises:
      ValueError: (outside jit) for a curvature that is not finite, or 0 everywhere.
      TypeError: for a loss that is not scalar, or not differentiable twice.

    Examples:
      >>> minimum = jnp.array([3.0, -1.0])
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0]) * (w - minimum) ** 2) / 2
      >>> obd(loss)(minimum).tolist()
      [4.5, 1.0]

    References:
      LeCun et al, `Optimal Brain Damage
      <https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html>`_,
      1989 (there h is that of Gauss and Newton, never negative)
    """
    return functools.partial(_checked, "obd", functools.partial(_obd, loss))


def obd_hutchinson(loss: Callable[..., jax.Array], samples: int = 100) -> Callable[..., Any]:
    r"""Scores as :func:`obd` does, with an estimate of the diagonal from random signs.

    .. math:: s_i = \tfrac{1}{2} w_i^2 \, \frac{1}{n} \sum_{k=1}^n (v_k \odot H v_k)_i,
        \qquad v_k \in \{-1, 1\}^d

    Costs one Hessian-vector product per sample. The estimate is unbiased and exact for a diagonal
    Hessian; its variance is :math:`\tfrac{1}{n} \sum_{j \ne i} H_{ij}^2`. Signs are kept: an
    estimate may be negative. Where all of the diagonal is 0, as in a piecewise linear network with
    a linear loss, the estimate is noise around 0: there :func:`obd` raises an error. Where weights
    share curvature, 100 samples may be too few: a large weight with a negative estimate leaves
    first.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, twice differentiable.
      samples: how many random vectors.

    Returns:
      A function of ``(params, key, *batch)`` giving one float32 score per weight; higher is kept.

    Raises:
      ValueError: for fewer than one sample and (outside jit) a curvature that is not finite, or 0
        everywhere.
      TypeError: for a loss that is not scalar, or not differentiable twice.

    Examples:
      >>> minimum = jnp.array([3.0, -1.0])
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0]) * (w - minimum) ** 2) / 2
      >>> obd_hutchinson(loss)(minimum, jax.random.key(0)).tolist()
      [4.5, 1.0]

    References:
      Bekas et al, `An estimator for the diagonal of a matrix
      <https://doi.org/10.1016/j.apnum.2007.01.003>`_, 2007
    """
    if samples < 1:
        raise ValueError(f"obd_hutchinson needs at least one sample, got {samples}.")
    return functools.partial(
        _checked, "obd_hutchinson", functools.partial(_obd_hutchinson, loss, samples)
    )


def _checked(name, score, params, *args):
    _tree.check_params(params)
    scores, largest, first, second = score(params, *args)
    _loss.check_curvature(name, largest)
    if not _tree.is_traced(first, second) and first > second:
        warnings.warn(
            f"{name}: the params are not at a minimum of the loss. To first order pruning changes "
            f"it by up to {first:.3g}, to second order by {second:.3g}, and only the second counts "
            "here. Train longer, or use `taylor`.",
            stacklevel=2,
        )
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _obd(loss, params, *batch):
    scalar, floats = _loss.of_floats("obd", loss, params, *batch)
    with _loss.differentiating("obd", scalar, floats):
        grads, product = jax.linearize(jax.grad(scalar), floats)
    leaves, treedef = jax.tree.flatten(floats)

    def diagonal(k):
        index = jnp.arange(leaves[k].size).reshape(leaves[k].shape)

        def second(i):
            basis = jax.tree.map(jnp.zeros_like, leaves)
            basis[k] += index == i
            return jnp.sum(basis[k] * jax.tree.leaves(product(treedef.unflatten(basis)))[k])

        # One at a time: several at once are no faster on a CPU.
        return jax.lax.map(second, index.ravel()).reshape(index.shape)

    return _scores(floats, grads, treedef.unflatten([diagonal(k) for k in range(len(leaves))]))


def _obd_hutchinson(loss, samples, params, key, *batch):
    keys = jax.random.split(key, samples)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    zeros = [jnp.zeros_like(w, jnp.float32) for w in jax.tree.leaves(_tree.floating(params))]
    add = functools.partial(_add, loss, params, keys, batch)
    total = _loss.fold(add, zeros, samples, _tree.is_traced(params, keys, batch))
    return _estimate(loss, params, total, samples, *batch)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _add(loss, params, keys, batch, total, i):
    scalar, floats = _loss.of_floats("obd_hutchinson", loss, params, *batch)
    leaves, treedef = jax.tree.flatten(floats)
    signs = [  # zeros_like has the sharding of w
        jnp.zeros_like(w) + jax.random.rademacher(k, w.shape, w.dtype)
        for w, k in zip(leaves, jax.random.split(keys[i], len(leaves)), strict=True)
    ]
    with _loss.differentiating("obd_hutchinson", scalar, floats):
        _, products = jax.jvp(jax.grad(scalar), (floats,), (treedef.unflatten(signs),))
    return [
        t + v.astype(jnp.float32) * hv.astype(jnp.float32)
        for t, v, hv in zip(total, signs, jax.tree.leaves(products), strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _estimate(loss, params, total, samples, *batch):
    scalar, floats = _loss.of_floats("obd_hutchinson", loss, params, *batch)
    curvature = jax.tree.structure(floats).unflatten([t / samples for t in total])
    return _scores(floats, jax.grad(scalar)(floats), curvature)


def _scores(floats, grads, curvature):
    """Gives the scores, the largest curvature by leaf, and the size of both orders."""
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), floats)
    scores = jax.tree.map(lambda h, w: h.astype(jnp.float32) * w**2 / 2, curvature, weights)
    products = jax.tree.map(
        lambda w, g: jnp.sum(jnp.abs(w * g.astype(jnp.float32))), weights, grads
    )
    first = sum(jax.tree.leaves(products))
    second = sum(jnp.sum(jnp.abs(s)) for s in jax.tree.leaves(scores))
    return scores, _loss.largest(curvature), first, second
