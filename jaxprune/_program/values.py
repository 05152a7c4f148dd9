"""A walked program: the jaxpr, and what is known of every value in it.

Masked slices along an axis that are equal to one another are of one kind, a number::

    0           zero: of a param, and what follows from it, 0 * w or relu(0)
    1, 2, …     computed by the same equations from slices of one kind: exp(0), or 0 - mean
    -1, -2, …   different for every index, such as those of a table; the number is of the reason

What reads across an axis, a sum, needs one masked slice of each kind, a *ghost*, and how often it
occurs. An axis along which all slices are of one kind has that number for all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Axis

View = tuple[int, ...]  # the axes along which a value has its ghosts, in place of what is kept
Run = Callable[..., list[Any]]  # (cut, view, eqn, *operands) -> results
Kinds = Any  # the kind of every masked slice along an axis: one number, or an array
Pair = tuple[Axis, Kinds]  # the atoms of an axis, and its kinds
ZERO, SAME, DIFFERENT = 0, 1, -1


class ProgramMismatch(ValueError):
    """A function has other equations when it is traced for inputs of other sizes."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value in the program."""

    axes: tuple[Axis, ...]  # the atoms of every axis
    kinds: tuple[Kinds, ...]  # the kinds of the slices along every axis, once they are masked
    known: float | None = None  # the number that all entries are equal to, if it is known
    full: bool = False  # no floating param went into it: it is computed entirely, then sliced
    const: bool = False  # nor did an input, so that any of its axes can be cut anywhere
    source: tuple[Any, Any, int] | None = None  # of a constant, for `entries`

    @classmethod
    def of(cls, pairs: Iterable[Pair], known: float | None = None) -> "Value":
        """Makes a value from the atoms and the kinds of each of its axes."""
        pairs = list(pairs)
        return cls(tuple(axis for axis, _ in pairs), tuple(kinds for _, kinds in pairs), known)

    @property
    def pairs(self) -> list[Pair]:
        return list(zip(self.axes, self.kinds, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    def without(self, dropped: Sequence[int]) -> "Value":
        """Returns the value without some axes, which were summed over or indexed."""
        return Value.of(pair for i, pair in enumerate(self.pairs) if i not in dropped)

    def places(self, dropped: Sequence[int]) -> list[list[int]]:
        """Lists for every axis the one that it becomes in :meth:`without`, or none."""
        left = [i for i in range(len(self.axes)) if i not in dropped]
        return [[left.index(i)] if i in left else [] for i in range(len(self.axes))]

    def map(self, change: Callable[[int, np.ndarray], np.ndarray]) -> "Value":
        """Returns the value with the same change of every axis and of its kinds."""

        def kinds(i: int) -> Kinds:
            one = type(self.kinds[i]) is int
            return self.kinds[i] if one else simple(change(i, self.kinds[i]))

        pairs = [(change(i, axis), kinds(i)) for i, axis in enumerate(self.axes)]
        return Value.of(pairs, self.known)


def entries(value: Value) -> Any:
    """Computes a constant: its source is an array, or a result of an equation on constants."""
    if value.source is None:
        raise ValueError("the value must be a constant")
    eqn, given, result = value.source
    return given if eqn is None else _jaxpr.constant(eqn, map(entries, given), result)


def same(*kinds: Kinds) -> Kinds:
    """Returns the kinds of what is computed from slices of these kinds, unless it is zero."""
    least, arrays = ZERO, []
    for k in kinds:
        if type(k) is not int:
            arrays.append(k)
        elif k < least:
            least = k
    if least < 0 or not arrays:
        return least or SAME
    lowest = np.min(arrays, axis=0)
    number = np.unique(np.stack(arrays), axis=1, return_inverse=True)[1].reshape(-1) + 1
    return simple(np.where(lowest < 0, lowest, number))


def zeros(kinds: Sequence[Kinds], which: Callable[..., bool] = all) -> Any:
    """Returns whether all kinds, or any, are of zeros: for all indices, or for each of them."""
    if all([type(k) is int for k in kinds]):  # in a list, as this is called for every axis
        return not any(kinds) if which is all else ZERO in kinds
    function = np.logical_and if which is all else np.logical_or
    return functools.reduce(function, [np.equal(k, ZERO) for k in kinds])


def where_zero(zero: Any, kinds: Kinds) -> Kinds:
    """Returns the kinds, with 0 for what is zero."""
    if type(zero) is bool:
        return ZERO if zero else kinds
    return simple(np.where(zero, ZERO, kinds)) if np.any(zero) else kinds


def product(*kinds: Kinds) -> Kinds:
    """Returns the kinds of a product, which is zero if any factor is."""
    return where_zero(zeros(kinds, any), same(*kinds))


def either(*kinds: Kinds) -> Kinds:
    """Returns the kinds of what is one of several values, or a sum of them."""
    return where_zero(zeros(kinds), same(*kinds))


def joined(kinds: Sequence[Kinds], sizes: Sequence[int]) -> Kinds:
    """Returns the kinds along an axis of which the parts were computed separately."""
    first = kinds[0]
    if type(first) is int and first <= 0 and all(type(k) is int and k == first for k in kinds):
        return first
    parts, count = [], 0
    for k, size in zip(kinds, sizes, strict=True):
        part = np.broadcast_to(k, size)
        parts.append(np.where(part > 0, part + count, part))
        count = max(count, int(parts[-1].max(initial=0)))
    return simple(np.concatenate(parts))


def rows(kinds: np.ndarray) -> Kinds:
    """Returns the kinds of entire rows of a table of kinds."""
    flat = kinds.reshape(len(kinds), -1)
    lowest = flat.min(1, initial=0)
    number = np.unique(flat, axis=0, return_inverse=True)[1].reshape(-1) + 1
    return simple(where_zero((flat == 0).all(1), np.where(lowest < 0, lowest, number)))


def simple(kinds: Any) -> Kinds:
    """Returns one number for slices of one kind."""
    if type(kinds) is int:
        return kinds
    if not len(kinds) or (kinds == kinds[0]).all():
        return min(int(kinds[0]), SAME) if len(kinds) else ZERO
    return kinds


class Sum(NamedTuple):
    """A sum, or a maximum, over axes of operands that are one axis: ``(operand, axis)``."""

    places: Sequence[tuple[int, int]]
    kinds: Kinds  # along this axis; slices of positive kinds count


class Ruling(NamedTuple):
    """What a rule finds in an equation."""

    outs: list[Value]
    run: Run | None = None  # how it runs when cut, if not by `bind`
    # For every axis of every operand, the axes of the results that it becomes; if not given, the
    # one at the same place.
    becomes: Sequence[Sequence[Sequence[int]]] | None = None
    sums: Sequence[Sum] = ()


Rule = Callable[..., list[Value] | Ruling]  # (walk, eqn, *values) -> results


@dataclasses.dataclass
class Step:
    """An equation, the values around it, the programs in it, and how to run it if cut."""

    eqn: Any
    ins: list[Value]
    ruling: Ruling
    programs: list["Program"]

    @property
    def outs(self) -> list[Value]:
        return self.ruling.outs


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
            constants = [v.const for v in step.ins]
            inner += _jaxpr.rules(eqn, constants) if len(step.programs) > len(inner) else []
            if len(inner) != len(step.programs):  # a `cond` with another number of branches, say
                raise mismatch
            programs = [p.on(other) for p, other in zip(step.programs, inner, strict=True)]
            steps.append(dataclasses.replace(step, eqn=eqn, programs=programs))
        return dataclasses.replace(self, jaxpr=jaxpr, consts=consts, steps=steps)
