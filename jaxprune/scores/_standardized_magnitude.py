import jax
import jax.numpy as jnp

from jaxprune import _sums, _tree
from jaxprune._tree import Params, Scores


def standardized_magnitude(params: Params) -> Scores:
    r"""Scores a weight by its size in standard deviations of its layer.

    .. math:: s_i = |w_i| / \operatorname{std}(w)

    Han et al keep the weights with :math:`|w_i| > q \operatorname{std}(w)`, where the quality
    parameter q is the same for all layers. That is :math:`s_i > q`, so a global selection finds the
    q for a given sparsity. For a given q, compare the scores with it.

    Args:
      params: any pytree of arrays; every leaf is a layer.

    Returns:
      One float32 score per weight; higher is kept.

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
def _standardized_magnitude(params: Params) -> Scores:
    return _tree.map_floating(_deviations, params)


def _deviations(w: jax.Array) -> jax.Array:
    w = jnp.asarray(w, jnp.float32)
    limits = jnp.finfo(jnp.float32)
    axes = tuple(range(w.ndim))
    mean = _sums.exact_sum(w, axes) / max(w.size, 1)
    deviation = jnp.sqrt(_sums.exact_sum((w - mean) ** 2, axes) / max(w.size, 1))
    # Equal weights have a deviation of 0: their scores are large, but finite.
    return jnp.minimum(jnp.abs(w) / jnp.maximum(deviation, limits.tiny), limits.max)
