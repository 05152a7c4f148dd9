"""Convolutions whose channels are joined, split, shuffled, normalized or upsampled."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn

from ._build import (
    batch_norm,
    conv,
    conv_bn,
    dense,
    from_equinox,
    from_linen,
    identity,
    network,
    normal,
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
        (("params/Conv_0/kernel", 3), ("params/Conv_1/kernel", 3), ("params/Dense_0/kernel", 1)),
        (("params/Conv_0/kernel", 2), ("params/Dense_1/kernel", 1)),
    )
