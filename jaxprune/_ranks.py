"""Units in the order of their scores: which leave first, and how many of every group may."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def per_group(name: str, score: jax.Array, group: np.ndarray, count: int) -> jax.Array:
    """Gives a number for each of ``count`` groups by which to divide its scores, never 0."""
    if name == "max":
        result = jax.ops.segment_max(score, group, count)
    elif name == "l2":
        result = jnp.sqrt(jax.ops.segment_sum(score**2, group, count))
    else:
        result = jax.ops.segment_sum(score, group, count)
    if name == "mean":
        result = result / np.bincount(group, minlength=count)
    return jnp.where(result == 0, 1, result)


class Ranks:
    """The order in which units leave; everything but the scores is static, so that it traces."""

    def __init__(self, score, group, classes, groups, round_to, multiples):  # type: ignore
        self._group, self._groups = group, groups
        self._sizes = np.bincount(group, minlength=groups)
        self._steps = round_to // np.gcd(round_to, multiples)
        self._score, self._classes = score, classes
        # Equal scores leave evenly over all groups, not from the first one on.
        self._ties = np.random.default_rng(0).permutation(len(group))
        self._in_group = self._rank(group, np.zeros(len(group), bool))
        last = (self._in_group == self._sizes[group] - 1) & (classes >= 0)
        self._rank_in_class = self._rank(classes + 1, last)
        self._counts = np.bincount(classes + 1)[1:]
        owners = {(c, g) for c, g in zip(classes.tolist(), group.tolist(), strict=True) if c >= 0}
        staying = np.bincount([c for c, _ in owners], minlength=len(self._counts))
        self._most = self._counts - staying

    def _rank(self, classes: np.ndarray, last: Any) -> jax.Array:
        """Ranks units in their class, from the lowest score, those that come last at the end."""
        starts = np.concatenate([[0], np.cumsum(np.bincount(classes))])[classes]
        return _places(self._ties, self._score, last, classes) - starts

    def _removed(self, fractions: Any) -> jax.Array:
        return _first(self._rank_in_class, self._classes, fractions, self._counts, self._most)

    def wanted(self, fractions: Any) -> jax.Array:
        """Gives the units of every group that stay before rounding."""
        stays = (~self._removed(fractions)).astype(jnp.int32)
        return jax.ops.segment_sum(stays, self._group, self._groups)

    def kept(self, fractions: Any) -> jax.Array:
        """Says which units stay when a fraction of every class leaves."""
        if (self._steps == 1).all():
            return ~self._removed(fractions)
        wanted, size, step = self.wanted(fractions), self._sizes, self._steps
        nearest = jnp.clip(jnp.round(wanted / step), 1, np.maximum(size // step, 1)) * step
        stay = jnp.where((wanted == size) | (size < step), size, nearest.astype(jnp.int32))
        return self._in_group >= (size - stay)[self._group]


@jax.jit
def _places(ties, score, last, classes):  # type: ignore[no-untyped-def]
    """Gives the place of every unit in the order of classes, what comes last, scores and ties."""
    order = jnp.lexsort((ties, score, last, classes))
    return jnp.zeros(len(order), jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32))


@jax.jit
def _first(rank, classes, fractions, counts, most):  # type: ignore[no-untyped-def]
    """Says which units are among the first of their class, of which a fraction is taken."""
    count = jnp.round(jnp.asarray(fractions) * counts).astype(jnp.int32)
    return (rank < jnp.minimum(count, most)[jnp.maximum(classes, 0)]) & (classes >= 0)
