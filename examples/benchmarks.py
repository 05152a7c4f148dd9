"""Measures the time and memory of pruning, and of pruned networks, against plain JAX.

Each measurement has a reference that is written in plain JAX and measured in the same run. A ratio
below one means faster, or smaller. Times are medians, where possible of pairs timed in turn.

The run is stored as benchmarks.json in the folder --out, and drawn as scaling.png. The tables show
changes since the run that was stored there before, or else since the run in docs/results; `!` marks
ratios that changed by more than 20 %.

    python examples/benchmarks.py                      # a quarter of an hour on two cores
    python examples/benchmarks.py --only links scores  # compared, but not stored
"""

import argparse
import functools
import itertools
import math
import pathlib
import tempfile
import warnings

import _bench
import _first
import _plain
import _scaling
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _bench import Row, compiled, paired, stepping
from _networks import (
    VGG16,
    ResNet50,
    ViT,
    conv_params,
    convs,
    decoder,
    initialise,
    mlp,
    mlp_params,
    normal_arrays,
)

import jaxprune as jp

STORED = pathlib.Path(__file__).parent.parent / "docs" / "results"


def patterns(n, count, pairs):
    """Selects masks of float32 scores with other scopes, patterns and scores.

    The reference sorts scores of the same shapes.
    """
    scores = [jnp.abs(w) for w in normal_arrays(n, count)]
    equal = [jnp.ones_like(s) for s in scores]
    select, pattern = functools.partial(jp.select, sparsity=0.9), jp.patterns
    for name, f, plain, args in (
        ("all scores equal", select, _plain.masks, equal),
        ("each layer", functools.partial(select, scope="layer"), _plain.masks_by_layer, scores),
        (
            "blocks of 16 × 16",
            functools.partial(select, pattern=pattern.block((16, 16))),
            _plain.blocks,
            scores,
        ),
        ("columns", functools.partial(select, pattern=pattern.axis(-1)), _plain.columns, scores),
        (
            "2:4",
            functools.partial(jp.select, pattern=pattern.n_of_m(2, 4)),
            _plain.two_of_four,
            scores,
        ),
    ):
        ours, reference = compiled(f, args), compiled(plain, args)
        times = paired(lambda: ours.call(args), lambda: reference.call(args), pairs)  # noqa: B023
        memory = {"bytes": ours.bytes, "plain_bytes": reference.bytes}
        yield Row("patterns", name, n, **times, **memory)


def train_step(loss, tx):
    def step(carry, x, y):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    return step


def optimizer_step(loss, tx):
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def squared_error(apply_fn):
    def loss(params, x, y):
        return jnp.mean((apply_fn(params, x) - y) ** 2)

    return loss


def links(sizes):
    """Trains an MLP with Adam at batch size 64, by number of params.

    The reference is plain Adam. Memory is temporary memory.
    """
    loss, plain = squared_error(mlp), optax.adam(1e-3)
    schedule = jp.schedules.cubic(0.9, begin=10**6, end=2 * 10**6)  # not due while measuring
    for n, pairs in sizes.items():
        width = round(math.sqrt(n / 3))
        params = mlp_params(jax.random.key(0), [width] * 4)
        x, y = jax.random.normal(jax.random.key(1), (2, 64, width))
        grads = jax.jit(jax.grad(loss))(params, x, y)
        masks = jp.select(jp.scores.magnitude(params), 0.9)
        enforce = jp.enforce(optax.adam(1e-3), masks)
        gradual = jp.gradual(optax.adam(1e-3), jp.scores.magnitude, schedule, every=100)
        for kind, make, args in (
            ("step", train_step, (x, y)),
            ("optimizer alone", optimizer_step, (grads,)),
        ):
            carry = params, plain.init(params)
            adam = compiled(make(loss, plain), carry, *args, donate_argnums=0)
            reference = stepping(adam.call, jax.tree.map(jnp.copy, carry), *args)
            for name, tx in (("enforce", enforce), ("gradual, no pruning due", gradual)):
                carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
                ours = compiled(make(loss, tx), carry, *args, donate_argnums=0)
                times = paired(stepping(ours.call, carry, *args), reference, pairs)
                memory = {"bytes": ours.temporary, "plain_bytes": adam.temporary}
                yield Row("links", f"{name}, {kind}", n, **times, **memory)
            del carry, reference


