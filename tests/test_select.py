import collections
import functools
import math
import os
import subprocess
import sys

import fuzz_select
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _select, _threshold

SCOPES = ["global", "layer", "erk", {"a/w": 0.25}]  # a new scope adds one entry here


def tree():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": {"w": jax.random.normal(keys[0], (8, 12)), "b": jnp.ones(12)},
        "c": jax.random.normal(keys[1], (3, 3, 4, 16)),
        "d": jax.random.normal(keys[2], (16, 7)),
    }


def removed(masks):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): int((~m).sum())
        for p, m in jax.tree_util.tree_leaves_with_path(masks)
    }


def expected(scope, sparsity, sizes, shapes):
    """Counts removed weights in plain NumPy and Python."""
    total = sum(sizes.values())
    if scope == "layer":
        return {p: round(sparsity * n) for p, n in sizes.items()}
    if scope == "erk":
        kept, dense = total - round(sparsity * total), set()
        while True:
            rest = [p for p in sizes if p not in dense]
            density = {p: sum(shapes[p]) / np.prod(shapes[p]) for p in rest}
            left = kept - sum(sizes[p] for p in dense)
            scale = left / sum(density[p] * sizes[p] for p in rest)
            over = [p for p in rest if scale * density[p] > 1]
            if not over:
                break
            dense.add(max(over, key=density.get))
        share = {p: sizes[p] if p in dense else scale * density[p] * sizes[p] for p in sizes}
        return {p: sizes[p] - share[p] for p in sizes}
    return {p: round(scope.get(p, sparsity) * n) for p, n in sizes.items()}


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_exact_counts_by_scope(scope, sparsity):
    scores = jp.scores.magnitude(tree())
    masks = jp.select(scores, sparsity, scope=scope)
    shapes = {"a/w": (8, 12), "c": (3, 3, 4, 16), "d": (16, 7)}
    sizes = {p: int(np.prod(s)) for p, s in shapes.items()}
    found = removed(masks)
    assert masks["a"]["b"] is None
    if scope == "global" or scope == "erk":
        assert sum(found.values()) == round(sparsity * sum(sizes.values()))
    if scope == "erk":
        for path, count in expected(scope, sparsity, sizes, shapes).items():
            assert abs(found[path] - count) < 1
    elif scope != "global":
        assert found == expected(scope, sparsity, sizes, shapes)


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


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    hnp.arrays(np.float32, (6, 7), elements=st.floats(-4, 4, width=32)), st.floats(0, 0.999)
)
def test_matches_numpy_whatever_the_scores(scores, sparsity):
    mask = np.asarray(jp.select(jnp.array(scores), sparsity))
    assert (~mask).sum() == round(sparsity * scores.size)
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


def test_fuzzing():
    found = collections.Counter()
    fuzz_select.fuzz(100, found)
    assert found["masks"] == 20 and sum(found.values()) == 100


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


def test_a_pattern_pools_scores_and_spreads_masks():
    rows = jp.patterns.Pattern(
        pool=lambda s: s.sum(1), spread=lambda m, shape: jnp.broadcast_to(m[:, None], shape)
    )
    scores = {"w": jnp.arange(12.0).reshape(4, 3)}
    masks = jp.select(scores, 0.5, pattern=rows)
    assert masks["w"].tolist() == [[False] * 3] * 2 + [[True] * 3] * 2
    within = {"w": jnp.ones((4, 3), bool).at[3, 0].set(False).at[2].set(False)}
    masks = jp.select(scores, 0.25, pattern=rows, within=within)
    assert masks["w"].tolist() == within["w"].tolist()


def test_nan_counts_as_lowest_under_jit_and_is_an_error_outside():
    scores = jnp.array([[jnp.nan, -jnp.inf, 0.0, 1.0]])
    assert jax.jit(lambda s: jp.select(s, 0.25))(scores).tolist() == [[False, True, True, True]]
    with pytest.raises(ValueError, match="a/w: 1 scores are NaN"):
        jp.select({"a": {"w": jnp.array([[jnp.nan, 1.0]])}}, 0.5)


