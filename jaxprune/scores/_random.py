from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree


def random(params: Any, key: jax.Array) -> Any:
    r"""Scores weights at random: :math:`s_i \sim U[0, 1)`; the baseline of every comparison.

    A weight that is NaN scores NaN, as with every other criterion.

    Args:
      params: any pytree of arrays.
      key: a PRNG key.

    Raises:
      ValueError: for params without floating leaves.
      TypeError: for a leaf that is no array.

    Examples:
      >>> random(jnp.ones((2, 3)), jax.random.key(0)).shape
      (2, 3)
    """
    _tree.check_params(params)
    return _random(params, key)


@jax.jit
def _random(params, key):
    leaves, treedef = jax.tree.flatten(params)
    keys = treedef.unflatten([jax.random.fold_in(key, i) for i in range(len(leaves))])

    def score(w, key):
        uniform = jax.random.uniform(key, jnp.shape(w), jnp.float32)
        return jnp.where(jnp.isnan(w), jnp.nan, uniform)  # reading w keeps its sharding

    return _tree.map_floating(score, params, keys)
