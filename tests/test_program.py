"""The traced program: what it costs, what belongs together, and how it runs without a part."""

import contextlib
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

import jaxprune as jp
from jaxprune import _program
from jaxprune._program import rules
from jaxprune._program.atoms import Atoms, Merge

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
    "jax_cond jax_while_loop linen_scan_remat jax_custom_vjp jax_mixture_of_experts "
    "linen_mixer jax_layer_norm_lstm haiku_nf_net"
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
    with pytest.warns(UserWarning, match="Use `jax.lax.scan`") as warned:
        assert "`while` is counted once" in str(jp.metrics.layers(fn, params, jnp.ones(shape)))
        jp.metrics.flops(fn, params, jnp.ones(shape))
        groups.costs(np.ones(8, bool), "flops")
        jp.units.flops(groups)
        groups.select(jp.scores.magnitude(params), 0.5, cost="flops")
    assert [warning.filename for warning in warned] == [__file__] * 5  # one each, at the call
    add = lambda p, x: lax.while_loop(lambda x: x < 3, lambda x: x + p, x)
    assert jp.metrics.flops(add, 1.0, 0.0) == 0  # without a contraction


def test_every_mode_of_a_ragged_product_counts_its_true_rows():
    params, x = COUNTED["ragged"][1], jnp.ones((4, 9))
    backward = jax.grad(lambda p, x: jnp.sum(experts(p, x)[0] ** 2))
    both, products = 4 * 9 * 12, 4 * 12 * 6  # of x and the experts, then of the hidden units
    macs = 2 * both + 3 * products + 4 * 9 * 3
    assert jp.metrics.flops(backward, params, x) == 2 * macs


def test_a_primitive_without_a_rule_is_no_obstacle_to_counting():
    fn = lambda p, x: jnp.linalg.svd(x @ p["in"], compute_uv=False)
    assert jp.metrics.flops(fn, mlp(), jnp.ones((5, 6))) == 2 * 5 * 6 * 8


# Atoms.


def test_ten_thousand_reasons_are_each_reported_as_themselves():
    atoms = Atoms()
    axis = atoms.fresh(10_000)
    for i in range(10_000):
        atoms.pin(axis[i : i + 1], f"reason {i}")
    assert not atoms.free(axis).any() and atoms.free(atoms.fresh(2)).all()
    assert [atoms.reason(axis[i : i + 1]) for i in range(10_000)] == [
        {f"reason {i}": 1} for i in range(10_000)
    ]
    atoms.pin(axis, "a later reason")
    assert atoms.reason(axis[:2]) == {"reason 0": 1, "reason 1": 1}
    table = np.zeros(len(atoms.all_roots()))  # plain indexing finds atoms and reasons
    table[axis] = 1
    assert table.sum() == 10_000 and not table[atoms.pinned(3, "reason 9999")].any()


@pytest.mark.parametrize("seed", range(5))
def test_united_is_what_a_plain_search_connects(seed):
    rng = np.random.default_rng(seed)
    atoms = Atoms()
    axes = [atoms.fresh(6) for _ in range(20)]
    edges = []
    for _ in range(12):
        a, b = (rng.permutation(axes[i])[:4] for i in rng.integers(20, size=2))
        atoms.unite(a, b)
        edges += zip(a.tolist(), b.tolist(), strict=True)
    for axis in axes[:3]:
        atoms.pin(axis[:1], "a reason")
    every = np.concatenate(axes)
    roots = dict(zip(every.tolist(), every.tolist(), strict=True))
    for _ in roots:  # as often as a chain may be long
        for a, b in edges:
            roots[a] = roots[b] = min(roots[a], roots[b])
    pinned = {roots[int(axis[0])] for axis in axes[:3]}
    expected = [-1 if root in pinned else root for root in roots.values()]
    assert atoms.find(every).tolist() == expected
    assert atoms.all_roots()[every].tolist() == expected


