import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune._tree import Params, Scores


def random(params: Params, key: jax.Array) -> Scores:
    r"""Scores weights at random: :math:`s_i \sim U[0, 1)`, the baseline of every comparison.

    Args:
      params: any pytree of arrays.
      key: a PRNG key.

    Returns:
      One float32 score per weight; higher is kept.

    Examples:
      >>> random(jnp.ones((2, 3)), jax.random.key(0)).shape
      (2, 3)
    """
    _tree.check_params(params)
    return _random(params, key)


@jax.jit
def _random(params: Params, key: jax.Array) -> Scores:
    keys = [jax.random.fold_in(key, i) for i in range(len(jax.tree.leaves(params)))]

    def score(w: jax.Array, key: jax.Array) -> jax.Array:
        uniform = jax.random.uniform(key, jnp.shape(w), jnp.float32)
        return jnp.where(jnp.isnan(w), jnp.nan, uniform)  # reading w keeps its sharding

    return _tree.map_floating(score, params, _tree.rebuild(params, keys))
