"""Structured pruning of a ResNet and a ViT: filters, heads and neurons really leave.

Trains both on scikit-learn's digits, removes units by three criteria until --ratios of the FLOPs are
gone, shrinks the networks, fine-tunes what is left, and measures how much faster it runs. Prints a
table and draws accuracy against the speed-up. One seed, 360 test images, and latencies of the machine
it runs on: differences below a point, or below a tenth in speed, are noise.

    python examples/structured.py
    python examples/structured.py --data fashion/ --epochs 2    # Fashion-MNIST files
"""

import pathlib
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import optax
from _data import epoch_order, load
from quickstart import parser
from tqdm import tqdm

import jaxprune as jp

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIZE = 120  # images a batch: divides the 360 test digits
STYLES = {"L1": ("#0072B2", "o"), "Taylor": ("#D55E00", "s"), "random": ("#000000", "x")}


class Block(nn.Module):
    """Two convolutions and a residual connection, projected where the shape changes."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def norm(y):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm(y)))
        if self.stride > 1:
            x = norm(nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + norm(y))


class ResNet(nn.Module):
    """A stem and three residual blocks, each at half the resolution of the one before."""

    width: int = 32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for i in range(3):
            x = Block(self.width * 2**i, stride=1 if i == 0 else 2)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class ViT(nn.Module):
    """A transformer over 16 patches."""

    width: int = 64
    depth: int = 3
    heads: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        patch = (x.shape[1] // 4,) * 2
        x = nn.Conv(self.width, patch, patch)(x).reshape(len(x), 16, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.depth):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def fit(train_fn, variables, x, y, epochs, seed, rate=1e-3):
    """Trains variables["params"]; train_fn gives logits and what it makes of the other variables."""
    steps = max(epochs * len(epoch_order(len(x), 0, SIZE)), 1)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(params, others, x, y):
        logits, others = train_fn({**others, "params": params}, x)
        return cross_entropy(logits, y), others

    @jax.jit
    def step(variables, state, x, y):
        others = {name: v for name, v in variables.items() if name != "params"}
        grads, others = jax.grad(loss, has_aux=True)(variables["params"], others, x, y)
        updates, state = tx.update(grads, state)
        return {**others, "params": optax.apply_updates(variables["params"], updates)}, state

    state = tx.init(variables["params"])
    for i in range(epochs):
        for index in epoch_order(len(x), (seed, i), SIZE):
            variables, state = step(variables, state, x[index], y[index])
    return variables


def accuracy(fn, variables, x, y):
    """Gives the accuracy in whole batches, so that fn is compiled for one shape."""
    batches = range(0, len(x) - SIZE + 1, SIZE)
    right = [(fn(variables, x[i : i + SIZE]).argmax(-1) == y[i : i + SIZE]).mean() for i in batches]
    return float(jnp.mean(jnp.array(right)))


def latency(*calls, rounds=20):
    """Gives the median seconds of each call; taken in turns, so that all meet the same noise."""
    times = [[] for _ in calls]
    for i in range(rounds + 2):
        for seconds, (fn, *args) in zip(times, calls, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            if i >= 2:  # the first rounds compile and warm up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def compare(name, model, data, args):
    """Gives rows of network, criterion, ratio, before, after, params, FLOPs, latencies."""
    x, y, x_test, y_test = data
    batch = x_test[:SIZE]
    key = jax.random.key(args.seed)

    def train_fn(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    fn = jax.jit(model.apply)
    trained = fit(train_fn, jax.jit(model.init)(key, batch), x, y, args.epochs, args.seed)
    groups = jp.find_groups(fn, trained, batch)
    print(f"{name}\n\n{groups}\n")
    taylor = jp.scores.taylor(lambda variables, x, y: cross_entropy(fn(variables, x), y))
    scores = {
        "L1": jp.scores.magnitude(trained),
        "Taylor": taylor(trained, x[:512], y[:512]),
        "random": jp.scores.random(trained, key),
    }

    def size(fn, variables):
        params = sum(w.size for w in jax.tree.leaves(variables["params"]))
        return params, jp.metrics.flops(fn, variables, batch[:1])

    dense = accuracy(fn, trained, x_test, y_test)
    seconds = latency((fn, trained, batch))[0]
    rows = [(name, "dense", 0.0, dense, dense, *size(fn, trained), seconds, seconds)]
    runs = [(criterion, ratio) for criterion in STYLES for ratio in sorted(args.ratios)]
    for criterion, ratio in (bar := tqdm(runs, ncols=80)):
        bar.set_description(f"{name} {criterion} {ratio:g}")
        masks = groups.select(scores[criterion], ratio, scope="layer", cost="flops")
        small_fn, small, _ = jp.shrink(fn, trained, masks, batch)
        small_train_fn, _, _ = jp.shrink(
            train_fn, trained, masks, batch, has_aux=True, verify=False
        )
        before = accuracy(small_fn, small, x_test, y_test)
        small = fit(small_train_fn, small, x, y, args.tuning_epochs, args.seed + 1)
        after = accuracy(small_fn, small, x_test, y_test)
        seconds = latency((fn, trained, batch), (small_fn, small, batch))
        rows.append((name, criterion, ratio, before, after, *size(small_fn, small), *seconds))
    return rows


def show(rows):
    print("network  criterion  ratio  before   after   params    MFLOPs  dense ms  ms     speed-up")
    for name, criterion, ratio, before, after, params, flops, dense, seconds in rows:
        print(
            f"{name:8} {criterion:9} {ratio:6.0%} {before:7.1%} {after:7.1%} {params:9,} "
            f"{flops / 1e6:7.2f} {1e3 * dense:9.2f} {1e3 * seconds:9.2f} {dense / seconds:8.2f}×"
        )


def draw(rows, path):
    names = list(dict.fromkeys(r[0] for r in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(9, 4), layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        dense = next(r for r in rows if r[:2] == (name, "dense"))
        axes.plot(1, dense[4], "*", color="gray", markersize=13, label="dense")
        for criterion, (color, marker) in STYLES.items():
            points = [(r[7] / r[8], r[4]) for r in rows if r[:2] == (name, criterion)]
            axes.plot(*zip(*points), color=color, marker=marker, label=criterion)
        axes.set_title(name)
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def main():
    options = parser(__doc__)
    options.set_defaults(out=pathlib.Path("."))
    options.add_argument("--tuning-epochs", type=int, default=4)
    options.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    args = options.parse_args()
    x, y, x_test, y_test = load(args.data)
    side = round(x.shape[1] ** 0.5)
    x, x_test = (jnp.asarray(x).reshape(-1, side, side, 1) for x in (x, x_test))
    data = x, jnp.asarray(y), x_test, jnp.asarray(y_test)
    rows = []
    for name, model in (("ResNet", ResNet()), ("ViT", ViT())):
        rows += compare(name, model, data, args)
    show(rows)
    draw(rows, args.out / "structured.png")


if __name__ == "__main__":
    main()