@pytest.mark.parametrize(
    "united, units",
    [
        ([], [3, 4]),  # 3 heads of 4 dims: along either
        ([(0, 4)], [2, 4]),  # an entry of head 0 with one of head 1
        ([(0, 5)], [2, 3]),  # one of dim 0 with one of dim 1
        ([(0, 1), (0, 2), (0, 3)], [3, 0]),  # all dims together: removed, nothing would be left
    ],
)
def test_units_along_the_factors_of_a_merge(united, units):
    atoms = Atoms()
    merge = Merge(atoms.fresh(12), (atoms.fresh(3), atoms.fresh(4)), "a reshape")
    for i, j in united:
        atoms.unite(merge.merged[i : i + 1], merge.merged[j : j + 1])
    assert [atoms._units(merge, factor) for factor in range(2)] == units
    atoms.solve([merge], lambda merges, counts: (0, int(np.argmax(counts[0]))))
    cut = int(np.argmax(units))
    rows = np.moveaxis(atoms.find(merge.merged).reshape(3, 4), cut, 0)
    assert (rows == atoms.find(merge.factors[cut])[:, None]).all()
    assert list(atoms.reason(merge.factors[1 - cut])) == ["the other factor of a reshape is cut"]


# Values, and running without some.


def test_every_value_has_the_units_of_the_leaves():
    params, x = mlp(), jnp.ones((5, 6))
    structure = _program.analyse(dense, params, (x,))
    hidden = np.arange(1, 9)
    unit = structure.spread([(np.zeros(6, int), hidden), (hidden, np.zeros(6, int))])
    values = [v for step in structure.program.steps for v in step.outs]
    shapes = [[unit[axis].tolist() for axis in v.axes] for v in values if v.shape]
    assert shapes[0] == [[0] * 5, hidden.tolist()] and shapes[-1] == [[0] * 5, [0] * 6]


def test_a_cut_program_is_that_of_smaller_params():
    params = {"in": jnp.arange(48.0).reshape(6, 8), "out": jnp.arange(48.0).reshape(8, 6)}
    x = jnp.ones((5, 6))
    structure = _program.analyse(dense, params, (x,))
    removed = np.zeros(len(structure.walk.atoms.all_roots()), bool)
    removed[structure.walk.atoms.all_roots()[structure.leaves[0].axes[1][[1, 2, 5]]]] = True
    cut = _program.Cut(removed[structure.walk.atoms.all_roots()])
    kept = [0, 3, 4, 6, 7]
    small = {"in": params["in"][:, jnp.array(kept)], "out": params["out"][jnp.array(kept)]}
    (out,) = cut.run(structure.program, small["in"], small["out"], x)
    np.testing.assert_array_equal(out, dense(small, x))
    assert cut.kept(structure.leaves[1].axes[0]).tolist() == kept


def test_evenly_spaced_indices_are_taken_as_a_slice():
    x = jnp.arange(24.0).reshape(2, 12)
    for kept, primitive in (([3], "slice"), ([1, 4, 7], "slice"), ([0, 1, 5], "gather")):
        take = functools.partial(_program.take, kept=np.array(kept), axis=1)
        np.testing.assert_array_equal(take(x), x[:, np.array(kept)])
        assert f" {primitive}[" in str(jax.make_jaxpr(take)(x))


def test_values_fit_the_same_program_of_other_sizes_alone():
    def branching(p, x):
        return dense(p, x) if len(x) < 9 else jnp.tanh(dense(p, x))

    structure = _program.analyse(branching, mlp(), (jnp.ones((5, 6)),))
    other = lambda n: _program.trace(branching, mlp(), (jnp.ones((n, 6)),), False)[0]
    program = structure.program.on(other(7))
    assert program.steps[0].eqn.outvars[0].aval.shape == (7, 8)
    assert program.steps[0].outs is structure.program.steps[0].outs
    with pytest.raises(_program.ProgramMismatch):
        structure.program.on(other(9))


# The room.


def test_a_primitive_has_one_rule():
    parts = [rules.elementwise, rules.moving, rules.contracting, rules.indexing]
    assert sum(len(part.RULES) for part in parts) == len(rules.RULES) > 150


def test_one_file_touches_what_jax_may_change():
    internals = re.compile(
        r"(?<!_jaxpr)\.bind\(|jax\.core|jax\._src|jax\.extend|custom_derivatives"
    )
    room = pathlib.Path(_program.__file__).parent
    assert [f.name for f in room.rglob("*.py") if internals.search(f.read_text())] == ["jaxpr.py"]
