"""Kills a training at random times and resumes it: ``python tests/kill_resume.py --trials 200``.

A training prunes step by step with `gradual`, and then in rounds with `recipes.iterative`. It saves
with Orbax, with masks as bits, and writes a sparse file after every round. However often it is
killed, its result must be bit-identical to that of the uninterrupted training.
"""

import argparse
import collections
import logging
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxprune as jp

jax.config.update("jax_disable_most_optimizations", True)  # compiles much and runs little
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
STEPS, ROUNDS = 24, [0.6, 0.65, 0.7, 0.75, 0.8, 0.85]
PATIENCE = 120  # seconds for a child to start, or to end


@jax.jit
def init():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (16, 32)), "bias": jnp.zeros(32)},
        "out": {"kernel": jax.random.normal(keys[1], (32, 4), jnp.bfloat16)},
    }
    tx = optimizer()
    return {
        "step": jnp.array(0),
        "params": params,
        "state": tx.init(params),
        "key": jax.random.key(1),
    }


def optimizer():
    schedule = jp.schedules.cubic(0.5, begin=2, end=STEPS - 6)
    return jp.gradual(optax.adam(1e-2), jp.scores.magnitude, schedule, every=3)


def loss(params, key):
    x = jax.random.normal(key, (8, 16))
    y = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return jnp.mean((y @ params["out"]["kernel"] - x[:, :4]) ** 2)


def updated(tx, params, state, key):
    updates, state = tx.update(jax.grad(loss)(params, key), state, params)
    return optax.apply_updates(params, updates), state


@jax.jit
def step(training):
    key, batch = jax.random.split(training["key"])
    params, state = updated(optimizer(), training["params"], training["state"], batch)
    return {"step": training["step"] + 1, "params": params, "state": state, "key": key}


@jax.jit
def train(params, masks, key):
    tx = jp.enforce(optax.adam(1e-2), masks)
    run = lambda carry, key: (updated(tx, *carry, key), None)
    return jax.lax.scan(run, (params, tx.init(params)), jax.random.split(key, 8))[0][0]


def rounds_after(last):
    key = jax.random.key(2)
    return jp.recipes.iterative(last, train, jp.scores.magnitude, ROUNDS, key=key)


def restored(manager, like):
    """Returns the last save, with masks unpacked, or `None`."""
    last = manager.latest_step()
    if last is None:
        return None
    abstract = jp.masks.pack(jax.eval_shape(lambda: like))
    return unpack(manager.restore(last, args=ocp.args.StandardRestore(abstract)), like)


pack, unpack = jax.jit(jp.masks.pack), jax.jit(jp.masks.unpack)


def saved(manager, number, tree):
    manager.save(number, args=ocp.args.StandardSave(pack(tree)))


def opened(folder):
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))


def run(folder, ready=lambda: None):
    """Trains, from the last save in the folder or from the start, and returns the result."""
    with opened(folder / "steps") as steps, opened(folder / "rounds") as rounds:
        training = init()
        training = restored(steps, training) or training
        first = int(training["step"])
        pack(step(training))
        next(rounds_after(jp.recipes.Round(0, 0.5, training["params"], None)))
        ready()  # everything is compiled
        for number in range(first + 1, STEPS + 1):
            training = step(training)
            saved(steps, number, training)
        params, masks = training["params"], jp.get_masks(training["state"])
        start = jp.recipes.Round(0, 0.5, params, masks)
        last = begun = restored(rounds, start) or start
        begun = begun._replace(round=int(begun.round), sparsity=float(begun.sparsity))
        for last in rounds_after(begun):
            saved(rounds, last.round, last)
            jp.masks.save(folder / "model.safetensors", last.params, last.masks)
    return training, last


def bits(ended):
    """Returns the bytes of all arrays of a training."""
    is_key = lambda w: jax.dtypes.issubdtype(w.dtype, jax.dtypes.prng_key)
    leaves = map(jnp.asarray, jax.tree.leaves(ended))
    return [np.asarray(jax.random.key_data(w) if is_key(w) else w).tobytes() for w in leaves]


def child(folder, pipe):
    warnings.simplefilter("ignore")  # Orbax warns about unfinished saves
    logging.getLogger("absl").setLevel(logging.ERROR)
    pipe.send(bits(run(Path(folder), lambda: pipe.send("ready"))))


def started(context, folder):
    pipe, far = context.Pipe()
    process = context.Process(target=child, args=(str(folder), far), daemon=True)
    process.start()
    far.close()
    return process, pipe


def received(pipe):
    assert pipe.poll(PATIENCE), "a child neither trained nor ended"
    return pipe.recv()


def check(folder, pipe, expected):
    """Checks the result of a training, and its files."""
    while (result := received(pipe)) == "ready":
        pass
    assert result == expected, "a resumed training has another result"
    assert not any(folder.glob("*/*.orbax-checkpoint-tmp*"))
    shutil.rmtree(folder)


def check_file(folder):
    """Checks that the sparse file is complete at any time."""
    if (folder / "model.safetensors").exists():
        _, masks = jp.masks.load(folder / "model.safetensors", init()["params"])
        assert any(abs(jp.metrics.sparsity(masks) - s) < 0.01 for s in ROUNDS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    # Forked from a process that has imported JAX but not started it: an import takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "optax", "orbax.checkpoint", "jaxprune"])
    seen, results, length = collections.Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as parent:
        # Children read their programs from here, because compiling takes longer than training.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{parent}/cache"
        folder = Path(parent) / "whole"
        for _ in range(2):  # the second time, a resumed one
            begin = time.perf_counter()
            process, pipe = started(context, folder)
            assert received(pipe) == "ready"
            middle = time.perf_counter()
            results.append(received(pipe))
            process.join()
            startup, length = middle - begin, max(length, time.perf_counter() - middle)
        assert results[0] == results[1], "resuming a finished training changed its result"
        print(f"a training takes {length:.1f} s, and its start {startup:.1f} s")
        folder = Path(parent) / "0"
        while seen["kills"] < arguments.trials:
            process, pipe = started(context, folder)
            if early := rng.random() < 0.1:
                time.sleep(rng.uniform(0, startup))
            else:
                assert received(pipe) == "ready"
                time.sleep(rng.uniform(0, length / 2))
            process.kill()
            process.join()
            check_file(folder)
            if process.exitcode == 0:  # it ended before the kill
                check(folder, pipe, results[0])
                seen["trainings resumed to their end"] += 1
                folder = Path(parent) / str(seen["trainings resumed to their end"])
                continue
            seen["kills"] += 1
            seen["kills while it starts"] += early
            seen["kills within a save"] += any(folder.glob("*/*.orbax-checkpoint-tmp*"))
            print(f"\r{seen['kills']} of {arguments.trials}", end="", flush=True)
        process, pipe = started(context, folder)
        assert received(pipe) == "ready"
        check(folder, pipe, results[0])
        seen["trainings resumed to their end"] += 1
    print()
    for event, count in seen.items():
        print(f"{event}: {count}")


if __name__ == "__main__":
    main()
