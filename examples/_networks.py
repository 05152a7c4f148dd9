"""Networks of the benchmarks: an MLP, convolutions, ResNet-50, VGG-16, ViT, and a decoder."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


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
    """Returns random variables without compiling the initialisers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def draw(leaf):
        values = rng.uniform(0.5, 1.5, leaf.shape) / np.sqrt(max(np.prod(leaf.shape[:-1]), 1))
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, shapes)


def normal_arrays(n, count=20):
    """Returns random matrices with about n weights in total."""
    side = max(n // count // 256, 1)
    make = jax.jit(lambda key: jax.random.normal(key, (side, 256)))
    return [make(jax.random.key(i)) for i in range(count)]


def mlp_params(key, widths):
    pairs = zip(jax.random.split(key, len(widths)), widths[:-1], widths[1:], strict=False)
    return [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)} for k, a, b in pairs
    ]


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def conv_params(key, widths):
    keys = jax.random.split(key, len(widths) + 1)
    kernels = [
        jax.random.normal(k, (3, 3, n, m)) * (2 / (9 * n)) ** 0.5
        for k, n, m in zip(keys, (3, *widths), widths, strict=False)
    ]
    return {"kernels": kernels, "out": jax.random.normal(keys[-1], (widths[-1], 10)) * 0.1}


def convs(params, x):
    for kernel in params["kernels"]:
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["out"]


def decoder(layers, width, hidden, heads, kv_heads, vocabulary):
    """Returns a decoder with grouped queries, the shapes of its params, and that of its tokens."""
    dim = width // heads

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

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

    def apply_fn(params, tokens):
        x = params["embed"][tokens]
        for p in params["blocks"]:
            y = norm(x, p["norm0"])
            q, k, v = ((y @ p[n]).reshape(*x.shape[:2], -1, dim) for n in "qkv")
            y = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
            x = x + y.reshape(x.shape) @ p["o"]
            y = norm(x, p["norm1"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return norm(x, params["norm"]) @ params["embed"].T

    return apply_fn, params, jax.ShapeDtypeStruct((1, 128), jnp.int32)
