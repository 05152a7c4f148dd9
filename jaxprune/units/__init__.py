r"""Scores of units: one number for every unit of :func:`jaxprune.find_groups`, higher is kept.

They go where scores of params go, ``groups.select(scores, sparsity)``, and are arrays, so that they
add up: ``units.taylor(groups, loss)(params, *batch) - 1e-3 * units.flops(groups) / 1e6``.

A unit's gate is a number that multiplies what the unit computes. Its derivative at 1 needs no
change of the network: where leaves :math:`G_u` enter linearly, as kernel and bias of a layer do,

.. math:: \frac{\partial L}{\partial \text{gate}_u} = \sum_{i \in G_u} w_i
    \frac{\partial L}{\partial w_i} = \sum_\text{positions} z_u \frac{\partial L}{\partial z_u}

with :math:`z_u` what the layer computes for the unit. It is the same after a ReLU.

>>> import jax, jax.numpy as jnp
>>> import jaxprune as jp
>>> params = {"in": jnp.eye(3, 4), "bias": jnp.ones(4), "out": jnp.arange(8.0).reshape(4, 2)}
>>> fn = lambda p, x: jax.nn.relu(x @ p["in"] + p["bias"]) @ p["out"]
>>> groups = jp.find_groups(fn, params, jnp.ones((5, 3)))
>>> scores = taylor(groups, lambda p, x: jnp.sum(fn(p, x)))(params, jnp.ones((5, 3)))
>>> print(scores, groups.select(scores, 0.5)["bias"])
[ 2. 10. 18. 13.] [False False  True  True]
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _mesh, _program, _tree
from jaxprune._ranks import per_group
from jaxprune.groups import Group, Groups
from jaxprune.units._activation import reads

Where = Callable[[str, Any], bool]


def taylor(
    groups: Groups,
    loss: Callable[..., jax.Array],
    *,
    where: Where | None = None,
    normalize: str | None = None,
) -> Callable[..., jax.Array]:
    r"""Scores a unit by how much the loss of an example would change, to first order, without it.

    .. math:: s_u = \frac1N \sum_n \Big| \sum_{i \in G_u} w_i
        \frac{\partial L^{(n)}}{\partial w_i} \Big|

    The leaves :math:`G_u` of the unit's gate are the slice that makes the unit, which is the first
    of its members, and with it those that follow in the same module (the same path up to the last
    part) and have the shape of a bias: that of the first, without some axes. In attention that is
    the query, in a recurrent cell one of its kernels. ``where`` chooses others: the scale and the
    bias of a batch norm, or the slices that read the unit, such as the output projection of
    attention, which give the gate on what they read, whatever the activation. All slices of a unit
    that it chooses are gated together.

    The paper takes the mean over positions, here they are summed. That is a factor for each layer,
    which ``normalize="l2"`` divides out.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar, the mean over a batch; called with batches of one
        example, so that batch statistics must be those of evaluation.
      where: ``where(path, leaf)`` says which leaves make the gates. A group with none of them has
        its gate as by default.
      normalize: ``"l2"`` divides the scores of every group by their norm, as the paper does to
        compare layers; also ``"mean"``, ``"max"`` and ``"sum"``.

    Returns:
      A function of ``(params, *batch)`` giving a float32 array of shape ``(len(groups),)``. The
      first axis of every array in ``batch`` is that of the examples.

    Raises:
      ValueError: for params that the groups were not found for, arrays of different lengths, a
        ``where`` that chooses nothing, or unknown words.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.eye(2), "out": jnp.array([[1.0], [-3.0]])}
      >>> fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> groups = jp.find_groups(fn, params, x)
      >>> print(taylor(groups, lambda p, x: jnp.mean(fn(p, x)))(params, x))
      [1. 3.]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    words = (None, "l2", "mean", "max", "sum")
    if normalize not in words:
        raise ValueError(f"normalize must be one of {words}, got {normalize!r}.")
    score = functools.partial(_taylor, loss, groups, _gates(groups, where), normalize)
    return functools.partial(_checked, score, groups)


