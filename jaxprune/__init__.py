"""Pruning for JAX: pure functions over pytrees that make networks smaller and faster.

``params -> scores -> masks``, and an optax transformation that keeps pruned weights at zero::

    masks = jp.select(jp.scores.magnitude(params), 0.9)
    params = jp.apply_masks(params, masks)
    tx = jp.enforce(optax.adamw(1e-3), masks)

Or units, which are removed together, and the smaller network without them::

    groups = jp.find_groups(apply_fn, params, *inputs)
    masks = groups.select(jp.scores.magnitude(params), 0.5)
    small_fn, small_params, plan = jp.shrink(apply_fn, params, masks, *inputs)

``jaxprune.__all__`` lists the public functions and modules.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxprune import masks, optimizer, patterns, schedules, scores
from jaxprune._select import select, select_iteratively
from jaxprune.masks import apply_masks
from jaxprune.optimizer import enforce, get_masks, gradual, set_masks

if TYPE_CHECKING:
    from jaxprune import (
        curves,
        gates,
        groups,
        layerwise,
        metrics,
        movement,
        nnx,
        plot,
        recipes,
        regularizers,
        search,
        units,
    )
    from jaxprune._calibrate import calibrate
    from jaxprune._plan import Plan
    from jaxprune._reconstruct import reconstruct
    from jaxprune._report import report
    from jaxprune._shrink import CannotShrink, shrink
    from jaxprune.groups import find_groups
    from jaxprune.metrics import summary

__version__ = "0.1.0"
__all__ = ["CannotShrink", "Plan", "apply_masks", "calibrate", "enforce", "find_groups"]
__all__ += ["get_masks", "gradual", "reconstruct", "report", "select", "select_iteratively"]
__all__ += ["set_masks", "shrink", "summary", "curves", "gates", "groups", "layerwise", "masks"]
__all__ += ["metrics", "movement", "nnx", "optimizer", "patterns", "plot", "recipes"]
__all__ += ["regularizers", "schedules", "scores", "search", "units"]

# Modules that read programs, draw or train are imported on first use: they take two thirds of the
# time to import the package, and flax.nnx takes as long again.
_HOMES = {"CannotShrink": "_shrink", "Plan": "_plan", "shrink": "_shrink"}
_HOMES |= {"calibrate": "_calibrate", "reconstruct": "_reconstruct"}
_HOMES |= {"find_groups": "groups", "report": "_report", "summary": "metrics"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    globals()[name] = value = getattr(module, name) if name in _HOMES else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
