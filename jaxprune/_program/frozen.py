"""Compiles what a function computes now: closures are read in every call, compiled only once.

A module-level `jit` with a loss as static argument would keep what the loss closes over as it was
in the first call, and alive; a new `jit` in every call would compile in every call. So a function
is traced in every call, as by ``jax.grad``. Arrays that it closes over become arguments, and the
equations that are left are the static argument of one `jit`, compared by their structure::

    fn, args ──trace──▶ jaxpr ──┬─▶ arrays ─────────────────────────┐
                                └─▶ Frozen (equations, key) ─▶ _run ◀┴── leaves of args

Python numbers that it closes over, callbacks, and the arrays of a `jit` inside a loop or a branch
are part of the equations: other ones compile anew, and JAX keeps them until its cache is full.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune import _mesh, _tree
from jaxprune._program import jaxpr as _jaxpr


def freeze(fn: Callable[..., Any], *args: Any, donate: bool = False) -> Callable[..., Any]:
    """Returns the compiled program of a function for arguments of these shapes.

    With ``donate``, the arrays of the first argument are donated. Inside a transformation, whose
    own program reads the closures, the function itself is returned.
    """
    if _tree.is_traced(args):
        return fn
    frozen, consts, tree = _traced(fn, args)
    if _tree.is_traced(consts):
        return fn

    def run(*args: Any) -> Any:
        arrays = jax.tree.leaves(args)
        first, *rest = ([_placed(x, arrays) for x in jax.tree.leaves(arg)] for arg in args)
        leaves = (first, [], rest) if donate else ([], first, rest)
        return tree.unflatten(_run(frozen, [_placed(x, arrays) for x in consts], *leaves))

    return run


def inlined(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose calls are inlined, for use in a loop of a function to freeze."""

    def run(*args: Any) -> Any:
        frozen, consts, tree = _traced(fn, args)
        return tree.unflatten(frozen.evaluate(consts, jax.tree.leaves(args)))

    return run


def _traced(fn: Callable[..., Any], args: Any) -> tuple["Frozen", list[Any], Any]:
    """Returns the equations, the arrays that they read, and the structure of the result."""
    tree: list[Any] = []

    def flat(*args: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(fn(*args))
        tree[:] = [structure]
        return leaves

    frozen = Frozen(_jaxpr.trace(flat, *args))
    consts, frozen.consts = frozen.consts, []
    return frozen, consts, tree[0]


def _placed(x: Any, arrays: list[Any]) -> Any:
    """Moves an array of the host to the others, which `jit` would do where no guard forbids it."""
    return x if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else _mesh.beside(x, arrays)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _run(frozen: "Frozen", consts: Any, donated: Any, first: Any, rest: Any) -> list[Any]:
    return frozen.evaluate(consts, jax.tree.leaves((donated, first, rest)))


class Frozen:
    """Equations with calls inlined, without arrays; equal to others of the same structure."""

    def __init__(self, program: Any) -> None:
        jaxpr, consts = _jaxpr._open(program)
        self.steps: list[tuple[Any, list[Any]]] = []  # equation and operands; `None` adds a const
        self.consts: list[Any] = []
        self._count = len(jaxpr.invars)  # of the values so far
        self.outs = self._inline(jaxpr, consts, range(self._count))
        steps = [
            (eqn and (eqn.primitive, eqn.ctx, _same(eqn.params)), *map(_same, ins))
            for (eqn, ins), used in zip(self.steps, self._used(len(jaxpr.invars)), strict=True)
            if used
        ]
        self.key = tuple(steps), tuple(map(_same, self.outs))
        self._hash = hash(self.key)

    def _used(self, first: int) -> list[bool]:
        """Returns which steps count: not those that only a check of `checkify` reads."""
        needed = {x for x in self.outs if isinstance(x, int)}
        ends = itertools.accumulate(
            (len(e.outvars) if e else 1 for e, _ in self.steps), initial=first
        )
        used = []
        for (eqn, ins), (start, end) in reversed(
            list(zip(self.steps, itertools.pairwise(ends), strict=True))
        ):
            used.append(
                eqn is None or bool(eqn.effects) or not needed.isdisjoint(range(start, end))
            )
            needed |= {x for x in ins if used[-1] and isinstance(x, int)}
        return used[::-1]

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or isinstance(other, Frozen) and self.key == other.key

    def _add(self, eqn: Any, ins: list[Any], count: int) -> range:
        """Adds an equation; returns the numbers of its results."""
        self.steps.append((eqn, ins))
        self._count += count
        return range(self._count - count, self._count)

    def _const(self, array: Any) -> int:
        self.consts.append(array)
        return self._add(None, [], 1)[0]

    def _inline(self, jaxpr: Any, consts: Any, ins: Any) -> list[Any]:
        """Adds the equations of a program; returns the numbers of its results, or literals."""
        env = dict(zip(jaxpr.invars, ins, strict=True))
        env |= {v: self._const(x) for v, x in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> Any:
            if _jaxpr.is_var(atom):
                return env[atom]
            return self._const(atom.val) if np.ndim(atom.val) else atom

        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "check" and eqn.params["debug"]:
                continue  # of `checkify`; it has no effect here, and names its own line
            operands = [read(atom) for atom in eqn.invars]
            if _is_call(eqn):
                inner = _jaxpr.inner(eqn)[0]
                results: Any = self._inline(inner.jaxpr, inner.consts, operands)
            else:
                results = self._add(eqn, operands, len(eqn.outvars))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def evaluate(self, consts: Any, values: list[Any]) -> list[Any]:
        """Runs the equations on the arrays that they were traced for, or on others like them."""
        arrays = iter(consts)
        read = lambda x: values[x] if isinstance(x, int) else x.val  # noqa: E731
        for eqn, ins in self.steps:
            if eqn is None:
                values.append(next(arrays))
            else:
                with eqn.ctx.manager:
                    values += _jaxpr.bind(eqn, *map(read, ins))
        return list(map(read, self.outs))


def _is_call(eqn: Any) -> bool:
    """Returns whether an equation only calls a program; derivatives are traced before, if any."""
    if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
        return True
    shardings = *eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ())
    constrained = any(isinstance(x, jax.sharding.Sharding) for x in shardings)
    return eqn.primitive.name in _jaxpr.TRANSPARENT and not constrained


class _Itself:
    """Stands for an object that is equal to no other, and keeps its address from being reused."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.x is other.x


def _same(x: Any) -> Any:
    """Returns a hashable value, which is equal for two parameters only if they do the same."""
    if hasattr(x, "eqns"):
        inner = Frozen(x)
        return inner.key, tuple(map(_same, inner.consts))
    if hasattr(x, "val"):  # a literal
        return x.aval, _same(x.val)
    if isinstance(x, tuple | list):
        return type(x), *map(_same, x)
    if isinstance(x, dict):
        return dict, *((name, _same(value)) for name, value in x.items())
    if isinstance(x, jax.Array):
        return _Itself(x)
    if isinstance(x, float | complex) or hasattr(x, "__array__"):  # NaN is equal, -0.0 is not 0.0
        array = np.asarray(x)
        return type(x), array.dtype, array.shape, array.tobytes()
    try:
        hash(x)
    except TypeError:
        return _Itself(x)
    return type(x), x
