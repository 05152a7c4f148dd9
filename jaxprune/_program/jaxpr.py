"""The one file that touches JAX's internals: jaxprs, and how to run their equations again.

JAX releases differ in how an equation holds inner programs. :func:`inner` returns one normal form;
:func:`bind` and :func:`rebuild` run an equation again, on other shapes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

Body = Callable[..., list[Any]]  # a program as a function of arrays

# Equations that only call a program, and those that also change how it runs or is differentiated.
TRANSPARENT = "jit pjit closed_call core_call composite".split()
_WRAPPING = "remat2 checkpoint remat custom_jvp_call custom_vjp_call shard_map".split()


@dataclasses.dataclass(frozen=True)
class Inner:
    """A program inside an equation."""

    jaxpr: Any
    consts: Sequence[Any]  # the values of its constants
    operands: Sequence[int]  # for each of its inputs, which operand of the equation feeds it
    times: int = 1  # how often it runs; a `while` loop once, because its trip count is unknown
    carried: range = range(0)  # the inputs that the first outputs are in the next round
    stacked: int = 0  # how many inputs, the last ones, are slices of their operands, one a round
    call: bool = False  # whether its outputs are those of the equation


def trace(fn: Callable[..., Any], *args: Any) -> Any:
    """Traces a function, on arrays or their shapes, to its ``jaxpr`` and ``consts``.

    The lambda is new every time, so that JAX's cache of traces does not keep ``fn`` alive.
    """
    return jax.make_jaxpr(lambda *args: fn(*args))(*args)


def order_of_use(jaxpr: Any) -> list[int]:
    """Lists the inputs that a program uses, in the order of their first use."""
    order: dict[int | None, None] = {}

    def visit(jaxpr: Any, numbers: Sequence[int | None]) -> None:
        names = dict(zip(jaxpr.invars, numbers, strict=True))
        for eqn in jaxpr.eqns:
            used = [names.get(atom) if is_var(atom) else None for atom in eqn.invars]
            programs = inner(eqn)
            for program in programs:
                visit(program.jaxpr, [used[i] for i in program.operands])
            order.update(dict.fromkeys([] if programs else used))
        order.update((names.get(atom), None) for atom in jaxpr.outvars if is_var(atom))

    visit(jaxpr, range(len(jaxpr.invars)))
    return [number for number in order if number is not None]


def is_var(atom: Any) -> bool:
    """Returns whether an operand is a variable, not a literal."""
    return not hasattr(atom, "val")


def where(eqn: Any) -> str:
    """Names an equation for a report: its primitive, and its module if known."""
    stack = str(eqn.source_info.name_stack)
    return f"`{eqn.primitive.name}`" + (f" in {stack}" if stack else "")


def line(eqn: Any) -> str:
    """Names the line of the user's code that an equation comes from; empty if it is unknown."""
    from jax._src import source_info_util

    return str(source_info_util.summarize(eqn.source_info))


def inner(eqn: Any) -> list[Inner]:
    """Lists the programs inside an equation; none for an ordinary primitive."""
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.invars)
    if name == "scan":
        jaxpr, consts = _open(params["jaxpr"])
        pairs = zip(eqn.invars, jaxpr.invars, strict=True)
        stacked = sum(a.aval.shape != b.aval.shape for a, b in pairs)
        pairs = zip(eqn.outvars, jaxpr.outvars, strict=True)
        carry = sum(a.aval.shape == b.aval.shape for a, b in pairs)
        carried = range(count - stacked - carry, count - stacked)
        return [Inner(jaxpr, consts, range(count), params["length"], carried, stacked)]
    if name == "while":
        test, body = params["cond_nconsts"], params["body_nconsts"]
        tested = [*range(test), *range(test + body, count)]
        carried = range(body, count - test)
        return [
            Inner(*_open(params["cond_jaxpr"]), tested),
            Inner(*_open(params["body_jaxpr"]), range(test, count), carried=carried),
        ]
    if name == "cond":
        return [Inner(*_open(branch), range(1, count)) for branch in params["branches"]]
    if name in TRANSPARENT or name in _WRAPPING:
        program = params["call_jaxpr" if "call_jaxpr" in params else "jaxpr"]
        return [Inner(*_open(program), range(count), call=True)]
    return []


def _open(program: Any) -> tuple[Any, Sequence[Any]]:
    return getattr(program, "jaxpr", program), program.consts if hasattr(program, "consts") else ()


