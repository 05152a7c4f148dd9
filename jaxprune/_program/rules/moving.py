"""Rules of primitives that move entries, and change none."""

import functools
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
from jaxprune._program.values import Rule, Run, Value
from jaxprune._program.walk import Walk


def _transpose(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    return [Value.of((x.pairs[i] for i in eqn.params["permutation"]), x.known)]


def _rev(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    reversed_axes = eqn.params["dimensions"]
    return [x.map(lambda i, entries: entries[::-1] if i in reversed_axes else entries)]


def _squeeze(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    squeezed = eqn.params["dimensions"]
    walk.pin(x, "of size 1", squeezed)
    return [Value.of(x.without(squeezed).pairs, x.known)]


def _broadcast(walk: Walk, eqn: Any, x: Value, *sizes: Value) -> tuple[list[Value], Run]:
    shape = eqn.outvars[0].aval.shape
    pairs = walk.fresh(shape, x.known == 0).pairs
    for i, position in enumerate(eqn.params["broadcast_dimensions"]):
        if len(x.axes[i]) == shape[position]:
            pairs[position] = x.pairs[i]
    out = Value.of(pairs, x.known)
    return [out], resizing("shape", out, sharding=None)


def _slice(walk: Walk, eqn: Any, x: Value) -> tuple[list[Value], Run]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    picks = [slice(*pick) for pick in zip(starts, limits, strides, strict=True)]
    out = x.map(lambda i, entries: entries[picks[i]])

    def run(cut: Cut, eqn: Any, array: Any) -> list[Any]:
        limits = eqn.params["limit_indices"]
        for i, axis in enumerate(x.axes):
            kept = cut.kept(axis)
            if kept is None:
                array = jax.lax.slice_in_dim(array, starts[i], limits[i], strides[i], i)
            else:
                wanted = np.isin(kept, np.arange(len(axis))[picks[i]])
                array = array if wanted.all() else take(array, np.flatnonzero(wanted), i)
        return [array]

    return [out], run


def _split(walk: Walk, eqn: Any, x: Value) -> tuple[list[Value], Run]:
    axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])[:-1]
    parts = zip(*(np.split(entries, ends) for entries in x.pairs[axis]), strict=True)
    outs = [Value.of([*x.pairs[:axis], part, *x.pairs[axis + 1 :]], x.known) for part in parts]

    def run(cut: Cut, eqn: Any, x: Any) -> list[Any]:
        return _jaxpr.bind(eqn, x, sizes=tuple(cut.size(out.axes[axis]) for out in outs))

    return outs, run


def _concatenate(walk: Walk, eqn: Any, *parts: Value) -> list[Value]:
    return [walk.join(parts, eqn.params["dimension"])]


def _stack(walk: Walk, eqn: Any, *parts: Value) -> list[Value]:
    pairs = walk.join(parts).pairs
    position = walk.pinned([len(parts)], f"a position of {_jaxpr.where(eqn)}")
    pairs.insert(eqn.params["axis"], position.pairs[0])
    return [Value.of(pairs)]


def _unstack(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    walk.pin(x, f"a position of {_jaxpr.where(eqn)}", [eqn.params["axis"]])
    return [x.without([eqn.params["axis"]])] * len(eqn.outvars)


def _tile(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    reps = eqn.params["reps"]
    return [x.map(lambda i, entries: np.tile(entries, reps[i]) if reps[i] > 1 else entries)]


def _pad(walk: Walk, eqn: Any, x: Value, filling: Value) -> tuple[list[Value], Run]:
    config = eqn.params["padding_config"]
    pairs = x.pairs
    sources: dict[int, np.ndarray] = {}  # of every padded index, where it is from, or -1
    for i, (low, high, between) in enumerate(config):
        if low == high == between == 0:
            continue
        axis, zero = pairs[i]
        inner = np.full(max(len(axis) + (len(axis) - 1) * between, 0), -1)
        inner[:: between + 1] = np.arange(len(axis))
        padded = np.concatenate([np.full(max(low, 0), -1), inner, np.full(max(high, 0), -1)])
        source = sources[i] = padded[max(-low, 0) : len(padded) - max(-high, 0)]
        new = np.where(source < 0, walk.atoms.fresh(len(source)), axis[source])
        pairs[i] = new, np.where(source < 0, filling.known == 0, zero[source])
        if between:
            walk.atoms.pin(new, f"padded between entries by {_jaxpr.where(eqn)}")

    def run(cut: Cut, eqn: Any, array: Any, filling: Any) -> list[Any]:
        changed = list(eqn.params["padding_config"])
        for i, source in sources.items():
            before, after = cut.kept(x.axes[i]), cut.kept(pairs[i][0])
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

    return [Value.of(pairs)], run


def _reshape(walk: Walk, eqn: Any, x: Value) -> tuple[list[Value], Run]:
    """Pairs up axes in blocks of one size; merges the old axes of a block, then splits the merge.

    ::

        (8, 7, 7, 512) to (8, 25088)   8 to 8, and 7×7×512 to 25088: a merge of three factors
        (4, 6, 5) to (8, 3, 5)         4×6 to 24 to 8×3, and 5 to 5

    Along which factor a merge is cut is decided at the end, when all units are known.
    """
    shape = eqn.outvars[0].aval.shape
    pairs = walk.pinned(shape, "of size 1").pairs
    for before, after in _blocks(x.shape, shape):
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
        # A merged entry must be zero along whichever free factor is cut; pinned ones never are.
        zeros = [x.zeros[i] if i in free else walk.flags(len(x.axes[i]), True) for i in before]
        merged, zero = old[0], zeros[0]
        where = f"{_jaxpr.where(eqn)} {_sizes(x.shape, before)} to {_sizes(shape, after)}"
        if len(old) > 1:
            merged = walk.atoms.fresh(math.prod(map(len, old)))
            walk.merges.append(Merge(merged, tuple(old), where))
            zero = functools.reduce(np.logical_and.outer, zeros).reshape(-1)
        if len(after) == 1:
            pairs[after[0]] = merged, zero
            continue
        new = [walk.atoms.fresh(shape[i]) for i in after]
        walk.merges.append(Merge(merged, tuple(new), where))
        grid = zero.reshape([shape[i] for i in after])
        for n, i in enumerate(after):
            pairs[i] = new[n], np.asarray(grid.all(_tree.other_axes(len(after), n)))
    walk.pin(x, "of size 1", [i for i, size in enumerate(x.shape) if size == 1])
    out = Value.of(pairs, x.known)
    return [out], resizing("new_sizes", out, sharding=None)


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
