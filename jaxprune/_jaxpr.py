"""The traced program: the one file that touches JAX's internals.

JAX releases differ in how an equation holds inner programs; :func:`inner` gives one normal form.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Inner:
    """A program inside an equation.

    Attributes:
      jaxpr: the inner program.
      operands: for each of its inputs the operand of the equation that feeds it.
      times: how often it runs; a `while` loop counts once, since nobody knows.
      stacked: how many inputs, the last ones, are one slice of their operand at a time.
      call: whether its outputs are those of the equation.
    """

    jaxpr: Any
    operands: Sequence[Any]
    times: int = 1
    stacked: int = 0
    call: bool = False


def trace(fn: Callable[..., Any], *args: Any) -> Any:
    """Traces a function, on arrays or their shapes, to its program."""
    return jax.make_jaxpr(fn)(*args).jaxpr


def is_var(atom: Any) -> bool:
    """Says whether an operand is a variable, not a literal."""
    return not hasattr(atom, "val")


def inner(eqn: Any) -> list[Inner]:
    """Lists the programs inside an equation; none for an ordinary primitive."""
    name, params, operands = eqn.primitive.name, eqn.params, list(eqn.invars)
    if name == "scan":
        jaxpr = _open(params["jaxpr"])
        pairs = zip(operands, jaxpr.invars, strict=True)
        stacked = sum(a.aval.shape != b.aval.shape for a, b in pairs)
        return [Inner(jaxpr, operands, params["length"], stacked)]
    if name == "while":
        test, body = params["cond_nconsts"], params["body_nconsts"]
        carry = operands[test + body :]
        return [
            Inner(_open(params["cond_jaxpr"]), operands[:test] + carry),
            Inner(_open(params["body_jaxpr"]), operands[test : test + body] + carry),
        ]
    if name == "cond":
        return [Inner(_open(branch), operands[1:]) for branch in params["branches"]]
    for key in ("call_jaxpr", "jaxpr", "fun_jaxpr"):
        if key in params:
            jaxpr = _open(params[key])
            return [Inner(jaxpr, operands[len(operands) - len(jaxpr.invars) :], call=True)]
    return []


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)  # closed until 0.10
