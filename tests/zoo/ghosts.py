"""Networks that read across features which are not zero where they are masked, only equal."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from ._build import (
    conv,
    dense,
    from_haiku,
    from_linen,
    from_shapes,
    hk_linear,
    layer,
    linear,
    network,
    normal,
    tokens,
)

# Two-pass norms: the square of what differs from the mean.


def two_pass(p, x, axis=-1):
    x = (x - x.mean(axis, keepdims=True)) / jnp.sqrt(jnp.var(x, axis, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def norm(n):
    return {"scale": (n,), "bias": (n,)}


@network
def jax_layer_norm_lstm():
    def fn(p, x):
        def step(carry, x):
            h, c = carry
            gates = (
                two_pass(p["norm_x"], x @ p["x"]) + two_pass(p["norm_h"], h @ p["h"]) + p["bias"]
            )
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(two_pass(p["norm_c"], c))
            return (h, c), h

        start = jnp.broadcast_to(p["start"], (x.shape[1], 11))
        (_, c), hs = lax.scan(step, (start, jnp.zeros_like(start)), x)
        return linear(p["head"], hs), linear(p["head"], two_pass(p["norm_c"], jnp.cos(c)))

    return from_shapes(
        fn,
        {
            "x": (5, 44),
            "h": (11, 44),
            "bias": (44,),
            "start": (11,),
            "norm_x": norm(44),
            "norm_h": norm(44),
            "norm_c": norm(11),
            "head": layer(11, 3),
        },
        (normal(6, 2, 5),),
        (("x", 1), ("h", 0), ("h", 1), ("norm_c/scale", 0), ("start", 0)),
        (("x", 0), ("head/w", 1)),
    )


@network
def jax_neural_ode():
    """Steps of Euler until a time that is an input, in a `while` loop without its derivative."""

    def fn(p, x, end):
        def field(y):
            return linear(p["down"], jnp.tanh(linear(p["up"], two_pass(p["norm"], jnp.exp(y)))))

        def step(carry):
            t, y = carry
            return t + 0.25, y + 0.25 * field(y)

        _, y = lax.while_loop(lambda carry: carry[0] < end, step, (0.0, linear(p["first"], x)))
        return linear(p["head"], two_pass(p["norm"], jnp.exp(y)))

    return from_shapes(
        fn,
        {
            "first": layer(5, 11),
            "norm": norm(11),
            "up": layer(11, 17),
            "down": layer(17, 11),
            "head": layer(11, 3),
        },
        (normal(2, 5), jnp.float32(0.9)),
        (("first/w", 1), ("up/w", 1), ("norm/scale", 0)),
        (("first/w", 0), ("head/w", 1)),
    )


@network
def jax_rwkv():
    """Token shift, a decaying state of every head, and group norms of the heads."""

    def fn(p, ids):
        x = two_pass(p["norm0"], p["embed"][ids])
        previous = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        mixed = {n: x + (previous - x) * jax.nn.sigmoid(p["shift"][n]) for n in "rkv"}
        r, k, v = (jnp.einsum("btd,dhf->tbhf", mixed[n], p[n]) for n in "rkv")
        decay = jnp.exp(-jnp.exp(p["decay"]))

        def step(state, rkv):
            r, k, v = rkv
            pair = k[..., :, None] * v[..., None, :]
            y = jnp.einsum("bhf,bhfg->bhg", r, state + p["bonus"][..., None] * pair)
            return decay[..., None] * state + pair, y

        start = jnp.zeros((len(ids), *decay.shape, p["v"].shape[2]))
        _, y = lax.scan(step, start, (jax.nn.sigmoid(r), k, v))
        y = two_pass(p["norm_heads"], y)
        x = x + jnp.einsum("tbhg,hgd->btd", y, p["out"])
        y = two_pass(p["norm1"], x)
        x = x + jnp.square(jax.nn.relu(y @ p["up"])) @ p["down"]
        return linear(p["head"], two_pass(p["norm1"], x))

    return from_shapes(
        fn,
        {
            "embed": (12, 14),
            "norm0": norm(14),
            "shift": {n: (14,) for n in "rkv"},
            **{n: (14, 3, 5) for n in "rkv"},
            "decay": (3, 5),
            "bonus": (3, 5),
            "norm_heads": {"scale": (3, 5), "bias": (3, 5)},
            "out": (3, 5, 14),
            "norm1": norm(14),
            "up": (14, 23),
            "down": (23, 14),
            "head": layer(14, 12),
        },
        (tokens(2, 6),),
        (("embed", 1), ("r", 2), ("v", 2), ("v", 1), ("up", 1)),
        (("embed", 0), ("head/w", 1)),
    )


@network
def jax_mamba2():
    """A causal convolution, a selective scan of heads that share B and C, and a gated norm."""

    def fn(p, x):
        x = linear(p["embed"], x)
        y = two_pass(p["norm"], x)
        gate, inner, step = (jnp.einsum("btd,dhf->bthf", y, p[n]) for n in ("gate", "in", "step"))
        b, c = y @ p["B"], y @ p["C"]
        inner = jnp.pad(inner, ((0, 0), (2, 0), (0, 0), (0, 0)))
        inner = sum(p["conv"][i] * inner[:, i : i + x.shape[1]] for i in range(3)) + p["bias"]
        step = jax.nn.softplus(step + p["step_bias"])[..., 0]
        inner = jax.nn.silu(inner)

        def advance(state, now):
            decay, v, b, c = now
            state = decay[..., None, None] * state + v[..., None] * b[:, None, None]
            return state, jnp.einsum("bhfn,bn->bhf", state, c)

        steps = (jnp.exp(-step * jnp.exp(p["A"])), step[..., None] * inner, b, c)
        start = jnp.zeros((len(x), *inner.shape[2:], b.shape[-1]))
        _, z = lax.scan(advance, start, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), steps))
        z = jnp.moveaxis(z, 0, 1) + p["D"][:, None] * inner
        z = (z * jax.nn.silu(gate)).reshape(*x.shape[:2], -1)
        z = z * lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + 1e-5) * p["gain"]
        x = x + z @ p["out"]
        return linear(p["head"], two_pass(p["norm"], x))

    return from_shapes(
        fn,
        {
            "embed": layer(5, 13),
            "norm": norm(13),
            "gate": (13, 3, 7),
            "in": (13, 3, 7),
            "step": (13, 3, 1),
            "B": (13, 4),
            "C": (13, 4),
            "conv": (3, 3, 7),
            "bias": (3, 7),
            "step_bias": (3, 1),
            "A": (3,),
            "D": (3,),
            "gain": (21,),
            "out": (21, 13),
            "head": layer(13, 3),
        },
        (normal(2, 6, 5),),
        (("embed/w", 1), ("in", 2), ("B", 1), ("out", 0)),
        (("embed/w", 0), ("head/w", 1)),
    )


# Weight standardisation: of a kernel, with zeros for a removed input channel.


def standardised(w):
    return (w - w.mean((0, 1, 2))) * lax.rsqrt(jnp.var(w, (0, 1, 2)) + 1e-4)


@network
def haiku_nf_net():
    def ws_conv(name, x, features, kernel=3, groups=1):
        shape = (kernel, kernel, x.shape[-1] // groups, features)
        w = hk.get_parameter(f"{name}_w", shape, init=jnp.zeros)
        gain = hk.get_parameter(f"{name}_gain", (features,), init=jnp.ones)
        bias = hk.get_parameter(f"{name}_b", (features,), init=jnp.zeros)
        return bias + lax.conv_general_dilated(
            x, standardised(w) * gain, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    def body(x):
        x = ws_conv("stem", x, 10)
        for i in range(2):
            y = 1.7 * jax.nn.gelu(x)
            y = jax.nn.gelu(ws_conv(f"in{i}", y, 12, 1))
            y = jax.nn.gelu(ws_conv(f"mid{i}", y, 12, 3, groups=3))
            y = ws_conv(f"out{i}", y, 10, 1)
            gate = hk_linear(jax.nn.relu(hk_linear(y.mean((1, 2)), 7)), 10)
            skip = hk.get_parameter(f"skip{i}", (), init=jnp.ones)
            x = x + 0.2 * skip * y * 2 * jax.nn.sigmoid(gate)[:, None, None]
        return hk_linear(jax.nn.gelu(ws_conv("last", x, 13, 1)).mean((1, 2)), 4)

    return from_haiku(
        body,
        (normal(2, 6, 6, 3),),
        (("params/~/stem_w", 3), ("params/~/mid0_w", 2), ("params/~/last_w", 3)),
        (("params/~/stem_w", 2), ("params/linear_4/w", 1)),
    )


@network
def linen_hybrid_vit():
    class StdConv(nn.Conv):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return standardised(value) if name == "kernel" else value

    def body(_, x):
        x = StdConv(12, (3, 3), use_bias=False)(x)
        for _ in range(2):
            y = nn.relu(nn.GroupNorm(3)(x))
            y = nn.relu(nn.GroupNorm(3)(StdConv(12, (3, 3), use_bias=False)(y)))
            x = x + StdConv(12, (1, 1), use_bias=False)(y)
        x = conv(nn.relu(nn.GroupNorm(3)(x)), 14, (2, 2), (2, 2)).reshape(len(x), -1, 14)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        x = x + dense(nn.gelu(dense(nn.LayerNorm()(x), 23)), 14)
        return dense(nn.LayerNorm()(x).mean(1), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/StdConv_0/kernel", 3),
            ("params/StdConv_1/kernel", 3),
            ("params/Conv_0/kernel", 3),
        ),
        (("params/StdConv_0/kernel", 2), ("params/Dense_2/kernel", 1)),
    )


# Messages of a graph, and experts.


@network
def linen_graph_network():
    senders, receivers = np.array([0, 1, 2, 3, 4, 4, 2]), np.array([1, 2, 3, 4, 0, 2, 0])

    def body(_, nodes, edges):
        nodes, edges = dense(nodes, 11), dense(edges, 9)
        for _ in range(2):
            both = jnp.concatenate([edges, nodes[senders], nodes[receivers]], -1)
            edges = nn.LayerNorm(use_fast_variance=False)(nn.relu(dense(both, 9)) + edges)
            weights = jnp.exp(dense(edges, 1))
            received = jax.ops.segment_sum(weights * dense(edges, 11), receivers, 5)
            received = received / jax.ops.segment_sum(weights, receivers, 5)
            nodes = nn.LayerNorm(use_fast_variance=False)(nodes + received)
        return dense(nn.softmax(dense(nodes, 10)), 3)

    return from_linen(
        body,
        (normal(5, 4), normal(7, 3, seed=1)),
        (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 1)),
        (("params/Dense_0/kernel", 0), ("params/Dense_1/kernel", 0)),
    )
