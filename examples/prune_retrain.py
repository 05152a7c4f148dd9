"""Iterative magnitude pruning: prune a fifth of what is left, retrain, and again.

Stops when the test accuracy falls more than --delta below that of the dense network. Then prunes in
one shot to every sparsity that was reached and retrains for as long as the rounds took together.
Prints a table and draws both. One seed and 360 test images: differences below a point are noise,
and the lead of iterative pruning rests on Adam's state being kept from round to round.

    python examples/prune_retrain.py --delta 0.01
    python examples/prune_retrain.py --data mnist/ --epochs 1
"""

import functools

import jax.numpy as jnp
import matplotlib
import optax
from _data import load
from quickstart import log_axis, measurer, network, parser, save, trainer

import jaxprune as jp

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Across layers, the second one would lose nearly everything: its weights start out smaller.
select = functools.partial(jp.select, scope="layer")


def compare(args):
    """Gives the dense accuracy and rows of sparsity, compression, epochs, iterative, one shot."""
    x, y, x_test, y_test = load(args.data)
    apply, initial = network(x.shape[1], args.seed)
    accuracy = measurer(apply, x_test, y_test)
    masks = select(jp.scores.magnitude(initial), 0.0)
    tx = jp.enforce(optax.adam(1e-3), masks)
    fit = trainer(apply, lambda sparsity: tx, jnp.asarray(x), jnp.asarray(y))
    trained, start = fit(initial, tx.init(initial), 0.0, args.dense_epochs, args.seed)
    dense = accuracy(trained)

    params, state, reached = trained, start, []
    for i in range(1, args.rounds + 1):
        masks = select(jp.scores.magnitude(params), 1 - 0.8**i, within=masks)
        params = jp.apply_masks(params, masks)
        state = jp.set_masks(state, masks)  # Adam's moments go on
        params, state = fit(params, state, 0.0, args.epochs, args.seed + i)
        reached.append((masks, accuracy(params)))
        if reached[-1][1] < dense - args.delta:
            break

    rows = []
    for i, (masks, iterative) in enumerate(reached, 1):
        sparsity, epochs = 1 - 0.8**i, i * args.epochs
        once = select(jp.scores.magnitude(trained), sparsity)
        params = jp.apply_masks(trained, once)
        params, _ = fit(params, jp.set_masks(start, once), 0.0, epochs, args.seed + 1)
        ratio = jp.metrics.compression(initial, masks)
        rows.append((sparsity, ratio, epochs, iterative, accuracy(params)))
    return dense, rows


def show(dense, rows):
    """Prints the rows."""
    print(f"dense: test accuracy {dense:.1%}")
    print("sparsity  compression  epochs  iterative  one shot")
    for sparsity, ratio, epochs, iterative, once in rows:
        print(f"{sparsity:8.1%} {ratio:11.1f}× {epochs:7} {iterative:10.1%} {once:9.1%}")


def draw(dense, rows, path):
    """Draws accuracy against compression."""
    _, ratio, _, iterative, once = zip(*rows, strict=True)
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(dense, color="gray", linestyle="--", label="dense")
    axes.plot(ratio, iterative, color="#0072B2", marker="o", label="iterative")
    axes.plot(ratio, once, color="#D55E00", marker="s", label="one shot")
    log_axis(axes, ratio[::-2][::-1])
    axes.set_ylabel("test accuracy")
    axes.set_title("the same number of retraining epochs at each point", fontsize=10)
    figure.legend(loc="outside right center", frameon=False)
    save(figure, path)


def main():
    options = parser(__doc__)
    options.set_defaults(epochs=8)
    options.add_argument("--dense-epochs", type=int, default=20)
    options.add_argument("--rounds", type=int, default=20, help="at most")
    options.add_argument("--delta", type=float, default=0.01)
    args = options.parse_args()
    dense, rows = compare(args)
    show(dense, rows)
    draw(dense, rows, args.out / "prune_retrain.png")


if __name__ == "__main__":
    main()
