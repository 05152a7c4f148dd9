"""Dense layers."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from ._build import (
    conv,
    dense,
    from_equinox,
    from_haiku,
    from_linen,
    from_nnx,
    from_shapes,
    layer,
    linear,
    network,
    normal,
)


@network
def linen_mlp():
    def body(_, x):
        return dense(nn.relu(dense(nn.relu(dense(x, 32)), 16)), 4)

    return from_linen(
        body,
        (normal(3, 8),),
        (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 0), ("params/Dense_1/bias", 0)),
        (("params/Dense_0/kernel", 0), ("params/Dense_2/kernel", 1), ("params/Dense_2/bias", 0)),
    )


@network
def equinox_mlp():
    return from_equinox(
        lambda keys: eqx.nn.MLP(8, 4, 16, 2, key=next(keys)),
        lambda model, x: model(x),
        (normal(3, 8),),
        (("layers/0/weight", 0), ("layers/1/weight", 1), ("layers/1/bias", 0)),
        (("layers/0/weight", 1), ("layers/2/weight", 0)),
    )


@network
def haiku_mlp():
    return from_haiku(
        lambda x: hk.nets.MLP([16, 16, 4])(x),
        (normal(3, 8),),
        (("params/mlp/~/linear_0/w", 1), ("params/mlp/~/linear_1/b", 0)),
        (("params/mlp/~/linear_0/w", 0), ("params/mlp/~/linear_2/w", 1)),
    )


@network
def jax_raw_linears():
    def fn(params, x):
        for p in params[:-1]:
            x = jax.nn.relu(x @ p["w"] + p["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return from_shapes(
        fn,
        [layer(8, 32), layer(32, 16), layer(16, 4)],
        (normal(3, 8),),
        (("0/w", 1), ("1/w", 0), ("1/b", 0)),
        (("0/w", 0), ("2/b", 0)),
    )


@network
def jax_einsum_params():
    def fn(p, x):
        h = jax.nn.gelu(jnp.einsum("btd,dhk->bhtk", x, p["in"]) + p["bias"])
        h = jax.nn.relu(jnp.einsum("bhtk,hkf->btf", h, p["mix"]))
        return jnp.einsum("btf,fc->bc", h, p["out"])

    return from_shapes(
        fn,
        {"in": (8, 4, 6), "bias": (4, 1, 6), "mix": (4, 6, 16), "out": (16, 3)},
        (normal(2, 5, 8),),
        (("in", 1), ("in", 2), ("mix", 2)),
        (("in", 0), ("out", 1)),
    )


@network
def nnx_glu_chunk():
    def make(rngs):
        return {"up": nnx.Linear(8, 32, rngs=rngs), "down": nnx.Linear(16, 4, rngs=rngs)}

    def call(m, x):
        value, gate = jnp.split(m.up(x), 2, axis=-1)
        return m.down(value * jax.nn.sigmoid(gate))

    return from_nnx(
        make,
        call,
        (normal(3, 8),),
        (("up/kernel", 1), ("down/kernel", 0)),
        (("up/kernel", 0), ("down/bias", 0)),
    )


@network
def linen_glu():
    def body(_, x):
        return dense(nn.glu(dense(nn.relu(dense(x, 16)), 32)), 4)

    return from_linen(
        body,
        (normal(3, 8),),
        (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 1)),
        (("params/Dense_2/kernel", 1),),
    )


@network
def linen_maxout():
    def body(_, x):
        x = dense(x, 48).reshape(-1, 16, 3).max(-1)
        x = dense(x, 32).reshape(-1, 2, 16).max(1)  # here the pieces come first
        return dense(x, 4)

    return from_linen(
        body,
        (normal(3, 8),),
        (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 0), ("params/Dense_1/kernel", 1)),
        (("params/Dense_2/kernel", 1),),
    )


@network
def jax_bilinear_flatten():
    def fn(p, x):
        a, b = jax.nn.relu(linear(p["a"], x)), jnp.tanh(linear(p["b"], x))
        return linear(p["head"], (a[:, :, None] * b[:, None, :]).reshape(len(x), -1))

    return from_shapes(
        fn,
        {"a": layer(8, 6), "b": layer(8, 5), "head": layer(30, 4)},
        (normal(3, 8),),
        (("a/w", 1), ("head/w", 0)),  # one factor of a merged axis, the larger
        (("a/w", 0), ("b/w", 1), ("head/w", 1)),
    )


@network
def jax_input_residual():
    def fn(p, x):
        return linear(p["head"], x + linear(p["down"], jax.nn.relu(linear(p["up"], x))))

    return from_shapes(
        fn,
        {"up": layer(8, 16), "down": layer(16, 8), "head": layer(8, 4)},
        (normal(3, 8),),
        (("up/w", 1), ("down/w", 0)),
        (("up/w", 0), ("down/w", 1), ("down/b", 0), ("head/w", 0)),
    )


@network
def jax_fourier_features():
    def fn(p, x):
        angles = 2 * jnp.pi * (x @ p["frequencies"])
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        return linear(p["head"], jax.nn.relu(linear(p["hidden"], x)))

    return from_shapes(
        fn,
        {"frequencies": (2, 8), "hidden": layer(16, 16), "head": layer(16, 3)},
        (normal(3, 2),),
        (("frequencies", 1), ("hidden/w", 0), ("hidden/w", 1)),
        (("frequencies", 0), ("head/w", 1)),
    )


@network
def jax_tied_layers():
    def fn(p, x):
        x = jax.nn.relu(linear(p["first"], x))
        for _ in range(2):
            x = jax.nn.relu(linear(p["shared"], x))
        return linear(p["head"], x)

    return from_shapes(
        fn,
        {"first": layer(8, 16), "shared": layer(16, 16), "head": layer(16, 4)},
        (normal(3, 8),),
        (("first/w", 1), ("shared/w", 0), ("shared/w", 1), ("head/w", 0)),
        (("first/w", 0), ("head/w", 1)),
    )


@network
def jax_tied_autoencoder():
    def fn(p, x):
        hidden = jax.nn.sigmoid(x @ p["w"] + p["b"])
        return hidden @ p["w"].T + p["out"]

    return from_shapes(
        fn,
        {"w": (8, 16), "b": (16,), "out": (8,)},
        (normal(3, 8),),
        (("w", 1), ("b", 0)),
        (("w", 0), ("out", 0)),
    )


@network
def nnx_siamese():
    def make(rngs):
        return {
            "encoder": nnx.Sequential(
                nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 12, rngs=rngs)
            ),
            "head": nnx.Linear(24, 1, rngs=rngs),
        }

    def call(m, left, right):
        left, right = m.encoder(left), m.encoder(right)
        return m.head(jnp.concatenate([jnp.abs(left - right), left * right], -1))

    return from_nnx(
        make,
        call,
        (normal(3, 8), normal(3, 8, seed=1)),
        (("encoder/layers/0/kernel", 1), ("encoder/layers/2/kernel", 1), ("head/kernel", 0)),
        (("encoder/layers/0/kernel", 0), ("head/kernel", 1)),
    )


@network
def linen_two_inputs_dict_output():
    def body(_, batch, features):
        x = nn.relu(conv(batch["image"], 8, (3, 3))).mean((1, 2))
        y = nn.relu(dense(features, 16))
        z = nn.relu(dense(jnp.concatenate([x, y], -1), 16))
        return {"class": dense(z, 3), "box": (nn.sigmoid(dense(z, 4)),)}

    return from_linen(
        body,
        ({"image": normal(2, 8, 8, 3)}, normal(2, 6)),
        (("params/Conv_0/kernel", 3), ("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 0)),
        (("params/Dense_2/kernel", 1), ("params/Dense_3/kernel", 1)),
    )


@network
def linen_bfloat16():
    def body(_, x):
        dtype = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        x = nn.relu(dense(x, 16, **dtype))
        x = nn.LayerNorm(**dtype)(x + dense(nn.gelu(dense(x, 32, **dtype)), 16, **dtype))
        return dense(x, 4, **dtype).astype(jnp.float32)

    return from_linen(
        body,
        (normal(3, 8),),
        (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 1)),
        (("params/Dense_0/kernel", 0), ("params/Dense_3/kernel", 1)),
    )


@network
def jax_sorted_channels():
    def fn(p, x):
        x = linear(p["mix"], jax.nn.relu(linear(p["first"], x)))
        largest, _ = lax.top_k(x, 4)
        return linear(p["head"], jnp.concatenate([largest, jnp.cumsum(x, -1)], -1))

    return from_shapes(
        fn,
        {"first": layer(8, 16), "mix": layer(16, 8), "head": layer(12, 4)},
        (normal(3, 8),),
        (("first/w", 1), ("mix/w", 0)),
        (("mix/w", 1), ("mix/b", 0), ("head/w", 1)),
    )
