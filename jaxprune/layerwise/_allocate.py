from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _progress, _select
from jaxprune._calibrate import Calibration, Statistics
from jaxprune._tree import Params
from jaxprune.layerwise import _mask
from jaxprune.layerwise._sparsegpt import sparsegpt


def allocate(
    stats: Calibration,
    params: Params,
    sparsity: float,
    *,
    method: Callable[..., tuple[jax.Array, jax.Array]] = sparsegpt,
    choices: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
) -> dict[str, Any]:
    r"""Gives each layer the sparsity with which the errors of all layers sum to the least.

    Every layer is pruned to every choice, with dense layers before it, and its error measured:

    .. math:: e_l(s) = \frac{\lVert X (W_s - W) \rVert^2}{\lVert X W \rVert^2}

    Between the choices the error is taken as linear, and where it is not convex as that of the
    lower convex hull. The least sum then follows from the slopes, smallest first.

    Args:
      stats: from :func:`jaxprune.calibrate`, with ``gram=True``.
      params: those of the calibration.
      sparsity: the fraction to remove of all weights that have statistics.
      method: prunes a layer.
      choices: the sparsities at which errors are measured, besides 0.

    Returns:
      A dict from paths to sparsities, for ``scope=`` of :func:`jaxprune.reconstruct`; for a stacked
      leaf an array with one for each layer.

    Raises:
      ValueError: without a Gram, or for a sparsity above the largest choice.

    Examples:
      >>> apply_fn = lambda p, x: (x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.eye(8), "b": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> stats = jp.calibrate(apply_fn, params, [jnp.eye(8)], gram=True)
      >>> scope = allocate(stats, params, 0.5, choices=[0.25, 0.5, 0.75])
      >>> {path: round(s, 2) for path, s in scope.items()}
      {'a': 0.75, 'b': 0.25}

    References:
      Frantar and Alistarh, `SPDY <https://arxiv.org/abs/2201.13096>`_, 2022 (there the weights of
      the layers are searched, too)
    """
    sparsity = _select.check_sparsity(sparsity)
    choices = sorted(_select.check_sparsity(choice, "choices") for choice in choices)
    if not choices or sparsity > choices[-1]:
        raise ValueError(f"sparsity must be at most that of the choices {choices}, got {sparsity}.")
    layers = _mask.layers(stats, params)
    errors = [[0.0] for _ in layers]
    for curve, parts in zip(errors, _progress.bar(layers.values(), desc="allocate"), strict=True):
        for choice in choices:
            pairs = [_errors(method, w, of_part, choice) for w, of_part in parts]
            changed, total = np.sum(pairs, 0)
            curve.append(float(changed / total) if total > 0 else 0.0)
    sizes = [sum(w.size for w, _ in parts) for parts in layers.values()]
    return _mask.by_path(stats, layers, _least(sizes, [0.0, *choices], errors, sparsity))


def _errors(
    method: Callable[..., Any], w: jax.Array, statistics: Statistics, sparsity: float
) -> tuple[float, float]:
    """Returns the squared change of the outputs of a layer, and their squares."""
    if statistics.gram is None:
        raise ValueError("allocate needs the Gram, got none. Use `jp.calibrate(..., gram=True)`.")
    change = method(w, statistics, sparsity)[0] - w
    return _power(statistics.gram, change), _power(statistics.gram, w)


def _power(gram: jax.Array, w: jax.Array) -> float:
    return float(jnp.sum(w * (gram @ w)))


def _least(
    sizes: Sequence[int], choices: Sequence[float], errors: Sequence[Sequence[float]], mean: float
) -> np.ndarray:
    """Returns the sparsities of a mean, weighted by size, whose errors sum to the least."""
    segments = []  # of the lower hulls: slope, layer, how many weights
    for layer, (size, curve) in enumerate(zip(sizes, errors, strict=True)):
        start = 0
        while start < len(choices) - 1:
            lengths = size * (np.array(choices[start + 1 :]) - choices[start])
            slopes = (np.array(curve[start + 1 :]) - curve[start]) / lengths
            end = len(slopes) - 1 - int(np.argmin(slopes[::-1]))
            segments.append((float(slopes[end]), layer, float(lengths[end])))
            start += end + 1
    pruned, left = np.zeros(len(sizes)), mean * float(np.sum(sizes))
    for _, layer, length in sorted(segments):
        pruned[layer] += min(length, left)
        left -= min(length, left)
    return pruned / np.array(sizes)
