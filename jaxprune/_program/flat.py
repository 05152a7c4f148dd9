"""Evaluates a program with its calls inlined, and keeps every intermediate value."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.values import Program, Value


class Evaluated(NamedTuple):
    """An equation that is not a call, and the numbers of its operands and results."""

    eqn: Any
    ins: list[int]
    outs: list[int]


class Flat:
    """The evaluation of a program, in which every value has a number."""

    def __init__(self) -> None:
        self.values: list[Value] = []  # what is known of every value
        self.arrays: list[Any] = []  # the array of every value
        self.steps: list[Evaluated] = []  # the equations, in the order of evaluation

    def add(self, value: Value, array: Any) -> int:
        """Numbers a value."""
        self.values.append(value)
        self.arrays.append(array)
        return len(self.values) - 1

    def run(self, program: Program, ins: Sequence[int]) -> list[int]:
        """Evaluates a program on values that have numbers, and returns those of its results."""
        consts = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        env = dict(zip(program.jaxpr.invars, ins, strict=True))

        def number(atom: Any, value: Value) -> int:
            if not _jaxpr.is_var(atom):
                return self.add(value, atom.val)
            return self.add(value, consts[atom]) if atom in consts else env[atom]

        for step in program.steps:
            ins = [number(atom, v) for atom, v in zip(step.eqn.invars, step.ins, strict=True)]
            calls = step.programs and _jaxpr.inner(step.eqn)[0].call
            if calls and step.eqn.primitive.name != "shard_map":
                outs = self.run(step.programs[0], ins)
            else:
                results = _jaxpr.bind(step.eqn, *(self.arrays[i] for i in ins))
                outs = [self.add(v, x) for v, x in zip(step.outs, results, strict=True)]
                self.steps.append(Evaluated(step.eqn, ins, outs))
            env.update(zip(step.eqn.outvars, outs, strict=True))
        pairs = zip(program.jaxpr.outvars, program.outs, strict=True)
        return [number(atom, v) for atom, v in pairs]
