"""Rules of primitives that sum over an axis, or work along one in another way."""

from typing import Any

import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Merge
from jaxprune._program.cut import Cut
from jaxprune._program.values import (
    DIFFERENT,
    Rule,
    Ruling,
    Sum,
    Value,
    View,
    product,
    same,
    where_zero,
    zeros,
)
from jaxprune._program.walk import Walk


def _dot(walk: Walk, eqn: Any, left: Value, right: Value, *sizes: Value) -> Ruling:
    """Unites what is summed over; the result has the batch axes, then the rest of both."""
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    (lc, rc), (lb, rb) = ragged.dot_dimension_numbers if ragged else eqn.params["dimension_numbers"]
    pairs, sums = [], []
    for i, j in zip((*lc, *lb), (*rc, *rb), strict=True):
        walk.atoms.unite(left.axes[i], right.axes[j])
        kinds = product(left.kinds[i], right.kinds[j])
        if i in lb:
            pairs.append((left.axes[i], kinds))
        else:
            sums.append(Sum(((0, i), (1, j)), kinds))
            walk.read(left.axes[i], kinds)
    count, becomes = len(lb), []
    for x, contracted, batch in ((left, lc, lb), (right, rc, rb)):
        free = [i for i in range(len(x.axes)) if i not in (*contracted, *batch)]
        new = [*range(len(lb)), *range(count, count + len(free))]
        places = dict(zip((*batch, *free), new, strict=True))
        becomes.append([[places[i]] if i in places else [] for i in range(len(x.axes))])
        pairs += [x.pairs[i] for i in free]
        count += len(free)
    return Ruling([Value.of(pairs)], None, [*becomes, *([[]] for _ in sizes)], sums)


def _ragged_dot(walk: Walk, eqn: Any, left: Value, right: Value, sizes: Value) -> Ruling:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    reason = f"grouped by {_jaxpr.where(eqn)}"
    walk.pin(left, reason, numbers.lhs_ragged_dimensions)
    walk.pin(right, reason, numbers.rhs_group_dimensions)
    walk.pin(sizes, reason)
    ruling = _dot(walk, eqn, left, right, sizes)
    if any(i in (*lc, *lb) for i in numbers.lhs_ragged_dimensions):
        return ruling._replace(outs=[walk.pinned(eqn.outvars[0].aval.shape, reason)])
    # The result of a plain product would have the axis of the experts among those of the right.
    first = len(left.axes) - len(lc)
    free = [j for j in range(len(right.axes)) if j not in (*rc, *rb)]
    experts = [first + n for n, j in enumerate(free) if j in numbers.rhs_group_dimensions]
    # They are pinned, and so are never cut: what the axes after them become is what matters.
    becomes = [
        [[o - sum(e < o for e in experts) for o in os] for os in axes]
        for axes in ruling.becomes or ()
    ]
    return ruling._replace(outs=[ruling.outs[0].without(experts)], becomes=becomes)


def _conv(walk: Walk, eqn: Any, left: Value, right: Value) -> Ruling:
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
    x_kinds, row_kinds, kinds = left.kinds[inputs], right.kinds[taken], right.kinds[outputs]
    group, sums = atoms.pinned(1, "of size 1"), []
    becomes: list[list[list[int]]] = [[[] for _ in v.axes] for v in (left, right)]
    becomes[0][batch], becomes[1][outputs] = [result[0]], [result[1]]
    if groups == 1:
        atoms.unite(x, rows)
        summed = product(x_kinds, row_kinds)
        sums.append(Sum(((0, inputs), (1, taken)), summed))
        walk.read(x, summed)
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
        if len(x) == len(features) == groups:
            becomes[0][inputs] = [result[1]]
            kinds = product(x_kinds, kinds)
        else:
            kinds = where_zero(zeros([kinds]), DIFFERENT)
            zero = np.broadcast_to(np.asarray(x_kinds) == 0, len(x)).reshape(groups, -1).all(0)
            zero = zero | (np.asarray(row_kinds) == 0)
            walk.change(rows[~zero], f"not zero in the groups of {_jaxpr.where(eqn)}")
    if p["batch_group_count"] > 1:
        for axis in (left.axes[batch], features):
            atoms.pin(axis, f"batch groups of {_jaxpr.where(eqn)}")
    else:
        pairs[result[0]], pairs[result[1]] = left.pairs[batch], (features, kinds)

    def run(cut: Cut, view: View, eqn: Any, x: Any, w: Any) -> list[Any]:
        count = cut.size(group, groups, result[1] in view)
        return _jaxpr.bind(eqn, x, w, feature_group_count=count)

    return Ruling([Value.of(pairs)], run, becomes, sums)


