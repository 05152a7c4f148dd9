"""Importance scores, one criterion per file: float32, higher is kept, `None` for other dtypes.

Data-free criteria are called with the params. Data-driven ones are used like ``jax.grad``:
``snip(loss)(params, x, y)``. They follow what the loss closes over, as ``jax.grad`` does, and
losses of the same program are compiled once. All can be called inside a jit.

All raise a `TypeError` for a leaf that is not an array or a loss that is not scalar, and a
`ValueError` for params without floating leaves. A weight that is NaN scores NaN.
"""

from jaxprune.scores._fisher import fisher
from jaxprune.scores._fpgm import fpgm
from jaxprune.scores._gradient import gradient
from jaxprune.scores._grasp import grasp
from jaxprune.scores._lamp import lamp
from jaxprune.scores._magnitude import magnitude
from jaxprune.scores._obd import obd, obd_hutchinson
from jaxprune.scores._random import random
from jaxprune.scores._slimming import slimming
from jaxprune.scores._snip import snip
from jaxprune.scores._standardized_magnitude import standardized_magnitude
from jaxprune.scores._synflow import synflow
from jaxprune.scores._taylor import taylor
from jaxprune.scores._woodfisher import woodfisher, woodfisher_update

__all__ = [
    "fisher",
    "fpgm",
    "gradient",
    "grasp",
    "lamp",
    "magnitude",
    "obd",
    "obd_hutchinson",
    "random",
    "slimming",
    "snip",
    "standardized_magnitude",
    "synflow",
    "taylor",
    "woodfisher",
    "woodfisher_update",
]
