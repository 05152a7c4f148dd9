import jax
import jax.numpy as jnp

from jaxprune import _mesh, _tree
from jaxprune._tree import Params, Scores


def lamp(params: Params) -> Scores:
    r"""Scores a weight by its share of the squared weights that pruning would still keep.

    .. math:: s_i = w_i^2 \Big/ \sum_{|w_j| \ge |w_i|} w_j^2

    Inside a layer the order is that of magnitude. The largest weight of every layer scores 1, so
    one global threshold gives each layer its own sparsity and never empties a layer first. Equal
    weights enter the sum one after another. Each leaf is sorted once: :math:`O(n \log n)`.

    Args:
      params: any pytree of arrays; every leaf is a layer.

    Returns:
      One float32 score per weight; higher is kept.

    Examples:
      >>> print(lamp(jnp.array([3.0, -4.0, 0.0])))
      [0.36 1.   0.  ]

    References:
      Lee et al, `Layer-adaptive Sparsity for the Magnitude-based Pruning
      <https://arxiv.org/abs/2010.07611>`_, 2021
    """
    _tree.check_params(params)
    with jax.enable_x64(True):  # a float32 sum over a million squares is off by several percent
        return _lamp(params)


@jax.jit
def _lamp(params: Params) -> Scores:
    return _tree.map_floating(lambda w: _mesh.automatic(_shares, jnp.asarray(w)), params)


def _shares(w: jax.Array) -> jax.Array:
    size = jnp.abs(w.astype(jnp.float32)).ravel()
    tiny = float(jnp.finfo(jnp.float32).tiny)
    order = jnp.argsort(size)
    # Divided by the largest, so that no square overflows; tiny is for a leaf of zeros.
    squares = (size[order] / jnp.maximum(jnp.max(size, initial=0), tiny)) ** 2
    larger = jnp.cumsum(squares[::-1], dtype=jnp.float64)[::-1]
    shares = (squares.astype(larger.dtype) / jnp.maximum(larger, tiny)).astype(jnp.float32)
    scores = jnp.zeros_like(size).at[order].set(shares).reshape(w.shape)
    return jnp.where(jnp.isnan(w), jnp.nan, scores)  # reading w keeps its sharding
