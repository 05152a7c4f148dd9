import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxprune.groups import Groups


def flops(groups: "Groups") -> jax.Array:
    """Gives the FLOPs that leave with each unit, if it leaves alone.

    Those of the inputs with which the groups were found, whatever their batch size. Molchanov et al
    subtract them from the scores of :func:`taylor`, times a small number.

    Args:
      groups: from ``find_groups``.

    Returns:
      A float32 array of shape ``(len(groups),)``.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> groups = jp.find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((1, 3)))
      >>> print(flops(groups))
      [10. 10. 10. 10.]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    saved = np.zeros(len(groups) + 1)
    for macs, axes in groups.terms:
        left = np.ones(len(groups) + 1)
        for unit in axes:
            left *= len(unit) - np.bincount(unit, minlength=len(left))
        saved += 2 * macs * (math.prod(map(len, axes)) - left)
    return jnp.asarray(saved[1:], jnp.float32)
