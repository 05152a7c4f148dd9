"""Removed slices that are equal, but not zero: one of them, a ghost, stands for all."""

import collections

import fuzz_programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import assert_close, mesh
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _program, _shrink

# One table of what reads across an axis whose masked slices are not zero, one contract.

SHAPES = {
    "in": {"w": (5, 12), "b": (12,)},
    "norm": {"scale": (12,), "bias": (12,)},
    "mix": {"w": (12, 7), "b": (7,)},
    "conv": (3, 12, 7),
    "depthwise": (3, 1, 12),
    "steps": (4, 12),
    "some": (3,),
    "out": {"w": (12, 3), "b": (3,)},
}


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)
    return jax.tree.map(
        lambda s: jnp.asarray(0.4 * rng.standard_normal(s), jnp.float32), shapes, is_leaf=is_shape
    )


def linear(p, x):
    return x @ p["w"] + p["b"]


def two_pass(p, x):
    """A layer norm that sums the squares of what differs from the mean."""
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
    return x * (1 + p["scale"]) + p["bias"]


def hidden(p, x):
    """Features that are one, not zero, where their weights are masked."""
    return jnp.exp(linear(p["in"], x))


def total(x):
    """Reads across the features, as every function of this table does in the end."""
    return x.sum(-1, keepdims=True)


def reductions(p, x):
    h = hidden(p, x)
    reduced = [h.mean(-1), jnp.var(h, -1), h.max(-1), (h - 2).min(-1), jnp.prod(h / 1.5, -1)]
    flags = [jnp.all(h < 1.4, -1), jnp.any(h > 1.4, -1)]
    return jnp.stack(reduced + [jax.nn.logsumexp(h, -1)]), jnp.stack(flags), jax.nn.softmax(h).max()


def norms(p, x):
    return linear(
        p["out"], two_pass(p["norm"], linear(p["in"], x) + two_pass(p["norm"], hidden(p, x)))
    )


def groups_of_channels(p, x):
    g = hidden(p, x).reshape(*x.shape[:-1], 3, 4)
    g = (g - g.mean((1, 3), keepdims=True)) / jnp.sqrt(g.var((1, 3), keepdims=True) + 1e-5)
    return linear(p["out"], jnp.tanh(g.reshape(*x.shape[:-1], 12) * p["norm"]["scale"]))


def standardised(p, x):
    def conv(w, x, **options):
        w = (w - w.mean((0, 1))) / jnp.sqrt(w.var((0, 1)) + 1e-2)
        return lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options
        )

    h = jax.nn.relu(linear(p["in"], x))
    y = conv(p["conv"], h) * p["mix"]["b"]
    return total(jnp.cos(conv(p["depthwise"], h, feature_group_count=12))), y.sum((1, 2))


def contractions(p, x):
    h = hidden(p, x)
    kernel = jnp.exp(p["conv"])
    y = lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    pairs = jnp.einsum("btf,bsf->bts", h, jnp.cos(h))
    features = jnp.einsum("btf,btg->bfg", h, h)  # one ghost along each axis, and one along both
    return y @ jnp.exp(p["mix"]["w"].T), pairs, jax.nn.softmax(features).sum((1, 2)), features.max()


def moves(p, x):
    h = hidden(p, x)
    order = np.array([3, 0, 2, 1, 11, 10, 9, 8, 7, 6, 5, 4])
    both = jnp.concatenate([h, jnp.cos(h) - h, linear(p["in"], x)], -1)
    padded = jnp.pad(h, ((0, 0), (0, 0), (2, 1)), constant_values=0.5)
    halves = jnp.split(h, [5], -1)
    return [
        *map(total, (h[..., ::-1] ** 2, h[..., order], both, padded, *halves, h[..., 2:9:3])),
        total(jnp.tile(h, 2)) + jnp.stack([h, 2 * h]).max((0, -1))[..., None],
        linear(p["out"], two_pass(p["norm"], jnp.roll(h, 3, -1))),
        h.swapaxes(1, 2).reshape(len(x), -1).sum(-1),
        jnp.cumsum(h, 1).max(-1)
        + lax.reduce_window(h, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "SAME").sum(-1),
    ]


def writes(p, x):
    h = hidden(p, x)
    window, places = h.at[..., 2:6], h.at[..., np.array([1, 7, 10])]
    new = jnp.exp(p["some"]) + x[..., :1]
    return [
        *map(total, (window.set(0.0), window.add(0.5), window.multiply(2.0), window.max(1.2))),
        *map(total, (places.set(new), places.add(new), places.min(new), h.at[..., 0].set(1.0))),
        x @ p["in"]["w"].at[:, 3:6].set(0.0) @ p["out"]["w"],
    ]


def loops(p, x):
    def step(h, extra):
        h = two_pass(p["norm"], h + extra) + hidden(p, x)
        return jnp.tanh(h), h

    h, stack = lax.scan(step, hidden(p, x), p["steps"])
    h = lax.fori_loop(0, 3, lambda i, h: 0.5 * h + jnp.exp(two_pass(p["norm"], h)), h)
    return total(h), total(stack), linear(p["out"], h)


