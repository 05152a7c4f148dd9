"""Small networks of every shape that structured pruning must handle, with what may leave them.

Each row names leaves that must have removable units and leaves that must have none; nothing here
knows `jaxprune`. Parameters are drawn from a fixed key, running statistics, scales and biases too,
so that a mistake in any of them shows in the output.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

Pairs = tuple[tuple[str, int], ...]  # (path of a leaf, axis)
KEY = jax.random.key(0)


class Net(NamedTuple):
    fn: Callable[..., Any]  # fn(params, *inputs), in evaluation mode
    params: Any
    inputs: tuple[Any, ...]
    prunable: Pairs  # must have removable units
    pinned: Pairs = ()  # must have none


NETWORKS: dict[str, Callable[[], Net]] = {}


def network(build: Callable[[], Net]) -> Callable[[], Net]:
    NETWORKS[build.__name__] = build
    return build


def randomize(params: Any, key: jax.Array = KEY) -> Any:
    """Draws every floating leaf anew; leaves may be arrays or ``jax.ShapeDtypeStruct``."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def draw(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/").removesuffix("/value")
        name, shape = path.split("/")[-1], leaf.shape
        is_vector = math.prod(shape) == max(shape, default=1)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            value = np.zeros(shape)
        elif "var" in path or name == "scale" or (name == "weight" and is_vector):
            value = rng.uniform(0.5, 1.5, shape)
        elif is_vector or name in ("b", "bias", "offset"):
            value = 0.3 * rng.standard_normal(shape)
        else:
            outputs = shape[0] if name.startswith("weight") else shape[-1]
            value = rng.standard_normal(shape) * math.sqrt(2 * outputs / math.prod(shape))
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens(*shape: int, vocabulary: int = 12) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, vocabulary, shape), jnp.int32)


def user_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Allows rank promotion, as in the code that users write: the tests forbid it."""

    def wrapped(params, *inputs):
        with jax.numpy_rank_promotion("allow"):
            return fn(params, *inputs)

    return wrapped


def net(fn, shapes, inputs, prunable, pinned=()):
    return Net(user_code(fn), randomize(shapes), inputs, prunable, pinned)


class Compact(nn.Module):
    body: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs):
        return self.body(self, *inputs)


def from_linen(body, inputs, prunable, pinned=()):
    """``body(module, *inputs)`` makes its layers as it goes; paths start with the collection."""
    module = Compact(body)
    with jax.numpy_rank_promotion("allow"):
        variables = jax.eval_shape(module.init, KEY, *inputs)
    return net(module.apply, variables, inputs, prunable, pinned)


def from_nnx(make, call, inputs, prunable, pinned=()):
    """``make(rngs)`` gives a dict of layers, which ``call(layers, *inputs)`` applies."""
    model = nnx.eval_shape(lambda: nnx.Dict(make(nnx.Rngs(0))))
    graph, state, rngs = nnx.split(model, nnx.Not(nnx.RngState), ...)
    return net(lambda s, *x: call(nnx.merge(graph, s, rngs), *x), state, inputs, prunable, pinned)


def from_equinox(make, call, inputs, prunable, pinned=()):
    """``make(keys)`` gives modules; ``call(modules, *inputs)`` sees one example."""
    model = eqx.filter_eval_shape(lambda key: make(iter(jax.random.split(key, 16))), KEY)
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def fn(params, *inputs):
        return jax.vmap(lambda *x: call(eqx.combine(params, static), *x))(*inputs)

    return net(fn, params, inputs, prunable, pinned)


def from_haiku(body, inputs, prunable, pinned=()):
    """``params`` is ``{"params", "state"}``; module names may hold slashes."""
    model = hk.transform_with_state(body)
    with jax.numpy_rank_promotion("allow"):
        params, state = jax.eval_shape(model.init, KEY, *inputs)

    def fn(variables, *inputs):
        return model.apply(variables["params"], variables["state"], None, *inputs)[0]

    return net(fn, {"params": params, "state": state}, inputs, prunable, pinned)


def from_shapes(fn, shapes, inputs, prunable, pinned=(), dtype=jnp.float32):
    """``shapes`` is the tree of params with a tuple for each leaf."""
    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return net(fn, tree, inputs, prunable, pinned)


def linear(p, x):
    return x @ p["w"] + p["b"]


def layer(n, m):
    return {"w": (n, m), "b": (m,)}


def rms_norm(scale, x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def attend(q, k, v):
    """Attention over ``(batch, tokens, heads, features)``."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


