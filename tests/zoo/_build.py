"""Builders: one for each library, and layers that several networks share."""

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


def randomize(params: Any) -> Any:
    """Draws every floating leaf anew; leaves may be arrays or ``jax.ShapeDtypeStruct``."""
    rng = np.random.default_rng([0, 0])

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
        variables = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)
    return net(module.apply, variables, inputs, prunable, pinned)


def from_nnx(make, call, inputs, prunable, pinned=()):
    """``make(rngs)`` gives a dict of layers, which ``call(layers, *inputs)`` applies."""
    model = nnx.eval_shape(lambda: nnx.Dict(make(nnx.Rngs(0))))
    graph, state, rngs = nnx.split(model, nnx.Not(nnx.RngState), ...)
    return net(lambda s, *x: call(nnx.merge(graph, s, rngs), *x), state, inputs, prunable, pinned)


def from_equinox(make, call, inputs, prunable, pinned=()):
    """``make(keys)`` gives modules; ``call(modules, *inputs)`` sees one example."""
    keys = lambda: iter(jax.random.split(jax.random.key(0), 16))
    model = eqx.filter_eval_shape(lambda: make(keys()))
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def fn(params, *inputs):
        return jax.vmap(lambda *x: call(eqx.combine(params, static), *x))(*inputs)

    return net(fn, params, inputs, prunable, pinned)


def from_haiku(body, inputs, prunable, pinned=()):
    """``params`` is ``{"params", "state"}``; module names may hold slashes."""
    model = hk.transform_with_state(body)
    with jax.numpy_rank_promotion("allow"):
        params, state = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), *inputs)

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
