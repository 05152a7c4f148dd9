from typing import Any

from jaxprune import _tree
from jaxprune._tree import Params, Scores, Where
from jaxprune.scores._magnitude import magnitude


def is_scale(path: str, leaf: Any) -> bool:
    """Returns whether a leaf is named ``scale``, like the scales of norms in Flax and Haiku."""
    return path.split("/")[-1] == "scale"


def slimming(params: Params, where: Where = is_scale) -> Scores:
    r"""Scores a channel by the scale of its normalisation: :math:`s_i = |\gamma_i|`.

    ``groups.select(scores, sparsity)`` ranks units by these scores, with one threshold for all
    layers. :func:`jaxprune.regularizers.slimming` makes scales small in training.

    Args:
      params: any pytree of arrays.
      where: maps ``(path, leaf)`` to whether the leaf is a scale: by default, is named ``scale``.

    Returns:
      One float32 score per scale; higher is kept. Other leaves get `None`.

    Raises:
      ValueError: if no floating leaf is a scale.

    Examples:
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


def check_scales(params: Params, where: Where) -> None:
    """Raises a `ValueError` if no floating leaf is a scale."""
    leaves = _tree.named_leaves(params)
    if not any(_tree.is_floating(w) and where(path, w) for path, w in leaves):
        raise ValueError(
            f"slimming found no scales among the leaves {[path for path, _ in leaves][:10]}. "
            "Choose them with `where=lambda path, leaf: ...`."
        )
