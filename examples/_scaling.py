"""How time and memory grow: with params, leaves, equations, devices and rounds."""

import contextlib
import io
import pathlib
import tempfile

import _plain
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from _bench import Row, alone, apart, compiled, paired, peak, seconds, si
from _collectives import collectives
from _networks import decoder, mlp, mlp_params, normal_arrays
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune as jp

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def exact(scores):
    return jp.select(scores, 0.9)


def fused(params):
    return jp.select(jp.scores.magnitude(params), 0.9)


def params(sizes, count, repeats, largest_plain):
    """A global mask of float32, sparsity 0.9: sorting all scores; by params."""
    for n in sizes:
        weights = normal_arrays(n, count)
        scores = [jnp.abs(w) for w in weights]
        plain, sorting = compiled(_plain.masks, scores), None
        if n <= largest_plain:
            sorting = seconds(lambda: plain.call(scores))  # noqa: B023
        for name, f, args in (("select", exact, scores), ("fused", fused, weights)):
            made = compiled(f, args)
            took = alone(lambda: made.call(args), repeats, sorting)  # noqa: B023
            yield Row("params", name, n, **took, bytes=made.bytes, plain_bytes=plain.bytes)
            ratio = made.seconds / plain.seconds
            yield Row("params", f"{name}, compiling", n, made.seconds, plain.seconds, ratio)


def leaves(n, counts, repeats):
    """A global mask of as many weights in more arrays: sorting all scores; by arrays."""
    for count in counts:
        scores = [jnp.abs(w) for w in normal_arrays(n, count)]
        plain, made = compiled(_plain.masks, scores), compiled(exact, scores)
        took = paired(lambda: made.call(scores), lambda: plain.call(scores), repeats)  # noqa: B023
        memory = {"bytes": made.bytes, "plain_bytes": plain.bytes}
        yield Row("leaves", "select", count, **took, **memory)
        ratio = made.seconds / plain.seconds
        yield Row("leaves", "select, compiling", count, made.seconds, plain.seconds, ratio)


def equations(depths, repeats):
    """Decoders of more layers: tracing, or compiling the dense one; by equations."""
    for depth in depths:
        fn, like, _ = decoder(depth, 64, 128, 4, 2, 100)
        weights = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), like)
        tokens = jnp.zeros((1, 16), jnp.int32)
        groups = jp.find_groups(fn, like, tokens)
        masks = groups.masks(np.arange(len(groups)) % 2 == 0)
        n = len(jax.make_jaxpr(fn)(like, tokens).eqns)

        def trace():
            jax.make_jaxpr(lambda p, x: fn(p, x))(like, tokens)  # noqa: B023

        def find():
            jp.find_groups(lambda p, x: fn(p, x), like, tokens)  # noqa: B023

        def shrink():
            return jp.shrink(fn, weights, masks, tokens, groups=groups, verify=False)  # noqa: B023

        yield Row("equations", "find_groups", n, **paired(find, trace, repeats))
        yield Row("equations", "shrink", n, **paired(lambda: shrink()[1], trace, repeats))  # noqa: B023
        small_fn, small, _ = shrink()
        made, plain = compiled(small_fn, small, tokens), compiled(fn, weights, tokens)
        jax.clear_caches()
        first = seconds(lambda: groups.select(weights, 0.5))  # noqa: B023
        for name, took in (
            ("first groups.select", first),
            ("compiling the shrunk", made.seconds),
        ):
            yield Row("equations", name, n, took, plain.seconds, took / plain.seconds)


def devices(n, arrays, counts, repeats):
    """A global mask of arrays sharded over simulated devices: sorting; by devices.

    Memory is that of a device.
    """
    yield from apart(on_devices, n, arrays, counts, repeats, devices=max(counts))


def on_devices(n, arrays, counts, repeats):
    """Measures on meshes of the devices of this process."""
    rows = []
    for count in counts:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        scores = [jax.device_put(jnp.abs(w), sharding) for w in normal_arrays(n, arrays)]
        made, plain = compiled(exact, scores), compiled(_plain.masks, scores)
        took = paired(lambda: made.call(scores), lambda: plain.call(scores), repeats)  # noqa: B023
        memory = {"bytes": made.bytes, "plain_bytes": plain.bytes}
        rows.append(Row("devices", "select", count, **took, **memory))
        if count > 1:
            sent = [moved(each.call.as_text()) for each in (made, plain)]
            rows.append(Row("devices", "collectives", count, bytes=sent[0], plain_bytes=sent[1]))
    return rows


