"""Units: slices of param axes that must leave together, read from the traced program.

>>> import jax, jax.numpy as jnp
>>> import jaxprune as jp
>>> params = {"in": jnp.ones((3, 4)), "out": jnp.arange(8.0).reshape(4, 2)}
>>> fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
>>> groups = find_groups(fn, params, jnp.ones((5, 3)))
>>> masks = groups.select(jp.scores.magnitude(params), 0.5)
>>> print(masks["out"])
[[False False]
[False False]
[ True  True]
[ True  True]]
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _select, _sums, _tree
from jaxprune._program import Product
from jaxprune._ranks import Ranks, per_group
from jaxprune._table import Shown, Table


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that are alike: each holds as many indices of the same axes.

    Attributes:
      units: their numbers.
      members: ``(path, axis, indices per unit)``, in the order in which the program uses them.

    Examples:
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> found = find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((5, 3)))
      >>> found.groups[0].members
      (('in', 1, 1), ('out', 0, 1))
    """

    units: np.ndarray
    members: tuple[tuple[str, int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Groups(Shown):
    """What :func:`find_groups` found; shows as tables.

    Attributes:
      like: the params, as shapes.
      unit: for every path, and every axis, the number of the unit of each index; 0 stays.
      groups: units that are alike, in the order in which the program uses them.
      pinned: ``(path, axis, indices, reasons)`` of what cannot leave.
      choices: what could be cut along several factors, and how to choose another.
      terms: what the program costs: its matmuls and convolutions, with the units of their axes.
      options: those of :func:`find_groups`.

    Examples:
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> found = find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((5, 3)))
      >>> len(found), found.unit["out"][0].tolist()
      (4, [1, 2, 3, 4])
      >>> print(found.masks(np.arange(4) != 2)["out"][:, 0])
      [ True  True False  True]
    """

    like: Any
    unit: dict[str, tuple[np.ndarray, ...]]
    groups: tuple[Group, ...]
    pinned: tuple[tuple[str, int, int, tuple[str, ...]], ...]
    choices: tuple[str, ...]
    terms: tuple[_program.Cost, ...] = dataclasses.field(repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return sum(len(group.units) for group in self.groups)

    def _show(self) -> list[Table | str]:
        shown: list[Table | str] = []
        if self.pinned:
            pinned = [
                (_tree.show(path), str(axis), str(indices), "; ".join(reasons[:2]))
                for path, axis, indices, reasons in self.pinned
            ]
            shown.append(Table(("pinned", "axis", "indices", "why"), pinned, left=(0, 3)))
        if self.choices:
            shown.append("\n".join(self.choices))
        rows = []
        sizes = {path: leaf.shape for path, leaf in _tree.named_leaves(self.like)}
        for number, group in enumerate(self.groups):
            each = sum(math.prod(sizes[p]) // sizes[p][axis] * n for p, axis, n in group.members)
            for row, (path, axis, n) in enumerate(group.members):
                member = f"{_tree.show(path)} {axis}" + (f" ×{n}" if n > 1 else "")
                head = (str(number), str(len(group.units))) if row == 0 else ("", "")
                rows.append((*head, member, f"{each:,}" if row == 0 else ""))
        rows.append(("total", f"{len(self)}", "", ""))
        header = ("group", "units", "members (path, axis, indices per unit)", "params per unit")
        return [*shown, Table(header, rows, left=(0, 2), total=True)]

    def masks(self, kept: Any) -> Any:
        """Gives the masks that keep some units: for each of ``len(self)``, whether it is kept.

        An entry is kept iff none of its axes left. Leaves without a unit have the mask `None`.
        """
        return self._masks(kept, None)

    def _masks(self, kept: Any, tree: Any) -> Any:
        """Gives the masks, sharded as a tree of the params' structure is, if there is one."""
        leaves = [None] * len(self.unit) if tree is None else _tree.align(self.like, tree)
        return _tree.rebuild(self.like, _masks(self, jnp.asarray(kept), leaves))

    def select(
        self,
        scores: Any,
        sparsity: float | jax.Array | None = None,
        *,
        scope: str | Mapping[str, float] = "global",
        round_to: int = 1,
        where: Callable[[str, Any], bool] | None = None,
        reduce: str = "mean",
        normalize: str | None = None,
        cost: str = "units",
        within: Any = None,
    ) -> Any:
        r"""Chooses the units that stay, and gives the masks of all their members.

        The score of a unit is made from its slices, one of every leaf and axis in which it takes
        part: :math:`s_u = \mathrm{reduce}_{m \in u} \sum_{i \in m} s_i`. Of every group at least
        one unit stays. With ``scores.magnitude(params)`` and ``reduce="first"`` this is the filter
        pruning of Li et al.

        Args:
          scores: scores of the params, higher is kept; `None` for leaves without. Or an array of
            shape ``(len(self),)``: one score per unit, taken as it is.
          sparsity: the fraction removed, in [0, 1). It may be traced, if ``cost="units"``.
          scope: ``"global"`` compares all units, ``"layer"`` those of a group, ``"isomorphic"``
            those of groups of one kind (same axes of leaves of the same names, in other layers); a
            dict gives the groups that contain a path their own sparsity, and ``sparsity`` (else
            0) to the others.
          round_to: makes what is kept of an axis a multiple of this, to the nearest feasible.
          where: ``where(path, score)`` says which leaves are scored: by default matrices and up,
            if there are any.
          reduce: ``"mean"``, ``"sum"``, ``"max"``, or ``"first"``, the slice that is used first:
            the filter that makes the unit.
          normalize: divides the scores of every group by their ``"mean"``, ``"max"``, ``"sum"``, or
            by their ``"l2"`` norm.
          cost: what the sparsity is a fraction of: ``"units"``, exactly, or all ``"params"`` or
            ``"flops"`` of the network, at least.
          within: masks; units that they removed stay removed, and count.

        Raises:
          ValueError: for scores of other paths or shapes, NaN scores, a sparsity outside [0, 1) or
            beyond what can leave, a path of ``scope`` that is in no group, unknown words, or
            ``where`` or ``reduce`` beside one score per unit.

        References:
          Li et al, `Pruning Filters for Efficient ConvNets
          <https://arxiv.org/abs/1608.08710>`_, 2016

          Fang et al, `Isomorphic Pruning for Vision Models
          <https://arxiv.org/abs/2407.04616>`_, 2024
        """
        for name, word, words in (
            ("reduce", reduce, ("mean", "sum", "max", "first")),
            ("normalize", normalize, (None, "mean", "max", "sum", "l2")),
            ("cost", cost, ("units", "params", "flops")),
        ):
            if word not in words:
                raise ValueError(f"{name} must be one of {words}, got {word!r}.")
        if not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to must be a positive integer, got {round_to!r}.")
        if not self.groups:
            raise ValueError(f"Nothing can leave, so there is nothing to select.\n{self}")
        group = self._group()
        if self._is_per_unit(scores):
            score, scored = self._given(scores, where, reduce)
        else:
            score, scored = self._scores(scores, where, reduce)
        if normalize is not None:
            score = score / per_group(normalize, score, group, len(self.groups))[group]
        given = jnp.ones(len(self), bool) if within is None else self._kept(within)
        score = jnp.where(given & ~jnp.isnan(score), score, -jnp.inf)
        classes, fractions = self._classes(scope, sparsity, scored)
        ranks = Ranks(score, group, classes, len(self.groups), round_to, self._multiples())
        if cost == "units":
            kept = ranks.kept(fractions)
        elif isinstance(scope, Mapping):
            raise ValueError(f"cost={cost!r} needs one sparsity for all, not a dict of them.")
        elif _tree.is_traced(scores, sparsity, within):
            raise ValueError(f"cost={cost!r} searches on the host: call it outside of jit.")
        else:
            kept = self._search(ranks, fractions, cost, _select.check_sparsity(sparsity))
        kept = kept & given
        if not _tree.is_traced(kept):
            self._tell(np.asarray(kept), ranks, fractions, sparsity, round_to)
        return self._masks(kept, within if self._is_per_unit(scores) else scores)

    def _group(self) -> np.ndarray:
        group = np.zeros(len(self), np.int32)
        for number, found in enumerate(self.groups):
            group[found.units - 1] = number
        return group

    def _multiples(self) -> np.ndarray:
        return np.array([min(n for *_, n in group.members) for group in self.groups])

    def _is_per_unit(self, scores: Any) -> bool:
        if not isinstance(scores, (jax.Array, np.ndarray)):
            return False
        return not (hasattr(self.like, "shape") and self.like.shape == scores.shape)

    def _given(
        self, scores: jax.Array, where: Callable[[str, Any], bool] | None, reduce: str
    ) -> tuple[jax.Array, np.ndarray]:
        """Checks one score per unit."""
        if scores.shape != (len(self),):
            raise ValueError(
                f"scores: an array is one score per unit, of shape ({len(self)},) here, got shape "
                f"{scores.shape}. Make the scores from these groups, or pass a tree of scores."
            )
        if where is not None or reduce != "mean":
            raise ValueError("where= and reduce= need scores of the params, not one per unit.")
        if not _tree.is_traced(scores):
            bad = ~np.isfinite(np.asarray(scores, np.float32))
            if bad.any():
                raise ValueError(
                    f"scores: {bad.sum()} of {len(self)} units have a score that is NaN or "
                    f"infinite, the first is unit {np.flatnonzero(bad)[0]}. Check the loss."
                )
        return jnp.asarray(scores, jnp.float32), np.ones(len(self), bool)

    def _scores(
        self, scores: Any, where: Callable[[str, Any], bool] | None, reduce: str
    ) -> tuple[jax.Array, np.ndarray]:
        """Gives one score per unit, and which units have one."""
        names = [path for path, _ in _tree.named_leaves(self.like)]
        aligned = zip(names, _tree.align(self.like, scores, "scores"), strict=True)
        found = {p: s for p, s in aligned if s is not None and (where is None or where(p, s))}
        if where is None and (matrices := {p: s for p, s in found.items() if jnp.ndim(s) >= 2}):
            found = matrices
        members = self._members()
        used = [i for i, (path, _) in enumerate(members) if path in found]
        if not used:
            raise ValueError(
                f"No scored leaf is in any group: scores are given for {sorted(found)}. "
                "Score the leaves listed by print(groups), or choose others with where=."
            )
        units = [self.unit[members[i][0]][members[i][1]] for i in used]
        member = np.repeat(used, [len(unit) for unit in units])
        every = np.concatenate(units).astype(np.int64)
        keys, slices = np.unique(every * len(members) + member, return_inverse=True)
        owner = keys // len(members)  # sorted by unit, then in the order of use
        # One array after the other: those of alike layers share a program, which in one for all
        # would be compiled for each.
        sums = tuple(_slice_sums(found[path], axis) for path, axis in (members[i] for i in used))
        score, finite = _reduced(reduce, len(self), sums, slices, owner)
        if not _tree.is_traced(finite) and not np.asarray(finite).all():
            path, _ = members[used[int(np.argmin(finite))]]
            raise ValueError(
                f"{_tree.show(path)}: scores are NaN or infinite. Check the "
                "loss and the params, or leave this leaf out with `where=lambda path, s: ...`."
            )
        return score, np.bincount(owner, minlength=len(self) + 1)[1:] > 0

    def _members(self) -> list[tuple[str, int]]:
        found = [(path, axis) for group in self.groups for path, axis, _ in group.members]
        order = {path: i for i, path in enumerate(self.unit)}
        return sorted(set(found), key=lambda m: (order[m[0]], m[1]))

    def _kept(self, masks: Any) -> jax.Array:
        """Says which units some masks keep: those that have any entry left."""
        kept = jnp.zeros(len(self) + 1, bool)
        aligned = _tree.align_masks(self.like, masks)
        for (path, _), mask in zip(_tree.named_leaves(self.like), aligned, strict=True):
            for axis, unit in enumerate(self.unit[path]):
                others = [i for i in range(len(self.unit[path])) if i != axis]
                any_left = jnp.ones(len(unit), bool) if mask is None else jnp.any(mask, others)
                kept = kept.at[unit].max(_mesh.replicated(any_left))
        return kept[1:]

    def _classes(
        self, scope: str | Mapping[str, float], sparsity: Any, scored: np.ndarray
    ) -> tuple[np.ndarray, Any]:
        """Gives the class among which every unit is compared, and the sparsity of each class."""
        group = self._group()
        if isinstance(scope, Mapping):
            rest = 0.0 if sparsity is None else _select.check_sparsity(sparsity)
            wanted: list[float | None] = [None] * len(self.groups)
            for path, fraction in scope.items():
                owners = [
                    i for i, g in enumerate(self.groups) if any(p == path for p, *_ in g.members)
                ]
                if not owners:
                    raise ValueError(
                        f"scope: {path!r} is in no group; print(groups) lists their members."
                    )
                for i in owners:
                    wanted[i] = max(wanted[i] or 0.0, _select.check_sparsity(fraction))
            classes = np.where(scored, group, -1)
            return classes, np.array([rest if w is None else w for w in wanted])
        if sparsity is None:
            raise ValueError("groups.select needs a sparsity, in [0, 1).")
        if not _tree.is_traced(sparsity):
            sparsity = _select.check_sparsity(sparsity)
        if scope == "global":
            kinds = np.zeros(len(self.groups), int)
        elif scope == "layer":
            kinds = np.arange(len(self.groups))
        elif scope == "isomorphic":
            sizes = {path: leaf.shape for path, leaf in _tree.named_leaves(self.like)}
            looks = [
                str(sorted((p.split("/")[-1], len(sizes[p]), axis) for p, axis, _ in g.members))
                for g in self.groups
            ]
            kinds = np.unique(looks, return_inverse=True)[1]
        else:
            words = '"global", "layer", "isomorphic" or a dict of paths'
            raise ValueError(f"scope must be {words}, got {scope!r}.")
        classes = np.where(scored, kinds[group], -1)
        return classes, jnp.full(kinds.max() + 1, sparsity, jnp.float32)

    def costs(self, kept: np.ndarray, cost: str) -> float:
        """Returns the params, or the FLOPs, of the network when only some units are kept.

        Warns of `while` loops, whose FLOPs are counted once.

        Args:
          kept: for each of ``len(self)`` units whether it is kept.
          cost: ``"params"`` or ``"flops"``.
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

    def _search(self, ranks: Ranks, fractions: Any, cost: str, sparsity: float) -> jax.Array:
        """Finds the smallest fraction of units whose removal saves enough."""
        if cost == "flops":
            _program.warn_of_loops(self.terms, stacklevel=3)
        total = self._costs(np.ones(len(self), bool), cost)

        def saves(fraction: float) -> float:
            kept = np.asarray(ranks.kept(np.full(np.shape(fractions), fraction)))
            return 1 - self._costs(kept, cost) / total

        if saves(1.0) < sparsity:
            raise ValueError(
                f"At most {saves(1.0):.1%} of the {cost} can leave with one unit of every group "
                f"kept, {sparsity:.1%} were asked for. print(groups) shows what is pinned, and why."
            )
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if saves(middle) >= sparsity else (middle, high)
        return ranks.kept(np.full(np.shape(fractions), high))

    def _tell(
        self, kept: np.ndarray, ranks: Ranks, fractions: Any, sparsity: Any, round_to: int
    ) -> None:
        if kept.all() and np.any(np.asarray(fractions) > 0):
            warnings.warn(
                f"groups.select removed nothing at a sparsity of {sparsity}: there are "
                f"{len(self)} units in {len(self.groups)} groups, of which one each stays.",
                stacklevel=3,
            )
        if round_to == 1:
            return
        asked = np.asarray(ranks.wanted(fractions))
        got = np.bincount(self._group()[kept], minlength=len(self.groups))
        changed = [
            f"{group.members[0][0]} {int(a)} -> {int(b)}"
            for group, a, b in zip(self.groups, asked, got, strict=True)
            if a != b
        ]
        if changed:
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            warnings.warn(
                f"round_to={round_to} changed the units kept: {', '.join(changed[:8])}{more}.",
                stacklevel=3,
            )


@functools.partial(jax.jit, static_argnums=0)
def _masks(groups: Groups, kept: jax.Array, follow: list[Any]) -> list[Any]:
    kept = jnp.concatenate([jnp.ones(1, bool), kept])
    leaves: list[Any] = []
    for (path, leaf), sharded in zip(_tree.named_leaves(groups.like), follow, strict=True):
        mask = None
        for axis, unit in enumerate(groups.unit[path]):
            if unit.any():
                shape = [1] * len(leaf.shape)
                shape[axis] = -1
                stays = jnp.broadcast_to(kept[unit].reshape(shape), leaf.shape)
                mask = stays if mask is None else mask & stays
        if mask is not None and sharded is not None:
            mask = _mesh.follow(mask, sharded)
        leaves.append(mask)
    return leaves


def _slice_sums(scores: jax.Array, axis: int) -> jax.Array:
    others = tuple(i for i in range(jnp.ndim(scores)) if i != axis)
    return _mesh.replicated(_sums.exact_sum(scores, others))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reduced(reduce, count, sums, slices, owner):  # type: ignore[no-untyped-def]
    """Gives one score per unit, and whether the scores of every array are finite.

    Args:
      reduce: how slices of a unit become one score.
      count: how many units there are.
      sums: of the slices of every array.
      slices: for all of these, one array after the other, which sum they go into.
      owner: the unit of every such sum, or 0; rising.
    """
    values = jax.ops.segment_sum(jnp.concatenate(sums), slices, len(owner))
    if reduce == "first":
        first = jnp.searchsorted(owner, jnp.arange(1, count + 1))
        score = values[jnp.minimum(first, len(owner) - 1)]
    elif reduce == "max":
        score = jax.ops.segment_max(values, owner, count + 1)[1:]
    else:
        score = jax.ops.segment_sum(values, owner, count + 1)[1:]
    if reduce == "mean":
        score /= jnp.maximum(jnp.bincount(owner, length=count + 1)[1:], 1)
    return score, jnp.stack([jnp.all(jnp.isfinite(s)) for s in sums])


def find_groups(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    exact: bool = True,
    has_aux: bool = False,
    split: Mapping[str, int] | None = None,
) -> Groups:
    """Finds which slices of the params must leave together, from the program of ``fn``.

    The function is traced, not run. What would change the result if it left, beyond what its masks
    do (a softmax over channels, a variance of two passes), stays, unless ``exact=False``; inputs,
    outputs, and what an operation without a rule touches stay, and the table says why.

    Args:
      fn: maps ``(params, *inputs)`` to arrays, as in evaluation.
      params: arrays or shapes.
      *inputs: arrays or shapes.
      exact: whether only units leave whose masks alone give the same result.
      has_aux: whether ``fn`` returns ``(output, aux)``, where aux (new batch statistics, a cache)
        may be cut along with the params.
      split: where a reshape merges two axes that could both be cut (heads and head dims), the units
        are taken along the factor with more of them; ``split={path: factor}`` chooses another
        for the merged axes of a leaf, 0 for the slowest.

    Returns:
      Groups, with a method ``select``.

    Raises:
      TypeError: for params or inputs that are not arrays.
      ValueError: for a split that names no ambiguous axis.

    Examples:
      >>> params = {"in": jnp.ones((3, 4)), "bias": jnp.ones(4), "out": jnp.ones((4, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["in"] + p["bias"]) @ p["out"]
      >>> print(find_groups(fn, params, jnp.ones((5, 3))))
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
    found = _program.analyse(fn, params, inputs, **options)
    return _collect(found, params, options)


def _collect(found: _program.Structure, params: Any, options: Mapping[str, Any]) -> Groups:
    names, atoms = _tree.named_leaves(params), found.walk.atoms
    order = [*found.order, *(i for i in range(len(names)) if i not in set(found.order))]
    roots = {
        (names[i][0], axis): np.where(atoms.free(a), atoms.find(a), 0)
        for i in order
        for axis, a in enumerate(found.leaves[i].axes)
    }
    every = np.unique(np.concatenate([np.zeros(1, np.int32), *roots.values()]))
    numbers = {key: np.searchsorted(every, r).astype(np.int32) for key, r in roots.items()}
    unit = {
        names[i][0]: tuple(numbers[names[i][0], a] for a in range(len(found.leaves[i].axes)))
        for i in order
    }
    groups = _group(numbers, len(every))
    owner = np.zeros(len(every), np.int32)
    for number, group in enumerate(groups):
        owner[group.units] = number
    choices = []
    for product, factor, units in found.choices:
        cut = product.factors[factor]
        place = np.searchsorted(every, atoms.find(cut[atoms.free(cut)]))
        members = [m for g in np.unique(owner[place]) for m in groups[g].members]
        paths = list(dict.fromkeys(path for path, *_ in members))
        choices.append(_describe(product, factor, units, paths))
    spread = found.spread([unit[path] for path, _ in names])
    return Groups(
        like=jax.tree.map(lambda w: jax.ShapeDtypeStruct(jnp.shape(w), _tree.dtype(w)), params),
        unit=unit,
        groups=groups,
        pinned=tuple(
            (path, axis, int((~free).sum()), tuple(atoms.reason(a)))
            for (path, _), leaf in zip(names, found.leaves, strict=True)
            for axis, a in enumerate(leaf.axes)
            if not (free := atoms.free(a)).all()
        ),
        choices=tuple(choices),
        terms=tuple(_program.contractions_of_units(found.program, spread)),
        options=options,
    )


def _group(numbers: Mapping[tuple[str, int], np.ndarray], units: int) -> tuple[Group, ...]:
    """Puts units together that have as many indices in the same axes."""
    random = np.random.default_rng(0).integers(1 << 63, size=len(numbers), dtype=np.uint64)
    look = np.zeros(units, np.uint64)  # a sum of random numbers, one for every index of a unit
    for key, number in zip(random, numbers.values(), strict=True):
        look += np.bincount(number, minlength=units).astype(np.uint64) * key
    _, first, group = np.unique(look[1:], return_index=True, return_inverse=True)
    holders: list[list[tuple[str, int, int]]] = [[] for _ in first]
    for (path, axis), number in numbers.items():
        counts = np.bincount(number, minlength=units)[first + 1]
        for i in np.flatnonzero(counts):
            holders[i].append((path, axis, int(counts[i])))
    order = np.argsort(group, kind="stable")
    parts = np.split(order + 1, np.cumsum(np.bincount(group))[:-1]) if len(first) else []
    return tuple(Group(parts[i], tuple(holders[i])) for i in np.argsort(first))


def _describe(product: Product, factor: int, units: Sequence[int], paths: Sequence[str]) -> str:
    sizes = "×".join(str(len(f)) for f in product.factors)
    what = f"{product.where} ({sizes}) is cut along factor {factor}"
    if not paths:
        return f"{what}."
    other = next(i for i, n in enumerate(units) if n and i != factor)
    return (
        f"{', '.join(paths)}: {what} ({units[factor]} units); split={{{paths[0]!r}: {other}}} "
        f"would cut it along factor {other} ({units[other]} units)."
    )
