"""Recurrence and control flow."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ._build import (
    dense,
    from_equinox,
    from_haiku,
    from_linen,
    from_shapes,
    hk_linear,
    layer,
    linear,
    network,
    normal,
)


@network
def jax_lstm():
    def lstm(p, xs):
        def step(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["bias"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((xs.shape[1], p["h"].shape[0]))
        return lax.scan(step, (zeros, zeros), xs)[1]

    def fn(p, x):
        xs = lstm(p["layer1"], lstm(p["layer0"], x.swapaxes(0, 1)))
        return linear(p["head"], xs[-1])

    return from_shapes(
        fn,
        {
            "layer0": {"x": (5, 32), "h": (8, 32), "bias": (32,)},
            "layer1": {"x": (8, 48), "h": (12, 48), "bias": (48,)},
            "head": layer(12, 4),
        },
        (normal(2, 6, 5),),
        (("layer0/x", 1), ("layer0/h", 0), ("layer1/x", 0), ("layer1/h", 1)),
        (("layer0/x", 0), ("head/w", 1)),
    )


@network
def linen_lstm():
    def body(_, x):
        x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
        return dense(nn.RNN(nn.OptimizedLSTMCell(12))(x)[:, -1], 4)

    return from_linen(
        body,
        (normal(2, 6, 5),),
        (
            ("params/OptimizedLSTMCell_0/hi/kernel", 0),
            ("params/OptimizedLSTMCell_0/hi/kernel", 1),
            ("params/OptimizedLSTMCell_1/ii/kernel", 1),
        ),
        (("params/OptimizedLSTMCell_0/ii/kernel", 0), ("params/Dense_0/kernel", 1)),
    )


@network
def haiku_lstm():
    def body(x):
        core = hk.LSTM(8)
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
        return hk_linear(x.mean(1), 4)

    return from_haiku(
        body,
        (normal(2, 6, 5),),
        (("params/lstm/linear/w", 1), ("params/lstm/linear/b", 0), ("params/linear/w", 0)),
        (("params/linear/w", 1),),
    )


@network
def equinox_gru():
    def make(keys):
        return {
            "cell": eqx.nn.GRUCell(5, 8, key=next(keys)),
            "head": eqx.nn.Linear(8, 4, key=next(keys)),
        }

    def call(m, xs):
        h, _ = lax.scan(lambda h, x: (m["cell"](x, h), None), jnp.zeros(8), xs)
        return m["head"](h)

    return from_equinox(
        make,
        call,
        (normal(2, 6, 5),),
        (("cell/weight_ih", 0), ("cell/weight_hh", 1), ("head/weight", 1)),
        (("cell/weight_ih", 1), ("head/weight", 0)),
    )


def fixed_point_shapes():
    return {"first": layer(6, 16), "shared": layer(16, 16), "head": layer(16, 4)}


@network
def jax_fori_loop():
    def fn(p, x):
        x = linear(p["first"], x)
        z = lax.fori_loop(
            0, 4, lambda _, z: jnp.tanh(x + 0.3 * linear(p["shared"], z)), jnp.zeros_like(x)
        )
        return linear(p["head"], z)

    return from_shapes(
        fn,
        fixed_point_shapes(),
        (normal(3, 6),),
        (("first/w", 1), ("shared/w", 0), ("shared/w", 1), ("head/w", 0)),
        (("first/w", 0), ("head/w", 1)),
    )


@network
def jax_while_loop():
    def fn(p, x):
        x = linear(p["first"], x)

        def far(state):
            step, z, previous = state
            return (step < 20) & (jnp.linalg.norm(z - previous) > 1e-3)

        def refine(state):
            step, z, _ = state
            return step + 1, jnp.tanh(x + 0.3 * linear(p["shared"], z)), z

        _, z, _ = lax.while_loop(far, refine, (0, jnp.tanh(x), jnp.zeros_like(x)))
        return linear(p["head"], z)

    return from_shapes(
        fn,
        fixed_point_shapes(),
        (normal(3, 6),),
        (("first/w", 1), ("shared/w", 0), ("shared/w", 1), ("head/w", 0)),
        (("first/w", 0), ("head/w", 1)),
    )


@network
def jax_cond():
    def fn(p, x):
        def one(x):  # the inputs take both ways
            h = jax.nn.relu(linear(p["first"], x))
            return lax.cond(
                x[0] > 0,
                lambda h: linear(p["a"][1], jax.nn.relu(linear(p["a"][0], h))),
                lambda h: linear(p["b"], h),
                h,
            )

        return lax.map(one, x)

    return from_shapes(
        fn,
        {"first": layer(8, 16), "a": [layer(16, 12), layer(12, 4)], "b": layer(16, 4)},
        (normal(4, 8),),
        (("first/w", 1), ("a/0/w", 1), ("b/w", 0)),
        (("first/w", 0), ("a/1/w", 1), ("b/w", 1)),
    )
