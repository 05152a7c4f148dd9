"""The walk of a traced program, which finds the slices that must be removed together.

:class:`Walk` gives every axis of every value its atoms, equation by equation, with the ``rules`` of
the primitives. What it returns, a :class:`Program`, is the jaxpr with these values.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Atoms, Axis, Merge
from jaxprune._program.values import (
    DIFFERENT,
    SAME,
    ZERO,
    Kinds,
    Program,
    Rule,
    Ruling,
    Step,
    Value,
    either,
    joined,
)


class Walk:
    """The walk of a program, and what it finds."""

    def __init__(self, rules: Mapping[str, Rule], exact: bool, derivatives: bool) -> None:
        self.atoms = Atoms()
        self.merges: list[Merge] = []  # for `Atoms.solve`
        self.inexact: list[tuple[Axis, str]] = []  # atoms whose removal changes a result, and why
        self.redraws: list[tuple[Axis, str]] = []  # random numbers, drawn anew if some are removed
        self.at_zero: dict[Any, float] = {}  # results of elementwise primitives on known numbers
        self._rules = rules
        self._exact = exact
        self._derivatives = derivatives
        self._since: dict[str, int] = {}  # why slices differ, with the kind that stands for it

    def value(self, axes: Sequence[Axis], kind: int, **more: Any) -> Value:
        """Makes a value whose slices are all of one kind once masked."""
        return Value(tuple(axes), (kind,) * len(axes), **more)

    def fresh(self, shape: Sequence[int], kind: int = DIFFERENT, **more: Any) -> Value:
        """Makes a value whose axes have new atoms; axes of size one cannot be cut."""
        atoms = self.atoms
        axes = [atoms.fresh(n) if n > 1 else atoms.pinned(n, "of size 1") for n in shape]
        return self.value(axes, kind, **more)

    def pinned(self, shape: Sequence[int], reason: str, **more: Any) -> Value:
        """Makes a value that cannot be cut, so that whatever is said of masked slices is true."""
        return self.value([self.atoms.pinned(n, reason) for n in shape], ZERO, **more)

    def pin(self, value: Value, reason: str, axes: Iterable[int] | None = None) -> None:
        """Keeps all axes of a value, or some, from being cut."""
        for i in range(len(value.axes)) if axes is None else axes:
            self.atoms.pin(value.axes[i], reason)

    def unite(self, a: Value, b: Value) -> None:
        """Unites the axes of two values of one shape; sizes of one broadcast."""
        for left, right in zip(a.axes, b.axes, strict=True):
            if len(left) == len(right):
                self.atoms.unite(left, right)

    def join(self, parts: Sequence[Value], along: int | None = None) -> Value:
        """Unites all axes of values but one, along which they follow each other."""
        pairs = []
        for i, axes in enumerate(zip(*(v.axes for v in parts), strict=True)):
            kinds = [v.kinds[i] for v in parts]
            if i == along:
                pairs.append((np.concatenate(axes), joined(kinds, [len(axis) for axis in axes])))
                continue
            for other in axes[1:]:
                self.atoms.unite(axes[0], other)
            pairs.append((axes[0], either(*kinds)))
        return Value.of(pairs)

    def change(self, axis: Axis, reason: str) -> None:
        """Records that a result changes without slices of an axis."""
        if self._exact and len(axis):
            self.atoms.pin(axis, reason)
        elif self.atoms.free(axis).any():
            self.inexact.append((axis, reason))

    def read(self, axis: Axis, kinds: Kinds) -> None:
        """Reads across an axis: slices that are the same have a ghost, different ones have none."""
        if isinstance(kinds, int) and kinds >= 0:
            return
        every = np.broadcast_to(np.asarray(kinds), len(axis))
        since = {number: reason for reason, number in self._since.items()}
        for number in np.unique(every[every < 0]).tolist():
            reason = since.get(number, "different for every index")
            self.change(axis[every == number], reason)

    def _named(self, value: Value, eqn: Any) -> Value:
        """Says of slices that begin to differ, by which equation."""
        if all(isinstance(k, int) and k != DIFFERENT for k in value.kinds):
            return value
        reason = f"different for every index since {_jaxpr.where(eqn)}"
        number = self._since.setdefault(reason, DIFFERENT - 1 - len(self._since))

        def kinds(k: Kinds) -> Kinds:
            named = np.where(k == DIFFERENT, number, k)
            return int(named) if isinstance(k, int) else named

        return dataclasses.replace(value, kinds=tuple(map(kinds, value.kinds)))

    def program(self, closed: Any, ins: Sequence[Value]) -> Program:
        """Walks a program whose inputs are these values."""
        jaxpr = closed.jaxpr
        pairs = zip(jaxpr.constvars, closed.consts, strict=True)
        constant = {"full": True, "const": True}
        env = {v: self.fresh(v.aval.shape, source=(None, x, 0), **constant) for v, x in pairs}
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Value:
            return env[atom] if _jaxpr.is_var(atom) else self._literal(atom)

        steps = []
        for eqn in jaxpr.eqns:
            step = self._step(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, step.outs, strict=True))
            steps.append(step)
        outs = [read(atom) for atom in jaxpr.outvars]
        return Program(jaxpr, closed.consts, list(ins), outs, steps)

    def _literal(self, atom: Any) -> Value:
        is_number = not atom.aval.shape and not jnp.issubdtype(atom.aval.dtype, jax.dtypes.extended)
        known = float(np.asarray(atom.val).real) if is_number else None
        shape, source = atom.aval.shape, (None, atom.val, 0)
        return self.fresh(shape, known=known, full=True, const=True, source=source)

    def _step(self, eqn: Any, ins: list[Value]) -> Step:
        full = all(v.full for v in ins) and eqn.primitive.name != "random_bits"
        const = full and all(v.const for v in ins)
        programs: list[Program] = []
        rule = self._rules.get(eqn.primitive.name)
        if const and not (rule and any(v.known is not None for v in ins)):
            ruling = Ruling([self.fresh(v.aval.shape) for v in eqn.outvars])
            if eqn.primitive.name == "broadcast_in_dim":  # it is the same along new axes
                before = set(eqn.params["broadcast_dimensions"])
                (out,) = ruling.outs
                kinds = [DIFFERENT if i in before else SAME for i in range(len(out.axes))]
                ruling = Ruling([Value(out.axes, tuple(kinds))])
        elif _jaxpr.inner(eqn):
            outs, programs = self._inner(eqn, ins)
            ruling = Ruling(outs)
        elif rule is not None:
            ruling = _ruled(rule(self, eqn, *ins))
        else:
            reason = f"no rule for {_jaxpr.where(eqn)}"
            if not full:
                for v in ins:
                    self.pin(v, reason)
            shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
            ruling = Ruling([self.pinned(shape, reason) for shape in shapes])
        if full:
            outs = [
                Value(v.axes, v.kinds, v.known, full, const, (eqn, ins, n) if const else None)
                for n, v in enumerate(ruling.outs)
            ]
        else:
            outs = [v if v.full else self._named(v, eqn) for v in ruling.outs]
        return Step(eqn, ins, ruling._replace(outs=outs), programs)

    def _inner(self, eqn: Any, ins: list[Value]) -> tuple[list[Value], list[Program]]:
        """Walks the programs in an equation, each fed with its inputs as they are inside.

        ::

            scan        a stack (layers, a, b) is (a, b) inside, and is stacked again on the way out
            while       both programs see the carry as the body leaves it
            cond        all branches see the same, and their results are united
            shard_map   an axis is smaller inside if it is sharded
        """
        name, inner = eqn.primitive.name, _jaxpr.inner(eqn)
        if name in _jaxpr.TRANSPARENT:
            program = self.program(inner[0], ins)
            return program.outs, [program]
        constants = [v.const for v in ins]
        # The cut program is called with cut operands, so that inside nothing is full any more.
        ins = [Value.of(v.pairs, v.known) for v in ins]
        fed = [[ins[i] for i in body.operands] for body in inner]
        if name == "scan":
            first = len(fed[0]) - inner[0].stacked
            for v in fed[0][first:]:
                self.pin(v, "the layers of a scan", [0])
            fed[0][first:] = [v.without([0]) for v in fed[0][first:]]
        elif name == "shard_map":
            fed = [self._shards(eqn, ins, eqn.params["in_specs"], inner[0].jaxpr.invars)]
        # The last program goes first: it is the body of a `while`, whose rounds decide what is
        # carried, and so what the condition is fed with.
        last = self._rounds(inner[-1], fed[-1])
        if name == "while":
            carry = len(inner[-1].carried)
            fed[0][len(fed[0]) - carry :] = last.ins[len(last.ins) - carry :]
        programs = [*map(self._rounds, inner[:-1], fed[:-1]), last]
        outs = last.outs
        if name == "scan":
            carry = len(inner[0].carried)
            length = self.pinned([eqn.params["length"]], "the layers of a scan").pairs
            outs = outs[:carry] + [Value.of(length + v.pairs) for v in outs[carry:]]
        elif name == "cond":
            branches = [last, *programs[:-1]]
            outs = [self.join(values) for values in zip(*(p.outs for p in branches), strict=True)]
        elif name == "shard_map":
            outs = self._shards(eqn, outs, eqn.params["out_specs"], eqn.outvars)
        outs = [Value.of(v.pairs) for v in outs]
        if self._derivatives and name in ("custom_jvp_call", "custom_vjp_call"):
            self._derivatives = False  # a rule may call its function again
            programs += self._derive(eqn, ins, outs, constants)
            self._derivatives = True
        return outs, programs

    def _rounds(self, inner: _jaxpr.Inner, ins: list[Value]) -> Program:
        """Walks a program until what it hands to its next round is what it was given.

        A carry may start as zeros, or as a known number, and be neither after one round.
        """
        noted = len(self.inexact)
        while True:
            del self.inexact[noted:]
            program = self.program(inner, ins)
            stable = True
            for i, out in zip(inner.carried, program.outs, strict=False):
                carried = self.join([ins[i], out])
                stable &= all(map(np.array_equal, carried.kinds, ins[i].kinds))
                stable &= ins[i].known is None or ins[i].known == out.known
                ins[i] = carried
            if stable:
                return program

    def _shards(
        self, eqn: Any, values: list[Value], specs: Sequence[Any], sized: Sequence[Any]
    ) -> list[Value]:
        """Resizes values on the way in, or out of, a ``shard_map``, and pins their sharded axes."""
        reason = f"sharded by {_jaxpr.where(eqn)}"
        shards = []
        for v, spec, atom in zip(values, specs, sized, strict=True):
            pairs = v.pairs
            for i, names in enumerate(spec):
                if names is not None:
                    self.pin(v, reason, [i])
                    pairs[i] = self.pinned(atom.aval.shape[i : i + 1], reason).pairs[0]
            shards.append(Value.of(pairs))
        return shards

    def _derive(
        self, eqn: Any, ins: list[Value], outs: list[Value], constants: list[bool]
    ) -> list[Program]:
        """Walks the derivative rules of an equation: gradients are cut like their values.

        ::

            custom_jvp   (*ins, *tangents of ins)     -> (*outs, *tangents of outs)
            custom_vjp   ins                          -> (*outs, *residuals)
                         (*residuals, *cotangents)    -> cotangents of ins

        A tangent or cotangent has the axes of its value, and its kinds: where a value is always
        zero, so is its derivative. So has what a rule returns, which unites the two.
        """
        try:
            traces = _jaxpr.rules(eqn, constants)
        except Exception as error:  # whatever the user's rule raises on its own shapes
            lost = f"the derivative rule of {_jaxpr.where(eqn)} is lost ({error!s:.80})"
            for v in [*ins, *outs]:
                for axis in v.axes:
                    self.change(axis, lost)
            return []

        def tangents(values: list[Value], atoms: Sequence[Any]) -> list[Value]:
            pairs = zip(values, atoms, strict=True)
            return [Value.of(v.pairs) for v, a in pairs if _jaxpr.is_inexact(a.aval)]

        floating = tangents(ins, eqn.invars)
        if len(traces) == 1:
            programs = [self.program(traces[0], ins + floating)]
            expected = tangents(outs, eqn.outvars) * 2
        else:
            forward = self.program(traces[0], ins)
            for out, v in zip(forward.outs, outs, strict=False):
                self.unite(out, v)
            residuals = [Value.of(v.pairs, v.known) for v in forward.outs[len(outs) :]]
            cotangents = [Value.of(v.pairs) for v in outs]
            programs = [forward, self.program(traces[1], residuals + cotangents)]
            expected = floating
        for out, v in zip(programs[-1].outs, expected, strict=True):
            self.unite(out, v)
        return programs


def _ruled(found: list[Value] | Ruling) -> Ruling:
    return found if isinstance(found, Ruling) else Ruling(found)
