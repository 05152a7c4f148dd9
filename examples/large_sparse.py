"""A large network pruned, or a small dense one? After Zhu and Gupta 2017, a CNN and an LSTM.

One large network is pruned while it trains, to each of --sparsities (`jp.gradual`, cubic schedule).
Beside it stand dense networks of smaller widths, trained for as many steps: the narrowest that has
no fewer weights than the sparse one keeps, and the narrowest whose float32 weights take no fewer
bytes than the sparse one's file, which holds the kept weights and one bit for each weight.

The CNN reads digits (or IDX files with --data DIR). The LSTM reads, letter by letter, the texts
behind Python's help(), of which the last tenth is held out. Prints a table for each, and draws.

    python examples/large_sparse.py
    python examples/large_sparse.py --family cnn --data mnist/

Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878
"""

import argparse
import bisect
import functools
import pathlib
import pydoc_data.topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _data import load
from _results import markdown, mean_std
from flax import linen as nn
from quickstart import save
from tqdm import tqdm

import jaxprune as jp

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402


class CNN(nn.Module):
    """Three convolutions, of a quarter, half and all of the width, and a dense layer."""

    width: int

    @nn.compact
    def __call__(self, x):
        for share in (4, 2, 1):
            x = nn.relu(nn.Conv(-(-self.width // share), (3, 3), strides=2)(x))
        return nn.Dense(10)(jnp.max(x, (1, 2)))


class LSTM(nn.Module):
    """Two LSTM layers between an embedding and a dense layer, all of the same width."""

    letters: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(self.letters, self.width)(x)
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(self.letters)(x)


class Task(NamedTuple):
    """What a family learns, and how it is trained and judged."""

    network: type  # of a width
    width: int  # of the large network
    train: tuple
    test: tuple
    rate: float
    steps: int
    quality: str
    judge: object  # maps logits and labels to the quality


def images(data):
    """Gives the task of the CNN."""
    x, y, x_test, y_test = load(data)
    side = round(x.shape[1] ** 0.5)
    x, x_test = (a.reshape(-1, side, side, 1) for a in (x, x_test))
    return Task(
        network=CNN,
        width=64,
        train=(jnp.asarray(x), jnp.asarray(y)),
        test=(x_test, y_test),
        rate=1e-2,
        steps=2000,
        quality="test accuracy, %",
        judge=lambda logits, y: 100 * jnp.mean(jnp.argmax(logits, -1) == y),
    )


def text(_):
    """Gives the task of the LSTM: to tell every letter of a row from those before it."""
    topics = pydoc_data.topics.topics
    letters = list("\n".join(topics[name] for name in sorted(topics)))
    letters, codes = np.unique(letters, return_inverse=True)
    rows = codes.astype(np.int32)[: len(codes) // 65 * 65].reshape(-1, 65)
    train, test = np.split(rows, [len(rows) * 9 // 10])
    return Task(
        network=functools.partial(LSTM, len(letters)),
        width=64,
        train=(jnp.asarray(train[:, :-1]), jnp.asarray(train[:, 1:])),
        test=(test[:, :-1], test[:, 1:]),
        rate=1e-2,
        steps=1000,
        quality="bits per character",
        judge=lambda logits, y: cross_entropy(logits, y) / np.log(2),
    )


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def runner(task, width, steps, pruned=True):
    """Gives run(seed, sparsity) -> kept weights, bytes of the file, quality on the test set."""
    model = task.network(width)
    rate = optax.cosine_decay_schedule(task.rate, steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def link(sparsity):
        if not pruned:
            return adam
        schedule = jp.schedules.cubic(sparsity, begin=steps // 10, end=steps * 7 // 10)
        return jp.gradual(adam, jp.scores.magnitude, schedule, every=10)

    def loss(params, x, y):
        return cross_entropy(model.apply(params, x), y)

    @jax.jit
    def step(params, state, sparsity, key, x, y):
        batch = jax.random.randint(key, (32,), 0, len(x))
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, state = link(sparsity).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    judge = jax.jit(lambda params, x, y: task.judge(model.apply(params, x), y))

    def run(seed, sparsity=0.0):
        init_key, key = jax.random.split(jax.random.key(seed))
        params = jax.jit(model.init)(init_key, task.train[0][:1])
        state = link(0.0).init(params)
        for step_key in jax.random.split(key, steps):  # a scan would slow convolutions down
            params, state = step(params, state, jnp.float32(sparsity), step_key, *task.train)
        masks = jp.get_masks(state) if pruned else None
        kept = jp.metrics.summary(params, masks).kept
        stored = jp.metrics.stored_bytes(params, masks) if pruned else 4 * kept
        return kept, stored, float(judge(params, *task.test))

    return run


class Point(NamedTuple):
    """One network, and its quality by seed."""

    width: int
    sparsity: float
    weights: int
    bytes: int
    quality: list


def compare(name, task, args):
    """Trains everything: gives the sparse points, and the dense ones by width."""
    steps = args.steps or task.steps

    @functools.cache
    def weights(width):
        init = task.network(width).init
        shapes = jax.eval_shape(init, jax.random.key(0), task.train[0][:1])
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def narrowest(least):
        return bisect.bisect_left(range(task.width), least, lo=1, key=weights)

    def measure(run, width, sparsity):
        found = [run(seed, sparsity) for seed in range(args.seeds)]
        kept, stored, _ = found[0]
        return Point(width, sparsity, kept, stored, [quality for _, _, quality in found])

    run = runner(task, task.width, steps)
    bar = tqdm(args.sparsities, f"{name}, sparse", ncols=80)
    sparse = [measure(run, task.width, sparsity) for sparsity in bar]
    pairs = [(narrowest(p.weights), narrowest(-(-p.bytes // 4))) for p in sparse]
    widths = sorted({task.width, *sum(pairs, ())})
    dense = {}
    for width in tqdm(widths, f"{name}, dense", ncols=80):
        run = runner(task, width, steps, pruned=False)
        dense[width] = measure(run, width, 0.0)
    return sparse, pairs, dense


def show(name, task, sparse, pairs, dense):
    """Prints every sparse network beside the dense ones of its weights and of its bytes."""

    def cells(point):
        return f"{point.weights:,}", mean_std(point.quality)

    large = dense[task.width]
    count, quality = cells(large)
    rows = [("no", count, f"{large.bytes:,}", quality, *[""] * 4)]
    for point, (by_weights, by_bytes) in zip(sparse, pairs, strict=True):
        count, quality = cells(point)
        others = (*cells(dense[by_weights]), *cells(dense[by_bytes]))
        rows.append((f"{point.sparsity:.0%}", count, f"{point.bytes:,}", quality, *others))
    header = "pruned", "weights", "bytes", name, "as many weights", name, "as many bytes", name
    print(f"\n{name}: {task.quality}; beside it dense networks of as many weights, and bytes\n")
    print(markdown(header, rows))


def draw(results, path):
    """Draws quality against weights and against bytes."""
    figure, grid = plt.subplots(
        len(results), 2, figsize=(7.5, 2.9 * len(results)), layout="constrained", squeeze=False
    )
    for row, (name, (task, sparse, _, dense)) in zip(grid, results.items(), strict=True):
        lines = ("large, pruned", "#D55E00", "o", sparse), ("dense", "#0072B2", "s", dense.values())
        for axes, measure in zip(row, ("weights", "bytes"), strict=True):
            for label, color, marker, points in lines:
                at = [getattr(p, measure) for p in points]
                mean = [np.mean(p.quality) for p in points]
                std = [np.std(p.quality, ddof=len(p.quality) > 1) for p in points]
                style = {"color": color, "marker": marker, "markersize": 5, "capsize": 3}
                axes.errorbar(at, mean, std, label=label, **style)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
            axes.minorticks_off()
            axes.set_xlabel(f"{name}: {'nonzero weights' if measure == 'weights' else 'bytes'}")
            axes.set_ylabel(task.quality)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False)
    save(figure, path)


def main():
    tasks = {"CNN": images, "LSTM": text}
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", metavar="DIR", help="folder of MNIST IDX files")
    options.add_argument("--family", choices=[name.lower() for name in tasks], help="or both")
    options.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, help="by default 2000 of the CNN, 1000 of the LSTM")
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs"))
    args = options.parse_args()
    results = {}
    for name, make in tasks.items():
        if args.family in (None, name.lower()):
            task = make(args.data)
            results[name] = task, *compare(name, task, args)
            show(name, *results[name])
    draw(results, args.out / "large_sparse.png")


if __name__ == "__main__":
    main()
