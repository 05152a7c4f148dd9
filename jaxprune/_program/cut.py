"""Runs a walked program without the atoms that are removed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Axis
from jaxprune._program.values import Program, Run, Step, Value


class Cut:
    """Runs programs without some atoms."""

    def __init__(self, removed: np.ndarray) -> None:
        self._removed = removed  # for every atom, whether it is removed
        self._kept: dict[int, tuple[Axis, np.ndarray | None]] = {}

    def kept(self, axis: Axis) -> np.ndarray | None:
        """Returns the indices of an axis that are kept, or `None` for all of them."""
        if id(axis) not in self._kept:
            removed = self._removed[axis]
            indices = np.flatnonzero(~removed) if removed.any() else None
            self._kept[id(axis)] = axis, indices  # with the axis: a freed id is reused
        return self._kept[id(axis)][1]

    def size(self, axis: Axis, dense: Any = None) -> Any:
        """Returns the size of a cut axis; of another the given one, which may be symbolic."""
        kept = self.kept(axis)
        return (len(axis) if dense is None else dense) if kept is None else len(kept)

    def shape(self, value: Value, variable: Any) -> tuple[Any, ...]:
        """Returns the shape of a cut value."""
        return tuple(map(self.size, value.axes, variable.aval.shape))

    def cuts(self, value: Value) -> bool:
        """Returns whether anything of a value is removed."""
        return any(self.kept(axis) is not None for axis in value.axes)

    def take(self, x: Any, value: Value) -> Any:
        """Cuts an array that was computed entirely."""
        for i, axis in enumerate(value.axes):
            if (kept := self.kept(axis)) is not None:
                x = take(x, kept, i)
        return x

    def touches(self, step: Step) -> bool:
        """Returns whether anything in or around an equation is cut."""
        steps = [s for program in step.programs for s in program.steps]
        return any(map(self.cuts, [*step.ins, *step.outs])) or any(map(self.touches, steps))

    def run(self, program: Program, *args: Any, keep_full: bool = False) -> list[Any]:
        """Runs a program on arguments that are cut, except those of full values.

        Full values stay entire until something that is cut reads them: then they are sliced, once.
        The results are cut too, except full ones with ``keep_full``.
        """
        env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        env.update(zip(program.jaxpr.invars, args, strict=True))
        slices: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return env[atom] if _jaxpr.is_var(atom) else atom.val

        def cut(atom: Any, value: Value) -> Any:
            if not value.full or not self.cuts(value):
                return read(atom)
            if atom not in slices:
                slices[atom] = self.take(read(atom), value)
            return slices[atom]

        for step in program.steps:
            eqn = step.eqn
            operands = [read(atom) for atom in eqn.invars]
            if (step.outs and all(v.full for v in step.outs)) or not self.touches(step):
                outs = _jaxpr.bind(eqn, *operands)
            elif eqn.primitive.name in _jaxpr.TRANSPARENT:
                outs = self.run(step.programs[0], *operands, keep_full=True)
            else:
                operands = [cut(atom, v) for atom, v in zip(eqn.invars, step.ins, strict=True)]
                if step.programs:
                    bodies = [functools.partial(self.run, p) for p in step.programs]
                    outs = _jaxpr.rebuild(eqn, bodies, operands)
                elif step.run is not None:
                    outs = step.run(self, eqn, *operands)
                else:
                    outs = _jaxpr.bind(eqn, *operands)
            for x, v, variable in zip(outs, step.outs, eqn.outvars, strict=True):
                if not v.full and x.shape != (shape := self.shape(v, variable)):
                    raise AssertionError(
                        f"{_jaxpr.where(eqn)}: the result must have shape {shape}, got {x.shape}. "
                        "This is a bug in jaxprune; please report it."
                    )
            env.update(zip(eqn.outvars, outs, strict=True))
        if keep_full:
            return [read(atom) for atom in program.jaxpr.outvars]
        return [cut(atom, v) for atom, v in zip(program.jaxpr.outvars, program.outs, strict=True)]


def resizing(name: str, value: Value, **changes: Any) -> Run:
    """Returns how to run a cut equation that has the shape of its result as a parameter."""

    def run(cut: Cut, eqn: Any, *operands: Any) -> list[Any]:
        shape = {name: cut.shape(value, eqn.outvars[0])}
        return _jaxpr.bind(eqn, *operands, **shape, **changes)

    return run


def take(x: Any, kept: np.ndarray, axis: int) -> Any:
    """Takes sorted indices along an axis, as a slice where they are evenly spaced."""
    if isinstance(x, np.ndarray):
        return x.take(kept, axis)
    steps = np.diff(kept)
    if (steps == steps[:1]).all():
        start, stop = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
        return jax.lax.slice_in_dim(x, start, stop, int(steps[0]) if len(steps) else 1, axis)
    return jnp.take(x, kept, axis, unique_indices=True, indices_are_sorted=True, mode="clip")
