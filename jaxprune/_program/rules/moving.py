"""Rules of primitives that move entries, and change none."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Axis, Merge
from jaxprune._program.cut import Cut, take
from jaxprune._program.values import Rule, Run, Value, combine
from jaxprune._program.walk import Walk


def _transpose(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    order = eqn.params["permutation"]
    return [Value(tuple(x.axes[i] for i in order), tuple(x.zeros[i] for i in order), x.known)]


def _rev(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    reversed_axes = eqn.params["dimensions"]
    return [x.map(lambda i, entries: entries[::-1] if i in reversed_axes else entries)]


def _squeeze(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    squeezed = eqn.params["dimensions"]
    for i in squeezed:
        walk.atoms.pin(x.axes[i], "of size 1")
    out = x.without(squeezed)
    return [Value(out.axes, out.zeros, x.known)]


def _broadcast(walk: Walk, eqn: Any, x: Value, *sizes: Value) -> tuple[list[Value], Run]:
    shape = eqn.outvars[0].aval.shape
    new = walk.fresh(shape, x.known == 0)
    axes, zeros = list(new.axes), list(new.zeros)
    for i, position in enumerate(eqn.params["broadcast_dimensions"]):
        if len(x.axes[i]) == shape[position]:
            axes[position], zeros[position] = x.axes[i], x.zeros[i]
    out = Value(tuple(axes), tuple(zeros), x.known)

    def run(cut: Cut, eqn: Any, x: Any) -> list[Any]:
        return _jaxpr.bind(eqn, x, shape=cut.shape(out, eqn.outvars[0]), sharding=None)

    return [out], run


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
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    ends = np.cumsum(sizes)

    def part(end: int, size: int) -> Value:
        pick = slice(end - size, end)
        return x.map(lambda i, entries: entries[pick] if i == axis else entries)

    outs = [part(end, size) for end, size in zip(ends, sizes, strict=True)]

    def run(cut: Cut, eqn: Any, x: Any) -> list[Any]:
        return _jaxpr.bind(eqn, x, sizes=tuple(cut.size(out.axes[axis]) for out in outs))

    return outs, run


def _concatenate(walk: Walk, eqn: Any, *parts: Value) -> list[Value]:
    return [_join(walk, parts, eqn.params["dimension"])]


def _join(walk: Walk, parts: Sequence[Value], along: int | None = None) -> Value:
    """Unites all axes but one, along which the parts follow each other."""
    axes, zeros = [], []
    for i in range(len(parts[0].axes)):
        if i == along:
            axes.append(np.concatenate([p.axes[i] for p in parts]))
            zeros.append(np.concatenate([p.zeros[i] for p in parts]))
        else:
            for other in parts[1:]:
                walk.atoms.unite(parts[0].axes[i], other.axes[i])
            axes.append(parts[0].axes[i])
            zeros.append(combine(np.logical_and, [p.zeros[i] for p in parts]))
    return Value(tuple(axes), tuple(zeros))


def _stack(walk: Walk, eqn: Any, *parts: Value) -> list[Value]:
    new, reason = eqn.params["axis"], f"a position of {_jaxpr.where(eqn)}"
    x = _join(walk, parts)
    axis, zero = walk.atoms.pinned(len(parts), reason), walk.flags(len(parts), False)
    axes = (*x.axes[:new], axis, *x.axes[new:])
    return [Value(axes, (*x.zeros[:new], zero, *x.zeros[new:]))]


def _unstack(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    walk.atoms.pin(x.axes[eqn.params["axis"]], f"a position of {_jaxpr.where(eqn)}")
    return [x.without([eqn.params["axis"]])] * len(eqn.outvars)


def _tile(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    reps = eqn.params["reps"]
    return [x.map(lambda i, entries: np.tile(entries, reps[i]) if reps[i] > 1 else entries)]


def _pad(walk: Walk, eqn: Any, x: Value, filling: Value) -> tuple[list[Value], Run]:
    config = eqn.params["padding_config"]
    axes, zeros = [], []
    sources: list[np.ndarray | None] = []  # of every padded index, where it is from, or -1
    for axis, zero, (low, high, between) in zip(x.axes, x.zeros, config, strict=True):
        if low == high == between == 0:
            axes.append(axis)
            zeros.append(zero)
            sources.append(None)
            continue
        inner = np.full(max(len(axis) + (len(axis) - 1) * between, 0), -1)
        inner[:: between + 1] = np.arange(len(axis))
        padded = np.concatenate([np.full(max(low, 0), -1), inner, np.full(max(high, 0), -1)])
        source = padded[max(-low, 0) : len(padded) - max(-high, 0)]
        new = walk.atoms.fresh(len(source))
        axes.append(np.where(source < 0, new, axis[source]))
        zeros.append(np.where(source < 0, filling.known == 0, zero[source]))
        if between:
            walk.atoms.pin(axes[-1], f"padded between entries by {_jaxpr.where(eqn)}")
        sources.append(source)
    out = Value(tuple(axes), tuple(zeros))

    def run(cut: Cut, eqn: Any, array: Any, filling: Any) -> list[Any]:
        changed = list(eqn.params["padding_config"])
        for i, source in enumerate(sources):
            if source is None or (cut.kept(x.axes[i]) is None and cut.kept(axes[i]) is None):
                continue
            kept = cut.kept(axes[i])
            source = source if kept is None else source[kept]
            inside = np.flatnonzero(source >= 0)
            rest = cut.kept(x.axes[i])
            rest = np.arange(len(x.axes[i])) if rest is None else rest
            if not len(inside) or not np.isin(rest, source).all():  # a negative padding
                used = np.flatnonzero(np.isin(rest, source))
                array = (
                    take(array, used, i) if len(used) else jax.lax.slice_in_dim(array, 0, 0, 1, i)
                )
            low = inside[0] if len(inside) else len(source)
            changed[i] = (int(low), int(len(source) - low - len(inside)), 0)
        return _jaxpr.bind(eqn, array, filling, padding_config=tuple(changed))

    return [out], run


def _reshape(walk: Walk, eqn: Any, x: Value) -> tuple[list[Value], Run]:
    """Pairs up axes in blocks of one size; merges the old axes of a block, then splits the merge.

    ::

        (8, 7, 7, 512) to (8, 25088)   8 to 8, and 7×7×512 to 25088: a merge of three factors
        (4, 6, 5) to (8, 3, 5)         4×6 to 24 to 8×3, and 5 to 5

    Along which factor a merge is cut is decided at the end, when all units are known.
    """
    shape = eqn.outvars[0].aval.shape
    axes: list[Axis] = [walk.atoms.pinned(n, "of size 1") for n in shape]
    zeros: list[Any] = [walk.flags(n, False) for n in shape]
    for before, after in _blocks(x.shape, shape):
        if len(before) == len(after) == 1:
            axes[after[0]], zeros[after[0]] = x.axes[before[0]], x.zeros[before[0]]
            continue
        old = [x.axes[i] for i in before]
        free = [i for i in before if walk.atoms.free(x.axes[i]).any()]
        if not free:  # spares a large axis of new atoms, such as all pixels
            reason = next(why for axis in old for why in walk.atoms.reason(axis))
            for i in after:
                axes[i] = walk.atoms.pinned(shape[i], reason)
            continue
        # A merged entry must be zero along whichever free factor is cut; pinned ones never are.
        zero = [x.zeros[i] if i in free else walk.flags(len(x.axes[i]), True) for i in before]
        merged, flag = old[0], zero[0]
        where = f"{_jaxpr.where(eqn)} {_sizes(x.shape, before)} to {_sizes(shape, after)}"
        if len(old) > 1:
            merged = walk.atoms.fresh(math.prod(map(len, old)))
            walk.merges.append(Merge(merged, tuple(old), where))
            flag = np.asarray(np.stack(np.meshgrid(*zero, indexing="ij")).all(0)).reshape(-1)
        if len(after) == 1:
            axes[after[0]], zeros[after[0]] = merged, flag
            continue
        new = [walk.atoms.fresh(shape[i]) for i in after]
        walk.merges.append(Merge(merged, tuple(new), where))
        grid = flag.reshape([shape[i] for i in after])
        for position, i in enumerate(after):
            others = tuple(p for p in range(len(after)) if p != position)
            axes[i], zeros[i] = new[position], grid.all(others)
    for i, n in enumerate(x.shape):
        if n == 1:
            walk.atoms.pin(x.axes[i], "of size 1")
    out = Value(tuple(axes), tuple(zeros), x.known)

    def run(cut: Cut, eqn: Any, x: Any) -> list[Any]:
        return _jaxpr.bind(eqn, x, new_sizes=cut.shape(out, eqn.outvars[0]), sharding=None)

    return [out], run


def _sizes(shape: Sequence[int], axes: Sequence[int]) -> str:
    return "×".join(str(shape[i]) for i in axes)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs up the axes of two shapes in the smallest blocks of equal size, ones left out."""
    before = [i for i, n in enumerate(old) if n != 1]
    after = [i for i, n in enumerate(new) if n != 1]
    if math.prod(old) == 0:
        return []
    blocks = []
    while before:
        left, right = [before.pop(0)], [after.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(before.pop(0))
                a *= old[left[-1]]
            else:
                right.append(after.pop(0))
                b *= new[right[-1]]
        blocks.append((left, right))
    return blocks


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
