"""Penalties that prepare weights for pruning, as optax transformations before the optimizer.

Each transformation adds the gradient of its penalty to the gradient of the loss.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _mesh, _tree
from jaxprune._tree import Masks, Params, Where
from jaxprune.groups import Groups
from jaxprune.optimizer import check_given, copy_masks
from jaxprune.scores._slimming import check_scales, is_scale

__all__ = ["group_lasso", "growing", "slimming"]


def slimming(strength: float, where: Where = is_scale) -> optax.GradientTransformationExtraArgs:
    r"""Adds an L1 penalty on the scales of normalisation layers.

    .. math:: g_\gamma \leftarrow g_\gamma + \lambda \, \mathrm{sign}(\gamma)

    This is the subgradient of :math:`\lambda \sum |\gamma|`. The penalty drives the scales of
    unimportant channels towards zero. After training, rank the units by
    :func:`jaxprune.scores.slimming`.

    Args:
      strength: :math:`\lambda`. The paper uses 1e-4 for VGG, and 1e-5 for ResNet and DenseNet.
      where: ``where(path, leaf)`` returns whether a leaf is a scale. The default selects all leaves
        named ``scale``, including those of layer norms.

    Raises:
      ValueError: in ``init`` if no floating leaf is a scale; in ``update`` without params.

    Examples:
      >>> params = {"scale": jnp.array([0.5, -2.0])}
      >>> tx = optax.chain(slimming(0.1), optax.sgd(1.0))
      >>> updates, _ = tx.update({"scale": jnp.zeros(2)}, tx.init(params), params)
      >>> print(updates["scale"])
      [-0.1  0.1]

    References:
      Liu et al, `Learning Efficient Convolutional Networks through Network Slimming
      <https://arxiv.org/abs/1708.06519>`_, 2017
    """

    def init(params):
        if jax.tree.leaves(params):
            check_scales(params, where)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        check_given(params, "slimming")

        def term(path, w):
            return strength * jnp.sign(w) if where(path, w) else None

        return _add(updates, params, term), state

    return optax.GradientTransformationExtraArgs(init, update)


def group_lasso(groups: Groups, strength: float) -> optax.GradientTransformationExtraArgs:
    r"""Adds a group-lasso penalty on the norms of units.

    .. math:: g \leftarrow g + \lambda \frac{\partial}{\partial w} \sum_u \lVert w_u \rVert_2

    where :math:`w_u` holds all weights of unit u. A weight that belongs to two units takes part in
    two norms. The gradient of a unit at zero is zero. The penalty makes units small, but never
    exactly zero: select and mask them after training.

    Args:
      groups: the groups of these params, from :func:`jaxprune.find_groups`.
      strength: :math:`\lambda`.

    Raises:
      ValueError: for groups without units; in ``init`` for params of other paths or shapes; in
        ``update`` without params.
      TypeError: for groups of another kind.

    Examples:
      >>> params = {"in": jnp.array([[3.0, 0.0]]), "out": jnp.array([[4.0], [0.0]])}
      >>> groups = jp.find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((5, 1)))
      >>> tx = group_lasso(groups, 1.0)
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> print(tx.update(grads, tx.init(params), params)[0]["out"])
      [[0.8]
       [0. ]]

    References:
      Yuan and Lin, `Model selection and estimation in regression with grouped variables
      <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006

      Wen et al, `Learning Structured Sparsity in Deep Neural Networks
      <https://arxiv.org/abs/1608.03665>`_, 2016
    """
    if not isinstance(groups, Groups):
        raise TypeError(
            f"group_lasso: groups must be Groups, got {type(groups).__name__}. Pass what "
            "`jp.find_groups(apply_fn, params, *inputs)` returns."
        )
    if not len(groups):
        raise ValueError(
            f"group_lasso: groups must have at least one unit, got none. All are pinned:\n{groups}"
        )

    def init(params):
        if jax.tree.leaves(params):
            _tree.align(params, groups.like, "groups")
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        check_given(params, "group_lasso")
        inverse = strength * _inverse_norms(groups, params)

        def term(path, w):
            factors = [jnp.expand_dims(inverse[unit], axes) for unit, axes in _slices(groups, path)]
            factors = [factor.astype(w.dtype) for factor in factors]
            return w * sum(factors) if factors else None

        return _add(updates, params, term), state

    return optax.GradientTransformationExtraArgs(init, update)


class GrowingState(NamedTuple):
    """State of :func:`growing`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32
    masks: Masks  # of the shapes of the params, bool or None: the weights without a penalty