def moved(program):
    """Sums the bytes that the collectives of a compiled program give a device, loops once."""
    return sum(array.nbytes for sent in collectives(program) for array in sent.arrays)


def rounds(widths, counts, plain_counts):
    """SynFlow in rounds on an MLP, sparsity 0.99, with compiling: one by one; by rounds."""
    weights = mlp_params(jax.random.key(0), widths)
    x = jnp.ones((1, widths[0]))
    for count in counts:
        score = jp.scores.synflow(lambda p, x: mlp(p, x))  # a new one compiles anew

        def call():
            return jp.select_iteratively(score, weights, 0.99, x, rounds=count)  # noqa: B023

        first, then = seconds(call), seconds(call)
        theirs = None
        if count in plain_counts:
            theirs = seconds(lambda: _plain.synflow(mlp, weights, 0.99, x, count))  # noqa: B023
        ratio = theirs and first / theirs
        yield Row("rounds", "SynFlow", count, first, theirs, ratio)
        yield Row("rounds", "SynFlow, compiled before", count, then)


def files(sizes, count):
    """Commands on a safetensors file of float32: reading it whole, sorting; by params.

    Memory is the peak beyond that of the imports.
    """
    for n in sizes:
        yield from apart(on_files, n, count)


def on_files(n, count):
    """Measures in this process."""
    from jaxprune.__main__ import main

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse, other = (str(pathlib.Path(folder, f"{c}.safetensors")) for c in "abc")
        _plain.write(dense, {str(i): w for i, w in enumerate(normal_arrays(n, count))})
        for name, words, f, args in (
            ("prune", [dense, sparse, "--sparsity", "0.9"], _plain.prune, (dense, other)),
            ("inspect", [sparse], _plain.inspect, (sparse,)),
            ("diff", [dense, sparse], _plain.diff, (dense, sparse)),
        ):
            ours, memory = both(lambda: main([name, *words, "--json"]))  # noqa: B023
            theirs, plain_memory = both(lambda: f(*args))  # noqa: B023
            rows.append(Row("files", name, n, ours, theirs, ours / theirs, memory, plain_memory))
    return rows


def both(f):
    """Gives the seconds and the peak of memory of one call, which may print."""
    took = []
    with contextlib.redirect_stdout(io.StringIO()):
        memory = peak(lambda: took.append(seconds(f)))
    return took[0], memory


PANELS = (  # part, figure, axes
    ("params", "seconds", "params", "seconds"),
    ("params", "bytes", "params", "bytes"),
    ("files", "bytes", "params in the file", "peak, bytes"),
    ("links", "seconds", "params", "seconds a step"),
    ("leaves", "seconds", "arrays", "seconds"),
    ("equations", "seconds", "equations", "seconds"),
    ("devices", "bytes", "devices", "bytes of a device"),
    ("rounds", "seconds", "rounds", "seconds"),
)
DRAWN = tuple(dict.fromkeys(part for part, *_ in PANELS))
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(rows, path):
    """Draws how figures grow, on logarithmic axes, with plain JAX dashed in the same colour."""
    figure, grid = plt.subplots(2, 4, figsize=(16, 7.5))
    figure.subplots_adjust(0.05, 0.07, 0.99, 0.95, 0.22, 0.26)
    for axes, (part, figure_, x, y) in zip(grid.flat, PANELS, strict=True):
        found = [row for row in rows if row.part == part and row.at]
        names = [n for n in dict.fromkeys(r.name for r in found)]
        for name, color in zip(names, COLORS, strict=False):
            for which, style in ((figure_, "o-"), (f"plain_{figure_}", "x--")):
                points = [(r.at, v) for r in found if r.name == name and (v := getattr(r, which))]
                if points:
                    label = None if style == "x--" else name
                    axes.loglog(*zip(*points, strict=True), style, color=color, label=label)
        axes.set(xlabel=x, ylabel=y)
        sizes = sorted({row.at for row in found})
        axes.set_xticks(sizes, [si(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(part)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    grid[0, 0].set_title("params (dashed: plain JAX)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
