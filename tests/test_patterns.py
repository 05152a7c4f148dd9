"""Patterns: cells match plain NumPy, counts are exact, and masks are the same on every mesh."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import collectives, equal, explicit_and_slowly_auto, mesh, place, removed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _select, _threshold


def problem():
    keys = jax.random.split(jax.random.key(0), 2)
    quantized = lambda k, s: jnp.round(jax.random.normal(k, s) * 8)
    return {"d": quantized(keys[0], (32, 12)), "w": quantized(keys[1], (8, 96))}


PATTERNS = {  # a new pattern adds one row here
    "2:4": jp.patterns.n_of_m(2, 4),
    "n:4": jp.patterns.n_of_m(None, 4),
    "3:5, padded": jp.patterns.n_of_m(3, 5, pad=True),
    "block": jp.patterns.block((4, 3)),
    "axis": jp.patterns.axis(-1),
    "per output": jp.patterns.per_output,
}


def on_mesh(kind, select):
    """Returns the compiled selection on a mesh, its masks there, and those of one device."""
    scores, specs, on = problem(), {"d": P("x", "y"), "w": P(None, "x")}, mesh(kind, x=4, y=2)
    sharded = place(scores, on, specs)
    compiled = jax.jit(select).lower(sharded).compile()
    masks = compiled(sharded)
    for path, mask in masks.items():
        assert mask.sharding.is_equivalent_to(NamedSharding(on, specs[path]), 2)
    return compiled, jax.device_get(masks), jax.device_get(jax.jit(select)(scores))


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_contract(name):
    scores, pattern, traces = problem(), PATTERNS[name], []

    @jax.jit
    def run(scores, sparsity, within):
        traces.append(0)
        return jp.select(scores, sparsity, pattern=pattern, within=within)

    within = jp.select(scores, 0.0)
    for sparsity in (0.25, 0.5, 0.75):
        before = within
        masks = run(scores, sparsity, within)
        again = jp.select(scores, sparsity, pattern=pattern, within=within)
        assert equal(masks, again)
        assert jax.tree.all(jax.tree.map(lambda m, w: jnp.all(w | ~m), masks, within))
        assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, scores)
        within = masks
    assert len(traces) == 1
    compiled = _select._largest._cache_size()
    jp.select(scores, 0.3, pattern=pattern, within=within)
    assert _select._largest._cache_size() == compiled
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16), scores)  # the scores are small integers
    assert equal(jp.select(half, 0.75, pattern=pattern, within=before), within)


@pytest.mark.parametrize(
    "make, arguments, others",
    [
        (jp.patterns.n_of_m, (2, 4, -1), (2, 4, -2)),
        (jp.patterns.block, ([4, 3],), ((3, 4),)),
        (jp.patterns.axis, (0, -1), (-1, 0)),
    ],
)
def test_equal_arguments_give_the_same_pattern(make, arguments, others):
    assert make(*arguments) is make(*arguments) is not make(*others)
    assert hash(make(*arguments)) == hash(make(*arguments))


def test_a_pattern_of_ones_own():
    rows = jp.patterns.Pattern(
        pool=lambda s: s.sum(1), spread=lambda m, shape: jnp.broadcast_to(m[:, None], shape)
    )
    scores = {"w": jnp.arange(12.0).reshape(4, 3)}
    masks = jp.select(scores, 0.5, pattern=rows)
    assert masks["w"].tolist() == [[False] * 3] * 2 + [[True] * 3] * 2
    within = {"w": jnp.ones((4, 3), bool).at[3, 0].set(False).at[2].set(False)}
    masks = jp.select(scores, 0.25, pattern=rows, within=within)
    assert masks["w"].tolist() == within["w"].tolist()


def best_of(scores, n, m, axis):
    """Returns the n:m mask in plain NumPy: a sort of every m, ties by the hash."""
    with jax.enable_x64(True):
        tie = np.asarray(_threshold.hashed(scores.shape, jnp.uint32(0))).astype(np.float64)
    rows = lambda a: np.moveaxis(a, axis, -1).reshape(-1, m)
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
    mask = jp.select(scores, pattern=pattern)
    np.testing.assert_array_equal(mask, best_of(scores, n, m, axis))


def test_n_of_m_keeps_n_of_each_chunk_of_every_layer_of_a_stack():
    scores = jax.random.normal(jax.random.key(0), (3, 8, 5))
    pattern = jp.patterns.n_of_m(2, 4)
    masks = jp.select(scores, pattern=pattern, stacked=lambda path: True)
    assert (masks.reshape(3, 2, 4, 5).sum(2) == 2).all()
    hwio = jp.select(jax.random.normal(jax.random.key(0), (3, 3, 8, 2)), pattern=pattern)
    assert (hwio.reshape(3, 3, 2, 4, 2).sum(3) == 2).all()


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
        assert equal(masks, within)


def test_n_of_m_chooses_among_the_kept_weights():
    scores = jnp.array([[8.0, 7.0, 6.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    within = jnp.array([[False, True, True, True], [False, False, False, True]])
    masks = jp.select(scores, pattern=jp.patterns.n_of_m(2, 4, -1), within=within)
    assert masks.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]


def test_n_of_m_reports_scores_that_are_not_finite_and_keeps_them_last_under_jit():
    scores = jnp.array([[jnp.nan, 1.0, 2.0, 3.0]])
    pattern = jp.patterns.n_of_m(3, 4, -1)
    with pytest.raises(ValueError, match="1 scores are NaN"):
        jp.select({"w": scores}, pattern=pattern)
    mask = jax.jit(lambda s: jp.select(s, pattern=pattern))(scores)
    assert mask.tolist() == [[False, True, True, True]]


@pytest.mark.optimized
@explicit_and_slowly_auto
def test_n_of_m_is_the_same_on_every_mesh(kind):
    compiled, masks, expected = on_mesh(kind, lambda s: jp.select(s, 0.6, pattern=PATTERNS["2:4"]))
    assert equal(masks, expected)
    assert {sent.kind for sent in collectives(compiled.as_text())} == {"all-reduce"}


@pytest.mark.parametrize(
    "shape, axis, words",
    [
        (
            (6, 8),
            -2,
            r"^w: axis -2 must be divisible by 4 for 2:4 sparsity, got shape \(6, 8\). Pad",
        ),
        ((8, 6), -1, r"axis -1 must be divisible by 4.*pad=True.*where="),
        ((8, 8), 2, r"axis 2 must be divisible by 4 .*got shape \(8, 8\). Exclude"),
    ],
)
def test_n_of_m_that_does_not_fit_is_named(shape, axis, words):
    with pytest.raises(ValueError, match=words):
        jp.select({"w": jnp.ones(shape)}, pattern=jp.patterns.n_of_m(2, 4, axis))


@pytest.mark.parametrize("shape, axis", [((6, 8), -2), ((8, 7), -1), ((3, 5, 2), 1), ((2, 2), 0)])
def test_n_of_m_pads_a_short_chunk(shape, axis):
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


@explicit_and_slowly_auto
@pytest.mark.parametrize("name", ["block", "axis"])
def test_blocks_and_slices_are_the_same_on_every_mesh(kind, name):
    _, masks, expected = on_mesh(kind, lambda s: jp.select(s, 0.5, pattern=PATTERNS[name]))
    assert equal(masks, expected)


def cell_numbers(shape, pattern):
    """Returns the cell of every entry in plain NumPy, for a block's lengths or a set of axes."""
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
    make = jp.patterns.block if isinstance(pattern, tuple) else lambda axes: jp.patterns.axis(*axes)
    mask = np.asarray(jp.select(jnp.array(scores, jnp.float32), sparsity, pattern=make(pattern)))
    cell = cell_numbers(shape, pattern)
    size = np.bincount(cell.ravel())
    mean = np.bincount(cell.ravel(), scores.ravel()) / size
    kept = np.bincount(cell.ravel(), mask.ravel()) / size
    assert set(kept) <= {0, 1}  # no cell is kept in part
    assert (kept == 0).sum() == round(sparsity * len(size))
    if 0 < kept.sum() < len(kept):
        assert mean[kept == 1].min() >= mean[kept == 0].max() * (1 - 1e-6)


