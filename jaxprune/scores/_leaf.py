"""Scoring a whole leaf, however it is sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, auto_axes, use_abstract_mesh


def whole(score: Callable[[jax.Array], jax.Array], leaf: Any) -> jax.Array:
    """Calls a score that may sort and reshape; its result is sharded as the leaf is.

    On a mesh with explicit axes every such operation would need a sharding: there the compiler is
    left to choose them.
    """

    def read(w):
        return jnp.where(jnp.isnan(w), jnp.nan, score(w))  # reading w keeps its sharding

    leaf = jnp.asarray(leaf)
    sharding = jax.typeof(leaf).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return read(leaf)
    with use_abstract_mesh(sharding.mesh):
        return auto_axes(read, out_sharding=sharding)(leaf)
