"""Selection: exact counts, ties, scopes, earlier masks, meshes, and selection in rounds."""

import collections
import functools
import itertools
import math

import fuzz_select
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    collectives,
    compilations,
    equal,
    explicit_and_slowly_auto,
    mesh,
    place,
    python,
    removed,
)
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _partition, _select, _threshold

SCOPES = ["global", "layer", "erk", {"a/w": 0.25}]  # a new scope adds one entry here


def tree():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": {"w": jax.random.normal(keys[0], (8, 12)), "b": jnp.ones(12)},
        "c": jax.random.normal(keys[1], (3, 3, 4, 16)),
        "d": jax.random.normal(keys[2], (16, 7)),
    }


SHAPES = {"a/w": (8, 12), "c": (3, 3, 4, 16), "d": (16, 7)}  # of the prunable leaves above
SIZES = {path: math.prod(shape) for path, shape in SHAPES.items()}


SPARSITIES = pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])


@SPARSITIES
@pytest.mark.parametrize("scope", ["global", "erk"])
def test_counts_of_one_pool_are_exact(scope, sparsity):
    masks = jp.select(jp.scores.magnitude(tree()), sparsity, scope=scope)
    assert masks["a"]["b"] is None
    assert sum(removed(masks).values()) == round(sparsity * sum(SIZES.values()))


@SPARSITIES
@pytest.mark.parametrize("scope", ["layer", {"a/w": 0.25}], ids=str)
def test_counts_of_every_leaf_are_exact(scope, sparsity):
    masks = jp.select(jp.scores.magnitude(tree()), sparsity, scope=scope)
    by_path = scope if isinstance(scope, dict) else {}
    assert removed(masks) == {p: round(by_path.get(p, sparsity) * n) for p, n in SIZES.items()}


@SPARSITIES
def test_erk_shares_are_those_of_the_paper(sparsity):
    """Compares with plain Python: the densest leaf is filled first, until no density is above 1."""
    kept = sum(SIZES.values()) - round(sparsity * sum(SIZES.values()))
    density = {p: sum(s) / math.prod(s) for p, s in SHAPES.items()}
    dense = set()
    while True:
        rest = SIZES.keys() - dense
        scale = (kept - sum(SIZES[p] for p in dense)) / sum(density[p] * SIZES[p] for p in rest)
        above = [p for p in rest if scale * density[p] > 1]
        if not above:
            break
        dense.add(max(above, key=density.get))
    masks = jp.select(jp.scores.magnitude(tree()), sparsity, scope="erk")
    for path, count in removed(masks).items():
        share = SIZES[path] if path in dense else scale * density[path] * SIZES[path]
        assert abs(SIZES[path] - count - share) < 1


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_keeps_the_largest(scope):
    scores = jp.scores.magnitude(tree())
    masks = jp.select(scores, 0.7, scope=scope)
    groups = [
        (np.ravel(s), np.ravel(m))
        for s, m in zip(
            [scores["a"]["w"], scores["c"], scores["d"]], jax.tree.leaves(masks), strict=True
        )
    ]
    if scope == "global":
        groups = [tuple(np.concatenate(g) for g in zip(*groups, strict=True))]
    for s, m in groups:
        assert s[m].min() >= s[~m].max()


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_scope_contract(scope):
    scores, traces = jp.scores.magnitude(tree()), []

    @jax.jit
    def run(scores, sparsity):
        traces.append(0)
        return jp.select(scores, sparsity, scope=scope)

    for sparsity in (0.5, 0.75):
        masks = run(scores, sparsity)
        assert removed(masks) == removed(jp.select(scores, sparsity, scope=scope))
    assert len(traces) == 1
    assert all(m.dtype == bool for m in jax.tree.leaves(masks))
    static = jax.jit(functools.partial(jp.select, sparsity=0.75, scope=scope))(scores)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, static, masks))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    hnp.arrays(np.float32, (6, 7), elements=st.floats(-4, 4, width=32)), st.floats(0, 0.999)
)
def test_matches_numpy_whatever_the_scores(scores, sparsity):
    mask = np.asarray(jp.select(jnp.array(scores), sparsity))
    assert (~mask).sum() == round(sparsity * scores.size)
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("cases", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_fuzzing(cases):
    counts = collections.Counter()
    fuzz_select.fuzz(cases, counts)
    assert counts["masks"] == cases // 5 and counts.total() == cases


def test_ties_spread_evenly_over_equal_leaves():
    masks = jp.select([jnp.ones((100, 100))] * 4, 0.9)
    assert sum(int(m.sum()) for m in masks) == 4000
    assert all(900 < int(m.sum()) < 1100 for m in masks)


def test_within_prunes_further_and_counts_what_is_gone():
    scores = jp.scores.magnitude(tree())
    first = jp.select(jax.tree.map(jnp.negative, scores), 0.5)
    second = jp.select(scores, 0.8, within=first)
    assert abs(jp.metrics.sparsity(second) - 0.8) < 1e-2
    assert sum(removed(second).values()) == round(0.8 * (96 + 576 + 112))
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.all(a | ~b), first, second))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_within_stays_where_no_more_is_asked(scope, sparsity):
    scores = jp.scores.magnitude(tree())
    first = jp.select(scores, 0.8, scope=scope)
    again = jp.select(scores, sparsity, scope=scope, within=first)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first, again))


