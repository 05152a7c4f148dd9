"""Where the weights, the work and the activations of VGG-16 are; from shapes alone.

The dense layers hold nine tenths of the weights and do less than a hundredth of the work: pruning
them saves storage and no time.

    python examples/layers.py
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from _networks import VGG16

import jaxprune as jp

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(rows, path):
    names = [row.path.split("/")[1].replace("_", " ") for row in rows]
    kinds = {
        "params": [row.params for row in rows],
        "FLOPs": [row.flops for row in rows],
        "activations": [row.activations for row in rows],
    }
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for i, ((kind, values), color) in enumerate(
        zip(kinds.items(), ("#0072B2", "#D55E00", "#999999"), strict=True)
    ):
        shares = np.array(values) / sum(values)
        axes.bar(np.arange(len(rows)) + 0.27 * (i - 1), shares, 0.27, color=color, label=kind)
    axes.set_xticks(range(len(rows)), names, rotation=45, ha="right")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f}%")
    axes.set_ylabel("share of the network")
    axes.set_title("VGG-16 at 224 pixels")
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    args = parser.parse_args()
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(VGG16().init, jax.random.key(0), x)
    layers = jp.metrics.layers(VGG16().apply, variables, x)
    print(layers)
    draw(layers.rows, args.out / "vgg16.png")


if __name__ == "__main__":
    main()
