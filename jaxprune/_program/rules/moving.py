"""Rules of primitives that move entries, and change none."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import _tree
from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Merge
from jaxprune._program.cut import Cut, resizing, take
from jaxprune._program.values import (
    DIFFERENT,
    SAME,
    ZERO,
    Kinds,
    Rule,
    Ruling,
    Value,
    View,
    rows,
    simple,
)
from jaxprune._program.walk import Walk


def _transpose(walk: Walk, eqn: Any, x: Value) -> Ruling:
    order = eqn.params["permutation"]
    out = Value.of((x.pairs[i] for i in order), x.known)
    return Ruling([out], None, [[[order.index(i)] for i in range(len(order))]])


def _rev(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    reversed_axes = eqn.params["dimensions"]
    return [x.map(lambda i, entries: entries[::-1] if i in reversed_axes else entries)]


def _squeeze(walk: Walk, eqn: Any, x: Value) -> Ruling:
    squeezed = eqn.params["dimensions"]
    walk.pin(x, f"a position of {_jaxpr.where(eqn)}", squeezed)
    return Ruling([Value.of(x.without(squeezed).pairs, x.known)], None, [x.places(squeezed)])


def _broadcast(walk: Walk, eqn: Any, x: Value, *sizes: Value) -> Ruling:
    shape = eqn.outvars[0].aval.shape
    pairs = walk.fresh(shape, ZERO if x.known == 0 else SAME).pairs
    for i, position in enumerate(eqn.params["broadcast_dimensions"]):
        if len(x.axes[i]) == shape[position]:
            pairs[position] = x.pairs[i]
    out = Value.of(pairs, x.known)
    becomes = [
        [[position] for position in eqn.params["broadcast_dimensions"]],
        *([] for _ in sizes),
    ]
    return Ruling([out], resizing("shape", out, sharding=None), becomes)


def _slice(walk: Walk, eqn: Any, x: Value) -> Ruling:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    picks = [slice(*pick) for pick in zip(starts, limits, strides, strict=True)]
    out = x.map(lambda i, entries: entries[picks[i]])

    def run(cut: Cut, view: View, eqn: Any, array: Any) -> list[Any]:
        limits = eqn.params["limit_indices"]
        for i, axis in enumerate(x.axes):
            kept = cut.kept(axis, i in view)
            if kept is None:
                array = jax.lax.slice_in_dim(array, starts[i], limits[i], strides[i], i)
            else:
                wanted = np.isin(kept, np.arange(len(axis))[picks[i]])
                array = array if wanted.all() else take(array, np.flatnonzero(wanted), i)
        return [array]

    return Ruling([out], run)


def _split(walk: Walk, eqn: Any, x: Value) -> Ruling:
    axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])[:-1]
    limits = zip([0, *ends], [*ends, len(x.axes[axis])], strict=True)
    parts = [slice(*limit) for limit in limits]
    outs = [
        x.map(lambda i, entries, part=part: entries[part] if i == axis else entries)  # type: ignore[misc]
        for part in parts
    ]

    def run(cut: Cut, view: View, eqn: Any, x: Any) -> list[Any]:
        sizes = [cut.size(out.axes[axis], ghost=axis in view) for out in outs]
        return _jaxpr.bind(eqn, x, sizes=tuple(sizes))

    return Ruling(outs, run)


def _concatenate(walk: Walk, eqn: Any, *parts: Value) -> Ruling:
    along = eqn.params["dimension"]

    def run(cut: Cut, view: View, eqn: Any, *arrays: Any) -> list[Any]:
        pairs = zip(arrays, parts, strict=True)  # a part that is not cut has no ghost
        has = [x for x, v in pairs if along not in view or cut.kept(v.axes[along]) is not None]
        return _jaxpr.bind(eqn, *has)

    return Ruling([walk.join(parts, along)], run)


def _stack(walk: Walk, eqn: Any, *parts: Value) -> Ruling:
    axis, pairs = eqn.params["axis"], walk.join(parts).pairs
    position = walk.pinned([len(parts)], f"a position of {_jaxpr.where(eqn)}")
    pairs.insert(axis, position.pairs[0])
    return Ruling(
        [Value.of(pairs)], None, [[[i + (i >= axis)] for i in range(len(pairs) - 1)]] * len(parts)
    )


def _unstack(walk: Walk, eqn: Any, x: Value) -> Ruling:
    axis = [eqn.params["axis"]]
    walk.pin(x, f"a position of {_jaxpr.where(eqn)}", axis)
    return Ruling([x.without(axis)] * len(eqn.outvars), None, [x.places(axis)])


def _tile(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    reps = eqn.params["reps"]
    return [x.map(lambda i, entries: np.tile(entries, reps[i]) if reps[i] > 1 else entries)]


def _pad(walk: Walk, eqn: Any, x: Value, filling: Value) -> Ruling:
    config = eqn.params["padding_config"]
    pairs = x.pairs
    sources: dict[int, np.ndarray] = {}  # of every padded index, where it is from, or -1
    for i, (low, high, between) in enumerate(config):
        if low == high == between == 0:
            continue
        axis, kinds = pairs[i]
        inner = np.full(max(len(axis) + (len(axis) - 1) * between, 0), -1)
        inner[:: between + 1] = np.arange(len(axis))
        padded = np.concatenate([np.full(max(low, 0), -1), inner, np.full(max(high, 0), -1)])
        source = sources[i] = padded[max(-low, 0) : len(padded) - max(-high, 0)]
        new = np.where(source < 0, walk.atoms.fresh(len(source)), axis[source])
        every = np.broadcast_to(np.asarray(kinds), len(axis))
        filled = ZERO if filling.known == 0 else SAME + int(every.max(initial=0))
        pairs[i] = new, simple(np.where(source < 0, filled, every[source] if len(axis) else ZERO))
        if between:
            walk.atoms.pin(new, f"padded between entries by {_jaxpr.where(eqn)}")

    def run(cut: Cut, view: View, eqn: Any, array: Any, filling: Any) -> list[Any]:
        changed = list(eqn.params["padding_config"])
        for i, source in sources.items():
            before, after = cut.kept(x.axes[i], i in view), cut.kept(pairs[i][0], i in view)
            if before is None and after is None:
                continue
            before = np.arange(len(x.axes[i])) if before is None else before
            source = source if after is None else source[after]
            inside = np.flatnonzero(source >= 0)
            used = np.isin(before, source)
            if not used.all():  # a negative padding
                array = take(array, np.flatnonzero(used), i)
            low = int(inside[0]) if len(inside) else len(source)
            changed[i] = (low, len(source) - low - len(inside), 0)
        return _jaxpr.bind(eqn, array, filling, padding_config=tuple(changed))

    return Ruling([Value.of(pairs)], run)


def _reshape(walk: Walk, eqn: Any, x: Value) -> Ruling:
    """Pairs up axes in blocks of one size; merges the old axes of a block, then splits the merge.

    ::

        (8, 7, 7, 512) to (8, 25088)   8 to 8, and 7×7×512 to 25088: a merge of three factors
        (4, 6, 5) to (8, 3, 5)         4×6 to 24 to 8×3, and 5 to 5

    Along which factor a merge is cut is decided at the end, when all units are known.
    """
    shape = eqn.outvars[0].aval.shape
    pairs = walk.pinned(shape, "of size 1").pairs
    becomes: list[list[int]] = [[] for _ in x.axes]
    for before, after in _blocks(x.shape, shape):
        for i in before:
            becomes[i] = after
        if len(before) == len(after) == 1:
            pairs[after[0]] = x.pairs[before[0]]
            continue
        old = [x.axes[i] for i in before]
        free = [i for i in before if walk.atoms.free(x.axes[i]).any()]
        if not free:  # spares a large axis of new atoms, such as all pixels
            reason = next(why for axis in old for why in walk.atoms.reason(axis))
            for i in after:
                pairs[i] = walk.pinned([shape[i]], reason).pairs[0]
            continue
        merged, kinds = old[0], x.kinds[before[0]]
        where = f"{_jaxpr.where(eqn)} {_sizes(x.shape, before)} to {_sizes(shape, after)}"
        if len(old) > 1:
            merged = walk.atoms.fresh(math.prod(map(len, old)))
            walk.merges.append(Merge(merged, tuple(old), where))
            kinds = _merged_kinds(x, before, free)
        if len(after) == 1:
            pairs[after[0]] = merged, kinds
            continue
        new = [walk.atoms.fresh(shape[i]) for i in after]
        walk.merges.append(Merge(merged, tuple(new), where))
        for n, i in enumerate(after):
            grid = kinds if isinstance(kinds, int) else kinds.reshape([shape[i] for i in after])
            pairs[i] = new[n], grid if isinstance(grid, int) else rows(np.moveaxis(grid, n, 0))
    walk.pin(x, "of size 1", [i for i, size in enumerate(x.shape) if size == 1])
    out = Value.of(pairs, x.known)
    return Ruling([out], resizing("new_sizes", out, sharding=None), [becomes])


def _merged_kinds(x: Value, factors: Sequence[int], free: Sequence[int]) -> Kinds:
    """Returns the kinds along an axis that is merged from factors, of which some are free.

    It will be cut along one of the free factors, so that an entry is zero if it is along all. If
    there is one, entries are the same if they are along it, and at the same place along the others.
    """
    shape = [len(x.axes[i]) for i in factors]
    grids = []
    for i in free:
        kinds = np.broadcast_to(x.kinds[i], len(x.axes[i]))
        others = _tree.other_axes(len(shape), factors.index(i))
        grids.append(np.broadcast_to(np.expand_dims(kinds, others), shape))
    zero = np.all([grid == 0 for grid in grids], axis=0).reshape(-1)
    if zero.all():
        return ZERO
    if len(free) > 1:
        return simple(np.where(zero, ZERO, DIFFERENT))
    place = np.arange(math.prod(shape)).reshape(shape).take([0], factors.index(free[0]))
    kinds = np.where(grids[0] > 0, grids[0] * math.prod(shape) + place, grids[0]).reshape(-1)
    number = np.unique(kinds, return_inverse=True)[1].reshape(-1) + 1  # else a product overflows
    return simple(np.where(kinds > 0, number, kinds))


def _sizes(shape: Sequence[int], axes: Sequence[int]) -> str:
    return "×".join(str(shape[i]) for i in axes)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs up the axes of two shapes in the smallest blocks of equal size, ones left out.

    A block ends where both shapes have the same product of all sizes so far.
    """
    if 0 in old:
        return []
    before, after = (
        {i: math.prod(shape[: i + 1]) for i, size in enumerate(shape) if size != 1}
        for shape in (old, new)
    )
    ends = sorted({1} | set(before.values()) & set(after.values()))
    return [
        ([i for i in before if a < before[i] <= b], [i for i in after if a < after[i] <= b])
        for a, b in itertools.pairwise(ends)
    ]


RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "rev": _rev,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "pad": _pad,
    "reshape": _reshape,
}
