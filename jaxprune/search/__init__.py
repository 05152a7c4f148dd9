"""Search by measured loss, one algorithm a file.

>>> import jax.numpy as jnp
>>> import jaxprune as jp
>>> params = {"in": jnp.eye(3, 4), "out": jnp.array([[1.0], [4.0], [2.0], [3.0]])}
>>> apply_fn = lambda p, x: x @ p["in"] @ p["out"]
>>> x = jnp.ones((1, 3))
>>> groups = jp.find_groups(apply_fn, params, x)
>>> loss = lambda p, x: jnp.mean((apply_fn(p, x) - 7) ** 2)
>>> print(oracle(groups, loss)(params, x))
[ 1. 16.  4.  0.]
"""

from jaxprune.search._oracle import oracle
from jaxprune.search._particle_filter import Particles, particle_filter

__all__ = ["Particles", "oracle", "particle_filter"]
