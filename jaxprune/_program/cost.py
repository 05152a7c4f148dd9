"""The one counter of multiply-adds, for ``metrics``, ``groups`` and ``units``.

::

    jaxpr, and its walked steps if units are asked for
      │ contractions
      ▼
    [Contraction | branches] ──total───────────▶ multiply-adds: a number, or one for every unit
                             └─most_expensive──▶ [Contraction], the rows of a table

Matmuls and convolutions are counted, wherever they are: those of a `scan` once per step, of a
`cond` those of the most expensive branch, of a `while` loop once. Derivative rules do not run.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.cut import Asked, Cut
from jaxprune._program.values import Program, Step
from jaxprune._tree import Masks, Params

# Primitives that only move entries, so that the kept weights can be followed through them.
_MOVES = (
    "broadcast_in_dim concatenate copy expand_dims reshape rev slice split squeeze transpose"
).split()
CONTRACTIONS = "dot_general ragged_dot_general conv_general_dilated".split()


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One matmul or convolution."""

    times: float  # how often it runs, times the size of every axis without a unit
    axes: tuple[np.ndarray, ...]  # for each axis with units, the unit of every index, 0 for none
    paths: tuple[str, ...]  # the params that are its factors; none where activations meet
    kept: float  # the fraction of its multiply-adds that the masks keep
    outputs: int  # the entries of its results
    loop: str  # the `while` loop around it, whose trip count is unknown; empty if there is none
    ghosts: tuple[tuple[int, ...], ...] = ()  # of each run for ghosts: how many along each axis

    def macs(self, size: Callable[[np.ndarray], Any] = len) -> Any:
        """Counts multiply-adds, where ``size`` returns how many indices of an axis are kept."""
        kept = list(map(size, self.axes))
        counts = [math.prod(kept)]
        for ghosts in self.ghosts:  # a ghost stands for indices that are removed, if any are
            sizes = zip(ghosts, kept, map(len, self.axes), strict=True)
            counts.append(math.prod(np.minimum(g, n - k) if g else k for g, k, n in sizes))
        return self.times * sum(counts)

    def kept_macs(self) -> float:
        """Counts the multiply-adds that the masks keep."""
        return self.macs() * self.kept


Cost = Contraction | tuple[list["Cost"], ...]  # or the branches of a `cond`, of which one runs


class _Walked(NamedTuple):
    """A walked program, and how it runs without units."""

    program: Program
    unit: np.ndarray  # of every atom
    cut: Cut  # without all units, so that it has every ghost
    wanted: Asked  # the views of the results


class _Sized(NamedTuple):
    """An equation whose axes have units."""

    step: Step
    unit: np.ndarray
    cut: Cut
    views: Asked  # of the results


class _Weight(NamedTuple):
    """A value made from params alone: from which, and the fraction kept of each entry."""

    paths: tuple[str, ...] = ()
    kept: Any = None  # an array, or None for all


def contractions(
    apply_fn: Callable[..., Any], params: Params, *inputs: Any, masks: Masks | None = None
) -> list[Cost]:
    """Counts ``apply_fn(params, *inputs)``, and the fractions of it that the masks keep.

    No primitive needs a rule: the program is traced, and not walked.
    """
    names = _tree.named_leaves(params)
    kept = [None] * len(names) if masks is None else _tree.align_masks(params, masks)
    weights: list[_Weight | None] = [
        _Weight((path,), None if m is None else jnp.asarray(m, jnp.float32))
        for (path, _), m in zip(names, kept, strict=True)
    ]
    weights += [None] * len(jax.tree.leaves(inputs))
    return _visit(_jaxpr.trace(apply_fn, params, *inputs).jaxpr, weights)[0]


def contractions_of_units(program: Program, unit: np.ndarray) -> list[Cost]:
    """Counts a walked program, with the unit of every atom, 0 for none."""
    cut = Cut(unit > 0, unit, program)
    wanted: Asked = [set() for _ in program.outs]
    return _visit(program.jaxpr, [None] * len(program.ins), _Walked(program, unit, cut, wanted))[0]


