"""Prints a digest of every mask, the same from any number of processes with 8 devices in all.

Run by test_sharding.py as each of two processes, and called there as one.
"""

import functools
import hashlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

SHAPES = {"up": ((16, 32), P("data", "model")), "down": ((32, 16), P("model", "data"))}


def digests() -> Iterator[str]:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    random = np.random.default_rng(0)
    params = {}
    for name, (shape, spec) in SHAPES.items():
        whole = random.normal(size=shape).astype(np.float32)
        sharding = NamedSharding(mesh, spec)
        params[name] = jax.make_array_from_callback(shape, sharding, whole.__getitem__)

    def describe(name, masks):
        for path, mask in masks.items():
            assert mask.sharding.is_equivalent_to(params[path].sharding, 2), (name, path)
            whole = np.asarray(multihost_utils.process_allgather(mask, tiled=True))
            digest = hashlib.sha256(np.packbits(whole).tobytes()).hexdigest()
            yield f"mask: {name} {path} {whole.sum()} {digest}"

    scores = jp.scores.magnitude(params)
    for scope in ("global", "layer", "erk", {"up": 0.8}):
        yield from describe(str(scope), jp.select(scores, 0.6, scope=scope))
    for name, pattern in (
        ("2:4", jp.patterns.n_of_m(2, 4)),
        ("n:8", jp.patterns.n_of_m(None, 8, -1)),
        ("block", jp.patterns.block((4, 4))),
        ("uneven block", jp.patterns.block((5, 3))),
        ("axis", jp.patterns.axis(-1)),
    ):
        yield from describe(name, jp.select(scores, 0.5, pattern=pattern))
    masks = jp.select_iteratively(jp.scores.magnitude, params, 0.8, rounds=3)
    yield from describe("iteratively", masks)

    apply_fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    x = jax.make_array_from_callback(
        (8, 16), NamedSharding(mesh, P("data")), np.ones((8, 16), np.float32).__getitem__
    )
    masks = jp.find_groups(apply_fn, params, x).select(scores, 0.5)
    yield from describe("units", masks)
    _, small, plan = jp.shrink(apply_fn, params, masks, x)
    assert small["up"].sharding.is_equivalent_to(params["up"].sharding, 2) and not plan.inexact

    halve = lambda p: jp.select(jp.scores.magnitude(p), 0.5)
    schedule = jp.schedules.linear(0.8, 0, 3)
    for name, tx in (
        ("enforce", jp.enforce(optax.sgd(0.1), halve)),
        ("gradual", jp.gradual(optax.sgd(0.1), jp.scores.magnitude, schedule)),
    ):
        step = jax.jit(functools.partial(_step, tx))
        trained, state = params, jax.jit(tx.init)(params)
        for _ in range(4):
            trained, state = step(trained, state)
        yield from describe(name, jp.get_masks(state))
        yield from describe(f"{name}, not zero", jax.tree.map(lambda w: w != 0, trained))


def _step(tx, params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state


if __name__ == "__main__":
    port, process, processes = map(int, sys.argv[1:])
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, initialization_timeout=60)
    assert jax.device_count() == 8 and jax.process_count() == processes
    print(*digests(), sep="\n", flush=True)
