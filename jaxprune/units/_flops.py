from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxprune import _loss, _program

if TYPE_CHECKING:
    from jaxprune.groups import Groups


def flops(groups: "Groups") -> jax.Array:
    """Returns the FLOPs that the removal of each unit alone saves.

    They are counted for the inputs of ``find_groups``, as in :func:`jaxprune.metrics.flops`. The
    paper of :func:`taylor` subtracts them from its scores, times a small number.

    Args:
      groups: from ``find_groups``.

    Returns:
      A float32 array of shape ``(len(groups),)``.

    Examples:
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> groups = jp.find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((1, 3)))
      >>> print(flops(groups))
      [10. 10. 10. 10.]
    """
    _loss.check_groups("units.flops", groups)
    _program.warn_of_loops(groups.terms, stacklevel=2)

    def without(unit: np.ndarray) -> np.ndarray:
        return float(len(unit)) - np.bincount(unit, minlength=len(groups) + 1)

    dense = _program.total(groups.terms, _program.Contraction.macs)
    left = _program.total(groups.terms, lambda c: c.macs(without))
    saved = 2 * (dense - np.broadcast_to(left, len(groups) + 1))
    return jax.device_put(saved[1:].astype(np.float32))