def _reduce(walk: Walk, eqn: Any, x: Value) -> Ruling:
    """Drops axes: a sum does not need what is zero, but a maximum, or a product, may be zero."""
    name = eqn.primitive.name
    axes = [int(i) for i in eqn.params["axes"] if isinstance(i, (int, np.integer))]
    if name == "reduce_xor":
        walk.pin(x, f"searched by {_jaxpr.where(eqn)}", axes)
    sums = [Sum(((0, i),), x.kinds[i] if "sum" in name else same(x.kinds[i])) for i in axes]
    for i, summed in zip(axes, sums, strict=True):
        walk.read(x.axes[i], summed.kinds)
    return Ruling([x.without(axes)], None, [x.places(axes)], sums)


def _collective(walk: Walk, eqn: Any, *ins: Value) -> Ruling:
    """Combines over names of axes, which changes none, or over axes, as `vmap` makes of names."""
    if len(ins) == 1:
        return _reduce(walk, eqn, *ins)
    return Ruling([Value.of(v.pairs) for v in ins])


def _arg_reduce(walk: Walk, eqn: Any, *ins: Value) -> Ruling:
    """Pins what is searched: an index, or what a user's function makes of all entries."""
    reduced = eqn.params["dimensions" if "dimensions" in eqn.params else "axes"]
    operands = ins[: len(eqn.outvars)]  # then their initial values
    kinds = [same(*(x.kinds[i] for x in operands)) for i in range(len(ins[0].axes))]
    for x in operands:
        walk.pin(x, f"searched by {_jaxpr.where(eqn)}", reduced)
        walk.unite(ins[0].without(reduced), x.without(reduced))
    outs = [Value.of(zip(x.axes, kinds, strict=True)).without(reduced) for x in operands]
    return Ruling(outs, None, [x.places(reduced) for x in ins])


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
        for i in set(range(rank)) - set(along):
            pairs[i] = x.axes[i], x.kinds[i] if keeps_zero else same(*(v.kinds[i] for v in ins))
        outs.append(Value.of(pairs))
    return outs


def _opaque(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    """Pins what is read and written as one thing: matrices, or all that a callback takes."""
    reason = f"read entirely by {_jaxpr.where(eqn)}"
    for x in ins:
        walk.pin(x, reason)
    return [walk.pinned(v.aval.shape, reason) for v in eqn.outvars]


def _window(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    p = eqn.params
    position = f"a position of {_jaxpr.where(eqn)}"
    operands = ins[: len(eqn.outvars)]
    outs = []
    for x in operands:
        pairs = walk.pinned(eqn.outvars[0].aval.shape, position).pairs
        for i, size in enumerate(p["window_dimensions"]):
            moves = p["window_strides"][i] != 1 or tuple(p["padding"][i]) != (0, 0)
            if size == 1 and not moves and p["base_dilation"][i] == 1:
                known = eqn.primitive.name != "reduce_window"
                kinds = x.kinds[i] if known else same(*(v.kinds[i] for v in operands))
                pairs[i] = x.axes[i], kinds
            else:
                walk.atoms.pin(x.axes[i], position)
        outs.append(Value.of(pairs))
    for other in outs[1:]:
        walk.unite(outs[0], other)
    return outs


_REDUCES = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()
_ORDERS = "sort top_k approx_top_k cumsum cummax cummin cumprod cumlogsumexp fft".split()
_OPAQUE = (
    "cholesky custom_linear_solve eig eigh ffi_call householder_product io_callback lu "
    "lu_pivots_to_permutation pure_callback qr schur svd triangular_solve tridiagonal_solve "
    "unvmap_all unvmap_any unvmap_max"
).split()
_WINDOWS = "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split()
RULES: dict[str, Rule] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    **dict.fromkeys(_REDUCES, _reduce),
    **dict.fromkeys("psum psum_invariant pmax pmin".split(), _collective),
    **dict.fromkeys(["reduce", "argmax", "argmin"], _arg_reduce),
    **dict.fromkeys(_ORDERS, _order_or_accumulate),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_OPAQUE, _opaque),
}