def bind(eqn: Any, *args: Any, **changes: Any) -> list[Any]:
    """Runs one equation on other operands, with some of its parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    outputs = eqn.primitive.bind(*args, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def zeros(aval: Any, shape: Sequence[Any]) -> Any:
    """Makes zeros of the type of a value but for the sizes of some axes, which are not sharded."""
    spec = [
        p if n == m else None for p, n, m in zip(aval.sharding.spec, shape, aval.shape, strict=True)
    ]
    sharding = jax.NamedSharding(aval.sharding.mesh, jax.P(*spec)) if any(spec) else None
    x = jax.numpy.zeros(shape, aval.dtype, out_sharding=sharding)
    varying = tuple(aval.mat.varying)
    return jax.lax.pcast(x, varying, to="varying") if varying else x


def constant(eqn: Any, operands: Iterable[Any], result: int) -> Any:
    """Computes a result of an equation on constants, while a program is traced or walked."""
    with jax.ensure_compile_time_eval():
        return bind(eqn, *operands)[result]


# Derivative rules. An equation holds those of a `custom_jvp` or `custom_vjp` as opaque functions,
# which JAX calls when it differentiates. To cut them too, `rules` traces them to programs on the
# dense shapes, and `rebuild` makes a new custom function of the cut programs. The many ways to say
# "no derivative" (symbolic zeros, `float0` for integers, `None`) become arrays of zeros on the way,
# and only inexact values have derivatives, in the order of the operands.


def rules(eqn: Any, constants: Sequence[bool]) -> list[Any]:
    """Traces the derivative rules of an equation to programs, on the shapes that it has.

    Of the operands that are constants, a rule may assume that no derivative is taken.

    For a `custom_jvp` one program, ``(*primals, *tangents) -> (*outputs, *tangents)``; for a
    `custom_vjp` two, ``primals -> (*outputs, *residuals)`` and ``(*residuals, *cotangents) ->
    cotangents of primals``. Where a rule returns no derivative, they return zeros.
    """
    name = eqn.primitive.name
    if name not in ("custom_jvp_call", "custom_vjp_call"):
        return []
    params = eqn.primitive.get_bind_params(eqn.params)
    primals = [_shape(atom.aval) for atom in eqn.invars]
    outputs = [_shape(v.aval) for v in eqn.outvars]
    if name == "custom_jvp_call":
        _, rule = params["subfuns"]

        def jvp(*args: Any) -> list[Any]:
            given = iter(args[len(primals) :])
            tangents = [next(given) if is_inexact(a) else _no_tangent(a) for a in primals]
            results = rule.call_wrapped(*args[: len(primals)], *tangents)
            pairs = zip(results, outputs * 2, strict=True)
            return [_instantiate(x, a) for x, a in pairs if is_inexact(a)]

        return [trace(jvp, *primals, *filter(is_inexact, primals))]
    _, forward, backward = params["subfuns"]
    static: list[Any] = []  # of every residual that depends on no argument, a list of its value

    def fwd(*args: Any) -> list[Any]:
        # JAX asks for each primal whether it is perturbed, and stores no residual that is a primal
        # itself: `forwarded` has its index there, and `None` for the residuals that it returns.
        pairs = zip(args, constants, strict=True)
        given = [x for arg, const in pairs for x in (arg, is_inexact(arg) and not const)]
        results = forward.call_wrapped(*given)
        forwarded = params["out_trees"]()[2]
        stored = iter(results[: len(results) - len(outputs)])
        residuals = [next(stored) if i is None else args[i] for i in forwarded]
        # Some rules branch on the others, which are numbers of Python: those of Equinox do.
        static[:] = [[] if isinstance(x, jax.core.Tracer) else [x] for x in residuals]
        traced = [x for x, value in zip(residuals, static, strict=True) if not value]
        return [*results[len(results) - len(outputs) :], *traced]

    def bwd(*args: Any) -> list[Any]:
        given = iter(args)
        residuals = [value[0] if value else next(given) for value in static]
        results = backward.call_wrapped(*residuals, *given)
        results = results[0] if isinstance(results[0], list) else results  # with logs since 0.12
        return [_instantiate(x, a) for x, a in zip(results, primals, strict=True) if is_inexact(a)]

    first = trace(fwd, *primals)
    residuals = [_shape(v.aval) for v in first.jaxpr.outvars[len(outputs) :]]
    return [first, trace(bwd, *residuals, *outputs)]


def rebuild(eqn: Any, bodies: Sequence[Body], args: Sequence[Any]) -> list[Any]:
    """Runs an equation with other programs in place of ``inner(eqn)``, then of ``rules(eqn)``.

    Every operand and result is a tree of arrays, all of its dtype; those of a scan are stacked.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        carried = inner(eqn)[0].carried
        consts, carry = list(args[: carried.start]), list(args[carried.start : carried.stop])

        def step(carry: Any, x: Any) -> Any:
            out = bodies[0](*consts, *carry, *x)
            return out[: len(carry)], out[len(carry) :]

        keywords = {key: params[key] for key in ("length", "reverse", "unroll")}
        carry, stacks = jax.lax.scan(step, carry, list(args[carried.stop :]), **keywords)
        return [*carry, *stacks]
    if name == "while":
        test, body = params["cond_nconsts"], params["body_nconsts"]
        tested, fixed, carry = args[:test], args[test : test + body], list(args[test + body :])
        return jax.lax.while_loop(
            lambda c: jax.tree.leaves(bodies[0](*tested, *c))[0],
            lambda c: bodies[1](*fixed, *c),
            carry,
        )
    if name == "cond":
        return jax.lax.switch(jax.tree.leaves(args[0])[0], bodies, *args[1:])
    if name in ("remat2", "checkpoint", "remat"):
        keywords = {key: params[key] for key in ("prevent_cse", "policy")}
        return jax.checkpoint(bodies[0], **keywords)(*args)
    if name == "shard_map":
        keywords = {key: params[key] for key in ("mesh", "check_vma")}
        keywords |= {"in_specs": tuple(params["in_specs"]), "out_specs": list(params["out_specs"])}
        return jax.shard_map(bodies[0], **keywords)(*args)
    if name == "custom_jvp_call" and len(bodies) == 2:
        return _custom_jvp(*bodies)(*args)
    if name == "custom_vjp_call" and len(bodies) == 3:
        return _custom_vjp(*bodies)(*args)
    return bodies[0](*args)


