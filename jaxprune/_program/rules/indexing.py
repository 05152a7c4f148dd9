"""Rules of primitives that read and write at indices."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.cut import Cut, resizing
from jaxprune._program.values import (
    SAME,
    ZERO,
    Rule,
    Ruling,
    Value,
    View,
    either,
    entries,
    same,
    simple,
    where_zero,
)
from jaxprune._program.walk import Walk


def _dynamic_slice(walk: Walk, eqn: Any, x: Value, *starts: Value) -> Ruling:
    out = _read(walk, eqn, x, eqn.params["slice_sizes"])
    return Ruling([out], resizing("slice_sizes", out))


def _dynamic_update(walk: Walk, eqn: Any, x: Value, new: Value, *starts: Value) -> list[Value]:
    _read(walk, eqn, x, new.shape)
    pairs = x.pairs
    for i, (a, b) in enumerate(zip(x.axes, new.axes, strict=True)):
        if len(a) == len(b):
            walk.atoms.unite(a, b)
            pairs[i] = a, either(x.kinds[i], new.kinds[i])
        else:
            walk.atoms.pin(b, f"a position of {_jaxpr.where(eqn)}")
    return [Value.of(pairs)]


def _maybe_set(walk: Walk, eqn: Any, keep: Value, x: Value, new: Value, *at: Value) -> Ruling:
    """Writes into a buffer of Equinox, at one place along its first axis."""
    along = range(1, len(x.axes))
    if new.shape != x.shape[1:]:
        walk.pin(new, f"a position of {_jaxpr.where(eqn)}")
        along = range(0)
    pairs = x.pairs
    for i in along:
        walk.atoms.unite(x.axes[i], new.axes[i - 1])
        pairs[i] = x.axes[i], either(x.kinds[i], new.kinds[i - 1])
    walk.pin(x, f"a position of {_jaxpr.where(eqn)}", set(range(len(x.axes))) - set(along))
    becomes: list[Any] = [[[i + by] for i in range(len(v.axes))] for v, by in ((x, 0), (new, 1))]
    return Ruling([Value.of(pairs)], None, [[], *becomes, *([[]] * len(v.axes) for v in at)])


def _read(walk: Walk, eqn: Any, x: Value, sizes: Sequence[int]) -> Value:
    """Reads a slice of some sizes: axes that are read entirely are carried, others are pinned."""
    pairs = x.pairs
    for i, size in enumerate(sizes):
        if size != len(x.axes[i]):
            reason = f"a position of {_jaxpr.where(eqn)}"
            walk.atoms.pin(x.axes[i], reason)
            pairs[i] = walk.pinned([size], reason).pairs[0]
    return Value.of(pairs)


def _gather(walk: Walk, eqn: Any, x: Value, at: Value) -> Ruling:
    """Reads a slice of x at every index.

    ::

        x (vocabulary, features), at (batch, time, 1)  ->  (batch, time, features)

        features     an offset axis: read entirely, it is that of x
        vocabulary   collapsed: read at one place, it is pinned, and is no axis of the result
        batch, time  the axes of the indices, whose last axis counts the indexed axes of x

    A batching axis (of a gather under `vmap`) is one of x and of the indices: they are united.
    """
    if (picked := _picked(eqn, x, at)) is not None:
        return picked
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batch = [i for i in range(len(x.axes)) if i in d.operand_batching_dims]
    offset = [i for i in range(len(x.axes)) if i not in (*d.collapsed_slice_dims, *batch)]
    read = _read(walk, eqn, x, [len(x.axes[i]) if i in batch else n for i, n in enumerate(sizes)])
    for i, j in zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True):
        walk.atoms.unite(x.axes[i], at.axes[j])
    outer = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in d.offset_dims]
    pairs = {}
    becomes: list[list[list[int]]] = [[[] for _ in v.axes] for v in (x, at)]
    for j, o in enumerate(outer):
        pairs[o], becomes[1][j] = (at.axes[j], same(at.kinds[j])), [o]
    for i, j in zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True):
        o = outer[j]
        pairs[o], becomes[0][i] = (at.axes[j], same(x.kinds[i], at.kinds[j])), [o]
    for o, i in zip(d.offset_dims, offset, strict=True):
        pairs[o], becomes[0][i] = read.pairs[i], [o]
    walk.atoms.pin(at.axes[-1], f"an index of {_jaxpr.where(eqn)}")

    def run(cut: Cut, view: View, eqn: Any, x: Any, at: Any) -> list[Any]:
        sizes = list(eqn.params["slice_sizes"])
        for o, i in zip(d.offset_dims, offset, strict=True):
            sizes[i] = cut.size(read.axes[i], sizes[i], o in view)
        return _jaxpr.bind(eqn, x, at, slice_sizes=tuple(sizes))

    return Ruling([Value.of(pairs[i] for i in sorted(pairs))], run, becomes)


def _scatter(walk: Walk, eqn: Any, x: Value, at: Value, new: Value) -> Ruling:
    """Writes at every index: a gather with source and result exchanged."""
    if (ruling := _written(walk, eqn, x, at, new)) is not None:
        return ruling
    d = eqn.params["dimension_numbers"]
    batch = [i for i in range(len(x.axes)) if i in d.operand_batching_dims]
    window = [i for i in range(len(x.axes)) if i not in (*d.inserted_window_dims, *batch)]
    written = dict(zip(window, d.update_window_dims, strict=True))  # axes of x and of new
    sizes = [len(x.axes[i]) if i in batch else 1 for i in range(len(x.axes))]
    for i, j in written.items():
        sizes[i] = len(new.axes[j])
    read = _read(walk, eqn, x, sizes)
    pairs = x.pairs
    becomes: list[Any] = [
        [[i] for i in range(len(x.axes))],
        [[]] * len(at.axes),
        [[]] * len(new.axes),
    ]
    outer = [j for j in range(len(new.axes)) if j not in d.update_window_dims]
    batches = dict(zip(d.scatter_indices_batching_dims, d.operand_batching_dims, strict=True))
    for n, (j, axis) in enumerate(zip(outer, at.axes[:-1], strict=True)):
        walk.atoms.unite(new.axes[j], axis)
        if n in batches:
            becomes[2][j] = [batches[n]]
        elif eqn.primitive.name != "scatter-add" or np.any(new.kinds[j] != 0):
            # Without an index of these, something is not written.
            walk.pin(new, f"written by {_jaxpr.where(eqn)}", [j])
    for i, j in zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True):
        walk.atoms.unite(x.axes[i], at.axes[j])
        pairs[i] = x.axes[i], same(x.kinds[i], at.kinds[j])
        becomes[1][j] = [i]
    for i, j in written.items():
        walk.atoms.unite(read.axes[i], new.axes[j])
        if len(new.axes[j]) == len(x.axes[i]):
            pairs[i], becomes[2][j] = (x.axes[i], either(x.kinds[i], new.kinds[j])), [i]
    walk.atoms.pin(at.axes[-1], f"an index of {_jaxpr.where(eqn)}")
    return Ruling([Value.of(pairs)], None, becomes)


def _constant(at: Value) -> np.ndarray | None:
    """Returns indices that are a constant, such as a permutation of channels."""
    if not at.const or math.prod(at.shape) > 1 << 16:
        return None
    try:
        return np.asarray(entries(at))
    except Exception:  # an index of a device, say, which has no value while a program is traced
        return None


def _picked(eqn: Any, x: Value, at: Value) -> Ruling | None:
    """Reads constant indices along one axis, which may be cut: ``x[:, indices]``."""
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    along = d.collapsed_slice_dims
    others = [i for i in range(len(x.axes)) if i not in along]
    if len(at.axes) != 2 or len(along) != 1 or along != d.start_index_map:
        return None
    if any(sizes[i] != len(x.axes[i]) for i in others) or (picks := _constant(at)) is None:
        return None
    axis, picks = x.axes[along[0]], picks[:, 0]
    if not ((picks >= 0) & (picks < len(axis))).all():
        return None
    picked = x.map(lambda i, axis: axis[picks] if i in along else axis).pairs
    (out,) = set(range(len(x.axes))) - set(d.offset_dims)
    order = dict(zip([*d.offset_dims, out], [*others, *along], strict=True))
    becomes = [[[o for o in order if order[o] == i] for i in range(len(x.axes))], [[], []]]

    def run(cut: Cut, view: View, eqn: Any, x: Any, at: Any) -> list[Any]:
        before = cut.kept(axis, out in view)
        if before is not None:
            after = picks[np.isin(picks, before)]
            at = jnp.asarray(np.searchsorted(before, after)[:, None], at.dtype)
        sizes = tuple(1 if i in along else n for i, n in enumerate(x.shape))
        return _jaxpr.bind(eqn, x, at, slice_sizes=sizes)

    return Ruling([Value.of(picked[order[o]] for o in sorted(order))], run, becomes)


def _written(walk: Walk, eqn: Any, x: Value, at: Value, new: Value) -> Ruling | None:
    """Writes at constant indices along axes that may be cut: ``x.at[:, 2:5].set(new)``.

    The indices are those of one axis, or the first of a window.
    """
    d, name, sizes = eqn.params["dimension_numbers"], eqn.primitive.name, x.shape
    along = d.scatter_dims_to_operand_dims
    one_axis = len(at.axes) == 2 and len(along) == 1 and along[0] in d.inserted_window_dims
    if d.operand_batching_dims or not (len(at.axes) == 1 or one_axis):
        return None
    if (picks := _constant(at)) is None:
        return None
    window = [i for i in range(len(sizes)) if i not in d.inserted_window_dims]
    new_axis = dict(zip(window, d.update_window_dims, strict=True))
    places = {i: np.arange(len(new.axes[j])) for i, j in new_axis.items()}
    for n, i in enumerate(along):
        if one_axis:
            (new_axis[i],) = set(range(len(new.axes))) - set(d.update_window_dims)
            places[i] = picks[:, n]
        else:
            places[i] = picks[n] + places.get(i, np.arange(1))
    for i, indices in places.items():
        inside = (indices >= 0) & (indices < sizes[i])
        if not inside.all() or len(np.unique(indices)) < len(indices):
            return None
    partly = [i for i in places if len(places[i]) < sizes[i]]
    pairs = x.pairs
    becomes: list[Any] = [
        [[i] for i in range(len(sizes))],
        [[]] * len(at.axes),
        [[]] * len(new.axes),
    ]
    for i, indices in places.items():
        axis, kinds = x.pairs[i]
        kinds = np.broadcast_to(kinds, len(axis))
        written: Any = ZERO if new.known == 0 else SAME
        if i in new_axis:
            becomes[2][new_axis[i]] = [i]
            walk.atoms.unite(axis[indices], new.axes[new_axis[i]])
            written = written if new.known is not None else new.kinds[new_axis[i]]
        if name == "scatter-mul":
            written = where_zero(kinds[indices] == 0, same(kinds[indices], written))
        elif name != "scatter" or any(other != i for other in partly):
            written = either(kinds[indices], written)
        kinds = kinds.copy()
        kinds[indices] = np.where(np.asarray(written) > 0, written + max(kinds.max(), 0), written)
        pairs[i] = axis, simple(kinds)

    def run(cut: Cut, view: View, eqn: Any, array: Any, at: Any, new: Any) -> list[Any]:
        index = np.array(picks)
        for n, i in enumerate(along):
            before = cut.kept(x.axes[i], i in view)
            if before is not None:
                left = np.searchsorted(before, places[i][np.isin(places[i], before)])
                if not len(left):
                    return [array]
                index = (
                    left[:, None] if index.ndim == 2 else np.r_[index[:n], left[0], index[n + 1 :]]
                )
        return _jaxpr.bind(eqn, array, jnp.asarray(index, at.dtype), new)

    return Ruling([Value.of(pairs)], run, becomes)


_SCATTERS = "scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max".split()
RULES: dict[str, Rule] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "maybe_set": _maybe_set,
    **dict.fromkeys(_SCATTERS, _scatter),
}
