"""Vision with two-pass norms: the square of what differs from the mean is not zero if masked."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._build import from_equinox, network, normal


@network
def equinox_vit_layer_norm():
    class Block(eqx.Module):
        norm0: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        norm1: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP

        def __init__(self, key):
            first, second = jax.random.split(key)
            bias = {"use_query_bias": True, "use_key_bias": True, "use_output_bias": True}
            self.norm0, self.norm1 = eqx.nn.LayerNorm(15), eqx.nn.LayerNorm(15)
            self.attention = eqx.nn.MultiheadAttention(3, 15, **bias, key=first)
            self.mlp = eqx.nn.MLP(15, 15, 22, 1, jax.nn.gelu, key=second)

        def __call__(self, x):
            y = jax.vmap(self.norm0)(x)
            x = x + self.attention(y, y, y)
            return x + jax.vmap(self.mlp)(jax.vmap(self.norm1)(x))

    def make(keys):
        return {
            "patches": eqx.nn.Conv2d(3, 15, 4, 4, key=next(keys)),
            "class": eqx.nn.Embedding(1, 15, key=next(keys)),
            "positions": eqx.nn.Embedding(5, 15, key=next(keys)),
            "blocks": [Block(next(keys)) for _ in range(2)],
            "norm": eqx.nn.LayerNorm(15),
            "head": eqx.nn.Linear(15, 4, key=next(keys)),
        }

    def call(m, x):
        x = m["patches"](x).reshape(15, -1).T
        x = jnp.concatenate([m["class"].weight, x]) + m["positions"].weight
        for block in m["blocks"]:
            x = block(x)
        return m["head"](m["norm"](x[0]))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (("patches/weight", 0), ("blocks/1/norm1/weight", 0), ("blocks/0/mlp/layers/0/weight", 0)),
        (("patches/weight", 1), ("head/weight", 0)),
    )


@network
def equinox_swin_v2():
    """Shifted windows, cosine attention, and a key without bias, which is written as zeros."""
    offsets = np.stack(np.meshgrid(np.arange(2), np.arange(2), indexing="ij"), -1).reshape(4, 2)
    index = (offsets[:, None] - offsets[None] + 1) @ np.array([3, 1])

    def make(keys):
        linear = lambda *sizes, **more: eqx.nn.Linear(*sizes, **more, key=next(keys))
        blocks = [
            {
                "qkv": linear(14, 42),
                "positions": eqx.nn.Embedding(9, 2, key=next(keys)),
                "out": linear(14, 14),
                "norm0": eqx.nn.LayerNorm(14),
                "mlp": eqx.nn.MLP(14, 14, 25, 1, jax.nn.gelu, key=next(keys)),
                "norm1": eqx.nn.LayerNorm(14),
            }
            for _ in range(2)
        ]
        merge = {"norm": eqx.nn.LayerNorm(56), "linear": linear(56, 9, use_bias=False)}
        return {"embed": linear(3, 14), "blocks": blocks, "merge": merge, "head": linear(9, 4)}

    def each(f, x):
        return jax.vmap(jax.vmap(f))(x)

    def attention(m, x):
        bias = m["qkv"].bias.at[14:28].set(0)
        windows = x.reshape(2, 2, 2, 2, 14).swapaxes(1, 2).reshape(4, 4, 14)
        q, k, v = (
            (windows @ m["qkv"].weight.T + bias).reshape(4, 4, 3, 2, 7).transpose(2, 0, 3, 1, 4)
        )
        q, k = (a / jnp.sqrt(jnp.sum(a * a, -1, keepdims=True) + 1e-4) for a in (q, k))
        scores = 4 * q @ k.swapaxes(-1, -2) + m["positions"].weight[index].transpose(2, 0, 1)
        y = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(4, 4, 14)
        return each(m["out"], y).reshape(2, 2, 2, 2, 14).swapaxes(1, 2).reshape(4, 4, 14)

    def call(m, x):
        x = each(m["embed"], x)
        for shift, block in enumerate(m["blocks"]):
            y = attention(block, jnp.roll(x, (-shift, -shift), (0, 1)))
            x = x + each(block["norm0"], jnp.roll(y, (shift, shift), (0, 1)))
            x = x + each(block["norm1"], each(block["mlp"], x))
        x = jnp.concatenate([x[i::2, j::2] for i in range(2) for j in range(2)], -1)
        x = each(m["merge"]["linear"], each(m["merge"]["norm"], x))
        return m["head"](x.mean((0, 1)))

    return from_equinox(
        make,
        call,
        (normal(2, 4, 4, 3),),
        (("embed/weight", 0), ("blocks/0/qkv/weight", 0), ("merge/linear/weight", 1)),
        (("embed/weight", 1), ("head/weight", 0)),
    )


@network
def equinox_convnext():
    def make(keys):
        blocks = [
            {
                "depthwise": eqx.nn.Conv2d(10, 10, 3, padding=1, groups=10, key=next(keys)),
                "norm": eqx.nn.LayerNorm(10),
                "mlp": eqx.nn.MLP(10, 10, 23, 1, jax.nn.gelu, key=next(keys)),
                "scale": eqx.nn.Embedding(1, 10, key=next(keys)),
            }
            for _ in range(2)
        ]
        stem = eqx.nn.Conv2d(3, 10, 2, 2, key=next(keys))
        down = {"norm": eqx.nn.LayerNorm(10), "conv": eqx.nn.Conv2d(10, 13, 2, 2, key=next(keys))}
        head = eqx.nn.Linear(13, 4, key=next(keys))
        return {
            "stem": stem,
            "blocks": blocks,
            "down": down,
            "norm": eqx.nn.LayerNorm(13),
            "head": head,
        }

    def each(f, x):
        return jax.vmap(jax.vmap(f, 1, 1), 1, 1)(x)

    def call(m, x):
        x = m["stem"](x)
        for block in m["blocks"]:
            y = each(block["mlp"], each(block["norm"], block["depthwise"](x)))
            x = x + y * block["scale"].weight[0][:, None, None]
        x = m["down"]["conv"](each(m["down"]["norm"], x))
        return m["head"](m["norm"](x.mean((1, 2))))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (("stem/weight", 0), ("blocks/0/mlp/layers/0/weight", 0), ("down/conv/weight", 0)),
        (("stem/weight", 1), ("head/weight", 0)),
    )


@network
def equinox_diffusion_unet():
    """Noise at a time, group norms of two passes, attention between pixels, and skips."""

    def resnet_block(keys, before, after):
        return {
            "norm0": eqx.nn.GroupNorm(2, before),
            "conv0": eqx.nn.Conv2d(before, after, 3, padding=1, key=next(keys)),
            "time": eqx.nn.Linear(11, after, key=next(keys)),
            "norm1": eqx.nn.GroupNorm(2, after),
            "conv1": eqx.nn.Conv2d(after, after, 3, padding=1, key=next(keys)),
            "skip": eqx.nn.Conv2d(before, after, 1, key=next(keys)),
        }

    def make(keys):
        return {
            "time": eqx.nn.MLP(6, 11, 13, 1, jax.nn.silu, key=next(keys)),
            "first": eqx.nn.Conv2d(3, 8, 3, padding=1, key=next(keys)),
            "down": resnet_block(keys, 8, 10),
            "shrink": eqx.nn.Conv2d(10, 10, 3, 2, padding=1, key=next(keys)),
            "norm": eqx.nn.GroupNorm(2, 10),
            "attention": eqx.nn.MultiheadAttention(2, 10, key=next(keys)),
            "up": resnet_block(keys, 20, 8),
            "last": eqx.nn.Conv2d(8, 3, 3, padding=1, key=next(keys)),
        }

    def block(m, x, t):
        h = m["conv0"](jax.nn.silu(m["norm0"](x))) + m["time"](t)[:, None, None]
        return m["skip"](x) + m["conv1"](jax.nn.silu(m["norm1"](h)))

    def call(m, x, t):
        angles = t * 10.0 ** -jnp.arange(3.0)
        t = jax.nn.silu(m["time"](jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])))
        fine = block(m["down"], m["first"](x), t)
        x = m["shrink"](jax.nn.silu(fine))
        y = m["norm"](x).reshape(10, -1).T
        x = x + m["attention"](y, y, y).T.reshape(x.shape)
        x = jax.image.resize(x, fine.shape, "nearest")
        return m["last"](jax.nn.silu(block(m["up"], jnp.concatenate([x, fine]), t)))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8), normal(2)),
        (("time/layers/0/weight", 0), ("time/layers/1/weight", 0), ("down/conv0/weight", 0)),
        (("first/weight", 1), ("last/weight", 0)),
    )


@network
def equinox_perceiver():
    def make(keys):
        linear = lambda *sizes: eqx.nn.Linear(*sizes, key=next(keys))
        return {
            "latents": eqx.nn.Embedding(6, 12, key=next(keys)),
            "embed": linear(5, 9),
            "norms": [eqx.nn.LayerNorm(n) for n in (12, 9, 12)],
            "cross": eqx.nn.MultiheadAttention(
                3, 12, key_size=9, value_size=9, output_size=12, key=next(keys)
            ),
            "self": eqx.nn.MultiheadAttention(3, 12, key=next(keys)),
            "mlp": eqx.nn.MLP(12, 12, 21, 1, jax.nn.gelu, key=next(keys)),
            "head": linear(12, 4),
        }

    def call(m, x):
        first, second, third = m["norms"]
        x = jax.vmap(second)(jax.vmap(m["embed"])(x))
        z = m["latents"].weight
        z = z + m["cross"](jax.vmap(first)(z), x, x)
        y = jax.vmap(third)(z)
        z = z + m["self"](y, y, y)
        z = z + jax.vmap(m["mlp"])(z)
        return m["head"](z.mean(0))

    return from_equinox(
        make,
        call,
        (normal(2, 7, 5),),
        (
            ("latents/weight", 1),
            ("latents/weight", 0),
            ("embed/weight", 0),
            ("mlp/layers/0/weight", 0),
        ),
        (("embed/weight", 1), ("head/weight", 0)),
    )
