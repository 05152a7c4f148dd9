"""A program as one straight line of nodes, and the weights on it.

Calls are inlined, and a scan over layers becomes one part per layer. Loops over time and branches
stay one node, whose inner programs are lines too. Every value has a number.

A param, or one layer of a stacked one, is a *root*. What is made from roots by moving, casting or
scaling entries alone is *linear* in them. A contraction of a linear value and another one *uses*
its roots: they are a weight. Anything else *reads* them. Linear values are made anew where they are
needed, so that they follow a root that changes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.cost import CONTRACTIONS
from jaxprune._program.frozen import _same
from jaxprune._program.views import View, view

# Each entry of the result is an entry of the operand, or one of many operands.
_MOVES = (
    "broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice expand_dims "
    "gather index neg optimization_barrier pad reduce_precision reshape rev sharding_constraint "
    "slice split squeeze stack transpose"
).split()
_INDEXED = "dynamic_slice gather index pad".split()  # the other operands do not depend on params
_SCALES = "mul div select_n".split()
_ENTRYWISE = _SCALES + "convert_element_type copy neg reduce_precision".split()


@dataclasses.dataclass(eq=False)
class Node:
    """An equation, or a step between a stack and its layers."""

    run: Callable[..., list[Any]]
    key: Any  # equal for nodes that do the same
    ins: list[int]
    outs: list[int]
    eqn: Any = None
    bodies: list["Body"] = dataclasses.field(default_factory=list)
    moved: tuple[int, ...] = ()  # the operands in which a linear result is linear
    scales: bool = False  # whether its entries are scaled, too

    @property
    def name(self) -> str:
        return self.key[0] if self.eqn is None else self.eqn.primitive.name


@dataclasses.dataclass(eq=False)
class Body:
    """A program inside a node."""

    nodes: list[Node]
    ins: list[int]
    outs: list[int]


@dataclasses.dataclass(eq=False)
class Use:
    """A contraction of a weight with an activation."""

    node: Node
    value: int  # the weight
    others: tuple[int, ...]  # the activation, and the sizes of ragged groups
    view: View
    at: int  # the place of the node on the line, or of the node around it


class Line:
    """``apply_fn(params, *inputs)`` as a straight line of nodes."""

    def __init__(self, closed: Any, roots: int, floating: Sequence[bool]) -> None:
        self.constants: dict[int, Any] = {}
        self.literals: set[int] = set()  # constants that are part of a node
        self.maker: dict[int, Node] = {}  # of each linear value that is not a root
        self.uses: list[Use] = []
        self.reads: dict[int, list[tuple[int, str]]] = {}  # by root: where, and how
        self.parts: dict[int, list[int]] = {}  # the layers of a stacked root
        self.axis: dict[int, int] = {}  # along which these are stacked
        self.nodes: list[Node] = []
        self.data: set[int] = set()  # what depends on inputs
        self.inner: set[int] = set()  # values of inner programs, which are unknown outside
        self._linear: set[int] = set()
        self._from: dict[int, frozenset[int]] = {}  # the params that a value without data is from
        self._depth = 0
        self._sizes: dict[int, int] = {}
        ins = [self._new() for _ in closed.jaxpr.invars]
        self.roots, self.inputs = ins[:roots], ins[roots:]
        self._linear |= {v for v, f in zip(self.roots, floating, strict=True) if f}
        self._sizes |= {v: a.aval.size for v, a in zip(ins, closed.jaxpr.invars, strict=True)}
        self._from |= {v: frozenset([v]) for v in self.roots}
        self.data |= set(self.inputs)
        self.outs = self._add(closed.jaxpr, closed.consts, ins, self.nodes)
        for v in self.outs:
            self._read(v, "returned")

    def roots_of(self, v: int) -> list[int]:
        """Lists the roots in which a value is linear."""
        if v not in self.maker:
            return [v] if v in self._linear else []
        node = self.maker[v]
        return list(dict.fromkeys(r for i in node.moved for r in self.roots_of(node.ins[i])))

    def layers(self, root: int) -> Iterator[int]:
        """Lists the roots that a param was split into; itself if it is not stacked."""
        for part in self.parts.get(root, ()):
            yield from self.layers(part)
        if root not in self.parts:
            yield root

    def expand(self, nodes: Iterable[Node], known: set[int]) -> tuple[list[Node], list[int]]:
        """Lists the makers of linear values before the nodes that need them, and what they need.

        ``known`` holds the values that are there; those that the nodes make are added.
        """
        listed: list[Node] = []
        needed: dict[int, None] = {}

        def require(v: int) -> None:
            if v in known or v in self.literals:
                return
            if v in self.maker:
                visit(self.maker[v])
            else:
                needed[v] = None
                known.add(v)

        def visit(node: Node) -> None:
            for v in node.ins:
                require(v)
            listed.append(node)
            known.update(node.outs)

        for node in nodes:
            visit(node)
        return listed, list(needed)

    def signature(self, v: int) -> Any:
        """Returns what is equal for values that are made in the same way."""
        if v in self.maker:
            node = self.maker[v]
            return node.outs.index(v), node.key, tuple(map(self.signature, node.ins))
        if v in self.constants:
            x = self.constants[v]
            return ("constant", *self.literal(v)) if np.size(x) < 2 else ("constant", id(x))
        return v

    def literal(self, v: int) -> Any:
        """Returns what is equal for equal scalar constants."""
        x = np.asarray(self.constants[v])
        return type(self.constants[v]), str(x.dtype), x.tobytes()

    def _new(self) -> int:
        number = len(self._sizes)
        self._sizes[number] = 0
        if self._depth:
            self.inner.add(number)
        return number

    def _constant(self, x: Any) -> int:
        number = self._new()
        self.inner.discard(number)
        self.constants[number] = x
        self._sizes[number] = getattr(x, "size", 1)
        return number

    def _add(self, jaxpr: Any, consts: Any, ins: Sequence[int], nodes: list[Node]) -> list[int]:
        """Adds the equations of a program to a list of nodes, and returns its results."""
        env = dict(zip(jaxpr.invars, ins, strict=True))
        env |= {v: self._constant(x) for v, x in zip(jaxpr.constvars, consts, strict=True)}

        def number(atom: Any) -> int:
            if _jaxpr.is_var(atom):
                return env[atom]
            v = self._constant(atom.val)
            if np.size(atom.val) == 1:
                self.literals.add(v)
            return v

        for eqn in jaxpr.eqns:
            operands = list(map(number, eqn.invars))
            programs = _jaxpr.inner(eqn)
            name = eqn.primitive.name
            if programs and programs[0].call and name != "shard_map":
                outs = self._add(programs[0].jaxpr, programs[0].consts, operands, nodes)
            elif name == "scan" and self._is_of_layers(eqn, programs[0], operands):
                outs = self._unroll(eqn, programs[0], operands, nodes)
            else:
                outs = [self._new() for _ in eqn.outvars]
                for v, atom in zip(outs, eqn.outvars, strict=True):
                    self._sizes[v] = atom.aval.size
                run = functools.partial(_bind, eqn)
                key = eqn.primitive, eqn.ctx, _same(eqn.params)
                node = Node(run, key, operands, outs, eqn)
                if name != "shard_map":
                    node.bodies = [self._body(p, operands) for p in programs]
                self._place(node, nodes)
            env.update(zip(eqn.outvars, outs, strict=True))
        return list(map(number, jaxpr.outvars))

    def _body(self, program: Any, operands: Sequence[int]) -> Body:
        """Makes the line of an inner program; what does not change keeps its number."""
        self._depth += 1
        fed = [operands[i] for i in program.operands]
        changes = {*program.carried, *list(program.operands)[len(fed) - program.stacked :]}
        for n, i in enumerate(program.operands):
            if i in changes:
                self._read(fed[n], "carried or sliced by a loop")
                data = fed[n] in self.data or i in program.carried  # a carry becomes anything
                fed[n] = self._new()
                self.data.update([fed[n]] if data else [])
        nodes: list[Node] = []
        outs = self._add(program.jaxpr, program.consts, fed, nodes)
        for v in outs:
            self._read(v, "returned by an inner program")
        self._depth -= 1
        return Body(nodes, fed, outs)

    def _is_of_layers(self, eqn: Any, program: Any, operands: Sequence[int]) -> bool:
        """Returns whether a scan slices params with two axes per layer, not only per step."""
        first = len(operands) - program.stacked
        stacks = zip(operands[first:], eqn.invars[first:], strict=True)
        return any(v in self._linear and len(a.aval.shape) > 2 for v, a in stacks)

    def _unroll(
        self, eqn: Any, program: Any, operands: Sequence[int], nodes: list[Node]
    ) -> list[int]:
        carried, count = program.carried, program.times
        consts, carry = operands[: carried.start], list(operands[carried.start : carried.stop])
        stacks = [self._slices(v, count, nodes) for v in operands[carried.stop :]]
        results: list[list[int]] = [[] for _ in eqn.outvars[len(carry) :]]
        steps = range(count)[::-1] if eqn.params["reverse"] else range(count)
        for i in steps:
            ins = [*consts, *carry, *(stack[i] for stack in stacks)]
            outs = self._add(program.jaxpr, program.consts, ins, nodes)
            carry = outs[: len(carry)]
            for result, v in zip(results, outs[len(carry) :], strict=True):
                result.append(v)
        order = [result[::-1] if eqn.params["reverse"] else result for result in results]
        return carry + [self._stack(result, nodes) for result in order]

    def _slices(self, v: int, count: int, nodes: list[Node], axis: int = 0) -> list[int]:
        """Splits a stack; the layers of a root are roots, of which the stack is then made."""
        if v in self._linear and v not in self.maker:
            self.parts[v], self.axis[v] = [self._new() for _ in range(count)], axis
            self.inner.difference_update(self.parts[v])
            for part in self.parts[v]:
                self._sizes[part] = self._sizes[v] // count
                self._from[part] = self._from[v]
                if v in self.reads:
                    self.reads[part] = list(self.reads[v])
            self._linear.update(self.parts[v])
            self.maker[v] = _stack_of(self.parts[v], v, axis)
            self.maker[v].moved = tuple(range(count))
            return self.parts[v]
        node = self.maker.get(v)
        if node is not None and node.key == ("stack", axis):
            return node.ins
        if node is not None and node.name in ["transpose", *_ENTRYWISE]:
            return self._slices_of_operands(node, count, nodes, axis)
        slices = []
        for i in range(count):  # the index is no literal: the nodes of all layers do the same
            out = self._new()
            self._sizes[out] = self._sizes[v] // count
            ins = [v, self._constant(np.int32(i))]
            run = functools.partial(_index, axis=axis)
            self._place(Node(run, ("index", axis), ins, [out]), nodes)
            slices.append(out)
        return slices

    def _slices_of_operands(
        self, node: Node, count: int, nodes: list[Node], axis: int
    ) -> list[int]:
        """Makes the layers of a stack that was moved, cast or scaled entirely, one by one."""
        size = self._sizes[node.outs[0]]
        run, key = node.run, node.key
        if node.name == "transpose":
            order = node.eqn.params["permutation"]
            axis, before = order[axis], axis
            rest = [i - (i > axis) for n, i in enumerate(order) if n != before]
            run, key = functools.partial(run, permutation=tuple(rest)), (key, *rest)
        operands = [
            self._slices(v, count, nodes, axis) if self._sizes[v] == size else [v] * count
            for v in node.ins
        ]
        slices = []
        for ins in zip(*operands, strict=True):
            out = self._new()
            self._sizes[out] = size // count
            self._place(Node(run, key, list(ins), [out], node.eqn), nodes)
            slices.append(out)
        return slices

    def _stack(self, values: list[int], nodes: list[Node]) -> int:
        out = self._new()
        self._place(_stack_of(values, out), nodes)
        return out

    def _place(self, node: Node, nodes: list[Node]) -> None:
        """Adds a node, unless its results are linear; records what it uses and reads."""
        name = node.name
        if any(v in self.data for v in node.ins):
            self.data.update(node.outs)
        else:
            self._from.update(dict.fromkeys(node.outs, self._params_of(node.ins)))
        linear = [i for i, v in enumerate(node.ins) if v in self._linear]
        node.moved, node.scales = self._moved(name, node, linear), name in _SCALES
        if node.moved:
            self.maker.update(dict.fromkeys(node.outs, node))
            self._linear.update(node.outs)
            linear = [i for i in linear if i not in node.moved]
        else:
            nodes.append(node)
        at = len(self.nodes) - (not node.moved and nodes is self.nodes)
        weights = [i for i in linear if i < 2] if name in CONTRACTIONS else []
        how = _jaxpr.where(node.eqn) if node.eqn is not None else f"`{name}`"
        # Of two params, such as learned queries, one that is repeated for a batch is an activation.
        repeated = [i for i in weights if self._sizes[node.ins[i]] > self._entries(node.ins[i])]
        if len(weights) == 2 and len(repeated) == 1:
            self._read(node.ins[repeated[0]], f"read by {how}", at)
            weights.remove(repeated[0])
            linear.remove(repeated[0])
        if len(weights) == 1 and len(linear) == 1:
            (i,) = weights
            seen = view(node.eqn, i)
            if isinstance(seen, View):
                others = (node.ins[1 - i], *node.ins[2:])
                self.uses.append(Use(node, node.ins[i], others, seen, at))
                return
            how += f", where {seen}"
        elif len(weights) == 2:
            how += ", which multiplies two params"
        for i in linear:
            if not node.bodies:
                self._read(node.ins[i], f"read by {how}", at)

    def _params_of(self, values: Iterable[int]) -> frozenset[int]:
        return frozenset().union(*(self._from.get(v, ()) for v in values))

    def _moved(self, name: str, node: Node, linear: list[int]) -> tuple[int, ...]:
        """Lists the operands in which the results are linear, entry by entry."""
        if name in _MOVES:
            first = linear == [0] and name in _INDEXED
            moved = linear if first or linear == list(range(len(node.ins))) else []
            outvars = [] if node.eqn is None else node.eqn.outvars
            if not all(_jaxpr.is_inexact(v.aval) for v in outvars):
                return ()
        elif name in _SCALES:
            # Of two params, the one with more entries is the weight, and the other its scale.
            able = [i for i in linear if (name, i) not in (("div", 1), ("select_n", 0))]
            moved = sorted(able, key=lambda i: -self._entries(node.ins[i]))[:1]
        else:
            return ()
        others = [v for i, v in enumerate(node.ins) if i not in moved]
        unknown = any(v in self.data or v in self.inner for v in others)
        same = self._params_of(node.ins[i] for i in moved) & self._params_of(others)
        return () if unknown or same else tuple(moved)

    def _entries(self, v: int) -> int:
        """Counts the entries of the roots of a value."""
        return sum(self._sizes[root] for root in self.roots_of(v))

    def _read(self, v: int, how: str, at: int | None = None) -> None:
        for root in self.roots_of(v):
            self.reads.setdefault(root, []).append((len(self.nodes) if at is None else at, how))


def _bind(eqn: Any, *args: Any, **changes: Any) -> list[Any]:
    with eqn.ctx.manager:
        return _jaxpr.bind(eqn, *args, **changes)


def _stack_of(layers: list[int], stack: int, axis: int = 0) -> Node:
    return Node(functools.partial(_stack, axis=axis), ("stack", axis), layers, [stack])


def _stack(*layers: jax.Array, axis: int) -> list[jax.Array]:
    return [jnp.stack(layers, axis)]


def _index(stack: jax.Array, i: jax.Array, axis: int) -> list[jax.Array]:
    return [lax.dynamic_index_in_dim(stack, i, axis, keepdims=False)]
