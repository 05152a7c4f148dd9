"""A walked program: the jaxpr, and what is known of every value in it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Axis

Run = Callable[..., list[Any]]  # (cut, eqn, *operands) -> results


class ProgramMismatch(ValueError):
    """A function traced for other inputs has other equations."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value in the program.

    Attributes:
      axes: the atoms of every axis.
      zeros: for every axis, whether the slice at an index is exactly zero once its unit is masked.
      known: the number that all entries are equal to, if it is known.
      full: whether no floating param went into it, so that it is computed entirely, then sliced.
      const: whether no input went into it either, so that any of its axes can be cut anywhere.
    """

    axes: tuple[Axis, ...]
    zeros: tuple[np.ndarray, ...]
    known: float | None = None
    full: bool = False
    const: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    def without(self, dropped: Sequence[int]) -> "Value":
        """Returns the value without some axes, which were summed over or indexed."""
        rest = [i for i in range(len(self.axes)) if i not in dropped]
        return Value(tuple(self.axes[i] for i in rest), tuple(self.zeros[i] for i in rest))

    def map(self, change: Callable[[int, np.ndarray], np.ndarray]) -> "Value":
        """Returns the value with the same change of every axis and of its zeros."""
        axes = tuple(change(i, axis) for i, axis in enumerate(self.axes))
        zeros = tuple(change(i, zero) for i, zero in enumerate(self.zeros))
        return Value(axes, zeros, self.known)


Rule = Callable[..., list[Value] | tuple[list[Value], Run]]  # (walk, eqn, *values) -> results


def combine(function: Any, flags: Sequence[np.ndarray]) -> np.ndarray:
    """Combines flags of one axis; often they are one array, which is then returned itself."""
    result = flags[0]
    for flag in flags[1:]:
        if flag is not result:
            result = function(result, flag)
    return result


@dataclasses.dataclass
class Step:
    """An equation, the values around it, the programs in it, and how to run it if cut."""

    eqn: Any
    ins: list[Value]
    outs: list[Value]
    programs: list["Program"]
    run: Run | None = None


@dataclasses.dataclass
class Program:
    """A jaxpr whose variables have values."""

    jaxpr: Any
    consts: Sequence[Any]
    ins: list[Value]
    outs: list[Value]
    steps: list[Step]

    def on(self, closed: Any) -> "Program":
        """Returns these values for the same program, traced for inputs of other sizes.

        Raises:
          ProgramMismatch: if it is another program.
        """
        jaxpr, consts = closed.jaxpr, closed.consts
        if [s.eqn.primitive for s in self.steps] != [eqn.primitive for eqn in jaxpr.eqns]:
            raise ProgramMismatch("the function has other equations on inputs of these sizes")
        steps = []
        for step, eqn in zip(self.steps, jaxpr.eqns, strict=True):
            inner: list[Any] = list(_jaxpr.inner(eqn)) if step.programs else []
            inner += _jaxpr.rules(eqn) if len(step.programs) > len(inner) else []
            programs = [p.on(other) for p, other in zip(step.programs, inner, strict=True)]
            steps.append(dataclasses.replace(step, eqn=eqn, programs=programs))
        return dataclasses.replace(self, jaxpr=jaxpr, consts=consts, steps=steps)