def test_nan_counts_as_lowest_under_jit_and_is_an_error_outside():
    scores = jnp.array([[jnp.nan, -jnp.inf, 0.0, 1.0]])
    assert jax.jit(lambda s: jp.select(s, 0.25))(scores).tolist() == [[False, True, True, True]]
    with pytest.raises(ValueError, match="a/w: 1 scores are NaN"):
        jp.select({"a": {"w": jnp.array([[jnp.nan, 1.0]])}}, 0.5)


@pytest.mark.optimized
@explicit_and_slowly_auto
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_same_on_every_mesh(kind, scope):
    params = tree()
    specs = {"a": {"w": P("x", "y"), "b": P("x")}, "c": P(None, None, None, "y"), "d": P("x")}
    on = mesh(kind, x=4, y=2)
    sharded = place(params, on, specs)
    run = jax.jit(lambda p: jp.select(jp.scores.magnitude(p), 0.7, scope=scope))
    compiled = run.lower(sharded).compile()
    masks = compiled(sharded)
    assert equal(jax.device_get(masks), jax.device_get(run(params)))
    for mask, spec in zip(jax.tree.leaves(masks), (P("x", "y"), specs["c"], P("x")), strict=True):
        assert mask.sharding.is_equivalent_to(NamedSharding(on, spec), mask.ndim)
    assert {sent.kind for sent in collectives(compiled.as_text())} == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.optimized
def test_one_device_gives_the_same_masks_in_no_extra_memory():
    code = """
import jax, jax.numpy as jnp, numpy as np, jaxprune as jp
assert jax.device_count() == 1
s = [jnp.abs(jax.random.normal(jax.random.key(i), (300, 1001))) for i in range(4)]
print(*[int(np.packbits(m).astype(np.uint64).sum()) for m in jp.select(s, 0.9)])
for args in [s], [s, jp.select(s, 0.5)]:
    f = lambda s, m=None: jp.select(s, 0.9, within=m)
    m = jax.jit(f).lower(*args).compile().memory_analysis()
    assert m.temp_size_in_bytes + m.output_size_in_bytes < 1.5 * 4 * 300300, m
"""
    s = [jnp.abs(jax.random.normal(jax.random.key(i), (300, 1001))) for i in range(4)]
    here = [int(np.packbits(m).astype(np.uint64).sum()) for m in jp.select(s, 0.9)]
    assert [int(n) for n in python("-c", code, XLA_FLAGS="").split()] == here


