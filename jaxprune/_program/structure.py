"""The structure of ``fn(params, *inputs)``: its program, walked, every ambiguity decided."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Merge
from jaxprune._program.rules import RULES
from jaxprune._program.values import Program, Value
from jaxprune._program.walk import Walk

Split = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Structure:
    """A walked program.

    Attributes:
      walk: what the walk found; its atoms are final.
      program: the program with its values.
      leaves: the value of every leaf of the params, in the order of the tree.
      order: the leaves that are used, in the order of first use.
      choices: the merged axes that could be cut along several factors.
      out_tree: the structure of what ``fn`` returns.
    """

    walk: Walk
    program: Program
    leaves: list[Value]
    order: list[int]
    choices: list[tuple[Merge, int, list[int]]]
    out_tree: Any

    def spread(self, units: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Returns the unit of every atom, 0 for none.

        Args:
          units: for every leaf, and every axis, the unit of each index, 0 for none.
        """
        roots = self.walk.atoms.all_roots()
        unit = np.zeros(len(roots), np.int32)
        for leaf, axes in zip(self.leaves, units, strict=True):
            for axis, numbers in zip(leaf.axes, axes, strict=True):
                unit[roots[axis[numbers > 0]]] = numbers[numbers > 0]
        return unit[roots]


def analyse(
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    *,
    exact: bool = True,
    has_aux: bool = False,
    split: Split | None = None,
    removed: Mapping[tuple[str, int], np.ndarray] | None = None,
) -> Structure:
    """Walks a program.

    Args:
      fn: the function.
      params: arrays or shapes.
      inputs: arrays or shapes.
      exact: pins what would change the result, instead of noting it.
      has_aux: whether ``fn`` returns a pair, the second of which may be cut.
      split: for paths, the factor along which to cut their merged axes.
      removed: for ``(path, axis)``, the indices that are to leave; all others are pinned.
    """
    check_inputs(inputs)
    closed, out_tree, outputs = trace(fn, params, inputs, has_aux)
    walk = Walk(RULES, exact, derivatives=removed is not None)
    names = _tree.named_leaves(params)
    order = [i for i in _jaxpr.order_of_use(closed.jaxpr) if i < len(names)]
    leaves: dict[int, Value] = {}
    for i in [*order, *(i for i in range(len(names)) if i not in set(order))]:
        path, leaf = names[i]
        shape = jnp.shape(leaf)
        if not _tree.is_floating(leaf):
            leaves[i] = walk.pinned(shape, "not floating-point", full=True)
        elif i not in order:
            leaves[i] = walk.pinned(shape, "not used")
        else:
            leaves[i] = walk.fresh(shape, zero=True)
            for axis, atoms in enumerate(leaves[i].axes if removed is not None else ()):
                stay = np.ones(len(atoms), bool)
                stay[removed.get((path, axis), [])] = False  # type: ignore[union-attr]
                walk.atoms.pin(atoms[stay], "kept by the masks")
    ins = [leaves[i] for i in range(len(names))]
    for leaf in jax.tree.leaves(inputs):
        ins.append(walk.pinned(jnp.shape(leaf), "an input", full=True))
    program = walk.program(closed.jaxpr, closed.consts, ins)
    for value in program.outs[:outputs]:
        walk.pin(value, "an output")
    choices = _solve(walk, dict(zip((n for n, _ in names), ins, strict=False)), split or {})
    return Structure(walk, program, ins[: len(names)], order, choices, out_tree)


def trace(
    fn: Callable[..., Any], params: Any, inputs: Sequence[Any], has_aux: bool
) -> tuple[Any, Any, int]:
    """Traces a function: the program, the structure of its result, and the leaves without aux."""
    found: list[Any] = []

    def traced(params: Any, *inputs: Any) -> Any:
        out = fn(params, *inputs)
        if has_aux and not (isinstance(out, (tuple, list)) and len(out) == 2):
            raise ValueError(f"has_aux=True needs fn to return a pair, got {type(out).__name__}.")
        count = len(jax.tree.leaves(out[0] if has_aux else out))
        found.extend((jax.tree.structure(out), count))
        return out

    closed = _jaxpr.trace(traced, params, *inputs)
    return closed, *found


def check_inputs(inputs: Sequence[Any]) -> None:
    """Raises a `TypeError` for an input that is no array."""
    for path, leaf in _tree.named_leaves(tuple(inputs)):
        if not isinstance(leaf, _tree.ARRAYS):
            raise TypeError(
                f"inputs[{path}]: needed an array or its shape, got {type(leaf).__name__} "
                f"({leaf!r:.60}). Close over what is no array, in "
                "`lambda params, x: fn(params, x, option)`."
            )


def _solve(
    walk: Walk, leaves: Mapping[str, Value], split: Split
) -> list[tuple[Merge, int, list[int]]]:
    choices: list[tuple[Merge, int, list[int]]] = []
    unused = dict(split)
    for path in split:
        if path not in leaves:
            raise ValueError(f"split: no leaf has the path {path!r}; there are {sorted(leaves)}.")

    def roots(axes: Sequence[np.ndarray]) -> np.ndarray:
        free = [walk.atoms.find(axis)[walk.atoms.free(axis)] for axis in axes]
        return np.concatenate(free) if free else np.empty(0, np.int32)

    def choose(merges: list[Merge], counts: list[list[int]]) -> tuple[int, int]:
        for path, factor in split.items():
            own = roots(leaves[path].axes)
            for which, (merge, units) in enumerate(zip(merges, counts, strict=True)):
                touched = roots([merge.merged, *merge.factors])
                if np.isin(own, touched).any() and -len(units) <= factor < len(units):
                    unused.pop(path, None)
                    if not units[factor]:
                        raise ValueError(
                            f"split: {path!r} cannot be cut along factor {factor} of "
                            f"{merge.where}: nothing can leave there. Units by factor: {units}."
                        )
                    choices.append((merge, factor % len(units), units))
                    return which, factor % len(units)
        merge, units = merges[0], counts[0]
        before = roots(walk.atoms.cut)
        follows = [np.isin(roots([factor]), before).any() for factor in merge.factors]
        best = [(bool(f and n), n) for f, n in zip(follows, units, strict=True)]
        factor = best.index(max(best))  # what was cut before, then the factor with more units
        choices.append((merge, factor, units))
        return 0, factor

    walk.atoms.solve(walk.merges, choose)
    if unused:
        ambiguous = "; ".join(f"{p.where}, units by factor {units}" for p, _, units in choices)
        raise ValueError(
            f"split: {sorted(unused)} name no ambiguous axis. Ambiguous are: {ambiguous or 'none'}."
        )
    return choices
