"""Rules of primitives that work entry by entry, change nothing, or draw random numbers."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._program import jaxpr as _jaxpr
from jaxprune._program.cut import Cut
from jaxprune._program.values import (
    SAME,
    ZERO,
    Kinds,
    Rule,
    Ruling,
    Value,
    View,
    product,
    same,
    where_zero,
    zeros,
)
from jaxprune._program.walk import Walk

# Operands have the shape of the result, or are scalars, or broadcast sizes of one.
ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type cos cosh digamma "
    "div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag "
    "integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne "
    "neg nextafter not one_minus_square or polygamma population_count pow random_gamma_grad real "
    "regularized_incomplete_beta rem round rsqrt select_if_vmap select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor zeta "
    "zeros_like"
).split()
_UNCHANGED = (
    "copy device_put from_edtype layout_constraint name nonbatchable nondifferentiable_backward "
    "nontraceable optimization_barrier pbroadcast ppermute pvary reduce_precision "
    "reduced_vary_cast relayout reshard sharding_constraint stop_gradient tie to_edtype"
).split()
_UNCUT = (  # they have no result, or random keys
    "debug_callback debug_print dce_sink random_seed random_wrap random_unwrap random_fold_in "
    "random_split random_clone"
).split()
_LINEAR = frozenset("add add_any convert_element_type neg sub".split())


def _elementwise(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    known = _evaluate(walk, eqn, ins) if all(v.known is not None for v in ins) else None
    pairs = []
    for i, size in enumerate(eqn.outvars[0].aval.shape):
        axes = [v.axes[i] for v in ins if v.shape and len(v.axes[i]) == size]
        axes = axes or list(walk.fresh((size,)).axes)
        for other in axes[1:]:
            walk.atoms.unite(axes[0], other)
        pairs.append((axes[0], _kinds(walk, eqn, ins, i, size)))
    return [Value.of(pairs, known)]


def _kinds(walk: Walk, eqn: Any, ins: Sequence[Value], i: int, size: int) -> Kinds:
    """Returns the kinds of the slices along an axis of an elementwise result."""
    name = eqn.primitive.name
    kinds = []
    for v in ins:
        carried = v.known is None and v.shape and len(v.axes[i]) == size
        kinds.append(v.kinds[i] if carried else ZERO if v.known == 0 else SAME)
    if name in ("mul", "and"):
        return product(*kinds)
    if name in ("div", "rem"):
        zero = zeros([kinds[0]])
        by_zero = zeros([kinds[1]])
        return where_zero(zero if by_zero is False else zero & ~np.asarray(by_zero), same(*kinds))
    if name == "select_n":
        return where_zero(zeros(kinds[1:]), same(*kinds))
    # Where all unknown operands are zero, the result is what the primitive makes of zeros: zero
    # for a ReLU, not for an exponential.
    unknown = [k for v, k in zip(ins, kinds, strict=True) if v.known is None]
    zero = zeros(unknown)
    if zero is not False and not (name in _LINEAR and len(unknown) == len(ins)):
        zero = zero if _evaluate(walk, eqn, ins) == 0 else False
    return where_zero(zero, same(*kinds))


def _evaluate(walk: Walk, eqn: Any, ins: Sequence[Value]) -> float | None:
    """Applies a primitive to zeros, and to the numbers that are known."""
    numbers = tuple(0.0 if v.known is None else v.known for v in ins)
    dtypes = tuple(str(atom.aval.dtype) for atom in eqn.invars)
    if any("key" in name for name in dtypes):
        return None
    params = {key: p for key, p in eqn.params.items() if key != "sharding"}
    key = (eqn.primitive.name, numbers, dtypes, str(params))
    if key not in walk.at_zero:
        with jax.ensure_compile_time_eval():
            pairs = zip(numbers, eqn.invars, strict=True)
            operands = [jax.device_put(np.asarray(x).astype(a.aval.dtype)) for x, a in pairs]
            (result,) = _jaxpr.bind(eqn, *operands)
            walk.at_zero[key] = float(np.asarray(result).real)
    return walk.at_zero[key]


def _unchanged(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    """Passes the axes of every operand on to its result, which has the same shape."""
    return [Value.of(v.pairs, v.known) for v in ins[-len(eqn.outvars) :]]


def _uncut(walk: Walk, eqn: Any, *ins: Value) -> list[Value]:
    return [walk.pinned(v.aval.shape, "a random key") for v in eqn.outvars]


def _random_bits(walk: Walk, eqn: Any, key: Value) -> Ruling:
    """Draws as many numbers as are kept: they are other numbers, which is recorded."""
    out = walk.fresh(eqn.outvars[0].aval.shape)
    for axis in out.axes:
        walk.redraws.append((axis, f"another random draw by {_jaxpr.where(eqn)}"))
    keys = len(key.axes)

    def run(cut: Cut, view: View, eqn: Any, key: Any) -> list[Any]:
        return _jaxpr.bind(eqn, key, shape=cut.shape(out, eqn.outvars[0], view)[keys:])

    return Ruling([out], run)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_UNCHANGED, _unchanged),
    **dict.fromkeys(_UNCUT, _uncut),
    "random_bits": _random_bits,
}