# Layers that Flax and Haiku number in the order of use, as an inner call is evaluated first.


def dense(x, features, **options):
    return nn.Dense(features, **options)(x)


def conv(x, features, *options, **more):
    return nn.Conv(features, *options, **more)(x)


def hk_linear(x, features):
    return hk.Linear(features)(x)


def hk_conv(x, features, *options, **more):
    return hk.Conv2D(features, *options, **more)(x)


def batch_norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


def conv_bn(x, features, kernel=3, stride=1, groups=1, act=nn.relu):
    x = conv(x, features, (kernel, kernel), stride, feature_group_count=groups, use_bias=False)
    return act(batch_norm(x))


def identity(x):
    return x


# Dense layers


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


# Convolutions


@network
def linen_lenet():
    def body(_, x):
        x = nn.max_pool(nn.relu(conv(x, 8, (3, 3))), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(conv(x, 16, (3, 3))), (2, 2), (2, 2))
        x = nn.relu(dense(x.reshape(len(x), -1), 32))
        return dense(x, 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/Conv_1/kernel", 3), ("params/Dense_0/kernel", 0)),
        (("params/Conv_0/kernel", 2), ("params/Conv_0/kernel", 0), ("params/Dense_1/kernel", 1)),
    )


@network
def equinox_lenet():
    def make(keys):
        return {
            "conv0": eqx.nn.Conv2d(3, 8, 3, padding=1, key=next(keys)),
            "conv1": eqx.nn.Conv2d(8, 16, 3, key=next(keys)),
            "pool": eqx.nn.MaxPool2d(2, 2),
            "dense": eqx.nn.Linear(64, 16, key=next(keys)),
            "head": eqx.nn.Linear(16, 4, key=next(keys)),
        }

    def call(m, x):
        x = m["pool"](jax.nn.relu(m["conv0"](x)))
        x = jax.nn.relu(m["conv1"](x)).ravel()
        return m["head"](jax.nn.relu(m["dense"](x)))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (("conv0/weight", 0), ("conv1/weight", 0), ("conv1/bias", 0), ("dense/weight", 1)),
        (("conv0/weight", 1), ("head/weight", 0)),
    )


@network
def linen_permute_flatten():
    def body(_, x):
        x = nn.relu(conv(x, 8, (3, 3), 2))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first, as in ported weights
        return dense(nn.relu(dense(x, 16)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/Dense_0/kernel", 0)),
        (("params/Conv_0/kernel", 2), ("params/Dense_1/bias", 0)),
    )


@network
def jax_nchw_permute_flatten():
    def fn(p, x):
        x = lax.conv_general_dilated(x, p["conv"], (2, 2), "SAME") + p["bias"][None, :, None, None]
        x = jax.nn.relu(x).transpose(0, 2, 3, 1).reshape(len(x), -1)
        return linear(p["head"], jax.nn.relu(linear(p["dense"], x)))

    return from_shapes(
        fn,
        {
            "conv": (8, 3, 3, 3),
            "bias": (8,),
            "dense": layer(128, 16),
            "head": layer(16, 4),
        },
        (normal(2, 3, 8, 8),),
        (("conv", 0), ("dense/w", 0)),
        (("conv", 1), ("conv", 2), ("head/w", 1)),
    )


@network
def linen_vgg_bn():
    def body(_, x):
        for width in (8, 16, 16):
            x = nn.relu(batch_norm(conv(x, width, (3, 3))))
        return dense(nn.max_pool(x, (2, 2), (2, 2)).mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_2/bias", 0),
            ("batch_stats/BatchNorm_1/mean", 0),
            ("params/Dense_0/kernel", 0),
        ),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def haiku_vgg_bn():
    def body(x):
        for width in (8, 16):
            x = hk_conv(x, width, 3, with_bias=False)
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, hk.running_init()))
        x = hk.AvgPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID")(x)
        return hk_linear(hk.Flatten()(x), 4)

    return from_haiku(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/conv2_d/w", 3),
            ("params/batch_norm/scale", 3),
            ("state/batch_norm_1/~/var_ema/average", 3),
            ("params/linear/w", 0),
        ),
        (("params/conv2_d/w", 2), ("params/linear/w", 1)),
    )


