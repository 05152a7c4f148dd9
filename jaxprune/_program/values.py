"""A walked program: the jaxpr, and what is known of every value in it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Axis

Run = Callable[..., list[Any]]  # (cut, eqn, *operands) -> results
Pair = tuple[Axis, np.ndarray]  # the atoms of an axis, and its zeros


class ProgramMismatch(ValueError):
    """A function has other equations when it is traced for inputs of other sizes."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value in the program."""

    axes: tuple[Axis, ...]  # the atoms of every axis
    zeros: tuple[np.ndarray, ...]  # which slices of an axis are exactly zero once they are masked
    known: float | None = None  # the number that all entries are equal to, if it is known
    full: bool = False  # no floating param went into it: it is computed entirely, then sliced
    const: bool = False  # nor did an input, so that any of its axes can be cut anywhere

    @classmethod
    def of(cls, pairs: Iterable[Pair], known: float | None = None) -> "Value":
        """Makes a value from the atoms and the zeros of each of its axes."""
        pairs = list(pairs)
        return cls(tuple(axis for axis, _ in pairs), tuple(zero for _, zero in pairs), known)

    @property
    def pairs(self) -> list[Pair]:
        return list(zip(self.axes, self.zeros, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    def without(self, dropped: Sequence[int]) -> "Value":
        """Returns the value without some axes, which were summed over or indexed."""
        return Value.of(pair for i, pair in enumerate(self.pairs) if i not in dropped)

    def map(self, change: Callable[[int, np.ndarray], np.ndarray]) -> "Value":
        """Returns the value with the same change of every axis and of its zeros."""
        pairs = enumerate(self.pairs)
        return Value.of(
            ((change(i, axis), change(i, zero)) for i, (axis, zero) in pairs), self.known
        )


Rule = Callable[..., list[Value] | tuple[list[Value], Run]]  # (walk, eqn, *values) -> results


def combine(function: Any, flags: Sequence[np.ndarray]) -> np.ndarray:
    """Combines flags of one axis; often they are one array, which is then returned itself."""
    return functools.reduce(lambda a, b: a if a is b else function(a, b), flags)


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
        """Returns these values for the same program, traced for inputs of other sizes."""
        jaxpr, consts = closed.jaxpr, closed.consts
        mismatch = ProgramMismatch("the function has other equations on inputs of these sizes")
        if [s.eqn.primitive for s in self.steps] != [eqn.primitive for eqn in jaxpr.eqns]:
            raise mismatch
        steps = []
        for step, eqn in zip(self.steps, jaxpr.eqns, strict=True):
            inner: list[Any] = list(_jaxpr.inner(eqn)) if step.programs else []
            inner += _jaxpr.rules(eqn) if len(step.programs) > len(inner) else []
            if len(inner) != len(step.programs):  # a `cond` with another number of branches, say
                raise mismatch
            programs = [p.on(other) for p, other in zip(step.programs, inner, strict=True)]
            steps.append(dataclasses.replace(step, eqn=eqn, programs=programs))
        return dataclasses.replace(self, jaxpr=jaxpr, consts=consts, steps=steps)
