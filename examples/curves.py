"""Nine methods × five compressions × three seeds: a table, curves, and an HTML report.

A small CNN on digits (or IDX files with --data DIR). Every point takes the same number of training
steps: twice --epochs. Random, magnitude, L1 and Taylor pruning start from the network trained for
--epochs. SNIP, GraSP and SynFlow prune the initial network. Gradual pruning reaches its sparsity
within the first --epochs. L1 and Taylor filters remove whole filters and neurons until that share
of the params is gone, so that time is saved too.

Finished points are kept in OUT/curves.csv and not run again: delete it to begin anew.

    python examples/curves.py
    python examples/curves.py --data mnist/ --epochs 1
"""

import argparse
import functools
import pathlib
import types
import warnings

import jax
import jax.numpy as jnp
import matplotlib
import optax
from _data import load
from flax import linen as nn

import jaxprune as jp

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


class CNN(nn.Module):
    """Two convolutions and two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def cross_entropy(apply_fn, temperature=1.0):
    """Gives loss(params, x, y)."""

    def loss(params, x, y):
        logits = apply_fn(params, x) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def trainer(loss, link, x, y, steps, size=64):
    """Gives fit(params, chosen, key) -> (params, optimizer state) with the optimizer link(chosen).

    XLA runs convolutions in a `scan` ten times slower on CPUs: the loop is Python's.
    """

    @jax.jit
    def step(params, state, chosen, key):
        batch = jax.random.randint(key, (size,), 0, len(x))
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, state = link(chosen).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def fit(params, chosen, key):
        state = link(chosen).init(params)
        for step_key in jax.random.split(key, steps):
            params, state = step(params, state, chosen, step_key)
        return params, state

    return fit


def problem(data, epochs):
    """Gives what every method has in common: the data, the network, its training and its groups."""
    x, y, x_test, y_test = load(data)
    side = round(x.shape[1] ** 0.5)
    x, x_test = (jnp.asarray(a).reshape(-1, side, side, 1) for a in (x, x_test))
    y = jnp.asarray(y)
    model = CNN()
    apply_fn = jax.jit(model.apply)
    loss = cross_entropy(apply_fn)
    adam = optax.adam(2e-3)
    steps = max(epochs * len(x) // 64, 1)
    fit = trainer(loss, lambda masks: jp.enforce(adam, masks), x, y, steps)

    @jax.jit
    def evaluate(params):
        return jnp.mean(jnp.argmax(apply_fn(params, x_test), -1) == y_test)

    init = jax.jit(lambda key: model.init(key, x[:1]))
    return types.SimpleNamespace(
        x=x,
        y=y,
        data={"x": x, "y": y, "x_test": x_test, "y_test": y_test},
        apply_fn=apply_fn,
        loss=loss,
        adam=adam,
        steps=steps,
        train=lambda params, masks, key: fit(params, masks, key)[0],
        evaluate=evaluate,
        init=init,
        groups=jp.find_groups(apply_fn, init(jax.random.key(0)), x[:1]),
    )


def sweep(net, methods, args, store):
    """Measures methods on the problem: gives the table."""
    sparsities = [1 - 1 / c for c in args.compressions]
    methods = {name: methods[name] for name in args.methods or methods}
    return jp.curves.sweep(
        methods,
        sparsities,
        range(args.seeds),
        net.train,
        net.evaluate,
        init=net.init,
        apply_fn=net.apply_fn,
        inputs=[net.x[:256]],
        store=store,
    )


def nine_methods(net):
    """Gives the methods; ``sweep`` adds random and magnitude pruning."""

    def cubic(sparsity):
        schedule = jp.schedules.cubic(sparsity, begin=0, end=net.steps)
        return jp.gradual(net.adam, jp.scores.magnitude, schedule, every=5)

    fit_gradually = trainer(net.loss, cubic, net.x, net.y, net.steps)

    def gradual(params, sparsity, key, train):
        params, state = fit_gradually(params, jnp.float32(sparsity), key)
        return params, jp.get_masks(state)

    synflow = jp.scores.synflow(net.apply_fn)

    def by_synaptic_flow(params, sparsity, key, train):
        masks = jp.select_iteratively(synflow, params, sparsity, net.x[:1], rounds=100)
        return train(jp.apply_masks(params, masks), masks), masks

    method, scores, sample = jp.curves.method, jp.scores, (net.x[:512], net.y[:512])
    by_layer = functools.partial(jp.select, scope="layer")
    # Kernels are made for round widths: 11 and 22 filters in place of 16 and 32 run slower here.
    filters = functools.partial(net.groups.select, cost="params", round_to=4)
    return {
        "magnitude": method(scores.magnitude),
        "magnitude by layer": method(scores.magnitude, select=by_layer),
        "SNIP": method(scores.snip(net.loss), *sample, trained=False),
        "GraSP": method(scores.grasp(cross_entropy(net.apply_fn, 200)), *sample, trained=False),
        "SynFlow": by_synaptic_flow,
        "gradual": gradual,
        "L1 filters": method(
            scores.magnitude, select=functools.partial(filters, scope="layer", reduce="first")
        ),
        "Taylor filters": method(
            scores.taylor(net.loss), *sample, select=functools.partial(filters, normalize="mean")
        ),
    }


def draw(table, out):
    """Draws accuracy against compression and against measured speed-up."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    jp.plot.curves(table, axes=left).get_legend().remove()
    jp.plot.curves(table, "measured_speedup", axes=right).set_ylabel("")
    left.set_ylabel("test accuracy after fine-tuning")
    for kind in ("png", "svg"):
        figure.savefig(out / f"curves.{kind}", dpi=150)
    plt.close(figure)


def options(description):
    """Reads the command line."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", metavar="DIR", help="folder of MNIST IDX files")
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--compressions", type=float, nargs="+", default=[2, 4, 8, 16, 32])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--methods", nargs="+", metavar="NAME", help="only these rows")
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs"))
    return options.parse_args()


def main():
    args = options(__doc__)
    warnings.filterwarnings("ignore", "round_to")  # says which widths were rounded: many
    net = problem(args.data, args.epochs)
    table = sweep(net, nine_methods(net), args, args.out / "curves.csv")
    draw(table, args.out)
    params = net.init(jax.random.key(0))
    jp.report(
        args.out / "curves.html",
        title="Pruning a CNN on digits",
        curves=table,
        summary=jp.summary(params, jp.select(jp.scores.magnitude(params), 0.0)),
        layers=jp.metrics.layers(net.apply_fn, params, net.x[:1]),
        groups=net.groups,
        settings=vars(args) | {"optimizer": "adam(2e-3)", "batch": 64, "steps": 2 * net.steps},
        data=net.data,
    )
    print(jp.curves.summary(table))
    print(f"wrote curves.csv, .png, .svg and .html in {args.out}")


if __name__ == "__main__":
    main()
