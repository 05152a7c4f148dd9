"""Iterative magnitude pruning: removes a fifth of the remaining weights, retrains, and repeats.

Stops when the test accuracy is more than --delta below that of the dense network. Then prunes the
dense network once to each sparsity that was reached, and retrains it for as many epochs as the
rounds took together. Prints a table, and draws both. With one seed and 360 test images, differences
below a point are noise. Iterative pruning is ahead because Adam's state is kept between rounds.

    python examples/prune_retrain.py --delta 0.01
    python examples/prune_retrain.py --data mnist/ --epochs 1
"""

import functools

import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from _common import BLUE, VERMILION, compression_axis, parser, save
from _data import load
from _training import accuracy_on, epoch_trainer, lenet

import jaxprune as jp

# A global threshold would empty the second layer almost entirely: its weights start out smaller.
select = functools.partial(jp.select, scope="layer")


def compare(args):
    """Returns the dense accuracy and rows of sparsity, compression, epochs and accuracies."""
    x, y, x_test, y_test = load(args.data)
    apply_fn, initial = lenet(x.shape[1], args.seed)
    accuracy = accuracy_on(apply_fn, x_test, y_test)
    masks = select(jp.scores.magnitude(initial), 0.0)
    tx = jp.enforce(optax.adam(1e-3), masks)
    fit = epoch_trainer(apply_fn, lambda sparsity: tx, jnp.asarray(x), jnp.asarray(y))
    trained, start = fit(initial, tx.init(initial), 0.0, args.dense_epochs, args.seed)
    dense = float(accuracy(trained))

    params, state, reached = trained, start, []
    for i in range(1, args.rounds + 1):
        masks = select(jp.scores.magnitude(params), 1 - 0.8**i, within=masks)
        params = jp.apply_masks(params, masks)
        state = jp.set_masks(state, masks)  # keeps the moments of Adam
        params, state = fit(params, state, 0.0, args.epochs, args.seed + i)
        reached.append((masks, float(accuracy(params))))
        if reached[-1][1] < dense - args.delta:
            break

    rows = []
    for i, (masks, iterative) in enumerate(reached, 1):
        sparsity, epochs = 1 - 0.8**i, i * args.epochs
        once = select(jp.scores.magnitude(trained), sparsity)
        params = jp.apply_masks(trained, once)
        params, _ = fit(params, jp.set_masks(start, once), 0.0, epochs, args.seed + 1)
        compression = jp.metrics.compression(initial, masks)
        rows.append((sparsity, compression, epochs, iterative, float(accuracy(params))))
    return dense, rows


def show(dense, rows):
    """Prints the rows."""
    print(f"dense: test accuracy {dense:.1%}")
    print("sparsity  compression  epochs  iterative  one shot")
    for sparsity, compression, epochs, iterative, once in rows:
        print(f"{sparsity:8.1%} {compression:11.1f}× {epochs:7} {iterative:10.1%} {once:9.1%}")


def draw(dense, rows, path):
    """Draws accuracy against compression."""
    _, compression, _, iterative, once = zip(*rows, strict=True)
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(dense, color="gray", linestyle="--", label="dense")
    axes.plot(compression, iterative, color=BLUE, marker="o", label="iterative")
    axes.plot(compression, once, color=VERMILION, marker="s", label="one shot")
    compression_axis(axes, compression[::-2][::-1])
    axes.set_ylabel("test accuracy")
    axes.set_title("equal numbers of retraining epochs at each point", fontsize=10)
    figure.legend(loc="outside right center", frameon=False)
    save(figure, path)


def main():
    options = parser(__doc__, seeds=None)
    options.add_argument("--epochs", type=int, default=8, help="of a round")
    options.add_argument("--dense-epochs", type=int, default=20)
    options.add_argument("--rounds", type=int, default=20, help="at most")
    options.add_argument("--delta", type=float, default=0.01, help="accepted loss of accuracy")
    args = options.parse_args()
    dense, rows = compare(args)
    show(dense, rows)
    draw(dense, rows, args.out / "prune_retrain.png")


if __name__ == "__main__":
    main()