def total(costs: Sequence[Cost], macs: Callable[[Contraction], Any] = Contraction.kept_macs) -> Any:
    """Sums ``macs``, a number or an array of them; for `cond` the largest branch is summed."""

    def largest(branches: Sequence[Sequence[Cost]]) -> Any:
        sums = [total(branch, macs) for branch in branches]
        return max(sums) if all(map(np.isscalar, sums)) else functools.reduce(np.maximum, sums)

    return sum(macs(cost) if isinstance(cost, Contraction) else largest(cost) for cost in costs)


def most_expensive(costs: Sequence[Cost]) -> list[Contraction]:
    """Lists what :func:`total` sums."""
    rows: list[Contraction] = []
    for cost in costs:
        rows += [cost] if isinstance(cost, Contraction) else most_expensive(max(cost, key=total))
    return rows


def loops(costs: Sequence[Cost]) -> list[str]:
    """Lists the `while` loops that hold contractions, which are counted once."""
    return list(dict.fromkeys(c.loop for c in jax.tree.leaves(list(costs)) if c.loop))


def warn_of_loops(costs: Sequence[Cost], stacklevel: int) -> None:
    """Warns of `while` loops; the stack level is that of ``warnings.warn`` in the caller."""
    if names := loops(costs):
        warnings.warn(
            f"{', '.join(names)}: FLOPs inside a `while` loop are counted once, because its trip "
            "count is unknown. Use `jax.lax.scan`, or `fori_loop` between Python integers, to "
            "count every iteration.",
            stacklevel=stacklevel + 1,
        )


def _visit(
    jaxpr: Any,
    weights: Sequence[_Weight | None],  # what each input is made from, `None` for an activation
    walked: _Walked | None = None,  # if units are asked for
    runs: int = 1,
    loop: str = "",  # the `while` loop around the jaxpr
) -> tuple[list[Cost], list[_Weight | None]]:
    """Returns the costs of all equations, also of inner ones, and what each output is made from."""
    known = dict(zip(jaxpr.invars, weights, strict=True))
    costs: list[Cost] = []
    views = walked.cut.reads(walked.program, walked.wanted)[1] if walked else []

    def read(atom: Any) -> _Weight | None:
        return known.get(atom) if _jaxpr.is_var(atom) else _Weight()

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        # A full value is computed entirely, and sliced later: removing units saves nothing here.
        step = walked.program.steps[i] if walked else None
        step = None if step and all(v.full for v in step.outs) else step
        wanted = walked.cut.operands(step, views[i])[1] if walked and step else []
        inner = _jaxpr.inner(eqn)
        branches = []
        for n, body in enumerate(inner):
            fed = [operands[i] for i in body.operands]
            first = len(fed) - body.stacked
            fed[first:] = [w and _unstacked(w) for w in fed[first:]]
            around = loop or (_jaxpr.where(eqn) if name == "while" else "")
            inside = step and walked and walked._replace(program=step.programs[n], wanted=wanted[n])
            branch, outputs = _visit(body.jaxpr, fed, inside or None, runs * body.times, around)
            branches.append(branch)
            if body.call:
                known.update(zip(eqn.outvars, outputs, strict=True))
        if name == "cond":
            costs.append(tuple(branches))
        elif inner:
            costs.extend(cost for branch in branches for cost in branch)
        elif name in CONTRACTIONS:
            sized = _Sized(step, walked.unit, walked.cut, views[i]) if step and walked else None
            costs.append(_contraction(eqn, operands[:2], sized, runs, loop))
        elif operands and all(w is not None for w in operands):
            known.update(zip(eqn.outvars, _derive(eqn, operands), strict=True))
    return costs, [read(atom) for atom in jaxpr.outvars]


