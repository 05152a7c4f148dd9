"""Measures how time and memory grow with params, arrays, equations, devices and rounds."""

import contextlib
import io
import pathlib
import tempfile

import _plain
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _bench import Row, alone, compiled, in_new_process, paired, peak, seconds, si
from _collectives import collectives
from _common import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from _networks import decoder, mlp, mlp_params, normal_arrays
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune as jp


def select(scores):
    return jp.select(scores, 0.9)


def score_and_select(params):
    return jp.select(jp.scores.magnitude(params), 0.9)


def params(sizes, count, repeats, largest_plain):
    """Selects a global mask of float32 scores at sparsity 0.9, by number of weights.

    The reference sorts all scores.
    """
    for n in sizes:
        weights = normal_arrays(n, count)
        scores = [jnp.abs(w) for w in weights]
        plain, sorting = compiled(_plain.masks, scores), None
        if n <= largest_plain:
            sorting = seconds(lambda: plain.call(scores))  # noqa: B023
        for name, f, args in (
            ("select", select, scores),
            ("magnitude and select", score_and_select, weights),
        ):
            ours = compiled(f, args)
            times = alone(lambda: ours.call(args), repeats, sorting)  # noqa: B023
            yield Row("params", name, n, **times, bytes=ours.bytes, plain_bytes=plain.bytes)
            ratio = ours.seconds / plain.seconds
            yield Row("params", f"{name}, compilation", n, ours.seconds, plain.seconds, ratio)


def arrays(n, counts, repeats):
    """Selects a global mask of a fixed number of weights, by number of arrays.

    The reference sorts all scores.
    """
    for count in counts:
        scores = [jnp.abs(w) for w in normal_arrays(n, count)]
        plain, ours = compiled(_plain.masks, scores), compiled(select, scores)
        times = paired(lambda: ours.call(scores), lambda: plain.call(scores), repeats)  # noqa: B023
        memory = {"bytes": ours.bytes, "plain_bytes": plain.bytes}
        yield Row("arrays", "select", count, **times, **memory)
        ratio = ours.seconds / plain.seconds
        yield Row("arrays", "select, compilation", count, ours.seconds, plain.seconds, ratio)


def equations(depths, repeats):
    """Finds groups in decoders and shrinks them, by number of equations.

    The reference is tracing; that of compilation and of the first `groups.select`, which compiles,
    is compiling the dense decoder.
    """
    for depth in depths:
        apply_fn, like, _ = decoder(depth, 64, 128, 4, 2, 100)
        weights = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), like)
        tokens = jnp.zeros((1, 16), jnp.int32)
        groups = jp.find_groups(apply_fn, like, tokens)
        masks = groups.masks(np.arange(len(groups)) % 2 == 0)
        n = len(jax.make_jaxpr(apply_fn)(like, tokens).eqns)

        def trace():
            jax.make_jaxpr(lambda p, x: apply_fn(p, x))(like, tokens)  # noqa: B023

        def find():
            jp.find_groups(lambda p, x: apply_fn(p, x), like, tokens)  # noqa: B023

        def shrink():
            options = {"groups": groups, "verify": False}  # noqa: B023
            return jp.shrink(apply_fn, weights, masks, tokens, **options)  # noqa: B023

        yield Row("equations", "find_groups", n, **paired(find, trace, repeats))
        yield Row("equations", "shrink", n, **paired(lambda: shrink()[1], trace, repeats))  # noqa: B023
        small_fn, small, _ = shrink()
        ours, plain = compiled(small_fn, small, tokens), compiled(apply_fn, weights, tokens)
        jax.clear_caches()
        first = seconds(lambda: groups.select(weights, 0.5))  # noqa: B023
        for name, time in (
            ("first groups.select", first),
            ("compilation of the shrunk function", ours.seconds),
        ):
            yield Row("equations", name, n, time, plain.seconds, time / plain.seconds)


def devices(n, arrays, counts, repeats):
    """Selects a global mask of arrays sharded over simulated devices, by number of devices.

    The reference sorts all scores. Memory is that of one device.
    """
    yield from in_new_process(on_devices, n, arrays, counts, repeats, devices=max(counts))