@network
def linen_resnet_basic():
    def block(x, width, stride):
        y = conv_bn(conv_bn(x, width, 3, stride), width, act=identity)
        if y.shape != x.shape:
            x = conv_bn(x, width, 1, stride, act=identity)
        return nn.relu(x + y)

    def body(_, x):
        x = conv_bn(x, 8)
        x = block(block(x, 8, 1), 16, 2)
        return dense(x.mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_1/kernel", 3),
            ("params/Conv_5/kernel", 3),
            ("batch_stats/BatchNorm_5/var", 0),
        ),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def nnx_resnet_basic():
    class Block(nnx.Module):
        def __init__(self, n, m, stride, rngs):
            self.conv0 = nnx.Conv(n, m, (3, 3), stride, rngs=rngs)
            self.conv1 = nnx.Conv(m, m, (3, 3), rngs=rngs)
            self.shortcut = nnx.Conv(n, m, (1, 1), stride, rngs=rngs)
            self.norm0, self.norm1, self.norm2 = (
                nnx.BatchNorm(m, use_running_average=True, rngs=rngs) for _ in range(3)
            )

        def __call__(self, x):
            y = self.norm1(self.conv1(nnx.relu(self.norm0(self.conv0(x)))))
            return nnx.relu(y + self.norm2(self.shortcut(x)))

    def make(rngs):
        return {
            "blocks": nnx.List([Block(3, 8, 1, rngs), Block(8, 16, 2, rngs)]),
            "head": nnx.Linear(16, 4, rngs=rngs),
        }

    def call(m, x):
        for block in m.blocks:
            x = block(x)
        return m.head(x.mean((1, 2)))

    return from_nnx(
        make,
        call,
        (normal(2, 8, 8, 3),),
        (
            ("blocks/0/conv0/kernel", 3),
            ("blocks/0/norm2/mean", 0),
            ("blocks/1/shortcut/kernel", 2),
            ("head/kernel", 0),
        ),
        (("blocks/0/shortcut/kernel", 2), ("head/kernel", 1)),
    )


@network
def haiku_resnet_blocks():
    def body(x):
        config = {"decay_rate": 0.9, "create_scale": True, "create_offset": True}
        x = hk_conv(x, 8, 3)
        for width, stride in ((8, 1), (16, 2)):
            block = hk.nets.ResNet.BlockV1(width, stride, stride > 1, config, False)
            x = block(x, hk.running_init(), test_local_stats=False)
        return hk_linear(x.mean((1, 2)), 4)

    return from_haiku(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/conv2_d/w", 3),
            ("params/block_v1/~/conv_0/w", 3),
            ("params/block_v1_1/~/shortcut_conv/w", 3),
        ),
        (("params/conv2_d/w", 2), ("params/linear/w", 1)),
    )


@network
def linen_resnet_bottleneck():
    def body(_, x):
        x = conv_bn(x, 16)
        for stride in (1, 2):
            y = conv_bn(conv_bn(x, 8, 1), 8, 3, stride)
            y = conv_bn(y, 16 * stride, 1, act=identity)
            x = x if stride == 1 else conv_bn(x, 32, 1, 2, act=identity)
            x = nn.relu(x + y)
        return dense(x.mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_1/kernel", 3),
            ("params/Conv_2/kernel", 3),
            ("params/Conv_7/kernel", 3),
        ),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def linen_resnext():
    def body(_, x):
        x = conv_bn(x, 16)
        y = conv_bn(conv_bn(x, 16, 1), 16, 3, 1, groups=4)
        x = nn.relu(x + conv_bn(y, 16, 1, act=identity))
        return dense(x.mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_1/kernel", 3), ("params/Conv_2/kernel", 3), ("params/Conv_3/kernel", 3)),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def equinox_grouped_conv():
    def make(keys):
        return [
            eqx.nn.Conv2d(3, 12, 3, 2, key=next(keys)),
            eqx.nn.Conv2d(12, 24, 3, groups=3, key=next(keys)),
            eqx.nn.Conv2d(24, 4, 1, key=next(keys)),
        ]

    def call(m, x):
        return m[2](jax.nn.silu(m[1](jax.nn.silu(m[0](x))))).mean((1, 2))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (("0/weight", 0), ("1/weight", 0), ("2/weight", 1)),
        (("0/weight", 1), ("2/weight", 0)),
    )