@pytest.mark.optimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_same_on_every_mesh(kind, scope):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    params = tree()
    specs = {"a": {"w": P("x", "y"), "b": P("x")}, "c": P(None, None, None, "y"), "d": P("x")}
    sharded = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), params, specs)
    run = jax.jit(lambda p: jp.select(jp.scores.magnitude(p), 0.7, scope=scope))
    masks = run(sharded)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((jax.device_get(a) == b).all()), masks, jax.device_get(run(params))
        )
    )
    for mask, spec in zip(jax.tree.leaves(masks), (P("x", "y"), specs["c"], P("x")), strict=True):
        assert mask.sharding.is_equivalent_to(NamedSharding(mesh, spec), mask.ndim)
    text = run.lower(sharded).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.optimized
def test_one_device_gives_the_same_masks_in_no_extra_memory():
    code = """
import jax, jax.numpy as jnp, numpy as np, jaxprune as jp
assert jax.device_count() == 1
s = [jnp.abs(jax.random.normal(jax.random.key(i), (300, 1001))) for i in range(4)]
print(*[int(np.packbits(m).astype(np.uint64).sum()) for m in jp.select(s, 0.9)])
m = jax.jit(lambda s: jp.select(s, 0.9)).lower(s).compile().memory_analysis()
assert m.temp_size_in_bytes + m.output_size_in_bytes < 1.5 * 4 * 300300, m
"""
    env = {**os.environ, "XLA_FLAGS": ""}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    s = [jnp.abs(jax.random.normal(jax.random.key(i), (300, 1001))) for i in range(4)]
    here = [int(np.packbits(m).astype(np.uint64).sum()) for m in jp.select(s, 0.9)]
    assert [int(n) for n in out.stdout.split()] == here


def test_traced_sizes_beyond_two_to_the_31():
    big = jax.ShapeDtypeStruct((70_000, 70_000), jnp.float32)
    out = jax.eval_shape(lambda s: jp.select(s, 0.9), [big, big])
    assert out[0].shape == big.shape


def test_select_iteratively_is_exact_and_compiles_once():
    traces = []

    def score(params):
        traces.append(0)
        return jp.scores.magnitude(params)

    masks = jp.select_iteratively(score, tree(), 0.9, rounds=7)
    assert sum(removed(masks).values()) == round(0.9 * (96 + 576 + 112))
    count = len(traces)
    jp.select_iteratively(score, tree(), 0.5, rounds=7)
    assert len(traces) == count


def test_select_iteratively_asks_the_score_alone():
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    select = functools.partial(jp.select, pattern=jp.patterns.n_of_m(2, 4, axis=-1))
    masks = jp.select_iteratively(
        lambda p: jax.tree.map(jnp.negative, p), params, 0.5, rounds=2, select=select
    )
    assert masks["w"].tolist() == [[True, True, False, False]]


def test_scores_that_turn_nan_between_rounds_name_their_leaf():
    dead = lambda p, x: jnp.sum(x @ p["w"]) * 0 * p["v"]  # noqa: E731
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


