"""What structure costs and saves: finding groups, and shrunk networks beside hand-written ones.

Halves every layer of a ResNet-50, a VGG-16 and a ViT and runs, interleaved in one process, the
dense network, the shrunk one, and the same architecture written by hand at half its widths.

    python examples/benchmark_structure.py
"""

import argparse
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp


class Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def conv(x, width, size, stride=1):
            x = nn.Conv(width, (size, size), stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        y = nn.relu(conv(x, self.width, 1))
        y = nn.relu(conv(y, self.width, 3, self.stride))
        y = conv(y, 4 * self.width, 1)
        if x.shape != y.shape:
            x = conv(x, 4 * self.width, 1, self.stride)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    width: int = 64
    blocks: Sequence[int] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, count in enumerate(self.blocks):
            for j in range(count):
                x = Bottleneck(self.width * 2**i, 2 if i and not j else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class VGG16(nn.Module):
    width: int = 64
    blocks: Sequence[int] = (2, 2, 3, 3, 3)

    @nn.compact
    def __call__(self, x):
        for i, count in enumerate(self.blocks):
            for _ in range(count):
                x = nn.relu(nn.Conv(self.width * min(2**i, 8), (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(64 * self.width)(x))
        return nn.Dense(1000)(x)


class ViT(nn.Module):
    width: int = 384
    heads: int = 6
    head_dim: int = 64
    depth: int = 12

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (16, 16), 16)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), (x.shape[1], self.width))[None]
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            q, k, v = (nn.DenseGeneral((self.heads, self.head_dim))(y) for _ in range(3))
            y = nn.dot_product_attention(q, k, v)
            x = x + nn.DenseGeneral(self.width, axis=(-2, -1))(y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(1000)(nn.LayerNorm()(x).mean(1))


def initialise(model, x):
    """Random weights without compiling the initialisers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    spread = lambda s: rng.uniform(0.5, 1.5, s.shape) / np.sqrt(max(np.prod(s.shape[:-1]), 1))  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(spread(s), s.dtype), shapes)


def compare(name, dense, by_hand, x, rounds):
    params = initialise(dense, x)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        groups = jp.find_groups(dense.apply, params, x)
        seconds.append(time.perf_counter() - start)
    masks = groups.select(jp.scores.magnitude(params), 0.5, scope="layer")
    small_fn, small, _ = jp.shrink(dense.apply, params, masks, x, groups=groups, verify=False)
    hand = initialise(by_hand, x)
    sizes = [sum(w.size for w in jax.tree.leaves(p)) for p in (small, hand)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name}: the shrunk network has {sizes[0]} params, by hand {sizes[1]}.")
    functions = {"dense": (dense.apply, params), "shrunk": (small_fn, small)}
    functions["by hand"] = by_hand.apply, hand
    times = jp.metrics.latency(functions, x, rounds=rounds)
    saved = jp.metrics.flops(dense.apply, params, x) / jp.metrics.flops(small_fn, small, x)
    print(f"\n{name}: groups found in {np.median(seconds):.2f} s, {saved:.2f}× fewer FLOPs")
    print(times)
    for batch in sorted({row.batch for row in times.rows}):
        gain, limit = times.speedup("shrunk", batch), times.speedup("by hand", batch)
        share = gain / saved
        print(
            f"batch {batch}: shrunk / by hand {limit / gain:.3f}; "
            f"speed-up {gain:.2f}×, {share:.2f} of the FLOPs'"
        )


def decoder(layers, width, hidden, heads, kv_heads, vocabulary):
    """A decoder with grouped queries, as shapes alone."""
    dim = width // heads
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    block = {"norm0": shape(width), "q": shape(width, width), "o": shape(width, width)}
    block |= {name: shape(width, kv_heads * dim) for name in "kv"}
    block |= {"norm1": shape(width), "gate": shape(width, hidden), "up": shape(width, hidden)}
    block["down"] = shape(hidden, width)
    params = {"embed": shape(vocabulary, width), "norm": shape(width), "blocks": [block] * layers}

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]

    def rope(x):
        angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(dim // 2) / dim)[None]
        cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def fn(params, tokens):
        x = params["embed"][tokens]
        for p in params["blocks"]:
            y = norm(x, p["norm0"])
            q, k, v = ((y @ p[n]).reshape(*x.shape[:2], -1, dim) for n in "qkv")
            y = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
            x = x + y.reshape(x.shape) @ p["o"]
            y = norm(x, p["norm1"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return norm(x, params["norm"]) @ params["embed"].T

    return fn, params, jax.ShapeDtypeStruct((1, 128), jnp.int32)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.batch = 2, 2
        sizes, x = (2, 64, 128, 4, 2, 100), jnp.ones((2, 32, 32, 3))
        models = {"VGG": (VGG16(8, (1, 1)), VGG16(4, (1, 1)))}
    else:
        sizes, x = (32, 4096, 14336, 32, 8, 128256), jnp.ones((args.batch, 224, 224, 3))
        models = {
            "ResNet-50": (ResNet50(), ResNet50(32)),
            "ViT-S/16": (ViT(), ViT(192, 3, 32)),
            "VGG-16": (VGG16(), VGG16(32)),
        }
    fn, params, tokens = decoder(*sizes)
    start = time.perf_counter()
    groups = jp.find_groups(fn, params, tokens)
    seconds = time.perf_counter() - start
    print(
        f"decoder of {sizes[0]} layers, width {sizes[1]}: {len(groups):,} units in {seconds:.2f} s"
    )
    for name, (dense, by_hand) in models.items():
        compare(name, dense, by_hand, x, args.rounds)


if __name__ == "__main__":
    main()
