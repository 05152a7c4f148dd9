"""Helpers for tests of checkpoint files: safetensors written by hand, and the command line."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

import jaxprune as jp
from jaxprune._files import safetensors
from jaxprune._files.command_line import main

DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]


def weights(dtype="float32", levels=None):
    """Makes tensors whose order in the file is not that of their names."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        w = rng.standard_normal(shape)
        return (w if levels is None else np.round(w * levels) / levels).astype(dtype)

    return {
        "z/kernel": draw(12, 8),
        "a/bias": draw(8),
        "conv": draw(3, 3, 8, 4),
        "b/kernel": draw(8, 20),
        "empty": draw(0, 4),
        "step": np.array(7),
        "flag": np.array([True, False]),
    }


def name_of(array):
    name = array.dtype.name
    short = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    return short.get(name) or {"f": "F", "i": "I", "b": "BOOL", "c": "C"}[array.dtype.kind] + (
        str(8 * array.itemsize) if array.dtype.kind != "b" else ""
    )


def write(path, tensors, metadata=None, order=None):
    """Writes safetensors in the order given, as the library does not."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, w in tensors.items():
        offsets = [len(data), len(data) + w.nbytes]
        header[name] = {"dtype": name_of(w), "shape": list(w.shape), "data_offsets": offsets}
        data += w.tobytes()
    return raw(path, json.dumps(header).encode() + b"   ", data)


def raw(path, header, data, length=None):
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return str(path)


def read(path):
    """Reads with the safetensors library, and with ml_dtypes what that has no NumPy type for."""
    with safe_open(path, "np") as file:
        found = {}
        with open(path, "rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
            for name in file.keys():
                entry = header[name]
                data.seek(8 + length + entry["data_offsets"][0])
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                dtype = safetensors.DTYPES[entry["dtype"]]
                found[name] = np.frombuffer(data.read(size), dtype).reshape(entry["shape"])
    return found


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def expected(tensors, sparsity, **options):
    floats = {n: w for n, w in tensors.items() if w.size and jnp.issubdtype(w.dtype, jnp.floating)}
    masks = jp.select(jp.scores.magnitude(floats), sparsity, **options)
    return {
        n: w if masks.get(n) is None else np.where(masks[n], w, np.zeros((), w.dtype))
        for n, w in tensors.items()
    }


def check(path, tensors):
    found = read(path)
    assert found.keys() == tensors.keys()
    for name, w in tensors.items():
        assert same_bits(found[name], w), name


@functools.cache
def sparse_model():
    """Returns params with leaves of every kind, and their masks."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (24, 10)), "bias": jnp.zeros(10)},
        "half": [jax.random.normal(keys[1], (8, 16), jnp.bfloat16)],
        "steps": jnp.array(3),
        "flags": jnp.array([True, False]),
        "empty": jnp.zeros((0, 4)),
        "rngs": (jax.random.key(7), jax.random.split(jax.random.key(1, impl="rbg"), 2)),
    }
    masks = jp.select(jp.scores.magnitude(params), 0.9)
    return jp.apply_masks(params, masks), masks