@pytest.mark.parametrize("dtype", [jnp.uint32, jnp.uint64])
def test_hash_of_the_index_is_one_to_one_and_spreads(dtype):
    with jax.enable_x64(True):
        hashed = np.asarray(_threshold.hashed((64, 32, 32), jnp.asarray(7, dtype)))
    assert hashed.dtype == dtype and len(np.unique(hashed)) == hashed.size
    share = (hashed < np.iinfo(hashed.dtype).max // 2).mean((1, 2))
    assert abs(share - 0.5).max() < 0.08


@pytest.mark.parametrize("pattern", [jp.patterns.unstructured, jp.patterns.n_of_m(2, 3, 0)])
def test_counts_and_indices_of_64_bits(monkeypatch, pattern):
    scores = {"ties": jnp.ones((33, 65)), "w": jax.random.normal(jax.random.key(0), (33, 67))}
    monkeypatch.setattr(_threshold, "_INT32_END", 100)
    monkeypatch.setattr(_threshold, "UINT32_END", 100)
    wide = jp.select(scores, 0.6, pattern=pattern)
    monkeypatch.undo()
    jax.clear_caches()
    narrow = jp.select(scores, 0.6, pattern=pattern)
    assert sum(removed(wide).values()) == round(0.6 * 33 * (65 + 67))
    assert (wide["w"] == narrow["w"]).all() and not (wide["ties"] == narrow["ties"]).all()


@pytest.mark.parametrize("scope", SCOPES[:3])
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


def best_of(scores, n, m, axis):
    """Gives the n:m mask in plain NumPy: a sort of every m, ties by the hash."""
    with jax.enable_x64(True):
        tie = np.asarray(_threshold.hashed(scores.shape, jnp.uint32(0))).astype(np.float64)
    rows = lambda a: np.moveaxis(a, axis, -1).reshape(-1, m)  # noqa: E731
    order = np.lexsort((-rows(tie), -rows(np.asarray(scores, np.float32))))
    kept = np.zeros(order.shape, bool)
    np.put_along_axis(kept, order[:, :n], True, 1)
    moved = np.moveaxis(scores, axis, -1).shape
    return np.moveaxis(kept.reshape(moved), -1, axis)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n, m, axis", [(2, 4, -2), (1, 4, -1), (4, 8, 0), (3, 3, 2), (5, 8, -2)])
def test_n_of_m_matches_a_sort(n, m, axis, dtype):
    shape = [6, 8, 4] if axis == -1 else [8, 16, 6]
    scores = jnp.round(jax.random.normal(jax.random.key(0), shape) * 4).astype(dtype)
    pattern = jp.patterns.n_of_m(n, m, axis)
    assert jp.patterns.n_of_m(n, m, axis) is pattern and hash(pattern) == hash(pattern)
    mask = jp.select(scores, pattern=pattern)
    np.testing.assert_array_equal(mask, best_of(scores, n, m, axis))


def test_n_of_m_keeps_groups_of_every_layer_of_a_stack():
    scores = jax.random.normal(jax.random.key(0), (3, 8, 5))
    pattern = jp.patterns.n_of_m(2, 4)
    masks = jp.select(scores, pattern=pattern, stacked=lambda path: True)
    assert (masks.reshape(3, 2, 4, 5).sum(2) == 2).all()
    hwio = jp.select(jax.random.normal(jax.random.key(0), (3, 3, 8, 2)), pattern=pattern)
    assert (hwio.reshape(3, 3, 2, 4, 2).sum(3) == 2).all()


def problem():
    keys = jax.random.split(jax.random.key(0), 2)
    quantized = lambda k, s: jnp.round(jax.random.normal(k, s) * 8)  # noqa: E731
    return {"d": quantized(keys[0], (32, 12)), "w": quantized(keys[1], (8, 96))}


@pytest.mark.parametrize("scope", ["global", "layer", "erk", {"d": 0.6}], ids=str)
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.55, 0.8])
def test_n_of_m_with_a_sparsity_prunes_further(scope, sparsity):
    scores, pattern = problem(), jp.patterns.n_of_m(2, 4)
    only = jp.select(scores, pattern=pattern)
    masks = jp.select(scores, sparsity, scope=scope, pattern=pattern)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.all(a | ~b), only, masks))
    share = max(sparsity, 0.5)
    if isinstance(scope, dict):
        assert removed(masks) == {"d": round(0.6 * 384), "w": round(share * 768)}
    elif scope == "layer":
        assert removed(masks) == {"d": round(share * 384), "w": round(share * 768)}
    else:
        assert sum(removed(masks).values()) == round(share * (384 + 768))
    if scope == "global":  # as where the others had been gone before
        within = jp.select(scores, sparsity, within=only)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, masks, within))


def test_n_of_m_chooses_among_what_is_within():
    scores = jnp.array([[8.0, 7.0, 6.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    within = jnp.array([[False, True, True, True], [False, False, False, True]])
    masks = jp.select(scores, pattern=jp.patterns.n_of_m(2, 4, -1), within=within)
    assert masks.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]


def test_n_of_m_reports_what_is_not_finite_and_keeps_it_last_under_jit():
    scores = jnp.array([[jnp.nan, 1.0, 2.0, 3.0]])
    pattern = jp.patterns.n_of_m(3, 4, -1)
    with pytest.raises(ValueError, match="1 scores are NaN"):
        jp.select({"w": scores}, pattern=pattern)
    mask = jax.jit(lambda s: jp.select(s, pattern=pattern))(scores)
    assert mask.tolist() == [[False, True, True, True]]


@pytest.mark.optimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_n_of_m_is_the_same_on_every_mesh(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    scores = problem()
    run = jax.jit(lambda s: jp.select(s, 0.6, pattern=jp.patterns.n_of_m(2, 4)))
    specs = {"d": P("x", "y"), "w": P(None, "x")}
    sharded = jax.tree.map(lambda s, p: jax.device_put(s, NamedSharding(mesh, p)), scores, specs)
    masks = run(sharded)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((jax.device_get(a) == b).all()), masks, run(scores))
    )
    for name, mask in masks.items():
        assert mask.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), 2)
    text = run.lower(sharded).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize(
    "shape, axis, words",
    [
        ((6, 8), -2, r"^w: 2:4 sparsity needs axis -2 divisible by 4, got shape \(6, 8\). Fill"),
        ((8, 6), -1, r"axis -1 divisible by 4.*pad=True.*where="),
        ((8, 8), 2, r"axis 2 divisible"),
    ],
)
def test_n_of_m_that_does_not_fit_is_named(shape, axis, words):
    with pytest.raises(ValueError, match=words):
        jp.select({"w": jnp.ones(shape)}, pattern=jp.patterns.n_of_m(2, 4, axis))


