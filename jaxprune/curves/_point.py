"""One point of a sweep: prune, evaluate, train, evaluate again, and measure the savings."""

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import _select, metrics, recipes
from jaxprune._shrink import CannotShrink, shrink
from jaxprune._tree import Masks, Params
from jaxprune.curves._table import Row
from jaxprune.masks import apply_masks

Network = Callable[..., Any]  # (params, *inputs) -> outputs
Method = Callable[..., tuple[Params, Masks]]  # (params, sparsity, key, train) -> params, masks
Train = Callable[[Params, Masks, jax.Array], Params]  # (params, masks, key) -> params


def runner(
    seed: int,
    init: Callable[[jax.Array], Params],
    train: Train,
    evaluate: Callable[[Params], float],
    network: Network,
    inputs: Sequence[Any],
) -> Callable[[Method, float], Row]:
    """Returns a function that measures one point of a seed; all points share the dense network."""
    init_key, dense_key, method_key, tune_key = jax.random.split(jax.random.key(seed), 4)
    initial = init(init_key)
    full = _select.whole_masks(initial, _select.select)
    dense = functools.cache(lambda: train(initial, full, dense_key))
    dense_flops = functools.cache(lambda: metrics.flops(network, initial, *inputs))

    def point(prune: Method, sparsity: float) -> Row:
        calls = itertools.count(1)

        def counted(params: Params, masks: Masks = None, key: jax.Array | None = None) -> Params:
            number = next(calls)
            # Only the initial params without masks are the dense network that all methods share.
            if params is initial and masks is None and key is None:
                return dense()
            key = jax.random.fold_in(tune_key, number) if key is None else key
            return train(params, full if masks is None else masks, key)

        dense()  # before the clock starts: the dense training is shared by all points of the seed
        start = time.perf_counter()
        params, masks = prune(initial, sparsity, method_key, counted)
        params = apply_masks(params, masks)
        before = _quality(evaluate, params, "before")
        params = counted(params, masks)
        recipes.check_pruned(params, masks)
        after = _quality(evaluate, params, "after")
        small, small_params, small_masks = _shrunk(network, params, masks, inputs)
        functions = {"dense": (network, initial), "pruned": (small, small_params)}
        times = metrics.interleave(functions, inputs, rounds=30)
        flops = metrics.flops(network, initial, *inputs, masks=masks)
        table = metrics.summary(params, masks)
        return {
            "before": before,
            "after": after,
            "compression": table.size / max(table.kept, 1),
            "theoretical_speedup": dense_flops() / max(flops, 1),
            "measured_speedup": np.median(np.divide(times["dense"], times["pruned"])),
            "stored_bytes": metrics.stored_bytes(small_params, small_masks),
            "params": table.kept,
            "flops": flops,
            "trainings": next(calls) - 1,
            "seconds": time.perf_counter() - start,
            "error": "",
        }

    return point


def _quality(evaluate: Callable[[Params], float], params: Params, when: str) -> float:
    quality = float(evaluate(params))
    if math.isnan(quality):
        raise ValueError(f"evaluate: must return a number, got NaN {when} the last training.")
    return quality


def _shrunk(
    network: Network, params: Params, masks: Masks, inputs: Sequence[Any]
) -> tuple[Network, Params, Masks]:
    """Shrinks a network as far as its masks allow; returns its function, params and masks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "shrink: the masks remove no entire slice")
        try:
            small, small_params, plan = shrink(network, params, masks, *inputs, verify=False)
        except CannotShrink:  # the masked slices are pinned, or a leaf is masked entirely
            return network, params, masks
    return (small, small_params, plan.take(masks)) if plan.kept else (network, params, masks)
