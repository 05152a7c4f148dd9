import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune.scores._leaf import whole


def fpgm(params: Any, axis: int = -1) -> Any:
    r"""Scores a filter by its distances to the other filters of its layer, summed.

    .. math:: s_k = \sum_j \lVert W_k - W_j \rVert_2

    A filter near the geometric median of its layer can be replaced by the others, and leaves first.
    Every weight gets an equal part of its filter's score, so that the filter's weights sum to it:
    use it as ``groups.select(fpgm(params), sparsity, scope="layer", reduce="first")``.

    Args:
      params: any pytree of arrays. Leaves with fewer than two axes get `None`.
      axis: the axis that numbers filters: the last one in Flax, 0 in PyTorch.

    Raises:
      ValueError: for a leaf without this axis, or params without floating leaves.
      TypeError: for a leaf that is no array.

    Examples:
      >>> fpgm(jnp.array([[0.0, 3.0, 0.0], [0.0, 4.0, 0.0]])).sum(0).tolist()
      [5.0, 10.0, 5.0]

    References:
      He et al, `Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
      Acceleration <https://arxiv.org/abs/1811.00250>`_, 2019
    """
    _tree.check_params(params)
    for path, w in _tree.named_leaves(params):
        if _tree.is_floating(w) and (ndim := jnp.ndim(w)) >= 2 and not -ndim <= axis < ndim:
            raise ValueError(
                f"{_tree.show(path)}: fpgm needs axis {axis} in every leaf of two or more axes, "
                f"got shape {jnp.shape(w)}. The last axis, -1, is in all of them."
            )
    return _fpgm(params, axis)


@functools.partial(jax.jit, static_argnums=1)
def _fpgm(params, axis):
    return _tree.map_floating(
        lambda w: whole(functools.partial(_leaf, axis=axis), w) if jnp.ndim(w) >= 2 else None,
        params,
    )


def _leaf(w, axis):
    filters = jnp.moveaxis(w.astype(jnp.float32), axis, 0).reshape(w.shape[axis], -1)
    filters -= jnp.mean(filters, axis=0, keepdims=True)  # small products lose fewer digits
    products = jnp.matmul(filters, filters.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.diag(products)
    distances = jnp.sqrt(jnp.maximum(norms[:, None] + norms[None] - 2 * products, 0))
    share = jnp.sum(distances, axis=1) / max(filters.shape[1], 1)
    return jnp.broadcast_to(jnp.expand_dims(share, range(1, w.ndim)).swapaxes(0, axis), w.shape)
