"""Language models: decoders, tied embeddings, layers in a scan."""

import math

import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from ._build import (
    attend,
    dense,
    from_haiku,
    from_linen,
    from_nnx,
    from_shapes,
    hk_linear,
    network,
    rms_norm,
    tokens,
)


def rotate(x, interleaved):
    """Turns pairs of features of ``(batch, tokens, heads, features)`` by their position."""
    t, size = x.shape[1], x.shape[-1]
    angles = jnp.arange(t)[:, None] * 100.0 ** (-jnp.arange(0, size, 2) / size)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def decoder_block(p, x, heads=4, groups=2, interleaved=False):
    """One block of a Llama: fewer heads for keys and values, RoPE, RMSNorm and SwiGLU."""
    b, t, _ = x.shape
    y = rms_norm(p["norm0"]["scale"], x)
    q = rotate((y @ p["q"]).reshape(b, t, heads, -1), interleaved)
    k = rotate((y @ p["k"]).reshape(b, t, groups, -1), interleaved)
    v = (y @ p["v"]).reshape(b, t, groups, -1)
    q = q.reshape(b, t, groups, heads // groups, -1)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    y = jnp.einsum("bgrts,bsgd->btgrd", jax.nn.softmax(scores), v).reshape(b, t, -1)
    x = x + y @ p["o"]
    y = rms_norm(p["norm1"]["scale"], x)
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def decoder_shapes(*layers, groups=2):
    shapes = {"q": (16, 16), "k": (16, 4 * groups), "v": (16, 4 * groups), "o": (16, 16)}
    shapes |= {"gate": (16, 32), "up": (16, 32), "down": (32, 16)}
    shapes = {name: (*layers, *shape) for name, shape in shapes.items()}
    return shapes | {"norm0": {"scale": (*layers, 16)}, "norm1": {"scale": (*layers, 16)}}


@network
def jax_gqa_decoder():
    def fn(p, ids):
        x = p["embed"][ids]
        for block in p["blocks"]:
            x = decoder_block(block, x)
        return rms_norm(p["norm"]["scale"], x) @ p["embed"].T

    blocks = [decoder_shapes(), decoder_shapes()]
    return from_shapes(
        fn,
        {"embed": (12, 16), "blocks": blocks, "norm": {"scale": (16,)}},
        (tokens(2, 6),),
        (("blocks/0/k", 1), ("blocks/0/q", 1), ("blocks/1/gate", 1), ("embed", 1)),
        (("embed", 0),),
    )


@network
def jax_repeat_kv_decoder():
    def fn(p, ids):
        x = p["embed"][ids]
        b, t, _ = x.shape
        q = (x @ p["q"]).reshape(b, t, 4, 4)
        k = jnp.repeat((x @ p["k"]).reshape(b, t, 2, 4), 2, axis=2)
        v = jnp.repeat((x @ p["v"]).reshape(b, t, 2, 4), 2, axis=2)
        return (x + attend(q, k, v).reshape(b, t, 16) @ p["o"]) @ p["head"]

    return from_shapes(
        fn,
        {
            "embed": (12, 16),
            "q": (16, 16),
            "k": (16, 8),
            "v": (16, 8),
            "o": (16, 16),
            "head": (16, 12),
        },
        (tokens(2, 6),),
        (("k", 1), ("q", 1), ("o", 0), ("embed", 1)),
        (("embed", 0), ("head", 1)),
    )


@network
def jax_rope_interleaved():
    def fn(p, ids):
        x = decoder_block(p["block"], p["embed"][ids], groups=4, interleaved=True)
        return x @ p["head"]

    return from_shapes(
        fn,
        {"embed": (12, 16), "block": decoder_shapes(groups=4), "head": (16, 12)},
        (tokens(2, 6),),
        (("block/q", 1), ("block/v", 1), ("block/up", 1), ("embed", 1)),
        (("embed", 0), ("head", 1)),
    )


@network
def jax_scan_decoder():
    def fn(p, ids):
        step = jax.checkpoint(lambda x, block: (decoder_block(block, x), None))
        x, _ = lax.scan(step, p["embed"][ids], p["blocks"])
        return rms_norm(p["norm"]["scale"], x) @ p["head"]

    return from_shapes(
        fn,
        {
            "embed": (12, 16),
            "blocks": decoder_shapes(3),
            "norm": {"scale": (16,)},
            "head": (16, 12),
        },
        (tokens(2, 6),),
        (("blocks/k", 2), ("blocks/gate", 2), ("blocks/down", 2), ("embed", 1)),
        (("embed", 0), ("head", 1)),
    )


@network
def linen_scan_remat():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return x + dense(nn.gelu(dense(nn.LayerNorm()(x), 32)), 16), None

    def body(_, ids):
        x = nn.Embed(12, 16)(ids)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="blocks")(x, None)
        return dense(nn.LayerNorm()(x), 12)

    return from_linen(
        body,
        (tokens(2, 6),),
        (
            ("params/blocks/Dense_0/kernel", 2),
            ("params/blocks/MultiHeadDotProductAttention_0/query/kernel", 2),
            ("params/Embed_0/embedding", 1),
        ),
        (("params/Embed_0/embedding", 0), ("params/Dense_0/kernel", 1)),
    )


