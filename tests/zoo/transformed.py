"""Transformations inside the function: remat, vmap, custom derivatives, stopped gradients."""

import equinox as eqx
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
    hk_conv,
    hk_linear,
    layer,
    linear,
    network,
    normal,
)


def hidden_layers_net(act, wrap=lambda f: f):
    """A residual network whose block goes through ``wrap``."""

    def block(p, x):
        return x + linear(p["down"], act(linear(p["up"], x)))

    def fn(p, x):
        x = wrap(block)(p["block"], act(linear(p["first"], x)))
        return linear(p["head"], x)

    return from_shapes(
        fn,
        {
            "first": layer(8, 16),
            "block": {"up": layer(16, 32), "down": layer(32, 16)},
            "head": layer(16, 4),
        },
        (normal(3, 8),),
        (("first/w", 1), ("block/up/w", 1), ("block/down/w", 1)),
        (("first/w", 0), ("head/w", 1)),
    )


@network
def jax_checkpoint():
    return hidden_layers_net(jnp.tanh, jax.checkpoint)


@network
def jax_vmap():
    return hidden_layers_net(jax.nn.relu, lambda f: jax.vmap(f, in_axes=(None, 0)))


@network
def jax_jit_inside():
    return hidden_layers_net(jax.nn.silu, jax.jit)


@network
def jax_custom_jvp():
    @jax.custom_jvp
    def act(x):
        return jnp.maximum(x, 0.0) ** 2

    act.defjvps(lambda t, y, x: 2 * jnp.maximum(x, 0.0) * t)
    return hidden_layers_net(act)


@network
def jax_custom_vjp():
    @jax.custom_vjp
    def act(x):
        return x * jax.nn.sigmoid(1.7 * x)

    act.defvjp(lambda x: (act(x), x), lambda x, t: (t * jax.nn.sigmoid(1.7 * x),))
    return hidden_layers_net(act)


@network
def jax_vmapped_ensemble():
    def fn(p, x):
        return jax.vmap(lambda p: linear(p["head"], jnp.tanh(linear(p["first"], x))))(p).mean(0)

    return from_shapes(
        fn,
        {
            "first": {"w": (3, 8, 16), "b": (3, 16)},
            "head": {"w": (3, 16, 4), "b": (3, 4)},
        },
        (normal(3, 8),),
        (("first/w", 2), ("head/w", 1)),
        (("first/w", 1), ("head/w", 2)),
    )


@network
def haiku_frozen_backbone():
    def body(x):
        x = jax.nn.relu(hk_conv(x, 8, 3))
        x = lax.stop_gradient(jax.nn.relu(hk_conv(x, 16, 3, 2)).mean((1, 2)))
        return hk_linear(jax.nn.relu(hk_linear(x, 16)), 4)

    return from_haiku(
        body,
        (normal(2, 8, 8, 3),),
        (("params/conv2_d/w", 3), ("params/conv2_d_1/w", 3), ("params/linear/w", 1)),
        (("params/conv2_d/w", 2), ("params/linear_1/w", 1)),
    )


@network
def linen_detach_in_the_middle():
    def body(_, x):
        x = nn.relu(dense(x, 16))
        y = nn.relu(dense(lax.stop_gradient(x), 16))
        return dense(x + y, 4)

    return from_linen(
        body,
        (normal(3, 8),),
        (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 1)),
        (("params/Dense_0/kernel", 0), ("params/Dense_2/kernel", 1)),
    )


@network
def jax_mixture_of_experts():
    def fn(p, x):
        x = linear(p["embed"], x)
        gates = jax.nn.softmax(linear(p["router"], x))
        hidden = jax.nn.gelu(jnp.einsum("bd,edh->beh", x, p["up"]) + p["bias"])
        x = x + jnp.einsum("be,beh,ehd->bd", gates, hidden, p["down"])
        return linear(p["head"], x)

    return from_shapes(
        fn,
        {
            "embed": layer(8, 16),
            "router": layer(16, 3),
            "up": (3, 16, 24),
            "bias": (3, 24),
            "down": (3, 24, 16),
            "head": layer(16, 4),
        },
        (normal(3, 8),),
        (("up", 2), ("down", 1), ("embed/w", 1), ("router/w", 1), ("up", 0)),  # and experts
        (("embed/w", 0), ("head/w", 1)),
    )


@network
def equinox_mixer():
    def make(keys):
        return {
            "patches": eqx.nn.Linear(8, 16, key=next(keys)),
            "tokens": eqx.nn.MLP(6, 6, 12, 1, jax.nn.gelu, key=next(keys)),
            "channels": eqx.nn.MLP(16, 16, 32, 1, jax.nn.gelu, key=next(keys)),
            "head": eqx.nn.Linear(16, 4, key=next(keys)),
        }

    def call(m, x):
        x = jax.vmap(m["patches"])(x)
        x = x + jax.vmap(m["tokens"])(x.T).T
        x = x + jax.vmap(m["channels"])(x)
        return m["head"](x.mean(0))

    return from_equinox(
        make,
        call,
        (normal(2, 6, 8),),
        (
            ("patches/weight", 0),
            ("tokens/layers/0/weight", 0),
            ("channels/layers/0/weight", 0),
        ),
        (("patches/weight", 1), ("tokens/layers/0/weight", 1), ("head/weight", 0)),
    )


@network
def linen_mixer():
    def body(_, x):
        x = dense(x, 16)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + dense(nn.gelu(dense(y, 12)), 6).swapaxes(1, 2)
        x = x + dense(nn.gelu(dense(nn.LayerNorm()(x), 32)), 16)
        return dense(x.mean(1), 4)

    return from_linen(
        body,
        (normal(2, 6, 8),),
        # The bias of the tokens refills every channel, which the second norm sees.
        (("params/Dense_1/kernel", 1), ("params/Dense_3/kernel", 1), ("params/Dense_0/kernel", 1)),
        (("params/Dense_1/kernel", 0), ("params/Dense_5/kernel", 1)),
    )


@network
def jax_two_pass_layer_norm():
    """Removed features still move the variance: they differ from the mean."""

    def fn(p, x):
        x = linear(p["embed"], x)
        y = (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
        y = y * p["norm"]["scale"] + p["norm"]["bias"]
        x = x + linear(p["down"], jax.nn.relu(linear(p["up"], y)))
        return linear(p["head"], x)

    return from_shapes(
        fn,
        {
            "embed": layer(8, 16),
            "norm": {"scale": (16,), "bias": (16,)},
            "up": layer(16, 32),
            "down": layer(32, 16),
            "head": layer(16, 4),
        },
        (normal(3, 8),),
        (("up/w", 1), ("down/w", 0), ("embed/w", 1), ("norm/scale", 0)),
        (("embed/w", 0), ("head/w", 1)),
    )
