"""The walk along a program with concrete values, which stops where a weight meets an activation.

::

    Line ──weights──▶ [Weight], in the order in which they are reached
      │ advance                      │ sums: what flows in     │ matrix     ▲ write
      ▼                              ▼                         ▼            │
    the values of all batches   count, total, squares, Gram ──▶ a method ───┘

Values that depend on inputs are lists over batches, all others are computed once. The stretch of
nodes between two stops is compiled, once for stretches that do the same, such as those of two
layers. A value is dropped after the last stretch that needs it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _mesh, _tree
from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program import views
from jaxprune._program.straight import Line, Node, Use
from jaxprune._program.views import Sums
from jaxprune._program.weights import Weight, pull


class Walk:
    """A walk over one program and some batches, all of one shape."""

    def __init__(self, apply_fn: Callable[..., Any], params: Any, batch: Sequence[Any]) -> None:
        names = _tree.named_leaves(params)
        floating = [_tree.is_floating(leaf) for _, leaf in names]
        self.line = Line(_jaxpr.trace(apply_fn, params, *batch), len(names), floating)
        self.paths = [path for path, _ in names]
        self.names: dict[int, tuple[str, tuple[int, ...]]] = {}  # path, and place in a stack
        for root, path in zip(self.line.roots, self.paths, strict=True):
            self._name(root, path, ())
        self.weights = list(self._weights())
        self._tapped_programs: dict[Any, Any] = {}
        self._last = self._last_uses()
        self._params = {part for root in self.line.roots for part in self.line.layers(root)}

    # What is known before anything runs.

    def _name(self, root: int, path: str, place: tuple[int, ...]) -> None:
        self.names[root] = path, place
        for i, part in enumerate(self.line.parts.get(root, ())):
            self._name(part, path, (*place, i))

    def _weights(self) -> Iterator[Weight]:
        line = self.line
        alike: dict[Any, list[Use]] = {}
        for use in line.uses:
            alike.setdefault((line.signature(use.value), use.view), []).append(use)
        weights: list[Weight] = []
        for uses in alike.values():
            roots = line.roots_of(uses[0].value)
            names = [self.names[r] for r in roots]
            weights.append(Weight(line, uses[0].value, uses, roots, names))
        yield from sorted(weights, key=lambda w: w.at)

    def reasons(self) -> dict[str, str]:
        """Returns why no contraction consumes a leaf, for every such leaf."""
        used = {path for w in self.weights for path, _ in w.leaves}
        reasons = {}
        for root, path in zip(self.line.roots, self.paths, strict=True):
            reads = [how for part in self.line.layers(root) for _, how in self.reads(part)]
            if path not in used:
                reasons[path] = ", ".join(dict.fromkeys(reads)) or "not used, or not floating"
        return reasons

    def reads(self, root: int) -> list[tuple[int, str]]:
        """Lists where and how a root is read other than by a contraction with an activation."""
        return self.line.reads.get(root, [])

    def _last_uses(self) -> dict[int, int]:
        """Returns the last node that needs each value."""
        last: dict[int, int] = {}
        for at, node in enumerate(self.line.nodes):
            _, needed = self.line.expand([node], set())
            last.update(dict.fromkeys(needed, at))
        _, needed = self._outputs()
        return last | dict.fromkeys(needed, len(self.line.nodes))

    def _outputs(self) -> tuple[list[Node], list[int]]:
        collect = Node(lambda *xs: list(xs), ("outputs",), list(self.line.outs), [-1])
        return self.line.expand([collect], set())

    # The walk.

    def start(self, params: Any, batches: Sequence[Sequence[Any]], host: bool = False) -> None:
        """Begins at the inputs, with these params."""
        line = self.line
        self.env: dict[int, Any] = dict(line.constants)
        self._batches, self._host, self._at = batches, host, 0
        self._known: tuple[Any, Sums] | None = None
        self._seen: dict[int, Any] = {}  # by root, the entries of weights that were asked for
        for root, leaf in zip(line.roots, jax.tree.leaves(params), strict=True):
            self._place(root, leaf)
        columns = [jax.tree.leaves(tuple(batch)) for batch in batches]
        for i, v in enumerate(line.inputs):
            self.env[v] = [column[i] for column in columns]

    def _place(self, root: int, leaf: Any) -> None:
        if root not in self.line.parts:
            self.env[root] = leaf
        for i, part in enumerate(self.line.parts.get(root, ())):
            layer = lax.index_in_dim(jnp.asarray(leaf), i, self.line.axis[root], keepdims=False)
            self._place(part, layer)

    def advance(self, end: int | None = None) -> None:
        """Runs up to a node, or to the end; checks tokens before they are looked up."""
        end = len(self.line.nodes) if end is None else end
        for at, node in enumerate(self.line.nodes[self._at : end], self._at):
            if node.name == "gather":
                roots = self.line.roots_of(node.ins[0])
                if roots and node.ins[1] in self.line.data:
                    self._advance(at)
                    self._check_tokens(node, self.names[roots[0]][0])
        self._advance(end)

    def _check_tokens(self, node: Node, path: str) -> None:
        numbers, sizes = node.eqn.params["dimension_numbers"], node.eqn.params["slice_sizes"]
        shape = node.eqn.invars[0].aval.shape
        for b, indices in enumerate(self.env[node.ins[1]]):
            for i, axis in enumerate(numbers.start_index_map):
                tokens, end = _mesh.read(indices)[..., i], shape[axis] - sizes[axis] + 1
                wrong = tokens[(tokens < 0) | (tokens >= end)]
                if wrong.size:
                    raise ValueError(
                        f"{_tree.show(path)}: tokens must be in [0, {end}), got {wrong[0]} in "
                        f"batch {b}. Check the tokenizer, and that it fits these params."
                    )

    def _advance(self, end: int) -> None:
        nodes, start = self.line.nodes[self._at : end], self._at
        self._at = end
        for per_batch in (False, True):
            some = [n for n in nodes if any(v in self.line.data for v in n.outs) == per_batch]
            # What is not of a batch may be needed by what is, in the same stretch.
            first = end if per_batch else start
            made = [v for n in some for v in n.outs if self._last.get(v, -1) >= first]
            if made:
                self._run(some, made, per_batch)
        for v in [v for v, last in self._last.items() if v in self.env and start <= last < end]:
            if v not in self.line.constants and v not in self._params:
                del self.env[v]

    def _run(self, nodes: list[Node], made: list[int], per_batch: bool) -> None:
        nodes, ins = self.line.expand(nodes, set())
        run = functools.partial(_run, Stretch(self.line, nodes, ins, made))
        if not per_batch:
            self.env.update(zip(made, run(*(self.env[v] for v in ins)), strict=True))
            return
        varying = {v for v in ins if v in self.line.data}
        results: list[list[Any]] = [[] for _ in made]
        for b in range(len(self._batches)):
            outs = run(*(self.env[v][b] if v in varying else self.env[v] for v in ins))
            for result, out in zip(results, outs, strict=True):
                result.append(_to_host(out) if self._host else out)
            for v in varying:  # so that only one batch is held twice
                if self._last[v] < self._at and v not in self.line.inputs:
                    self.env[v][b] = None
        self.env.update(zip(made, results, strict=True))

    def outputs(self) -> list[list[Any]]:
        """Runs to the end; returns the leaves of what the function returns, for each batch."""
        self.advance()
        envs = [self._of_batch(b) for b in range(len(self._batches))]
        return [[pull(self.line, v, env) for v in self.line.outs] for env in envs]

    def _of_batch(self, b: int) -> dict[int, Any]:
        return {v: x[b] if v in self.line.data else x for v, x in self.env.items()}

    # What happens at a weight.

    def sums(self, weight: Weight, gram: bool) -> Sums:
        """Sums over all rows of all batches that flow into a weight."""
        use = weight.uses[0]
        key: Any = None
        made = any(v in self.line.maker for v in use.others)
        if len(weight.uses) == 1 and self.line.nodes[use.at] is use.node and not made:
            key = use.others, views.of_rows(use.view), gram
            if self._known is not None and self._known[0] == key:
                return self._known[1]  # of the same activation, as for queries, keys and values
            ins: Sequence[int] = use.others
            measure = functools.partial(_measure, key[1], gram)
        else:
            measure, ins = self._tapped(weight, gram)
        varying = [v in self.line.data for v in ins]
        total: Any = None
        for b in range(len(self._batches) if any(varying) else 1):
            pairs = zip(ins, varying, strict=True)
            part = measure(*(self.env[v][b] if of_batch else self.env[v] for v, of_batch in pairs))
            total = part if total is None else add(total, part)
        self._known = None if key is None else (key, total)
        return total

    def _tapped(self, weight: Weight, gram: bool) -> tuple[Any, list[int]]:
        """Returns a function that runs all nodes that use a weight, and sums what flows in.

        This serves a weight of a loop or a branch, and one that is used more than once.
        """
        line, uses = self.line, {use.node: use for use in weight.uses}
        nodes = line.nodes[weight.at : weight.uses[-1].at + 1]
        inside = [n for node in nodes for n in _inside(node)]
        known: set[int] = set()
        _, ins = line.expand(nodes, known)
        bodies = [body for node in (*nodes, *inside) for body in node.bodies]
        fed = [v for body in bodies for v in body.ins] + [v for n in inside for v in n.ins]
        known.update(v for v in fed if v in line.inner and v not in line.maker)
        known.update(v for n in inside for v in n.outs)
        ins += line.expand(inside, known)[1]
        shape = jax.eval_shape(lambda: weight.matrix(self.env)).shape
        zero = functools.partial(_zeros, shape, gram)

        def run(nodes: Sequence[Node], env: dict[int, Any]) -> Sums:
            total = zero()
            for node in nodes:
                args = [pull(self.line, v, env) for v in node.ins]
                if any(n in uses for n in _inside(node)):
                    parts = [functools.partial(run_body, body, env) for body in node.bodies]
                    outs, total = _jaxpr.accumulate(node.eqn, parts, args, total)
                else:
                    outs = node.run(*args)
                if node in uses:
                    rows = [pull(self.line, v, env) for v in uses[node].others]
                    total = add(total, _sums(uses[node].view, gram, *rows))
                env.update(zip(node.outs, outs, strict=True))
            return total

        def run_body(body: Any, env: dict[int, Any], *args: Any) -> tuple[list[Any], Sums]:
            env = env | dict(zip(body.ins, args, strict=True))
            part = run(body.nodes, env)
            return [pull(self.line, v, env) for v in body.outs], part

        key = weight.value, gram
        if key not in self._tapped_programs:
            self._tapped_programs[key] = jax.jit(
                lambda *arrays: run(nodes, dict(zip(ins, arrays, strict=True)))
            )
        return self._tapped_programs[key], ins

    def is_covered(self, weight: Weight) -> bool:
        """Returns whether a weight before, with entries of this one, was asked for.

        That is a contraction which reads a param in another way, such as its transpose.
        """
        others = {r for w in self.weights if w is not weight for r in w.roots}
        if not others & {*weight.roots}:
            return False
        entries = dict(zip(weight.roots, weight.entries(self.env), strict=True))
        before = {r: self._seen.get(r, False) for r in entries}
        if any(bool(jnp.any(entries[r] & before[r])) for r in entries):
            return True
        self._seen |= {r: entries[r] | before[r] for r in entries}
        return False

    def write(self, weight: Weight, matrix: jax.Array, mask: jax.Array) -> list[jax.Array] | None:
        """Replaces a weight by matrices; returns the masks of its roots, as `Weight.written`."""
        values, masks = weight.written(self.env, matrix, mask) or ([], None)
        if masks is not None:
            self.replace(weight, values)
        return masks

    def replace(self, weight: Weight, values: Sequence[Any]) -> None:
        """Replaces the roots of a weight."""
        self.env.update(zip(weight.roots, values, strict=True))

    def first_not_finite(self, weight: Weight) -> str:
        """Names the first equation on the way to a weight that makes NaN, or else infinity."""
        for bad in (jnp.isnan, jnp.isinf):
            for b, batch in enumerate(self._batches):
                env = {v: self.env[v] for v in self._params}
                env |= dict(zip(self.line.inputs, jax.tree.leaves(tuple(batch)), strict=True))
                found = self._first(bad, env, weight.uses[-1].at + 1)
                if found:
                    return f"{found}, in batch {b}"
        return "an unknown equation"

    def _first(self, bad: Any, env: dict[int, Any], end: int) -> str:
        def is_bad(x: Any) -> bool:
            return hasattr(x, "dtype") and _jaxpr.is_inexact(x) and bool(jnp.any(bad(x)))

        for v, x in env.items():
            if is_bad(x):
                return "an input" if v in self.line.inputs else "the params"
        for node in self.line.nodes[:end]:
            outs = node.run(*(pull(self.line, v, env) for v in node.ins))
            env.update(zip(node.outs, outs, strict=True))
            if any(map(is_bad, outs)) and node.eqn is not None:
                line = _jaxpr.line(node.eqn)
                return _jaxpr.where(node.eqn) + (f" at {line}" if line else "")
        return ""

    def leaf(self, root: int, of: dict[int, Any]) -> Any:
        """Returns a param from its layers."""
        if root in self.line.parts:
            layers = [self.leaf(part, of) for part in self.line.parts[root]]
            return jnp.stack(layers, self.line.axis[root])
        return of[root]


class Stretch:
    """Nodes that are compiled together; equal to others that do the same, also of other calls."""

    def __init__(self, line: Line, nodes: list[Node], ins: list[int], made: list[int]) -> None:
        self.nodes, self.ins, self.made = nodes, ins, made
        used = {v for n in nodes for v in n.ins if v in line.literals}
        self.literals = {v: line.constants[v] for v in used}
        place: dict[int, int] = {v: i for i, v in enumerate(ins)}

        def spell(v: int) -> Any:
            return line.literal(v) if v in used else place.setdefault(v, len(place))

        def steps() -> Iterator[Any]:
            for node in nodes:
                yield node.key, tuple(map(spell, node.ins)), tuple(map(spell, node.outs))

        self.key = len(ins), tuple(steps()), tuple(map(spell, made))
        self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stretch) and self.key == other.key

    def run(self, *arrays: Any) -> list[Any]:
        """Returns the values that are needed later."""
        env = self.literals | dict(zip(self.ins, arrays, strict=True))
        for node in self.nodes:
            outs = node.run(*(env[v] for v in node.ins))
            env.update(zip(node.outs, outs, strict=True))
        return [env[v] for v in self.made]


@functools.partial(jax.jit, static_argnums=0)
def _run(stretch: Stretch, *arrays: Any) -> list[Any]:
    return stretch.run(*arrays)


def _inside(node: Node) -> Iterator[Node]:
    for body in node.bodies:
        for inner in body.nodes:
            yield inner
            yield from _inside(inner)


def _zeros(shape: tuple[int, ...], gram: bool) -> Sums:
    groups, inputs, _ = shape
    square = jnp.zeros((groups, inputs, inputs), jnp.float32) if gram else None
    rows = jnp.zeros((groups, inputs), jnp.float32)
    return Sums(jnp.zeros(groups, jnp.float32), rows, rows, square)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(view: Any, gram: bool, *arrays: Any) -> Sums:
    return _sums(view, gram, *arrays)


def _sums(view: Any, gram: bool, *arrays: Any) -> Sums:
    return _mesh.replicating(functools.partial(views.sums, view, gram), *arrays)


@jax.jit
def add(a: Sums, b: Sums) -> Sums:
    """Adds what is summed over some rows and over others."""
    return jax.tree.map(jnp.add, a, b)


def _to_host(x: Any) -> Any:
    return np.asarray(x) if jnp.issubdtype(x.dtype, jnp.number) else x
