"""Layer by layer: prunes the weights of one layer, given what flows into it, one method a file.

A method is a function ``(weights, statistics, sparsity, pattern) -> (weights, mask)``, with weights
of shape ``(inputs, outputs)``. :func:`jaxprune.reconstruct` applies it to every layer of a network.

>>> import jax.numpy as jnp
>>> import jaxprune as jp
>>> apply_fn = lambda w, x: x @ w
>>> w, x = jnp.array([[1.0, 4.0], [3.0, 2.0]]), jnp.array([[5.0, 1.0]])
>>> statistics = jp.calibrate(apply_fn, w, [x])[""]
>>> weights, mask = jp.layerwise.wanda(w, statistics, 0.5)
>>> print(mask)
[[ True  True]
 [False False]]
"""

from jaxprune._calibrate import Calibration, Statistics
from jaxprune.layerwise._allocate import allocate
from jaxprune.layerwise._alps import alps
from jaxprune.layerwise._dsnot import dsnot
from jaxprune.layerwise._magnitude import magnitude
from jaxprune.layerwise._owl import owl
from jaxprune.layerwise._ria import ria
from jaxprune.layerwise._sparsegpt import sparsegpt
from jaxprune.layerwise._wanda import wanda

__all__ = ["Calibration", "Statistics", "allocate", "alps", "dsnot", "magnitude", "owl", "ria"]
__all__ += ["sparsegpt", "wanda"]
