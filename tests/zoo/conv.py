"""Convolutions: classic networks, residuals, groups."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from ._build import (
    batch_norm,
    conv,
    conv_bn,
    dense,
    from_equinox,
    from_haiku,
    from_linen,
    from_nnx,
    from_shapes,
    hk_conv,
    hk_linear,
    identity,
    layer,
    linear,
    network,
    normal,
)


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
