"""The traced program: what it costs, what belongs together, and how it runs without a part."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

import jaxprune as jp

# One table for all that counts FLOPs: a function, its params, an input, and its multiply-adds.


def two_layers(first, hidden, *shape):
    """A first layer with a kernel of this shape, and a dense second one."""

    def fn(p, x):
        return jax.nn.relu(first(p["first"], x)) @ p["second"]

    return fn, {"first": jnp.ones(hidden), "second": jnp.ones((hidden[-1], 4))}, shape


def conv(padding="VALID", channels=6, groups=1, **options):
    """A convolution over 7 positions, of 3 that a window reads, to 8 features."""
    options = {"window_strides": (1,), "dimension_numbers": ("NWC", "WIO", "NWC"), **options}
    call = functools.partial(
        lax.conv_general_dilated, padding=padding, feature_group_count=groups, **options
    )
    return two_layers(lambda w, x: call(x, w), (3, channels // groups, 8), 2, 7, channels)


def depthwise(p, x):
    call, *_ = conv(channels=8, groups=8)
    return call({"first": p["each"], "second": p["out"]}, x @ p["in"])


def dense(p, x):
    return jax.nn.relu(x @ p["in"]) @ p["out"]


def mlp(hidden=8):
    return {"in": jnp.ones((6, hidden)), "out": jnp.ones((hidden, 6))}


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, x), lambda x, g: (g @ jnp.ones((6, 6)),))


def scanned(p, x):
    return lax.scan(lambda x, _: (dense(p, x), None), x, None, length=7)[0]


def conditional(p, x):
    return lax.cond(x.sum() > 0, dense, lambda p, x: x @ p["square"], p, x)


def looped(p, x):
    return lax.while_loop(lambda x: jnp.sum(x @ x.T) > 1, lambda x: dense(p, x), x)


def gradient(p, x):
    return jax.grad(lambda x: jnp.sum(dense(p, x) ** 2))(x)


def experts(p, x):
    sizes = jnp.array([1, 3, 0], jnp.int32)
    return jax.nn.relu(lax.ragged_dot(x, p["in"], sizes)) @ p["out"], x @ p["router"]


MLP = 5 * (6 * 8 + 8 * 6)  # of `dense` on five examples
COUNTED = {
    "dot": (dense, mlp(), (5, 6), MLP),
    "einsum": (
        *two_layers(lambda w, x: jnp.einsum("bti,ijk->btjk", x, w), (6, 3, 8), 2, 5, 6),
        2 * 5 * 3 * (6 * 8 + 8 * 4),
    ),
    "batched": (
        *two_layers(lambda w, x: jnp.einsum("bti,bik->btk", x, w), (2, 6, 8), 2, 5, 6),
        2 * 5 * (6 * 8 + 8 * 4),
    ),
    "conv": (*conv(), 2 * 5 * (3 * 6 * 8 + 8 * 4)),
    "strided": (*conv(window_strides=(2,)), 2 * 3 * (3 * 6 * 8 + 8 * 4)),
    "dilated": (*conv(rhs_dilation=(2,)), 2 * 3 * (3 * 6 * 8 + 8 * 4)),
    "transposed": (*conv([(1, 1)], lhs_dilation=(2,)), 2 * 13 * (3 * 6 * 8 // 2 + 8 * 4)),
    "grouped": (*conv(groups=2), 2 * 5 * (3 * 3 * 8 + 8 * 4)),
    "depthwise": (
        depthwise,
        {"in": jnp.ones((6, 8)), "each": jnp.ones((3, 1, 8)), "out": jnp.ones((8, 4))},
        (2, 7, 6),
        2 * 7 * 6 * 8 + 2 * 5 * (3 * 8 + 8 * 4),
    ),
    "ragged": (
        experts,
        {"in": jnp.ones((3, 9, 12)), "out": jnp.ones((12, 6)), "router": jnp.ones((9, 3))},
        (4, 9),
        1656 // 2,  # a row meets the matrix of one expert: 4 (9 12 + 12 6 + 9 3)
    ),
    "scan": (scanned, mlp(), (5, 6), 7 * MLP),
    "cond": (conditional, mlp() | {"square": jnp.ones((6, 6))}, (5, 6), MLP),
    "while": (looped, mlp(), (5, 6), MLP + 5 * 6 * 5),
    "remat": (jax.checkpoint(dense), mlp(), (5, 6), MLP),
    "custom_vjp": (lambda p, x: doubled(dense(p, x)), mlp(), (5, 6), MLP),
    "grad": (gradient, mlp(), (5, 6), MLP + 5 * (6 * 8 + 8 * 6)),
    "constants": (
        lambda p, x: dense(p, x) @ jnp.matmul(jnp.ones((6, 3)), jnp.ones((3, 2))),
        mlp(),
        (5, 6),
        MLP + 6 * 3 * 2 + 5 * 6 * 2,
    ),
}


def counting(name):
    """Expects a warning where a `while` loop is counted."""
    once = pytest.warns(UserWarning, match="`while`.*counted once, because its trip count")
    return once if "while" in name else contextlib.nullcontext()


@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_are_those_of_the_closed_form(name):
    fn, params, shape, macs = COUNTED[name]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with counting(name):
        assert jp.metrics.flops(fn, params, x) == 2 * macs


ZOO = (
    "jax_gqa_decoder linen_mobilenet_v2 nnx_deconv_generator linen_resnext linen_vit_fused_qkv "
    "jax_cond jax_while_loop linen_scan_remat jax_custom_vjp jax_mixture_of_experts"
).split()


@pytest.mark.parametrize("name", [*COUNTED, *ZOO])
def test_all_counters_agree(name):
    """`metrics.flops`, `metrics.layers`, `groups.costs`, `units.flops` and ``cost="flops"``."""
    if name in ZOO:
        fn, params, inputs, *_ = zoo.NETWORKS[name]()
    else:
        fn, params, shape, _ = COUNTED[name]
        inputs = (jnp.ones(shape),)
    groups = jp.find_groups(fn, params, *inputs)
    everything = np.ones(len(groups), bool)
    with counting(name):
        total = jp.metrics.flops(fn, params, *inputs)
    with counting(name):
        assert sum(row.flops for row in jp.metrics.layers(fn, params, *inputs).rows) == total
    with counting(name):
        assert groups.costs(everything, "flops") == total
    with counting(name):
        saved = jp.units.flops(groups)
    without = np.array(
        [groups._costs(everything ^ row, "flops") for row in np.eye(len(groups)) > 0]
    )
    np.testing.assert_allclose(saved, total - without)

    scores = jnp.arange(1.0, len(groups) + 1)
    with counting(name):
        masks = groups.select(scores, 0.3, cost="flops", scope="layer")
    kept = np.asarray(groups._kept(masks))
    assert groups._costs(kept, "flops") <= 0.7 * total
    few = np.zeros(len(groups), bool)
    for group in groups.groups:
        few[group.units[: max(len(group.units) // 4, 1)] - 1] = True
    for some in (kept, few):
        masks = groups.masks(some)
        small_fn, small, _ = jp.shrink(fn, params, masks, *inputs, groups=groups, verify=False)
        with counting(name):
            assert jp.metrics.flops(small_fn, small, *inputs) == groups._costs(some, "flops")


def test_the_most_expensive_branch_is_another_when_units_are_removed():
    fn, params, shape, macs = COUNTED["cond"]
    groups = jp.find_groups(fn, params, jnp.ones(shape))
    costs = [groups.costs(np.arange(8) < n, "flops") for n in (8, 4, 2)]
    assert costs == [2 * macs, macs, 2 * 5 * 6 * 6]  # in the end the branch without units
    rows = jp.metrics.layers(fn, params, jnp.ones(shape), masks=groups.masks(np.arange(8) < 2)).rows
    assert [(row.path, row.flops) for row in rows] == [("square", 2 * 5 * 6 * 6)]


def test_a_while_loop_is_noted_when_it_is_counted_and_not_before():
    fn, params, shape, _ = COUNTED["while"]
    groups = jp.find_groups(fn, params, jnp.ones(shape))  # warnings are errors
    assert groups.costs(np.ones(8, bool), "params") == 2 * 6 * 8
    groups.select(jp.scores.magnitude(params), 0.5, cost="params")
    with pytest.warns(UserWarning, match="Use `jax.lax.scan`"):
        assert "`while` is counted once" in str(jp.metrics.layers(fn, params, jnp.ones(shape)))
    add = lambda p, x: lax.while_loop(lambda x: x < 3, lambda x: x + p, x)  # noqa: E731
    assert jp.metrics.flops(add, 1.0, 0.0) == 0  # without a contraction


def test_every_mode_of_a_ragged_product_counts_its_true_rows():
    params, x = COUNTED["ragged"][1], jnp.ones((4, 9))
    backward = jax.grad(lambda p, x: jnp.sum(experts(p, x)[0] ** 2))
    both, products = 4 * 9 * 12, 4 * 12 * 6  # of x and the experts, then of the hidden units
    macs = 2 * both + 3 * products + 4 * 9 * 3
    assert jp.metrics.flops(backward, params, x) == 2 * macs
