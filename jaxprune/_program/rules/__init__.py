"""What every primitive does to the axes of its operands: one rule each.

A rule takes the walk, the equation and the values of the operands, and gives the values of the
results. Where the equation has sizes among its parameters, it also gives how to run it when cut.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.atoms import Axis, Product
from jaxprune._program.walk import Cut, Run, Value, Walk, take

Rule = Callable[..., list[Value] | tuple[list[Value], Run]]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    return lambda rule: [RULES.__setitem__(name, rule) for name in names] and rule  # type: ignore


# Elementwise. Operands have the shape of the result, or are scalars, or broadcast sizes of one.

ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type cos cosh digamma "
    "div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag "
    "integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne "
    "neg nextafter not one_minus_square or polygamma population_count pow random_gamma_grad real "
    "regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square sub tan tanh xor zeta zeros_like"
).split()
_UNCHANGED = (
    "copy from_edtype layout_constraint name optimization_barrier pbroadcast pmax pmin ppermute "
    "psum psum_invariant pvary reduce_precision reduced_vary_cast relayout reshard "
    "sharding_constraint stop_gradient tie to_edtype"
).split()
_LINEAR = frozenset("add add_any convert_element_type neg sub".split())
_AT_ZERO: dict[Any, float] = {}


@_rule(*ELEMENTWISE)
def _elementwise(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    shape = eqn.outvars[0].aval.shape
    known = None
    if all(v.known is not None for v in ins):
        known = _evaluate(eqn, ins)
    axes, zeros = [], []
    for i, size in enumerate(shape):
        there = [v for v in ins if v.shape and len(v.axes[i]) == size]
        axes.append(there[0].axes[i] if there else walk.fresh((size,)).axes[0])
        for other in there[1:]:
            walk.atoms.unite(axes[i], other.axes[i])
        zeros.append(_zero(walk, eqn, ins, i, size))
    return [Value(tuple(axes), tuple(zeros), known)]


def _zero(walk: Walk, eqn: Any, ins: Sequence[Value], i: int, size: int) -> np.ndarray:
    """Says which slices along an axis of an elementwise result are zero once masked."""
    name = eqn.primitive.name
    flags = [_flag(walk, v, i, size) for v in ins]
    if name in ("mul", "and"):
        return _combine(np.logical_or, flags)
    if name in ("div", "rem"):
        return flags[0] if not flags[1].any() else flags[0] & ~flags[1]
    if name == "select_n":
        return _combine(np.logical_and, flags[1:])
    some = [f for v, f in zip(ins, flags, strict=True) if v.known is None]
    if not some:
        return walk.flags(size, _evaluate(eqn, ins) == 0)
    zero = _combine(np.logical_and, some)
    if not zero.any() or (len(some) == len(ins) and name in _LINEAR):
        return zero
    return zero if _evaluate(eqn, ins) == 0 else walk.flags(size, False)


def _flag(walk: Walk, value: Value, i: int, size: int) -> np.ndarray:
    if value.known is not None:
        return walk.flags(size, value.known == 0)
    if value.shape and len(value.axes[i]) == size:
        return value.zeros[i]
    return walk.flags(size, False)


def _combine(function: Any, flags: Sequence[np.ndarray]) -> np.ndarray:
    result = flags[0]
    for flag in flags[1:]:
        if flag is not result:
            result = function(result, flag)
    return result


def _evaluate(eqn: Any, ins: Sequence[Value]) -> float | None:
    """Applies a primitive to zeros, and to the numbers that are known."""
    numbers = tuple(0.0 if v.known is None else v.known for v in ins)
    dtypes = tuple(str(atom.aval.dtype) for atom in eqn.invars)
    if any("key" in name for name in dtypes):
        return None
    params = {key: p for key, p in eqn.params.items() if key != "sharding"}
    key = (eqn.primitive.name, numbers, dtypes, str(params))
    if key not in _AT_ZERO:
        with jax.ensure_compile_time_eval():
            operands = [
                np.asarray(x).astype(atom.aval.dtype)
                for x, atom in zip(numbers, eqn.invars, strict=True)
            ]
            (result,) = _jaxpr.bind(eqn, *operands)
            _AT_ZERO[key] = float(np.asarray(result).real)
    return None if math.isnan(_AT_ZERO[key]) else _AT_ZERO[key]


@_rule(*_UNCHANGED)
def _each(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    """Gives every result the axes of its operand: they are of one shape."""
    return [Value(v.axes, v.zeros, v.known) for v in ins[-len(eqn.outvars) :]]


@_rule("debug_callback", "debug_print", "dce_sink")
def _nothing(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    return []


# Random numbers. Keys are never cut; draws have the shape that is left.


@_rule("random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split")
@_rule("random_clone")
def _key(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    return [walk.pinned(v.aval.shape, "a random key") for v in eqn.outvars]


@_rule("random_bits")
def _draw(walk: Walk, eqn: Any, key: Value) -> tuple[list[Value], Run]:
    out = walk.fresh(eqn.outvars[0].aval.shape)
    for axis in out.axes:
        walk.redraws.append((axis, f"another random draw by {_jaxpr.where(eqn)}"))
    keys = len(key.axes)

    def run(cut: Cut, eqn: Any, key: Any) -> list[Any]:
        return _jaxpr.bind(eqn, key, shape=cut.shape(out, eqn.outvars[0])[keys:])

    return [out], run


# Moving entries around.


@_rule("transpose")
def _transpose(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    order = eqn.params["permutation"]
    return [Value(tuple(x.axes[i] for i in order), tuple(x.zeros[i] for i in order), x.known)]


@_rule("rev")
def _rev(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    turned = eqn.params["dimensions"]
    return [_map(x, lambda i, entries: entries[::-1] if i in turned else entries)]


@_rule("squeeze")
def _squeeze(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    gone = eqn.params["dimensions"]
    left = [i for i in range(len(x.axes)) if i not in gone]
    for i in gone:
        walk.atoms.pin(x.axes[i], "of size 1")
    return [Value(tuple(x.axes[i] for i in left), tuple(x.zeros[i] for i in left), x.known)]


@_rule("broadcast_in_dim")
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


@_rule("slice")
def _slice(walk: Walk, eqn: Any, x: Value) -> tuple[list[Value], Run]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    picks = [slice(*pick) for pick in zip(starts, limits, strides, strict=True)]
    out = _map(x, lambda i, entries: entries[picks[i]])

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


@_rule("split")
def _split(walk: Walk, eqn: Any, x: Value) -> tuple[list[Value], Run]:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    ends = np.cumsum(sizes)

    def part(end: int, size: int) -> Value:
        pick = slice(end - size, end)
        return _map(x, lambda i, entries: entries[pick] if i == axis else entries)

    outs = [part(end, size) for end, size in zip(ends, sizes, strict=True)]

    def run(cut: Cut, eqn: Any, x: Any) -> list[Any]:
        return _jaxpr.bind(eqn, x, sizes=tuple(cut.size(out.axes[axis]) for out in outs))

    return outs, run


@_rule("concatenate")
def _concatenate(walk: Walk, eqn: Any, *parts: Value) -> list[Value]:
    return [_join(walk, parts, eqn.params["dimension"])]


def _join(walk: Walk, parts: Sequence[Value], along: int | None = None) -> Value:
    """Unites all axes but one, along which parts stand behind each other."""
    axes, zeros = [], []
    for i in range(len(parts[0].axes)):
        if i == along:
            axes.append(np.concatenate([p.axes[i] for p in parts]))
            zeros.append(np.concatenate([p.zeros[i] for p in parts]))
        else:
            for other in parts[1:]:
                walk.atoms.unite(parts[0].axes[i], other.axes[i])
            axes.append(parts[0].axes[i])
            zeros.append(_combine(np.logical_and, [p.zeros[i] for p in parts]))
    return Value(tuple(axes), tuple(zeros))


@_rule("stack")
def _stack(walk: Walk, eqn: Any, *parts: Value) -> list[Value]:
    new, reason = eqn.params["axis"], f"a position of {_jaxpr.where(eqn)}"
    x = _join(walk, parts)
    axis, zero = walk.atoms.pinned(len(parts), reason), walk.flags(len(parts), False)
    axes = (*x.axes[:new], axis, *x.axes[new:])
    return [Value(axes, (*x.zeros[:new], zero, *x.zeros[new:]))]


@_rule("unstack")
def _unstack(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    walk.atoms.pin(x.axes[eqn.params["axis"]], f"a position of {_jaxpr.where(eqn)}")
    return [_without(x, [eqn.params["axis"]])] * len(eqn.outvars)


@_rule("tile")
def _tile(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    reps = eqn.params["reps"]
    return [_map(x, lambda i, entries: np.tile(entries, reps[i]) if reps[i] > 1 else entries)]


@_rule("pad")
def _pad(walk: Walk, eqn: Any, x: Value, filling: Value) -> tuple[list[Value], Run]:
    config = eqn.params["padding_config"]
    axes, zeros = [], []
    sources: list[np.ndarray | None] = []
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
            left = cut.kept(x.axes[i])
            left = np.arange(len(x.axes[i])) if left is None else left
            if not len(inside) or not np.isin(left, source).all():  # padded by less than nothing
                used = np.flatnonzero(np.isin(left, source))
                array = (
                    take(array, used, i) if len(used) else jax.lax.slice_in_dim(array, 0, 0, 1, i)
                )
            low = inside[0] if len(inside) else len(source)
            changed[i] = (int(low), int(len(source) - low - len(inside)), 0)
        return _jaxpr.bind(eqn, array, filling, padding_config=tuple(changed))

    return [out], run


def _map(x: Value, change: Callable[[int, np.ndarray], np.ndarray]) -> Value:
    axes = tuple(change(i, axis) for i, axis in enumerate(x.axes))
    return Value(axes, tuple(change(i, zero) for i, zero in enumerate(x.zeros)), x.known)


@_rule("reshape")
def _reshape(walk: Walk, eqn: Any, x: Value) -> tuple[list[Value], Run]:
    shape = eqn.outvars[0].aval.shape
    axes: list[Axis] = [walk.atoms.pinned(n, "of size 1") for n in shape]
    zeros: list[Any] = [walk.flags(n, False) for n in shape]
    for before, after in _blocks(x.shape, shape):
        if len(before) == len(after) == 1:
            axes[after[0]], zeros[after[0]] = x.axes[before[0]], x.zeros[before[0]]
            continue
        old = [x.axes[i] for i in before]
        free = [i for i in before if walk.atoms.free(x.axes[i]).any()]
        if not free:
            reason = next(why for axis in old for why in walk.atoms.reason(axis))
            for i in after:
                axes[i] = walk.atoms.pinned(shape[i], reason)
            continue
        zero = [x.zeros[i] if i in free else walk.flags(len(x.axes[i]), True) for i in before]
        merged, flag = old[0], zero[0]
        where = f"{_jaxpr.where(eqn)} {_sizes(x.shape, before)} to {_sizes(shape, after)}"
        if len(old) > 1:
            merged = walk.atoms.fresh(math.prod(map(len, old)))
            walk.products.append(Product(merged, tuple(old), where))
            flag = np.asarray(np.stack(np.meshgrid(*zero, indexing="ij")).all(0)).reshape(-1)
        if len(after) == 1:
            axes[after[0]], zeros[after[0]] = merged, flag
            continue
        new = [walk.atoms.fresh(shape[i]) for i in after]
        walk.products.append(Product(merged, tuple(new), where))
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


# Sums, and what else runs along an axis.


@_rule("dot_general")
def _dot(walk: Walk, eqn: Any, left: Value, right: Value) -> list[Value]:
    return [_product(walk, eqn, left, right, eqn.params["dimension_numbers"])]


def _product(walk: Walk, eqn: Any, left: Value, right: Value, numbers: Any) -> Value:
    (lc, rc), (lb, rb) = numbers
    for i, j in zip(lc, rc, strict=True):
        zero = _combine(np.logical_or, [left.zeros[i], right.zeros[j]])
        walk.atoms.unite(left.axes[i], right.axes[j])
        walk.change(left.axes[i], zero, f"summed, not zero, by {_jaxpr.where(eqn)}")
    axes, zeros = [], []
    for i, j in zip(lb, rb, strict=True):
        walk.atoms.unite(left.axes[i], right.axes[j])
        axes.append(left.axes[i])
        zeros.append(_combine(np.logical_or, [left.zeros[i], right.zeros[j]]))
    for value, used in ((left, (*lc, *lb)), (right, (*rc, *rb))):
        for i in range(len(value.axes)):
            if i not in used:
                axes.append(value.axes[i])
                zeros.append(value.zeros[i])
    return Value(tuple(axes), tuple(zeros))


@_rule("ragged_dot_general")
def _ragged_dot(walk: Walk, eqn: Any, left: Value, right: Value, sizes: Value) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    reason = f"grouped by {_jaxpr.where(eqn)}"
    for value, axes in (
        (left, numbers.lhs_ragged_dimensions),
        (right, numbers.rhs_group_dimensions),
        (sizes, range(len(sizes.axes))),
    ):
        for i in axes:
            walk.atoms.pin(value.axes[i], reason)
    out = _product(walk, eqn, left, right, ((lc, rc), (lb, rb)))
    ragged = [i for i in numbers.lhs_ragged_dimensions if i in (*lc, *lb)]
    if ragged:  # the groups are then an axis of the result
        return [walk.pinned(eqn.outvars[0].aval.shape, reason)]
    experts = numbers.rhs_group_dimensions
    first = len(lb) + len(left.axes) - len(lc) - len(lb)
    free = [j for j in range(len(right.axes)) if j not in (*rc, *rb)]
    gone = [first + n for n, j in enumerate(free) if j in experts]
    return [_without(out, gone)]


@_rule("conv_general_dilated")
def _conv(walk: Walk, eqn: Any, left: Value, right: Value) -> tuple[list[Value], Run]:
    p = eqn.params
    (batch, inputs, *space), (outputs, taken, *window), result = p["dimension_numbers"]
    groups, atoms = p["feature_group_count"], walk.atoms
    shape = eqn.outvars[0].aval.shape
    out = walk.pinned(shape, f"a position of {_jaxpr.where(eqn)}")
    axes, zeros = list(out.axes), list(out.zeros)
    for value, positions in ((left, space), (right, window)):
        for i in positions:
            atoms.pin(value.axes[i], f"a position of {_jaxpr.where(eqn)}")
    x, rows, features = left.axes[inputs], right.axes[taken], right.axes[outputs]
    group = atoms.pinned(1, "of size 1")
    if p["batch_group_count"] > 1:
        for axis in (left.axes[batch], features):
            atoms.pin(axis, f"batch groups of {_jaxpr.where(eqn)}")
    else:
        axes[result[0]], zeros[result[0]] = left.axes[batch], left.zeros[batch]
        axes[result[1]], zeros[result[1]] = features, right.zeros[outputs]
    if groups == 1:
        atoms.unite(x, rows)
        zero = _combine(np.logical_or, [left.zeros[inputs], right.zeros[taken]])
        walk.change(x, zero, f"summed, not zero, by {_jaxpr.where(eqn)}")
    else:
        group = atoms.fresh(groups)
        for axis, within in ((x, rows), (features, None)):
            size = len(axis) // groups
            if size == 1:
                atoms.unite(axis, group)
            else:
                inside = atoms.fresh(size) if within is None else within
                where = f"the {groups} groups of {_jaxpr.where(eqn)}"
                walk.products.append(Product(axis, (group, inside), where))

    def run(cut: Cut, eqn: Any, x: Any, w: Any) -> list[Any]:
        return _jaxpr.bind(eqn, x, w, feature_group_count=cut.size(group))

    return [Value(tuple(axes), tuple(zeros))], run


def _without(x: Value, gone: Sequence[int]) -> Value:
    left = [i for i in range(len(x.axes)) if i not in gone]
    return Value(tuple(x.axes[i] for i in left), tuple(x.zeros[i] for i in left))


@_rule("reduce_sum")
def _sum(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    for i in eqn.params["axes"]:
        walk.change(x.axes[i], x.zeros[i], f"summed, not zero, by {_jaxpr.where(eqn)}")
    return [_without(x, eqn.params["axes"])]


@_rule("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
def _extreme(walk: Walk, eqn: Any, x: Value) -> list[Value]:
    for i in eqn.params["axes"]:
        never = walk.flags(len(x.axes[i]), False)
        walk.change(x.axes[i], never, f"taken part in {_jaxpr.where(eqn)}")
    return [_without(x, eqn.params["axes"])]


@_rule("reduce", "argmax", "argmin")
def _search(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    axes = eqn.params["dimensions" if "dimensions" in eqn.params else "axes"]
    for x in ins[: len(eqn.outvars)]:
        for i in axes:
            walk.atoms.pin(x.axes[i], f"searched by {_jaxpr.where(eqn)}")
        walk.unite(_without(ins[0], axes), _without(x, axes))
    flags = [walk.value(_without(x, axes).axes) for x in ins[: len(eqn.outvars)]]
    return flags


@_rule("sort", "top_k", "cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp", "fft")
@_rule("approx_top_k")
def _along(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    p, rank = eqn.params, len(ins[0].axes)
    if eqn.primitive.name == "fft":
        along = list(range(rank - len(p["fft_lengths"]), rank))
    else:
        keys = ("axis", "dimension", "operand_dimension", "reduction_dimension")
        along = [next((p[key] for key in keys if key in p), -1) % rank]
    for x in ins:
        for i in along:
            walk.atoms.pin(x.axes[i], f"ordered by {_jaxpr.where(eqn)}")
        walk.unite(ins[0], x)
    keeps_zero = eqn.primitive.name in ("cumsum", "cummax", "cummin", "cumprod", "fft")
    outs = []
    for n, var in enumerate(eqn.outvars):
        out = walk.pinned(var.aval.shape, f"ordered by {_jaxpr.where(eqn)}")
        x = ins[min(n, len(ins) - 1)]
        others = [i for i in range(rank) if i not in along]
        axes = tuple(x.axes[i] if i in others else out.axes[i] for i in range(rank))
        zeros = tuple(
            x.zeros[i] if i in others and keeps_zero else out.zeros[i] for i in range(rank)
        )
        outs.append(Value(axes, zeros))
    return outs


@_rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    p = eqn.params
    out = walk.pinned(eqn.outvars[0].aval.shape, f"a position of {_jaxpr.where(eqn)}")
    outs = []
    for x in ins[: len(eqn.outvars)]:
        axes, zeros = list(out.axes), list(out.zeros)
        for i, size in enumerate(p["window_dimensions"]):
            moves = p["window_strides"][i] != 1 or tuple(p["padding"][i]) != (0, 0)
            moves |= p["base_dilation"][i] != 1
            if size == 1 and not moves:
                axes[i], zeros[i] = x.axes[i], x.zeros[i]
            else:
                walk.atoms.pin(x.axes[i], f"a position of {_jaxpr.where(eqn)}")
        outs.append(Value(tuple(axes), tuple(zeros)))
    for other in outs[1:]:
        walk.unite(outs[0], other)
    return outs


# Reading and writing at indices.


@_rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, x: Value, *starts: Value) -> tuple[list[Value], Run]:
    out = _whole_axes(walk, eqn, x, eqn.params["slice_sizes"])

    def run(cut: Cut, eqn: Any, *args: Any) -> list[Any]:
        return _jaxpr.bind(eqn, *args, slice_sizes=cut.shape(out, eqn.outvars[0]))

    return [out], run


@_rule("dynamic_update_slice")
def _dynamic_update(walk: Walk, eqn: Any, x: Value, new: Value, *starts: Value) -> list[Value]:
    _whole_axes(walk, eqn, x, new.shape)
    zeros = []
    for i, (a, b) in enumerate(zip(x.axes, new.axes, strict=True)):
        if len(a) == len(b):
            walk.atoms.unite(a, b)
            zeros.append(x.zeros[i] & new.zeros[i])
        else:
            walk.atoms.pin(b, f"a position of {_jaxpr.where(eqn)}")
            zeros.append(walk.flags(len(a), False))
    return [Value(x.axes, tuple(zeros))]


def _whole_axes(walk: Walk, eqn: Any, x: Value, sizes: Sequence[int]) -> Value:
    """Carries the axes that are read whole, and pins the others."""
    axes, zeros = [], []
    for axis, zero, size in zip(x.axes, x.zeros, sizes, strict=True):
        if size == len(axis):
            axes.append(axis)
            zeros.append(zero)
        else:
            reason = f"a position of {_jaxpr.where(eqn)}"
            walk.atoms.pin(axis, reason)
            axes.append(walk.atoms.pinned(size, reason))
            zeros.append(walk.flags(size, False))
    return Value(tuple(axes), tuple(zeros))


@_rule("gather")
def _gather(walk: Walk, eqn: Any, x: Value, at: Value) -> tuple[list[Value], Run]:
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batch = [i for i in range(len(x.axes)) if i in d.operand_batching_dims]
    kept = [i for i in range(len(x.axes)) if i not in (*d.collapsed_slice_dims, *batch)]
    read = _whole_axes(
        walk, eqn, x, [len(x.axes[i]) if i in batch else n for i, n in enumerate(sizes)]
    )
    for i, j in zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True):
        walk.atoms.unite(x.axes[i], at.axes[j])
    outer = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in d.offset_dims]
    axes: dict[int, Axis] = dict(zip(outer, at.axes[:-1], strict=True))
    axes |= {o: read.axes[i] for o, i in zip(d.offset_dims, kept, strict=True)}
    zeros = {o: walk.flags(len(axes[o]), False) for o in outer}
    zeros |= {o: read.zeros[i] for o, i in zip(d.offset_dims, kept, strict=True)}
    walk.atoms.pin(at.axes[-1], f"an index of {_jaxpr.where(eqn)}")
    out = Value(tuple(axes[i] for i in sorted(axes)), tuple(zeros[i] for i in sorted(axes)))

    def run(cut: Cut, eqn: Any, x: Any, at: Any) -> list[Any]:
        new = list(eqn.params["slice_sizes"])
        for i in kept:
            new[i] = cut.size(read.axes[i], new[i])
        return _jaxpr.bind(eqn, x, at, slice_sizes=tuple(new))

    return [out], run


@_rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(walk: Walk, eqn: Any, x: Value, at: Value, new: Value) -> list[Value]:
    d = eqn.params["dimension_numbers"]
    batch = [i for i in range(len(x.axes)) if i in d.operand_batching_dims]
    window = [i for i in range(len(x.axes)) if i not in (*d.inserted_window_dims, *batch)]
    sizes = [1] * len(x.axes)
    for i, j in zip(window, d.update_window_dims, strict=True):
        sizes[i] = len(new.axes[j])
    for i in batch:
        sizes[i] = len(x.axes[i])
    read = _whole_axes(walk, eqn, x, sizes)
    outer = [j for j in range(len(new.axes)) if j not in d.update_window_dims]
    for j, axis in zip(outer, at.axes[:-1], strict=True):
        walk.atoms.unite(new.axes[j], axis)
    for i, j in zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True):
        walk.atoms.unite(x.axes[i], at.axes[j])
    zeros = [walk.flags(len(axis), False) for axis in x.axes]
    for i, j in zip(window, d.update_window_dims, strict=True):
        walk.atoms.unite(read.axes[i], new.axes[j])
        if len(new.axes[j]) == len(x.axes[i]):
            zeros[i] = x.zeros[i] & new.zeros[j]
    walk.atoms.pin(at.axes[-1], f"an index of {_jaxpr.where(eqn)}")
    return [Value(x.axes, tuple(zeros))]
