import jax
import jax.numpy as jnp

from jaxprune import patterns
from jaxprune._calibrate import Statistics
from jaxprune.layerwise import _mask
from jaxprune.patterns import Pattern


def wanda(
    weights: jax.Array,
    statistics: Statistics,
    sparsity: float | None = None,
    pattern: Pattern = patterns.per_output,
) -> tuple[jax.Array, jax.Array]:
    r"""Prunes weights that are small times the norm of their input.

    .. math:: s_{ij} = |w_{ij}| \, \lVert x_i \rVert_2

    The norm is taken over all calibration rows. By default the weights of each output compete.

    Args:
      weights: shape ``(inputs, outputs)``.
      statistics: of what flows in.
      sparsity: the fraction to remove.
      pattern: the cells that are kept or pruned together.

    Returns:
      The pruned weights and their mask.

    Raises:
      ValueError: for a sparsity outside [0, 1), or a pattern that does not fit.

    Examples:
      >>> apply_fn = lambda w, x: x @ w
      >>> w, x = jnp.array([[1.0, 4.0], [3.0, 2.0]]), jnp.array([[5.0, 1.0]])
      >>> statistics = jp.calibrate(apply_fn, w, [x])[""]
      >>> print(wanda(w, statistics, 0.5)[0])
      [[1. 4.]
       [0. 0.]]

    References:
      Sun et al, `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2023
    """
    scores = jnp.abs(weights) * statistics.norms[:, None]
    return _mask.by_score(weights, scores, sparsity, pattern)


wanda.gram = False  # type: ignore[attr-defined]
