import functools

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune._tree import Params, Scores


def magnitude(params: Params, p: float = 1) -> Scores:
    r"""Scores a weight by its size: :math:`s_i = |w_i|^p`.

    The scores of a unit sum to the p-th power of its p-norm.

    Args:
      params: any pytree of arrays.
      p: the power, above 0.

    Returns:
      One float32 score per weight; higher is kept.

    Raises:
      ValueError: if p is not above 0 and finite.

    Examples:
      >>> magnitude(jnp.array([1.0, -2.0])).tolist()
      [1.0, 2.0]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    if not 0 < p < float("inf"):
        raise ValueError(f"magnitude: p must be above 0 and finite, got {p}.")
    _tree.check_params(params)
    return _magnitude(params, p)


@functools.partial(jax.jit, static_argnames="p")
def _magnitude(params: Params, p: float) -> Scores:
    return _tree.map_floating(lambda w: jnp.abs(jnp.asarray(w, jnp.float32)) ** p, params)
