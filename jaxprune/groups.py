"""Units: slices of several leaves that are removed together, read from the traced program.

>>> import jax, jax.numpy as jnp
>>> import jaxprune as jp
>>> params = {"in": jnp.ones((3, 4)), "out": jnp.arange(8.0).reshape(4, 2)}
>>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
>>> groups = find_groups(apply_fn, params, jnp.ones((5, 3)))
>>> masks = groups.select(jp.scores.magnitude(params), 0.5)
>>> print(masks["out"])
[[False False]
[False False]
[ True  True]
[ True  True]]
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _grouping, _mesh, _program, _ranks, _select, _tree
from jaxprune._grouping import Group
from jaxprune._table import Shown, Table
from jaxprune._tree import Masks, Params, Scores
from jaxprune.units import _reduce

__all__ = ["Group", "Groups", "find_groups"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Groups(Shown):
    """The units of a network, from :func:`find_groups`; prints as tables.

    Attributes:
      like: the shapes of the params; like ``terms`` and ``options``, for use inside the package.
      unit: for each path and axis, the number of the unit of each index, from 1; 0 is pinned.
      groups: groups of identical units, in the order in which the program uses them.
      pinned: ``(path, axis, indices, reasons)`` for indices that cannot be removed.
      held: for each reason, the number of params that no unit removes because of it.
      choices: the axes that could be cut along several factors, and how to choose another factor.
      terms: the matmuls and convolutions of the program, with the units of their axes.
      options: the keyword arguments of :func:`find_groups`.
    """

    like: Params
    unit: dict[str, tuple[np.ndarray, ...]]
    groups: tuple[Group, ...]
    pinned: tuple[tuple[str, int, int, tuple[str, ...]], ...]
    held: dict[str, int]
    choices: tuple[str, ...]
    terms: tuple[_program.Cost, ...] = dataclasses.field(repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return sum(len(group.units) for group in self.groups)

    def _show(self) -> list[Table | str]:
        parts: list[Table | str] = []
        if self.pinned:
            pinned = [
                (_tree.show(path), str(axis), str(indices), "; ".join(reasons[:2]))
                for path, axis, indices, reasons in self.pinned
            ]
            parts.append(Table(("pinned", "axis", "indices", "why"), pinned, left=(0, 3)))
        if self.held:
            size = sum(leaf.size for leaf in jax.tree.leaves(self.like))
            held = [(f"{n:,}", f"{n / size:.1%}", why) for why, n in self.held.items()]
            parts.append(Table(("held params", "share", "by"), held, left=(2,)))
        if self.choices:
            parts.append("\n".join(self.choices))
        rows = []
        leaves = dict(_tree.named_leaves(self.like))
        for number, group in enumerate(self.groups):
            sizes = [leaves[p].size // leaves[p].shape[axis] * n for p, axis, n in group.members]
            first, *others = [
                f"{_tree.show(path)} {axis}" + (f" ×{n}" if n > 1 else "")
                for path, axis, n in group.members
            ]
            rows.append((str(number), str(len(group.units)), first, f"{sum(sizes):,}"))
            rows += [("", "", member, "") for member in others]
        rows.append(("total", f"{len(self)}", "", ""))
        header = ("group", "units", "members (path, axis, indices per unit)", "params per unit")
        return [*parts, Table(header, rows, left=(0, 2), total=True)]

    def masks(self, kept: Any) -> Masks:
        """Returns the masks that keep some units.

        An entry is kept if all units that it belongs to are kept. A leaf without units has the mask
        `None`.

        Args:
          kept: for each of ``len(self)`` units, whether it is kept.
        """
        return _ranks.masks_like(self, kept, None)

    def select(
        self,
        scores: Scores,
        sparsity: float | jax.Array | None = None,
        *,
        scope: str | Mapping[str, float] = "global",
        round_to: int = 1,
        reduce: str = "mean",
        cost: str = "units",
        within: Masks | None = None,
    ) -> Masks:
        """Selects the units to keep, and returns the masks of all their members.

        At least one unit of every group is kept. Equal scores are broken by a fixed random order.

        Args:
          scores: scores of the params, higher is kept; `None` for a leaf without scores. Or one
            score per unit, an array from :mod:`jaxprune.units` of shape ``(len(self),)``; a group
            whose units all score +inf is kept, and counts in no budget.
          sparsity: the fraction removed, in [0, 1). It may be traced if ``cost="units"``.
          scope: the units that compete for one budget: ``"global"`` ranks all units together,
            ``"layer"`` each group separately (in :func:`jaxprune.select` it means a leaf), and
            ``"isomorphic"`` groups of one kind together (the same axes of leaves of the same names,
            in other layers). A dict sets the sparsity of the groups that contain a path; all other
            groups have ``sparsity``, or 0.
          round_to: rounds the number of indices kept on an axis to the nearest feasible multiple.
          reduce: how a unit is scored by the scores of its slices: ``"mean"``, ``"sum"``,
            ``"max"``, or ``"first"``, as in :func:`jaxprune.units.reduce`. To choose the leaves
            that count or to normalize, call that function, and pass its result as the scores.
          cost: what the sparsity is a fraction of: ``"units"``, removed exactly, or the
            ``"params"`` or ``"flops"`` of the network, of which at least this fraction is removed.
          within: masks. Units already removed there stay removed, and count towards the sparsity.

        Raises:
          ValueError: for scores of other paths or shapes, NaN scores, a sparsity that is outside
            [0, 1) or cannot be reached, a path of ``scope`` that is in no group, an unknown word,
            or a ``reduce`` for one score per unit.

        References:
          Fang et al, `Isomorphic Pruning for Vision Models
          <https://arxiv.org/abs/2407.04616>`_, 2024
        """
        _tree.check_word("reduce", reduce, _reduce.HOW)
        _tree.check_word("cost", cost, ("units", "params", "flops"))
        if not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to must be a positive integer, got {round_to!r}.")
        if not self.groups:
            raise ValueError(
                f"groups must have at least one unit, got none; the table says why.\n{self}"
            )
        score = _reduce.reduce(self, scores, reduce)
        present = None if within is None else self._kept(within)
        pools, fractions = self._pools(scope, sparsity)
        order = _ranks.order(self, score, pools, present, round_to)
        if cost == "units":
            kept = _ranks.kept(order, fractions)
        elif isinstance(scope, Mapping):
            raise ValueError(
                f"cost={cost!r}: scope must be a word, got a dict. Pass one sparsity for all."
            )
        elif _tree.is_traced(scores, sparsity, within):
            raise ValueError(f"cost={cost!r} searches on the host: call it outside of jit.")
        else:
            kept = self._search(order, fractions, cost, _select.check_sparsity(sparsity))
        kept = kept if present is None else kept & present
        if not _tree.is_traced(kept):
            self._warn(np.asarray(kept), order, fractions, sparsity, round_to)
        like = within if _reduce.is_per_unit(self, scores) else scores
        return _ranks.masks_like(self, kept, like)

    def _kept(self, masks: Masks) -> Any:
        """Returns which units have any entry that masks keep."""
        slices = _ranks.kept_slices(_tree.align_masks(self.like, masks))
        members = [
            (unit, np.ones(len(unit), bool) if axes is None else stay)
            for (path, _), axes in zip(_tree.named_leaves(self.like), slices, strict=True)
            for unit, stay in zip(self.unit[path], axes or self.unit[path], strict=True)
        ]
        units = np.concatenate([unit for unit, _ in members])
        if _tree.is_traced(slices):
            traced = jnp.concatenate([_mesh.replicated(jnp.asarray(stay)) for _, stay in members])
            return jnp.zeros(len(self) + 1, bool).at[units].max(traced)[1:]
        read = np.concatenate([_mesh.read(stay) for _, stay in members])
        return np.isin(np.arange(1, len(self) + 1), units[read])

    def _pools(self, scope: str | Mapping[str, float], sparsity: Any) -> tuple[np.ndarray, Any]:
        """Returns the pool of each group, and the sparsity of each pool."""
        count = len(self.groups)
        if isinstance(scope, Mapping):
            rest = 0.0 if sparsity is None else _select.check_sparsity(sparsity)
            wanted: dict[int, float] = {}
            paths = [{path for path, *_ in group.members} for group in self.groups]
            for path, fraction in scope.items():
                owners = [i for i in range(count) if path in paths[i]]
                if not owners:
                    raise ValueError(
                        f"scope: a path must be in a group, got {path!r}. print(groups) lists them."
                    )
                for i in owners:
                    wanted[i] = max(wanted.get(i, 0.0), _select.check_sparsity(fraction))
            return np.arange(count), np.array([wanted.get(i, rest) for i in range(count)])
        if sparsity is None:
            raise ValueError("sparsity must be a number in [0, 1), got None.")
        kinds: dict[str, Any] = {  # groups of one kind compete
            "global": np.zeros(count),
            "layer": np.arange(count),
            "isomorphic": [
                str(sorted((p.split("/")[-1], len(self.unit[p]), axis) for p, axis, _ in g.members))
                for g in self.groups
            ],
        }
        if scope not in list(kinds):
            words = '"global", "layer", "isomorphic" or a dict of paths'
            raise ValueError(f"scope must be {words}, got {scope!r}.")
        pools = np.unique(kinds[scope], return_inverse=True)[1]
        sparsity, count = _select.check_sparsity(sparsity), pools.max() + 1
        if _tree.is_traced(sparsity):
            return pools, jnp.full(count, sparsity)
        return pools, np.full(count, sparsity)

    def costs(self, kept: np.ndarray, cost: str) -> float:
        """Returns the ``"params"`` or the ``"flops"`` of the network with some units kept.

        Units are kept as in :meth:`masks`. Warns of `while` loops, whose FLOPs are counted once.
        """
        _tree.check_word("cost", cost, ("params", "flops"))
        if cost == "flops":
            _program.warn_of_loops(self.terms, stacklevel=2)
        return self._costs(kept, cost)

    def _costs(self, kept: np.ndarray, cost: str) -> float:
        stays = np.concatenate([[True], kept])

        def size(unit: np.ndarray) -> int:
            return int(stays[unit].sum())

        if cost == "flops":
            return 2 * _program.total(self.terms, lambda c: c.macs(size))
        return sum(math.prod(map(size, axes)) for axes in self.unit.values())

    def _search(self, order: _ranks.Order, fractions: Any, cost: str, sparsity: float) -> jax.Array:
        """Finds by bisection the smallest fraction of units whose removal saves enough."""
        if cost == "flops":
            _program.warn_of_loops(self.terms, stacklevel=3)
        total = self._costs(np.ones(len(self), bool), cost)

        def saves(fraction: float) -> float:
            kept = np.asarray(_ranks.kept(order, np.full(np.shape(fractions), fraction)))
            return 1 - self._costs(kept, cost) / total

        if saves(1.0) < sparsity:
            raise ValueError(
                f"sparsity must be at most {saves(1.0):.1%} of the {cost}, got {sparsity:.1%}: one "
                "unit of every group is kept. print(groups) shows what else is pinned, and why."
            )
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if saves(middle) >= sparsity else (middle, high)
        return _ranks.kept(order, np.full(np.shape(fractions), high))

    def _warn(
        self, kept: np.ndarray, order: _ranks.Order, fractions: Any, sparsity: Any, round_to: int
    ) -> None:
        if kept.all() and np.any(np.asarray(fractions) > 0):
            warnings.warn(
                f"groups.select removed no unit at a sparsity of {sparsity}: there are {len(self)} "
                f"units in {len(self.groups)} groups, and each group keeps at least one.",
                stacklevel=3,
            )
        if round_to == 1:
            return
        asked = np.asarray(_ranks.wanted(order, fractions))
        got = np.bincount(order.group[kept], minlength=len(self.groups))
        changed = [
            f"{group.members[0][0]} {int(a)} -> {int(b)}"
            for group, a, b in zip(self.groups, asked, got, strict=True)
            if a != b
        ]
        if changed:
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            warnings.warn(
                f"round_to={round_to} changed the number of units kept: "
                f"{', '.join(changed[:8])}{more}.",
                stacklevel=3,
            )


def find_groups(
    apply_fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    exact: bool = True,
    has_aux: bool = False,
    split: Mapping[str, int] | None = None,
) -> Groups:
    """Finds the units of a network from the program of ``apply_fn``.

    The function is traced, not run. Units whose removal would change the result beyond masking (a
    sum over channels, after the addition of a table of constants) are pinned unless
    ``exact=False``. Inputs, outputs and anything used by a primitive without a rule are pinned too;
    the printed tables say why, and how many params each reason holds.

    Args:
      apply_fn: maps ``(params, *inputs)`` to arrays, as in evaluation.
      params: arrays or shapes.
      *inputs: arrays or shapes.
      exact: if true, only units for which the shrunk network equals the masked one can be removed.
      has_aux: whether ``apply_fn`` returns ``(output, aux)``. Unlike the output, aux (new batch
        statistics, a cache) may be cut along with the params.
      split: where a reshape merges two axes that could both be cut (heads and head dims), units are
        taken along the factor with more of them. ``split={path: factor}`` chooses another factor
        for the merged axes of a leaf, 0 for the slowest.

    Raises:
      TypeError: for params or inputs that are not arrays.
      ValueError: for a split that does not name an ambiguous axis.

    Examples:
      >>> params = {"in": jnp.ones((3, 4)), "bias": jnp.ones(4), "out": jnp.ones((4, 2))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"] + p["bias"]) @ p["out"]
      >>> print(find_groups(apply_fn, params, jnp.ones((5, 3))))
      pinned  axis  indices  why
      ────────────────────────────────
      in         0        3  an input
      out        1        2  an output
      <BLANKLINE>
      group  units  members (path, axis, indices per unit)  params per unit
      ─────────────────────────────────────────────────────────────────────
      0          4  in 1                                                  6
                    bias 0
                    out 0
      ─────────────────────────────────────────────────────────────────────
      total      4

    References:
      Fang et al, `DepGraph: Towards Any Structural Pruning
      <https://arxiv.org/abs/2301.12900>`_, 2023 (there by rules for layers)
    """
    _tree.check_params(params)
    options: dict[str, Any] = {"exact": exact, "has_aux": has_aux, "split": split}
    structure = _program.analyse(apply_fn, params, inputs, **options)
    atoms, names = structure.walk.atoms, [path for path, _ in _tree.named_leaves(params)]
    unit = _grouping.number(structure, names)
    groups = _grouping.identical(unit)
    spread = structure.spread([unit[path] for path in names])
    pinned = tuple(
        (path, axis, int((~free).sum()), tuple(atoms.reason(numbers)))
        for path, leaf in zip(names, structure.leaves, strict=True)
        for axis, numbers in enumerate(leaf.axes)
        if not (free := atoms.free(numbers)).all()
    )
    return Groups(
        like=jax.tree.map(lambda w: jax.ShapeDtypeStruct(jnp.shape(w), _tree.dtype(w)), params),
        unit=unit,
        groups=groups,
        pinned=pinned,
        held=_grouping.held(structure, names, unit),
        choices=_grouping.choices(structure, spread, groups),
        terms=tuple(_program.contractions_of_units(structure.program, spread)),
        options=options,
    )
