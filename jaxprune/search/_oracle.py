"""The loss without each unit, computed again only from where the units of a group meet.

Up to there a value is sliced along one axis: its entries at the indices of a unit do not depend on
the other units of the group. So removing the entire group gives, at these indices, the same entries
as removing the unit alone, and all other entries are dense. Both are computed once per group.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _program, _progress, _ranks, _tree
from jaxprune._tree import Params
from jaxprune.groups import Groups
from jaxprune.units._activation import evaluate

_KNOWN, _SLICED, _MIXED = range(3)  # does not depend on the group, is sliced, or neither


def oracle(
    groups: Groups, loss: Callable[..., jax.Array], *, absolute: bool = False, memory: float = 0
) -> Callable[..., jax.Array]:
    r"""Scores a unit by how much the loss rises without it, measured.

    .. math:: s_u = L(w \odot m_u) - L(w)

    where :math:`m_u` are the masks that remove unit u alone. :func:`jaxprune.units.taylor`
    estimates this score. The traced loss is evaluated again for each unit, from the first equation
    in which the units of its group meet. Earlier values are computed once, so late layers are
    cheap. Inside a loop, and along a residual stream, nearly everything is computed again. The
    evaluations form one compiled program, which moves a progress bar in a terminal or a notebook.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar.
      absolute: whether to score :math:`|s_u|`, so that units whose removal improves the loss are
        kept as well; Molchanov et al found that better.
      memory: bytes for values that are computed again, by which units are evaluated in parallel.
        0 evaluates one unit at a time, which is fastest on a CPU; more may suit an accelerator.

    Returns:
      A function of ``(params, *batch)`` that returns a float32 array of shape ``(len(groups),)``.

    Raises:
      ValueError: for params other than those of the groups, or a negative ``memory``.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> params = {"in": jnp.eye(2), "out": jnp.array([[1.0], [-3.0]])}
      >>> apply_fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> groups = jp.find_groups(apply_fn, params, jnp.ones((5, 2)))
      >>> print(oracle(groups, lambda p, x: jnp.mean(apply_fn(p, x)))(params, jnp.ones((5, 2))))
      [-1.  3.]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    _loss.check_groups("search.oracle", groups)
    _tree.check_function("search.oracle: loss", loss, _loss.CURRIED)
    if not _tree.is_number(memory) or not memory >= 0:
        got = _tree.brief(memory)
        raise ValueError(f"memory must be a number of bytes, 0 or more, got {got}.")
    compute = functools.partial(_scores, loss, groups, absolute, float(memory))

    def score(params: Params, *batch: Any) -> jax.Array:
        _ranks.check_params(groups, params)

        def measure(bar: int | None) -> jax.Array:
            return _program.freeze(compute, bar, params, *batch)(bar, params, *batch)

        if not _progress.seen() or _tree.is_traced((params, batch)):
            return measure(None)
        with _progress.compiled(len(groups), desc="oracle", unit="unit") as bar:
            return jax.block_until_ready(measure(bar))

    return score


def _scores(
    loss: Callable[..., jax.Array],
    groups: Groups,
    absolute: bool,
    memory: float,
    bar: jax.Array | None,
    params: Params,
    *batch: Any,
) -> jax.Array:
    def scalar(params: Params, *batch: Any) -> jax.Array:
        checked, floats = _loss.of_floats("search.oracle", loss, params, *batch)
        return checked(floats)

    options: dict[str, Any] = {key: groups.options[key] for key in ("exact", "split")}
    flat, (out,), units, separate = evaluate(groups, scalar, params, batch, **options)
    count = len(jax.tree.leaves(params))
    losses = jnp.zeros(len(groups), jnp.float32)
    for group in groups.groups:
        alone = bool(separate[group.units].all())
        without, size = _without(flat, out, units, count, group.units, alone)

        def measure(unit: jax.Array, without: Callable[..., jax.Array] = without) -> jax.Array:
            if bar is not None:
                _progress.advance(bar, unit)
            return without(unit)

        batch_size = max(int(memory / max(size, 1)), 1)
        measured = jax.lax.map(measure, jnp.asarray(group.units), batch_size=batch_size)
        losses = losses.at[group.units - 1].set(measured)
    change = losses - flat.arrays[out].astype(jnp.float32)
    return jnp.abs(change) if absolute else change


def _without(
    flat: Any,
    out: int,
    units: Sequence[tuple[np.ndarray, ...]],  # for each value and axis, the unit of each index
    leaves: int,  # the first values are those of the params
    group: np.ndarray,
    separate: bool,  # whether the loss unites no units of the group
) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """Returns a function from the masked unit of a group to the loss, and its memory use in bytes.

    A result is sliced if it and its operands have the units of the group on one axis each: a
    contracted axis is one of both operands, so that a result would have its units on a second axis.
    The result of a loop, which may mix its carry, is never sliced.
    """
    axes = [[axis for axis, unit in enumerate(v) if np.isin(unit, group).any()] for v in units]
    kinds = [_SLICED if i < leaves and axes[i] else _KNOWN for i in range(len(units))]
    bare = list(flat.arrays)  # the values without the entire group, if they are sliced

    def masked(i: int, unit: Any) -> jax.Array:
        # Unit 2 of a value with units 1 to 3:   dense  d₁ d₂ d₃
        #                                        bare   b₁ b₂ b₃   ->   d₁ b₂ d₃
        where = jnp.zeros((1,) * len(units[i]), bool)
        for axis in axes[i]:
            others = _tree.other_axes(len(units[i]), axis)
            where |= jnp.expand_dims(jnp.isin(units[i][axis], unit), others)
        return jnp.where(where, bare[i], flat.arrays[i])

    for i in range(leaves):
        if axes[i]:  # a masked leaf is zero
            bare[i] = jnp.zeros((), bare[i].dtype)
            bare[i] = masked(i, group)
    for eqn, ins, outs in flat.steps:
        kind = max((kinds[i] for i in ins), default=_KNOWN)
        if kind == _SLICED:
            single = all(len(axes[i]) <= 1 for i in ins) and all(len(axes[i]) == 1 for i in outs)
            if separate and single and not _program.inner(eqn):
                for i, x in zip(outs, _program.bind(eqn, *(bare[i] for i in ins)), strict=True):
                    bare[i] = x
            else:
                kind = _MIXED
        for i in outs:
            kinds[i] = kind
    mixed = [step for step in flat.steps if any(kinds[i] == _MIXED for i in step.outs)]
    read = {i for step in mixed for i in step.ins} | {out}
    sliced = sorted(i for i in read if kinds[i] == _SLICED)

    def without(unit: jax.Array) -> jax.Array:
        arrays = list(flat.arrays)
        for i in sliced:
            arrays[i] = masked(i, unit)
        for eqn, ins, outs in mixed:
            for i, x in zip(outs, _program.bind(eqn, *(arrays[i] for i in ins)), strict=True):
                arrays[i] = x
        return arrays[out].astype(jnp.float32)

    computed = [flat.arrays[i] for i in [*sliced, *(i for step in mixed for i in step.outs)]]
    return without, sum(x.size * x.dtype.itemsize for x in computed)
