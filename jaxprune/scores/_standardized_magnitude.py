from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _mesh, _tree


def standardized_magnitude(params: Any) -> Any:
    r"""Scores a weight by its size in standard deviations of its layer.

    .. math:: s_i = |w_i| / \operatorname{std}(w)

    Han et al. keep the weights with :math:`|w_i| > q \operatorname{std}(w)`, with one quality
    parameter q for all layers: that is :math:`s_i > q`. A global selection finds the q that gives
    the sparsity asked for; for a given q compare the scores with it.

    Args:
      params: any pytree of arrays; every leaf is a layer.

    Raises:
      ValueError: for params without floating leaves.
      TypeError: for a leaf that is no array.

    Examples:
      >>> scores = standardized_magnitude(jnp.array([1.0, -1.0, 3.0, -3.0]))
      >>> (scores > 1).tolist()
      [False, False, True, True]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    _tree.check_params(params)
    return _standardized_magnitude(params)


@jax.jit
def _standardized_magnitude(params):
    return _tree.map_floating(_leaf, params)


def _leaf(w):
    w = jnp.asarray(w, jnp.float32)
    limits = jnp.finfo(jnp.float32)
    axes = tuple(range(w.ndim))
    mean = _mesh.exact_sum(w, axes) / max(w.size, 1)
    deviation = jnp.sqrt(_mesh.exact_sum((w - mean) ** 2, axes) / max(w.size, 1))
    # Of equal weights the deviation is 0: their scores are large, and finite.
    return jnp.minimum(jnp.abs(w) / jnp.maximum(deviation, limits.tiny), limits.max)
