import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import patterns
from jaxprune._calibrate import Statistics
from jaxprune.layerwise import _mask
from jaxprune.patterns import Pattern

_ROUNDS, _RISE = 20, 15  # of ADMM, and those in which the sparsity rises
_STEPS = 40  # of conjugate gradients at most


def alps(
    weights: jax.Array,
    statistics: Statistics,
    sparsity: float | None = None,
    pattern: Pattern = patterns.unstructured,
) -> tuple[jax.Array, jax.Array]:
    r"""Finds which weights to keep by ADMM, then the best values of these by least squares.

    With the damped Gram H, whose inputs are scaled to unit norm, and the dense weights
    :math:`\hat W`, it minimizes :math:`\operatorname{tr}((W - \hat W)^\top H (W - \hat W))`:

    .. math::
        W &\leftarrow (H + \rho I)^{-1} (H \hat W + \rho (Z - V)) \\
        Z &\leftarrow \operatorname{top}_k(W + V), \qquad V \leftarrow V + W - Z

    20 times with one factorisation and :math:`\rho = 1`, while the sparsity rises as a cubic over
    the first 15 rounds. Conjugate gradients then fit the kept weights. The same fit starts from
    the weights that :func:`jaxprune.layerwise.wanda` scores highest, and the better of both is
    returned.

    Args:
      weights: shape ``(inputs, outputs)``.
      statistics: of what flows in, with the Gram.
      sparsity: the fraction to remove.
      pattern: the cells that are kept or pruned together.

    Returns:
      The pruned weights and their mask.

    Raises:
      ValueError: without a Gram, for a sparsity outside [0, 1), or a pattern that does not fit.

    Examples:
      >>> apply_fn = lambda w, x: x @ w
      >>> w, x = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0], [1.0, 0.8]])
      >>> statistics = jp.calibrate(apply_fn, w, [x], gram=True)[""]
      >>> print((10 * alps(w, statistics, 0.5)[0].T).round())
      [[ 0. 31.]]

    References:
      Meng et al, `ALPS <https://arxiv.org/abs/2406.07831>`_, 2024 (there the penalty changes)

      Boža, `Fast and Effective Weight Update for Pruned Large Language Models
      <https://arxiv.org/abs/2401.02938>`_, 2024 (the scaling and the rise)
    """
    gram = _mask.mean_gram(statistics.gram, statistics.count, "alps")
    scale = jnp.sqrt(jnp.diagonal(gram))
    gram = gram / (scale[:, None] * scale[None]) + 0.01 * jnp.eye(len(gram), dtype=gram.dtype)
    dense = weights.astype(jnp.float32) * jnp.where(statistics.norms > 0, scale, 0)[:, None]
    first = _fit(dense, gram, _mask.largest(jnp.abs(dense), sparsity, pattern))
    rise = 1 - (1 - np.minimum(np.arange(1, _ROUNDS + 1) / _RISE, 1)) ** 3
    chosen = _admm(dense, gram, np.float32(sparsity or 0.0) * np.float32(rise), pattern)
    last = _fit(dense, gram, _mask.largest(jnp.abs(chosen), sparsity, pattern))
    w, mask, _ = jax.tree.map(lambda a, b: jnp.where(last[2] <= first[2], a, b), last, first)
    return w / scale[:, None], mask


_product: Any = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="pattern")
def _admm(dense: jax.Array, gram: jax.Array, shares: jax.Array, pattern: Pattern) -> jax.Array:
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    inverse = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram + eye), eye)
    aim = _product(gram, dense)

    def round_(state: tuple[jax.Array, jax.Array], share: jax.Array) -> Any:
        z, v = state
        w = _product(inverse, aim + z - v)
        z = jnp.where(_mask.largest(jnp.abs(w + v), share, pattern), w + v, 0)
        return (z, v + w - z), None

    return lax.scan(round_, (dense, jnp.zeros_like(dense)), shares)[0][0]


@jax.jit
def _fit(
    dense: jax.Array, gram: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fits the kept weights of every output by conjugate gradients; also returns the error."""
    aim = _product(gram, dense)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, 0, keepdims=True)

    w = jnp.where(mask, dense, 0)
    rest = jnp.where(mask, aim - _product(gram, w), 0)
    goal = 1e-12 * dot(aim, aim)

    def step(state: Any) -> Any:
        i, w, rest, direction, size = state
        ahead = jnp.where(mask, _product(gram, direction), 0)
        curve = dot(direction, ahead)
        length = jnp.where(curve > 0, size / jnp.where(curve > 0, curve, 1), 0)
        w, rest = w + length * direction, rest - length * ahead
        new = dot(rest, rest)
        direction = rest + new / jnp.where(size > 0, size, 1) * direction
        return i + 1, w, rest, direction, new

    def unfinished(state: Any) -> jax.Array:
        return (state[0] < _STEPS) & jnp.any(state[4] > goal)

    w = lax.while_loop(unfinished, step, (0, w, rest, rest, dot(rest, rest)))[1]
    return w, mask, jnp.sum((w - dense) * (_product(gram, w) - aim))
