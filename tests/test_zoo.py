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


def scalar(fn, inputs):
    """Sums the outputs with fixed weights, so that their gradients are of one size."""

    def loss(params):
        outs = jax.tree.leaves(fn(params, *inputs))
        return sum(jnp.sum(jnp.sin(1.0 + jnp.arange(x.size).reshape(x.shape)) * x) for x in outs)

    return loss


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
    small_fn, small, plan = jp.shrink(net.fn, net.params, masks, *net.inputs, groups=groups)
    assert plan.inexact == ()
    masked = jp.apply_masks(net.params, masks)
    tolerance = 3e-2 if "bfloat16" in name else 1e-4
    expected = net.fn(masked, *net.inputs)
    assert_close(small_fn(small, *net.inputs), expected, tolerance)
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (net.params, small)]
    assert sizes[1] < 0.8 * sizes[0]
    if name == "jax_while_loop":  # no reverse mode
        return
    grads = plan.take(jp._tree.grad(scalar(net.fn, net.inputs), masked))
    assert_close(jp._tree.grad(scalar(small_fn, net.inputs), small), grads, 10 * tolerance)


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
