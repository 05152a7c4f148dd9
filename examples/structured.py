"""Structured pruning of a ResNet and a ViT: removes filters, heads and neurons, and shrinks.

Trains both networks on digits, removes units by three criteria until --ratios of the FLOPs are
removed, shrinks the networks, fine-tunes them, and measures their speed. All layers lose the same
fraction, so that the criteria are compared at equal widths. Prints the groups of units and a table,
and draws accuracy against speed-up.

FLOPs are not time: some widths suit the kernels of XLA better than others. There is one seed, and
the settings were chosen on the same 360 test images. Accuracies are therefore optimistic,
differences of a point are noise, and the criteria are not ranked.

    python examples/structured.py
    python examples/structured.py --data fashion/ --epochs 2    # Fashion-MNIST files
"""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from _common import BLACK, BLUE, VERMILION, parser, save, tidy
from _data import epoch_order, load_images
from tqdm import tqdm

import jaxprune as jp

BATCH = 120  # for accuracy and latency; it divides the 360 test digits
STYLES = {"L1": (BLUE, "o"), "Taylor": (VERMILION, "s"), "random": (BLACK, "x")}


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
    """A stem and two residual blocks, the second at half the resolution and twice the width."""

    width: int = 48

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for i in range(2):
            x = Block(self.width * 2**i, stride=1 if i == 0 else 2)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class ViT(nn.Module):
    """A transformer over 16 patches."""

    width: int = 128
    depth: int = 2
    heads: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        patch = (x.shape[1] // 4,) * 2
        x = nn.Conv(self.width, patch, patch)(x).reshape(len(x), 16, self.width)
        x = x + self.param("position", nn.initializers.normal(1.0), x.shape[1:])
        for _ in range(self.depth):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def fit(train_fn, variables, x, y, epochs, seed, size=60):
    """Trains variables["params"]; train_fn returns logits and the other variables, updated."""
    steps = max(epochs * len(epoch_order(len(x), 0, size)), 1)
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

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
        for index in epoch_order(len(x), (seed, i), size):
            variables, state = step(variables, state, x[index], y[index])
    return variables


def accuracy(fn, variables, x, y):
    """Returns the accuracy on full batches, so that fn is compiled once."""
    n = min(BATCH, len(x))
    starts = range(0, len(x) - n + 1, n)
    right = [fn(variables, x[i : i + n]).argmax(-1) == y[i : i + n] for i in starts]
    return float(jnp.mean(jnp.array(right)))


def compare(name, model, data, args):
    """Returns rows of network, criterion, ratio, before, after, params, FLOPs and seconds."""
    x, y, x_test, y_test = data
    batch = x_test[:BATCH]
    key = jax.random.key(args.seed, impl="rbg")
    fn = jax.jit(model.apply)

    def train_fn(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    def size(fn, variables):
        params = sum(w.size for w in jax.tree.leaves(variables["params"]))
        return params, jp.metrics.flops(fn, variables, batch[:1])

    trained = fit(train_fn, jax.jit(model.init)(key, batch), x, y, args.epochs, args.seed)
    groups = jp.find_groups(fn, trained, batch)
    print(f"{name}\n\n{groups}\n")
    taylor = jp.scores.taylor(lambda variables, x, y: cross_entropy(fn(variables, x), y))
    scores = {
        "L1": jp.scores.magnitude(trained),
        "Taylor": taylor(trained, x[:512], y[:512]),
        "random": jp.scores.random(trained, key),
    }

    dense = accuracy(fn, trained, x_test, y_test)
    rows = [("dense", 0.0, dense, dense, *size(fn, trained))]
    functions = {"dense 0": (fn, trained)}
    runs = [(criterion, ratio) for criterion in STYLES for ratio in sorted(args.ratios)]
    for criterion, ratio in (bar := tqdm(runs, ncols=80)):
        bar.set_description(f"{name} {criterion} {ratio:g}")
        masks = groups.select(scores[criterion], ratio, scope="layer", cost="flops", round_to=4)
        small_fn, small, plan = jp.shrink(fn, trained, masks, batch)
        if plan.inexact:
            tqdm.write(f"{name} {criterion} {ratio:g}: {plan.inexact}")
        small_train_fn, *_ = jp.shrink(train_fn, trained, masks, batch, has_aux=True, verify=False)
        before = accuracy(small_fn, small, x_test, y_test)
        small = fit(small_train_fn, small, x, y, args.tuning_epochs, args.seed + 1)
        after = accuracy(small_fn, small, x_test, y_test)
        rows.append((criterion, ratio, before, after, *size(small_fn, small)))
        functions[f"{criterion} {ratio:g}"] = small_fn, small
    latencies = jp.metrics.latency(functions, batch, rounds=20)
    timings = [timing for timing in latencies.rows if timing.batch == len(batch)]
    return [(name, *row, timing.median) for row, timing in zip(rows, timings, strict=True)]


def show(rows):
    print("network  criterion  ratio  before   after   params  MFLOPs       ms  speed-up")
    for name, criterion, ratio, before, after, params, flops, seconds in rows:
        if criterion == "dense":
            dense = seconds
        print(
            f"{name:8} {criterion:9} {ratio:6.0%} {before:7.1%} {after:7.1%} {params:8,} "
            f"{flops / 1e6:7.2f} {1e3 * seconds:8.2f} {dense / seconds:8.2f}×"
        )
    print("before, after: test accuracy before and after fine-tuning; MFLOPs: of one image;")
    print(f"ms: of a batch of {BATCH}")


def draw(rows, path):
    """Draws accuracy after fine-tuning against the measured speed-up."""
    names = list(dict.fromkeys(row[0] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(9, 4), sharey=True, layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        dense, *pruned = [row for row in rows if row[0] == name]
        axes.axhline(dense[4], color="gray", linestyle="--", linewidth=1)
        axes.plot(1, dense[4], "*", color="gray", markersize=12, label="dense")
        for criterion, (color, marker) in STYLES.items():
            points = [(dense[7] / row[7], row[4]) for row in pruned if row[1] == criterion]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=criterion)
        axes.set_title(name)
        axes.set_xlabel("measured speed-up")
        axes.xaxis.set_major_formatter(lambda s, _: f"{s:.3g}×")
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
        tidy(axes)
        axes.margins(0.08)
    panels[0].set_ylabel("test accuracy after fine-tuning")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)


def main():
    options = parser(__doc__, seeds=None)
    options.add_argument("--epochs", type=int, default=10, help="of dense training")
    options.add_argument("--tuning-epochs", type=int, default=2)
    options.add_argument(
        "--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="shares of FLOPs to remove"
    )
    args = options.parse_args()
    warnings.filterwarnings("ignore", "round_to")  # one for each width that rounding changes
    data = tuple(map(jnp.asarray, load_images(args.data)))
    rows = []
    for name, model in (("ResNet", ResNet()), ("ViT", ViT())):
        rows += compare(name, model, data, args)
    show(rows)
    draw(rows, args.out / "structured.png")


if __name__ == "__main__":
    main()
