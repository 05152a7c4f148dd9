from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _select
from jaxprune._calibrate import Calibration
from jaxprune._tree import Params
from jaxprune.layerwise import _mask


def owl(
    stats: Calibration,
    params: Params,
    sparsity: float,
    *,
    spread: float = 0.08,
    outlier: float = 5.0,
    block: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    r"""Gives layers with more outliers a lower sparsity.

    The outliers of a layer are the weights whose score :math:`|w_{ij}| \lVert x_i \rVert_2`
    exceeds M times the mean of the layer, and :math:`D_l` is their fraction. Then

    .. math:: s_l = s + \lambda - 2 \lambda \frac{D_l - \min D}{\max D - \min D} + c

    where c makes the total of all weights exact, and no layer keeps less than a tenth of the mean
    (in the paper a layer can lose all weights).

    Args:
      stats: from :func:`jaxprune.calibrate`.
      params: those of the calibration.
      sparsity: the fraction to remove of all weights that have statistics.
      spread: :math:`\lambda`, by which sparsities differ at most from the middle.
      outlier: M.
      block: maps a path to the block whose weights share a sparsity; by default each leaf, and each
        layer of a stacked leaf, is one.

    Returns:
      A dict from paths to sparsities, for ``scope=`` of :func:`jaxprune.reconstruct`; for a stacked
      leaf an array with one for each layer.

    Raises:
      ValueError: for a sparsity outside [0, 1).

    Examples:
      >>> apply_fn = lambda p, x: (x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.eye(8), "b": jnp.ones((8, 8))}
      >>> stats = jp.calibrate(apply_fn, params, [jnp.ones((1, 8))])
      >>> {path: round(s, 2) for path, s in owl(stats, params, 0.5).items()}
      {'a': 0.42, 'b': 0.58}

    References:
      Yin et al, `Outlier Weighed Layerwise Sparsity
      <https://arxiv.org/abs/2310.05175>`_, 2023
    """
    sparsity = _select.check_sparsity(sparsity)
    found = _mask.layers(stats, params)
    parts: dict[Any, list[_mask.Layer]] = {}
    for path, i in found:
        parts.setdefault((block(path) if block else path, i), []).append((path, i))

    def scores(layer: _mask.Layer) -> list[np.ndarray]:
        return [np.ravel(jnp.abs(w) * s.norms[:, None]) for w, s in found[layer]]

    blocks = [np.concatenate([s for p in part for s in scores(p)]) for part in parts.values()]
    outliers = np.array([np.mean(scores > outlier * scores.mean()) for scores in blocks])
    sizes = np.array([len(scores) for scores in blocks], np.float64)
    width = np.ptp(outliers)
    scaled = (outliers - outliers.min()) / (width or 1) * 2 * spread
    keep = scaled - np.average(scaled, weights=sizes) + (1 - sparsity)
    keep = _within(keep, sizes, 1 - sparsity)
    shares = {layer: 1 - s for part, s in zip(parts.values(), keep, strict=True) for layer in part}
    return _mask.by_path(stats, found, np.array([shares[layer] for layer in found]))


def _within(keep: np.ndarray, sizes: np.ndarray, mean: float) -> np.ndarray:
    """Clips to [a tenth of the mean, 1], and moves what does not fit to the others."""
    least = mean / 10
    for _ in range(len(keep)):
        keep = np.clip(keep, least, 1)
        missing = (mean - np.average(keep, weights=sizes)) * sizes.sum()
        free = (keep < 1) if missing > 0 else (keep > least)
        if abs(missing) < 1e-9 or not free.any():
            break
        keep = keep + free * missing / sizes[free].sum()
    return np.clip(keep, least, 1)