def many(dtype):
    """Leaves of several sizes, with many equal scores, and masks of one of them."""
    random = np.random.default_rng(0)
    shapes = [(3, 5), (40, 30), (7,), (3, 5), (0, 8), (20, 20), (2, 2, 2), (9, 9)]
    leaves = [np.round(random.normal(size=s) * 20).astype(dtype) for s in shapes]
    within = [random.random(s) < 0.7 for s in shapes]
    return leaves, [None if i == 1 else m for i, m in enumerate(within)]


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_direct_and_traced_selections_are_equal(monkeypatch, dtype, scope):
    """With brackets and copies, which else only large leaves have, and without."""
    scores, within = many(dtype)
    within[1] = np.ones((40, 30), bool)
    select = functools.partial(jp.select, scope=scope, where=lambda path, s: s.size > 0)
    for small in (False, True):
        if small:
            monkeypatch.setattr(_partition, "_CHUNK", 64)
            monkeypatch.setattr(_partition, "_SAMPLE", 64)
            monkeypatch.setattr(_partition, "_MANY", 100)
            monkeypatch.setattr(_threshold, "_FEW", 2)
            monkeypatch.setattr(jax, "device_count", lambda: 1)
        jax.clear_caches()
        traced = jax.jit(lambda scores, sparsity, m: select(scores, sparsity, within=m))
        for sparsity, masks in itertools.product([0.0, 0.25, 0.875], [None, within]):
            assert equal(select(scores, sparsity, within=masks), traced(scores, sparsity, masks))


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint32"])
def test_wide_scores_keep_their_order(dtype):
    random = np.random.default_rng(0)
    offset = 1 << 30
    scores = (random.permutation(64).reshape(8, 8) + offset).astype(dtype)
    if dtype == "float64":
        scores = 1 + (scores - offset) * 1e-12
    with jax.enable_x64(True):
        for masks in (jp.select(scores, 0.5), jax.jit(lambda s: jp.select(s, 0.5))(scores)):
            assert (masks == (scores > np.median(scores))).all()
    with pytest.raises(TypeError, match="scores must be real.*got int64"):
        jp.select(np.ones((2, 2), np.int64), 0.5)


@pytest.mark.parametrize("pattern", [jp.patterns.block((2, 2)), jp.patterns.n_of_m(2, 4, -1)])
def test_masks_are_constants_of_a_derivative(pattern):
    s = jnp.arange(16.0).reshape(4, 4)
    masks = jp.select(s, 0.5, pattern=pattern)
    derivative = jax.grad(lambda s: jnp.sum(s * jp.select(s, 0.5, pattern=pattern)))(s)
    assert (derivative == masks).all()


def test_a_traced_sparsity_is_clipped_and_checked():
    f = jax.jit(lambda s, x: jp.select(s, x))
    s = jnp.arange(16.0).reshape(4, 4)
    kept = {x: int(f(s, jnp.float32(x)).sum()) for x in (1.0, jnp.inf, -0.5, jnp.nan)}
    assert list(kept.values()) == [0, 0, 16, 16]
    error, _ = checkify.checkify(f, errors=checkify.user_checks)(s, jnp.float32(1.2))
    assert "sparsity must be in [0, 1), got 1.2" in error.get()
    error, _ = checkify.checkify(f, errors=checkify.user_checks)(s, jnp.float32(0.5))
    assert error.get() is None


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda s: jp.select(s, "0.9"), "sparsity must be a number"),
        (lambda s: jp.select(s, jnp.ones(2)), "sparsity must be a number"),
        (lambda s: jp.select(s, 0.5, pattern="2:4"), "pattern must be a pattern, got '2:4'"),
        (lambda s: jp.select([[1.0]], 0.5, where=lambda p, s: True), "0/0: scores must be arrays"),
        (lambda s: jp.select_iteratively(s, s, 0.5), "score must be a function, got"),
    ],
)
def test_wrong_kinds_are_named_in_one_line(call, error):
    with pytest.raises(TypeError, match=error) as caught:
        call(jnp.ones((4, 4)))
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_scalars_and_empty_leaves_have_a_density():
    scores = {"a": jnp.ones((4, 4)), "s": jnp.float32(1), "e": jnp.ones((0, 8))}
    masks = jp.select(scores, 0.0, scope="erk", where=lambda path, s: True)
    assert masks["s"] and masks["a"].all()


