"""Pruning for JAX: pure functions over pytrees that make networks smaller and faster.

``params -> scores -> masks``, then an optax link that keeps pruned weights at zero::

    masks = jp.select(jp.scores.magnitude(params), 0.9)
    params = jp.apply_masks(params, masks)
    tx = jp.enforce(optax.adamw(1e-3), masks)

or units that leave together, and the network without them::

    groups = jp.find_groups(apply_fn, params, *inputs)
    masks = groups.select(jp.scores.magnitude(params), 0.5)
    small_fn, small_params, plan = jp.shrink(apply_fn, params, masks, *inputs)

Verbs: :func:`select`, :func:`select_iteratively`, :func:`apply_masks`, :func:`enforce`,
:func:`gradual`, :func:`get_masks`, :func:`set_masks`, :func:`find_groups`, :func:`shrink`,
:func:`summary`, :func:`report`.
Modules: :mod:`scores`, :mod:`schedules`, :mod:`masks`, :mod:`patterns`, :mod:`groups`,
:mod:`units`, :mod:`search`, :mod:`recipes`, :mod:`metrics`, :mod:`curves`, :mod:`plot`, :mod:`nnx`,
:mod:`regularizers`, :mod:`movement`, :mod:`gates`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxprune import (
    curves,
    gates,
    groups,
    masks,
    metrics,
    movement,
    patterns,
    plot,
    recipes,
    regularizers,
    schedules,
    scores,
    search,
    units,
)
from jaxprune._plan import Plan
from jaxprune._report import report
from jaxprune._select import select, select_iteratively
from jaxprune._shrink import CannotShrink, shrink
from jaxprune.groups import find_groups
from jaxprune.masks import apply_masks
from jaxprune.metrics import summary
from jaxprune.optimizer import enforce, get_masks, gradual, set_masks

if TYPE_CHECKING:
    from jaxprune import nnx

__version__ = "0.1.0"
__all__ = [
    "CannotShrink",
    "Plan",
    "apply_masks",
    "curves",
    "enforce",
    "find_groups",
    "gates",
    "get_masks",
    "gradual",
    "groups",
    "masks",
    "metrics",
    "movement",
    "nnx",
    "patterns",
    "plot",
    "recipes",
    "regularizers",
    "report",
    "schedules",
    "scores",
    "search",
    "select",
    "select_iteratively",
    "set_masks",
    "shrink",
    "summary",
    "units",
]


def __getattr__(name: str) -> Any:
    if name == "nnx":  # flax.nnx is slow to import, and needed by its users alone
        return importlib.import_module("jaxprune.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