@network
def linen_densenet():
    def body(_, x):
        x = conv(x, 8, (3, 3))
        for _ in range(3):
            x = jnp.concatenate([x, conv(nn.relu(batch_norm(x)), 4, (3, 3))], -1)
        return dense(nn.relu(batch_norm(x)).mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_2/kernel", 3),
            ("params/Conv_3/kernel", 2),
            ("params/BatchNorm_3/scale", 0),
        ),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def linen_mobilenet_v2():
    def body(_, x):
        x = conv_bn(x, 8, 3, 2, act=nn.relu6)
        y = conv_bn(conv_bn(x, 32, 1, act=nn.relu6), 32, 3, groups=32, act=nn.relu6)
        x = x + conv_bn(y, 8, 1, act=identity)
        return dense(x.mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_1/kernel", 3),
            ("params/Conv_2/kernel", 3),
            ("params/Conv_3/kernel", 2),
        ),
        (("params/Conv_2/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def haiku_depthwise_multiplier():
    def body(x):
        x = jax.nn.relu(hk_conv(x, 8, 3))
        x = jax.nn.relu(hk.DepthwiseConv2D(2, 3)(x))
        return hk_conv(x, 4, 1).mean((1, 2))

    return from_haiku(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/conv2_d/w", 3),
            ("params/depthwise_conv2_d/w", 3),
            ("params/conv2_d_1/w", 2),
        ),
        (("params/conv2_d/w", 2), ("params/conv2_d_1/w", 3)),
    )


@network
def nnx_depthwise_multiplier():
    def make(rngs):
        return {
            "first": nnx.Conv(3, 8, (3, 3), rngs=rngs),
            "depthwise": nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs),
            "norm": nnx.BatchNorm(16, use_running_average=True, rngs=rngs),
            "head": nnx.Linear(16, 4, rngs=rngs),
        }

    def call(m, x):
        return m.head(nnx.relu(m.norm(m.depthwise(nnx.relu(m.first(x))))).mean((1, 2)))

    return from_nnx(
        make,
        call,
        (normal(2, 8, 8, 3),),
        (("first/kernel", 3), ("depthwise/kernel", 3), ("norm/var", 0)),
        (("first/kernel", 2), ("depthwise/kernel", 2), ("head/kernel", 1)),
    )


@network
def linen_squeeze_excitation():
    def body(_, x):
        x = conv_bn(x, 16)
        gate = dense(nn.silu(dense(x.mean((1, 2)), 8)), 16)
        x = x * nn.sigmoid(gate)[:, None, None, :]
        return dense(nn.relu(conv(x, 8, (3, 3))).mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 1)),
        (("params/Conv_0/kernel", 2), ("params/Dense_2/kernel", 1)),
    )


@network
def linen_unet():
    def body(_, x):
        skip = conv_bn(x, 8)
        x = conv_bn(nn.max_pool(skip, (2, 2), (2, 2)), 16)
        x = nn.relu(nn.ConvTranspose(12, (2, 2), (2, 2))(x))
        return conv(conv_bn(jnp.concatenate([skip, x], -1), 8), 2, (1, 1))

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_1/kernel", 3),
            ("params/ConvTranspose_0/kernel", 3),
            ("params/Conv_2/kernel", 2),
        ),
        (("params/Conv_0/kernel", 2), ("params/Conv_3/kernel", 3)),
    )


