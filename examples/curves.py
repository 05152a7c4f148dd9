"""Compares nine methods at six compressions over five seeds: a table, curves, and an HTML report.

The network is a small CNN. Every point takes the same number of training steps: twice --epochs.
Random, magnitude, L1 and Taylor pruning start from the network trained for --epochs. SNIP, GraSP
and SynFlow prune the initial network. Gradual pruning reaches its sparsity within the first
--epochs. L1 and Taylor filters remove entire filters and neurons until the given share of the
params is removed, so that they save time as well.

Finished points are stored in OUT/curves.csv and are not measured again. Delete the file to start
from the beginning.

    python examples/curves.py
    python examples/curves.py --data mnist/ --epochs 1
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from _training import cross_entropy, problem, step_trainer, sweep, sweep_options

import jaxprune as jp


def nine_methods(net):
    """Returns the methods by name; `sweep` adds random pruning."""

    def cubic(sparsity):
        schedule = jp.schedules.cubic(sparsity, begin=0, end=net.steps)
        return jp.gradual(net.adam, jp.scores.magnitude, schedule, every=5)

    fit_gradually = step_trainer(net.loss, cubic, net.x, net.y, net.steps)

    def gradual(params, sparsity, key, train):
        params, state = fit_gradually(params, jnp.float32(sparsity), key)
        return params, jp.get_masks(state)

    synflow = jp.scores.synflow(net.apply_fn)

    def by_synaptic_flow(params, sparsity, key, train):
        masks = jp.select_iteratively(synflow, params, sparsity, net.x[:1], rounds=100)
        return train(jp.apply_masks(params, masks), masks), masks

    method, scores, sample = jp.curves.method, jp.scores, (net.x[:512], net.y[:512])
    by_layer = functools.partial(jp.select, scope="layer")
    # Kernels are written for round widths: 11 and 22 filters run slower here than 16 and 32.
    filters = functools.partial(net.groups.select, cost="params", round_to=4)

    def by_relative_score(scores, sparsity):
        """Compares filters of all layers by their score over the mean of their layer."""
        return filters(jp.units.reduce(net.groups, scores, normalize="mean"), sparsity)

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
        "Taylor filters": method(scores.taylor(net.loss), *sample, select=by_relative_score),
    }


def draw(table, out):
    """Draws accuracy against compression and against the reduction of FLOPs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    jp.plot.curves(table, axes=left).get_legend().remove()
    jp.plot.curves(table, "theoretical_speedup", axes=right).set_ylabel("")
    left.set_ylabel("test accuracy after fine-tuning")
    compressions = sorted({round(1 / (1 - s)) for s in table["sparsity"]})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(compressions, [f"{c}×" for c in compressions])
        axes.minorticks_off()
    for kind in ("png", "svg"):
        figure.savefig(out / f"curves.{kind}", dpi=150)
    plt.close(figure)


def main():
    args = sweep_options(__doc__, [2, 4, 8, 16, 32, 64], seeds=5)
    warnings.filterwarnings("ignore", "round_to")  # one for each width that rounding changes
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
