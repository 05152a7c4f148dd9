r"""Penalties that shrink what is to be pruned, as optax links in front of the optimizer.

Each adds the gradient of a penalty to that of the loss, which stays as it is:

>>> import jax.numpy as jnp
>>> import optax
>>> params = {"scale": jnp.array([0.5, -2.0])}
>>> tx = optax.chain(slimming(0.1), optax.sgd(1.0))
>>> updates, _ = tx.update({"scale": jnp.zeros(2)}, tx.init(params), params)
>>> print(updates["scale"])
[-0.1  0.1]
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _mesh, _tree
from jaxprune.groups import Groups
from jaxprune.optimizer import _fit, _need
from jaxprune.scores._slimming import check_scales, is_scale

__all__ = ["group_lasso", "growing", "slimming"]


def slimming(
    strength: float, where: Callable[[str, Any], bool] = is_scale
) -> optax.GradientTransformationExtraArgs:
    r"""Draws the scales of norms towards zero, so that some channels fade.

    .. math:: g_\gamma \leftarrow g_\gamma + \lambda \, \mathrm{sign}(\gamma)

    the subgradient of :math:`\lambda \sum |\gamma|`. After training, rank the units by
    :func:`jaxprune.scores.slimming`.

    Args:
      strength: :math:`\lambda`; in the paper 1e-4 for VGG, 1e-5 for ResNet and DenseNet.
      where: ``where(path, leaf)`` says which leaves are scales: by default those named ``scale``,
        which those of layer norms are too.

    Raises:
      ValueError: in ``init`` if no floating leaf is a scale; in ``update`` without params.

    Examples:
      >>> params = {"scale": jnp.array([0.5, 0.0])}
      >>> tx = slimming(0.25)
      >>> tx.update({"scale": jnp.ones(2)}, tx.init(params), params)[0]["scale"].tolist()
      [1.25, 1.0]

    References:
      Liu et al, `Learning Efficient Convolutional Networks through Network Slimming
      <https://arxiv.org/abs/1708.06519>`_, 2017
    """

    def init(params):
        if jax.tree.leaves(params):
            check_scales(params, where)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        _need(params, "slimming")

        def term(path, w):
            return strength * jnp.sign(w) if where(path, w) else None

        return _add(updates, params, term), state

    return optax.GradientTransformationExtraArgs(init, update)


def group_lasso(groups: Groups, strength: float) -> optax.GradientTransformationExtraArgs:
    r"""Draws whole units towards zero: the sum of their norms is the penalty.

    .. math:: g \leftarrow g + \lambda \frac{\partial}{\partial w} \sum_u \lVert w_u \rVert_2

    where :math:`w_u` is all that leaves with unit u. A weight of two units is drawn by both. A unit
    at zero is left alone. The gradient alone takes no unit to exactly zero: select and mask after.

    Args:
      groups: what :func:`jaxprune.find_groups` found for these params.
      strength: :math:`\lambda`.

    Raises:
      ValueError: for groups without units; in ``init`` for params of other paths or shapes; in
        ``update`` without params.

    Examples:
      >>> import jaxprune as jp
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
    if not len(groups):
        raise ValueError(f"Nothing can leave, so there is nothing to penalise.\n{groups}")

    def init(params):
        if jax.tree.leaves(params):
            _tree.align(params, groups.like, "groups")
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        _need(params, "group_lasso")
        pull = _pull(groups, params)

        def term(path, w):
            pulls = [
                jnp.expand_dims(strength * pull[unit], others)
                for unit, others in _slices(groups, path)
            ]
            return w * sum(pulls) if pulls else None

        return _add(updates, params, term), state

    return optax.GradientTransformationExtraArgs(init, update)


class GrowingState(NamedTuple):
    """State of :func:`growing`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32
    masks: Any  # as the params, bool or None: what is going to stay


def growing(
    masks: Any, growth: float, every: int, limit: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Presses what is going to leave ever harder, before it leaves.

    .. math:: g_i \leftarrow g_i + \min(\delta (1 + \lfloor t / K \rfloor), \tau) \, w_i
       \quad \text{where the mask is false}

    so that the network has time to do without it. Then apply the masks and fine-tune. In the paper
    (GReg-1) the filters with the smallest L1 norm are chosen, and these alone are pressed; masks of
    units press all that leaves with them.

    Args:
      masks: a tree, which is copied: ``True`` stays, ``False`` is going to leave.
      growth: :math:`\delta`, by which the factor grows; 1e-4 in the paper.
      every: :math:`K`, the steps between growths.
      limit: :math:`\tau`, where the factor stops. SGD at learning rate η needs it below 2 / η.

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
    if every < 1:
        raise ValueError(f"`growing` needs every >= 1, got {every=}.")

    def init(params):
        fitted = _fit(params, masks) if jax.tree.leaves(params) else params
        return GrowingState(jnp.zeros((), jnp.int32), fitted)

    def update(updates, state, params=None, **extra_args):
        _need(params, "growing")
        names = [path for path, _ in _tree.named_leaves(params)]
        found = dict(zip(names, _tree.align_masks(params, state.masks), strict=True))
        factor = jnp.minimum(growth * (1 + state.count // every), limit)

        def term(path, w):
            return None if found[path] is None else jnp.where(found[path], 0.0, factor * w)

        count = optax.safe_increment(state.count)
        return _add(updates, params, term), GrowingState(count, state.masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _slices(groups: Groups, path: str) -> list[tuple[Any, tuple[int, ...]]]:
    """Lists the units along every axis of a leaf that has some, and its other axes."""
    axes = range(len(groups.unit[path]))
    return [
        (unit, tuple(i for i in axes if i != axis))
        for axis, unit in enumerate(groups.unit[path])
        if unit.any()
    ]


@functools.partial(jax.jit, static_argnums=0)
def _pull(groups: Groups, params: Any) -> jax.Array:
    """Gives 1 / norm of every unit; 0 for those at zero, and for number 0, which stays."""
    squares = jnp.zeros(len(groups) + 1)
    for path, w in _tree.named_leaves(params):
        for unit, others in _slices(groups, path):
            square = jnp.sum(jnp.square(w.astype(jnp.float32)), others)
            squares = squares.at[unit].add(_mesh.replicated(square))
    squares = squares.at[0].set(0.0)
    return jnp.where(squares > 0, jax.lax.rsqrt(squares), 0.0)


def _add(updates: Any, params: Any, term: Callable[[str, jax.Array], Any]) -> Any:
    """Adds ``term(path, weights)`` to the gradient of every floating leaf, where it is one."""
    leaves, treedef = jax.tree.flatten(updates)
    names = [path for path, _ in _tree.named_leaves(updates)]
    aligned = _tree.align(updates, params, "params")
    terms = [
        term(path, w) if _tree.is_floating(w) else None
        for path, w in zip(names, aligned, strict=True)
    ]
    return jax.tree.unflatten(
        treedef,
        [g if t is None else g + t.astype(g.dtype) for g, t in zip(leaves, terms, strict=True)],
    )
