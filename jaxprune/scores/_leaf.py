"""Scoring a whole leaf, however it is sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _mesh


def whole(score: Callable[[jax.Array], jax.Array], leaf: Any) -> jax.Array:
    """Calls a score that may sort and reshape; its result is sharded as the leaf is."""

    def read(w):
        return jnp.where(jnp.isnan(w), jnp.nan, score(w))  # reading w keeps its sharding

    return _mesh.automatic(read, jnp.asarray(leaf))