def on_devices(n, arrays, counts, repeats):
    """Measures on meshes of the devices of this process."""
    rows = []
    for count in counts:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        scores = [jax.device_put(jnp.abs(w), sharding) for w in normal_arrays(n, arrays)]
        ours, plain = compiled(select, scores), compiled(_plain.masks, scores)
        times = paired(lambda: ours.call(scores), lambda: plain.call(scores), repeats)  # noqa: B023
        memory = {"bytes": ours.bytes, "plain_bytes": plain.bytes}
        rows.append(Row("devices", "select", count, **times, **memory))
        if count > 1:
            sent = [moved(each.call.as_text()) for each in (ours, plain)]
            rows.append(Row("devices", "collectives", count, bytes=sent[0], plain_bytes=sent[1]))
    return rows


def moved(program):
    """Sums the bytes that the collectives of a compiled program give a device, loops once."""
    return sum(array.nbytes for sent in collectives(program) for array in sent.arrays)


def rounds(widths, counts, plain_counts):
    """Prunes an MLP with SynFlow to sparsity 0.99, by number of rounds; the first call compiles.

    The reference compiles one round and calls it repeatedly.
    """
    weights = mlp_params(jax.random.key(0), widths)
    x = jnp.ones((1, widths[0]))
    for count in counts:
        score = jp.scores.synflow(lambda p, x: mlp(p, x))  # a new function, which compiles again

        def call():
            return jp.select_iteratively(score, weights, 0.99, x, rounds=count)  # noqa: B023

        first, then = seconds(call), seconds(call)
        theirs = None
        if count in plain_counts:
            theirs = seconds(lambda: _plain.synflow(mlp, weights, 0.99, x, count))  # noqa: B023
        ratio = theirs and first / theirs
        yield Row("rounds", "SynFlow", count, first, theirs, ratio)
        yield Row("rounds", "SynFlow, second call", count, then)


def files(sizes, count):
    """Runs the command line on safetensors files of float32, by number of params.

    The reference reads the entire file, and sorts. Memory is the peak beyond the imports.
    """
    for n in sizes:
        yield from in_new_process(on_files, n, count)


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
            ours, memory = time_and_peak(lambda: main([name, *words, "--json"]))  # noqa: B023
            theirs, plain_memory = time_and_peak(lambda: f(*args))  # noqa: B023
            rows.append(Row("files", name, n, ours, theirs, ours / theirs, memory, plain_memory))
    return rows


def time_and_peak(f):
    """Returns the seconds and the peak memory of a call; hides its output."""
    times = []
    with contextlib.redirect_stdout(io.StringIO()):
        memory = peak(lambda: times.append(seconds(f)))
    return times[0], memory


PANELS = (  # part, quantity, labels of the axes
    ("params", "seconds", "params", "seconds"),
    ("params", "bytes", "params", "bytes"),
    ("files", "bytes", "params in the file", "peak bytes"),
    ("links", "seconds", "params", "seconds per step"),
    ("arrays", "seconds", "arrays", "seconds"),
    ("equations", "seconds", "equations", "seconds"),
    ("devices", "bytes", "devices", "bytes per device"),
    ("rounds", "seconds", "rounds", "seconds"),
)
DRAWN = tuple(dict.fromkeys(part for part, *_ in PANELS))
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)


def draw(rows, path):
    """Draws all panels on logarithmic axes; references are dashed, in the same colour."""
    figure, grid = plt.subplots(2, 4, figsize=(16, 7.5))
    figure.subplots_adjust(0.05, 0.07, 0.99, 0.95, 0.22, 0.26)
    for axes, (part, quantity, x, y) in zip(grid.flat, PANELS, strict=True):
        drawn = [row for row in rows if row.part == part and row.at]
        names = dict.fromkeys(row.name for row in drawn)
        for name, color in zip(names, COLORS, strict=False):
            for field, style in ((quantity, "o-"), (f"plain_{quantity}", "x--")):
                points = [(r.at, v) for r in drawn if r.name == name and (v := getattr(r, field))]
                if points:
                    label = None if style == "x--" else name
                    axes.loglog(*zip(*points, strict=True), style, color=color, label=label)
        axes.set(xlabel=x, ylabel=y)
        sizes = sorted({row.at for row in drawn})
        axes.set_xticks(sizes, [si(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(part)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    grid[0, 0].set_title("params (dashed: reference)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
