"""A walked program that ran, with its calls opened: every value has a number."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.walk import Program, Value


class Step(NamedTuple):
    """An equation that is no call, and the numbers of its operands and results."""

    eqn: Any
    ins: list[int]
    outs: list[int]


class Flat:
    """Runs a program, and keeps all of it.

    Attributes:
      values: what is known of every value.
      arrays: what every value was.
      steps: the equations, in the order in which they ran.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.arrays: list[Any] = []
        self.steps: list[Step] = []

    def add(self, value: Value, array: Any) -> int:
        """Numbers a value."""
        self.values.append(value)
        self.arrays.append(array)
        return len(self.values) - 1

    def run(self, program: Program, ins: Sequence[int]) -> list[int]:
        """Runs a program on values that have numbers, and gives those of its results."""
        consts = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        env = dict(zip(program.jaxpr.invars, ins, strict=True))

        def number(atom: Any, value: Value) -> int:
            if not _jaxpr.is_var(atom):
                return self.add(value, atom.val)
            return self.add(value, consts[atom]) if atom in consts else env[atom]

        for step in program.steps:
            ins = [number(atom, v) for atom, v in zip(step.eqn.invars, step.ins, strict=True)]
            called = step.programs and _jaxpr.inner(step.eqn)[0].call
            if called and step.eqn.primitive.name != "shard_map":
                outs = self.run(step.programs[0], ins)
            else:
                found = _jaxpr.bind(step.eqn, *(self.arrays[i] for i in ins))
                outs = [self.add(v, x) for v, x in zip(step.outs, found, strict=True)]
                self.steps.append(Step(step.eqn, ins, outs))
            env.update(zip(step.eqn.outvars, outs, strict=True))
        pairs = zip(program.jaxpr.outvars, program.outs, strict=True)
        return [number(atom, v) for atom, v in pairs]
