"""The activations in which units are, found while the traced program runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _analysis, _jaxpr, _tree
from jaxprune._walk import Program, Step
from jaxprune.groups import Groups, _collect

Read = tuple[jax.Array, int, np.ndarray]  # an activation, an axis, the unit of each index or 0


def reads(groups: Groups, fn: Callable[..., Any], params: Any, *inputs: Any) -> list[Read]:
    """Runs ``fn(params, *inputs)``, and lists activations among which every unit is in one.

    It is the operand of the first matmul or convolution that sums over the unit, else the last
    value in which the unit is.

    Raises:
      ValueError: if the function has other groups, or a unit is in no activation.
    """
    found = _analysis.analyse(fn, params, inputs, **groups.options)
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
    reader = _Reader(number[found.walk.atoms.all_roots()], len(groups))
    leaves = jax.tree.leaves(params)
    data = [False] * len(leaves) + [True] * len(jax.tree.leaves(inputs))
    reader.run(found.program, [*leaves, *jax.tree.leaves(inputs)], data)
    return reader.result(groups)


class _Reader:
    """Runs a program, and notes in which activations units are.

    Args:
      unit: of every atom, or 0.
      count: how many units there are.
    """

    def __init__(self, unit: np.ndarray, count: int) -> None:
        self._unit = unit
        self._seen: list[Read] = []
        self._first = np.full(count + 1, -1)  # the index in `seen` of what is summed over first
        self._last = np.full(count + 1, -1)

    def run(
        self, program: Program, args: Sequence[Any], data: Sequence[bool]
    ) -> tuple[list[Any], list[bool]]:
        """Runs a program; ``data`` says which arguments depend on the inputs, and so of results."""
        env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        env.update(zip(program.jaxpr.invars, args, strict=True))
        fed = {v for v, is_fed in zip(program.jaxpr.invars, data, strict=True) if is_fed}

        def read(atom: Any) -> tuple[Any, bool]:
            return (env[atom], atom in fed) if _jaxpr.is_var(atom) else (atom.val, False)

        for step in program.steps:
            given = [read(atom)[0] for atom in step.eqn.invars]
            flags = [read(atom)[1] for atom in step.eqn.invars]
            called = step.programs and _jaxpr.inner(step.eqn)[0].call
            if called and step.eqn.primitive.name != "shard_map":
                outs, out_flags = self.run(step.programs[0], given, flags)
            else:
                self._note_sums(step, given, flags)
                outs = _jaxpr.bind(step.eqn, *given)
                out_flags = [any(flags)] * len(outs)
            for value, x, is_fed, variable in zip(
                step.outs, outs, out_flags, step.eqn.outvars, strict=True
            ):
                env[variable] = x
                if is_fed:
                    fed.add(variable)
                    for i in range(len(value.axes)):
                        self._note(self._last, x, i, value.axes[i])
        results = [read(atom) for atom in program.jaxpr.outvars]
        return [x for x, _ in results], [is_fed for _, is_fed in results]

    def _note_sums(self, step: Step, given: Sequence[Any], data: Sequence[bool]) -> None:
        name, params = step.eqn.primitive.name, step.eqn.params
        summed: tuple[Sequence[int], ...] = ()
        if name == "dot_general":
            summed = params["dimension_numbers"][0]
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            taken = given[1].shape[numbers.rhs_spec[1]]
            summed = ([numbers.lhs_spec[1]] if taken > 1 else [],)  # not of a depthwise one
        for value, x, axes, is_fed in zip(step.ins, given, summed, data, strict=False):
            for axis in axes if is_fed else ():
                self._note(self._first, x, axis, value.axes[axis])

    def _note(self, where: np.ndarray, x: Any, axis: int, atoms: np.ndarray) -> None:
        unit = self._unit[atoms]
        own = np.unique(unit[unit > 0])
        if where is self._first:
            own = own[where[own] < 0]
        if len(own) and jnp.issubdtype(x.dtype, jnp.floating):
            where[own] = len(self._seen)
            self._seen.append((x, axis, unit))

    def result(self, groups: Groups) -> list[Read]:
        """Lists what was noted, every unit in one activation."""
        chosen = np.where(self._first < 0, self._last, self._first)
        for group in groups.groups:
            if (chosen[group.units] < 0).any():
                raise ValueError(
                    f"{_tree.show(group.members[0][0])}: the units of its group are in no "
                    "activation that is seen from outside of a loop or a branch. Use a score of "
                    "params for them, or unroll the loop."
                )
        return [
            (x, axis, np.where(chosen[unit] == i, unit, 0))
            for i, (x, axis, unit) in enumerate(self._seen)
            if (chosen[unit[unit > 0]] == i).any()
        ]
