"""Rules of primitives that sum over an axis, or work along one in another way."""

from typing import Any

import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Merge
from jaxprune._program.cut import Cut
from jaxprune._program.values import Rule, Run, Value, combine
from jaxprune._program.walk import Walk


def _dot(walk: Walk, eqn: Any, left: Value, right: Value) -> list[Value]:
    """Unites what is summed over; the result has the batch axes, then the rest of both."""
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    (lc, rc), (lb, rb) = ragged.dot_dimension_numbers if ragged else eqn.params["dimension_numbers"]
    pairs = []
    for i, j in zip((*lc, *lb), (*rc, *rb), strict=True):
        walk.atoms.unite(left.axes[i], right.axes[j])
        zero = combine(np.logical_or, [left.zeros[i], right.zeros[j]])
        if i in lb:
            pairs.append((left.axes[i], zero))
        else:
            walk.change(left.axes[i], f"summed, not zero, by {_jaxpr.where(eqn)}", zero)
    return [Value.of(pairs + left.without((*lc, *lb)).pairs + right.without((*rc, *rb)).pairs)]


def _ragged_dot(walk: Walk, eqn: Any, left: Value, right: Value, sizes: Value) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    reason = f"grouped by {_jaxpr.where(eqn)}"
    walk.pin(left, reason, numbers.lhs_ragged_dimensions)
    walk.pin(right, reason, numbers.rhs_group_dimensions)
    walk.pin(sizes, reason)
    (out,) = _dot(walk, eqn, left, right)
    if any(i in (*lc, *lb) for i in numbers.lhs_ragged_dimensions):
        return [walk.pinned(eqn.outvars[0].aval.shape, reason)]
    # The result of a plain product would have the axis of the experts among those of the right.
    first = len(left.axes) - len(lc)
    free = [j for j in range(len(right.axes)) if j not in (*rc, *rb)]
    experts = [first + n for n, j in enumerate(free) if j in numbers.rhs_group_dimensions]
    return [out.without(experts)]


def _conv(walk: Walk, eqn: Any, left: Value, right: Value) -> tuple[list[Value], Run]:
    """Unites input channels with kernel rows, and output channels with kernel features.

    With groups both kinds of channels are merges, whose slow factor they share. Either entire
    groups are removed, or channels within them, the same of every group::

        input channels    = group × rows of the kernel     [g0 g0 g1 g1]
        output channels   = group × features within        [g0 g0 g0 g1 g1 g1]

    A depthwise convolution has one channel a group: then the channels are the groups.
    """
    p = eqn.params
    (batch, inputs, *space), (outputs, taken, *window), result = p["dimension_numbers"]
    groups, atoms = p["feature_group_count"], walk.atoms
    position = f"a position of {_jaxpr.where(eqn)}"
    pairs = walk.pinned(eqn.outvars[0].aval.shape, position).pairs
    walk.pin(left, position, space)
    walk.pin(right, position, window)
    x, rows, features = left.axes[inputs], right.axes[taken], right.axes[outputs]
    group = atoms.pinned(1, "of size 1")
    if p["batch_group_count"] > 1:
        for axis in (left.axes[batch], features):
            atoms.pin(axis, f"batch groups of {_jaxpr.where(eqn)}")
    else:
        pairs[result[0]], pairs[result[1]] = left.pairs[batch], right.pairs[outputs]
    if groups == 1:
        atoms.unite(x, rows)
        zero = combine(np.logical_or, [left.zeros[inputs], right.zeros[taken]])
        walk.change(x, f"summed, not zero, by {_jaxpr.where(eqn)}", zero)
    else:
        group = atoms.fresh(groups)
        for axis, within in ((x, rows), (features, None)):
            size = len(axis) // groups
            if size == 1:
                atoms.unite(axis, group)
            else:
                inside = atoms.fresh(size) if within is None else within
                where = f"the {groups} groups of {_jaxpr.where(eqn)}"
                walk.merges.append(Merge(axis, (group, inside), where))

    def run(cut: Cut, eqn: Any, x: Any, w: Any) -> list[Any]:
        return _jaxpr.bind(eqn, x, w, feature_group_count=cut.size(group))

    return [Value.of(pairs)], run


def _reduce(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    """Drops axes: zeros change no sum, but may be a maximum, or make a product zero."""
    sums = eqn.primitive.name == "reduce_sum"
    for i in eqn.params["axes"]:
        reason = f"{'summed, not zero, by' if sums else 'taken part in'} {_jaxpr.where(eqn)}"
        walk.change(x.axes[i], reason, x.zeros[i] if sums else None)
    return [x.without(eqn.params["axes"])]


def _arg_reduce(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    """Pins what is searched: an index, or what a user's function makes of all entries."""
    reduced = eqn.params["dimensions" if "dimensions" in eqn.params else "axes"]
    operands = ins[: len(eqn.outvars)]  # then their initial values
    for x in operands:
        walk.pin(x, f"searched by {_jaxpr.where(eqn)}", reduced)
        walk.unite(ins[0].without(reduced), x.without(reduced))
    return [walk.value(x.without(reduced).axes) for x in operands]


def _order_or_accumulate(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    """Pins the axis along which entries are sorted, accumulated or transformed."""
    p, rank = eqn.params, len(ins[0].axes)
    if eqn.primitive.name == "fft":
        along = list(range(rank - len(p["fft_lengths"]), rank))
    else:
        keys = ("axis", "dimension", "operand_dimension", "reduction_dimension")
        along = [next((p[key] for key in keys if key in p), -1) % rank]
    for x in ins:
        walk.pin(x, f"ordered by {_jaxpr.where(eqn)}", along)
        walk.unite(ins[0], x)
    keeps_zero = eqn.primitive.name in ("cumsum", "cummax", "cummin", "cumprod", "fft")
    outs = []
    for n, var in enumerate(eqn.outvars):
        x = ins[min(n, len(ins) - 1)]
        pairs = walk.pinned(var.aval.shape, f"ordered by {_jaxpr.where(eqn)}").pairs
        carried = x if keeps_zero else walk.value(x.axes)
        outs.append(Value.of(pairs[i] if i in along else carried.pairs[i] for i in range(rank)))
    return outs


def _window(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    p = eqn.params
    position = f"a position of {_jaxpr.where(eqn)}"
    outs = []
    for x in ins[: len(eqn.outvars)]:
        pairs = walk.pinned(eqn.outvars[0].aval.shape, position).pairs
        for i, size in enumerate(p["window_dimensions"]):
            moves = p["window_strides"][i] != 1 or tuple(p["padding"][i]) != (0, 0)
            if size == 1 and not moves and p["base_dilation"][i] == 1:
                pairs[i] = x.pairs[i]
            else:
                walk.atoms.pin(x.axes[i], position)
        outs.append(Value.of(pairs))
    for other in outs[1:]:
        walk.unite(outs[0], other)
    return outs


_REDUCES = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()
_ORDERS = "sort top_k approx_top_k cumsum cummax cummin cumprod cumlogsumexp fft".split()
_WINDOWS = "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split()
RULES: dict[str, Rule] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    **dict.fromkeys(_REDUCES, _reduce),
    **dict.fromkeys(["reduce", "argmax", "argmin"], _arg_reduce),
    **dict.fromkeys(_ORDERS, _order_or_accumulate),
    **dict.fromkeys(_WINDOWS, _window),
}
