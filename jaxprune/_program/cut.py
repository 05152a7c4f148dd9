"""Runs a walked program without the atoms that are removed, and with a ghost where one is read.

A value is a dict of its views. The view ``()`` has what is kept along every axis; in the view
``(1,)``, axis 1 has the ghosts in place of what is kept, and in ``(0, 1)`` both axes have::

    of a value (2, 5) of which the columns 1, 3 and 4 are removed, all of one kind
        ()     columns 0 and 2
        (1,)   column 1, which stands for three
    sum(x, 1)  =  sum(x[()], 1) + 3 * sum(x[1,], 1)

A ghost is an atom like any other: the units of a few removed atoms, at least one of every kind that
is counted, are the *ghosts* of the network, and a view has the indices that they have on its axes.
So every equation runs on ghosts as it runs on what is kept.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Axis
from jaxprune._program.values import Program, Run, Step, Value, View

Views = set[View]  # those of a value that are read, besides ()
Asked = list[Views]  # one for each of several values
Viewed = dict[View, Any]  # the arrays of a value
Picks = dict[tuple[int, int], np.ndarray]  # for axes (operand, axis), the ghosts that are taken
_COMBINE = {
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_prod": jnp.multiply,
    "reduce_and": jnp.bitwise_and,
    "reduce_or": jnp.bitwise_or,
    "pmax": jnp.maximum,
    "pmin": jnp.minimum,
}


class Cut:
    """Runs programs without some atoms."""

    def __init__(
        self, removed: np.ndarray, roots: np.ndarray | None = None, program: Program | None = None
    ) -> None:
        self._removed = removed  # for every atom, whether it is removed
        self.ghosts = np.zeros(len(removed), bool)  # for every atom, whether it is a ghost
        self._indices: dict[tuple[int, bool], tuple[Axis, np.ndarray | None]] = {}
        self._known: dict[Any, Any] = {}  # what `reads` found
        if program is not None and roots is not None:
            self._choose(program, roots)
        self._has_ghosts = bool(self.ghosts.any())

    def _choose(self, program: Program, roots: np.ndarray) -> None:
        """Chooses the units that are ghosts, so that every kind that is counted has one."""
        for step in program.steps:
            for ((n, i), *_), kinds in step.ruling.sums:
                axis = step.ins[n].axes[i]
                every = np.where(self._removed[axis], kinds, 0)
                for kind in np.setdiff1d(every[every > 0], every[self.ghosts[axis]]):
                    self.ghosts |= roots == roots[axis[np.argmax(every == kind)]]
            for inner in step.programs:
                self._choose(inner, roots)

    def kept(self, axis: Axis, ghost: bool = False) -> np.ndarray | None:
        """Returns the indices of an axis that are kept, or are ghosts; `None` for all of them."""
        key = id(axis), ghost
        if key not in self._indices:
            removed, chosen = self._removed[axis], self.ghosts[axis]
            indices = np.flatnonzero(chosen if ghost else ~removed) if removed.any() else None
            self._indices[key] = axis, indices  # with the axis: a freed id is reused
        return self._indices[key][1]

    def size(self, axis: Axis, dense: Any = None, ghost: bool = False) -> Any:
        """Returns the size of a cut axis; of another the given one, which may be symbolic."""
        kept = self.kept(axis, ghost)
        return (len(axis) if dense is None else dense) if kept is None else len(kept)

    def shape(self, value: Value, variable: Any, view: View = ()) -> tuple[Any, ...]:
        """Returns the shape of a view of a value."""
        pairs = zip(value.axes, variable.aval.shape, strict=True)
        return tuple(self.size(axis, n, i in view) for i, (axis, n) in enumerate(pairs))

    def cuts(self, value: Value) -> bool:
        """Returns whether anything of a value is removed."""
        return any(self.kept(axis) is not None for axis in value.axes)

    def take(self, x: Any, value: Value, view: View = ()) -> Any:
        """Cuts an array that was computed entirely."""
        for i, axis in enumerate(value.axes):
            if (kept := self.kept(axis, i in view)) is not None:
                x = take(x, kept, i)
        return x

    def touches(self, step: Step) -> bool:
        """Returns whether anything in or around an equation is cut."""
        steps = [s for program in step.programs for s in program.steps]
        return any(map(self.cuts, [*step.ins, *step.outs])) or any(map(self.touches, steps))

    def run(self, program: Program, *args: Any) -> list[Any]:
        """Runs a program on arguments that are cut, except those of full values."""
        entire: list[Viewed] = [{(): x} for x in args]
        results = self._run(program, *entire)
        return [views[()] for views in results]

    def _run(
        self,
        program: Program,
        *args: Viewed,
        wanted: Asked | None = None,  # views of the results
        keep_full: bool = False,
    ) -> list[Viewed]:
        """Runs a program on views of its inputs.

        Full values stay entire until something that is cut reads them: then they are sliced, once.
        The results are cut too, except full ones with ``keep_full``.
        """
        wanted = [set()] * len(program.outs) if wanted is None else wanted
        env: dict[Any, Viewed] = dict(zip(program.jaxpr.invars, args, strict=True))
        env |= {v: {(): x} for v, x in zip(program.jaxpr.constvars, program.consts, strict=True)}
        slices: dict[Any, Any] = {}

        def views(atom: Any) -> Viewed:
            return env[atom] if _jaxpr.is_var(atom) else {(): atom.val}

        def read(atom: Any, value: Value, view: View = ()) -> Any:
            arrays = views(atom)
            if value.full and (view or self.cuts(value)):
                if (atom, view) not in slices:
                    slices[atom, view] = self.take(arrays[()], value, view)
                return slices[atom, view]
            if view not in arrays:  # no one asked for it, as it is zero
                return _jaxpr.zeros(atom.aval, self.shape(value, atom, view))
            return arrays[view]

        def operand(step: Step, n: int, view: View) -> Any:
            return read(step.eqn.invars[n], step.ins[n], view)

        for step, asked in zip(program.steps, self.reads(program, wanted)[1], strict=True):
            eqn = step.eqn
            operands = [views(atom) for atom in eqn.invars]
            results: list[Viewed]
            if (step.outs and all(v.full for v in step.outs)) or not self.touches(step):
                results = [{(): x} for x in _jaxpr.bind(eqn, *(x[()] for x in operands))]
            elif eqn.primitive.name in _jaxpr.TRANSPARENT:
                results = self._run(step.programs[0], *operands, wanted=asked, keep_full=True)
            elif step.programs:
                results = self._rebuild(step, asked, functools.partial(operand, step))
            else:
                results = [{} for _ in eqn.outvars]
                for view in [(), *sorted(set().union(*asked))]:
                    outs = self._bind(step, view, functools.partial(operand, step))
                    for result, x in zip(results, outs, strict=True):
                        result[view] = x
            for arrays, v, variable in zip(results, step.outs, eqn.outvars, strict=True):
                for view, x in arrays.items():
                    if not v.full and x.shape != (shape := self.shape(v, variable, view)):
                        raise AssertionError(
                            f"{_jaxpr.where(eqn)}: the result must have shape {shape}, got "
                            f"{x.shape}. This is a bug in jaxprune; please report it."
                        )
            env.update(zip(eqn.outvars, results, strict=True))
        outs = list(zip(program.jaxpr.outvars, program.outs, wanted, strict=True))
        return [
            views(atom)
            if v.full and keep_full
            else {view: read(atom, v, view) for view in {(), *vs}}
            for atom, v, vs in outs
        ]

    def _bind(self, step: Step, view: View, read: Callable[[int, View], Any]) -> list[Any]:
        """Runs one equation for one view of its results, and counts ghosts that it sums over."""
        eqn, run = step.eqn, step.ruling.run
        name, terms = eqn.primitive.name, []
        for chosen, times in self.terms(step):
            operands = [read(n, self.view(step, n, view, chosen)) for n in range(len(step.ins))]
            for (n, axis), picks in chosen.items():
                if len(picks) < operands[n].shape[axis]:
                    operands[n] = take(operands[n], picks, axis)
            outs = _jaxpr.bind(eqn, *operands) if run is None else run(self, view, eqn, *operands)
            if times != 1 and name == "reduce_prod":
                outs = [x**times for x in outs]
            elif times != 1 and name not in _COMBINE:
                outs = [x * jnp.asarray(times, x.dtype) for x in outs]
            terms.append(outs)
        combine = functools.partial(functools.reduce, _COMBINE.get(name, jnp.add))
        return [combine(outs) for outs in zip(*terms, strict=True)]

    def terms(self, step: Step) -> list[tuple[Picks, int]]:
        """Lists the terms of a sum: which ghosts are summed over, and how often they occur.

        A sum over two axes that are cut has four: what is kept along both, or along one, and the
        ghosts along the other, or along both. In the first, no ghosts are chosen.
        """
        terms: list[tuple[Picks, int]] = [({}, 1)]
        for places, kinds in step.ruling.sums if self._has_ghosts else ():
            n, i = places[0]
            axis = step.ins[n].axes[i]
            ghosts = self.kept(axis, ghost=True)
            if ghosts is None or not len(ghosts):
                continue
            every = np.broadcast_to(kinds, len(axis))
            _, first = np.unique(every[ghosts], return_index=True)
            number = np.array([self._times(axis, every, kind) for kind in every[ghosts][first]])
            terms += [
                (chosen | dict.fromkeys(places, np.sort(first[number == t])), times * int(t))
                for t in np.unique(number[number > 0])
                for chosen, times in terms
            ]
        return terms

    def _times(self, axis: Axis, kinds: np.ndarray, kind: int) -> int:
        """Counts the removed slices of a kind; those of no positive kind are not counted."""
        return int(np.count_nonzero(self._removed[axis] & (kinds == kind))) if kind > 0 else 0

    def view(self, step: Step, n: int, view: View, chosen: Collection[tuple[int, int]]) -> View:
        """Returns the view of an operand from which a view of the results is computed."""
        axes, becomes = step.ins[n].axes, step.ruling.becomes
        places = [[i] for i in range(len(axes))] if becomes is None else becomes[n]
        return tuple(
            i
            for i, axis in enumerate(axes)
            if (n, i) in chosen
            or (view and self.kept(axis) is not None and not set(places[i]).isdisjoint(view))
        )

    # Which views are read is known before any is computed, going backwards.

    def reads(self, program: Program, wanted: Asked) -> tuple[Asked, list[Asked]]:
        """Returns the views that are read of the inputs, and of the results of each equation."""
        if not self._has_ghosts:
            return [set() for _ in program.ins], [[set() for _ in s.outs] for s in program.steps]
        key = id(program), tuple(map(frozenset, wanted))
        if key not in self._known:
            self._known[key] = program, *self._find_reads(program, wanted)
        return self._known[key][1:]

    def _find_reads(self, program: Program, wanted: Asked) -> tuple[Asked, list[Asked]]:
        asked: dict[Any, Views] = {}

        def ask(atoms: Sequence[Any], values: Sequence[Value], wanted: Asked) -> None:
            for atom, value, views in zip(atoms, values, wanted, strict=True):
                if views and _jaxpr.is_var(atom) and not value.full:
                    needed = {view for view in views if view and not self._is_zero(value, view)}
                    asked[atom] = asked.get(atom, set()) | needed

        ask(program.jaxpr.outvars, program.outs, wanted)
        steps = []
        for step in reversed(program.steps):
            steps.append([asked.get(v, set()) for v in step.eqn.outvars])
            if self.touches(step):
                ask(step.eqn.invars, step.ins, self.operands(step, steps[-1])[0])
        return [asked.get(v, set()) for v in program.jaxpr.invars], steps[::-1]

    def _is_zero(self, value: Value, view: View) -> bool:
        """Returns whether a view is zero, or has only what is never counted."""

        def never(i: int) -> bool:
            kinds, ghosts = value.kinds[i], self.kept(value.axes[i], ghost=True)
            return bool(np.all(kinds <= 0 if isinstance(kinds, int) else kinds[ghosts] <= 0))

        return any(map(never, view))

    def operands(self, step: Step, asked: Asked) -> tuple[Asked, list[Asked]]:
        """Returns the views that are read of the operands, and those wanted of inner programs."""
        operands: Asked = [set() for _ in step.ins]
        if not self._has_ghosts:
            return operands, [[set() for _ in program.outs] for program in step.programs]
        if not step.programs:
            for view in {(), *itertools.chain(*asked)}:
                for chosen, _ in self.terms(step):
                    for n, views in enumerate(operands):
                        views.add(self.view(step, n, view, chosen))
            return operands, []
        inner = _jaxpr.inner(step.eqn)
        wanted = [list(asked) for _ in inner]
        last = inner[-1]
        carry = len(last.carried)
        if step.eqn.primitive.name == "scan":
            wanted[0][carry:] = [_moved(views, -1) for views in asked[carry:]]
        elif step.eqn.primitive.name == "while":
            wanted[0] = [set()]
        before: Any = None
        while before != (operands, wanted):  # what is carried has the same views in all rounds
            before = [set(views) for views in operands], [list(views) for views in wanted]
            for body, program, results in zip(inner, step.programs, wanted, strict=False):
                reads = self.reads(program, results)[0]
                for i, n in enumerate(body.operands):
                    stacked = i >= len(body.operands) - body.stacked
                    operands[n] |= _moved(reads[i], 1) if stacked else reads[i]
            for c, i in enumerate(last.carried):
                operands[last.operands[i]] |= wanted[-1][c]
                wanted[-1][c] = set(operands[last.operands[i]])
            if len(step.programs) > len(inner):
                wanted[1:] = self._derivatives(step, asked, operands)
        return operands, wanted

    def _derivatives(self, step: Step, asked: Asked, operands: Asked) -> list[Asked]:
        """Returns the views that are wanted of derivative rules, and adds those that they read."""
        ins, outs = (
            [n for n, atom in enumerate(atoms) if _jaxpr.is_inexact(atom.aval)]
            for atoms in (step.eqn.invars, step.eqn.outvars)
        )
        if len(step.programs) == 2:
            wanted = [[asked[n] for n in outs] * 2]
            reads = self.reads(step.programs[1], wanted[0])[0]
            tangents = reads[len(operands) :]
        else:
            backward = [set(operands[n]) for n in ins]
            residuals = self.reads(step.programs[2], backward)[0][: -len(asked)]
            wanted = [[*asked, *residuals], backward]
            reads, tangents = self.reads(step.programs[1], wanted[0])[0], []
        for n, views in [*enumerate(reads[: len(operands)]), *zip(ins, tangents, strict=False)]:
            operands[n] |= views
        return wanted

    def _rebuild(self, step: Step, asked: Asked, read: Callable[[int, View], Any]) -> list[Viewed]:
        """Runs an equation that has programs, on views."""
        operands, wanted = self.operands(step, asked)
        args = [{view: read(n, view) for view in {(), *vs}} for n, vs in enumerate(operands)]
        pairs = zip(step.programs, wanted, strict=True)
        bodies = [functools.partial(self._run, p, wanted=views) for p, views in pairs]
        if len(bodies) == 3:
            bodies[2] = self._backward(step, bodies[2])
        if step.eqn.primitive.name != "scan":
            return _jaxpr.rebuild(step.eqn, bodies, args)
        (scan,) = _jaxpr.inner(step.eqn)
        first, carry = len(args) - scan.stacked, len(scan.carried)
        args[first:] = [_moved(views, -1) for views in args[first:]]
        results = _jaxpr.rebuild(step.eqn, bodies, args)
        return results[:carry] + [_moved(views, 1) for views in results[carry:]]

    def _backward(self, step: Step, body: Callable[..., list[Viewed]]) -> Any:
        """Runs a rule on cotangents: one of a ghost is the sum of those that it stands for."""
        ins = [
            v for v, a in zip(step.ins, step.eqn.invars, strict=True) if _jaxpr.is_inexact(a.aval)
        ]

        def backward(*args: Viewed) -> list[Viewed]:
            first = len(args) - len(step.outs)
            pairs = zip(args[first:], step.outs, strict=True)
            shared = [{w: self._share(x, v, w, -1) for w, x in views.items()} for views, v in pairs]
            pairs = zip(body(*args[:first], *shared), ins, strict=True)
            return [{w: self._share(x, v, w, 1) for w, x in views.items()} for views, v in pairs]

        return backward

    def _share(self, x: Any, value: Value, view: View, power: int) -> Any:
        """Divides what a ghost has by all that it stands for, or multiplies it."""
        for i in view:
            axis, ghosts = value.axes[i], self.kept(value.axes[i], ghost=True)
            kinds = np.broadcast_to(value.kinds[i], len(axis))
            equal = kinds[ghosts][:, None] == kinds[ghosts]
            times = np.array([self._times(axis, kinds, kind) for kind in kinds[ghosts]])
            factor = np.where(times > 0, np.maximum(times, 1.0) ** power, 0)
            if power > 0:  # of several ghosts of a kind, the first has it all
                equal = np.eye(len(equal)) * (equal.argmax(1) == np.arange(len(equal)))
            matrix = jnp.asarray(equal * factor, x.dtype)
            x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, i)), 0, i)
        return x


def _moved(views: Any, by: int) -> Any:
    """Returns views with other numbers of their axes, as a scan adds and removes the first."""
    moved = {tuple(i + by for i in view): view for view in views}
    return (
        {new: views[old] for new, old in moved.items()} if isinstance(views, dict) else set(moved)
    )


def resizing(name: str, value: Value, **changes: Any) -> Run:
    """Returns how to run a cut equation that has the shape of its result as a parameter."""

    def run(cut: Cut, view: View, eqn: Any, *operands: Any) -> list[Any]:
        shape = {name: cut.shape(value, eqn.outvars[0], view)}
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
