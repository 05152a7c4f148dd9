"""Shows the params, FLOPs and activations of each layer of VGG-16, computed from shapes alone.

The dense layers hold nine tenths of the weights and take less than a hundredth of the FLOPs.
Pruning them saves storage, but no time.

    python examples/layers.py
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _common import BLUE, VERMILION, save, tidy
from _networks import VGG16

import jaxprune as jp


def draw(rows, path):
    """Draws the share of each layer."""
    names = [row.path.split("/")[1].replace("_", " ") for row in rows]
    kinds = {
        "params": [row.params for row in rows],
        "FLOPs": [row.flops for row in rows],
        "activations": [row.activations for row in rows],
    }
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for i, ((kind, values), color) in enumerate(
        zip(kinds.items(), (BLUE, VERMILION, "#999999"), strict=True)
    ):
        shares = np.array(values) / sum(values)
        axes.bar(np.arange(len(rows)) + 0.27 * (i - 1), shares, 0.27, color=color, label=kind)
    axes.set_xticks(range(len(rows)), names, rotation=45, ha="right")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f}%")
    axes.set_ylabel("share of the network")
    axes.set_title("VGG-16 at 224 pixels")
    axes.legend(frameon=False)
    tidy(axes)
    axes.grid(visible=False, axis="x")
    save(figure, path)


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs"))
    args = options.parse_args()
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(VGG16().init, jax.random.key(0), x)
    layers = jp.metrics.layers(VGG16().apply, variables, x)
    print(layers)
    draw(layers.rows, args.out / "vgg16.png")


if __name__ == "__main__":
    main()