def scores(name, apply_fn, params, x, examples, pairs):
    """Scores weights and units.

    The reference is one gradient of the batch, or for the rows with a number of examples, one
    gradient for each of them.
    """
    loss = squared_error(apply_fn)
    y = jnp.ones_like(apply_fn(params, x))
    gradient = jax.jit(jax.grad(loss))
    groups = jp.find_groups(apply_fn, params, x)
    by_batch = {
        "gradient": jp.scores.gradient(loss),
        "Taylor": jp.scores.taylor(loss),
        "SNIP": jp.scores.snip(loss),
        "SynFlow, one round, batch 1": lambda p, x, y: jp.scores.synflow(apply_fn)(p, x[:1]),
        "Taylor gates": jp.units.taylor_gates(groups, loss),
        "activation": lambda p, x, y: jp.units.activation(groups, apply_fn)(p, x),
        "GraSP": jp.scores.grasp(loss),
    }
    by_example = {
        "Fisher": jp.scores.fisher(loss),
        "WoodFisher, blocks of 50": jp.scores.woodfisher(loss),
        "Taylor of feature maps": jp.units.taylor(groups, loss),
    }

    def row(criterion, f, plain, samples=1):
        times = paired(f, plain, pairs)
        times |= {k: times[k] / samples for k in ("seconds", "ratio")}
        return Row("scores", f"{name}: {criterion}", **times)

    def batch():
        return gradient(params, x, y)

    def one_by_one():
        return [gradient(params, x[i : i + 1], y[i : i + 1]) for i in range(examples)]

    for criterion, score in by_batch.items():
        call = jax.jit(score)
        yield row(criterion, lambda: call(params, x, y), batch)  # noqa: B023
    hutchinson, samples = jp.scores.obd_hutchinson(loss, 10), 10
    key = jax.random.key(3)
    yield row("Hutchinson, one sample", lambda: hutchinson(params, key, x, y), batch, samples)
    few = params, x[:examples], y[:examples]
    for criterion, score in by_example.items():
        yield row(f"{criterion}, {examples} examples", lambda: score(*few), one_by_one)  # noqa: B023


def loops(params, x, pairs):
    """Computes gradients of single examples in `lax.map`, without jaxprune.

    The reference is a Python loop. On CPUs, XLA is slow at convolutions in loops.
    """
    gradient = jax.grad(squared_error(convs))
    one = jax.jit(gradient)
    y = jnp.ones((len(x), 1, 10))

    @jax.jit
    def inside():
        return jax.lax.map(lambda pair: gradient(params, *pair), (x[:, None], y))

    def outside():
        return [one(params, x[i : i + 1], y[i]) for i in range(len(x))]

    yield Row("loops", "convolutions, lax.map", **paired(inside, outside, pairs))


def oracle(widths, size, examples, pairs):
    """Scores filters of convolutions with the oracle.

    The reference is one evaluation of the loss for each filter.
    """
    params = conv_params(jax.random.key(0), widths)
    x = jax.random.normal(jax.random.key(1), (examples, size, size, 3))
    y = jnp.arange(examples) % 10

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(convs(params, x), y).mean()

    groups = jp.find_groups(convs, params, x)
    score, forward = jp.search.oracle(groups, loss), jax.jit(loss)

    def evaluations():
        return [forward(params, x, y) for _ in range(len(groups))]

    times = paired(lambda: score(params, x, y), evaluations, pairs)
    yield Row("oracle", f"{len(groups)} filters of {len(widths)} convolutions", **times)


