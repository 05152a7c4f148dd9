"""How a program combines the leaves of its params with activations: are they only subtracted?"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.frozen import Frozen
from jaxprune._tree import Params

SUBTRACTED, JOINED = "subtracted", "joined"
_MOVING = "broadcast_in_dim reshape squeeze expand_dims transpose convert_element_type copy".split()
_MOVING += "slice dynamic_slice stop_gradient reduce_precision sharding_constraint reshard".split()


class _Value(NamedTuple):
    fed: bool = False  # whether it depends on an input
    leaf: int | None = None  # the leaf that it is, moved about
    negative: bool = False


def uses(apply_fn: Callable[..., Any], params: Params, inputs: Sequence[Any]) -> list[set[str]]:
    """Lists for every leaf of the params how it meets values that depend on inputs."""
    found: list[set[str]] = [set() for _ in jax.tree.leaves(params)]
    program = Frozen(_jaxpr.trace(apply_fn, params, *inputs))
    ins = [_Value(leaf=i) for i in range(len(found))]
    ins += [_Value(fed=True)] * len(jax.tree.leaves(inputs))
    for leaf, use in _uses(program, ins):
        found[leaf].add(use)
    return found


def _uses(program: Frozen, values: list[_Value]) -> Iterator[tuple[int, str]]:
    for eqn, numbers in program.steps:
        if eqn is None:
            values.append(_Value())
            continue
        name = eqn.primitive.name
        ins = [values[i] if isinstance(i, int) else _Value() for i in numbers]
        fed = any(v.fed for v in ins)
        result = _Value(fed)
        if name in _MOVING or name == "neg":
            result = ins[0]._replace(negative=ins[0].negative != (name == "neg"))
        elif programs := _jaxpr.inner(eqn):
            for inner in programs:
                yield from _uses(Frozen(inner), [ins[i] for i in inner.operands])
        else:
            for place, v in enumerate(ins):
                if v.leaf is not None:
                    minus = name == "sub" and place == 1
                    added = name in ("add", "sub", "add_any")
                    if fed:
                        yield v.leaf, SUBTRACTED if added and minus != v.negative else JOINED
        values += [result] * len(eqn.outvars)
