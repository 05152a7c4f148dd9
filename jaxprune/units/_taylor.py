import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _mesh, _program, _ranks, _tree
from jaxprune._loss import Loss
from jaxprune._tree import Params, Where
from jaxprune.units._reduce import NORMS, normalized

if TYPE_CHECKING:
    from jaxprune.groups import Group, Groups

Gates = tuple[tuple[tuple[str, int], ...], ...]  # for each group, the leaves and axes of its gate


def taylor(
    groups: "Groups", loss: Loss, *, where: Where | None = None, normalize: str | None = None
) -> Callable[..., jax.Array]:
    r"""Scores a unit by how much the loss of one example would change without it, to first order.

    .. math:: s_u = \frac1N \sum_n \Big| \sum_{i \in G_u} w_i
        \frac{\partial L^{(n)}}{\partial w_i} \Big|

    The absolute value is taken per example. :func:`taylor_gates` squares the derivative of the
    entire batch, in which examples of opposite signs cancel.

    The leaves :math:`G_u` form the gate of the unit. By default they are the slice that produces
    the unit (its first member: a kernel; in attention the query, in a recurrent cell one of its
    kernels) and the biases that the program adds to its product, before anything else but constant
    factors: not those of a norm, whose scale would count the unit twice. ``where`` chooses others:
    the scale and the bias of a batch norm, or the slices that read the unit, such as the output
    projection of attention, which gate what they read, after any activation.

    The paper takes the mean over positions, and this function the sum. The two differ by one factor
    per layer, which ``normalize="l2"`` divides out.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar. It is called with batches of one example, so a
        batch norm must use its running statistics.
      where: ``where(path, leaf)`` returns whether a leaf is part of the gates. A group without such
        a leaf has its default gate.
      normalize: ``"l2"`` divides the scores of each group by their norm, as the paper does to
        compare layers; also ``"mean"``, ``"max"`` and ``"sum"``.

    Returns:
      A function of ``(params, *batch)`` that returns a float32 array of shape ``(len(groups),)``.
      The first axis of every array in ``batch`` is that of the examples.

    Raises:
      ValueError: for params other than those of the groups, batch arrays of different lengths, a
        ``where`` that chooses no leaf, or an unknown ``normalize``.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> params = {"in": jnp.eye(2), "out": jnp.array([[1.0], [-3.0]])}
      >>> apply_fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> groups = jp.find_groups(apply_fn, params, x)
      >>> print(taylor(groups, lambda p, x: jnp.mean(apply_fn(p, x)))(params, x))
      [1. 3.]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    _loss.check_groups("units.taylor", groups)
    _tree.check_function("units.taylor: loss", loss, _loss.CURRIED)
    _tree.check_word("normalize", normalize, NORMS)
    chosen = choose(groups, where)

    def score(params: Params, *batch: Any) -> jax.Array:
        _ranks.check_params(groups, params)
        _loss.check_examples("units.taylor", batch)
        params, batch = jax.tree.map(jnp.asarray, (params, batch))
        count = len(jax.tree.leaves(batch)[0])
        made = gates(groups, chosen, loss, params, batch)
        add = functools.partial(_add, loss, groups, made)
        zeros = jax.device_put(np.zeros(len(groups), np.float32))
        total = _loss.fold(add, zeros, count, params, batch)
        scores = total / jax.device_put(np.float32(count))
        return normalized(groups, scores, normalize)

    return score


def _add(
    loss: Loss, groups: "Groups", gates: Gates, total: jax.Array, i: Any, params: Params, batch: Any
) -> jax.Array:
    example = _loss.example(batch, i)
    return total + jnp.abs(derivatives("units.taylor", loss, groups, gates, params, *example))


def choose(groups: "Groups", where: Where | None) -> Gates:
    """Chooses the leaves that make the gates; none where they are those that produce the unit."""
    leaves = dict(_tree.named_leaves(groups.like))
    chosen = [
        tuple((p, axis) for p, axis, _ in group.members if where and where(p, leaves[p]))
        for group in groups.groups
    ]
    if where and not any(chosen):
        paths = sorted({path for group in groups.groups for path, *_ in group.members})
        raise ValueError(
            f"where: must choose a leaf of at least one group, got none of {paths[:10]}. "
            "Choose from print(groups)."
        )
    return tuple(chosen)


def gates(groups: "Groups", chosen: Gates, loss: Loss, params: Params, batch: Any) -> Gates:
    """Returns the chosen gates, and for others the leaves that produce the unit in the loss."""
    if all(chosen):
        return chosen
    paths = [path for path, _ in _tree.named_leaves(params)]
    uses = zip(paths, _program.uses(loss, params, batch), strict=True)
    added = {path: {paths[i] for i in use.added} for path, use in uses}
    leaves = dict(_tree.named_leaves(groups.like))
    pairs = zip(groups.groups, chosen, strict=True)
    return tuple(gate or _producer(group, leaves, added) for group, gate in pairs)


def _producer(
    group: "Group", leaves: dict[str, Any], added: dict[str, set[str]]
) -> tuple[tuple[str, int], ...]:
    """Lists the first member, and the biases that are added to its product."""
    (path, first, _), *others = group.members
    kernel = leaves[path].shape
    gate = [(path, first)]
    for other, axis, _ in others:
        bias = leaves[other].shape
        # A bias has some of the axes of its kernel, in order: (heads, dims) of (in, heads, dims).
        sizes, rest = [n for n in bias if n > 1], iter(kernel)
        fewer = len(sizes) < len(kernel) and all(n in rest for n in sizes)
        if other in added[path] and fewer and (axis == first or len(bias) < len(kernel)):
            gate.append((other, axis))
    return tuple(gate)


def derivatives(
    name: str, loss: Loss, groups: "Groups", gates: Gates, params: Params, *batch: Any
) -> jax.Array:
    """Returns the derivative of the loss with respect to the gate of each unit."""
    grads = dict(_tree.named_leaves(_loss.grad(name, loss, params, *batch)))
    weights = dict(_tree.named_leaves(params))
    total = jnp.zeros(len(groups), jnp.float32)
    for group, gate in zip(groups.groups, gates, strict=True):
        for path, axis in gate:
            product = grads[path].astype(jnp.float32) * jnp.asarray(weights[path], jnp.float32)
            slices = _mesh.replicated(jnp.sum(product, _tree.other_axes(product.ndim, axis)))
            unit = groups.unit[path][axis]
            places = np.flatnonzero(np.isin(unit, group.units))
            total = total.at[unit[places] - 1].add(slices[places])
    return total
