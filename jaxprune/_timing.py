"""Functions timed in turn, so that what else the machine does falls on all alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleave(
    functions: Mapping[str, tuple[Callable[..., Any], Any]], args: Any, rounds: int
) -> dict[str, list[float]]:
    """Calls each ``(fn, params)`` once a round, after a first one; gives their seconds by name.

    Every other round goes backwards: what runs later finds a warmer machine.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions.items())
    for i in range(rounds + 1):
        for name, (fn, params) in order if i % 2 else order[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(fn(params, *args))
            if i:
                times[name].append(time.perf_counter() - start)
    return times
