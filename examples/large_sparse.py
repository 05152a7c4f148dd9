"""A large network pruned, or a small dense one? After Zhu and Gupta, 2017, for a CNN and an LSTM.

A large network is pruned while it trains, to each of --sparsities (`jp.gradual`, cubic schedule).
It is compared with narrower dense networks that are trained for as many steps: the narrowest with
at least as many weights as the sparse network keeps, and the narrowest whose float32 weights take
at least as many bytes as the sparse file, which holds the kept weights and one bit for each weight.

The CNN classifies digits. The LSTM predicts the next letter of the texts of Python's help(), whose
last tenth is held out. Prints a table for each, and draws quality against weights and bytes.

    python examples/large_sparse.py
    python examples/large_sparse.py --family cnn --data mnist/

Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878
"""

import bisect
import functools
import pydoc_data.topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import BLUE, VERMILION, error_bars, markdown, mean_std, parser, save, tidy
from _data import load_images
from flax import linen as nn
from matplotlib.ticker import LogLocator
from tqdm import tqdm

import jaxprune as jp


class CNN(nn.Module):
    """Three convolutions, of a quarter, half and the full width, and a dense layer."""

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
    """The data of a family of networks, and how these are trained and evaluated."""

    network: type  # maps a width to a module
    width: int  # of the large network
    train: tuple
    test: tuple
    rate: float
    steps: int
    measure: str  # name of the quality
    quality: object  # maps logits and labels to a scalar


def images(data):
    """Returns the task of the CNN."""
    x, y, x_test, y_test = load_images(data)
    return Task(
        network=CNN,
        width=64,
        train=(jnp.asarray(x), jnp.asarray(y)),
        test=(x_test, y_test),
        rate=1e-2,
        steps=2000,
        measure="test accuracy, %",
        quality=lambda logits, y: 100 * jnp.mean(jnp.argmax(logits, -1) == y),
    )


def text(_):
    """Returns the task of the LSTM: to predict each letter of a row from those before it."""
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
        measure="bits per character",
        quality=lambda logits, y: cross_entropy(logits, y) / np.log(2),
    )


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def runner(task, width, steps, pruned=True):
    """Returns run(seed, sparsity) -> (kept weights, bytes of the file, test quality)."""
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

    quality = jax.jit(lambda params, x, y: task.quality(model.apply(params, x), y))

    def run(seed, sparsity=0.0):
        init_key, key = jax.random.split(jax.random.key(seed))
        params = jax.jit(model.init)(init_key, task.train[0][:1])
        state = link(0.0).init(params)
        for step_key in jax.random.split(key, steps):  # XLA runs convolutions slowly in a scan
            params, state = step(params, state, jnp.float32(sparsity), step_key, *task.train)
        masks = jp.get_masks(state) if pruned else None
        kept = jp.metrics.summary(params, masks).kept
        stored = jp.metrics.stored_bytes(params, masks) if pruned else 4 * kept
        return kept, stored, float(quality(params, *task.test))

    return run


class Point(NamedTuple):
    """One network, and its quality for each seed."""

    width: int
    sparsity: float
    weights: int
    bytes: int
    quality: list


def compare(name, task, args):
    """Trains all networks; returns sparse points, their dense widths, and dense points by width."""
    steps = args.steps or task.steps

    @functools.cache
    def weights(width):
        init = task.network(width).init
        shapes = jax.eval_shape(init, jax.random.key(0), task.train[0][:1])
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def narrowest(least):
        return bisect.bisect_left(range(task.width), least, lo=1, key=weights)

    def measure(run, width, sparsity):
        results = [run(seed, sparsity) for seed in range(args.seeds)]
        kept, stored, _ = results[0]
        return Point(width, sparsity, kept, stored, [quality for _, _, quality in results])

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
    """Prints each sparse network, and the dense networks of equal weights and of equal bytes."""

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
    print(f"\n{name}: {task.measure}; compared with dense networks of as many weights or bytes\n")
    print(markdown(header, rows))


def draw(results, path):
    """Draws quality against weights and against bytes."""
    figure, grid = plt.subplots(
        len(results), 2, figsize=(7.5, 2.9 * len(results)), layout="constrained", squeeze=False
    )
    for row, (name, (task, sparse, _, dense)) in zip(grid, results.items(), strict=True):
        lines = {
            "large, pruned": ((VERMILION, "o"), sparse),
            "dense": ((BLUE, "s"), dense.values()),
        }
        for axes, measure in zip(row, ("weights", "bytes"), strict=True):
            for label, (style, points) in lines.items():
                at = [getattr(p, measure) for p in points]
                error_bars(axes, at, [p.quality for p in points], style, label=label)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
            axes.minorticks_off()
            axes.set_xlabel(f"{name}: {'nonzero weights' if measure == 'weights' else 'bytes'}")
            axes.set_ylabel(task.measure)
            tidy(axes)
    grid[0, 0].legend(frameon=False)
    save(figure, path)


def main():
    tasks = {"CNN": images, "LSTM": text}
    options = parser(__doc__)
    options.add_argument("--family", choices=[n.lower() for n in tasks], help="default: both")
    options.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95])
    options.add_argument("--steps", type=int, help="default: 2000 for the CNN, 1000 for the LSTM")
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
