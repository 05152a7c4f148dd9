"""What a mask may look like inside one leaf.

A pattern pools the scores of a leaf to those of its units, among which :func:`jaxprune.select`
chooses, and spreads the kept units back over the leaf.
"""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Units inside a leaf, all of one size.

    Attributes:
      pool: maps the scores of a leaf to one score per unit.
      spread: maps the kept units, and the leaf's shape, to the leaf's mask.
    """

    pool: Callable[[jax.Array], jax.Array]
    spread: Callable[[jax.Array, tuple[int, ...]], jax.Array]


def _same(scores: jax.Array) -> jax.Array:
    return scores


def _same_mask(kept: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return kept


#: Every weight is a unit of its own.
unstructured = Pattern(_same, _same_mask)