def test_blocks_that_are_pruned_in_part():
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
        assert equal(masks, only)


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
        (lambda: jp.patterns.block(()), "^block: shape must hold lengths"),
        (lambda: jp.patterns.block((2, 0)), r"got \(2, 0\)"),
        (lambda: jp.patterns.axis(), "at least one axis, got none"),
        (lambda: jp.patterns.n_of_m(None, 0), "0 < n <= m"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "pattern, words",
    [
        (
            jp.patterns.block((2, 2, 2)),
            r"^w: scores must have at least 3 axes for blocks of \(2, 2, 2\), got .*where=",
        ),
        (
            jp.patterns.axis(2),
            r"^w: scores must have the axes \(2,\) of the slices, got shape \(6, 8\)",
        ),
        (jp.patterns.n_of_m(None, 4), "^w: axis -2 must be divisible by 4 for n:4 sparsity"),
    ],
)
def test_patterns_that_do_not_fit_are_named(pattern, words):
    with pytest.raises(ValueError, match=words):
        jp.select({"w": jnp.ones((6, 8))}, 0.5, pattern=pattern)


def test_n_of_m_ramped_needs_a_sparsity():
    with pytest.raises(ValueError, match="sparsity must be a number"):
        jp.select(problem(), pattern=jp.patterns.n_of_m(None, 4))
