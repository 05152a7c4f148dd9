"""Every network of the zoo: grouped without a hint, halved, and the same as when masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import jaxprune as jp


def assert_close(actual, expected, tolerance):
    """Compares trees, to a fraction of the largest entry of all."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in pairs]
    scale = max(np.abs(b).max() for _, b in pairs)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def outputs_and_grads(fn, params, inputs):
    """Gives the outputs, and the gradient of their sum with fixed weights, so that sizes differ."""

    def loss(floats, params):
        outs = fn(jp._tree.merge(floats, params), *inputs)
        weights = [
            jnp.sin(1.0 + jnp.arange(x.size).reshape(x.shape)) for x in jax.tree.leaves(outs)
        ]
        pairs = zip(weights, jax.tree.leaves(outs), strict=True)
        return sum(jnp.sum(w * x) for w, x in pairs), outs

    grads, outs = jax.jit(jax.grad(loss, has_aux=True))(jp._tree.floating(params), params)
    return outs, grads


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_masked_is_shrunk(name):
    net = zoo.NETWORKS[name]()
    groups = jp.find_groups(net.fn, net.params, *net.inputs)
    for path, axis in net.prunable:
        assert groups.unit[path][axis].any(), f"{path} {axis}\n{groups}"
    for path, axis in net.pinned:
        assert not groups.unit[path][axis].any(), f"{path} {axis}\n{groups}"
    assert "no rule for" not in str(groups)
    masks = groups.select(jp.scores.magnitude(net.params), 0.5, scope="layer")
    small_fn, small, plan = jp.shrink(
        net.fn, net.params, masks, *net.inputs, groups=groups, verify=False
    )
    assert plan.inexact == ()
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (net.params, small)]
    assert sizes[1] < 0.8 * sizes[0]
    masked = jp.apply_masks(net.params, masks)
    tolerance = 3e-2 if "bfloat16" in name else 1e-4
    if name == "jax_while_loop":  # no reverse mode
        assert_close(small_fn(small, *net.inputs), net.fn(masked, *net.inputs), tolerance)
        return
    expected, dense_grads = outputs_and_grads(net.fn, masked, net.inputs)
    outs, grads = outputs_and_grads(small_fn, small, net.inputs)
    assert_close(outs, expected, tolerance)
    assert_close(grads, plan.take(dense_grads), 10 * tolerance)


@pytest.mark.parametrize(
    "name, why",
    [
        ("linen_mixer", "summed, not zero, by `reduce_sum` in"),
        ("jax_two_pass_layer_norm", "summed, not zero, by `reduce_sum`"),
        ("linen_softmax_over_channels", "taken part in `reduce_max`"),
    ],
)
def test_what_changes_the_result_is_named(name, why):
    net = zoo.NETWORKS[name]()
    exact = jp.find_groups(net.fn, net.params, *net.inputs)
    groups = jp.find_groups(net.fn, net.params, *net.inputs, exact=False)
    assert len(groups) > len(exact) and why in str(exact)
    masks = groups.select(jp.scores.magnitude(net.params), 0.5, scope="layer")
    small_fn, small, plan = jp.shrink(net.fn, net.params, masks, *net.inputs, groups=groups)
    assert any(reason.startswith(why) for reason in plan.inexact)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(net.fn, net.params, *net.inputs))
    assert jax.tree.map(jnp.shape, small_fn(small, *net.inputs)) == shapes