def compact(n, count):
    """Saves and loads float32 files with a tenth of the weights. Memory is the size of the file.

    The reference is a NumPy file of all weights.
    """
    weights = normal_arrays(n, count)
    names = [str(i) for i in range(count)]
    masks = jp.select(jp.scores.magnitude(weights), 0.9)
    weights = jp.apply_masks(weights, masks)
    with tempfile.TemporaryDirectory() as folder:
        sparse, dense = (pathlib.Path(folder, name) for name in ("a.safetensors", "b.npz"))

        def save():
            jp.masks.save(sparse, weights, masks)

        def plain_save():
            np.savez(dense, **dict(zip(names, map(np.asarray, weights), strict=True)))

        def plain_load():
            with np.load(dense) as file:
                return [jnp.asarray(file[name]) for name in names]

        times = paired(save, plain_save, 3)
        memory = {"bytes": sparse.stat().st_size, "plain_bytes": dense.stat().st_size}
        yield Row("compact", "masks.save", n, **times, **memory)
        times = paired(lambda: jp.masks.load(sparse, like=weights), plain_load, 3)
        yield Row("compact", "masks.load", n, **times)


def networks(models, size, batch, rounds):
    """Runs networks that are shrunk to half of each layer.

    The reference is the same architecture written by hand at half the widths, or the dense network.
    """
    x = jnp.ones((batch, size, size, 3))
    for name, (dense, by_hand) in models.items():
        params, hand = initialise(dense, x), initialise(by_hand, x)
        groups = jp.find_groups(dense.apply, params, x)
        scores = jp.scores.magnitude(params)
        masks = groups.select(scores, 0.5, scope="layer")
        small_fn, small, _ = jp.shrink(dense.apply, params, masks, x, groups=groups, verify=False)
        sizes = [sum(w.size for w in jax.tree.leaves(p)) for p in (small, hand)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{name}: the shrunk network must have {sizes[1]} params, as the hand-written one, "
                f"got {sizes[0]}."
            )
        functions = {
            "dense": (dense.apply, params),
            "shrunk": (small_fn, small),
            "hand-written": (by_hand.apply, hand),
        }
        times = jp.metrics.latency(functions, x, rounds=rounds)
        median = {(row.name, row.batch): row.median for row in times.rows}
        for plain, n in itertools.product(("hand-written", "dense"), sorted({1, batch})):
            ours, theirs = median["shrunk", n], median[plain, n]
            pair = f"{name}, batch {n}, vs {plain}"
            yield Row("networks", pair, None, ours, theirs, ours / theirs)
        flops = [jp.metrics.flops(fn, p, x) for fn, p in functions.values()]
        yield Row("networks", f"{name}, FLOPs vs dense", ratio=flops[1] / flops[0])


def structure(models, size, decoder_sizes, repeats):
    """Finds and selects units of networks.

    The reference of `find_groups` is tracing; that of `groups.select` computes the norms of all
    filters and sorts them by layer.
    """

    def finding(name, apply_fn, params, inputs):
        def find():
            jp.find_groups(lambda p, x: apply_fn(p, x), params, inputs)

        def trace():
            jax.make_jaxpr(lambda p, x: apply_fn(p, x))(params, inputs)

        return Row("structure", f"{name}, find_groups", **paired(find, trace, repeats))

    x = jnp.ones((1, size, size, 3))
    for name, (model, _) in models.items():
        params = initialise(model, x)
        yield finding(name, model.apply, params, x)
        groups, scores = jp.find_groups(model.apply, params, x), jp.scores.magnitude(params)
        select = functools.partial(groups.select, scores, 0.5, scope="layer")
        plain = functools.partial(jax.jit(_plain.filters), params)
        yield Row("structure", f"{name}, groups.select", **paired(select, plain, repeats))
    layers, width, *_ = decoder_sizes
    yield finding(f"decoder, {layers} layers of width {width}", *decoder(*decoder_sizes))


MODELS = {
    "ResNet-50": (ResNet50(), ResNet50(32)),
    "ViT-S/16": (ViT(), ViT(192, 3, 32)),
    "VGG-16": (VGG16(), VGG16(32)),
}


