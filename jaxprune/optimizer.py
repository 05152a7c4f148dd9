"""Optax transformations that keep pruned weights at exactly zero.

Gradients are masked first, so that clipping and normalisation ignore pruned weights. The updates
are then replaced by ``-w`` where the mask is false, and ``w + (-w)`` is exactly 0.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _mesh, _select, _tree
from jaxprune import masks as _masks
from jaxprune._tree import Masks, Params, Score, Select

__all__ = ["EnforceState", "GradualState", "enforce", "get_masks", "gradual", "set_masks"]


class EnforceState(NamedTuple):
    """State of :func:`enforce`."""

    masks: Masks  # of the shapes of the params, bool or None
    inner: optax.OptState


class GradualState(NamedTuple):
    """State of :func:`gradual`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32
    sparsity: jax.Array  # shape=(), dtype=float32: the last one selected, or 0
    masks: Masks  # of the shapes of the params, bool or None
    inner: optax.OptState


def enforce(
    inner: optax.GradientTransformation, masks: Masks | Callable[[Params], Masks]
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps pruned weights at exactly zero around any optimizer.

    .. math:: u = m \odot \mathrm{inner}(m \odot g) - (1 - m) \odot w

    This is exact if the link is the outermost or the last one. Inside wrappers that delay updates
    (``MultiSteps``) or mix params over time (``lookahead``, ``schedule_free``), it is exact from
    the first emitted update on, provided that the params start masked. Around ``schedule_free``,
    the evaluated params are masked as well. A pruned NaN stays NaN, because ``NaN - NaN`` is NaN:
    call :func:`jaxprune.apply_masks` once to remove it.

    Args:
      inner: any gradient transformation.
      masks: a tree, which is copied, or a callable ``params -> masks``, evaluated in ``init``.

    Returns:
      A gradient transformation. Extra arguments of ``update`` are passed to ``inner``.

    Raises:
      ValueError: in ``init`` for masks of other paths or shapes; in ``update`` without params.
      TypeError: for an ``inner`` of another kind; in ``init`` for masks that are not bool.

    Examples:
      >>> params = jnp.array([1.0, 2.0])
      >>> tx = enforce(optax.sgd(0.5), jnp.array([True, False]))
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [0.5, 0.0]
    """
    inner = _checked(inner, "enforce")

    def init(params):
        return EnforceState(copy_masks(params, masks), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        check_given(params, "enforce")
        updates, inner_state = _masked(inner, updates, state.masks, state.inner, params, extra_args)
        return updates, EnforceState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def gradual(
    inner: optax.GradientTransformation,
    score: Score,
    schedule: optax.Schedule,
    every: int = 1,
    select: Select = _select.select,
    begin: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Prunes on a schedule during training and keeps pruned weights at zero.

    At the steps ``begin + n * every``, and when the schedule reaches its final value, the weights
    are scored and masked to the scheduled sparsity, unless it is the same as before. Pruned weights
    stay pruned. Inside ``MultiSteps``, a due pruning step is computed on every micro-step.

    The params that the link is given are pruned, and so are the evaluated params of
    ``gradual(schedule_free(...), ...)``. Other copies of the weights are not: the average of
    ``optax.incremental_update``, the slow params of ``lookahead(gradual(...))`` and the evaluated
    ones of ``schedule_free(gradual(...))``. The last two also mix old weights into the params. Mask
    what you evaluate: ``jp.apply_masks(average, masks)``. After a pruning,
    ``optax.value_and_grad_from_state`` returns the value before it: use ``jax.value_and_grad``.
    A derivative through ``update`` takes the masks as constants.

    Args:
      inner: any gradient transformation.
      score: maps params to scores, or ``(params, *batch)`` with ``update(..., batch=(x, y))``. A
        leaf without scores is never pruned. In ``init``, a score that takes a batch is not called:
        every floating leaf that ``select`` chooses then has a mask.
      schedule: maps the step to a sparsity, such as ``jp.schedules.cubic(...)``.
      every: number of steps between two pruning steps.
      select: maps ``(scores, sparsity, within=masks)`` to masks. To pass further arguments, use
        ``functools.partial(jp.select, scope=..., where=...)``.
      begin: one of the pruning steps. To count from the begin of the schedule, as in the paper,
        pass its ``begin`` here too.

    Returns:
      A gradient transformation. Extra arguments other than ``batch`` are passed to ``inner``.

    Raises:
      ValueError: for ``every`` below 1 or ``begin`` below 0; in ``init`` if there is no leaf to
        prune; in ``update`` without params.
      TypeError: for arguments of another kind.

    Examples:
      >>> params = jnp.array([[1.0, 2.0]])
      >>> tx = gradual(optax.sgd(0.0), jp.scores.magnitude, jp.schedules.one_shot(0.5))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [[0.0, 2.0]]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017
    """
    inner = _checked(inner, "gradual")
    _tree.check_function("gradual: score", score, "Pass `jp.scores.magnitude`, not its result.")
    _tree.check_function("gradual: schedule", schedule, "Use `jp.schedules.one_shot(0.9)`.")
    _tree.check_function("gradual: select", select, "Use `functools.partial(jp.select, ...)`.")
    _tree.check_count("gradual: every", every)
    _tree.check_count("gradual: begin", begin, least=0)

    def whole(params):
        scores = None if _takes_batch(score) else jax.eval_shape(score, params)
        return _select.whole_masks(params, select, scores)

    def init(params):
        count, sparsity = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return GradualState(count, sparsity, copy_masks(params, whole), inner.init(params))

    def update(updates, state, params=None, *, batch=(), **extra_args):
        check_given(params, "gradual")
        sparsity = jnp.asarray(schedule(state.count), jnp.float32)
        # The last sparsity is selected even if its step is not on the grid.
        final = jnp.asarray(schedule(jnp.int32(2**31 - 1)), jnp.float32)
        on_grid = (state.count - begin) % every == 0
        due = (on_grid | (sparsity == final)) & (sparsity != state.sparsity)
        # Masks are piecewise constant, and not all that selects them can be differentiated.
        fixed, sparsity = jax.lax.stop_gradient(((params, *batch), sparsity))

        def prune():
            masks = select(score(*fixed), sparsity, within=state.masks)
            # A leaf that this score leaves out keeps its mask.
            return _tree.refit(state.masks, _masks.combine(state.masks, masks))

        masks = state.masks
        if jax.tree.leaves(masks):  # none, for a label of `optax.partition` that no leaf carries
            # Without the barrier XLA converts the masks to integers inside both branches, and the
            # result of the `cond` takes 4 bytes a weight instead of 1.
            masks = jax.lax.optimization_barrier(jax.lax.cond(due, prune, lambda: masks))
        updates, inner_state = _masked(inner, updates, masks, state.inner, params, extra_args)
        count, last = optax.safe_increment(state.count), jnp.where(due, sparsity, state.sparsity)
        return updates, GradualState(count, last, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def get_masks(opt_state: optax.OptState) -> Masks:
    """Returns the masks in an optimizer state, at any depth.

    The masks of links with disjoint leaves are merged. The arrays belong to the state: a later
    step that donates the state deletes them.

    Raises:
      ValueError: if the state holds no masks, or if two links mask the same leaf.

    Examples:
      >>> tx = optax.chain(optax.clip(1.0), enforce(optax.adam(0.1), jnp.array([True, False])))
      >>> get_masks(tx.init(jnp.ones(2))).tolist()
      [True, False]
    """
    states = jax.tree.leaves(opt_state, is_leaf=_is_link_state)
    trees = [state.masks for state in states if _is_link_state(state)]
    if not trees:
        raise ValueError(
            "opt_state must hold masks, got a state without masks. Wrap the optimizer in "
            "`jp.enforce(optimizer, masks)` or `jp.gradual(...)`."
        )
    return _tree.union(trees)


def set_masks(opt_state: optax.OptState, masks: Masks) -> optax.OptState:
    """Returns an optimizer state with other masks, for the same transformation.

    Nothing is compiled again. Newly pruned weights become zero in the next update. The state of
    :func:`gradual` prunes further at its next pruning step, to the scheduled sparsity.

    Raises:
      ValueError: if the state holds no masks, or for masks of other paths or shapes.
      TypeError: for masks that are not bool.

    Examples:
      >>> state = enforce(optax.adam(0.1), jnp.array([True, False])).init(jnp.ones(2))
      >>> get_masks(set_masks(state, jnp.array([False, True]))).tolist()
      [False, True]
    """
    get_masks(opt_state)  # raises if there are none

    def replace(state):
        if _is_link_state(state):
            state = state._replace(masks=copy_masks(state.masks, _tree.refit(state.masks, masks)))
        if isinstance(state, GradualState):  # so that the next pruning step is due
            state = state._replace(sparsity=jax.tree.map(lambda x: 0 * x, state.sparsity))
        return state

    return jax.tree.map(replace, opt_state, is_leaf=_is_link_state)


def _is_link_state(x: Any) -> bool:
    return isinstance(x, (EnforceState, GradualState))


def _checked(inner: Any, link: str) -> optax.GradientTransformationExtraArgs:
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"{link}: inner must be a gradient transformation, got {inner!r:.60}. Call the "
            "function that returns it: `optax.adam(1e-3)`."
        )
    return optax.with_extra_args_support(inner)


def _takes_batch(score: Score) -> bool:
    """Returns whether a score takes more than params, so that ``init`` cannot evaluate it."""
    parameters = inspect.signature(score).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(needed) > 1 or any(p.kind is p.VAR_POSITIONAL for p in needed)


def check_given(params: Params | None, link: str) -> None:
    """Raises a `ValueError` if ``update`` of a link was called without params."""
    if params is None:
        raise ValueError(
            f"{link}: params must be given, got None. Call `update(grads, state, params)`."
        )


def copy_masks(params: Params, masks: Masks | Callable[[Params], Masks]) -> Masks:
    """Copies masks, or those that a function of params returns, to the devices of their params.

    Without the copy, a step that donates the optimizer state would delete the caller's masks.
    """
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:  # the placeholder with which `optax.tree.map_params` asks where params would be
        return params
    # A callable of the type of the params, such as an Equinox module, is a tree of masks.
    if callable(masks) and type(masks) is not type(params):
        abstract = any(isinstance(w, jax.ShapeDtypeStruct) for w in leaves)
        masks = jax.eval_shape(masks, params) if abstract else masks(params)
    placed = [
        m if m is None or isinstance(m, jax.ShapeDtypeStruct) else _mesh.place(jnp.copy(m), w)
        for m, w in zip(_tree.align_masks(params, masks), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


def _masked(inner, updates, masks, inner_state, params, extra_args):
    updates = _tree.map_masks(_silence, updates, masks)
    updates, inner_state = inner.update(updates, inner_state, params, **extra_args)

    def mask_z(state):
        return (
            state._replace(z=_tree.map_masks(_silence, state.z, masks)) if _has_z(state) else state
        )

    inner_state = jax.tree.map(mask_z, inner_state, is_leaf=_has_z)
    aligned = _tree.align(updates, params, "params"), _tree.align(updates, masks)
    leaves = [
        u if m is None else jnp.where(m, u, -w)  # in the wider dtype of u and w
        for u, w, m in zip(jax.tree.leaves(updates), *aligned, strict=True)
    ]
    return _tree.rebuild(updates, leaves), inner_state


def _has_z(state: Any) -> bool:
    """Returns whether a state holds weights that are evaluated together with the params."""
    return isinstance(state, optax.contrib.ScheduleFreeState)


def _silence(grads: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes ``where(mask, grads, 0)``."""
    if jnp.issubdtype(grads.dtype, jnp.floating):
        return _silence_bits(grads, mask)
    return jnp.where(mask, grads, jnp.zeros_like(grads))


@jax.custom_jvp  # because the conversion to bits has no derivative
def _silence_bits(grads: jax.Array, mask: jax.Array) -> jax.Array:
    # On the bits, because XLA on CPU vectorises the conversion of a bool to an integer, but not a
    # select by a bool. Adam reads the gradient in two loops: half the cost of the link was here.
    bits = jnp.dtype(f"int{8 * grads.dtype.itemsize}")
    kept = jax.lax.bitcast_convert_type(grads, bits) & -mask.astype(bits)
    return jax.lax.bitcast_convert_type(kept, grads.dtype)


@_silence_bits.defjvp
def _silence_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _silence_bits(*primals), jnp.where(primals[1], tangents[0], jnp.zeros_like(tangents[0]))