@pytest.mark.parametrize("shape, axis", [((6, 8), -2), ((8, 7), -1), ((3, 5, 2), 1), ((2, 2), 0)])
def test_n_of_m_fills_a_short_group_up(shape, axis):
    scores = 1 + jax.random.uniform(jax.random.key(0), shape)
    pattern = jp.patterns.n_of_m(2, 4, axis, pad=True)
    missing = [(0, -n % 4 if i == axis % len(shape) else 0) for i, n in enumerate(shape)]
    full = jp.select(jnp.pad(scores, missing), pattern=jp.patterns.n_of_m(2, 4, axis))
    expected = full[tuple(slice(n) for n in shape)]
    np.testing.assert_array_equal(jp.select(scores, pattern=pattern), expected)
    further = jp.select(scores, 0.8, pattern=pattern)
    assert not (further & ~expected).any() and further.sum() == scores.size - round(
        0.8 * scores.size
    )


@pytest.mark.parametrize("n, m", [(0, 4), (5, 4), (-1, 4)])
def test_n_of_m_needs_n_up_to_m(n, m):
    with pytest.raises(ValueError, match="0 < n <= m"):
        jp.patterns.n_of_m(n, m)


PATTERNS = {  # a new pattern adds one row here
    "n_of_m": jp.patterns.n_of_m(2, 4),
    "n_of_m, ramped": jp.patterns.n_of_m(None, 4),
    "n_of_m, filled up": jp.patterns.n_of_m(3, 5, pad=True),
    "block": jp.patterns.block((4, 3)),
    "axis": jp.patterns.axis(-1),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_contract(name):
    scores, pattern, traces = problem(), PATTERNS[name], []

    @jax.jit
    def run(scores, sparsity, within):
        traces.append(0)
        return jp.select(scores, sparsity, pattern=pattern, within=within)

    within = jp.select(scores, 0.0)
    for sparsity in (0.25, 0.5, 0.75):
        masks = run(scores, sparsity, within)
        again = jp.select(scores, sparsity, pattern=pattern, within=within)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, masks, again))
        assert jax.tree.all(jax.tree.map(lambda m, w: jnp.all(w | ~m), masks, within))
        assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, scores)
        within = masks
    assert len(traces) == 1
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16), scores)  # the scores are small integers
    same = jp.select(half, 0.75, pattern=pattern), jp.select(scores, 0.75, pattern=pattern)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *same))


