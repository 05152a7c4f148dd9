"""Magnitude pruning of LeNet on MNIST, after Han et al, 2015, and Guo et al, 2016.

Trains a dense network and prunes it in rounds. Each round prunes the weights with the smallest
magnitudes and retrains the others at a lower learning rate. With --scope layer the last round keeps
the shares of Han et al (8 %, 9 % and 26 % for LeNet-300-100); with --scope global it keeps as many
weights, by one threshold for all layers. Prints the test errors of the dense and pruned networks.

With --compressions it runs the surgery of Guo et al instead, from one compression to the next. The
weights with the largest magnitudes of all layers take part in the network; the others continue to
learn, and may come back. The table compares surgery with gradual pruning, where pruned weights do
not come back, and with the dense network. With --validate the last sixth of the training images
replaces the test images, for choosing settings.

    python examples/lenet_mnist.py --data mnist/
    python examples/lenet_mnist.py --data mnist/ --model lenet-5 --scope global --seeds 1
    python examples/lenet_mnist.py --data mnist/ --compressions 12 25 56

Han et al, Learning both Weights and Connections for Efficient Neural Networks, 2015
https://arxiv.org/abs/1506.02626
Guo et al, Dynamic Network Surgery for Efficient DNNs, 2016, https://arxiv.org/abs/1608.04493
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax
from _common import markdown, mean_std
from _data import load

import jaxprune as jp

SHAPES = {
    "lenet-300-100": {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)},
    "lenet-5": {
        "conv1": (5, 5, 1, 20),
        "conv2": (5, 5, 20, 50),
        "fc1": (800, 500),
        "fc2": (500, 10),
    },
}
KEPT = {  # the share of each layer that the paper keeps
    "lenet-300-100": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
    "lenet-5": {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19},
}
PUBLISHED = {
    "lenet-300-100": {12: "1.64 → 1.59 % (Han)", 56: "2.28 → 1.99 % (Guo)"},
    "lenet-5": {12: "0.80 → 0.77 % (Han)", 108: "0.91 → 0.91 % (Guo)"},
}


def init(key, shapes):
    he = jax.nn.initializers.he_normal()
    return {
        name: {"w": he(k, s), "b": jnp.zeros(s[-1])}
        for k, (name, s) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }


def dropout(x, rate, key):
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def convolve(x, layer):
    """Convolves as a matmul of 5 × 5 patches, which is fast in a scan on CPUs, and pools."""
    n, side, _, _ = x.shape
    side = side - 4
    parts = [x[:, i : i + side, j : j + side] for i in range(5) for j in range(5)]
    x = jnp.concatenate(parts, -1) @ layer["w"].reshape(-1, layer["w"].shape[-1]) + layer["b"]
    return x.reshape(n, side // 2, 2, side // 2, 2, -1).max((2, 4))


def apply(params, x, rate=0.0, key=None):
    if "conv1" in params:
        x = x.reshape(-1, 28, 28, 1)
        x = convolve(convolve(x, params["conv1"]), params["conv2"])
        x = x.reshape(len(x), -1)
    dense = [params[name] for name in sorted(params) if name.startswith("fc")]
    for i, layer in enumerate(dense):
        x = x @ layer["w"] + layer["b"]
        if i < len(dense) - 1:
            x = dropout(jax.nn.relu(x), rate, None if key is None else jax.random.fold_in(key, i))
    return x


@functools.partial(jax.jit, static_argnames=("epochs", "learning_rate", "l2", "rate", "batch"))
def train(params, masks, x, y, key, *, epochs, learning_rate, l2, rate, batch=128):
    """Trains the weights that the masks keep, with Adam and cosine decay."""
    tx = jp.enforce(adam(learning_rate, l2, epochs * (len(x) // batch)), masks)

    def step(carry, drawn):
        params, state = carry
        index, key = drawn
        grads = jax.grad(loss)(params, x[index], y[index], rate, key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return scan(step, (params, tx.init(params)), len(x), key, epochs, batch)[0]


@functools.partial(jax.jit, static_argnames=("splice", "epochs", "learning_rate", "l2", "batch"))
def operate(
    params,
    masks,
    sparsity,
    x,
    y,
    key,
    *,
    splice,
    epochs,
    learning_rate,
    l2,
    rate,
    every=10,
    batch=128,
):
    """Trains while pruning; returns the params and the masks of the weights that take part.

    These weights are selected again every few steps. With `splice` all weights are candidates, and
    all learn by the gradient of the masked network; otherwise the remaining ones are. The sparsity
    rises in the first half of the steps, and the masks do not change in the last quarter.
    """
    steps = epochs * (len(x) // batch)
    end = max(steps // 2, 1)
    sparsities = jp.schedules.cubic(sparsity, begin=0, end=end)
    tx = adam(learning_rate, l2, steps)

    def step(carry, drawn):
        params, masks, state, count = carry
        index, key = drawn

        def choose():
            scores = jp.scores.magnitude(params)
            return jp.select(scores, sparsities(count), within=None if splice else masks)

        due = ((count % every == 0) | (count == end)) & (count < 0.75 * steps)
        masks = jax.lax.cond(due, choose, lambda: masks)
        grads = jax.grad(loss)(jp.apply_masks(params, masks), x[index], y[index], rate, key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), masks, state, count + 1), None

    start = params, masks, tx.init(params), jnp.int32(0)
    params, masks, *_ = scan(step, start, len(x), key, epochs, batch)
    return jp.apply_masks(params, masks), masks


def adam(learning_rate, l2, steps):
    # With L2 in the gradient, Adam shrinks the weights of pixels that are always black.
    decay = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(optax.add_decayed_weights(l2), optax.adam(decay))


def loss(params, x, y, rate, key):
    logits = apply(params, x, rate, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def scan(step, carry, size, key, epochs, batch):
    """Runs step(carry, (index, key)) over shuffled batches: a scan of scans."""
    per_epoch = size // batch

    def epoch(carry, key):
        order, drop = jax.random.split(key)
        index = jax.random.permutation(order, size)[: per_epoch * batch].reshape(-1, batch)
        return jax.lax.scan(step, carry, (index, jax.random.split(drop, per_epoch)))

    return jax.lax.scan(epoch, carry, jax.random.split(key, epochs))[0]


@jax.jit
def test_error(params, x, y):
    """Returns the error in percent; images are mapped in chunks, to save memory."""
    guess = jax.lax.map(lambda x: apply(params, x[None])[0].argmax(), x, batch_size=1000)
    return 100 * jnp.mean(guess != y)


def select(params, model, scope, part):
    """Selects masks after a part of the rounds, each of which keeps the same share of weights."""
    scores, kept = jp.scores.magnitude(params), KEPT[model]
    if scope == "layer":
        return jp.select(scores, scope={f"{n}/w": 1 - rate**part for n, rate in kept.items()})
    sizes = {name: params[name]["w"].size for name in kept}
    rate = sum(kept[name] * sizes[name] for name in kept) / sum(sizes.values())
    return jp.select(scores, 1 - rate**part)


def prune_and_retrain(seed, args, data):
    """Returns the dense and the pruned test error, and the compression."""
    x, y, x_test, y_test = data
    start, *keys = jax.random.split(jax.random.key(seed), args.rounds + 2)
    params = init(start, SHAPES[args.model])
    masks = select(params, args.model, args.scope, 0.0)
    fit = functools.partial(train, x=x, y=y, l2=args.l2)
    params = fit(
        params, masks, key=keys[0], epochs=args.epochs, learning_rate=args.lr, rate=args.dropout
    )
    dense = float(test_error(params, x_test, y_test))
    print(f"seed {seed}: dense error {dense:.2f} %", flush=True)
    for i, key in enumerate(keys[1:], 1):
        masks = select(params, args.model, args.scope, i / args.rounds)
        params = jp.apply_masks(params, masks)
        # Han et al lower the dropout by the square root of the share of weights kept.
        rate = args.dropout * (1 - jp.metrics.sparsity(masks)) ** 0.5
        params = fit(
            params, masks, key=key, epochs=args.retrain, learning_rate=args.retrain_lr, rate=rate
        )
        error = float(test_error(params, x_test, y_test))
        compression = jp.metrics.compression(params, masks)
        print(f"seed {seed}: {compression:5.2f}×, error {error:.2f} %", flush=True)
    if seed == args.seeds - 1:
        print(jp.summary(params, masks))
    return dense, error, compression


def rounds(args, data):
    """Prints the errors before and after the rounds of Han et al, over the seeds."""
    dense, pruned, compression = zip(
        *[prune_and_retrain(seed, args, data) for seed in range(args.seeds)], strict=True
    )
    print(f"{args.model}, scope {args.scope}, {args.seeds} seeds, {compression[0]:.1f}×")
    for name, errors in [("dense", dense), ("pruned", pruned)]:
        print(f"{name:<8} test error {mean_std(errors)} %")


def surgery(args, data):
    """Prints a table of errors of gradual pruning and of surgery, by compression."""
    x, y, x_test, y_test = data
    errors, kept = {}, {}
    runs = {"dense": [1], "gradual": args.compressions, "surgery": args.compressions}
    fit = {"x": x, "y": y, "learning_rate": args.lr, "l2": args.l2}
    for seed in range(args.seeds):
        start, *keys = jax.random.split(jax.random.key(seed), 2 + len(args.compressions))
        params = init(start, SHAPES[args.model])
        full = jp.select(jp.scores.magnitude(params), 0.0)
        size, weights = (sum(w.size for w in jax.tree.leaves(tree)) for tree in (params, full))
        dense = train(params, full, key=keys[0], epochs=args.epochs, rate=args.dropout, **fit)
        for name, compressions in runs.items():
            params, masks = dense, full
            for c, key in zip(compressions, keys[1:], strict=False):
                left = 1 - size * (1 - 1 / c) / weights  # biases are kept, and counted
                options = {"splice": name == "surgery", "rate": args.dropout * left**0.5} | fit
                params, masks = operate(
                    params, masks, 1 - left, key=key, epochs=args.operate, **options
                )
                kept[c] = jp.summary(params, masks).kept
                errors.setdefault((name, c), []).append(float(test_error(params, x_test, y_test)))
                print(f"seed {seed}: {name}, {c:g}×, error {errors[name, c][-1]:.2f} %", flush=True)
    print(jp.summary(params, masks))
    rows = [("1×", f"{size:,}", f"{mean_std(errors['dense', 1])} %", "", "", "")]
    for c in args.compressions:
        pruned = [f"{mean_std(errors[name, c])} %" for name in ("gradual", "surgery")]
        rows.append((f"{c:g}×", f"{kept[c]:,}", "", *pruned, PUBLISHED[args.model].get(c, "")))
    print(markdown(("compression", "params", "dense", "gradual", "surgery", "published"), rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with the four MNIST files")
    parser.add_argument("--model", choices=SHAPES, default="lenet-300-100")
    parser.add_argument("--scope", choices=["layer", "global"], default="layer")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=12, help="of dense training")
    parser.add_argument("--rounds", type=int, default=4, help="of pruning and retraining")
    parser.add_argument("--retrain", type=int, default=10, help="epochs in each round")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--retrain-lr", type=float, default=5e-4)
    parser.add_argument("--l2", type=float, default=1e-4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--compressions", type=float, nargs="+", help="runs surgery, not rounds")
    parser.add_argument("--operate", type=int, default=30, help="epochs of surgery")
    parser.add_argument("--validate", action="store_true", help="test on held-out training images")
    args = parser.parse_args()
    x, y, *test = map(jnp.asarray, load(args.data))
    if args.validate:
        held = len(x) // 6
        x, y, *test = x[:-held], y[:-held], x[-held:], y[-held:]
    (surgery if args.compressions else rounds)(args, (x, y, *test))


if __name__ == "__main__":
    main()
