import functools

import jax
import jax.numpy as jnp

from jaxprune import _mesh, _tree
from jaxprune._tree import Params, Scores

_PAIRS = 2**22  # pairs of filters in memory at one time


def fpgm(params: Params, axis: int = -1) -> Scores:
    r"""Scores a filter by the sum of its distances to the other filters of its layer.

    .. math:: s_k = \sum_j \lVert W_k - W_j \rVert_2

    A filter near the geometric median of its layer can be replaced by the others and is removed
    first. Each weight gets an equal part of the score of its filter, so that the weights of a
    filter sum to its score. Use it as
    ``groups.select(fpgm(params), sparsity, scope="layer", reduce="first")``.

    Args:
      params: any pytree of arrays.
      axis: the axis that enumerates filters: the last one in Flax, 0 in PyTorch.

    Returns:
      One float32 score per weight; higher is kept. Leaves with fewer than two axes get `None`.

    Raises:
      ValueError: if a leaf lacks this axis.

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
                f"{_tree.show(path)}: the axis of fpgm must be an axis of every leaf with two or "
                f"more axes, got axis {axis} and shape {jnp.shape(w)}. Use -1, the last axis."
            )
    with jax.enable_x64(True):  # see `_distances`
        return _fpgm(params, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _fpgm(params: Params, axis: int) -> Scores:
    def score(w: jax.Array) -> jax.Array | None:
        return None if jnp.ndim(w) < 2 else _mesh.automatic(distances, jnp.asarray(w))

    distances = functools.partial(_distances, axis=axis)
    return _tree.map_floating(score, params)


def _distances(w: jax.Array, axis: int) -> jax.Array:
    """Returns the sum of the distances of each filter, from the products of all pairs.

    Products of close filters far from the others cancel. In float64 the error of a distance is
    below the rounding of float32 weights. The sums of some filters at a time are in memory.
    """
    if not w.size:
        return jnp.zeros(w.shape, jnp.float32)
    filters = jnp.moveaxis(w.astype(jnp.float64), axis, 0).reshape(w.shape[axis], -1)
    filters -= jnp.mean(filters, axis=0, keepdims=True)  # distances do not change with the origin
    norms = jnp.sum(filters**2, axis=1)

    def total(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        products = jnp.matmul(filters, row[0], precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(jnp.sqrt(jnp.maximum(norms + row[1] - 2 * products, 0)))

    rows = max(_PAIRS // len(filters), 1)
    sums = jax.lax.map(total, (filters, norms), batch_size=min(rows, len(filters)))
    share = (sums / filters.shape[1]).astype(jnp.float32)
    share = jnp.expand_dims(share, _tree.other_axes(w.ndim, axis % w.ndim))
    return jnp.where(jnp.isnan(w), jnp.nan, share)  # reading w keeps its sharding