def branches(p, x):
    h = linear(p["in"], x)
    return total(lax.cond(x.sum() > 0, jnp.exp, lambda h: h - total(jnp.cos(h)), h))


@jax.custom_jvp
def centred(x):
    return x - total(jnp.exp(x))


centred.defjvp(lambda p, t: (centred(*p), 3 * t[0] - total(jnp.exp(p[0]) * t[0])))


@jax.custom_vjp
def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1)


def normalised_bwd(y, g):
    return (2 * (g - total(g * y) / 12 * y - g.mean(-1, keepdims=True)),)


normalised.defvjp(lambda x: (normalised(x),) * 2, normalised_bwd)


def derivatives(p, x):
    h = centred(hidden(p, x))
    h = jax.checkpoint(lambda h: two_pass(p["norm"], jnp.cos(h)))(h) + h
    slope = jax.grad(lambda h: jnp.sum(jax.nn.softmax(h)[..., 0]))(h)
    return total(normalised(jnp.tanh(h)) ** 3), linear(p["out"], normalised(h)), total(slope**2)


def named_axes(p, x):
    def one(x):
        h = hidden(p, x)
        h = (h - lax.pmean(h, "batch")) / jnp.sqrt(lax.pmean(h**2, "batch"))
        return total(h + 1), lax.pmean(jax.nn.relu(h), "batch") @ p["out"]["w"]

    columns = lambda w: lax.pmean(jnp.exp(x @ w), "features")
    total_of_columns = jax.vmap(columns, 1, axis_name="features")(p["in"]["w"])[0]
    return jax.vmap(one, axis_name="batch")(x), total_of_columns


NORM = {"scale": 1.0, "bias": 0.0}
READS = {
    f.__name__: f
    for f in (
        reductions, norms, groups_of_channels, standardised, contractions, moves, writes, loops,
        branches, derivatives, named_axes,
    )
}  # fmt: skip
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 5)), jnp.float32)


def pruned(fn, params, inputs, seed=0):
    """Removes half of the units of every group, drawn by chance."""
    groups = jp.find_groups(fn, params, *inputs)
    scores = np.random.default_rng(seed).random(len(groups))
    masks = groups.select(scores, 0.5, scope="layer")
    small_fn, small, plan = jp.shrink(fn, params, masks, *inputs, groups=groups, verify=False)
    assert plan.inexact == ()
    return groups, masks, small_fn, small, plan


def weighted(fn):
    """Sums up all outputs of a function, with weights that tell their entries apart."""

    def loss(params, *inputs):
        outs = fn(params, *inputs)
        sums = [
            jnp.sum(jnp.sin(1.0 + jnp.arange(o.size)) * o.reshape(-1))
            for o in jax.tree.leaves(outs)
        ]
        return sum(sums), outs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", READS)
def test_shrunk_is_masked(name):
    fn, params = READS[name], draw(SHAPES)
    with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("highest"):
        groups, masks, small_fn, small, plan = pruned(fn, params, (X,))
        assert groups.unit["in/w"][1].any() and small["in"]["w"].shape[1] < 12, groups
        masked = jp.apply_masks(params, masks)
        (_, expected), grads = weighted(fn)(masked, X)
        (_, outs), small_grads = weighted(small_fn)(small, X)
        assert_close(outs, expected, 1e-5)
        assert_close(small_grads, plan.take(grads), 1e-3)
        more = jnp.concatenate([X, X[:1] - 1])  # another batch size
        assert_close(jax.jit(small_fn)(small, more), jax.jit(fn)(masked, more), 1e-5)
        kept = np.asarray(groups._kept(masks))
        assert jp.metrics.flops(small_fn, small, X) == groups.costs(kept, "flops")


def claims(fn, params, masks, inputs):
    """Yields the masked slices along every axis of every value, with their kinds."""
    masked = _shrink._masked_slices(params, masks)
    structure = _program.analyse(fn, params, inputs, exact=False, has_aux=False, removed=masked)
    flat = _program.Flat()
    args = jax.tree.leaves((jp.apply_masks(params, masks), inputs))
    flat.run(
        structure.program,
        [flat.add(v, x) for v, x in zip(structure.program.ins, args, strict=True)],
    )
    atoms = structure.walk.atoms
    for value, array in zip(flat.values, flat.arrays, strict=True):
        for i, (axis, kinds) in enumerate(value.pairs):
            gone = np.flatnonzero(atoms.free(axis))
            if len(gone) and jnp.issubdtype(array.dtype, jnp.floating):
                slices = np.moveaxis(np.asarray(array), i, 0)[gone].astype(np.float64)
                yield slices.reshape(len(gone), -1), np.broadcast_to(kinds, len(axis))[gone]


def check_kinds(fn, params, masks, inputs):
    counts = {"zero": 0, "same": 0}
    for slices, kinds in claims(fn, params, masks, inputs):
        scale = np.abs(slices).max(initial=1e-30)
        assert not slices[kinds == 0].any()
        for kind in np.unique(kinds[kinds > 0]):
            equal = slices[kinds == kind]
            np.testing.assert_allclose(equal, equal[:1].repeat(len(equal), 0), 0, 1e-5 * scale)
        counts["zero"] += np.count_nonzero(kinds == 0)
        counts["same"] += np.count_nonzero(kinds > 0)
    return counts


