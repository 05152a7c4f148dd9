import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _mesh, _ranks, _sums, _tree
from jaxprune._tree import Scores, Where

if TYPE_CHECKING:
    from jaxprune.groups import Groups

HOW = ("mean", "sum", "max", "first")
NORMS = (None, "mean", "max", "sum", "l2")


def reduce(
    groups: "Groups",
    scores: Scores,
    how: str = "mean",
    *,
    where: Where | None = None,
    normalize: str | None = None,
) -> jax.Array:
    r"""Scores a unit by the scores of its weights.

    .. math:: s_u = \mathrm{how}_{m \in u} \sum_{i \in m} s_i

    where the members m of unit u are its slices, one per leaf and axis that it spans. With
    ``scores.magnitude(params)`` and ``how="first"`` this is the filter pruning of Li et al.
    ``groups.select(scores, sparsity, reduce=how)`` does the same. Call ``reduce`` to choose the
    leaves, to normalize, or to add other scores of units.

    Args:
      groups: from ``find_groups``.
      scores: scores of the params, higher is kept; `None` for a leaf without scores. Or one score
        per unit, an array of shape ``(len(groups),)``, which is normalized alone.
      how: ``"mean"``, ``"sum"`` or ``"max"`` over the slices, or ``"first"``, the slice that the
        program uses first: the filter that makes the unit.
      where: ``where(path, score)`` returns whether a leaf counts. By default only leaves with two
        or more axes count, if there are any.
      normalize: divides the scores of each group by their ``"mean"``, ``"max"``, ``"sum"`` or
        ``"l2"`` norm.

    Returns:
      A float32 array of shape ``(len(groups),)``. A group without a counted leaf has the score
      +inf: ``groups.select`` keeps its units, and counts them in no budget.

    Raises:
      ValueError: for scores of other paths or shapes, that are not finite, or in no group; for an
        unknown word; or for ``how`` or ``where`` with one score per unit.

    Examples:
      >>> params = {"in": jnp.array([[3.0, -1.0]]), "out": jnp.array([[1.0], [5.0]])}
      >>> groups = jp.find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((5, 1)))
      >>> scores = jp.scores.magnitude(params)
      >>> print(reduce(groups, scores), reduce(groups, scores, "first", normalize="max"))
      [2. 3.] [1.         0.33333334]

    References:
      Li et al, `Pruning Filters for Efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, 2016
    """
    _loss.check_groups("units.reduce", groups)
    _tree.check_word("how", how, HOW)
    _tree.check_word("normalize", normalize, NORMS)
    if not is_per_unit(groups, scores):
        scores = _reduce(groups, scores, how, where)
    elif how != "mean" or where is not None:
        raise ValueError(
            f"scores must be those of the params for {how!r} or where=, got one score per unit."
        )
    else:
        scores = _checked(groups, scores)
    return normalized(groups, scores, normalize)


def is_per_unit(groups: "Groups", scores: Any) -> bool:
    """Returns whether scores are an array over units; params may be one array as well."""
    shape = getattr(groups.like, "shape", None)
    return isinstance(scores, (jax.Array, np.ndarray)) and scores.shape != shape


def _checked(groups: "Groups", scores: jax.Array) -> jax.Array:
    """Checks one score per unit."""
    if scores.shape != (len(groups),):
        raise ValueError(
            f"scores: an array must hold one score per unit, of shape ({len(groups)},), got shape "
            f"{scores.shape}. Score the units of these groups, or pass a tree of scores."
        )
    if not _tree.is_traced(scores):
        bad = ~np.isfinite(values := np.asarray(scores, np.float32))
        for group in groups.groups:  # +inf is the score of a group without one
            bad[group.units - 1] &= not (values[group.units - 1] == np.inf).all()
        if bad.any():
            raise ValueError(
                f"scores must be finite, got NaN or infinity for {bad.sum()} of {len(groups)} "
                f"units, first for unit {np.flatnonzero(bad)[0]}. Check the loss."
            )
    return jnp.asarray(scores, jnp.float32)


