"""Rewinding beside fine-tuning, and pruning in rounds beside pruning in one shot.

LeNet-300-100 is trained for --steps. Then, in every round, a fifth of what is left of its weights
leaves, those of the smallest magnitude, and it is trained again: from step k, a tenth of a
training, to the end. The methods differ in what goes back to step k before that:

    rewind weights        weights and learning rate
    rewind learning rate  the learning rate; the weights stay
    fine-tune             nothing: as many steps at the last, lowest learning rate
    fine-tune, 10 × rate  nothing: as many steps at ten times that rate, the one in the middle
    reinitialize          the masks of "rewind weights", and new random weights
    random masks          the weights of step k, and as many of every layer, drawn by chance

The second comparison is at equal cost. To reach a sparsity in r rounds, all three methods train
r + 1 times, each time on as many images, at the same learning rates, the last time at the final
sparsity. They differ in when the weights leave:

    in rounds             a fifth before every training but the first ("rewind learning rate")
    one shot, first       all before the second training: r trainings for the pruned network
    one shot, last        all before the last training: r trainings for the dense network

    python examples/lottery.py
    python examples/lottery.py --data mnist/

Frankle and Carbin, The Lottery Ticket Hypothesis, 2019 https://arxiv.org/abs/1803.03635
Frankle et al, Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020
https://arxiv.org/abs/1912.05671
Renda et al, Comparing Rewinding and Fine-tuning in Neural Network Pruning, 2020
https://arxiv.org/abs/2003.02389
"""

import argparse
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _data import load
from _results import markdown, mean_std
from quickstart import cross_entropy, log_axis, measurer, network, save
from tqdm import tqdm

import jaxprune as jp
from jaxprune import recipes

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RETRAINING = {  # Okabe and Ito's colours
    "rewind learning rate": ("#009E73", "D"),
    "rewind weights": ("#0072B2", "o"),
    "fine-tune, 10 × rate": ("#E69F00", "^"),
    "fine-tune": ("#D55E00", "v"),
    "reinitialize": ("#CC79A7", "s"),
    "random masks": ("#000000", "x"),
}
BUDGET = {
    "in rounds": ("#009E73", "D"),
    "one shot, first": ("#E69F00", "^"),
    "one shot, last": ("#56B4E9", "P"),
}


