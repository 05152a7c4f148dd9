"""Which filters to remove, and is a pruned network better than one from scratch?

A small CNN loses a share of its filters in one step, and is retrained. Six methods are compared:

    random                        random filters of each layer
    L1, independent               the smallest L1 norms of each layer
    L1, greedy                    the same, without the inputs that earlier layers have lost
    L1, all layers                the smallest L1 norms, divided by the mean of their layer
    particle filter, all layers   the masks with the fewest errors on held-out training images
    from scratch                  the widths of "L1, independent" with new weights, trained for as
                                  many steps as dense training and retraining together

The pruned networks are shrunk before they are retrained. Prints a table, and draws accuracy before
and after retraining.

    python examples/filters.py                          # 8 x 8 digits, nothing to download
    python examples/filters.py --data fashion/          # Fashion-MNIST files

Li et al, Pruning Filters for Efficient ConvNets: https://arxiv.org/abs/1608.08710
Anwar et al, Structured Pruning of Deep Convolutional Neural Networks: https://arxiv.org/abs/1512.08571
Liu et al, Rethinking the Value of Network Pruning: https://arxiv.org/abs/1810.05270
"""

import collections
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    VERMILION,
    error_bars,
    markdown,
    mean_std,
    parser,
    save,
    tidy,
)
from _data import load_images
from flax import linen as nn
from tqdm import tqdm

import jaxprune as jp

ADAM = optax.scale_by_adam()
STYLES = {
    "random": (BLACK, "x"),
    "L1, independent": (BLUE, "o"),
    "L1, greedy": (SKY, "P"),
    "L1, all layers": (GREEN, "s"),
    "particle filter, all layers": (VERMILION, "D"),
    "from scratch": (ORANGE, "^"),
}


class CNN(nn.Module):
    """A chain of convolutions with batch norm, pooled after every second one, and a dense layer."""

    widths: tuple[int, ...] = (12, 24, 24, 48)

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=1 if i else 2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            if i % 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


@functools.partial(jax.jit, static_argnames="model")
def train_step(model, variables, state, rate, x, y):
    def loss(params):
        inputs = {**variables, "params": params}
        logits, others = model.apply(inputs, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), others

    grads, others = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = ADAM.update(grads, state)
    params = jax.tree.map(lambda w, u: w - rate * u, variables["params"], updates)
    return {**others, "params": params}, state


def fit(model, variables, x, y, steps, seed, rate=1e-2, size=64):
    """Trains on random batches; the learning rate falls to 0 along a cosine."""
    state, rng = ADAM.init(variables["params"]), np.random.default_rng(seed)
    for i in range(steps):
        batch = rng.integers(len(x), size=size)
        now = np.float32(rate * (1 + np.cos(np.pi * i / steps)) / 2)
        variables, state = train_step(model, variables, state, now, x[batch], y[batch])
    return variables


@functools.partial(jax.jit, static_argnames="model")
def error(model, variables, x, y):
    return jnp.mean(model.apply(variables, x).argmax(-1) != y)


def greedy(groups, variables, ratio):
    """Prunes layer by layer; a filter is scored by the inputs that remain when it is reached."""
    masks = groups.masks(np.ones(len(groups), bool))
    for group in groups.groups:  # in the order in which the network uses them
        bias = next(path for path, *_ in group.members if path.endswith("bias"))
        scores = jp.scores.magnitude(jp.apply_masks(variables, masks))
        masks = groups.select(scores, scope={bias: ratio}, reduce="first", within=masks)
    return masks


def selectors(groups, find_error, held, args):
    """Returns masks(variables, ratio, key) by name."""

    def random(variables, ratio, key):
        return groups.select(jax.random.uniform(key, (len(groups),)), ratio, scope="layer")

    def independent(variables, ratio, key):
        scores = jp.scores.magnitude(variables)
        return groups.select(scores, ratio, reduce="first", scope="layer")

    def all_layers(variables, ratio, key):
        scores = jp.scores.magnitude(variables)
        return groups.select(jp.units.reduce(groups, scores, "first", normalize="mean"), ratio)

    def search(variables, ratio, key):
        # One network at a time: on CPUs, XLA is slow at batches of convolutions.
        budget = {"particles": args.particles, "rounds": args.rounds, "batch_size": 1}
        inputs = groups, find_error, variables, ratio, key, *held
        return jp.search.particle_filter(*inputs, **budget).masks

    return {
        "random": random,
        "L1, independent": independent,
        "L1, greedy": lambda variables, ratio, key: greedy(groups, variables, ratio),
        "L1, all layers": all_layers,
        "particle filter, all layers": search,
    }