def taylor_gates(
    groups: Groups, loss: Callable[..., jax.Array], *, where: Where | None = None
) -> Callable[..., jax.Array]:
    r"""Scores a unit by the squared change of the loss of a batch, to first order, without it.

    .. math:: s_u = \Big( \sum_{i \in G_u} w_i \frac{\partial L}{\partial w_i} \Big)^2

    The paper puts its gates after batch norm: choose its scale and bias with ``where``. For the
    mean over several batches, as there, add the scores. Where several batch norms are in one unit
    (along a residual stream) their gates are one, and their sum is squared.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar.
      where: ``where(path, leaf)`` says which leaves make the gates; see :func:`taylor`, which has
        the default as well.

    Returns:
      A function of ``(params, *batch)`` giving a float32 array of shape ``(len(groups),)``.

    Raises:
      ValueError: for params that the groups were not found for, or a ``where`` that chooses
        nothing.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.eye(2), "out": jnp.array([[1.0], [-3.0]])}
      >>> fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> groups = jp.find_groups(fn, params, x)
      >>> print(taylor_gates(groups, lambda p, x: jnp.mean(fn(p, x)))(params, x))
      [0. 9.]

    References:
      Molchanov et al, `Importance Estimation for Neural Network Pruning
      <https://arxiv.org/abs/1906.10771>`_, 2019
    """
    score = functools.partial(_squared, loss, groups, _gates(groups, where))
    return functools.partial(_checked, score, groups)


def activation(
    groups: Groups, apply_fn: Callable[..., Any], statistic: str = "mean"
) -> Callable[..., jax.Array]:
    r"""Scores a unit by a statistic of what the network reads of it, without a gradient.

    With :math:`a` the entries of the unit in the operand of the first matmul or convolution that
    sums over it, of all examples and positions (else in the last value in which the unit is):

    - ``"mean"``: :math:`s_u = \operatorname{mean} |a|`
    - ``"std"``: the standard deviation of :math:`a`
    - ``"mean_l2"``: :math:`s_u = \sqrt{\sum_n (\operatorname{mean} |a^{(n)}|)^2}`, the mean of
      every example, then the norm over examples (the first axis of :math:`a`)

    Found in the traced program, so that no layer has to hand them out. What is inside of a scan, a
    while loop or a cond is not seen. Heads are found where their outputs are projected.

    Args:
      groups: from ``find_groups``.
      apply_fn: the function for which the groups were found.
      statistic: ``"mean"``, ``"std"`` or ``"mean_l2"``.

    Returns:
      A function of ``(params, *inputs)`` giving a float32 array of shape ``(len(groups),)``.

    Raises:
      ValueError: for another statistic, groups of another function, or units in no activation.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.ones((2, 1))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> x = jnp.array([[1.0], [-1.0], [3.0], [1.0]])
      >>> groups = jp.find_groups(fn, params, x)
      >>> print(activation(groups, fn)(params, x))
      [1.25 0.5 ]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016 (mean and standard deviation)

      Muralidharan et al, `Compact Language Models via Pruning and Knowledge Distillation
      <https://arxiv.org/abs/2407.14679>`_, 2024 (mean over the sequence, norm over the batch; there
      with norms of head outputs)
    """
    words = ("mean", "std", "mean_l2")
    if statistic not in words:
        raise ValueError(f"statistic must be one of {words}, got {statistic!r}.")
    return functools.partial(
        _checked, functools.partial(_activation, apply_fn, groups, statistic), groups
    )


def flops(groups: Groups) -> jax.Array:
    """Returns the FLOPs that the removal of each unit alone saves.

    Counted for the example inputs passed to ``find_groups``, as :func:`jaxprune.metrics.flops`
    counts: of a `cond` the most expensive branch, a `while` loop once, with a warning. Molchanov et
    al subtract them from the scores of :func:`taylor`, times a small number.

    Args:
      groups: from ``find_groups``.

    Returns:
      A float32 array of shape ``(len(groups),)``.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> groups = jp.find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((1, 3)))
      >>> print(flops(groups))
      [10. 10. 10. 10.]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    _program.warn_of_loops(groups.terms, stacklevel=2)

    def without(unit: np.ndarray) -> np.ndarray:
        return float(len(unit)) - np.bincount(unit, minlength=len(groups) + 1)

    dense = _program.total(groups.terms, _program.Contraction.macs)
    left = _program.total(groups.terms, lambda c: c.macs(without))
    saved = 2 * (dense - np.broadcast_to(left, len(groups) + 1))
    return jnp.asarray(saved[1:], jnp.float32)


def _gates(groups: Groups, where: Where | None) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Lists for every group the leaves and axes whose slices make the gates."""
    leaves = dict(_tree.named_leaves(groups.like))
    found = []
    chosen = False
    for group in groups.groups:
        own = [(p, axis) for p, axis, _ in group.members if where and where(p, leaves[p])]
        chosen = chosen or bool(own)
        found.append(tuple(own or _producer(group, leaves)))
    if where and not chosen:
        paths = sorted({path for group in groups.groups for path, *_ in group.members})
        raise ValueError(f"where: chooses no leaf of any group; their leaves are {paths[:10]}.")
    return tuple(found)


