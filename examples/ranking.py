"""Which criterion ranks filters as the loss does? After Molchanov et al, 2016.

A network of eight convolutions, with pooling between them, is trained. The oracle removes each
filter alone and measures the loss on held-out images. Cheaper criteria are compared with the oracle
by rank correlation, within layers and across layers. Then a share of all filters is removed, and a
table lists how much of each layer is kept, and the accuracy without any fine-tuning.

    python examples/ranking.py
    python examples/ranking.py --data mnist/

Oracle and Taylor: https://arxiv.org/abs/1611.06440
Taylor gates: https://arxiv.org/abs/1906.10771
"""

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import BLUE, ORANGE, SKY, VERMILION, markdown, mean_std, parser, save, tidy
from _data import load
from flax import linen as nn
from scipy.stats import rankdata, spearmanr
from tqdm import tqdm

import jaxprune as jp

SIDE = 16
WIDTHS = [8, 8, 16, 16, 32, 32, 32, 32]
SIDES = [SIDE >> i // 2 for i in range(len(WIDTHS))]
LAYER = np.repeat(np.arange(len(WIDTHS)), WIDTHS)  # of each filter
POSITIONS = np.square(SIDES)[LAYER]
RANDOM = "random, 0.9 to 1.1"  # with ℓ2 by layer: the ranking by the widths of layers alone
AVERAGED, SUMMED = "Taylor, averaged over positions", "Taylor, summed over positions"
COLORS = {16: VERMILION, 8: ORANGE, 4: SKY, 2: BLUE}


class VGG(nn.Module):
    """Eight convolutions, two at each resolution, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(WIDTHS):
            if SIDES[i] != x.shape[1]:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def images(x):
    """Resizes flat images to SIDE × SIDE pixels."""
    side = round(x.shape[1] ** 0.5)
    return jax.image.resize(x.reshape(-1, side, side, 1), (len(x), SIDE, SIDE, 1), "linear")


def by_layer(score):
    """Divides the scores of each layer by their ℓ2 norm."""
    norms = np.array([np.linalg.norm(score[i == LAYER]) for i in range(len(WIDTHS))])
    return score / np.where(norms, norms, 1)[LAYER]


def correlations(score, oracle):
    """Returns the rank correlation within layers (mean), across layers, and the latter after ℓ2."""
    within = [spearmanr(score[i == LAYER], oracle[i == LAYER])[0] for i in range(len(WIDTHS))]
    return np.mean(within), spearmanr(score, oracle)[0], spearmanr(by_layer(score), oracle)[0]


def compare(args):
    """Returns for each seed: scores, rows of (criterion, sparsity, kept, accuracy), accuracy."""
    x, y, x_test, y_test = load(args.data)
    x, x_test = images(x), images(x_test)
    held_out = x[: args.examples], y[: args.examples]
    x, y = x[args.examples :], y[args.examples :]
    model = VGG()
    apply_fn = jax.jit(model.apply)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()

    @jax.jit
    def accuracy(params, masks):
        right = apply_fn(jp.apply_masks(params, masks), x_test).argmax(-1) == y_test
        return 100 * right.mean()

    init = jax.jit(lambda key: model.init(key, x[:1]))
    like = jax.eval_shape(init, jax.random.key(0))
    groups = jp.find_groups(apply_fn, like, x[:1])
    everything = jax.tree.map(lambda w: np.ones(w.shape, bool) if w.ndim > 1 else None, like)
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, args.steps))
    train = jp.curves.trainer(loss, adam, x, y, steps=args.steps)
    oracle = jp.search.oracle(groups, loss)
    taylor, gates = jp.units.taylor(groups, loss), jp.units.taylor_gates(groups, loss)
    activation = [jp.units.activation(groups, apply_fn, word) for word in ("mean", "std")]

    def run(seed):
        init_key, train_key, random_key = jax.random.split(jax.random.key(seed), 3)
        params = train(init(init_key), everything, train_key)
        magnitude = jp.scores.magnitude(params)
        kernels = [magnitude["params"][f"Conv_{i}"]["kernel"] for i in range(len(WIDTHS))]
        norms = [np.sqrt(np.square(kernel).sum((0, 1, 2))) for kernel in kernels]
        summed = np.asarray(taylor(params, *held_out))
        scores = {
            "oracle": oracle(params, *held_out),
            RANDOM: jax.random.uniform(random_key, LAYER.shape, minval=0.9, maxval=1.1),
            "weight norm": np.concatenate(norms),
            "mean activation": activation[0](params, held_out[0]),
            "std of activation": activation[1](params, held_out[0]),
            AVERAGED: summed / POSITIONS,
            SUMMED: summed,
            "Taylor gates": gates(params, *held_out),
        }
        scores = {name: np.asarray(score) for name, score in scores.items()}
        select = {
            "oracle": lambda s: groups.select(abs(scores["oracle"]), s),
            "oracle, signed": lambda s: groups.select(scores["oracle"], s),
            "Taylor, ℓ2 by layer": lambda s: groups.select(by_layer(summed), s),
            AVERAGED: lambda s: groups.select(scores[AVERAGED], s),
            "L1": lambda s: groups.select(magnitude, s, reduce="first"),
            "L1, mean by layer": lambda s: groups.select(
                jp.units.reduce(groups, magnitude, "first", normalize="mean"), s
            ),
        }
        pruned = []
        for name, masks_at in select.items():
            for sparsity in (0.25, 0.5, 0.75):
                masks = masks_at(sparsity)
                biases = [masks["params"][f"Conv_{i}"]["bias"] for i in range(len(WIDTHS))]
                kept = [np.mean(bias) for bias in biases]
                pruned.append((name, sparsity, kept, float(accuracy(params, masks))))
        return scores, pruned, float(accuracy(params, everything))

    return [run(seed) for seed in tqdm(range(args.seeds), "seeds", ncols=80)]


def show(runs):
    """Prints the correlations, the scale of each layer's scores, and the share that is kept."""
    scores, pruned, dense = zip(*runs, strict=True)
    negative = mean_std([100 * np.mean(s["oracle"] < 0) for s in scores], 0)
    print(f"test accuracy of the dense network: {mean_std(dense, 1)} %")
    print(f"filters whose removal lowers the loss: {negative} %\n")
    header = ["criterion", "within layers", "all layers", "all, ℓ2"]
    header += [f"signed: {column}" for column in ("within", "all", "all, ℓ2")]
    rows = []
    for name in list(scores[0])[1:]:
        runs = [
            correlations(s[name], abs(s["oracle"])) + correlations(s[name], s["oracle"])
            for s in scores
        ]
        rows.append([name, *map(mean_std, zip(*runs, strict=True))])
    print(markdown(header, rows), "\n")

    rows = []
    ranks = [len(LAYER) + 1 - rankdata(abs(s["oracle"])) for s in scores]  # 1 is most important
    for i, side in enumerate(SIDES):
        means = [{k: abs(v[i == LAYER]).mean() for k, v in s.items()} for s in scores]
        pooled = " pooled" if side not in SIDES[i + 1 :] and i + 1 < len(SIDES) else ""
        rank = mean_std([np.median(r[i == LAYER]) for r in ranks], 0)
        oracle = mean_std([1000 * s["oracle"] for s in means], 1)
        ratios = [[s[name] / s["oracle"] for s in means] for name in (SUMMED, AVERAGED)]
        where = f"{i + 1}: {side}×{side}{pooled}"
        rows.append([where, rank, oracle, mean_std(ratios[0]), mean_std(ratios[1], 3)])
    header = ["layer", "oracle, median rank", "oracle, mean × 1000"]
    print(markdown([*header, "Taylor summed ÷ oracle", "averaged ÷ oracle"], rows), "\n")

    rows = []
    for seeds in zip(*pruned, strict=True):
        (name, sparsity, *_), *_ = seeds
        kept = np.mean([kept for *_, kept, _ in seeds], 0)
        after = mean_std([accuracy for *_, accuracy in seeds], 1)
        rows.append([name, f"{sparsity:.0%}", *(f"{100 * k:.0f}" for k in kept), after])
    header = ["% of each layer kept", "removed", *range(1, len(WIDTHS) + 1), "accuracy, %"]
    print(markdown(list(map(str, header)), rows))


def draw(runs, path):
    """Draws the rank of each filter by a criterion against its rank by the oracle."""
    names = ["weight norm", "mean activation", AVERAGED, SUMMED]
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        for side, color in COLORS.items():
            here = POSITIONS == side**2
            points = [(rankdata(abs(s["oracle"]))[here], rankdata(s[name])[here]) for s, *_ in runs]
            label = f"{side}×{side}" if axes is panels[0] else None
            axes.scatter(*np.concatenate(points, 1), s=7, color=color, label=label, linewidth=0)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("rank by the oracle")
        tidy(axes)
    panels[0].set_ylabel(f"rank by the criterion, of {len(LAYER)}")
    figure.legend(loc="outside right center", frameon=False, title="positions", markerscale=2)
    save(figure, path)


def main():
    options = parser(__doc__)
    options.add_argument("--examples", type=int, default=400, help="held out, for all scores")
    options.add_argument("--steps", type=int, default=3000)
    args = options.parse_args()
    runs = compare(args)
    show(runs)
    draw(runs, args.out / "ranking.png")


if __name__ == "__main__":
    main()