def trainer(loss, x, y, size=64):
    """Gives fit(params, masks, key, rates): one step for every learning rate."""

    @jax.jit
    def fit(params, masks, key, rates, x, y):
        tx = jp.enforce(optax.sgd(lambda i: rates[i], momentum=0.9), masks)

        def step(carry, key):
            params, state = carry
            batch = jax.random.randint(key, (size,), 0, len(x))
            grads = jax.grad(loss)(params, x[batch], y[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, len(rates))
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return functools.partial(fit, x=x, y=y)


def shuffle(masks, key):
    """Keeps as many weights of every layer, drawn by chance."""
    leaves, treedef = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    shuffled = [jax.random.permutation(k, m.ravel()) for k, m in zip(keys, leaves, strict=True)]
    return treedef.unflatten([s.reshape(m.shape) for s, m in zip(shuffled, leaves, strict=True)])


def prune(init, fit, key, steps, sparsities, shown):
    """Yields a method, the number of a round, masks and trained params, for the rounds shown."""
    init_key, new_key, mask_key, batch_key = jax.random.split(key, 4)
    keys = (jax.random.fold_in(batch_key, i) for i in itertools.count())
    rates = 0.1 * 0.1 ** np.digitize(np.arange(steps) / steps, [0.5, 0.75])
    before, after = jnp.split(jnp.asarray(rates, jnp.float32), [steps // 10])
    magnitude = jp.scores.magnitude

    def train(params, masks, rates=after, times=1):
        for _ in range(times):
            params = fit(params, masks, next(keys), rates)
        return params

    initial = init(init_key)
    full = jp.select(magnitude(initial), 0.0)
    early = train(initial, full, before)
    dense = train(early, full)
    yield "dense", 0, full, dense

    restart = recipes.reinitialize(init, new_key)
    rewind = recipes.rewind(early)
    for last in recipes.iterative(dense, train, magnitude, sparsities, restart=rewind):
        if last.round in shown:
            yield "rewind weights", last.round, last.masks, last.params
            params = jp.apply_masks(restart(last.params, last.round), last.masks)
            yield "reinitialize", last.round, last.masks, train(params, last.masks)
            masks = shuffle(last.masks, jax.random.fold_in(mask_key, last.round))
            yield "random masks", last.round, masks, train(jp.apply_masks(early, masks), masks)
    for last in recipes.iterative(dense, train, magnitude, sparsities):
        if last.round in shown:
            yield "rewind learning rate", last.round, last.masks, last.params
            yield "in rounds", last.round, last.masks, last.params
    for name, rate in (("fine-tune", after[-1]), ("fine-tune, 10 × rate", 10 * after[-1])):
        tune = functools.partial(train, rates=jnp.full_like(after, rate))
        for last in recipes.iterative(dense, tune, magnitude, sparsities):
            if last.round in shown:
                yield name, last.round, last.masks, last.params

    longer = dense
    for i, sparsity in enumerate(sparsities, 1):
        if i in shown:
            repeat = functools.partial(train, times=i)
            (once,) = recipes.iterative(dense, repeat, magnitude, [sparsity])
            yield "one shot, first", i, once.masks, once.params
            (once,) = recipes.iterative(longer, train, magnitude, [sparsity])
            yield "one shot, last", i, once.masks, once.params
        longer = train(longer, full)
    yield "dense, as long", 0, full, longer


def compare(args):
    """Runs every seed; gives accuracies in percent and the compression, by method and round."""
    x, y, x_test, y_test = load(args.data)
    n = len(x) * 5 // 6
    if args.validate:
        x_test, y_test = x[n:], y[n:]
    x, y = (jnp.asarray(a[: min(n, args.images)]) for a in (x, y))
    apply, _ = network(x.shape[1], 0)
    accuracy = measurer(apply, x_test, y_test)
    fit = trainer(cross_entropy(apply), x, y)
    sparsities = recipes.rounds(0.2, args.rounds)
    shown = range(args.rounds, 0, -3)
    found, ratios = {}, {}
    points = len(shown) * len(RETRAINING | BUDGET) + 2
    with tqdm(total=args.seeds * points, ncols=80) as bar:
        for seed in range(args.seeds):
            bar.set_description(f"seed {seed}")
            runs = prune(
                lambda key: network(x.shape[1], key)[1],
                fit,
                jax.random.key(seed),
                args.steps,
                sparsities,
                shown,
            )
            for name, number, masks, params in runs:
                found.setdefault((name, number), []).append(100 * accuracy(params))
                ratios[number] = jp.metrics.compression(params, masks)
                bar.update()
    return found, {i: ratios[i] for i in sorted(shown)}


def show(found, rounds):
    """Prints test accuracy, mean ± standard deviation over seeds, in two tables."""
    dense, longer = mean_std(found["dense", 0]), mean_std(found["dense, as long", 0])
    print(f"dense: {dense} %; trained {max(rounds) + 1} times: {longer} %\n")
    kept = [f"{0.8**i:.1%} kept".replace("%", " %") for i in rounds]
    for title, names in (("before a training", RETRAINING), ("at equal cost", BUDGET)):
        rows = [[name, *(mean_std(found[name, i]) for i in rounds)] for name in names]
        if names is BUDGET:
            rows.append(["trainings, of each", *(i + 1 for i in rounds)])
        print(markdown([title, *kept], rows), end="\n\n")


def draw(found, ratios, path):
    """Draws accuracy against compression, mean and standard deviation over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, styles in zip(axes, (RETRAINING, BUDGET), strict=True):
        ax.axhline(np.mean(found["dense", 0]) / 100, color="gray", linestyle="--", label="dense")
        for name, (color, marker) in styles.items():
            values = np.array([found[name, i] for i in ratios]) / 100
            mean, std = values.mean(1), values.std(1, ddof=min(1, values.shape[1] - 1))
            style = {"color": color, "marker": marker, "markersize": 5, "capsize": 3}
            ax.errorbar(list(ratios.values()), mean, std, label=name, **style)
        log_axis(ax, list(ratios.values()))
        ax.locator_params(axis="y", nbins=7, steps=[1, 2, 5, 10])
        ax.set_ylabel("test accuracy")
        ax.legend(loc="lower left", frameon=False)
    axes[0].set_title("what goes back before a training", fontsize=10)
    axes[1].set_title("when the weights leave, at equal cost", fontsize=10)
    save(figure, path)


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", metavar="DIR", help="folder of MNIST IDX files")
    options.add_argument("--images", type=int, default=10_000, help="to train on, at most")
    options.add_argument("--steps", type=int, default=1000, help="of a training, 10 or more")
    options.add_argument("--rounds", type=int, default=18)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument(
        "--validate", action="store_true", help="measure on a sixth of the training set, held out"
    )
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs"))
    args = options.parse_args()
    found, ratios = compare(args)
    show(found, ratios)
    draw(found, ratios, args.out / "lottery.png")


if __name__ == "__main__":
    main()
