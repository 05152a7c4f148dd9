"""What several methods share: the mask of the highest scores, and the damped Gram."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _select
from jaxprune.patterns import Pattern

Pruned = tuple[jax.Array, jax.Array]  # the weights, with zeros, and the mask


def largest(scores: jax.Array, sparsity: Any, pattern: Pattern) -> jax.Array:
    """Returns the mask of the weights that a pattern keeps."""
    return _select.select(scores, sparsity, pattern=pattern, where=lambda *_: True)


def by_score(
    weights: jax.Array, scores: jax.Array, sparsity: float | None, pattern: Pattern
) -> Pruned:
    """Keeps the weights with the highest scores as they are."""
    mask = largest(scores, sparsity, pattern)
    return jnp.where(mask, weights, 0), mask


def mean_gram(gram: jax.Array | None, count: jax.Array, method: str) -> jax.Array:
    """Returns the mean of XᵀX over rows; an input that is always zero has a 1 on the diagonal."""
    if gram is None:
        raise ValueError(f"{method} needs the Gram, got none. Use `jp.calibrate(..., gram=True)`.")
    gram = gram.astype(jnp.float32) / jnp.maximum(count, 1)
    return gram + jnp.diag((jnp.diagonal(gram) == 0).astype(jnp.float32))
