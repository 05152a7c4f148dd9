import jax
import jax.numpy as jnp

from jaxprune import patterns
from jaxprune._calibrate import Statistics
from jaxprune.layerwise import _mask
from jaxprune.patterns import Pattern


def ria(
    weights: jax.Array,
    statistics: Statistics,
    sparsity: float | None = None,
    pattern: Pattern = patterns.per_output,
) -> tuple[jax.Array, jax.Array]:
    r"""Prunes weights that matter little to their input and to their output.

    .. math:: s_{ij} = \Big(\frac{|w_{ij}|}{\sum_k |w_{ik}|} + \frac{|w_{ij}|}{\sum_k |w_{kj}|}\Big)
        \lVert x_i \rVert_2^{1/2}

    Both sums make it unlikely that an input or an output loses all its weights. By default the
    weights of each output compete.

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
      >>> w, x = jnp.array([[1.0, 4.0], [3.0, 2.0]]), jnp.array([[1.0, 1.0]])
      >>> statistics = jp.calibrate(apply_fn, w, [x])[""]
      >>> print(ria(w, statistics, 0.5)[0])
      [[0. 4.]
       [3. 0.]]

    References:
      Zhang et al, `Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
      Models <https://openreview.net/forum?id=Tr0lPx9woF>`_, 2024
    """
    size = jnp.abs(weights)

    def share(axis: int) -> jax.Array:
        total = jnp.sum(size, axis, keepdims=True)
        return size / jnp.where(total == 0, 1, total)

    scores = (share(0) + share(1)) * jnp.sqrt(statistics.norms)[:, None]
    return _mask.by_score(weights, scores, sparsity, pattern)


ria.gram = False  # type: ignore[attr-defined]
