from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune.scores._leaf import whole


def lamp(params: Any) -> Any:
    r"""Scores a weight by its share in what pruning would still leave of its layer.

    .. math:: s_i = w_i^2 \Big/ \sum_{|w_j| \ge |w_i|} w_j^2

    Within a layer the order is that of magnitude. The largest weight of every layer scores 1, so
    that one global threshold gives each layer a sparsity of its own, and takes that weight last.
    Equal weights come one after another in the sum. Sorts every leaf once: :math:`O(n \log n)`.

    Args:
      params: any pytree of arrays; every leaf is a layer.

    Raises:
      ValueError: for params without floating leaves.
      TypeError: for a leaf that is no array.

    Examples:
      >>> print(lamp(jnp.array([3.0, -4.0, 0.0])))
      [0.36 1.   0.  ]

    References:
      Lee et al, `Layer-adaptive Sparsity for the Magnitude-based Pruning
      <https://arxiv.org/abs/2010.07611>`_, 2021
    """
    _tree.check_params(params)
    with jax.enable_x64(True):  # a float32 sum over a million squares is wrong by percents
        return _lamp(params)


@jax.jit
def _lamp(params):
    return _tree.map_floating(lambda w: whole(_leaf, w), params)


def _leaf(w):
    size = jnp.abs(w.astype(jnp.float32)).ravel()
    tiny = jnp.finfo(jnp.float32).tiny
    order = jnp.argsort(size)
    # Divided by the largest, so that no square overflows; tiny is for a leaf of zeros.
    squares = (size[order] / jnp.maximum(jnp.max(size, initial=0), tiny)) ** 2
    left = jnp.cumsum(squares[::-1], dtype=jnp.float64)[::-1]
    shares = (squares / jnp.maximum(left, tiny)).astype(jnp.float32)
    return jnp.zeros_like(size).at[order].set(shares).reshape(w.shape)