def growing(
    masks: Masks, growth: float, every: int, limit: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a growing L2 penalty to the weights that are about to be pruned.

    .. math:: g_i \leftarrow g_i + \min(\delta (1 + \lfloor t / K \rfloor), \tau) \, w_i
       \quad \text{where the mask is false}

    While these weights shrink, the network has time to adapt. Apply the masks afterwards and
    fine-tune. The paper (GReg-1) penalises only the filters that have the smallest L1 norms. With
    masks of units, all members of a unit are penalised.

    Args:
      masks: a tree, which is copied; weights whose mask is false are penalised.
      growth: :math:`\delta`, the increment of the factor; 1e-4 in the paper.
      every: :math:`K`, the number of steps between two increments.
      limit: :math:`\tau`, the largest factor. SGD with learning rate η diverges above 2 / η.

    Raises:
      ValueError: for ``every`` below 1; in ``init`` for masks of other paths or shapes; in
        ``update`` without params.
      TypeError: in ``init`` for masks that are not bool.

    Examples:
      >>> params = jnp.array([2.0, 2.0])
      >>> tx = growing(jnp.array([True, False]), growth=0.25, every=1)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads, state = tx.update(jnp.zeros(2), state, params)
      ...     print(grads)
      [0.  0.5]
      [0. 1.]
      [0.  1.5]

    References:
      Wang et al, `Neural Pruning via Growing Regularization
      <https://arxiv.org/abs/2012.09243>`_, 2021
    """
    _tree.check_count("growing: every", every)

    def init(params):
        return GrowingState(jnp.zeros((), jnp.int32), copy_masks(params, masks))

    def update(updates, state, params=None, **extra_args):
        check_given(params, "growing")
        entries = {path: mask for path, _, mask in _tree.match(params, state.masks)}
        factor = jnp.minimum(growth * (1 + state.count // every).astype(jnp.float32), limit)

        def term(path, w):
            return (
                None
                if entries[path] is None
                else jnp.where(entries[path], 0.0, factor.astype(w.dtype) * w)
            )

        state = GrowingState(optax.safe_increment(state.count), state.masks)
        return _add(updates, params, term), state

    return optax.GradientTransformationExtraArgs(init, update)


def _slices(groups: Groups, path: str) -> list[tuple[Any, tuple[int, ...]]]:
    """Lists, for every axis of a leaf that has units, their numbers and the other axes."""
    axes = enumerate(groups.unit[path])
    return [(unit, _tree.other_axes(len(groups.unit[path]), i)) for i, unit in axes if unit.any()]


@functools.partial(jax.jit, static_argnames="groups")
def _inverse_norms(groups: Groups, params: Params) -> jax.Array:
    """Computes 1 / norm of every unit; 0 for units at zero and for number 0, the pinned slices."""
    squares = jnp.zeros(len(groups) + 1)
    for path, w in _tree.named_leaves(params):
        for unit, others in _slices(groups, path):
            square = jnp.sum(jnp.square(_tree.wide(w)), others)
            squares = squares.at[unit].add(_mesh.replicated(square))
    positive = (squares > 0).at[0].set(False)
    # At zero `rsqrt` has no derivative, which `where` would multiply by 0, to NaN.
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _add(
    updates: optax.Updates, params: Params, term: Callable[[str, jax.Array], jax.Array | None]
) -> optax.Updates:
    """Adds ``term(path, weights)`` to the gradient of every floating leaf, unless it is `None`."""
    entries = zip(_tree.named_leaves(updates), _tree.align(updates, params, "params"), strict=True)
    leaves = []
    for (path, g), w in entries:
        gradient = term(path, _tree.wide(w)) if _tree.is_floating(w) else None
        leaves.append(g if gradient is None else g + gradient.astype(g.dtype))
    return _tree.rebuild(updates, leaves)
