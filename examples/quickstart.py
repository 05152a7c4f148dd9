"""Seven ways to prune LeNet-300-100, each with the same number of training steps.

Random and magnitude pruning start from the network trained for --epochs and train it for --epochs
more. SNIP, GraSP and SynFlow prune the initial network, then train it for twice --epochs. Gradual
pruning reaches its sparsity while training, after --epochs of twice --epochs. Prints a table for
--sparsity and draws accuracy against compression for that and --sparsities.

    python examples/quickstart.py --sparsity 0.95
    python examples/quickstart.py --data mnist/ --epochs 5    # MNIST files instead of the digits
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib
import optax
from _data import epoch_order, load
from flax import nnx
from tqdm import tqdm

import jaxprune as jp

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STYLES = {  # Okabe and Ito's colours
    "random": ("#000000", "x"),
    "magnitude": ("#0072B2", "o"),
    "magnitude by layer": ("#56B4E9", "P"),
    "SNIP": ("#E69F00", "s"),
    "GraSP": ("#CC79A7", "^"),
    "SynFlow": ("#009E73", "D"),
    "gradual": ("#D55E00", "v"),
}


class LeNet(nnx.Module):
    """LeNet-300-100."""

    def __init__(self, inputs, rngs):
        self.layers = nnx.List(
            nnx.Linear(n, m, rngs=rngs) for n, m in [(inputs, 300), (300, 100), (100, 10)]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def network(inputs, seed):
    """Gives a pure apply function and its initial params."""
    graphdef, params = nnx.split(LeNet(inputs, nnx.Rngs(seed)))
    return lambda params, x: nnx.merge(graphdef, params)(x), params


def cross_entropy(apply, temperature=1.0):
    """Gives loss(params, x, y)."""

    def loss(params, x, y):
        logits = apply(params, x) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def trainer(apply, link, x, y, size=64):
    """Gives fit(params, state, sparsity, epochs, seed), compiled once, around link(sparsity)."""
    loss = cross_entropy(apply)

    @jax.jit
    def epoch(params, state, sparsity, order):
        tx = link(sparsity)

        def step(carry, index):
            params, state = carry
            grads = jax.grad(loss)(params, x[index], y[index])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    def fit(params, state, sparsity, epochs, seed):
        for i in range(epochs):
            order = epoch_order(len(x), (seed, i), size)
            params, state = epoch(params, state, jnp.float32(sparsity), order)
        return params, state

    return fit


def measurer(apply, x, y):
    """Gives accuracy(params)."""

    @jax.jit
    def accuracy(params):
        return jnp.mean(jnp.argmax(apply(params, x), -1) == y)

    return lambda params: float(accuracy(params))


def compare(args):
    """Runs every method at every sparsity: rows of method, sparsity, accuracies, ratio, seconds."""
    x, y, x_test, y_test = load(args.data)
    x, y = jnp.asarray(x), jnp.asarray(y)
    apply, initial = network(x.shape[1], args.seed)
    accuracy = measurer(apply, x_test, y_test)
    end = max(args.epochs * epoch_order(len(x), 0, 64).shape[0] - 1, 1)
    everything = jp.select(jp.scores.magnitude(initial), 0.0)
    adam = optax.adam(1e-3)
    enforced = jp.enforce(adam, everything)

    def gradual(sparsity):
        schedule = jp.schedules.cubic(sparsity, begin=0, end=end)
        return jp.gradual(adam, jp.scores.magnitude, schedule, every=5)

    fit = trainer(apply, lambda sparsity: enforced, x, y)
    fit_gradually = trainer(apply, gradual, x, y)

    start = time.perf_counter()
    initial_state = enforced.init(initial)
    trained, trained_state = fit(initial, initial_state, 0.0, args.epochs, args.seed)
    dense, _ = fit(trained, trained_state, 0.0, args.epochs, args.seed + 1)
    scores = [accuracy(trained), accuracy(dense)]
    rows = [("dense", 0.0, *scores, 1.0, time.perf_counter() - start)]

    sample = x[:512], y[:512]
    shape = jax.ShapeDtypeStruct((1, x.shape[1]), jnp.float32)
    snip = jp.scores.snip(cross_entropy(apply))
    grasp = jp.scores.grasp(cross_entropy(apply, temperature=200))
    synflow = jp.scores.synflow(apply)
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
        after_training = method in ("random", "magnitude", "magnitude by layer")
        params = jp.apply_masks(trained if after_training else initial, masks)
        state = jp.set_masks(initial_state, masks)  # nothing recompiles
        before = accuracy(params)
        if not after_training:
            params, state = fit(params, state, 0.0, args.epochs, args.seed)
        params, state = fit(params, state, 0.0, args.epochs, args.seed + 1)
        return before, accuracy(params), masks

    sparsities = sorted({*args.sparsities, args.sparsity})
    runs = [(method, sparsity) for method in STYLES for sparsity in sparsities]
    for method, sparsity in (bar := tqdm(runs, ncols=80)):
        bar.set_description(f"{method} {sparsity:g}")
        start = time.perf_counter()
        before, after, masks = prune(method, sparsity)
        seconds = time.perf_counter() - start
        ratio = jp.metrics.compression(initial, masks)
        rows.append((method, sparsity, before, after, ratio, seconds))
    return rows


def show(rows, sparsity):
    """Prints the rows of one sparsity, and the dense one."""
    print("method              sparsity   before    after  compression  seconds")
    for method, at, before, after, ratio, seconds in rows:
        if method == "dense" or at == sparsity:
            print(f"{method:19} {at:8.3g} {before:8.1%} {after:8.1%} {ratio:11.1f}× {seconds:8.1f}")
    print("before, after: test accuracy right after pruning, and after fine-tuning or training")


def draw(rows, path):
    """Draws accuracy after fine-tuning against compression."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(rows[0][3], color="gray", linestyle="--", label="dense")
    for method, (color, marker) in STYLES.items():
        ratio, after = zip(*[(r[4], r[3]) for r in rows if r[0] == method], strict=True)
        axes.plot(ratio, after, color=color, marker=marker, markersize=5, label=method)
    log_axis(axes, [r[4] for r in rows[1:] if r[0] == "magnitude"])
    axes.set_ylabel("test accuracy")
    figure.legend(loc="outside right center", frameon=False)
    save(figure, path)


def save(figure, path):
    """Writes a picture, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def log_axis(axes, ratios):
    """Puts a tick at every compression on a log axis."""
    axes.set_xscale("log")
    axes.set_xticks(ratios, [f"{r:.3g}×" for r in ratios])
    axes.minorticks_off()
    axes.set_xlabel("compression (params / kept params)")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def parser(text):
    """Gives the options that the examples share."""
    options = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", metavar="DIR", help="folder of MNIST IDX files")
    options.add_argument("--epochs", type=int, default=15)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=pathlib.Path, default="outputs", help="folder for the PNG")
    return options


def main():
    options = parser(__doc__)
    options.add_argument("--sparsity", type=float, default=0.95)
    options.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.8, 0.9, 0.95, 0.98])
    args = options.parse_args()
    rows = compare(args)
    show(rows, args.sparsity)
    draw(rows, args.out / "quickstart.png")


if __name__ == "__main__":
    main()
