import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree


def magnitude(params: Any, p: float = 1) -> Any:
    r"""Scores a weight by its size: :math:`s_i = |w_i|^p`, so that a unit sums to norm^p.

    Args:
      params: any pytree of arrays.
      p: the power, above 0.

    Raises:
      ValueError: for p not above 0, or params without floating leaves.
      TypeError: for a leaf that is no array.

    Examples:
      >>> magnitude(jnp.array([1.0, -2.0])).tolist()
      [1.0, 2.0]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    if not 0 < p < float("inf"):
        raise ValueError(f"magnitude needs a finite p above 0, got {p}.")
    _tree.check_params(params)
    return _magnitude(params, p)


@functools.partial(jax.jit, static_argnums=1)
def _magnitude(params, p):
    return _tree.map_floating(lambda w: jnp.abs(jnp.asarray(w, jnp.float32)) ** p, params)
