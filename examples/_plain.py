"""References of the benchmarks: the same functions, as one would write them in plain JAX."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np


def masks(scores, sparsity=0.9):
    """Sorts all scores and compares them with the threshold; all ties are pruned."""
    flat = jnp.sort(jnp.concatenate([s.ravel() for s in scores]))
    threshold = flat[round(sparsity * flat.size) - 1]
    return [s > threshold for s in scores]


def partition(scores, sparsity=0.9):
    """Partitions all scores with NumPy, and compares them with the threshold."""
    arrays = [np.asarray(s) for s in scores]
    flat = np.concatenate([s.ravel() for s in arrays])
    removed = round(sparsity * flat.size)
    threshold = np.partition(flat, removed - 1)[removed - 1]
    return [jnp.asarray(s > threshold) for s in arrays]


def masks_by_layer(scores):
    """Does the same for each array."""
    return [masks([s])[0] for s in scores]


def blocks(scores, side=16):
    """Masks blocks of a matrix by their sums."""
    sums = []
    for s in scores:
        a, b = s.shape
        sums.append(s.reshape(a // side, side, b // side, side).sum((1, 3)))
    return [m.repeat(side, 0).repeat(side, 1) for m in masks(sums)]


def columns(scores):
    """Masks columns of a matrix by their sums."""
    kept = masks([s.sum(0) for s in scores])
    return [jnp.broadcast_to(m, s.shape) for m, s in zip(kept, scores, strict=True)]


def two_of_four(scores):
    """Keeps two of every four along the first axis, by sorting twice."""

    def one(s):
        fours = s.reshape(-1, 4, s.shape[-1])
        rank = jnp.argsort(jnp.argsort(-fours, axis=1), axis=1)
        return (rank < 2).reshape(s.shape)

    return [one(s) for s in scores]


def filters(params):
    """Masks half of the outputs of each kernel, by the mean of their magnitudes."""
    kernels = [w for w in jax.tree.leaves(params) if w.ndim >= 2]
    means = [jnp.abs(w).reshape(-1, w.shape[-1]).mean(0) for w in kernels]
    return [masks([m], 0.5)[0] for m in means]


def synflow(apply_fn, params, sparsity, x, rounds):
    """Masks weights by SynFlow in float64, one compiled round at a time."""
    n = sum(w.size for w in jax.tree.leaves(params) if w.ndim >= 2)

    @jax.jit
    def round_(kept, removed):
        def flow(p):
            return apply_fn(p, jnp.ones_like(x, dtype=jnp.float64)).sum()

        p = jax.tree.map(lambda w, m: jnp.abs(w.astype(jnp.float64)) * m, params, kept)
        scores = jax.tree.map(jnp.multiply, p, jax.grad(flow)(p))
        flat = jnp.concatenate([s.ravel() for s in jax.tree.leaves(scores) if s.ndim >= 2])
        threshold = jnp.sort(flat)[removed - 1]
        return jax.tree.map(lambda s: s > threshold if s.ndim >= 2 else s == s, scores)

    with jax.enable_x64(True):
        kept = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
        for i in range(rounds):
            kept = round_(kept, round(n * (1 - (1 - sparsity) ** ((i + 1) / rounds))))
    return kept


def write(path, arrays):
    """Writes a safetensors file of float32."""
    ends = np.cumsum([0, *(w.nbytes for w in arrays.values())]).tolist()
    header = {
        name: {"dtype": "F32", "shape": w.shape, "data_offsets": [start, end]}
        for (name, w), start, end in zip(arrays.items(), ends[:-1], ends[1:], strict=True)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for w in arrays.values():
            file.write(np.asarray(w).tobytes())


def read(path):
    """Reads a safetensors file of float32."""
    data = pathlib.Path(path).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    arrays = {}
    for name, leaf in json.loads(data[8:size]).items():
        count, start = math.prod(leaf["shape"]), size + leaf["data_offsets"][0]
        values = np.frombuffer(data, np.float32, count, start)
        arrays[name] = jnp.asarray(values.reshape(leaf["shape"]))
    return arrays


def prune(source, target):
    """Writes a safetensors file that keeps the largest tenth of the weights."""
    params = read(source)
    kept = jax.jit(masks)([jnp.abs(w) for w in params.values()])
    write(target, {k: w * m for (k, w), m in zip(params.items(), kept, strict=True)})


def inspect(path):
    """Counts the zeros of a safetensors file."""
    return {k: jnp.sum(w == 0) for k, w in read(path).items()}


def diff(a, b):
    """Counts the differences between two safetensors files."""
    before, after = read(a), read(b)
    return {k: (jnp.sum(w != after[k]), jnp.abs(w - after[k]).max()) for k, w in before.items()}
