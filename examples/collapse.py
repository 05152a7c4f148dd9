"""Which criterion empties a layer first? After Tanaka et al, 2020.

An untrained network of eleven convolutions is pruned at increasing compressions, up to the maximum,
at which each layer keeps one weight. A layer without weights disconnects the network, and no
training can repair that. Random, magnitude, SNIP and GraSP score once, SynFlow in --rounds rounds.
Prints the first compression at which a layer is empty, and draws the number of empty layers.

    python examples/collapse.py
    python examples/collapse.py --data mnist/

https://arxiv.org/abs/2006.05467
"""

import functools
import itertools
import math

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
    markdown,
    mean_std,
    parser,
    save,
    tidy,
)
from _data import load_images
from flax import linen as nn
from tqdm import tqdm

import jaxprune as jp

# The last three are for SynFlow.
COLORS = [BLACK, BLUE, ORANGE, PURPLE, SKY, VERMILION, GREEN]
MARKERS = ["x", "o", "s", "^", "P", "v", "D"]
WIDTHS = [24, 24, 48, 48, 64, 64, 64, 96, 96, 96, 96]


class VGG(nn.Module):
    """Convolutions and a dense layer; the image is halved where the width grows."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width, following in itertools.zip_longest(self.widths, self.widths[1:]):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            if following is not None and following > width:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(jnp.mean(x, (1, 2)))


def criteria(apply_fn, x, y, rounds):
    """Returns masks(params, sparsity, key) by name."""

    def loss(params, x, y, temperature=1.0):
        logits = apply_fn(params, x) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    snip = jp.scores.snip(loss)
    grasp = jp.scores.grasp(lambda params, x, y: loss(params, x, y, temperature=200))
    synflow, shape = jp.scores.synflow(apply_fn), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)

    def by_synaptic_flow(p, s, key, rounds):
        return jp.select_iteratively(synflow, p, s, shape, rounds=rounds)

    return {
        "random": lambda p, s, key: jp.select(jp.scores.random(p, key), s),
        "magnitude": lambda p, s, key: jp.select(jp.scores.magnitude(p), s),
        "SNIP": lambda p, s, key: jp.select(snip(p, x, y), s),
        "GraSP": lambda p, s, key: jp.select(grasp(p, x, y), s),
    } | {f"SynFlow, n = {n}": functools.partial(by_synaptic_flow, rounds=n) for n in rounds}


def compare(args):
    """Returns counts of empty layers by method, compression and seed, and the network's size."""
    x, y, _, _ = load_images(args.data)
    x, y = jnp.asarray(x[:256]), jnp.asarray(y[:256])
    model = VGG(tuple(args.widths))
    apply_fn = jax.jit(model.apply)
    methods = criteria(apply_fn, x, y, args.rounds)
    init = jax.jit(lambda key: model.init(key, x[:1]))
    weights = [w for w in jax.tree.leaves(init(jax.random.key(0))) if w.ndim > 1]
    total, layers = sum(w.size for w in weights), len(weights)
    limit = total / layers
    steps = round(2 * math.log10(limit)) if args.steps is None else args.steps
    empty = {}
    runs = [(name, seed) for seed in range(args.seeds) for name in methods]
    for name, seed in (bar := tqdm(runs, ncols=80)):
        bar.set_description(f"{name}, seed {seed}")
        key, init_key = jax.random.split(jax.random.key(seed))
        params = init(init_key)
        for c in np.geomspace(10, limit, steps):
            try:
                masks = methods[name](params, 1 - 1 / c, key)
                count = sum(not bool(m.any()) for m in jax.tree.leaves(masks))
            except ValueError:  # SynFlow raises it when no signal reaches the output any more
                count = layers
            empty.setdefault(name, {}).setdefault(c, []).append(count)
    return empty, total, layers, limit


def show(empty, total, layers, limit):
    """Prints the first compression at which a layer is empty, for each seed."""
    print(f"{total:,} weights in {layers} layers: at most {limit:,.0f}×")
    rows = []
    for name, counts in empty.items():
        firsts = []
        for seed in zip(*counts.values(), strict=True):
            broken = [c for c, n in zip(counts, seed, strict=True) if n]
            firsts.append(f"{broken[0]:,.0f}×" if broken else "never")
        rows.append((name, ", ".join(firsts), mean_std(counts[max(counts)], 1)))
    header = "a layer is empty from, by seed", f"empty layers at {limit:,.0f}×"
    print(markdown(("method", *header), rows))


def draw(empty, layers, limit, path):
    """Draws the number of empty layers against compression, the mean over seeds."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    styles = itertools.cycle(zip(COLORS, MARKERS, strict=True))
    for (name, counts), (color, marker) in zip(empty.items(), styles, strict=False):
        means = [np.mean(seeds) for seeds in counts.values()]
        axes.plot(list(counts), means, color=color, marker=marker, label=name, clip_on=False)
    axes.axvline(limit, color="gray", linestyle="--", linewidth=1)
    axes.text(limit, layers, "one weight a layer ", ha="right", va="top", color="gray")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda c, _: f"{c:,.0f}×")
    axes.set_xlabel("compression of the weights")
    axes.set_ylabel(f"empty layers, of {layers}")
    axes.set_ylim(0, layers)
    tidy(axes)
    figure.legend(loc="outside right center", frameon=False)
    save(figure, path)


def main():
    options = parser(__doc__)
    options.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    options.add_argument("--rounds", type=int, nargs="+", default=[1, 100, 300], help="of SynFlow")
    options.add_argument("--steps", type=int, help="number of compressions; default: two a decade")
    args = options.parse_args()
    empty, total, layers, limit = compare(args)
    show(empty, total, layers, limit)
    draw(empty, layers, limit, args.out / "collapse.png")


if __name__ == "__main__":
    main()
