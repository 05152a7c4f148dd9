"""Compares seven ways to prune LeNet-300-100, each with the same number of training steps.

Random and magnitude pruning start from a network trained for --epochs, and train it for --epochs
more. SNIP, GraSP and SynFlow prune the initial network, and train it for twice --epochs. Gradual
pruning prunes during the first --epochs, and trains for --epochs more. Prints a table for
--sparsity, and draws accuracy against compression for --sparsity and --sparsities.

    python examples/quickstart.py --sparsity 0.95
    python examples/quickstart.py --data mnist/ --epochs 5
"""

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
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
    parser,
    save,
)
from _data import epoch_order, load
from _training import accuracy_on, cross_entropy, epoch_trainer, lenet
from tqdm import tqdm

import jaxprune as jp

STYLES = {
    "random": (BLACK, "x"),
    "magnitude": (BLUE, "o"),
    "magnitude by layer": (SKY, "P"),
    "SNIP": (ORANGE, "s"),
    "GraSP": (PURPLE, "^"),
    "SynFlow": (GREEN, "D"),
    "gradual": (VERMILION, "v"),
}
STARTS_TRAINED = ("random", "magnitude", "magnitude by layer")


def compare(args):
    """Returns rows of method, sparsity, accuracy before and after, compression and seconds."""
    x, y, x_test, y_test = load(args.data)
    x, y = jnp.asarray(x), jnp.asarray(y)
    apply_fn, initial = lenet(x.shape[1], args.seed)
    accuracy = accuracy_on(apply_fn, x_test, y_test)
    end = max(args.epochs * epoch_order(len(x), 0, 64).shape[0] - 1, 1)
    everything = jp.select(jp.scores.magnitude(initial), 0.0)
    adam = optax.adam(1e-3)
    enforced = jp.enforce(adam, everything)

    def gradual(sparsity):
        schedule = jp.schedules.cubic(sparsity, begin=0, end=end)
        return jp.gradual(adam, jp.scores.magnitude, schedule, every=5)

    fit = epoch_trainer(apply_fn, lambda sparsity: enforced, x, y)
    fit_gradually = epoch_trainer(apply_fn, gradual, x, y)

    start = time.perf_counter()
    initial_state = enforced.init(initial)
    trained, trained_state = fit(initial, initial_state, 0.0, args.epochs, args.seed)
    dense, _ = fit(trained, trained_state, 0.0, args.epochs, args.seed + 1)
    accuracies = float(accuracy(trained)), float(accuracy(dense))
    rows = [("dense", 0.0, *accuracies, 1.0, time.perf_counter() - start)]

    sample = x[:512], y[:512]
    shape = jax.ShapeDtypeStruct((1, x.shape[1]), jnp.float32)
    snip = jp.scores.snip(cross_entropy(apply_fn))
    grasp = jp.scores.grasp(cross_entropy(apply_fn, temperature=200))
    synflow = jp.scores.synflow(apply_fn)
    key = jax.random.key(args.seed)
    select = {
        "random": lambda s: jp.select(jp.scores.random(trained, key), s),
        "magnitude": lambda s: jp.select(jp.scores.magnitude(trained), s),
        "magnitude by layer": lambda s: jp.select(jp.scores.magnitude(trained), s, scope="layer"),
        "SNIP": lambda s: jp.select(snip(initial, *sample), s),
        "GraSP": lambda s: jp.select(grasp(initial, *sample), s),
        "SynFlow": lambda s: jp.select_iteratively(synflow, initial, s, shape, rounds=100),
    }

    def prune(method, sparsity):
        if method == "gradual":
            state = gradual(sparsity).init(initial)
            params, state = fit_gradually(initial, state, sparsity, args.epochs, args.seed)
            before = accuracy(params)
            params, state = fit_gradually(params, state, sparsity, args.epochs, args.seed + 1)
            return before, accuracy(params), jp.get_masks(state)
        masks = select[method](sparsity)
        params = jp.apply_masks(trained if method in STARTS_TRAINED else initial, masks)
        state = jp.set_masks(initial_state, masks)  # nothing is compiled again
        before = accuracy(params)
        if method not in STARTS_TRAINED:
            params, state = fit(params, state, 0.0, args.epochs, args.seed)
        params, state = fit(params, state, 0.0, args.epochs, args.seed + 1)
        return before, accuracy(params), masks

    sparsities = sorted({*args.sparsities, args.sparsity})
    runs = [(method, sparsity) for method in STYLES for sparsity in sparsities]
    for method, sparsity in (bar := tqdm(runs, ncols=80)):
        bar.set_description(f"{method} {sparsity:g}")
        start = time.perf_counter()
        before, after, masks = prune(method, sparsity)
        compression = jp.metrics.compression(initial, masks)
        seconds = time.perf_counter() - start
        rows.append((method, sparsity, float(before), float(after), compression, seconds))
    return rows


def show(rows, sparsity):
    """Prints the rows of the dense network and of one sparsity."""
    print("method              sparsity   before    after  compression  seconds")
    for method, at, before, after, ratio, seconds in rows:
        if method == "dense" or at == sparsity:
            print(f"{method:19} {at:8.3g} {before:8.1%} {after:8.1%} {ratio:11.1f}× {seconds:8.1f}")
    print("before, after: test accuracy right after pruning, and after all training")


def draw(rows, path):
    """Draws accuracy after all training against compression."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(rows[0][3], color="gray", linestyle="--", label="dense")
    for method, (color, marker) in STYLES.items():
        compression, after = zip(*[(r[4], r[3]) for r in rows if r[0] == method], strict=True)
        axes.plot(compression, after, color=color, marker=marker, markersize=5, label=method)
    compression_axis(axes, [r[4] for r in rows if r[0] == "magnitude"])
    axes.set_ylabel("test accuracy")
    figure.legend(loc="outside right center", frameon=False)
    save(figure, path)


def main():
    options = parser(__doc__, seeds=None)
    options.add_argument("--epochs", type=int, default=15)
    options.add_argument("--sparsity", type=float, default=0.95, help="of the table")
    options.add_argument(
        "--sparsities", type=float, nargs="*", default=[0.5, 0.8, 0.9, 0.95, 0.98], help="to draw"
    )
    args = options.parse_args()
    rows = compare(args)
    show(rows, args.sparsity)
    draw(rows, args.out / "quickstart.png")


if __name__ == "__main__":
    main()
