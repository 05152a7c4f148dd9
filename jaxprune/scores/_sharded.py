"""Scores of leaves that are sharded over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _mesh


def score_leaf(score: Callable[[jax.Array], jax.Array], leaf: Any) -> jax.Array:
    """Scores one leaf with a function that may sort and reshape; keeps sharding and NaN."""

    def run(w: jax.Array) -> jax.Array:
        # Reading w elementwise gives the result the sharding of w, which a sort or reshape loses.
        return jnp.where(jnp.isnan(w), jnp.nan, score(w))

    return _mesh.automatic(run, jnp.asarray(leaf))
