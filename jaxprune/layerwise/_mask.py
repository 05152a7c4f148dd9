"""What several methods share: the mask of the highest scores, the mean Gram, the layers."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _select
from jaxprune._calibrate import Calibration, Statistics
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


Layer = tuple[str, int]  # a path, and which layer of a stacked param


def layers(stats: Calibration, params: Any) -> dict[Layer, list[tuple[jax.Array, Statistics]]]:
    """Lists the matrices of every layer with their statistics: parts, and groups of each."""
    places = {name: (path, len(place)) for ps in stats._names for name, path, place in ps}
    found: dict[Layer, list[tuple[jax.Array, Statistics]]] = {}
    for name, w in stats.matrices(params).items():
        path, depth = places[name]
        for i, place in enumerate(np.ndindex(w.shape[:depth])):
            for group in np.ndindex(w.shape[depth:-2]):
                at = (*place, *group)
                part = jax.tree.map(lambda x, at=at: x[at], stats[name])
                found.setdefault((path, i), []).append((w[at], part))
    return found


def by_path(stats: Calibration, layers: Iterable[Layer], values: np.ndarray) -> dict[str, Any]:
    """Returns numbers of layers by path; for a stacked param an array of them."""
    shapes = {path: np.shape(stats[name].count) for ps in stats._names for name, path, _ in ps}
    depths = {path: len(place) for ps in stats._names for _, path, place in ps}
    collected: dict[str, list[float]] = {}
    for (path, _), value in zip(layers, values, strict=True):
        collected.setdefault(path, []).append(float(value))
    return {
        path: np.reshape(of_path, shapes[path][: depths[path]]) if depths[path] else of_path[0]
        for path, of_path in collected.items()
    }