def accumulate(eqn: Any, bodies: Sequence[Any], args: Sequence[Any], zero: Any) -> Any:
    """Runs a loop or a branch with other programs, and sums a second result over all their runs.

    The programs return ``(outputs, part)``, and this ``(outputs, zero + the sum of all parts)``.
    The test of a `while` loop adds nothing.
    """
    name, params, add = eqn.primitive.name, eqn.params, jax.numpy.add
    if name == "scan":
        carried = inner(eqn)[0].carried
        consts, carry = list(args[: carried.start]), list(args[carried.start : carried.stop])

        def step(state: Any, x: Any) -> Any:
            out, part = bodies[0](*consts, *state[0], *x)
            return (out[: len(carry)], jax.tree.map(add, state[1], part)), out[len(carry) :]

        (carry, total), stacks = jax.lax.scan(
            step, (carry, zero), list(args[carried.stop :]), params["length"], params["reverse"]
        )
        return [*carry, *stacks], total
    if name == "while":
        test, body = params["cond_nconsts"], params["body_nconsts"]
        tested, fixed, carry = args[:test], args[test : test + body], list(args[test + body :])

        def turn(state: Any) -> Any:
            out, part = bodies[1](*fixed, *state[0])
            return out, jax.tree.map(add, state[1], part)

        return jax.lax.while_loop(lambda s: bodies[0](*tested, *s[0])[0][0], turn, (carry, zero))
    outputs, part = jax.lax.switch(args[0], bodies, *args[1:])
    return outputs, jax.tree.map(add, zero, part)


def _custom_jvp(body: Body, rule: Body) -> Any:
    fn = jax.custom_jvp(lambda *args: body(*args))

    def jvp(primals: Any, tangents: Any) -> Any:
        given = [t for x, t in zip(primals, tangents, strict=True) if _has_derivative(x)]
        # The outputs are those of `fn` itself, so that a second derivative finds its rule again.
        outputs = fn(*primals)
        derived = iter(rule(*primals, *given)[sum(map(_has_derivative, outputs)) :])
        zeros = functools.partial(jax.tree.map, _float0)
        return outputs, [next(derived) if _has_derivative(x) else zeros(x) for x in outputs]

    fn.defjvp(jvp)
    return fn


def _custom_vjp(body: Body, forward: Body, backward: Body) -> Any:
    fn = jax.custom_vjp(lambda *args: body(*args))
    inexact: list[bool] = []  # of every primal; `bwd` sees only what the residuals hold

    def fwd(*args: Any) -> Any:
        inexact[:] = map(_has_derivative, args)
        results = forward(*args)
        count = len(jax.eval_shape(body, *args))
        return results[:count], results[count:]

    def bwd(residuals: Any, cotangents: Any) -> Any:
        gradients = iter(backward(*residuals, *cotangents))
        return tuple(next(gradients) if has_gradient else None for has_gradient in inexact)

    fn.defvjp(fwd, bwd)
    return fn


def _has_derivative(tree: Any) -> bool:
    return is_inexact(jax.tree.leaves(tree)[0])


def _shape(aval: Any) -> Any:
    sharding = None if aval.sharding.mesh.empty else aval.sharding
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


def is_inexact(x: Any) -> bool:
    """Returns whether derivatives flow through an array, or a value of its type."""
    return jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)


def _float0(x: Any) -> Any:
    return jax.numpy.zeros(x.shape, jax.dtypes.float0)


def _no_tangent(aval: Any) -> Any:
    return SymbolicZero(jax.core.ShapedArray(aval.shape, jax.dtypes.float0))


def _instantiate(x: Any, aval: Any) -> Any:
    """Makes an array of what a derivative rule returned, which may be a symbolic zero."""
    is_array = isinstance(x, (jax.Array, jax.core.Tracer)) or hasattr(x, "__array__")
    return x if is_array else jax.numpy.zeros(aval.shape, aval.dtype)