def parts(tiny):
    """Returns the parts by name: functions with their settings."""
    key, p = jax.random.key(0), functools.partial
    if tiny:
        dense = mlp_params(key, [64, 32, 10])
        models = {"VGG": (VGG16(8, (1,)), VGG16(4, (1,)))}
        return {
            "params": p(_scaling.params, [3000], 1, 1, 10**6),
            "patterns": p(patterns, 2**12, 1, pairs=1),
            "links": p(links, {20_000: 3}),
            "scores": p(scores, "MLP", mlp, dense, jnp.ones((4, 64)), 2, pairs=1),
            "oracle": p(oracle, [4], size=4, examples=2, pairs=1),
            "compact": p(compact, 10_000, 3),
            "networks": p(networks, models, 16, 1, rounds=2),
            "structure": p(structure, models, 16, (2, 64, 128, 4, 2, 100), repeats=1),
            "files": p(_scaling.on_files, 10_000, 1),
            "equations": p(_scaling.equations, [1], repeats=1),
            "devices": p(_scaling.on_devices, 4096, 1, [1], repeats=1),
            "rounds": p(_scaling.rounds, [64, 128, 10], [10], [10]),
            "first": p(_first.first, 4096, [3], ["VGG-16"], 32, repeats=1),
        }
    images = jax.random.normal(key, (64, 16, 16, 3))
    small = conv_params(key, [16, 16, 32, 32, 32, 64])
    dense = mlp_params(key, [784, 1000, 1000, 10])
    digits = jax.random.normal(key, (256, 784))
    sizes = [10**6, 4 * 10**6, 25 * 10**6, 10**8, 4 * 10**8]
    return {
        "first": p(_first.first, sizes[2], [54, 162, 500], list(_first.NETWORKS), 224, repeats=5),
        "devices": p(_scaling.devices, 20 * 2**18, 20, [1, 2, 4, 8], repeats=3),
        "arrays": p(_scaling.arrays, sizes[1], [10, 30, 100, 300], repeats=3),
        "files": p(_scaling.files, sizes[1:4], 20),
        "equations": p(_scaling.equations, [2, 8, 32, 64], repeats=1),
        "rounds": p(_scaling.rounds, [784, 700, 600, 10], [1, 3, 10, 30, 100, 300], [1, 10, 100]),
        "networks": p(networks, MODELS, 224, 4, rounds=7),
        "structure": p(structure, MODELS, 224, (32, 4096, 14336, 32, 8, 128256), repeats=3),
        "links": p(links, {10**6: 50, 10**7: 30, 10**8: 3}),
        "scores": p(scores, "MLP", mlp, dense, digits, 32, pairs=10),
        "scores of convolutions": p(scores, "convolutions", convs, small, images, 32, pairs=10),
        "loops": p(loops, small, images[:32], pairs=5),
        "oracle": p(oracle, [16, 16, 32, 32, 32, 64], size=16, examples=64, pairs=3),
        "compact": p(compact, sizes[2], 20),
        "patterns": p(patterns, 20 * 2**20, 20, pairs=3),
        "params": p(_scaling.params, sizes, 20, repeats=5, largest_plain=25 * 10**6),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="measure some of the parts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a quick test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "obd")  # random weights are not at a minimum
    name = "tiny.json" if args.tiny else "benchmarks.json"
    previous = _bench.previous(args.out / name, STORED / name)
    todo = parts(args.tiny)
    if unknown := set(args.only or []) - set(todo):
        parser.error(f"--only must be some of {', '.join(todo)}; got {', '.join(sorted(unknown))}")
    run, rows = _bench.machine(), []
    print(_bench.describe(run))
    for part in args.only or todo:
        measured = list(todo[part]())
        rows += measured
        print(f"\n{part}: {_bench.sentences(todo[part].func)}\n")
        print(_bench.table(measured, previous))
        print(_bench.growth(measured), end="", flush=True)
    if not args.only:
        _bench.store(args.out / name, run, rows)
        _scaling.draw(rows, args.out / "scaling.png")
        print(f"\nwrote {name} and scaling.png in {args.out}")


if __name__ == "__main__":
    main()