@network
def equinox_unet():
    def make(keys):
        return {
            "down": eqx.nn.Conv2d(3, 8, 3, padding=1, key=next(keys)),
            "middle": eqx.nn.Conv2d(8, 16, 3, 2, padding=1, key=next(keys)),
            "up": eqx.nn.ConvTranspose2d(16, 8, 2, 2, key=next(keys)),
            "out": eqx.nn.Conv2d(16, 2, 1, key=next(keys)),
        }

    def call(m, x):
        skip = jax.nn.relu(m["down"](x))
        x = jax.nn.relu(m["up"](jax.nn.relu(m["middle"](skip))))
        return m["out"](jnp.concatenate([x, skip]))

    return from_equinox(
        make,
        call,
        (normal(2, 3, 8, 8),),
        (("down/weight", 0), ("middle/weight", 0), ("up/bias", 0), ("out/weight", 1)),
        (("down/weight", 1), ("out/weight", 0)),
    )


@network
def linen_group_norm():
    def body(_, x):
        x = nn.relu(nn.GroupNorm(4)(conv(x, 16, (3, 3))))
        x = nn.relu(nn.GroupNorm(2)(conv(x, 16, (3, 3), 2)))
        return dense(x.mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/Conv_1/kernel", 3), ("params/GroupNorm_1/bias", 0)),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def linen_instance_norm():
    def body(_, x):
        x = nn.relu(nn.InstanceNorm()(conv(x, 8, (3, 3))))
        x = nn.relu(nn.InstanceNorm()(conv(x, 16, (3, 3), 2)))
        return conv(x, 4, (1, 1))

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/InstanceNorm_1/scale", 0)),
        (("params/Conv_0/kernel", 2), ("params/Conv_2/kernel", 3)),
    )


@network
def linen_convnext():
    def body(module, x):
        x = nn.LayerNorm()(conv(x, 16, (2, 2), 2))
        y = nn.LayerNorm()(conv(x, 16, (7, 7), feature_group_count=16))
        y = dense(nn.gelu(dense(y, 32)), 16)
        x = x + module.param("layer_scale", nn.initializers.ones, (16,)) * y
        return dense(nn.LayerNorm()(x.mean((1, 2))), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Dense_0/kernel", 1), ("params/layer_scale", 0), ("params/Conv_1/kernel", 3)),
        (("params/Conv_0/kernel", 2), ("params/Conv_1/kernel", 2), ("params/Dense_2/kernel", 1)),
    )


@network
def linen_pixel_shuffle():
    def body(_, x):
        x = conv(nn.relu(conv(x, 8, (3, 3))), 32, (3, 3))
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 8)
        return conv(nn.relu(x), 3, (3, 3))

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/Conv_1/kernel", 3), ("params/Conv_2/kernel", 2)),
        (("params/Conv_0/kernel", 2), ("params/Conv_2/kernel", 3)),
    )


