"""Every network of the zoo: grouped without a hint, halved, and the same as when masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import assert_close

import jaxprune as jp

# Together they use every primitive of the zoo, which a slow test asserts.
FAST = """
    equinox_feature_pyramid equinox_group_norm equinox_swin_v2 haiku_nf_net haiku_resnet_blocks
    jax_cond jax_custom_vjp jax_gqa_decoder jax_layer_norm_lstm jax_mamba2
    jax_mixture_of_experts jax_neural_ode jax_rope_interleaved jax_scan_decoder
    jax_sorted_channels jax_state_space jax_swin_window jax_while_loop linen_bfloat16
    linen_channel_shuffle linen_densenet linen_graph_network linen_group_norm linen_lenet
    linen_lstm linen_mixer linen_mobilenet_v2 linen_scan_remat linen_zero_pad_shortcut nnx_vit
""".split()
# Derivatives here take rules of their own; for other networks they follow from the outputs.
DERIVATIVES = (
    "haiku_nf_net jax_cond jax_custom_vjp jax_layer_norm_lstm jax_scan_decoder linen_lstm "
    "linen_scan_remat"
).split()


def outputs_and_grads(fn, params, inputs):
    """Returns the outputs, and the gradient of their sum with weights that tell entries apart."""

    def loss(floats, params):
        outs = fn(jp._tree.merge(floats, params), *inputs)
        weights = [
            jnp.sin(1.0 + jnp.arange(x.size).reshape(x.shape)) for x in jax.tree.leaves(outs)
        ]
        pairs = zip(weights, jax.tree.leaves(outs), strict=True)
        return sum(jnp.sum(w * x) for w, x in pairs), outs

    grads, outs = jax.jit(jax.grad(loss, has_aux=True))(jp._tree.floating(params), params)
    return outs, grads


def by_chance(groups, _):
    return np.random.default_rng(0).random(len(groups))


def by_magnitude(_, params):
    return jp.scores.magnitude(params)


def check(name, score, derivatives):
    """Prunes half of the units of a network, and compares its masked with its shrunk form."""
    net = zoo.NETWORKS[name]()
    groups = jp.find_groups(net.fn, net.params, *net.inputs)
    for path, axis in net.prunable:
        assert groups.unit[path][axis].any(), f"{path} {axis}\n{groups}"
    for path, axis in net.pinned:
        assert not groups.unit[path][axis].any(), f"{path} {axis}\n{groups}"
    assert "no rule for" not in str(groups)
    masks = groups.select(score(groups, net.params), 0.5, scope="layer")
    small_fn, small, plan = jp.shrink(
        net.fn, net.params, masks, *net.inputs, groups=groups, verify=False
    )
    assert plan.inexact == ()
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (net.params, small)]
    assert sizes[1] < 0.8 * sizes[0]
    masked = jax.jit(jp.apply_masks)(net.params, masks)
    tolerance = 3e-2 if "bfloat16" in name else 1e-4
    if derivatives:
        expected, dense_grads = outputs_and_grads(net.fn, masked, net.inputs)
        outs, grads = outputs_and_grads(small_fn, small, net.inputs)
        assert_close(grads, plan.take(dense_grads), 10 * tolerance)
    else:
        expected = jax.jit(net.fn)(masked, *net.inputs)
        outs = jax.jit(small_fn)(small, *net.inputs)
    assert_close(outs, expected, tolerance)


@pytest.mark.parametrize("name", FAST)
def test_masked_is_shrunk(name):
    check(name, by_chance, name in DERIVATIVES)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_masked_is_shrunk_with_its_derivatives(name):
    no_reverse_mode = name in ("jax_while_loop", "jax_neural_ode")
    check(name, by_magnitude if name in FAST else by_chance, not no_reverse_mode)


def primitives(jaxpr):
    """Lists the primitives of a program and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from primitives(getattr(inner, "jaxpr", inner))


def is_program(x):
    return hasattr(getattr(x, "jaxpr", x), "eqns")


@pytest.mark.slow
def test_the_fast_networks_use_every_primitive_of_the_zoo():
    used = {}
    for name, build in zoo.NETWORKS.items():
        net = build()
        used[name] = set(primitives(jax.make_jaxpr(net.fn)(net.params, *net.inputs).jaxpr))
    assert len(used) == 108
    assert set.union(*used.values()) == set.union(*(used[name] for name in FAST))
