import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _select, _tree, patterns
from jaxprune._calibrate import Statistics
from jaxprune.layerwise import _mask
from jaxprune.patterns import Pattern

_DAMPING = (0.01, 0.1, 1.0)  # times the mean of the diagonal; the first that is enough
_INPUTS = 128  # whose mask is chosen at once


def sparsegpt(
    weights: jax.Array,
    statistics: Statistics,
    sparsity: float | None = None,
    pattern: Pattern = patterns.unstructured,
) -> tuple[jax.Array, jax.Array]:
    r"""Prunes input by input, and changes the weights of later inputs to make up for it.

    With the damped Gram :math:`H = X^\top X / n + \lambda I` and the upper Cholesky factor U of
    its inverse, :math:`H^{-1} = U^\top U`, the weights of input i are pruned by

    .. math:: s_{ij} = w_{ij}^2 / U_{ii}^2, \qquad
        w_{kj} \leftarrow w_{kj} - \frac{w_{ij}}{U_{ii}} U_{ik} \quad (k > i)

    The mask is chosen for 128 inputs at a time, of which each loses the same fraction; for n:m for
    m inputs. An input that is always zero loses its weights. :math:`\lambda` is 0.01 of the mean
    of the diagonal; where that is not enough, 0.1 or 1.

    Args:
      weights: shape ``(inputs, outputs)``.
      statistics: of what flows in, with the Gram.
      sparsity: the fraction to remove.
      pattern: the cells that are kept or pruned together.

    Returns:
      The pruned weights and their mask.

    Raises:
      ValueError: without a Gram, for one that is not positive definite when damped, a sparsity
        outside [0, 1), or a pattern that does not fit.

    Examples:
      >>> apply_fn = lambda w, x: x @ w
      >>> w, x = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0], [1.0, 0.8]])
      >>> statistics = jp.calibrate(apply_fn, w, [x], gram=True)[""]
      >>> print((10 * sparsegpt(w, statistics, 0.5)[0].T).round())
      [[ 0. 31.]]

    References:
      Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023
    """
    return _sparsegpt(weights, statistics, sparsity, pattern)[:2]


def _sparsegpt(
    weights: jax.Array, statistics: Statistics, sparsity: float | None, pattern: Pattern
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Also returns the error of each weight, whose squares sum to that of the output."""
    gram = _mask.mean_gram(statistics.gram, statistics.count, "sparsegpt")
    factor = factor_of_inverse(gram)
    alive = statistics.norms > 0
    size, shares = _blocks(weights.shape, sparsity, pattern)
    return _prune(weights.astype(jnp.float32), alive, factor, shares, pattern, size)


def factor_of_inverse(gram: jax.Array) -> jax.Array:
    """Returns the upper U with UᵀU = H⁻¹, of the Gram with as much damping as needed."""
    for damping in _DAMPING:
        factor = _factor(gram, damping)
        if _tree.is_traced(factor) or bool(jnp.all(jnp.isfinite(factor))):
            return factor
    raise ValueError(
        f"the Gram must be positive definite with a damping of {_DAMPING[-1]} times the mean of "
        f"its diagonal, got one of shape {gram.shape} that is not. Check the calibration batches."
    )


@jax.jit
def _factor(gram: jax.Array, damping: float) -> jax.Array:
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    gram = gram + damping * jnp.mean(jnp.diagonal(gram)) * eye
    # Reversed, H = R Rᵀ with an upper R, and U = R⁻¹: the inverse itself is not formed.
    upper = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, eye)


def _blocks(
    shape: tuple[int, ...], sparsity: float | None, pattern: Pattern
) -> tuple[int, np.ndarray]:
    """Returns how many inputs are pruned at once, and the sparsity of each block of them.

    The last block is padded. The cells that are kept sum to exactly what `select` would keep.
    """
    inputs, outputs = shape

    def cells(n: int) -> int:
        like = jax.ShapeDtypeStruct((n, outputs), jnp.float32)
        return math.prod(jax.eval_shape(pattern.pool, like).shape) if n else 0

    if sparsity is None and pattern.share is None:
        raise ValueError("sparsity must be a number in [0, 1), got None. Pass it.")
    total = cells(inputs)
    kept = total - round(_select.check_sparsity(sparsity or 0.0) * total)
    chunk = pattern.chunk or inputs
    size = chunk if pattern.share is not None else chunk * max(_INPUTS // chunk, 1)
    size = min(size, -(-inputs // chunk) * chunk)
    ends = np.array([cells(min(n, inputs)) for n in range(0, inputs + size, size)], np.int64)
    keep = np.diff(ends * kept // total)
    return size, (1 - keep / cells(size)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("pattern", "size"))
def _prune(
    weights: jax.Array,
    alive: jax.Array,
    factor: jax.Array,
    shares: jax.Array,
    pattern: Pattern,
    size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs, outputs = weights.shape
    more = len(shares) * size - inputs
    real = jnp.pad(jnp.ones((inputs, 1), bool), ((0, more), (0, 0)))
    w = jnp.pad(jnp.where(alive[:, None], weights, 0), ((0, more), (0, 0)))
    factor = jnp.pad(factor, ((0, more), (0, more)))
    factor += jnp.diag(jnp.where(real[:, 0], 0, 1).astype(factor.dtype))

    def block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, mask, errors = state
        start = i * size
        rows = lax.dynamic_slice_in_dim(factor, start, size)
        inner = lax.dynamic_slice_in_dim(rows, start, size, 1)
        diagonal = jnp.diagonal(inner)[:, None]
        now = lax.dynamic_slice_in_dim(w, start, size)
        within = jnp.broadcast_to(lax.dynamic_slice_in_dim(real, start, size), now.shape)
        kept = _select.select(
            (now / diagonal) ** 2,
            shares[i],
            pattern=pattern,
            where=lambda *_: True,
            within=within,
        )

        def prune(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            now, error = state
            row = jnp.where(kept[j], 0, now[j]) / inner[j, j]
            return now - inner[j][:, None] * row[None], error.at[j].set(row)

        _, error = lax.fori_loop(0, size, prune, (now, jnp.zeros_like(now)))
        w = w - jnp.matmul(rows.T, error, precision=lax.Precision.HIGHEST)
        mask = lax.dynamic_update_slice_in_dim(mask, kept, start, 0)
        return w, mask, lax.dynamic_update_slice_in_dim(errors, error, start, 0)

    start = w, jnp.zeros(w.shape, bool), jnp.zeros_like(w)
    w, mask, errors = lax.fori_loop(0, len(shares), block, start)
    mask = mask[:inputs]
    return jnp.where(mask, w[:inputs], 0), mask, errors[:inputs]
