import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilations, mesh, place
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxprune as jp


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for repeats, features in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(repeats):
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for features in (4096, 4096):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(1000)(x)


def test_dense_layers_of_vgg16_hold_the_weights_and_not_the_work():
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(VGG().init, jax.random.key(0), x)
    rows = jp.metrics.layers(VGG().apply, variables, x).rows
    total = jp.metrics.flops(VGG().apply, variables, x)
    dense = [r for r in rows if "Dense" in r.path]
    assert total / 2e9 == pytest.approx(15.47, abs=0.005)
    assert sum(r.flops for r in dense) / total == pytest.approx(0.0080, abs=5e-5)
    share = sum(r.params for r in dense) / sum(r.params for r in rows)
    assert share == pytest.approx(0.894, abs=5e-4)
    assert [r.path for r in rows[:2]] == ["params/Conv_0/kernel", "params/Conv_1/kernel"]


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
def test_counts_are_exact_traced_or_not(kept, kind):
    rng = np.random.default_rng(0)
    masks = {"a": rng.random((16, 12)) < kept, "b": {"c": rng.random((7, 11, 3)) < kept, "n": None}}
    flat = np.concatenate([m.ravel() for m in jax.tree.leaves(masks)])
    if kind is not None:
        on = mesh(kind, x=2)
        masks = {"a": place(masks["a"], on, P("x")), "b": place(masks["b"], on, P())}
    removed = flat.size - int(flat.sum())
    assert jp.metrics.sparsity(masks) == removed / flat.size
    assert jax.jit(jp.metrics.sparsity)(masks) == np.float32(removed / flat.size)
    rows = jp.metrics.summary(masks).rows
    assert [r.kept for r in rows] == [int(np.sum(m)) for m in jax.tree.leaves(masks)]
    with jax.enable_x64(True):  # as of masks far from the host
        counts = jp.metrics._counted(jax.tree.leaves(masks))
    assert counts.tolist() == [r.kept for r in rows]


def test_counting_compiles_nothing():
    masks = {str(i): jnp.asarray(np.ones((2, 100 + i), bool)) for i in range(20)}
    params = {str(i): jnp.asarray(np.ones((2, 100 + i), "f4")) for i in range(20)}
    with compilations() as compiled:
        assert jp.metrics.sparsity(masks) == 0.0
        assert jp.metrics.summary(params, masks).kept == sum(2 * (100 + i) for i in range(20))
        assert jp.metrics.stored_bytes(params, masks) and jp.metrics.compression(params, masks) == 1
    assert not compiled


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64)(nn.MultiHeadDotProductAttention(4)(x))


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (3, 3), padding="VALID")(x)
        x = nn.Conv(32, (3, 3), padding="VALID", feature_group_count=8)(nn.relu(x))
        return nn.ConvTranspose(16, (2, 2), strides=(2, 2))(nn.relu(x))


NETWORKS = {
    "attention": (Attention(), (2, 64, 64)),
    "grouped": (Grouped(), (2, 16, 16, 3)),
    "mlp": (nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(64)]), (8, 128)),
}


@pytest.mark.optimized
@pytest.mark.parametrize("name", NETWORKS)
def test_flops_agree_with_xla(name):
    network, shape = NETWORKS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    with jax.numpy_rank_promotion("allow"):
        variables = jax.jit(network.init)(jax.random.key(0), x)
        counted = jp.metrics.flops(network.apply, variables, x)
        compiled = jax.jit(network.apply).lower(variables, x).compile()
    np.testing.assert_allclose(counted, compiled.cost_analysis()["flops"], rtol=0.05)


def test_masks_count_a_convolution_weight_once_per_output_position():
    conv = nn.Conv(8, (3, 3), use_bias=False)
    x = jnp.ones((2, 5, 5, 4))
    variables = conv.init(jax.random.key(0), x)
    masks = jp.select(jp.scores.magnitude(variables), 0.9)
    kept = int(masks["params"]["kernel"].sum())
    assert jp.metrics.flops(conv.apply, variables, x, masks=masks) == 2 * 2 * 25 * kept


def stack(params, x):
    def layer(x, w):
        return jnp.tanh(jax.checkpoint(lambda x: x @ w.T)(x)), None

    x, _ = lax.scan(layer, x, params["w"])
    x = jax.jit(lambda x, w: x @ w.reshape(8, 8).astype(x.dtype))(x, params["v"])
    x = x + jax.jit(lambda: jnp.ones((3, 8)))()  # a program without inputs
    x = lax.cond(x.sum() > 0, lambda x: x @ params["v"][0], lambda x: x, x)
    return jnp.einsum("ni,mi->nm", x, x)


def test_inner_programs_are_counted_and_weights_followed():
    params = {"w": jnp.ones((5, 8, 8)), "v": jnp.ones((1, 8, 8))}
    masks = {"w": jnp.arange(5)[:, None, None] < jnp.full((5, 8, 8), 2), "v": None}
    x = jnp.ones((3, 8))
    rows = {r.path: r for r in jp.metrics.layers(stack, params, x).rows}
    assert rows["w"].flops == 2 * 5 * 3 * 8 * 8 and rows["w"].activations == 5 * 3 * 8
    assert rows["v"].flops == 2 * 2 * 3 * 8 * 8
    assert rows[None].flops == 2 * 3 * 3 * 8
    saved = jp.metrics.flops(stack, params, x) - jp.metrics.flops(stack, params, x, masks=masks)
    assert saved == pytest.approx(0.6 * rows["w"].flops)
    assert "(no params)" in str(jp.metrics.layers(stack, params, x))


def test_summary_flags_stacks_of_biases():
    params = {"bias": jnp.ones((3, 4)), "kernel": jnp.ones((3, 4, 4))}
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    assert "stacked=" in str(jp.summary(params, masks)).splitlines()[2]
    assert jp.select(jp.scores.magnitude(params), 0.5, stacked=lambda p: True)["bias"] is None


def test_summary_of_masks_alone():
    masks = {"w": jnp.array([[True, False]] * 2), "b": None}
    assert [(row.path, row.kept, row.size) for row in jp.summary(masks).rows] == [("w", 2, 4)]
    assert not any(row.masked for row in jp.summary({"w": jnp.ones((2, 2))}).rows)
