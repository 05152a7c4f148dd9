"""Exports a shrunk network to files that run without jaxprune.

Removes half of the channels of a small residual network, shrinks it, and writes the dense and the
shrunk network for any batch size with `jax.export` and, if jax2onnx is installed, as ONNX. Then a
new process, which imports neither jaxprune nor Flax, loads the files, compares their outputs with
those of the dense and of the masked network, and times them in turn on one thread. The weights are
random: this example is about export, not about accuracy.

    python examples/export.py
    python examples/export.py --out exported/ --batch 256
    python examples/export.py --load exported/    # the part that the new process runs
"""

import argparse
import importlib.util
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

IMAGE = (8, 8, 1)
FORMATS = {  # file suffix, required modules, and the package to install
    "jax.export": (".jax", ["flatbuffers"], "flatbuffers"),
    "ONNX": (".onnx", ["jax2onnx", "onnxruntime"], "jaxprune[onnx]"),
}


def network():
    """Returns a function of variables and images, in evaluation mode, and its variables."""
    from flax import linen as nn  # imported here, since the process that loads needs no Flax

    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            y = nn.Conv(self.width, (3, 3), use_bias=False)(x)
            y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
            y = nn.Conv(self.width, (3, 3), use_bias=False)(y)
            return nn.relu(x + nn.BatchNorm(use_running_average=True)(y))

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width, stride in ((64, 1), (128, 2)):
                x = nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
                x = Block(width)(x)
            return nn.Dense(10)(x.mean((1, 2)))

    model = Network()
    return model.apply, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, *IMAGE)))


def write(directory, batch):
    """Prunes, shrinks, and writes both networks and their expected outputs on some images."""
    import jaxprune as jp  # imported here, since the process that loads must not import it

    apply_fn, params = network()
    image = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
    groups = jp.find_groups(apply_fn, params, image)
    masks = groups.select(jp.scores.magnitude(params), 0.5, scope="layer")
    small_fn, small, _ = jp.shrink(apply_fn, params, masks, image)
    before, after = (sum(w.size for w in jax.tree.leaves(tree)) for tree in (params, small))
    print(f"{before:,} params; {after:,} after removing half of the {len(groups)} units")

    x = jax.random.normal(jax.random.key(1), (batch, *IMAGE))
    dense, masked = apply_fn(params, x), apply_fn(jp.apply_masks(params, masks), x)
    np.savez(directory / "expected.npz", x=x, dense=dense, shrunk=masked)

    # jax2onnx cannot trace the shrunk function, but it can convert its program for one image.
    one = small_program(lambda image: small_fn(small, image[None])[0])
    shrunk = {"jax.export": lambda x: small_fn(small, x), "ONNX": jax.vmap(one)}
    for kind, (suffix, modules, package) in FORMATS.items():
        if not all(map(importlib.util.find_spec, modules)):
            print(f"{kind}: skipped; run pip install {package}")
            continue
        to_bytes = {"jax.export": to_jax, "ONNX": to_onnx}[kind]
        for name, function in (("dense", lambda x: apply_fn(params, x)), ("shrunk", shrunk[kind])):
            (directory / name).with_suffix(suffix).write_bytes(to_bytes(function))


def small_program(one):
    """Returns a function of an image, traced now: jax2onnx replaces parts of JAX when it traces."""
    from jax.extend.core import jaxpr_as_fun

    with jax.disable_jit():  # without calls, which jax2onnx 0.17 does not know in JAX 0.12
        program = jax.make_jaxpr(one)(jax.ShapeDtypeStruct(IMAGE, jnp.float32))
    return lambda image: jaxpr_as_fun(program)(image)[0]


def to_jax(function):
    """Serialises a function of images, including its params, as StableHLO."""
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *IMAGE), jnp.float32)
    return export.export(jax.jit(function))(images).serialize()


def to_onnx(function):
    """Serialises a function of images, including its params, as ONNX."""
    import jax2onnx

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # unknown types do not matter here
    return jax2onnx.to_onnx(function, [("b", *IMAGE)], return_mode="proto").SerializeToString()


def load_jax(path, x):
    """Returns a function that runs the network of a file on images."""
    call, x = jax.jit(export.deserialize(path.read_bytes()).call), jnp.asarray(x)
    return lambda: call(x).block_until_ready()


def load_onnx(path, x):
    """Returns a function that runs the network of a file on images with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only: jax2onnx writes shapes before a transpose
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)[0]


def load(directory, rounds=40):
    """Runs the files of a folder, and prints a table of their times and sizes."""
    print("format      dense ms  shrunk ms  speed-up  dense bytes  shrunk bytes  max difference")
    expected = np.load(directory / "expected.npz")
    for kind, (suffix, *_) in FORMATS.items():
        paths = {name: (directory / name).with_suffix(suffix) for name in ("dense", "shrunk")}
        if not all(path.exists() for path in paths.values()):
            continue
        open_file = {"jax.export": load_jax, "ONNX": load_onnx}[kind]
        run = {name: open_file(path, expected["x"]) for name, path in paths.items()}
        difference = max(np.abs(run[name]() - expected[name]).max() for name in run)
        assert difference < 1e-4, f"{kind} differs by {difference}"
        seconds = {name: [] for name in run}
        for _ in range(rounds):
            for name, call in run.items():  # in turn, so that background load affects both equally
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        dense, shrunk = (1e3 * np.median(seconds[name]) for name in run)
        sizes = [path.stat().st_size for path in paths.values()]
        print(
            f"{kind:10} {dense:9.2f} {shrunk:10.2f} {dense / shrunk:8.1f}× "
            f"{sizes[0]:12,} {sizes[1]:13,} {difference:15.1e}"
        )
    assert not {"jaxprune", "flax"} & sys.modules.keys()


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=pathlib.Path, help="folder; default: a temporary one")
    options.add_argument("--batch", type=int, default=64, help="images in a timed batch")
    options.add_argument("--load", type=pathlib.Path, help="only run the files of a folder")
    args = options.parse_args()
    if args.load:
        load(args.load)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.out or pathlib.Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        write(directory, args.batch)
        one_thread = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        sys.stdout.flush()
        subprocess.run(
            [sys.executable, *(f"-W{w}" for w in sys.warnoptions), __file__, "--load", directory],
            env={**os.environ, "XLA_FLAGS": one_thread},
            check=True,
        )


if __name__ == "__main__":
    main()