def compare(args):
    """Returns (accuracy before, accuracy after, FLOPs) of each seed, by method and ratio."""
    x, y, x_test, y_test = load_images(args.data)
    held = min(len(x) // 5, 500)
    held, x, y = (x[-held:], y[-held:]), x[:-held], y[:-held]
    retraining = args.steps // 2
    dense = CNN()
    example, results = x[:1], collections.defaultdict(list)
    shapes = jax.eval_shape(dense.init, jax.random.key(0), example)
    groups = jp.find_groups(dense.apply, shapes, example)
    masks = selectors(groups, functools.partial(error, dense), held, args)

    def measure(model, variables):
        return 100 * (1 - float(error(model, variables, x_test, y_test)))

    def init(model, seed):
        return jax.jit(model.init)(jax.random.key(seed), example)

    bar = tqdm(total=args.seeds * (1 + len(args.ratios) * len(STYLES)), ncols=80)
    for seed in range(args.seeds):
        trained = fit(dense, init(dense, seed), x, y, args.steps, seed)
        flops = jp.metrics.flops(dense.apply, trained, example)
        longer = fit(dense, trained, x, y, retraining, seed + 1000)
        results["dense", 0.0].append((measure(dense, trained), measure(dense, longer), 1.0))
        bar.update()
        for ratio in args.ratios:
            for name, select in masks.items():
                bar.set_description(f"{name} {ratio:g}")
                chosen = select(trained, ratio, jax.random.key(seed))
                _, small, _ = jp.shrink(dense.apply, trained, chosen, example, verify=False)
                # The shrunk chain is the same module with smaller widths.
                kernels = [small["params"][f"Conv_{i}"]["kernel"] for i in range(len(dense.widths))]
                model = CNN(tuple(kernel.shape[-1] for kernel in kernels))
                before = measure(model, small)
                cost = jp.metrics.flops(model.apply, small, example) / flops
                small = fit(model, small, x, y, retraining, seed + 1000)
                results[name, ratio].append((before, measure(model, small), cost))
                bar.update()
                if name != "L1, independent":
                    continue
                new = init(model, seed + 100)
                new = fit(model, new, x, y, args.steps + retraining, seed + 100)
                row = float("nan"), measure(model, new), cost
                results["from scratch", ratio].append(row)
                bar.update()
    bar.close()
    return results


def show(results):
    """Prints the mean and standard deviation of each method over the seeds."""
    rows = []
    names = ["dense", *STYLES]
    for name, ratio in sorted(results, key=lambda key: (key[1], names.index(key[0]))):
        before, after, cost = zip(*results[name, ratio], strict=True)
        start = "" if np.isnan(before).any() else mean_std(before)
        rows.append((name, f"{ratio:.0%}", f"{np.mean(cost):.0%}", start, mean_std(after)))
    header = "method", "filters removed", "FLOPs left", "pruned (%)", "trained (%)"
    print(markdown(header, rows))
    print("pruned, trained: test accuracy right after pruning, and after retraining or training")


def draw(results, path):
    """Draws accuracy against the share of removed filters, before and after retraining."""
    figure, panels = plt.subplots(1, 2, sharex=True, figsize=(9, 4.5), layout="constrained")
    ratios = sorted({ratio for name, ratio in results if name != "dense"})
    gap = 0.1 / len(STYLES)  # between methods, which are drawn side by side
    for column, (axes, when) in enumerate(zip(panels, ("before", "after"), strict=True)):
        dense = np.mean([run[column] for run in results["dense", 0.0]])
        axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
        for i, (name, style) in enumerate(STYLES.items()):
            places = np.array(ratios) + gap * (i - len(STYLES) // 2)
            runs = np.array([[run[column] for run in results[name, ratio]] for ratio in ratios])
            if not np.isnan(runs).any():  # nothing is pruned before training from scratch
                error_bars(axes, places, runs, style, linestyle="", capsize=0)
            axes.plot([], [], style[1], color=style[0], label=name)
        axes.set_title(f"{when} retraining", fontsize="medium")
        axes.set_xlabel("filters removed")
        axes.set_xticks(ratios, [f"{ratio:.0%}" for ratio in ratios])
        axes.yaxis.set_major_formatter(lambda a, _: f"{a:.3g}%")
        tidy(axes)
    panels[0].set_ylabel("test accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def main():
    options = parser(__doc__)
    options.add_argument(
        "--ratios", type=float, nargs="+", default=[0.25, 0.5], help="shares of filters to remove"
    )
    options.add_argument("--steps", type=int, default=800, help="of dense training")
    options.add_argument("--particles", type=int, default=32, help="of the particle filter")
    options.add_argument("--rounds", type=int, default=15, help="of the particle filter")
    args = options.parse_args()
    results = compare(args)
    show(results)
    draw(results, args.out / "filters.png")


if __name__ == "__main__":
    main()
