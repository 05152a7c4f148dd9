"""Which filters should leave, and was training them worth it? After Li et al and Anwar et al.

A small CNN loses a share of its filters at once and is trained for a while again. Within a layer,
the filters with the smallest L1 norm leave, each layer judged by itself (independent) or without
the inputs that the layers before it have lost (greedy); or random ones. The networks that remain
are really smaller. Their rival has the same widths and new weights, and is trained for as many
steps as dense training and retraining took together. Among all layers, a particle filter searches
the masks that make the fewest errors on examples that training has not seen; L1 norms divided by
their layer's mean have the same freedom. Prints a table, and draws accuracy before and after
retraining.

    python examples/filters.py                          # 8 x 8 digits, nothing to download
    python examples/filters.py --data fashion/          # Fashion-MNIST files

Li et al, Pruning Filters for Efficient ConvNets: https://arxiv.org/abs/1608.08710
Anwar et al, Structured Pruning of Deep Convolutional Neural Networks: https://arxiv.org/abs/1512.08571
Liu et al, Rethinking the Value of Network Pruning: https://arxiv.org/abs/1810.05270
"""

import argparse
import collections
import functools
import pathlib

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

ADAM = optax.scale_by_adam()
STYLES = {  # Okabe and Ito's colours
    "random": ("#000000", "x"),
    "L1, independent": ("#0072B2", "o"),
    "L1, greedy": ("#56B4E9", "P"),
    "L1, all layers": ("#009E73", "s"),
    "particle filter, all layers": ("#D55E00", "D"),
    "from scratch": ("#E69F00", "^"),
}


class CNN(nn.Module):
    """Convolutions with batch norm in a chain, every other one pooled, and a dense layer."""

    widths: tuple[int, ...] = (12, 24, 24, 48)

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=1 if i else 2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            if i % 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


@functools.partial(jax.jit, static_argnums=0)
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
    """Trains on random batches; the learning rate falls to 0 as a cosine."""
    state, rng = ADAM.init(variables["params"]), np.random.default_rng(seed)
    for i in range(steps):
        batch = rng.integers(len(x), size=size)
        now = np.float32(rate * (1 + np.cos(np.pi * i / steps)) / 2)
        variables, state = train_step(model, variables, state, now, x[batch], y[batch])
    return variables


@functools.partial(jax.jit, static_argnums=0)
def error(model, variables, x, y):
    return jnp.mean(model.apply(variables, x).argmax(-1) != y)


def greedy(groups, variables, ratio):
    """Prunes layer by layer: a filter is judged by the inputs that are left when its turn comes."""
    masks = groups.masks(np.ones(len(groups), bool))
    for group in groups.groups:  # in the order in which the network uses them
        bias = next(path for path, *_ in group.members if path.endswith("bias"))
        scores = jp.scores.magnitude(jp.apply_masks(variables, masks))
        masks = groups.select(scores, scope={bias: ratio}, reduce="first", within=masks)
    return masks


def selectors(groups, find_error, held, args):
    """Gives masks(variables, ratio, key) by name."""

    def random(variables, ratio, key):
        return groups.select(jax.random.uniform(key, (len(groups),)), ratio, scope="layer")

    def norm(variables, ratio, key, **options):
        return groups.select(jp.scores.magnitude(variables), ratio, reduce="first", **options)

    def search(variables, ratio, key):
        # One network after the other: on CPUs XLA is slow at many convolutions in one.
        budget = {"particles": args.particles, "rounds": args.rounds, "batch_size": 1}
        inputs = groups, find_error, variables, ratio, key, *held
        return jp.search.particle_filter(*inputs, **budget).masks

    return {
        "random": random,
        "L1, independent": functools.partial(norm, scope="layer"),
        "L1, greedy": lambda variables, ratio, key: greedy(groups, variables, ratio),
        "L1, all layers": functools.partial(norm, normalize="mean"),
        "particle filter, all layers": search,
    }


def compare(args):
    """Gives (before, after, FLOPs) of every seed, by method and ratio."""
    x, y, x_test, y_test = load(args.data)
    side = round(x.shape[1] ** 0.5)
    x, x_test = (a.reshape(-1, side, side, 1) for a in (x, x_test))
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
                # In a chain, what remains is the same module with smaller widths.
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
    """Prints the mean and standard deviation of every method over the seeds."""
    rows = []
    names = ["dense", *STYLES]
    for name, ratio in sorted(results, key=lambda key: (key[1], names.index(key[0]))):
        before, after, cost = zip(*results[name, ratio], strict=True)
        start = "" if np.isnan(before).any() else mean_std(before)
        rows.append((name, f"{ratio:.0%}", f"{np.mean(cost):.0%}", start, mean_std(after)))
    header = "method", "filters removed", "FLOPs left", "pruned (%)", "trained (%)"
    print(markdown(header, rows))
    print("Test accuracy right after pruning, and after retraining or training from scratch.")


def draw(results, path):
    """Draws accuracy against the share of filters removed, before and after retraining."""
    figure, panels = plt.subplots(1, 2, sharex=True, figsize=(9, 4.5), layout="constrained")
    ratios = sorted({ratio for name, ratio in results if name != "dense"})
    gap = 0.1 / len(STYLES)  # the methods stand side by side
    for column, (axes, when) in enumerate(zip(panels, ("before", "after"), strict=True)):
        dense = np.mean([run[column] for run in results["dense", 0.0]])
        axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
        for i, (name, (color, marker)) in enumerate(STYLES.items()):
            places = np.array(ratios) + gap * (i - len(STYLES) // 2)
            runs = np.array([[run[column] for run in results[name, ratio]] for ratio in ratios])
            spread = runs.std(1, ddof=1) if runs.shape[1] > 1 else 0 * runs[:, 0]
            if not np.isnan(runs).any():
                axes.errorbar(places, runs.mean(1), spread, fmt=marker, color=color)
            axes.plot([], [], marker, color=color, label=name)
        axes.set_title(f"{when} retraining", fontsize="medium")
        axes.set_xlabel("filters removed")
        axes.set_xticks(ratios, [f"{ratio:.0%}" for ratio in ratios])
        axes.yaxis.set_major_formatter(lambda a, _: f"{a:.3g}%")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", metavar="DIR", help="folder of MNIST IDX files")
    options.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    options.add_argument("--steps", type=int, default=800, help="of dense training")
    options.add_argument("--particles", type=int, default=32)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs"))
    args = options.parse_args()
    results = compare(args)
    show(results)
    draw(results, args.out / "filters.png")


if __name__ == "__main__":
    main()
