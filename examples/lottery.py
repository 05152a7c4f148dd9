"""Compares rewinding with fine-tuning, and pruning in rounds with pruning in one shot.

LeNet-300-100 is trained for --steps. Each round prunes the fifth of the remaining weights with the
smallest magnitudes and trains again, from step k (a tenth of --steps) to the end. The methods
differ in what is reset to step k before this training:

    rewind weights        weights and learning rate
    rewind learning rate  the learning rate; the weights are kept
    fine-tune             nothing: as many steps at the last, lowest learning rate
    fine-tune, 10 × rate  nothing: as many steps at ten times that rate
    reinitialize          the masks of "rewind weights" with new random weights
    random masks          the weights of step k with random masks, equally sparse in each layer

The second comparison is at equal cost. To reach a sparsity in r rounds, all three methods train
r + 1 times on as many images, at the same learning rates, the last time at the final sparsity. They
differ in when the weights are pruned:

    in rounds             a fifth before each training but the first ("rewind learning rate")
    one shot, first       all before the second training: r trainings of the pruned network
    one shot, last        all before the last training: r trainings of the dense network

    python examples/lottery.py
    python examples/lottery.py --data mnist/

Frankle and Carbin, The Lottery Ticket Hypothesis, 2019 https://arxiv.org/abs/1803.03635
Frankle et al, Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020
https://arxiv.org/abs/1912.05671
Renda et al, Comparing Rewinding and Fine-tuning in Neural Network Pruning, 2020
https://arxiv.org/abs/2003.02389
"""

import functools
import itertools

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
    PURPLE,
    SKY,
    VERMILION,
    compression_axis,
    error_bars,
    markdown,
    mean_std,
    parser,
    save,
)
from _data import load
from _training import accuracy_on, cross_entropy, lenet
from tqdm import tqdm

import jaxprune as jp
from jaxprune import recipes

RETRAINING = {
    "rewind learning rate": (GREEN, "D"),
    "rewind weights": (BLUE, "o"),
    "fine-tune, 10 × rate": (ORANGE, "^"),
    "fine-tune": (VERMILION, "v"),
    "reinitialize": (PURPLE, "s"),
    "random masks": (BLACK, "x"),
}
BUDGET = {
    "in rounds": (GREEN, "D"),
    "one shot, first": (ORANGE, "^"),
    "one shot, last": (SKY, "P"),
}


def trainer(loss, x, y, size=64):
    """Returns fit(params, masks, key, rates), which takes one step for each learning rate."""

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
    """Returns random masks that keep as many weights of each layer."""
    leaves, treedef = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    shuffled = [jax.random.permutation(k, m.ravel()) for k, m in zip(keys, leaves, strict=True)]
    return treedef.unflatten([s.reshape(m.shape) for s, m in zip(shuffled, leaves, strict=True)])


def prune(init, fit, key, steps, sparsities, shown):
    """Yields (method, round, masks, trained params) for the rounds shown."""
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
    """Runs all seeds; returns accuracies in percent by method and round, and compressions."""
    x, y, x_test, y_test = load(args.data)
    n = len(x) * 5 // 6
    if args.validate:
        x_test, y_test = x[n:], y[n:]
    x, y = (jnp.asarray(a[: min(n, args.images)]) for a in (x, y))
    apply_fn, _ = lenet(x.shape[1], 0)
    accuracy = accuracy_on(apply_fn, x_test, y_test)
    fit = trainer(cross_entropy(apply_fn), x, y)
    sparsities = recipes.rounds(0.2, args.rounds)
    shown = range(args.rounds, 0, -3)
    accuracies, compressions = {}, {}
    points = len(shown) * len(RETRAINING | BUDGET) + 2
    with tqdm(total=args.seeds * points, ncols=80) as bar:
        for seed in range(args.seeds):
            bar.set_description(f"seed {seed}")
            runs = prune(
                lambda key: lenet(x.shape[1], key)[1],
                fit,
                jax.random.key(seed),
                args.steps,
                sparsities,
                shown,
            )
            for name, number, masks, params in runs:
                accuracies.setdefault((name, number), []).append(100 * float(accuracy(params)))
                compressions[number] = jp.metrics.compression(params, masks)
                bar.update()
    return accuracies, {i: compressions[i] for i in sorted(shown)}


def show(accuracies, rounds):
    """Prints test accuracy, mean ± standard deviation over seeds, in two tables."""
    dense, longer = mean_std(accuracies["dense", 0]), mean_std(accuracies["dense, as long", 0])
    print(f"dense: {dense} %; trained {max(rounds) + 1} times: {longer} %\n")
    kept = [f"{0.8**i:.1%} kept".replace("%", " %") for i in rounds]
    for title, names in (("before a training", RETRAINING), ("at equal cost", BUDGET)):
        rows = [[name, *(mean_std(accuracies[name, i]) for i in rounds)] for name in names]
        if names is BUDGET:
            rows.append(["number of trainings", *(i + 1 for i in rounds)])
        print(markdown([title, *kept], rows), end="\n\n")


def draw(accuracies, compressions, path):
    """Draws accuracy against compression, mean and standard deviation over seeds."""
    at = list(compressions.values())
    dense = np.mean(accuracies["dense", 0]) / 100
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, styles in zip(axes, (RETRAINING, BUDGET), strict=True):
        ax.axhline(dense, color="gray", linestyle="--", label="dense")
        for name, style in styles.items():
            runs = np.array([accuracies[name, i] for i in compressions]) / 100
            error_bars(ax, at, runs, style, label=name)
        compression_axis(ax, at)
        ax.locator_params(axis="y", nbins=7, steps=[1, 2, 5, 10])
        ax.set_ylabel("test accuracy")
        ax.legend(loc="lower left", frameon=False)
    axes[0].set_title("what is reset before training", fontsize=10)
    axes[1].set_title("when weights are pruned, at equal cost", fontsize=10)
    save(figure, path)


def main():
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=10_000, help="at most, to train on")
    options.add_argument("--steps", type=int, default=1000, help="of a training, 10 or more")
    options.add_argument("--rounds", type=int, default=18)
    options.add_argument(
        "--validate", action="store_true", help="measure on a held-out sixth of the training set"
    )
    args = options.parse_args()
    accuracies, compressions = compare(args)
    show(accuracies, compressions)
    draw(accuracies, compressions, args.out / "lottery.png")


if __name__ == "__main__":
    main()
