import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _program, _tree
from jaxprune._tree import Params, Score, Scores, Tree

# The scores with the change of the loss to first and second order; the largest curvatures.
_Checked = tuple[tuple[Scores, jax.Array, jax.Array], Tree]


def obd(loss: Callable[..., jax.Array]) -> Score:
    r"""Scores a weight by the growth of the loss without it, to second order.

    .. math:: s_i = \tfrac{1}{2} h_i w_i^2, \qquad h_i = \partial^2 L / \partial w_i^2

    The diagonal is exact and costs one Hessian-vector product per weight, so this is for small
    networks: use :func:`obd_hutchinson` or :func:`fisher` for others. The gradient counts as zero,
    as it is at a minimum. Outside jit a warning says if it is not: if :math:`\sum_i |w_i g_i|` is
    larger than :math:`\sum_i |s_i|`. A weight with negative curvature has a negative score and is
    pruned early.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, twice differentiable.

    Returns:
      A function of ``(params, *batch)`` that returns one float32 score per weight; higher is kept.

    Raises:
      ValueError: outside jit, if the curvature is not finite, or 0 everywhere.
      TypeError: if the loss is not twice differentiable.

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
    return functools.partial(_scores_at_minimum, "obd", functools.partial(_obd, loss))


def obd_hutchinson(loss: Callable[..., jax.Array], samples: int = 100) -> Score:
    r"""Scores as :func:`obd` does, with an estimate of the diagonal from random signs.

    .. math:: s_i = \tfrac{1}{2} w_i^2 \, \frac{1}{n} \sum_{k=1}^n (v_k \odot H v_k)_i,
        \qquad v_k \in \{-1, 1\}^d

    The cost is one Hessian-vector product per sample. The estimate is unbiased, and exact for a
    diagonal Hessian; its variance is :math:`\tfrac{1}{n} \sum_{j \ne i} H_{ij}^2`. An estimate may
    be negative, and its sign is kept. If weights share curvature, 100 samples may be too few: a
    large weight with a negative estimate is pruned first. If the true diagonal is 0, as in a
    piecewise linear network with a linear loss, the estimate is noise around 0; :func:`obd` raises
    an error there.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, twice differentiable.
      samples: the number of random vectors.

    Returns:
      A function of ``(params, key, *batch)`` that returns one float32 score per weight; higher is
      kept.

    Raises:
      ValueError: for fewer than one sample; outside jit also if the curvature is not finite, or 0
        everywhere.
      TypeError: if the loss is not twice differentiable.

    Examples:
      >>> minimum = jnp.array([3.0, -1.0])
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0]) * (w - minimum) ** 2) / 2
      >>> obd_hutchinson(loss)(minimum, jax.random.key(0)).tolist()
      [4.5, 1.0]

    References:
      Bekas et al, `An estimator for the diagonal of a matrix
      <https://doi.org/10.1016/j.apnum.2007.01.003>`_, 2007
    """
    _tree.check_count("obd_hutchinson: samples", samples)
    score = functools.partial(_obd_hutchinson, loss, samples=samples)
    return functools.partial(_scores_at_minimum, "obd_hutchinson", score)


def _scores_at_minimum(name: str, score: Callable[..., Any], params: Params, *args: Any) -> Scores:
    """Returns scores, with a warning if the first order, which they ignore, is the larger one."""
    scores, first, second = score(params, *args)
    if not _tree.is_traced(first, second) and first > second:
        warnings.warn(
            f"{name}: the params are not at a minimum of the loss. Pruning changes it by up to "
            f"{first:.3g} to first order and {second:.3g} to second order, and only the second is "
            "scored. Train longer, or use `taylor`.",
            stacklevel=2,
        )
    return scores


@_loss.checked("obd", curvature=True)
def _obd(loss: _loss.Loss, params: Params, *batch: Any) -> _Checked:
    scalar, floats = _loss.of_floats("obd", loss, params, *batch)
    with _loss.differentiating("obd", scalar, floats):
        grads, product = jax.linearize(jax.grad(scalar), floats)
    leaves, rebuild = jax.tree.leaves(floats), functools.partial(_tree.rebuild, floats)

    def diagonal(k: int) -> jax.Array:
        index = jnp.arange(leaves[k].size).reshape(leaves[k].shape)

        def second(i: jax.Array) -> jax.Array:
            basis = jax.tree.map(jnp.zeros_like, leaves)
            basis[k] += (index == i).astype(basis[k].dtype)
            return jnp.sum(basis[k] * jax.tree.leaves(product(rebuild(basis)))[k])

        # One at a time: several in parallel are not faster on a CPU.
        return jax.lax.map(second, index.ravel()).reshape(index.shape)

    return _orders(floats, grads, rebuild([diagonal(k) for k in range(len(leaves))]))


@_loss.checked("obd_hutchinson", compiled=False, curvature=True)
def _obd_hutchinson(
    loss: _loss.Loss, params: Params, key: jax.Array, *batch: Any, samples: int
) -> _Checked:
    keys = jax.random.split(key, samples)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    zeros = jax.tree.leaves(_loss.zeros(params))
    total = _loss.fold(functools.partial(_add, loss), zeros, samples, params, keys, batch)
    estimate = functools.partial(_estimate, loss)
    args = params, total, samples, *batch
    return _program.freeze(estimate, *args)(*args)


def _add(
    loss: _loss.Loss, total: list, i: jax.Array, params: Params, keys: jax.Array, batch: Tree
) -> list[jax.Array]:
    """Adds the products of one sample, a vector of signs, to the estimate of every leaf."""
    scalar, floats = _loss.of_floats("obd_hutchinson", loss, params, *batch)
    leaves = jax.tree.leaves(floats)
    signs = [  # zeros_like has the sharding of w
        jnp.zeros_like(w) + jax.random.rademacher(k, w.shape, w.dtype)
        for w, k in zip(leaves, jax.random.split(keys[i], len(leaves)), strict=True)
    ]
    with _loss.differentiating("obd_hutchinson", scalar, floats):
        _, products = jax.jvp(jax.grad(scalar), (floats,), (_tree.rebuild(floats, signs),))
    return [
        t + v.astype(jnp.float32) * hv.astype(jnp.float32)
        for t, v, hv in zip(total, signs, jax.tree.leaves(products), strict=True)
    ]


def _estimate(
    loss: _loss.Loss, params: Params, total: list, samples: jax.Array, *batch: Any
) -> _Checked:
    scalar, floats = _loss.of_floats("obd_hutchinson", loss, params, *batch)
    curvature = _tree.rebuild(floats, [t / samples for t in total])
    return _orders(floats, jax.grad(scalar)(floats), curvature)


def _orders(floats: Tree, grads: Tree, curvature: Tree) -> _Checked:
    """Returns the scores with both orders, and the largest curvature of every leaf."""

    def total(changes: Tree) -> jax.Array:
        return sum((jnp.sum(jnp.abs(c)) for c in jax.tree.leaves(changes)), jnp.float32(0))

    weights = jax.tree.map(lambda w: w.astype(jnp.float32), floats)
    scores = jax.tree.map(lambda h, w: h.astype(jnp.float32) * w**2 / 2, curvature, weights)
    first = total(jax.tree.map(lambda w, g: w * g.astype(jnp.float32), weights, grads))
    second = total(scores)
    return (scores, first, second), _loss.largest(curvature)