@network
def nnx_text_classifier():
    def make(rngs):
        return {
            "embed": nnx.Embed(12, 16, rngs=rngs),
            "hidden": nnx.Linear(16, 16, rngs=rngs),
            "head": nnx.Linear(16, 3, rngs=rngs),
        }

    return from_nnx(
        make,
        lambda m, ids: m.head(nnx.relu(m.hidden(m.embed(ids).mean(1)))),
        (tokens(2, 7),),
        (("embed/embedding", 1), ("hidden/kernel", 1)),
        (("embed/embedding", 0), ("head/kernel", 1)),
    )


@network
def haiku_tied_language_model():
    def body(ids):
        embed = hk.Embed(12, 16)
        x = embed(ids)
        x = x + hk_linear(jax.nn.relu(hk_linear(x, 32)), 16)
        return x @ embed.embeddings.T

    return from_haiku(
        body,
        (tokens(2, 7),),
        (("params/embed/embeddings", 1), ("params/linear/w", 1), ("params/linear_1/w", 1)),
        (("params/embed/embeddings", 0),),
    )


@network
def nnx_llama():
    class Block(nnx.Module):
        def __init__(self, rngs):
            def project(n, m):
                return nnx.Linear(n, m, use_bias=False, rngs=rngs)

            self.norm0, self.norm1 = nnx.RMSNorm(16, rngs=rngs), nnx.RMSNorm(16, rngs=rngs)
            self.q, self.k, self.v = project(16, 16), project(16, 8), project(16, 8)
            self.o = project(16, 16)
            self.gate, self.up, self.down = project(16, 32), project(16, 32), project(32, 16)

        def __call__(self, x):
            b, t, _ = x.shape
            y = self.norm0(x)
            q = rotate(self.q(y).reshape(b, t, 4, 4), False)
            k = rotate(self.k(y).reshape(b, t, 2, 4), False)
            v = self.v(y).reshape(b, t, 2, 4)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.reshape(b, t, 16))
            y = self.norm1(x)
            return x + self.down(nnx.silu(self.gate(y)) * self.up(y))

    def make(rngs):
        return {
            "embed": nnx.Embed(12, 16, rngs=rngs),
            "blocks": nnx.List([Block(rngs), Block(rngs)]),
            "norm": nnx.RMSNorm(16, rngs=rngs),
        }

    def call(m, ids):
        x = m.embed(ids)
        for block in m.blocks:
            x = block(x)
        return m.embed.attend(m.norm(x))

    return from_nnx(
        make,
        call,
        (tokens(2, 6),),
        (
            ("blocks/0/k/kernel", 1),
            ("blocks/0/q/kernel", 1),
            ("blocks/1/gate/kernel", 1),
            ("embed/embedding", 1),
        ),
        (("embed/embedding", 0),),
    )
