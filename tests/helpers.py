"""What several test modules need: random arrays, a network, comparisons, meshes, processes."""

import contextlib
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))

from _collectives import collectives  # noqa: E402, F401

auto_and_explicit = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
explicit_and_slowly_auto = pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)


@contextlib.contextmanager
def compilations():
    """Lists the programs that are compiled, or read from the compile cache, inside the block."""
    names = []

    def listen(event, seconds, fun_name="?", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def slow_unless(fast, names):
    """Lists parameters of a test, or tuples of them; all but the fast ones are marked slow."""
    assert set(fast) <= set(names), sorted(set(fast) - set(names))
    return [
        pytest.param(
            *(name if isinstance(name, tuple) else [name]),
            marks=() if name in fast else pytest.mark.slow,
        )
        for name in names
    ]


def normal(shapes, dtype="float32", seed=0):
    """Draws an array for every shape in a tree of shapes; ``None`` and arrays stay."""
    random = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(random.normal(size=shape), dtype) if is_shape(shape) else shape

    def is_shape(x):
        return isinstance(x, tuple) and all(isinstance(n, int) for n in x)

    return jax.tree.map(draw, shapes, is_leaf=is_shape)


@functools.cache  # read-only: change a copy, as in `params | {"more": w}`
def mlp(widths=(6, 8, 12, 4), activation=jnp.tanh, seed=0):
    """Returns ``apply_fn``, params with paths ``layer0/w`` and ``layer0/b``, and a batch of 5."""
    pairs = enumerate(zip(widths[:-1], widths[1:], strict=True))
    shapes = {f"layer{i}": {"w": (a, b), "b": (b,)} for i, (a, b) in pairs}

    def apply_fn(params, x):
        for i in range(len(widths) - 1):
            x = activation(x) if i else x
            x = x @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"][None]
        return x

    return apply_fn, normal(shapes, seed=seed), normal((5, widths[0]), seed=seed + 1)


def bits(tree):
    """Returns all that two identical trees have in common: structure, shapes, types and bytes."""

    def plain(leaf):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
        array = np.asarray(leaf)
        return array.shape, array.dtype, array.tobytes()

    leaves, structure = jax.tree.flatten(tree)
    return structure, [plain(leaf) for leaf in leaves]


def equal(a, b):
    """Returns whether two trees have the same structure and the same values."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def assert_close(actual, expected, tolerance=1e-4):
    """Compares trees, up to a fraction of the largest entry of the expected one."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in pairs]
    scale = max(np.abs(b).max(initial=0) for _, b in pairs)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def mesh(kind=AxisType.Auto, **sizes):
    """Makes a mesh of the first devices: ``mesh(kind, x=4, y=2)``."""
    shape = tuple(sizes.values())
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, tuple(sizes), axis_types=(kind,) * len(shape), devices=devices)


def place(tree, mesh, specs):
    """Places a tree on a mesh: ``specs`` is one ``PartitionSpec``, or a tree of them."""
    if isinstance(specs, P):
        return jax.device_put(tree, NamedSharding(mesh, specs))
    return jax.tree.map(lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), tree, specs)


def python(*arguments, cwd=None, **environment):
    """Runs Python in a process of its own, with these variables, and returns what it prints.

    Every warning is an error, except those of two processes that share the compile cache.
    """
    ignored = [
        f"ignore:Error {verb} persistent compilation cache entry" for verb in ("reading", "writing")
    ]
    command = [sys.executable, "-W", "error", "-W", ignored[0], "-W", ignored[1], *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def removed(masks):
    """Counts the pruned weights of every leaf, by path."""
    paths = jax.tree_util.tree_leaves_with_path(masks)
    spell = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {spell(path): int((~mask).sum()) for path, mask in paths}
