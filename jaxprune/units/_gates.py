"""Gates: the leaves whose slices scale with a unit, and the derivative of a loss to them."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _mesh, _tree
from jaxprune._tree import Params, Where

if TYPE_CHECKING:
    from jaxprune.groups import Group, Groups

Gates = tuple[tuple[tuple[str, int], ...], ...]  # for each group, the leaves and axes of its gate


def gates(groups: "Groups", where: Where | None) -> Gates:
    """Chooses the leaves that make the gates: by default those that produce the unit."""
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
    pairs = zip(groups.groups, chosen, strict=True)
    return tuple(gate or _producer(group, leaves) for group, gate in pairs)


def _producer(group: "Group", leaves: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """Lists the first member, and the biases that follow in its module."""
    (path, first, _), *others = group.members
    kernel = leaves[path].shape
    gate = [(path, first)]
    for other, axis, _ in others:
        bias = leaves[other].shape
        # A bias has some of the axes of its kernel, in order: (heads, dims) of (in, heads, dims).
        sizes, rest = [n for n in bias if n > 1], iter(kernel)
        fewer = len(sizes) < len(kernel) and all(n in rest for n in sizes)
        sibling = other.rpartition("/")[0] == path.rpartition("/")[0]
        if not (sibling and fewer and (axis == first or len(bias) < len(kernel))):
            break
        gate.append((other, axis))
    return tuple(gate)


@functools.partial(jax.jit, static_argnames=("name", "loss", "groups", "gates"))
def derivatives(
    name: str,
    loss: Callable[..., jax.Array],
    groups: "Groups",
    gates: Gates,
    params: Params,
    *batch: Any,
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
