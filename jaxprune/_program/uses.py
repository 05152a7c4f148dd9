"""How a program uses the leaves of its params: multiplied with an activation, then added to it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.frozen import Frozen
from jaxprune._tree import Params

_MOVING = "broadcast_in_dim reshape squeeze expand_dims transpose convert_element_type copy".split()
_MOVING += "slice dynamic_slice stop_gradient reduce_precision sharding_constraint reshard".split()
_CONTRACTING = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "gather")


@dataclasses.dataclass
class Use:
    """How a leaf meets activations, which are the values that depend on inputs."""

    subtracted: bool = False  # from an activation
    joined: bool = False  # with an activation in any other way
    added: set[int] = dataclasses.field(default_factory=set)  # leaves added to what it computes


class _Value(NamedTuple):
    fed: bool = False  # whether it depends on an input
    learned: bool = False  # whether it depends on a leaf
    leaf: int | None = None  # the leaf that it is, moved about
    negative: bool = False
    product: int | None = None  # the leaf whose product with an activation it is, up to biases


def uses(fn: Callable[..., Any], params: Params, inputs: Sequence[Any]) -> list[Use]:
    """Traces a function, and returns the use of every leaf of the params."""
    found = [Use() for _ in jax.tree.leaves(params)]
    program = Frozen(_jaxpr.trace(fn, params, *inputs))
    ins = [_Value(learned=True, leaf=i) for i in range(len(found))]
    _follow(program, ins + [_Value(fed=True)] * len(jax.tree.leaves(inputs)), found)
    return found


def _follow(program: Frozen, values: list[_Value], found: list[Use]) -> None:
    for eqn, numbers in program.steps:
        if eqn is None:
            values.append(_Value())
            continue
        name = eqn.primitive.name
        ins = [values[i] if isinstance(i, int) else _Value() for i in numbers]
        if name in _MOVING or name == "neg":
            result = ins[0]._replace(negative=ins[0].negative != (name == "neg"))
        else:
            fed, learned = any(v.fed for v in ins), any(v.learned for v in ins)
            product = _product(name, ins, found) if fed else None
            result = _Value(fed, learned, product=product)
            for inner in (programs := _jaxpr.inner(eqn)):
                _follow(Frozen(inner), [ins[i] for i in inner.operands], found)
            for place, v in enumerate(ins):
                if v.leaf is not None and fed and not programs:
                    minus = v.negative != (name == "sub" and place == 1)
                    if minus and name in ("add", "sub", "add_any"):
                        found[v.leaf].subtracted = True
                    else:
                        found[v.leaf].joined = True
        values += [result] * len(eqn.outvars)


def _product(name: str, ins: Sequence[_Value], found: list[Use]) -> int | None:
    """Returns the leaf whose product a result is, and notes the biases that are added to it."""
    if name in _CONTRACTING:
        leaves = [v.leaf for v in ins if v.leaf is not None]
        return leaves[0] if len(leaves) == 1 else None
    for v, other in (ins, ins[::-1]) if len(ins) == 2 else ():
        if v.product is not None and not other.fed:
            if name in ("add", "add_any") and other.leaf is not None and not other.negative:
                found[v.product].added.add(other.leaf)
                return v.product
            if name in ("mul", "div") and not other.learned:
                return v.product
    return None
