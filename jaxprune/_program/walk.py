"""One walk of a traced program that tells which slices leave together, and one that runs it cut.

:class:`Walk` gives every axis of every value its atoms, equation by equation, with the rules of
``_rules.py``. What it returns, a :class:`Program`, is the jaxpr with these notes; :class:`Cut` runs
a program without the atoms that left.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Atoms, Axis, Product


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value in the program.

    Attributes:
      axes: the atoms of every axis.
      zeros: for every axis, whether the slice at an index is exactly zero once its unit is masked.
      known: the one number that all entries are, if they are a known number.
      full: whether no floating param went into it, so that it is computed whole, and sliced.
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


Run = Callable[..., list[Any]]


@dataclasses.dataclass
class Step:
    """An equation, the values around it, the programs in it, and how it runs cut if not as is."""

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
        """Gives the notes to the same program, traced for inputs of other sizes.

        Raises:
          ValueError: if it is another program.
        """
        jaxpr, consts = closed.jaxpr, closed.consts
        if [s.eqn.primitive for s in self.steps] != [eqn.primitive for eqn in jaxpr.eqns]:
            raise ValueError("another program")
        steps = []
        for step, eqn in zip(self.steps, jaxpr.eqns, strict=True):
            inner: list[Any] = list(_jaxpr.inner(eqn)) if step.programs else []
            inner += _jaxpr.rules(eqn) if len(step.programs) > len(inner) else []
            programs = [p.on(other) for p, other in zip(step.programs, inner, strict=True)]
            steps.append(dataclasses.replace(step, eqn=eqn, programs=programs))
        return dataclasses.replace(self, jaxpr=jaxpr, consts=consts, steps=steps)


class Walk:
    """The walk of a program, and what it finds.

    Attributes:
      atoms: which indices leave together.
      products: merged axes, for :meth:`Atoms.solve`.
      inexact: atoms with the reason why a result changes if they leave (empty if ``exact``).
      redraws: atoms of random numbers, which are others if some leave.
    """

    def __init__(
        self, rules: Mapping[str, Callable[..., Any]], exact: bool, derivatives: bool
    ) -> None:
        self._rules = rules
        self.atoms = Atoms()
        self.products: list[Product] = []
        self.inexact: list[tuple[Axis, str]] = []
        self.redraws: list[tuple[Axis, str]] = []
        self._exact = exact
        self._derivatives = derivatives
        self._flags: dict[tuple[int, bool], np.ndarray] = {}

    # Values.

    def flags(self, size: int, flag: bool) -> np.ndarray:
        """Gives the one array of a size that is all true, or all false."""
        if (size, flag) not in self._flags:
            self._flags[size, flag] = np.full(size, flag)
        return self._flags[size, flag]

    def value(self, axes: Sequence[Axis], zero: bool = False, **more: Any) -> Value:
        """Makes a value whose slices are all zero once masked, or may all be nonzero."""
        return Value(tuple(axes), tuple(self.flags(len(a), zero) for a in axes), **more)

    def fresh(self, shape: Sequence[int], zero: bool = False, **more: Any) -> Value:
        """Makes a value whose axes have new atoms; axes of size one cannot be cut."""
        return self.value([self._axis(n) for n in shape], zero, **more)

    def _axis(self, size: int) -> Axis:
        return self.atoms.fresh(size) if size > 1 else self.atoms.pinned(size, "of size 1")

    def pinned(self, shape: Sequence[int], reason: str, **more: Any) -> Value:
        """Makes a value that cannot be cut."""
        return self.value([self.atoms.pinned(n, reason) for n in shape], **more)

    def pin(self, value: Value, reason: str) -> None:
        """Keeps all axes of a value from being cut."""
        for axis in value.axes:
            self.atoms.pin(axis, reason)

    def unite(self, a: Value, b: Value) -> None:
        """Makes two values of one shape leave together; sizes of one broadcast."""
        for left, right in zip(a.axes, b.axes, strict=True):
            if len(left) == len(right):
                self.atoms.unite(left, right)

    def change(self, axis: Axis, zero: np.ndarray, reason: str) -> None:
        """Notes that a result would change without those slices of an axis that are not zero."""
        if zero.all():
            return
        changed = axis[~zero]
        if self._exact:
            self.atoms.pin(changed, reason)
        elif self.atoms.free(changed).any():
            self.inexact.append((changed, reason))

    # Programs.

    def program(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Value]) -> Program:
        """Walks a program whose inputs are these values."""
        env = {v: self.fresh(v.aval.shape, full=True, const=True) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Value:
            return env[atom] if _jaxpr.is_var(atom) else self._literal(atom)

        steps = []
        for eqn in jaxpr.eqns:
            step = self._step(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, step.outs, strict=True))
            steps.append(step)
        outs = [read(atom) for atom in jaxpr.outvars]
        return Program(jaxpr, consts, list(ins), outs, steps)

    def _literal(self, atom: Any) -> Value:
        known = None
        if atom.aval.shape == () and not jnp.issubdtype(atom.aval.dtype, jax.dtypes.extended):
            known = float(np.asarray(atom.val).real)
        zero = known == 0
        return self.fresh(atom.aval.shape, zero, known=known, full=True, const=True)

    def _step(self, eqn: Any, ins: list[Value]) -> Step:
        full = all(v.full for v in ins) and eqn.primitive.name != "random_bits"
        const = full and all(v.const for v in ins)
        inner = _jaxpr.inner(eqn)
        programs: list[Program] = []
        run = None
        rule = self._rules.get(eqn.primitive.name)
        if const and not (rule and any(v.known is not None for v in ins)):
            outs = [self.fresh(v.aval.shape) for v in eqn.outvars]
        elif inner:
            outs, programs = self._inner(eqn, ins, inner)
        elif rule is not None:
            result = rule(self, eqn, *ins)
            outs, run = result if isinstance(result, tuple) else (result, None)
        else:
            reason = f"no rule for {_jaxpr.where(eqn)}"
            if not full:
                for v in ins:
                    self.pin(v, reason)
            outs = [self.pinned(getattr(v.aval, "shape", ()), reason) for v in eqn.outvars]
        if full:
            outs = [dataclasses.replace(v, full=True, const=const) for v in outs]
        return Step(eqn, ins, outs, programs, run)

    def _inner(
        self, eqn: Any, ins: list[Value], inner: list[_jaxpr.Inner]
    ) -> tuple[list[Value], list[Program]]:
        name = eqn.primitive.name
        if name in _jaxpr.TRANSPARENT:
            program = self.program(inner[0].jaxpr, inner[0].consts, ins)
            return program.outs, [program]
        cut = [dataclasses.replace(v, full=False, const=False) for v in ins]
        by_operand = {id(atom): v for atom, v in zip(eqn.invars, cut, strict=True)}
        fed = [[by_operand[id(atom)] for atom in program.operands] for program in inner]
        if name == "scan":
            first = len(fed[0]) - inner[0].stacked
            for v in fed[0][first:]:
                self.atoms.pin(v.axes[0], "the layers of a scan")
            fed[0][first:] = [Value(v.axes[1:], v.zeros[1:]) for v in fed[0][first:]]
        if name == "shard_map":
            fed = [self._shards(eqn, cut, eqn.params["in_specs"], inner[0].jaxpr.invars)]
        programs = [self._rounds(inner[-1], fed[-1])]  # of a `while` the body, which has the carry
        if name == "while":
            carry = len(inner[-1].carried)
            fed[0][len(fed[0]) - carry :] = programs[0].ins[len(fed[1]) - carry :]
        programs = [self._rounds(p, v) for p, v in zip(inner[:-1], fed, strict=False)] + programs
        outs = programs[-1].outs
        if name == "scan":
            carry = len(inner[0].carried)
            length = self.atoms.pinned(eqn.params["length"], "the layers of a scan")
            flag = self.flags(len(length), False)
            outs = outs[:carry] + [Value((length, *v.axes), (flag, *v.zeros)) for v in outs[carry:]]
        elif name == "cond":
            for other in programs[:-1]:
                outs = [self._both(a, b) for a, b in zip(outs, other.outs, strict=True)]
        elif name == "shard_map":
            outs = self._shards(eqn, outs, eqn.params["out_specs"], eqn.outvars)
        outs = [dataclasses.replace(v, full=False, const=False, known=None) for v in outs]
        if self._derivatives and name in ("custom_jvp_call", "custom_vjp_call"):
            self._derivatives = False  # a rule may call its function again
            programs += self._derive(eqn, cut, outs)
            self._derivatives = True
        return outs, programs

    def _both(self, a: Value, b: Value) -> Value:
        self.unite(a, b)
        return Value(a.axes, tuple(x & y for x, y in zip(a.zeros, b.zeros, strict=True)))

    def _rounds(self, inner: _jaxpr.Inner, ins: list[Value]) -> Program:
        """Walks a program until what it hands to its next round is what it was given."""
        before = len(self.inexact)
        while True:
            del self.inexact[before:]
            program = self.program(inner.jaxpr, inner.consts, ins)
            stable = True
            for out, i in zip(program.outs, inner.carried, strict=False):
                both = self._both(ins[i], out)
                stable &= all(map(np.array_equal, both.zeros, ins[i].zeros))
                stable &= ins[i].known is None or ins[i].known == out.known
                ins[i] = both
            if stable:
                return program

    def _shards(
        self, eqn: Any, values: list[Value], specs: Sequence[Any], sized: Sequence[Any]
    ) -> list[Value]:
        """Gives values their shapes in, or out of, a ``shard_map``; what is sharded is pinned."""
        reason = f"sharded by {_jaxpr.where(eqn)}"
        shards = []
        for v, spec, atom in zip(values, specs, sized, strict=True):
            axes = list(v.axes)
            for axis, names in enumerate(spec):
                if names is not None:
                    self.atoms.pin(axes[axis], reason)
                    axes[axis] = self.atoms.pinned(atom.aval.shape[axis], reason)
            zeros = [z[:1].repeat(len(a)) for z, a in zip(v.zeros, axes, strict=True)]
            shards.append(Value(tuple(axes), tuple(zeros)))
        return shards

    def _derive(self, eqn: Any, ins: list[Value], outs: list[Value]) -> list[Program]:
        """Walks the derivative rules of an equation: what flows back is cut as what flowed in."""
        try:
            traces = _jaxpr.rules(eqn)
        except Exception as error:  # whatever the user's rule raises on its own shapes
            lost = f"the derivative rule of {_jaxpr.where(eqn)} is lost ({error!s:.80})"
            for v in [*ins, *outs]:
                for axis in v.axes:
                    self.change(axis, self.flags(len(axis), False), lost)
            return []
        flow = [self.value(v.axes, zero=True) for v in ins]
        floating = [v for v, a in zip(flow, eqn.invars, strict=True) if _jaxpr.is_floating(a.aval)]
        results = [v for v, a in zip(outs, eqn.outvars, strict=True) if _jaxpr.is_floating(a.aval)]
        if len(traces) == 1:
            (jvp,) = traces
            program = self.program(jvp.jaxpr, jvp.consts, ins + floating)
            expected, programs = results * 2, [program]
        else:
            forward = self.program(traces[0].jaxpr, traces[0].consts, ins)
            for out, v in zip(forward.outs, outs, strict=False):
                self.unite(out, v)
            residuals = [
                dataclasses.replace(v, full=False, const=False) for v in forward.outs[len(outs) :]
            ]
            program = self.program(
                traces[1].jaxpr,
                traces[1].consts,
                residuals + [self.value(v.axes, zero=True) for v in outs],
            )
            expected, programs = floating, [forward, program]
        for out, v in zip(program.outs, expected, strict=True):
            self.unite(out, v)
        return programs


class Cut:
    """Runs programs without the atoms that left.

    Args:
      gone: for every atom whether it left.
    """

    def __init__(self, gone: np.ndarray) -> None:
        self._gone = gone
        self._kept: dict[int, tuple[Axis, np.ndarray | None]] = {}

    def kept(self, axis: Axis) -> np.ndarray | None:
        """Gives the indices of an axis that stay, or `None` if all do."""
        if id(axis) not in self._kept:
            gone = self._gone[axis]
            self._kept[id(axis)] = axis, np.flatnonzero(~gone) if gone.any() else None
        return self._kept[id(axis)][1]

    def size(self, axis: Axis, dense: Any = None) -> Any:
        """Gives the size of a cut axis; of another, the size that it has in the program at hand."""
        kept = self.kept(axis)
        return (len(axis) if dense is None else dense) if kept is None else len(kept)

    def shape(self, value: Value, variable: Any) -> tuple[Any, ...]:
        """Gives the shape of a cut value."""
        return tuple(map(self.size, value.axes, variable.aval.shape))

    def cuts(self, value: Value) -> bool:
        """Says whether a value loses anything."""
        return any(self.kept(axis) is not None for axis in value.axes)

    def take(self, x: Any, value: Value) -> Any:
        """Cuts an array that was computed whole."""
        for i, axis in enumerate(value.axes):
            kept = self.kept(axis)
            if kept is not None:
                x = take(x, kept, i)
        return x

    def touches(self, step: Step) -> bool:
        """Says whether anything in or around an equation is cut."""
        if any(map(self.cuts, step.ins)) or any(map(self.cuts, step.outs)):
            return True
        return any(self.touches(s) for program in step.programs for s in program.steps)

    def run(self, program: Program, *args: Any, whole: bool = False) -> list[Any]:
        """Runs a program on arguments that are cut, save those of full values.

        Results are cut as well, or with ``whole`` those of full values are left whole.
        """
        env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        env.update(zip(program.jaxpr.invars, args, strict=True))
        small: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return env[atom] if _jaxpr.is_var(atom) else atom.val

        def cut(atom: Any, value: Value) -> Any:
            if not value.full or not self.cuts(value):
                return read(atom)
            if atom not in small:
                small[atom] = self.take(read(atom), value)
            return small[atom]

        for step in program.steps:
            eqn = step.eqn
            given = [read(atom) for atom in eqn.invars]
            if (step.outs and all(v.full for v in step.outs)) or not self.touches(step):
                outs = _jaxpr.bind(eqn, *given)
            elif eqn.primitive.name in _jaxpr.TRANSPARENT:
                outs = self.run(step.programs[0], *given, whole=True)
            else:
                operands = [cut(atom, v) for atom, v in zip(eqn.invars, step.ins, strict=True)]
                if step.programs:
                    bodies = [self._body(p) for p in step.programs]
                    outs = _jaxpr.rebuild(eqn, bodies, operands)
                elif step.run is not None:
                    outs = step.run(self, eqn, *operands)
                else:
                    outs = _jaxpr.bind(eqn, *operands)
            for x, v, variable in zip(outs, step.outs, eqn.outvars, strict=True):
                if not v.full and x.shape != self.shape(v, variable):
                    raise AssertionError(
                        f"{_jaxpr.where(eqn)} gave shape {x.shape} where the structure says "
                        f"{self.shape(v, variable)}. This is a bug in jaxprune; please report it."
                    )
            env.update(zip(eqn.outvars, outs, strict=True))
        if whole:
            return [read(atom) for atom in program.jaxpr.outvars]
        return [cut(atom, v) for atom, v in zip(program.jaxpr.outvars, program.outs, strict=True)]

    def _body(self, program: Program) -> Callable[..., list[Any]]:
        return lambda *args: self.run(program, *args)


def take(x: Any, kept: np.ndarray, axis: int) -> Any:
    """Takes sorted indices along an axis, as a slice where they are evenly spaced."""
    steps = np.diff(kept)
    if len(kept) == 1 or (steps == steps[0]).all():
        stride = int(steps[0]) if len(kept) > 1 else 1
        return jax.lax.slice_in_dim(x, int(kept[0]), int(kept[-1]) + 1, stride, axis)
    return jnp.take(x, kept, axis, unique_indices=True, indices_are_sorted=True, mode="clip")