def _reduce(groups: "Groups", scores: Scores, how: str, where: Where | None) -> jax.Array:
    names = [path for path, _ in _tree.named_leaves(groups.like)]
    aligned = zip(names, _tree.align(groups.like, scores, "scores"), strict=True)
    leaves = {p: s for p, s in aligned if s is not None and (where is None or where(p, s))}
    if where is None and (matrices := {p: s for p, s in leaves.items() if jnp.ndim(s) >= 2}):
        leaves = matrices
    members = [  # in the order in which the program uses them
        (path, axis, unit)
        for path, axes in groups.unit.items()
        for axis, unit in enumerate(axes)
        if path in leaves and unit.any()
    ]
    if not members:
        raise ValueError(
            f"scores: at least one scored leaf must be in a group, got scores of {sorted(leaves)}. "
            "Score leaves of print(groups), or choose with `jp.units.reduce(..., where=...)`."
        )
    # One key for every (unit, member), by unit first, then in the order of the members.
    count = len(members)
    keys = [unit.astype(np.int64) * count + i for i, (*_, unit) in enumerate(members)]
    distinct, slices = np.unique(np.concatenate(keys), return_inverse=True)
    owner = distinct // count
    # Array by array: those of identical layers share a program, if any is compiled.
    sums = [
        _sums.exact_sum(s, _tree.other_axes(jnp.ndim(s), axis))
        for s, axis in ((leaves[path], axis) for path, axis, _ in members)
    ]
    if not _tree.is_traced(sums):
        sums = [s if isinstance(s, jax.Array) else jax.device_put(s) for s in sums]
    sums = list(map(_mesh.replicated, sums))
    result, finite = _reduced(sums, *jax.device_put((slices, owner)), how=how, count=len(groups))
    if not _tree.is_traced(finite) and not (finite := jax.device_get(finite)).all():
        member = np.repeat(np.arange(count), [len(unit) for *_, unit in members])
        path, *_ = members[member[np.argmin(finite)]]
        raise ValueError(
            f"{_tree.show(path)}: scores must be finite, got NaN or infinity. Check the loss and "
            "the params, or leave it out with `jp.units.reduce(groups, scores, where=...)`."
        )
    return result


def normalized(groups: "Groups", scores: jax.Array, how: str | None) -> jax.Array:
    """Divides the scores of each group by one number, if that is not 0; +inf remains."""
    if how is None:
        return scores
    return _normalized(scores, jax.device_put(_ranks.group_of(groups)), len(groups.groups), how)


@functools.partial(jax.jit, static_argnames=("count", "how"))
def _normalized(scores: jax.Array, group: jax.Array, count: int, how: str) -> jax.Array:
    total = jax.ops.segment_max if how == "max" else jax.ops.segment_sum
    scale = total(scores**2 if how == "l2" else scores, group, count)
    if how == "l2":
        scale = jnp.sqrt(scale)
    elif how == "mean":
        scale = scale / jnp.bincount(group, length=count).astype(jnp.float32)
    return scores / jnp.where((scale == 0) | (scale == jnp.inf), 1, scale)[group]


@functools.partial(jax.jit, static_argnames=("how", "count"))
def _reduced(
    sums: list[jax.Array],  # for every array, the sums of its slices
    slices: jax.Array,  # for all of these in turn, the number of the total they belong to
    owner: jax.Array,  # the unit of every total, or 0; ascending
    how: str,
    count: int,  # of units
) -> tuple[jax.Array, jax.Array]:
    """Returns one score per unit, +inf without any, and which sums of slices are finite."""
    members = jnp.bincount(owner, length=count + 1)[1:]
    joined = jnp.concatenate(sums)
    totals = jax.ops.segment_sum(joined, slices, len(owner))
    if how == "first":
        first = jnp.searchsorted(owner, jnp.arange(1, count + 1))
        score = totals[jnp.minimum(first, len(owner) - 1)]
    elif how == "max":
        score = jax.ops.segment_max(totals, owner, count + 1)[1:]
    else:
        score = jax.ops.segment_sum(totals, owner, count + 1)[1:]
    if how == "mean":
        score /= jnp.maximum(members, 1).astype(score.dtype)
    return jnp.where(members > 0, score, jnp.inf), jnp.isfinite(joined)
