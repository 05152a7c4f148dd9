from collections.abc import Callable
from typing import Any

from jaxprune import _tree
from jaxprune.scores._magnitude import magnitude


def is_scale(path: str, leaf: Any) -> bool:
    """Says whether a leaf is named ``scale``, as the scales of norms are in Flax and Haiku."""
    return path.split("/")[-1] == "scale"


def slimming(params: Any, where: Callable[[str, Any], bool] = is_scale) -> Any:
    r"""Scores a channel by the scale of its norm: :math:`s_i = |\gamma_i|`.

    Other leaves have no score. ``groups.select(..., where=lambda path, score: True)`` ranks units
    by it, with one threshold for all layers; :func:`jaxprune.regularizers.slimming` makes scales
    small.

    Args:
      params: any pytree of arrays.
      where: ``where(path, leaf)`` says which leaves are scales: by default those named ``scale``.

    Raises:
      ValueError: for params in which no floating leaf is a scale.
      TypeError: for a leaf that is no array.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 2)), "scale": jnp.array([0.5, -2.0])}
      >>> slimming(params)["scale"].tolist()
      [0.5, 2.0]

    References:
      Liu et al, `Learning Efficient Convolutional Networks through Network Slimming
      <https://arxiv.org/abs/1708.06519>`_, 2017
    """
    _tree.check_params(params)
    check_scales(params, where)
    scales = [w if where(path, w) else None for path, w in _tree.named_leaves(params)]
    return magnitude(_tree.rebuild(params, scales))


def check_scales(params: Any, where: Callable[[str, Any], bool]) -> None:
    """Raises a `ValueError` if no floating leaf is a scale."""
    leaves = _tree.named_leaves(params)
    if not any(_tree.is_floating(w) and where(path, w) for path, w in leaves):
        raise ValueError(
            f"slimming found no scales among the leaves {[path for path, _ in leaves][:10]}. "
            "Choose them with `where=lambda path, leaf: ...`."
        )