def _producer(group: Group, leaves: dict[str, Any]) -> list[tuple[str, int]]:
    """Lists the first member, and the biases that follow in its module."""
    (path, first, _), *others = group.members
    kernel = leaves[path].shape
    found = [(path, first)]
    for other, axis, _ in others:
        bias = leaves[other].shape
        sizes, rest = [n for n in bias if n > 1], iter(kernel)
        fewer = len(sizes) < len(kernel) and all(n in rest for n in sizes)  # in order
        if not (fewer and (axis == first or len(bias) < len(kernel))):
            break
        if other.rpartition("/")[0] != path.rpartition("/")[0]:
            break
        found.append((other, axis))
    return found


def _checked(score: Callable[..., Any], groups: Groups, params: Any, *batch: Any) -> jax.Array:
    _tree.check_params(params)
    _tree.align(groups.like, params, "params")
    return score(params, *batch)


def _taylor(loss, groups, gates, normalize, params, *batch):
    _loss.check_examples("units.taylor", batch)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    count = len(jax.tree.leaves(batch)[0])
    add = functools.partial(_add, loss, groups, gates, params, batch)
    zeros = jnp.zeros(len(groups), jnp.float32)
    score = _loss.fold(add, zeros, count, _tree.is_traced(params, batch)) / count
    if normalize is None:
        return score
    group = groups._group()
    return score / per_group(normalize, score, group, len(groups.groups))[group]


@functools.partial(jax.jit, static_argnums=range(3), donate_argnums=5)
def _add(loss, groups, gates, params, batch, total, i):
    example = _loss.example(batch, i)
    return total + jnp.abs(_derivatives("units.taylor", loss, groups, gates, params, *example))


@functools.partial(jax.jit, static_argnums=range(3))
def _squared(loss, groups, gates, params, *batch):
    return _derivatives("units.taylor_gates", loss, groups, gates, params, *batch) ** 2


@functools.partial(jax.jit, static_argnums=range(3))
def _activation(apply_fn, groups, statistic, params, *inputs):
    score = jnp.zeros(len(groups), jnp.float32)
    for x, axis, unit in reads(groups, apply_fn, params, *inputs):
        own, place = np.unique(unit, return_inverse=True)
        found = _mesh.automatic(functools.partial(_statistic, statistic, axis, place), x)
        score = score.at[own[own > 0] - 1].set(found[own > 0])
    return score


def _statistic(statistic, axis, place, x):
    """Gives one number for all entries of a value that are at the same place along an axis."""
    entries = np.bincount(place).astype(np.float32)[None]

    def mean(a):  # of every example and place
        sums = jnp.zeros((len(a), entries.size), jnp.float32)
        return sums.at[:, place].add(jnp.mean(a, 1)) / entries

    a = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
    a = a.reshape(len(a) if a.ndim > 1 else 1, -1, a.shape[-1])  # example, position, index
    if statistic == "mean":
        return jnp.mean(mean(jnp.abs(a)), 0)
    if statistic == "std":
        centre = jnp.mean(mean(a), 0)[place]
        return jnp.sqrt(jnp.mean(mean((a - centre[None, None]) ** 2), 0))
    return jnp.linalg.norm(mean(jnp.abs(a)), axis=0)


def _derivatives(name, loss, groups, gates, params, *batch):
    """Gives the derivative of the loss to the gate of every unit."""
    grads = dict(_tree.named_leaves(_loss.grad(name, loss, params, *batch)))
    weights = dict(_tree.named_leaves(params))
    total = jnp.zeros(len(groups), jnp.float32)
    for group, gate in zip(groups.groups, gates, strict=True):
        for path, axis in gate:
            product = grads[path].astype(jnp.float32) * jnp.asarray(weights[path], jnp.float32)
            others = [i for i in range(product.ndim) if i != axis]
            slices = _mesh.replicated(jnp.sum(product, others))
            unit = groups.unit[path][axis]
            own = np.flatnonzero(np.isin(unit, group.units))
            total = total.at[unit[own] - 1].add(slices[own])
    return total