@pytest.mark.parametrize(
    "name, units", [("norms", 1), ("equinox_vit_layer_norm", 1), ("linen_vit", 0)]
)
def test_there_is_no_more_than_one_ghost_for_all_that_are_equal(name, units):
    fn, params, inputs = (
        (READS[name], draw(SHAPES), (X,)) if name in READS else zoo.NETWORKS[name]()[:3]
    )
    with jax.numpy_rank_promotion("allow"):
        masks = pruned(fn, params, inputs)[1]
        masked = _shrink._masked_slices(params, masks)
        structure = _program.analyse(fn, params, inputs, exact=False, removed=masked)
    roots = structure.walk.atoms.all_roots()
    cut = _program.Cut(roots > 0, roots, structure.program)  # what is left free is removed
    assert len(np.unique(roots[cut.ghosts])) == units


def over_a_table(p, x):
    h = hidden(p, x) + jnp.arange(12.0)  # different for every index, but where it is written over
    h = h.at[..., 2:6].set(jnp.exp(p["in"]["b"][2:6])).at[..., 8].multiply(0.0)
    return h @ p["out"]["w"], jnp.pad(h, ((0, 0), (0, 0), (1, 1)))[..., 1:-1] @ p["out"]["w"]


CLAIMS = {
    name: READS[name] for name in "norms groups_of_channels standardised moves writes".split()
}
CLAIMS["over_a_table"] = over_a_table


@pytest.mark.parametrize("name", CLAIMS)
def test_slices_of_a_kind_are_equal(name):
    fn, params = CLAIMS[name], draw(SHAPES)
    with jax.numpy_rank_promotion("allow"):
        counts = check_kinds(fn, params, pruned(fn, params, (X,))[1], (X,))
    assert counts["zero"] and counts["same"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_slices_of_a_kind_are_equal_in_the_zoo(name):
    net = zoo.NETWORKS[name]()
    assert check_kinds(net.fn, net.params, pruned(net.fn, net.params, net.inputs)[1], net.inputs)


def test_ghosts_in_a_shard_map():
    total_of_rows = jax.shard_map(
        lambda x: two_pass(NORM, jnp.exp(x)).max(1) + x.sum(1),
        mesh=mesh(data=2),
        in_specs=P("data"),
        out_specs=P("data"),
    )

    def fn(p, x):  # a masked entry of the bias is one in the sum, one of the matmul is zero
        return total_of_rows(jnp.concatenate([x @ p["w"], jnp.exp(p["b"])[None].repeat(4, 0)], 1))

    params, x = draw({"w": (2, 5), "b": (7,)}), jnp.ones((4, 2))
    groups, masks, small_fn, small, _ = pruned(fn, params, (x,))
    assert len(groups) == 12
    assert_close(small_fn(small, x), fn(jp.apply_masks(params, masks), x), 1e-5)


def test_what_differs_is_named_where_it_begins():
    table = jnp.sin(jnp.arange(12.0))

    def fn(p, x):
        h = linear(p["in"], x)
        with jax.named_scope("positions"):
            h = h + table
        return linear(p["out"], two_pass(p["norm"], jnp.tanh(h)))

    params = draw(SHAPES)
    with jax.numpy_rank_promotion("allow"):
        exact = jp.find_groups(fn, params, X)
        assert not exact.unit["in/w"][1].any()
        why = "different for every index since `add` in positions"
        assert ("in/w", 1, 12, (why,)) in exact.pinned
        groups = jp.find_groups(fn, params, X, exact=False)
        masks = groups.select(jp.scores.magnitude(params), 0.5)
        small_fn, small, plan = jp.shrink(fn, params, masks, X, groups=groups)
        assert plan.inexact[0] == why and "differs by" in plan.inexact[1]
        read_by_a_matmul = lambda p, x: (linear(p["in"], x) + table) @ p["out"]["w"]
        assert len(jp.find_groups(read_by_a_matmul, params, X)) == 12


def test_units_are_scored_as_they_are_removed():
    fn, params = READS["norms"], draw(SHAPES)
    loss = lambda p, x: jnp.sum(jnp.sin(fn(p, x)))
    with jax.numpy_rank_promotion("allow"):
        groups = jp.find_groups(fn, params, X)
        change = jp.search.oracle(groups, loss)(params, X)
        for n, expected in enumerate(change):
            masks = groups.masks(np.arange(len(groups)) != n)
            actual = abs(loss(jp.apply_masks(params, masks), X) - loss(params, X))
            np.testing.assert_allclose(actual, abs(expected), 1e-3, 1e-5)
        assert (jp.units.activation(groups, fn)(params, X) > 0).all()


@pytest.mark.parametrize("cases", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_fuzzing(cases):
    counts = fuzz_programs.fuzz(cases, collections.Counter())
    assert counts["shrunk"] > cases / 2
