"""The activations in which units are, found while the traced program runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _program, _tree
from jaxprune._program import Flat
from jaxprune.groups import Groups, _collect

Read = tuple[jax.Array, int, np.ndarray]  # an activation, an axis, the unit of each index or 0


def reads(groups: Groups, fn: Callable[..., Any], params: Any, *inputs: Any) -> list[Read]:
    """Runs ``fn(params, *inputs)``, and lists activations among which every unit is in one.

    It is the operand of the first matmul or convolution that sums over the unit, else the last
    value in which the unit is.

    Raises:
      ValueError: if the function has other groups, or a unit is in no activation.
    """
    found = _program.analyse(fn, params, inputs, **groups.options)
    units = _collect(found, params, groups.options).unit
    same = units.keys() == groups.unit.keys() and all(
        np.array_equal(mine, theirs)
        for path, axes in units.items()
        for mine, theirs in zip(axes, groups.unit[path], strict=True)
    )
    if not same:
        raise ValueError(
            "The groups are not those of this function. Find them with the same function and "
            "params, and with inputs that differ in the batch size at most."
        )
    number = np.zeros(len(found.walk.atoms.all_roots()), np.int32)
    for (path, _), leaf in zip(_tree.named_leaves(params), found.leaves, strict=True):
        for axis, unit in zip(leaf.axes, units[path], strict=True):
            number[found.walk.atoms.find(axis)[unit > 0]] = unit[unit > 0]
    unit = number[found.walk.atoms.all_roots()]
    flat = Flat()
    args = jax.tree.leaves((params, inputs))
    flat.run(found.program, [flat.add(v, x) for v, x in zip(found.program.ins, args, strict=True)])

    seen: list[Read] = []
    first = np.full(len(groups) + 1, -1)  # the index in `seen` of what is summed over first
    last = np.full(len(groups) + 1, -1)

    def note(where: np.ndarray, i: int, axis: int) -> None:
        there = unit[flat.values[i].axes[axis]]
        own = np.unique(there[there > 0])
        if where is first:
            own = own[where[own] < 0]
        if len(own) and jnp.issubdtype(flat.arrays[i].dtype, jnp.floating):
            where[own] = len(seen)
            seen.append((flat.arrays[i], axis, there))

    fed = set(range(len(found.leaves), len(args)))  # what depends on the inputs
    for eqn, ins, outs in flat.steps:
        for i, summed in _summed(eqn, ins):
            if i in fed:
                note(first, i, summed)
        if fed.intersection(ins):
            fed.update(outs)
            for i in outs:
                for n in range(len(flat.values[i].axes)):
                    note(last, i, n)
    chosen = np.where(first < 0, last, first)
    for group in groups.groups:
        if (chosen[group.units] < 0).any():
            raise ValueError(
                f"{_tree.show(group.members[0][0])}: the units of its group are in no activation "
                "that is seen from outside of a loop or a branch. Use a score of params for them, "
                "or unroll the loop."
            )
    return [
        (x, n, np.where(chosen[there] == i, there, 0))
        for i, (x, n, there) in enumerate(seen)
        if (chosen[there[there > 0]] == i).any()
    ]


def _summed(eqn: Any, ins: Sequence[int]) -> list[tuple[int, int]]:
    """Lists the operands over whose axes an equation sums products, with the axes."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        pairs = zip(ins, params["dimension_numbers"][0], strict=True)
        return [(i, axis) for i, axes in pairs for axis in axes]
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        depthwise = eqn.invars[1].aval.shape[numbers.rhs_spec[1]] == 1
        return [] if depthwise else [(ins[0], numbers.lhs_spec[1])]
    return []
