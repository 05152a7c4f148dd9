"""Arrays over units: the order in which they are removed, and the masks of those that are kept.

A pool is what competes for one budget: all groups, one group, or groups of one kind. In shapes, u
is the number of units, g that of groups and p that of pools.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _tree
from jaxprune._tree import Masks

if TYPE_CHECKING:
    from jaxprune.groups import Groups


class Order(NamedTuple):
    """Units ranked by score, inside their group and inside their pool."""

    group: np.ndarray  # shape=(u,), the group of each unit
    sizes: np.ndarray  # shape=(g,), the units of each group
    steps: np.ndarray  # shape=(g,), the kept units are rounded to a multiple of this
    pool: jax.Array  # shape=(u,), the pool of each unit; -1 if its group has no score
    rank_in_group: jax.Array  # shape=(u,), 0 is the lowest score
    rank_in_pool: jax.Array  # shape=(u,), 0 is removed first
    counts: jax.Array  # shape=(p,), the units of each pool
    limits: jax.Array  # shape=(p,), how many of them can be removed


def group_of(groups: "Groups") -> np.ndarray:
    """Returns the number of the group of each unit."""
    group = np.zeros(len(groups), np.int32)
    for number, members in enumerate(groups.groups):
        group[members.units - 1] = number
    return group


def check_params(groups: "Groups", params: Any) -> None:
    """Raises a `ValueError` for params other than those for which the groups were found."""
    _tree.check_params(params)
    _tree.align(groups.like, params, "params")


def order(
    groups: "Groups", scores: jax.Array, pools: np.ndarray, within: jax.Array | None, round_to: int
) -> Order:
    """Ranks units by one score each, +inf for all units of a group without scores.

    ``pools`` holds the pool of each group, and ``within`` whether a unit was kept so far. Units
    that were not, and units with the score NaN, are removed first.
    """
    group = group_of(groups)
    sizes = np.bincount(group, minlength=len(groups.groups))
    # With n indices per unit, u·n is a multiple of `round_to` iff u is one of this step.
    indices = np.array([min(n for *_, n in members.members) for members in groups.groups])
    steps = round_to // np.gcd(round_to, indices)
    # In the order of their numbers, the first groups would lose all units of one score.
    ties = np.random.default_rng(0).permutation(len(group)).astype(np.int32)
    fixed = [_mesh.beside(x, [scores]) for x in (group, sizes, pools, ties)]
    ranks = _rank(scores, within, *fixed, count=int(pools.max()) + 1)
    return Order(group, sizes, steps, *ranks)


@functools.partial(jax.jit, static_argnames="count")
def _rank(
    scores: jax.Array,
    within: jax.Array | None,
    group: jax.Array,
    sizes: jax.Array,
    pools: jax.Array,
    ties: jax.Array,
    count: int,
) -> tuple[jax.Array, ...]:
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    scored = jax.ops.segment_min(scores, group, len(sizes)) < jnp.inf
    if within is not None:
        scores = jnp.where(within, scores, -jnp.inf)
    pool = jnp.where(scored, pools, -1)[group]
    rank_in_group = _places(group, scores, ties) - (jnp.cumsum(sizes) - sizes)[group]
    # The best unit of every group comes last in its pool, where `limits` never reaches, so that
    # no group is emptied, however low its scores are.
    best = (rank_in_group == sizes[group] - 1) & (pool >= 0)
    counts = jnp.bincount(pool + 1, length=count + 1)
    starts = jnp.cumsum(counts) - counts
    rank_in_pool = _places(pool, best, scores, ties) - starts[pool + 1]
    kept = jax.ops.segment_sum(best.astype(jnp.int32), pool + 1, count + 1)
    return pool, rank_in_group, rank_in_pool, counts[1:], (counts - kept)[1:]


def _places(*keys: jax.Array) -> jax.Array:
    """Returns the place of each unit when sorted by keys, the first one first."""
    order = jnp.lexsort(keys[::-1])
    return jnp.zeros(len(order), jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32))


def _removed(order: Order, fractions: Any) -> jax.Array:
    with jax.enable_x64(True):  # or 0.7 of 45 units, rounded to float32, would be 32
        fractions = _mesh.beside(fractions, [order.pool])
        return _lowest(order.pool, order.rank_in_pool, order.counts, order.limits, fractions)


@jax.jit
def _lowest(
    pool: jax.Array, rank: jax.Array, counts: jax.Array, limits: jax.Array, fractions: Any
) -> jax.Array:
    count = jnp.round(jnp.asarray(fractions, jnp.float64) * counts.astype(jnp.float64))
    bound = jnp.minimum(count.astype(jnp.int32), limits)
    return (rank < bound[jnp.maximum(pool, 0)]) & (pool >= 0)


def wanted(order: Order, fractions: Any) -> jax.Array:
    """Returns how many units of each group are kept, before rounding."""
    group = _mesh.beside(order.group, [order.pool])
    return _count(_removed(order, fractions), group, count=len(order.sizes))


@functools.partial(jax.jit, static_argnames="count")
def _count(removed: jax.Array, group: jax.Array, count: int) -> jax.Array:
    return jax.ops.segment_sum((~removed).astype(jnp.int32), group, count)


def kept(order: Order, fractions: Any) -> jax.Array:
    """Returns which units are kept when a fraction of each pool is removed."""
    if (order.steps == 1).all():
        return ~_removed(order, fractions)
    fixed = [_mesh.beside(x, [order.pool]) for x in (order.sizes, order.steps, order.group)]
    return _rounded(wanted(order, fractions), order.rank_in_group, *fixed)


@jax.jit
def _rounded(
    count: jax.Array, rank: jax.Array, size: jax.Array, step: jax.Array, group: jax.Array
) -> jax.Array:
    nearest = jnp.round(count / step).astype(jnp.int32)
    nearest = jnp.clip(nearest, 1, jnp.maximum(size // step, 1)) * step
    # A group that keeps all, or is smaller than a step, keeps its size.
    count = jnp.where((count == size) | (size < step), size, nearest)
    return rank >= (size - count)[group]


def masks_like(groups: "Groups", kept: Any, tree: Any) -> Masks:
    """Returns the masks that keep some units, sharded as the leaves of a tree if there is one."""
    follow = [None] * len(groups.unit) if tree is None else _tree.align(groups.like, tree)
    if _mesh.on_host(kept, follow):
        masks = _masks(np, groups, jax.device_get(kept))
        placed = [m if m is None else _mesh.place(m, x) for m, x in zip(masks, follow, strict=True)]
    else:
        placed = _masks_in_jax(groups, kept, follow)
    return _tree.rebuild(groups.like, placed)


def _masks(xp: Any, groups: "Groups", kept: Any) -> list[Any]:
    kept = xp.concatenate([np.ones(1, bool), kept])
    masks: list[Any] = []
    for path, leaf in _tree.named_leaves(groups.like):
        mask = None
        for axis, unit in enumerate(groups.unit[path]):
            if unit.any():
                stay = xp.expand_dims(kept[unit], _tree.other_axes(leaf.ndim, axis))
                mask = xp.broadcast_to(stay if mask is None else mask & stay, leaf.shape)
        masks.append(mask)
    return masks


@functools.partial(jax.jit, static_argnames="groups")
def _masks_in_jax(groups: "Groups", kept: jax.Array, follow: list[Any]) -> list[Any]:
    return [
        m if m is None or leaf is None else _mesh.follow(m, leaf)
        for m, leaf in zip(_masks(jnp, groups, kept), follow, strict=True)
    ]


def kept_slices(masks: Sequence[Any]) -> list[Any]:
    """Returns for each axis of each mask which slices have any entry that is kept."""
    if _mesh.on_host(masks):
        return _slices(np, jax.device_get(masks))
    return _slices_in_jax(masks)


def _slices(xp: Any, masks: Sequence[Any]) -> list[Any]:
    return [
        m if m is None else [xp.any(m, _tree.other_axes(m.ndim, axis)) for axis in range(m.ndim)]
        for m in masks
    ]


_slices_in_jax = jax.jit(functools.partial(_slices, jnp))