@pytest.mark.parametrize("name", ["block", "axis"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_blocks_and_slices_are_the_same_on_every_mesh(kind, name):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    scores, specs = problem(), {"d": P("x", "y"), "w": P(None, "x")}
    run = jax.jit(lambda s: jp.select(s, 0.5, pattern=PATTERNS[name]))
    sharded = jax.tree.map(lambda s, p: jax.device_put(s, NamedSharding(mesh, p)), scores, specs)
    masks, expected = run(sharded), run(scores)
    for leaf, mask in masks.items():
        assert (jax.device_get(mask) == expected[leaf]).all()
        assert mask.sharding.is_equivalent_to(NamedSharding(mesh, specs[leaf]), 2)


def unit_numbers(shape, pattern):
    """Gives the unit of every entry in plain NumPy, for a block's lengths or a set of axes."""
    index = np.indices(shape)
    if isinstance(pattern, tuple):
        first = len(shape) - len(pattern)
        parts = [*index[:first], *(i // n for i, n in zip(index[first:], pattern, strict=True))]
    else:
        parts = [index[a] for a in sorted(a % len(shape) for a in pattern)]
    flat = np.stack([np.ravel(p) for p in parts])
    return np.unique(flat, axis=1, return_inverse=True)[1].reshape(shape)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(
    st.lists(st.integers(1, 6), min_size=2, max_size=3),
    st.one_of(
        st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple),
        st.sets(st.sampled_from([-2, -1, 0]), min_size=1),
    ),
    st.floats(0, 0.99),
)
def test_blocks_and_slices_match_numpy(shape, pattern, sparsity):
    scores = np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape) ** 2 + 1.0
    made = jp.patterns.block(pattern) if isinstance(pattern, tuple) else jp.patterns.axis(*pattern)
    mask = np.asarray(jp.select(jnp.array(scores, jnp.float32), sparsity, pattern=made))
    unit = unit_numbers(shape, pattern)
    size = np.bincount(unit.ravel())
    mean = np.bincount(unit.ravel(), scores.ravel()) / size
    kept = np.bincount(unit.ravel(), mask.ravel()) / size
    assert set(kept) <= {0, 1}  # no unit is cut
    assert (kept == 0).sum() == round(sparsity * len(size))
    if 0 < kept.sum() < len(kept):
        assert mean[kept == 1].min() >= mean[kept == 0].max() * (1 - 1e-6)


def test_blocks_with_what_is_gone():
    scores = jnp.arange(16.0).reshape(4, 4)
    within = jnp.ones((4, 4), bool).at[0, 0].set(False).at[2:, 2:].set(False)
    masks = jp.select(scores, 0.5, pattern=jp.patterns.block((2, 2)), within=within)
    assert masks.astype(int).tolist() == [[0, 0, 1, 1]] + [[0, 0, 1, 1]] + [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize("sparsity", [0.25, 1 / 3, 0.5, 0.6, 0.75])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_n_of_m_ramped_follows_the_sparsity(scope, sparsity):
    masks = jp.select(problem(), sparsity, scope=scope, pattern=jp.patterns.n_of_m(None, 4))
    assert sum(removed(masks).values()) == round(sparsity * (384 + 768))
    for mask in jax.tree.leaves(masks):
        n = np.ceil((1 - sparsity if scope != "erk" else mask.mean()) * 4 - 1e-9)
        assert mask.reshape(-1, 4, mask.shape[1]).sum(1).max() <= n
    if sparsity in (0.5, 0.75) and scope != "erk":
        only = jp.select(problem(), pattern=jp.patterns.n_of_m(int(4 - 4 * sparsity), 4))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, masks, only))


def test_n_of_m_ramped_tightens_in_training():
    params = problem()
    select = functools.partial(jp.select, pattern=jp.patterns.n_of_m(None, 4))
    schedule = jp.schedules.stepwise(0.5, begin=1, end=2, steps=2)
    tx = jp.gradual(optax.sgd(0.0), jp.scores.magnitude, schedule, select=select)
    state, step = tx.init(params), jax.jit(tx.update)
    for n in (4, 3, 2):
        _, state = step(params, state, params)
        for mask in jax.tree.leaves(jp.get_masks(state)):
            assert (mask.reshape(-1, 4, mask.shape[1]).sum(1) == n).all()
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: jp.patterns.block(()), "block needs lengths"),
        (lambda: jp.patterns.block((2, 0)), r"got \(2, 0\)"),
        (lambda: jp.patterns.axis(), "at least one axis"),
        (lambda: jp.patterns.n_of_m(None, 0), "0 < n <= m"),
    ],
)
def test_patterns_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "pattern, words",
    [
        (jp.patterns.block((2, 2, 2)), r"^w: blocks of \(2, 2, 2\) need 3 axes.*where="),
        (jp.patterns.axis(2), r"^w: slices along axes \(2,\) need such axes, got shape \(6, 8\)"),
        (jp.patterns.n_of_m(None, 4), "^w: n:4 sparsity needs axis -2 divisible by 4"),
    ],
)
def test_patterns_that_do_not_fit_are_named(pattern, words):
    with pytest.raises(ValueError, match=words):
        jp.select({"w": jnp.ones((6, 8))}, 0.5, pattern=pattern)


def test_n_of_m_ramped_needs_a_sparsity():
    with pytest.raises(ValueError, match="sparsity must be a number"):
        jp.select(problem(), pattern=jp.patterns.n_of_m(None, 4))
