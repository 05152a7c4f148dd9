import jax
import jax.numpy as jnp

from jaxprune import patterns
from jaxprune._calibrate import Statistics
from jaxprune.layerwise import _mask
from jaxprune.patterns import Pattern


def magnitude(
    weights: jax.Array,
    statistics: Statistics | None,
    sparsity: float | None = None,
    pattern: Pattern = patterns.unstructured,
) -> tuple[jax.Array, jax.Array]:
    r"""Prunes the smallest weights of a layer, whatever flows in.

    .. math:: s_{ij} = |w_{ij}|

    Args:
      weights: shape ``(inputs, outputs)``.
      statistics: not used.
      sparsity: the fraction to remove.
      pattern: the cells that are kept or pruned together.

    Returns:
      The pruned weights and their mask.

    Raises:
      ValueError: for a sparsity outside [0, 1), or a pattern that does not fit.

    Examples:
      >>> weights, mask = magnitude(jnp.array([[1.0, -4.0], [3.0, 2.0]]), None, 0.5)
      >>> print(weights)
      [[ 0. -4.]
       [ 3.  0.]]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    return _mask.by_score(weights, jnp.abs(weights), sparsity, pattern)


magnitude.gram = False  # type: ignore[attr-defined]
