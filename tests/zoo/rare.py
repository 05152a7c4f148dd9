"""Rarer programs."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ._build import (
    from_equinox,
    from_haiku,
    from_nnx,
    from_shapes,
    hk_conv,
    hk_linear,
    layer,
    linear,
    network,
    normal,
)


@network
def jax_lora():
    def fn(p, x):
        x = jax.nn.relu(x @ p["w0"] + 0.5 * (x @ p["down0"]) @ p["up0"])
        return x @ p["w1"] + 0.5 * (x @ p["down1"]) @ p["up1"]

    return from_shapes(
        fn,
        {
            "w0": (8, 16),
            "down0": (8, 4),
            "up0": (4, 16),
            "w1": (16, 4),
            "down1": (16, 3),
            "up1": (3, 4),
        },
        (normal(3, 8),),
        (("w0", 1), ("up0", 1), ("down0", 1), ("down1", 0)),
        (("down0", 0), ("w1", 1), ("up1", 1)),
    )


@network
def jax_weight_norm_cosine_head():
    def fn(p, x):
        w = p["v"] * lax.rsqrt(jnp.sum(p["v"] ** 2, 0) + 1e-6) * p["scale"]
        x = jax.nn.relu(x @ w)
        x = jax.nn.relu(linear(p["hidden"], x))
        x = x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)
        return 8.0 * x @ p["head"]

    return from_shapes(
        fn,
        {"v": (8, 16), "scale": (16,), "hidden": layer(16, 16), "head": (16, 4)},
        (normal(3, 8),),
        (("v", 1), ("scale", 0), ("hidden/w", 1), ("head", 0)),
        (("v", 0), ("head", 1)),
    )


@network
def jax_hypernetwork():
    def fn(p, x, condition):
        h = jax.nn.silu(linear(p["hidden"], condition))
        w = linear(p["weights"], h).reshape(-1, 8, 12)
        return linear(p["head"], jnp.tanh(jnp.einsum("bi,bij->bj", x, w)))

    return from_shapes(
        fn,
        {"hidden": layer(5, 16), "weights": layer(16, 96), "head": layer(12, 4)},
        (normal(3, 8), normal(3, 5, seed=1)),
        (("hidden/w", 1), ("weights/w", 1), ("head/w", 0)),
        (("hidden/w", 0), ("head/w", 1)),
    )


@network
def jax_state_space():
    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    def fn(p, x):
        x, gate = jnp.split(linear(p["input"], x), 2, -1)
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), x.shape)
        _, x = lax.associative_scan(combine, (decay, x), axis=1)
        return linear(p["head"], x * jax.nn.silu(gate))

    return from_shapes(
        fn,
        {"input": layer(5, 24), "decay": (12,), "head": layer(12, 4)},
        (normal(2, 6, 5),),
        (("input/w", 1), ("decay", 0), ("head/w", 0)),
        (("input/w", 0), ("head/w", 1)),
    )


@network
def jax_linear_attention():
    def fn(p, x):
        q, k, v = (jnp.einsum("btd,dhf->bthf", x, p[name]) for name in ("q", "k", "v"))
        q, k = jax.nn.relu(q), jax.nn.relu(k)
        memory = jnp.einsum("bthf,bthg->bhfg", k, v)
        total = jnp.einsum("bthf,bhf->bth", q, k.sum(1))
        y = jnp.einsum("bthf,bhfg->bthg", q, memory) / (total[..., None] + 1.0)
        return jnp.einsum("bthg,hgc->btc", y, p["out"])

    return from_shapes(
        fn,
        {"q": (8, 4, 6), "k": (8, 4, 6), "v": (8, 4, 5), "out": (4, 5, 3)},
        (normal(2, 6, 8),),
        (("q", 1), ("q", 2), ("v", 2), ("out", 0)),
        (("q", 0), ("out", 2)),
    )


@network
def nnx_inception():
    def make(rngs):
        return {
            "a": nnx.Conv(3, 8, (1, 1), rngs=rngs),
            "b0": nnx.Conv(3, 6, (1, 1), rngs=rngs),
            "b1": nnx.Conv(6, 10, (3, 3), rngs=rngs),
            "c": nnx.Conv(3, 4, (1, 1), rngs=rngs),
            "head": nnx.Linear(25, 4, rngs=rngs),
        }

    def call(m, x):
        pooled = nnx.max_pool(x, (3, 3), (1, 1), "SAME")
        branches = [m.a(x), m.b1(nnx.relu(m.b0(x))), m.c(pooled), pooled]
        return m.head(nnx.relu(jnp.concatenate(branches, -1)).mean((1, 2)))

    return from_nnx(
        make,
        call,
        (normal(2, 8, 8, 3),),
        (("a/kernel", 3), ("b0/kernel", 3), ("b1/kernel", 3), ("head/kernel", 0)),
        (("a/kernel", 2), ("c/kernel", 2), ("head/kernel", 1)),
    )


@network
def nnx_lstm():
    def make(rngs):
        cell = nnx.OptimizedLSTMCell(5, 8, rngs=rngs, keep_rngs=False)
        return {"rnn": nnx.RNN(cell), "head": nnx.Linear(8, 4, rngs=rngs)}

    def call(m, x):
        zeros = jnp.zeros((len(x), 8))
        return m.head(m.rnn(x, initial_carry=(zeros, zeros))[:, -1])

    return from_nnx(
        make,
        call,
        (normal(2, 6, 5),),
        (("rnn/cell/dense_h/kernel", 0), ("rnn/cell/dense_i/kernel", 1), ("head/kernel", 0)),
        (("rnn/cell/dense_i/kernel", 0), ("head/kernel", 1)),
    )


@network
def nnx_scan_layers():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.up = nnx.Linear(16, 32, rngs=rngs)
            self.down = nnx.Linear(32, 16, rngs=rngs)

    def make(rngs):
        blocks = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(rngs.params(), 3))
        return {
            "first": nnx.Linear(8, 16, rngs=rngs),
            "blocks": blocks,
            "head": nnx.Linear(16, 4, rngs=rngs),
        }

    def call(m, x):
        def step(x, block):
            return x + block.down(nnx.gelu(block.up(block.norm(x))))

        return m.head(
            nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(m.first(x), m.blocks)
        )

    return from_nnx(
        make,
        call,
        (normal(3, 8),),
        (("blocks/up/kernel", 2), ("blocks/down/kernel", 2), ("first/kernel", 1)),
        (("first/kernel", 0), ("head/kernel", 1)),
    )


@network
def haiku_layer_stack():
    def block(x):
        y = hk.RMSNorm(-1)(x)
        return x + hk_linear(jax.nn.gelu(hk_linear(y, 32)), 16)

    return from_haiku(
        lambda x: hk_linear(hk.experimental.layer_stack(3)(block)(hk_linear(x, 16)), 4),
        (normal(3, 8),),
        (("params/linear/w", 1), ("params/__layer_stack_no_per_layer/linear/w", 2)),
        (("params/linear/w", 0), ("params/linear_1/w", 1)),
    )


@network
def haiku_deconv():
    def body(x):
        x = jax.nn.relu(hk.Conv2DTranspose(8, 3, 2)(x))
        return hk_conv(jax.nn.relu(hk.Conv2DTranspose(12, 3, 2)(x)), 3, 3)

    return from_haiku(
        body,
        (normal(2, 4, 4, 3),),
        (("params/conv2_d_transpose/w", 2), ("params/conv2_d_transpose_1/w", 2)),
        (("params/conv2_d_transpose/w", 3), ("params/conv2_d/w", 3)),
    )


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.RMSNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.norm = eqx.nn.RMSNorm(16)
        self.up = eqx.nn.Linear(16, 32, key=up)
        self.down = eqx.nn.Linear(32, 16, key=down)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


@network
def equinox_scan_layers():
    def make(keys):
        return {
            "first": eqx.nn.Linear(8, 16, key=next(keys)),
            "blocks": eqx.filter_vmap(EquinoxBlock)(jax.random.split(next(keys), 3)),
            "head": eqx.nn.Linear(16, 4, key=next(keys)),
        }

    def call(m, x):
        stacked, static = eqx.partition(m["blocks"], eqx.is_array)
        step = jax.checkpoint(lambda x, block: (eqx.combine(block, static)(x), None))
        return m["head"](lax.scan(step, m["first"](x), stacked)[0])

    return from_equinox(
        make,
        call,
        (normal(3, 8),),
        (("blocks/up/weight", 1), ("blocks/down/weight", 1), ("first/weight", 0)),
        (("first/weight", 1), ("head/weight", 0)),
    )


@network
def equinox_group_norm():
    def make(keys):
        return [
            eqx.nn.Conv2d(3, 16, 3, padding=1, key=next(keys)),
            eqx.nn.GroupNorm(4, 16),
            eqx.nn.PReLU(0.25),
            eqx.nn.Conv2d(16, 4, 1, key=next(keys)),
        ]

    def call(m, x):
        for f in m:
            x = f(x)
        return x.mean((1, 2))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (("0/weight", 0), ("1/weight", 0), ("3/weight", 1)),  # whole groups, at least
        (("0/weight", 1), ("3/weight", 0)),
    )


@network
def equinox_feature_pyramid():
    def make(keys):
        return {
            "fine": eqx.nn.Conv2d(3, 8, 3, padding=1, key=next(keys)),
            "coarse": eqx.nn.Conv2d(8, 16, 3, 2, padding=1, key=next(keys)),
            "lateral": eqx.nn.Conv2d(8, 12, 1, key=next(keys)),
            "top": eqx.nn.Conv2d(16, 12, 1, key=next(keys)),
            "head": eqx.nn.Conv2d(12, 2, 3, padding=1, key=next(keys)),
        }

    def call(m, x):
        fine = jax.nn.relu(m["fine"](x))
        top = m["top"](jax.nn.relu(m["coarse"](fine)))
        nearest = jax.image.resize(top, (12, 8, 8), "nearest")
        smooth = jax.image.resize(top, (12, 8, 8), "bilinear")
        return m["head"](jax.nn.relu(m["lateral"](fine) + nearest + smooth)), m["head"](top)

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (("fine/weight", 0), ("coarse/weight", 0), ("lateral/weight", 0), ("head/weight", 1)),
        (("fine/weight", 1), ("head/weight", 0)),
    )