@network
def linen_csp_slice():
    def body(_, x):
        x = conv_bn(x, 16)
        left, right = x[..., :6], x[..., 6:]
        right = conv_bn(right, 10)
        return dense(conv_bn(jnp.concatenate([left, right], -1), 8).mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_1/kernel", 2),
            ("params/Conv_1/kernel", 3),
            ("params/Conv_2/kernel", 2),
        ),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def linen_channel_shuffle():
    def body(_, x):
        x = conv_bn(x, 8)
        y = conv_bn(x, 16, 1, groups=2)
        y = y.reshape(*y.shape[:-1], 2, 8).swapaxes(-1, -2).reshape(y.shape)
        y = conv_bn(y, 16, 3, groups=16, act=identity)
        return dense(nn.relu(x + conv_bn(y, 8, 1, groups=2, act=identity)).mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_1/kernel", 3), ("params/Conv_2/kernel", 3)),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def linen_zero_pad_shortcut():
    def body(_, x):
        x = conv_bn(x, 8)
        y = conv_bn(conv_bn(x, 16, 3, 2), 16, act=identity)
        shortcut = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4)))
        return dense(nn.relu(y + shortcut).mean((1, 2)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/Conv_1/kernel", 3), ("params/Conv_2/kernel", 3)),
        (("params/Conv_0/kernel", 2), ("params/Dense_0/kernel", 1)),
    )


@network
def linen_softmax_over_channels():
    def body(_, x):
        x = nn.relu(conv(x, 8, (3, 3)))
        x = conv(x, 16, (3, 3))
        pooled = (x * nn.softmax(x, -1)).mean((1, 2))
        return dense(nn.relu(dense(pooled, 16)), 4)

    return from_linen(
        body,
        (normal(2, 8, 8, 3),),
        (("params/Conv_0/kernel", 3), ("params/Dense_0/kernel", 1)),
        (("params/Conv_1/kernel", 3), ("params/Conv_1/bias", 0), ("params/Dense_0/kernel", 0)),
    )


@network
def nnx_deconv_generator():
    def make(rngs):
        return {
            "dense": nnx.Linear(6, 128, rngs=rngs),
            "up0": nnx.ConvTranspose(8, 8, (3, 3), (2, 2), rngs=rngs),
            "norm": nnx.BatchNorm(8, use_running_average=True, rngs=rngs),
            "up1": nnx.ConvTranspose(8, 3, (3, 3), (2, 2), rngs=rngs),
        }

    def call(m, z):
        x = nnx.relu(m.dense(z)).reshape(-1, 4, 4, 8)
        return jnp.tanh(m.up1(nnx.relu(m.norm(m.up0(x)))))

    return from_nnx(
        make,
        call,
        (normal(2, 6),),
        (("dense/kernel", 1), ("up0/kernel", 2), ("up0/kernel", 3), ("norm/mean", 0)),
        (("dense/kernel", 0), ("up1/kernel", 3)),
    )


@network
def haiku_wavenet():
    def body(x):
        x = hk.Conv1D(8, 1)(x)
        skips = []
        for rate in (1, 2):
            y = hk.Conv1D(16, 2, rate=rate, padding=hk.pad.causal)(x)
            value, gate = jnp.split(y, 2, -1)
            y = jnp.tanh(value) * jax.nn.sigmoid(gate)
            skips.append(hk.Conv1D(12, 1)(y))
            x = x + hk.Conv1D(8, 1)(y)  # the last one is dead, as in the paper
        return hk.Conv1D(4, 1)(jax.nn.relu(sum(skips)))

    return from_haiku(
        body,
        (normal(2, 10, 3),),
        (
            ("params/conv1_d/w", 2),
            ("params/conv1_d_1/w", 2),
            ("params/conv1_d_2/w", 2),
            ("params/conv1_d_4/w", 2),
        ),
        (("params/conv1_d/w", 1), ("params/conv1_d_7/w", 2)),
    )


@network
def linen_causal_conv():
    def body(_, x):
        x = nn.relu(conv(x, 16, (3,), padding="CAUSAL"))
        x = nn.relu(conv(x, 16, (3,), padding="CAUSAL", kernel_dilation=2))
        return dense(x[:, -1], 4)

    return from_linen(
        body,
        (normal(2, 10, 3),),
        (("params/Conv_0/kernel", 2), ("params/Conv_1/kernel", 2)),
        (("params/Conv_0/kernel", 1), ("params/Dense_0/kernel", 1)),
    )


# Attention


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


# Language


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


# Recurrence and control flow


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


# Transformations inside the function


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
        (("up", 2), ("down", 1), ("embed/w", 1)),
        (("embed/w", 0), ("router/w", 1), ("up", 0), ("head/w", 1)),
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
        # The bias of the tokens refills every channel, which the second norm would see.
        (("params/Dense_1/kernel", 1), ("params/Dense_3/kernel", 1)),
        (("params/Dense_1/kernel", 0), ("params/Dense_0/kernel", 1), ("params/Dense_5/kernel", 1)),
    )


@network
def jax_two_pass_layer_norm():
    """Its width is neither prunable nor pinned: removed features would still move the variance."""

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
        (("up/w", 1), ("down/w", 0)),
        (("embed/w", 0), ("head/w", 1)),
    )


# Rarer programs


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
