from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import patterns
from jaxprune._calibrate import Statistics
from jaxprune.layerwise._wanda import wanda
from jaxprune.patterns import Pattern

_CYCLES = 50


def dsnot(
    weights: jax.Array,
    statistics: Statistics,
    sparsity: float | None = None,
    pattern: Pattern = patterns.per_output,
    *,
    start: Callable[..., tuple[jax.Array, jax.Array]] = wanda,
) -> tuple[jax.Array, jax.Array]:
    r"""Swaps kept and pruned weights of each output until the mean output is nearly that of before.

    The mean error of output j is :math:`e_j = \sum_{i\ \text{pruned}} \bar x_i w_{ij}`. A cycle
    restores the pruned weight with the largest :math:`\operatorname{sign}(e_j)\, \bar x_i w_{ij} /
    \operatorname{var}(x_i)`, and prunes, of the kept weights that move :math:`e_j` towards 0, the
    one that :func:`jaxprune.layerwise.wanda` scores lowest. An output is done when a swap would
    not reduce :math:`|e_j|`, or after 50 cycles. Kept weights do not change.

    Args:
      weights: shape ``(inputs, outputs)``.
      statistics: of what flows in.
      sparsity: the fraction to remove.
      pattern: ``unstructured`` or ``per_output``, as a swap may break other patterns.
      start: the method that chooses the first mask.

    Returns:
      The pruned weights and their mask.

    Raises:
      ValueError: for another pattern, or a sparsity outside [0, 1).

    Examples:
      >>> apply_fn = lambda w, x: x @ w
      >>> w, x = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0, 1.0, 1.0], [1.0, 3.0, 2.0]])
      >>> statistics = jp.calibrate(apply_fn, w, [x])[""]
      >>> print(dsnot(w, statistics, 1 / 3)[0].T)
      [[0. 2. 3.]]

    References:
      Zhang et al, `Dynamic Sparse No Training <https://arxiv.org/abs/2310.08915>`_, 2023 (there a
      threshold on the error ends the swaps)
    """
    if pattern not in (patterns.unstructured, patterns.per_output):
        raise ValueError(
            "dsnot: pattern must be `unstructured` or `per_output`, got another one. Use "
            "`jp.layerwise.sparsegpt` or `alps` for it."
        )
    _, mask = start(weights, statistics, sparsity, pattern)
    mask = _swap(weights, mask, statistics)
    return jnp.where(mask, weights, 0), mask


dsnot.gram = False  # type: ignore[attr-defined]


@jax.jit
def _swap(weights: jax.Array, mask: jax.Array, statistics: Statistics) -> jax.Array:
    mean, columns = statistics.mean[:, None], jnp.arange(weights.shape[1])
    spread = statistics.norms**2 / jnp.maximum(statistics.count, 1) - statistics.mean**2
    effect = mean * weights  # on the mean output
    gain = effect / jnp.maximum(spread, 1e-6 * jnp.maximum(jnp.max(spread), 1e-30))[:, None]
    score = jnp.abs(weights) * statistics.norms[:, None]

    def cycle(state: Any) -> Any:
        i, mask, error, _ = state
        sign = jnp.sign(error)[None]
        restored = jnp.argmax(jnp.where(mask, -jnp.inf, sign * gain), 0)
        pruned = jnp.argmin(jnp.where(mask & (sign * effect < 0), score, jnp.inf), 0)
        able = ~mask[restored, columns] & mask[pruned, columns]
        able &= sign[0] * effect[pruned, columns] < 0
        after = error - effect[restored, columns] + effect[pruned, columns]
        better = able & (jnp.abs(after) < jnp.abs(error))
        mask = mask.at[restored, columns].set(mask[restored, columns] | better)
        mask = mask.at[pruned, columns].set(mask[pruned, columns] & ~better)
        return i + 1, mask, jnp.where(better, after, error), better

    error = jnp.sum(jnp.where(mask, 0, effect), 0)
    start = 0, mask, error, jnp.ones(weights.shape[1], bool)
    return lax.while_loop(lambda s: (s[0] < _CYCLES) & jnp.any(s[3]), cycle, start)[1]
