"""What the weights of a program cost: multiply-adds and activations, read from its trace."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._program import jaxpr as _jaxpr

# Only move entries, so that what is kept of a weight can be followed through them.
_MOVES = frozenset(
    ("broadcast_in_dim", "concatenate", "copy", "expand_dims", "reshape", "rev", "slice", "split")
    + ("squeeze", "transpose")
)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One matmul or convolution, over all the times that it runs.

    Attributes:
      paths: the params that are its factors; none where activations meet (attention).
      macs: multiply-adds of all weights.
      kept: multiply-adds of kept weights.
      outputs: entries of its results.
    """

    paths: tuple[str, ...]
    macs: int
    kept: float
    outputs: int


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A value made from params alone: which ones, and what fraction of each entry is kept."""

    paths: tuple[str, ...]
    kept: Any = None  # an array, or None for all


def contractions(
    fn: Callable[..., Any], params: Any, *inputs: Any, masks: Any = None
) -> list[Contraction]:
    """Lists the matmuls and convolutions of ``fn(params, *inputs)``, inner programs included."""
    names = _tree.named_leaves(params)
    kept = [None] * len(names) if masks is None else _tree.align_masks(params, masks)
    weights: list[_Weight | None] = [
        _Weight((path,), None if m is None else jnp.asarray(m, jnp.float32))
        for (path, _), m in zip(names, kept, strict=True)
    ]
    weights += [None] * len(jax.tree.leaves(inputs))
    found: list[Contraction] = []
    _walk(_jaxpr.trace(fn, params, *inputs).jaxpr, weights, 1, found)
    return found


def _walk(
    jaxpr: Any, weights: Sequence[_Weight | None], times: int, found: list[Contraction]
) -> list[_Weight | None]:
    """Walks a program whose inputs are these weights, or activations; returns what comes out."""
    known = dict(zip(jaxpr.invars, weights, strict=True))

    def read(atom: Any) -> _Weight | None:
        return known.get(atom) if _jaxpr.is_var(atom) else _Weight(())

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        programs = _jaxpr.inner(eqn)
        if programs:
            costs: list[list[Contraction]] = []
            for program in programs:
                inside = [read(atom) for atom in program.operands]
                first = len(inside) - program.stacked
                inside[first:] = [_unstack(w) for w in inside[first:]]
                costs.append([])
                outputs = _walk(program.jaxpr, inside, times * program.times, costs[-1])
                if program.call:
                    known.update(zip(eqn.outvars, outputs, strict=True))
            if name == "cond":  # one branch runs: count the dearest
                costs = [max(costs, key=lambda cost: sum(c.macs for c in cost))]
            found.extend(c for cost in costs for c in cost)
        elif name in ("dot_general", "conv_general_dilated"):
            found.append(_contraction(eqn, operands, times))
        elif operands and all(w is not None for w in operands):
            known.update(zip(eqn.outvars, _derive(eqn, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _unstack(weight: _Weight | None) -> _Weight | None:
    """Averages over the layers of a stack, each of which runs once."""
    if weight is None or weight.kept is None:
        return weight
    return _Weight(weight.paths, weight.kept.mean(0))


def _derive(eqn: Any, operands: Sequence[Any]) -> list[_Weight]:
    paths = tuple(dict.fromkeys(path for w in operands for path in w.paths))
    name = eqn.primitive.name
    if name == "convert_element_type":
        return [_Weight(paths, operands[0].kept)]
    if name in _MOVES and any(w.kept is not None for w in operands):
        arrays = [
            jnp.ones(a.aval.shape, jnp.float32) if w.kept is None else w.kept
            for a, w in zip(eqn.invars, operands, strict=True)
        ]
        moved = eqn.primitive.bind(*arrays, **eqn.params)
        moved = moved if eqn.primitive.multiple_results else [moved]
        return [_Weight(paths, kept) for kept in moved]
    return [_Weight(paths) for _ in eqn.outvars]


def _contraction(eqn: Any, operands: Sequence[_Weight | None], times: int) -> Contraction:
    left, right = (atom.aval.shape for atom in eqn.invars)
    outputs = math.prod(eqn.outvars[0].aval.shape) * times
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        each = math.prod(left[axis] for axis in contracted)
    else:  # what one output position of one feature reads, but for the zeros between inputs
        features = right[eqn.params["dimension_numbers"].rhs_spec[0]]
        each = math.prod(right) / features / math.prod(eqn.params["lhs_dilation"])
    weights = [w for w in operands if w is not None and w.paths]
    share = math.prod(
        float(np.asarray(w.kept).mean(dtype=np.float64)) for w in weights if w.kept is not None
    )
    paths = tuple(path for w in weights for path in w.paths)
    macs = round(outputs * each)
    return Contraction(paths, macs, macs * share, outputs)