def _contraction(
    eqn: Any, operands: Sequence[_Weight | None], sized: _Sized | None, runs: int, loop: str
) -> Contraction:
    factor, places = _places(eqn)
    times, axes, with_units = runs * factor, [], []
    values = [*sized.step.ins, *sized.step.outs] if sized else []
    for n, axis in places:
        units = sized.unit[values[n].axes[axis]] if sized else np.empty(0)
        if units.any():
            axes.append(units)
            with_units.append((n, axis))
        else:
            times *= [*eqn.invars, *eqn.outvars][n].aval.shape[axis]
    weights = [w for w in operands if w is not None and w.paths]
    share = math.prod(
        float(np.asarray(w.kept).mean(dtype=np.float64)) for w in weights if w.kept is not None
    )
    paths = tuple(path for w in weights for path in w.paths)
    outputs = math.prod(eqn.outvars[0].aval.shape) * runs
    ghosts = tuple(_ghosts(sized, with_units)) if sized else ()
    return Contraction(times, tuple(axes), paths, share, outputs, loop, ghosts)


def _ghosts(sized: _Sized, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """Lists how many ghosts each further run of an equation has along axes, 0 for what is kept."""
    step, cut = sized.step, sized.cut
    for view in [(), *set().union(*sized.views)]:
        for chosen, _ in cut.terms(step):
            views = [*(cut.view(step, n, view, chosen) for n in range(len(step.ins))), view]
            counts = []
            for n, axis in places:
                count = cut.size([*step.ins, *step.outs][n].axes[axis], ghost=True)
                picked = len(chosen.get((n, axis), range(count)))
                counts.append(picked if axis in views[n] else 0)
            if any(counts):
                yield tuple(counts)


def _places(eqn: Any) -> tuple[float, list[tuple[int, int]]]:
    """Lists the axes whose sizes, and a factor, multiply to the multiply-adds of one run.

    An axis is ``(value, axis)``, where values are the operands, then the result.
    """
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    params = eqn.params
    if eqn.primitive.name == "conv_general_dilated":
        numbers, result = params["dimension_numbers"], eqn.outvars[0].aval.shape
        _, in_features, *window = numbers.rhs_spec
        batch, features, *space = numbers.out_spec
        # Every output position reads a window, in which a transposed convolution has zeros.
        reads = math.prod([result[i] for i in space] + [right[i] for i in window])
        zeros = math.prod(params["lhs_dilation"])
        factor = reads / zeros if reads % zeros else reads // zeros
        return factor, [(2, batch), (2, features), (1, in_features)]
    # In a ragged product a row of the left meets the matrix of its own group alone.
    ragged = params.get("ragged_dot_dimension_numbers")
    numbers = ragged.dot_dimension_numbers if ragged else params["dimension_numbers"]
    (_, contracted), (_, batch) = numbers
    shared = {*contracted, *batch, *(ragged.rhs_group_dimensions if ragged else ())}
    places = [(0, i) for i in range(len(left))]
    return 1, places + [(1, i) for i in range(len(right)) if i not in shared]


def _unstacked(weight: _Weight) -> _Weight:
    """Averages over the layers of a stack, each of which runs once."""
    return weight if weight.kept is None else weight._replace(kept=weight.kept.mean(0))


def _derive(eqn: Any, operands: Sequence[Any]) -> list[_Weight]:
    """Follows weights through an equation; unless it only moves them, all count as kept."""
    paths = tuple(dict.fromkeys(path for w in operands for path in w.paths))
    name = eqn.primitive.name
    if name == "convert_element_type":
        return [_Weight(paths, operands[0].kept)]
    if name in _MOVES and any(w.kept is not None for w in operands):
        arrays = [
            jnp.ones(atom.aval.shape, jnp.float32) if w.kept is None else w.kept
            for atom, w in zip(eqn.invars, operands, strict=True)
        ]
        return [_Weight(paths, kept) for kept in _jaxpr.bind(eqn, *arrays)]
    return [_Weight(paths) for _ in eqn.outvars]
