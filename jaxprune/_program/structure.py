"""The structure of ``apply_fn(params, *inputs)``: its walked program, every ambiguity decided."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Choice, Merge
from jaxprune._program.rules import RULES
from jaxprune._program.values import ZERO, Program, Value
from jaxprune._program.walk import Walk
from jaxprune._tree import Params


@dataclasses.dataclass(frozen=True)
class Structure:
    """A walked program."""

    walk: Walk  # with its final atoms
    program: Program
    leaves: list[Value]  # the leaves of the params, in the order of the tree
    order: list[int]  # the leaves that are used, in the order of first use
    choices: list[Choice]  # the merged axes that could be cut along several factors
    out_tree: Any  # the structure of what the function returns

    def spread(self, units: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Spreads the units of the indices of every leaf and axis to all atoms; 0 is none."""
        roots = self.walk.atoms.all_roots()
        unit = np.zeros(len(roots), np.int32)
        for leaf, axes in zip(self.leaves, units, strict=True):
            for axis, numbers in zip(leaf.axes, axes, strict=True):
                unit[roots[axis[numbers > 0]]] = numbers[numbers > 0]
        return unit[roots]


def analyse(
    apply_fn: Callable[..., Any],
    params: Params,  # arrays or shapes, as are the inputs
    inputs: Sequence[Any],
    *,
    exact: bool = True,  # whether to pin what changes the result when removed, or to record it
    has_aux: bool = False,  # whether a pair is returned, the second of which may be cut
    split: Mapping[str, int] | None = None,  # by path, the factor along which to cut merged axes
    removed: Mapping[tuple[str, int], np.ndarray] | None = None,  # by path and axis: pins the rest
) -> Structure:
    """Traces and walks a function, and decides every ambiguity."""
    check_inputs(inputs)
    closed, out_tree, outputs = trace(apply_fn, params, inputs, has_aux)
    walk = Walk(RULES, exact, derivatives=removed is not None)
    names = _tree.named_leaves(params)
    order = [i for i in _jaxpr.order_of_use(closed.jaxpr) if i < len(names)]
    leaves: dict[int, Value] = {}
    for i in dict.fromkeys([*order, *range(len(names))]):
        path, leaf = names[i]
        shape = jnp.shape(leaf)
        if not _tree.is_floating(leaf):
            leaves[i] = walk.pinned(shape, "not floating-point", full=True)
        elif i not in order:
            leaves[i] = walk.pinned(shape, "not used")
        else:
            leaves[i] = walk.fresh(shape, ZERO)
            for axis, atoms in enumerate(leaves[i].axes if removed is not None else ()):
                indices: Any = (removed or {}).get((path, axis), [])
                walk.atoms.pin(np.delete(atoms, indices), "kept by the masks")
    values = [leaves[i] for i in range(len(names))]
    fed = [walk.pinned(jnp.shape(x), "an input", full=True) for x in jax.tree.leaves(inputs)]
    program = walk.program(closed, values + fed)
    for value in program.outs[:outputs]:
        walk.pin(value, "an output")
    by_path = {path: value for (path, _), value in zip(names, values, strict=True)}
    choices = _solve(walk, by_path, split or {})
    return Structure(walk, program, values, order, choices, out_tree)


def trace(
    apply_fn: Callable[..., Any], params: Params, inputs: Sequence[Any], has_aux: bool
) -> tuple[Any, Any, int]:
    """Traces a function: the program, the structure of its result, and the leaves without aux."""
    result: list[Any] = []

    def traced(*args: Any) -> Any:
        out = apply_fn(*args)
        if has_aux and not (isinstance(out, (tuple, list)) and len(out) == 2):
            raise ValueError(
                f"has_aux=True: apply_fn must return a pair, got {type(out).__name__}."
            )
        result[:] = jax.tree.structure(out), len(jax.tree.leaves(out[0] if has_aux else out))
        return out

    return _jaxpr.trace(traced, params, *inputs), *result


def check_inputs(inputs: Sequence[Any]) -> None:
    """Raises a `TypeError` for an input that is not an array."""
    for path, leaf in _tree.named_leaves(tuple(inputs)):
        if not isinstance(leaf, _tree.ARRAYS):
            raise TypeError(
                f"inputs[{path}]: must be an array or its shape, got {type(leaf).__name__} "
                f"({leaf!r:.60}). Close over other things, as in "
                "`lambda params, x: apply_fn(params, x, option)`."
            )


def _solve(walk: Walk, leaves: Mapping[str, Value], split: Mapping[str, int]) -> list[Choice]:
    """Decides along which factor every merge is cut, and returns those that were ambiguous."""
    unused = set(split)
    for path in split:
        if path not in leaves:
            raise ValueError(
                f"{_tree.show(path)}: split must name leaves of the params, got another path. Use "
                f"one of {sorted(leaves)}."
            )

    def roots(axes: Sequence[np.ndarray]) -> np.ndarray:
        free = [walk.atoms.find(axis)[walk.atoms.free(axis)] for axis in axes]
        return np.concatenate(free) if free else np.empty(0, np.int32)

    def choose(merges: list[Merge], counts: list[list[int]]) -> tuple[int, int]:
        for path, factor in split.items():
            wanted = roots(leaves[path].axes)
            for which, (merge, units) in enumerate(zip(merges, counts, strict=True)):
                touched = roots([merge.merged, *merge.factors])
                if np.isin(wanted, touched).any() and -len(units) <= factor < len(units):
                    unused.discard(path)
                    if not units[factor]:
                        raise ValueError(
                            f"{_tree.show(path)}: split must name a factor with units, got "
                            f"{factor} of {merge.where}, whose factors have {units} units."
                        )
                    return which, factor % len(units)
        # Unless told: the first, along a factor with units that other merges were cut along, so
        # that they agree; else along the factor with most units.
        before = roots(walk.atoms.cut)
        follows = [np.isin(roots([factor]), before).any() for factor in merges[0].factors]
        ranks = [(bool(f and n), n) for f, n in zip(follows, counts[0], strict=True)]
        return 0, ranks.index(max(ranks))

    choices = walk.atoms.solve(walk.merges, choose)
    if unused:
        ambiguous = "; ".join(f"{m.where}, units by factor {units}" for m, _, units in choices)
        raise ValueError(
            f"split must name leaves with ambiguous axes, got {sorted(unused)}. Ambiguous are: "
            f"{ambiguous or 'none'}."
        )
    return choices
