"""The loss without each unit, computed again only from where the units of a group meet.

Up to there a value is sliced: along one axis, what it is at the indices of a unit does not depend
on other units of the group. So without a unit it is as without the whole group at these indices,
and as in the dense network elsewhere, and both are computed once for all units of the group.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _program, _progress, _tree
from jaxprune._program import Flat
from jaxprune.groups import Groups

_KNOWN, _SLICED, _MIXED = range(3)  # does not depend on the group, is sliced, or neither

Units = tuple[np.ndarray, ...]  # the units of every axis of a value, 0 for none
_Without = Callable[[jax.Array], jax.Array]


def losses_without(
    groups: Groups,
    loss: Callable[..., jax.Array],
    memory: float,
    bar: jax.Array | None,
    params: Any,
    *batch: Any,
) -> tuple[jax.Array, jax.Array]:
    """Gives the loss, and the loss without each unit, in float32.

    As many units are evaluated at once as fit into ``memory``, and each moves the bar.

    Raises:
      TypeError: for a loss that is not scalar.
    """

    def scalar(params: Any, *batch: Any) -> jax.Array:
        checked, floats = _loss.of_floats("search.oracle", loss, params, *batch)
        return checked(floats)

    options: dict[str, Any] = {key: groups.options[key] for key in ("exact", "split")}
    found = _program.analyse(scalar, params, batch, **options)
    flat = Flat()
    args = jax.tree.leaves((params, batch))
    ins = [flat.add(v, x) for v, x in zip(found.program.ins, args, strict=True)]
    (out,) = flat.run(found.program, ins)
    units, apart = _units(groups, found, flat, [path for path, _ in _tree.named_leaves(params)])
    losses = jnp.zeros(len(groups), jnp.float32)
    for group in groups.groups:
        sliced = bool(apart[group.units].all())
        without, size = _without(flat, out, units, group.units, len(found.leaves), sliced)

        def measure(unit: jax.Array, without: _Without = without) -> jax.Array:
            if bar is not None:
                _progress.advance(bar, unit)
            return without(unit)

        at_once = max(int(memory / max(size, 1)), 1)
        measured = jax.lax.map(measure, jnp.asarray(group.units), batch_size=at_once)
        losses = losses.at[group.units - 1].set(measured)
    return flat.arrays[out].astype(jnp.float32), losses


def _units(
    groups: Groups, found: _program.Structure, flat: Flat, paths: list[str]
) -> tuple[list[Units], np.ndarray]:
    """Gives the units of every value, and of every unit whether the loss has it as it was found."""
    leaves = [groups.unit[path] for path in paths]
    roots = found.walk.atoms.all_roots()
    unit = np.zeros(len(roots), np.int32)
    pairs = [
        (axis, own)
        for leaf, units in zip(found.leaves, leaves, strict=True)
        for axis, own in zip(leaf.axes, units, strict=True)
    ]
    for axis, own in pairs:
        unit[roots[axis[own > 0]]] = own[own > 0]
    unit = unit[roots]
    apart = np.ones(len(groups) + 1, bool)
    for axis, own in pairs:
        differ = unit[axis] != own
        apart[unit[axis[differ]]] = apart[own[differ]] = False
    others = [tuple(unit[axis] for axis in v.axes) for v in flat.values[len(leaves) :]]
    return leaves + others, apart


def _without(
    flat: Flat, out: int, units: list[Units], group: np.ndarray, leaves: int, sliced: bool
) -> tuple[_Without, int]:
    """Gives the loss as a function of the unit, one of a group, that is masked, and its bytes.

    A result is sliced if it and all operands have their units on one axis: what is contracted is an
    axis of both operands, so that the units of the result would be on a second. Never of a loop,
    which may mix what it carries, nor of a group whose units the loss unites (not ``sliced``).
    """
    axes = [[i for i, u in enumerate(each) if np.isin(u, group).any()] for each in units]

    def gone(i: int, unit: Any) -> jax.Array:
        where = jnp.zeros((1,) * len(units[i]), bool)
        for axis in axes[i]:
            others = [n for n in range(len(units[i])) if n != axis]
            where |= jnp.expand_dims(jnp.isin(units[i][axis], unit), others)
        return where

    kinds = [_SLICED if i < leaves and axes[i] else _KNOWN for i in range(len(units))]
    bare = list(flat.arrays)  # without the whole group
    for i in range(leaves):
        if axes[i]:
            bare[i] = jnp.where(gone(i, group), 0, flat.arrays[i])
    for eqn, ins, outs in flat.steps:
        kind = max((kinds[i] for i in ins), default=_KNOWN)
        if kind == _SLICED:
            single = all(len(axes[i]) <= 1 for i in ins) and all(len(axes[i]) == 1 for i in outs)
            if sliced and single and not _program.inner(eqn):
                results = _program.bind(eqn, *(bare[i] for i in ins))
                for i, x in zip(outs, results, strict=True):
                    bare[i] = x
            else:
                kind = _MIXED
        for i in outs:
            kinds[i] = kind
    mixed = [step for step in flat.steps if any(kinds[i] == _MIXED for i in step.outs)]
    read = {i for step in mixed for i in step.ins} | {out}
    masked = sorted(i for i in read if kinds[i] == _SLICED)

    def without(unit: jax.Array) -> jax.Array:
        arrays = list(flat.arrays)
        for i in masked:
            arrays[i] = jnp.where(gone(i, unit), bare[i], flat.arrays[i])
        for eqn, ins, outs in mixed:
            results = _program.bind(eqn, *(arrays[i] for i in ins))
            for i, x in zip(outs, results, strict=True):
                arrays[i] = x
        return arrays[out].astype(jnp.float32)

    made = [flat.arrays[i] for i in [*masked, *(i for step in mixed for i in step.outs)]]
    return without, sum(x.size * x.dtype.itemsize for x in made)
