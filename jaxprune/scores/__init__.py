"""Importance scores, one criterion a file: float32, higher is kept, `None` for other dtypes.

Data-free scores are called on params, data-driven ones like ``jax.grad``, as
``snip(loss)(params, x, y)``. All are jitted and can be called inside another jit.
"""

from jaxprune.scores._gradient import gradient
from jaxprune.scores._grasp import grasp
from jaxprune.scores._magnitude import magnitude
from jaxprune.scores._random import random
from jaxprune.scores._snip import snip
from jaxprune.scores._synflow import synflow
from jaxprune.scores._taylor import taylor

__all__ = ["gradient", "grasp", "magnitude", "random", "snip", "synflow", "taylor"]