def test_traced_sizes_beyond_two_to_the_31():
    big = jax.ShapeDtypeStruct((70_000, 70_000), jnp.float32)
    out = jax.eval_shape(lambda s: jp.select(s, 0.9), [big, big])
    assert out[0].shape == big.shape


def test_select_iteratively_is_exact_and_compiles_once():
    prune = lambda sparsity: jp.select_iteratively(
        lambda params: jp.scores.magnitude(params), tree(), sparsity, rounds=7
    )
    masks = prune(0.9)
    assert sum(removed(masks).values()) == round(0.9 * (96 + 576 + 112))
    tree()
    with compilations() as compiled:
        prune(0.5)
    assert not compiled


def test_masks_that_keep_everything_are_as_a_selection_makes_them():
    params = tree() | {"step": jnp.array(3), "none": None}
    masks = _select.whole_masks(params, functools.partial(jp.select, where=lambda p, s: p != "c"))
    assert masks["c"] is None and masks["step"] is None and masks["none"] is None
    assert removed(masks) == {"a/b": 0, "a/w": 0, "d": 0}
    scores = {"a": None, "c": params["c"], "d": params["d"], "step": None, "none": None}
    masks = _select.whole_masks(params, jp.select, scores)
    assert removed(masks) == {"c": 0, "d": 0}


def test_select_iteratively_asks_the_score_alone():
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    select = functools.partial(jp.select, pattern=jp.patterns.n_of_m(2, 4, axis=-1))
    masks = jp.select_iteratively(
        lambda p: jax.tree.map(jnp.negative, p), params, 0.5, rounds=2, select=select
    )
    assert masks["w"].tolist() == [[True, True, False, False]]


def test_scores_that_turn_nan_between_rounds_name_their_leaf():
    dead = lambda p, x: jnp.sum(x @ p["w"]) * 0 * p["v"]
    params = {"v": jnp.ones((2, 2)), "w": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match="v: scores became NaN"):
        jp.select_iteratively(jp.scores.synflow(dead), params, 0.5, jnp.ones((1, 3)), rounds=2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"sparsity": 1.0}, r"\[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({}, r"^sparsity must be a number in \[0, 1\), got None"),
        ({"sparsity": 0.5, "scope": "layers"}, "^scope must be one of .*, got 'layers'"),
        ({"scope": {"nope": 0.5}}, "^nope: a path of `scope` must be"),
        ({"scope": {"d": 1.5}}, "^d: sparsity must be in"),
        ({"sparsity": 0.5, "where": lambda p, s: False}, "no leaf to prune"),
        ({"sparsity": 0.5, "within": {"a": None}}, "have"),
        (
            {
                "sparsity": 0.5,
                "within": {"a": {"w": jnp.ones((2, 2), bool), "b": None}, "c": None, "d": None},
            },
            r"a/w: masks have shape \(2, 2\)",
        ),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        jp.select(jp.scores.magnitude(tree()), **arguments)


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_more_weights_than_32_bits_count(scope):
    shapes = {"a": (2**17, 2**15 + 3), "b": (3, 2**16, 2**15)}
    abstract = {k: jax.ShapeDtypeStruct(s, jnp.bfloat16) for k, s in shapes.items()}
    for pattern in (jp.patterns.unstructured, jp.patterns.n_of_m(2, 4), jp.patterns.block((8, 8))):
        masks = jax.eval_shape(
            lambda s, p=pattern: jp.select(s, 0.9, scope=scope, pattern=p), abstract
        )
        assert {k: (m.shape, m.dtype) for k, m in masks.items()} == {
            k: (s, jnp.bool_) for k, s in shapes.items()
        }
    sizes = [math.prod(s) for s in shapes.values()]
    kept = _select.budget(scope, 0.9, list(shapes), sizes, list(shapes.values()))
    assert sum(kept) == sum(sizes) - sum(
        round(0.9 * n) for n in ([sum(sizes)] if scope != "layer" else sizes)
    )
