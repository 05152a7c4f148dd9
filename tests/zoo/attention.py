"""Attention over patches and sets."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from ._build import (
    attend,
    conv,
    dense,
    from_equinox,
    from_haiku,
    from_linen,
    from_nnx,
    from_shapes,
    hk_conv,
    hk_linear,
    layer,
    linear,
    network,
    normal,
    rms_norm,
)


@network
def linen_vit():
    def body(module, x):
        x = conv(x, 16, (4, 4), (4, 4)).reshape(len(x), -1, 16)
        x = x + module.param("position", nn.initializers.normal(), (1, 4, 16))
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        x = x + dense(nn.gelu(dense(nn.LayerNorm()(x), 32)), 16)
        return dense(nn.LayerNorm()(x).mean(1), 4)

    attention = "params/MultiHeadDotProductAttention_0"
    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            (f"{attention}/query/kernel", 1),
            (f"{attention}/value/kernel", 2),
            ("params/Dense_0/kernel", 1),
            ("params/position", 2),
        ),
        (("params/Conv_0/kernel", 2), ("params/position", 1), ("params/Dense_2/kernel", 1)),
    )


@network
def nnx_vit():
    def make(rngs):
        return {
            "patches": nnx.Conv(3, 16, (4, 4), (4, 4), rngs=rngs),
            "token": nnx.Param(jnp.zeros((1, 1, 16))),
            "norm0": nnx.LayerNorm(16, rngs=rngs),
            "attention": nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs),
            "norm1": nnx.LayerNorm(16, rngs=rngs),
            "up": nnx.Linear(16, 32, rngs=rngs),
            "down": nnx.Linear(32, 16, rngs=rngs),
            "head": nnx.Linear(16, 4, rngs=rngs),
        }

    def call(m, x):
        x = m.patches(x).reshape(len(x), -1, 16)
        x = jnp.concatenate([jnp.broadcast_to(m.token[...], (len(x), 1, 16)), x], 1)
        x = x + m.attention(m.norm0(x))
        x = x + m.down(nnx.gelu(m.up(m.norm1(x))))
        return m.head(x[:, 0])

    return from_nnx(
        make,
        call,
        (normal(2, 8, 8, 3),),
        (
            ("attention/query/kernel", 1),
            ("attention/out/kernel", 1),
            ("up/kernel", 1),
            ("token", 2),
        ),
        (("patches/kernel", 2), ("head/kernel", 1)),
    )


@network
def equinox_vit():
    def make(keys):
        return {
            "patches": eqx.nn.Conv2d(3, 16, 4, 4, key=next(keys)),
            "norm0": eqx.nn.RMSNorm(16),
            "attention": eqx.nn.MultiheadAttention(
                4, 16, use_query_bias=True, use_value_bias=True, key=next(keys)
            ),
            "norm1": eqx.nn.RMSNorm(16),
            "mlp": eqx.nn.MLP(16, 16, 32, 1, jax.nn.gelu, key=next(keys)),
            "head": eqx.nn.Linear(16, 4, key=next(keys)),
        }

    def call(m, x):
        x = m["patches"](x).reshape(16, -1).T
        y = jax.vmap(m["norm0"])(x)
        x = x + m["attention"](y, y, y)
        x = x + jax.vmap(m["mlp"])(jax.vmap(m["norm1"])(x))
        return m["head"](x.mean(0))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (
            ("attention/query_proj/weight", 0),
            ("attention/output_proj/weight", 1),
            ("mlp/layers/0/weight", 0),
            ("norm1/weight", 0),
        ),
        (("patches/weight", 1), ("head/weight", 0)),
    )


@network
def haiku_vit():
    def body(x):
        x = hk_conv(x, 16, 4, 4).reshape(len(x), -1, 16)
        y = hk.RMSNorm(-1)(x)
        x = x + hk.MultiHeadAttention(4, 4, w_init=hk.initializers.VarianceScaling())(y, y, y)
        x = x + hk_linear(jax.nn.gelu(hk_linear(hk.RMSNorm(-1)(x), 32)), 16)
        return hk_linear(x.mean(1), 4)

    return from_haiku(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/multi_head_attention/query/w", 1),
            ("params/multi_head_attention/linear/w", 0),
            ("params/linear/w", 1),
        ),
        (("params/conv2_d/w", 2), ("params/linear_2/w", 1)),
    )


@network
def linen_vit_fused_qkv():
    def body(_, x):
        x = dense(x, 16)
        b, t, _ = x.shape
        qkv = dense(nn.LayerNorm()(x), 48).reshape(b, t, 3, 4, 4)
        x = x + dense(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(b, t, 16), 16)
        x = x + dense(nn.gelu(dense(nn.LayerNorm()(x), 32)), 16)
        return dense(x.mean(1), 4)

    return from_linen(
        body,
        (normal(2, 6, 8),),
        (("params/Dense_1/kernel", 1), ("params/Dense_2/kernel", 0), ("params/Dense_3/kernel", 1)),
        (("params/Dense_0/kernel", 0), ("params/Dense_5/kernel", 1)),
    )


@network
def jax_vit_qkv_chunk():
    def fn(p, x):
        x = linear(p["embed"], x)
        b, t, _ = x.shape
        q, k, v = (
            part.reshape(b, t, 4, 4).swapaxes(1, 2)
            for part in jnp.split(linear(p["qkv"], rms_norm(p["norm"]["scale"], x)), 3, -1)
        )
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) * 4**-0.5)
        x = x + linear(p["out"], (weights @ v).swapaxes(1, 2).reshape(b, t, 16))
        return linear(p["head"], x.mean(1))

    return from_shapes(
        fn,
        {
            "embed": layer(8, 16),
            "norm": {"scale": (16,)},
            "qkv": layer(16, 48),
            "out": layer(16, 16),
            "head": layer(16, 4),
        },
        (normal(2, 6, 8),),
        (("qkv/w", 1), ("out/w", 0), ("out/w", 1)),
        (("embed/w", 0), ("head/w", 1)),
    )


@network
def linen_cross_attention():
    def body(_, source, target):
        memory = dense(source, 16)
        memory = memory + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(memory))
        x = dense(target, 12)
        y = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=12)(
            nn.LayerNorm()(x), nn.LayerNorm()(memory)
        )
        return dense(x + y, 4)

    attention = "params/MultiHeadDotProductAttention_1"
    return from_linen(
        body,
        (normal(2, 6, 8), normal(2, 5, 7)),
        (
            (f"{attention}/query/kernel", 0),
            (f"{attention}/key/kernel", 0),
            (f"{attention}/value/kernel", 2),
            ("params/Dense_0/kernel", 1),
        ),
        (("params/Dense_0/kernel", 0), ("params/Dense_2/kernel", 1)),
    )


@network
def linen_perceiver():
    def body(module, x):
        x = dense(x, 12)
        queries = module.param("queries", nn.initializers.normal(), (3, 16))
        latents = jnp.broadcast_to(queries, (len(x), 3, 16))
        attention = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=16)
        latents = latents + attention(latents, x)
        latents = latents + dense(nn.relu(dense(latents, 32)), 16)
        return dense(latents.reshape(len(x), -1), 4)

    attention = "params/MultiHeadDotProductAttention_0"
    return from_linen(
        body,
        (normal(2, 6, 8),),
        (
            ("params/queries", 1),
            (f"{attention}/key/kernel", 1),
            ("params/Dense_0/kernel", 1),
            ("params/Dense_1/kernel", 1),
        ),
        (("params/Dense_0/kernel", 0), ("params/Dense_3/kernel", 1)),
    )


@network
def jax_swin_window():
    offsets = np.stack(np.meshgrid(np.arange(2), np.arange(2), indexing="ij"), -1).reshape(4, 2)
    index = (offsets[:, None] - offsets[None] + 1) @ np.array([3, 1])  # (4, 4), into 9 rows

    def fn(p, x):
        x = linear(p["embed"], x)
        b, h, w, c = x.shape
        windows = x.reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(-1, 4, c)
        qkv = linear(p["qkv"], windows).reshape(-1, 4, 3, 4, 4).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv
        scores = q @ k.swapaxes(-1, -2) / 2 + p["positions"][index].transpose(2, 0, 1)
        y = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(-1, 4, c)
        y = linear(p["out"], y).reshape(b, h // 2, w // 2, 2, 2, c).swapaxes(2, 3)
        return linear(p["head"], (x + y.reshape(x.shape)).mean((1, 2)))

    return from_shapes(
        fn,
        {
            "embed": layer(3, 16),
            "qkv": layer(16, 48),
            "positions": (9, 4),
            "out": layer(16, 16),
            "head": layer(16, 4),
        },
        (normal(2, 4, 4, 3),),
        (("qkv/w", 1), ("positions", 1), ("out/w", 0), ("embed/w", 1)),
        (("embed/w", 0), ("positions", 0), ("head/w", 1)),
    )
