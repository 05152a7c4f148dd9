"""Optax links that keep pruned weights at exactly zero.

Gradients are masked before the inner optimizer, so that clipping and normalising see only what
is left; its updates are then replaced by ``-w`` where the mask is false, and
``w + (-w)`` is exactly 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _mesh, _tree
from jaxprune._select import select as _select
from jaxprune._select import whole_masks


class EnforceState(NamedTuple):
    """State of :func:`enforce`."""

    masks: Any  # as the params, bool or None
    inner: optax.OptState


class GradualState(NamedTuple):
    """State of :func:`gradual`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32
    sparsity: jax.Array  # shape=(), dtype=float32: what was last asked for
    masks: Any  # as the params, bool or None
    inner: optax.OptState


def enforce(
    inner: optax.GradientTransformation, masks: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps pruned weights at exactly zero around any optimizer.

    .. math:: u = m \odot \mathrm{inner}(m \odot g) - (1 - m) \odot w

    Exact when this link is outermost or last. Wrappers that delay updates (``MultiSteps``) or mix
    params over time (``lookahead``) are exact from their first emitted update on, if the params
    start masked. A pruned NaN stays NaN: apply :func:`jaxprune.apply_masks` once.

    Args:
      inner: any gradient transformation.
      masks: a tree, which is copied, or a callable ``params -> masks`` evaluated in ``init``.

    Returns:
      A gradient transformation; extra arguments are passed on.

    Raises:
      ValueError: in ``init`` for masks of other paths or shapes; in ``update`` without params.
      TypeError: in ``init`` for masks that are not bool.

    Examples:
      >>> params = jnp.array([1.0, 2.0])
      >>> tx = enforce(optax.sgd(0.5), jnp.array([True, False]))
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [0.5, 0.0]
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        if not jax.tree.leaves(params):  # `optax.tree.map_params` looks for where params would be
            return EnforceState(params, inner.init(params))
        # An Equinox module is a tree that can be called, too.
        made = callable(masks) and jax.tree_util.all_leaves([masks])
        return EnforceState(
            _fit(params, _evaluate(masks, params) if made else masks), inner.init(params)
        )

    def update(updates, state, params=None, **extra_args):
        _need(params, "enforce")
        updates, inner_state = _masked(inner, updates, state.masks, state.inner, params, extra_args)
        return updates, EnforceState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def gradual(
    inner: optax.GradientTransformation,
    score: Callable[..., Any],
    schedule: optax.Schedule,
    every: int = 1,
    select: Callable[..., Any] = _select,
) -> optax.GradientTransformationExtraArgs:
    """Prunes on a schedule while training, and keeps what is pruned at zero.

    Every ``every`` steps, and once the schedule has reached its final value, weights are scored and
    masked to the schedule's sparsity if it has changed. What was pruned stays pruned. Inside
    ``MultiSteps`` a due pruning is computed on every micro-step.

    Args:
      inner: any gradient transformation.
      score: maps params to scores, or ``(params, *batch)`` with ``update(..., batch=(x, y))``.
      schedule: maps the step to a sparsity, such as ``jp.schedules.cubic(...)``.
      every: steps between prunings.
      select: ``functools.partial(jp.select, scope=..., where=...)`` for other choices.

    Returns:
      A gradient transformation; extra arguments other than ``batch`` are passed on.

    Raises:
      ValueError: for ``every`` below 1; in ``update`` without params.

    Examples:
      >>> params = jnp.array([[1.0, 2.0]])
      >>> import jaxprune as jp
      >>> tx = gradual(optax.sgd(0.0), jp.scores.magnitude, jp.schedules.one_shot(0.5))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [[0.0, 2.0]]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017
    """
    if every < 1:
        raise ValueError(f"`gradual` needs every >= 1, got {every=}.")
    inner = optax.with_extra_args_support(inner)

    def whole(params: Any) -> Any:
        return whole_masks(params, select)

    def init(params):
        masks = params
        if jax.tree.leaves(params):
            masks = _fit(params, _evaluate(whole, params))
        zero = jnp.zeros((), jnp.int32)
        return GradualState(zero, jnp.zeros((), jnp.float32), masks, inner.init(params))

    def update(updates, state, params=None, *, batch=(), **extra_args):
        _need(params, "gradual")
        sparsity = jnp.asarray(schedule(state.count), jnp.float32)
        final = jnp.asarray(schedule(jnp.int32(2**31 - 1)), jnp.float32)
        due = ((state.count % every == 0) | (sparsity == final)) & (sparsity != state.sparsity)

        def prune():
            found = select(score(params, *batch), sparsity, within=state.masks)
            return _tree.refit(state.masks, found)

        # Or XLA turns the masks into integers in both branches, and keeps these: 4 bytes a weight.
        masks = jax.lax.optimization_barrier(jax.lax.cond(due, prune, lambda: state.masks))
        updates, inner_state = _masked(inner, updates, masks, state.inner, params, extra_args)
        count = optax.safe_increment(state.count)
        asked = jnp.where(due, sparsity, state.sparsity)
        return updates, GradualState(count, asked, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def get_masks(opt_state: Any) -> Any:
    """Finds the masks in an optimizer state, however deep; links with disjoint leaves are merged.

    The arrays are those of the state, and are lost when a later step donates it.

    Raises:
      ValueError: if there are none, or if two links mask the same leaf.

    Examples:
      >>> tx = optax.chain(optax.clip(1.0), enforce(optax.adam(0.1), jnp.array([True, False])))
      >>> get_masks(tx.init(jnp.ones(2))).tolist()
      [True, False]
    """
    found = [
        state.masks for state in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(state)
    ]
    if not found:
        raise ValueError(
            "found no masks in this optimizer state. Wrap the optimizer: "
            "`jp.enforce(optimizer, masks)` or `jp.gradual(...)`."
        )
    return _tree.union(found)


def set_masks(opt_state: Any, masks: Any) -> Any:
    """Swaps the masks in an optimizer state; the transformation stays, and nothing recompiles.

    Newly pruned weights become zero with the next update.

    Raises:
      ValueError: if the state holds no masks, or for masks of other paths or shapes.
      TypeError: for masks that are not bool.

    Examples:
      >>> state = enforce(optax.adam(0.1), jnp.array([True, False])).init(jnp.ones(2))
      >>> get_masks(set_masks(state, jnp.array([False, True]))).tolist()
      [False, True]
    """
    get_masks(opt_state)
    return jax.tree.map(
        lambda s: (
            s._replace(masks=_fit(s.masks, _tree.refit(s.masks, masks))) if _is_ours(s) else s
        ),
        opt_state,
        is_leaf=_is_ours,
    )


def _is_ours(x: Any) -> bool:
    return isinstance(x, (EnforceState, GradualState))


def _need(params: Any, name: str) -> None:
    if params is None:
        raise ValueError(f"`{name}` needs the params: call `update(grads, state, params)`.")


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _evaluate(masks: Callable[[Any], Any], params: Any) -> Any:
    abstract = any(map(_is_abstract, jax.tree.leaves(params)))
    return jax.eval_shape(masks, params) if abstract else masks(params)


def _fit(params: Any, masks: Any) -> Any:
    """Copies masks, or a donated step would delete the caller's, to where their params are."""
    leaves, treedef = jax.tree.flatten(params)
    placed = [
        m if m is None or _is_abstract(m) else _mesh.place(jnp.copy(m), w)
        for m, w in zip(_tree.align_masks(params, masks), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


def _masked(inner, updates, masks, inner_state, params, extra_args):
    updates = _tree.map_masks(_silence, updates, masks)
    updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
    leaves, treedef = jax.tree.flatten(updates)
    aligned = _tree.align(updates, params, "params"), _tree.align(updates, masks)
    updates = [
        u if m is None else jnp.where(m, u, -w)  # in the wider of the two dtypes
        for u, w, m in zip(leaves, *aligned, strict=True)
    ]
    return jax.tree.unflatten(treedef, updates), inner_state


def _silence(grads: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes ``where(mask, grads, 0)``."""
    if not jnp.issubdtype(grads.dtype, jnp.floating):
        return jnp.where(mask, grads, jnp.zeros_like(grads))
    # On bits: XLA on CPU vectorises the conversion of a bool to an integer, not to a choice, and an
    # optimizer may read the gradient in several loops (twice in Adam: half the cost of the link).
    bits = jnp.dtype(f"int{8 * grads.dtype.itemsize}")
    kept = jax.lax.bitcast_convert_type(grads, bits) & -mask.astype(bits)
    return jax.lax.bitcast_convert_type(kept, grads.dtype)
