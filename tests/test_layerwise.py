"""Methods for one layer: exact counts, and oracles in float64 and by brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax import lax

import jaxprune as jp
from jaxprune import patterns
from jaxprune.layerwise import _allocate, _sparsegpt

METHODS = {  # a new method adds one row here
    "alps": jp.layerwise.alps,
    "dsnot": jp.layerwise.dsnot,
    "magnitude": jp.layerwise.magnitude,
    "ria": jp.layerwise.ria,
    "sparsegpt": jp.layerwise.sparsegpt,
    "wanda": jp.layerwise.wanda,
}
PATTERNS = {
    "unstructured": patterns.unstructured,
    "per_output": patterns.per_output,
    "2:4": patterns.n_of_m(2, 4),
    "block": patterns.block((4, 2)),
    "axis": patterns.axis(-1),
}
SWAPPABLE = ("unstructured", "per_output")
PAIRS = [
    (method, pattern)
    for method in METHODS
    for pattern in PATTERNS
    if method != "dsnot" or pattern in SWAPPABLE
]


@functools.cache
def layer(inputs=24, outputs=10, rows=64, seed=0):
    """Returns weights, correlated rows and their statistics."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((inputs, inputs)) + 2 * np.eye(inputs)
    x = jnp.asarray(random.standard_normal((rows, inputs)) @ mixing + 0.5, jnp.float32)
    w = normal((inputs, outputs), seed=seed + 1)
    return w, x, jp.calibrate(lambda w, x: x @ w, w, [x], gram=True)[""]


def damped(statistics, share=0.01):
    h = np.asarray(statistics.gram, np.float64) / float(statistics.count)
    return h + share * np.mean(np.diag(h)) * np.eye(len(h))


def output_error(h, w, new):
    change = np.asarray(new, np.float64) - np.asarray(w, np.float64)
    return np.sum(change * (h @ change))


@pytest.mark.parametrize("name, pattern", PAIRS)
def test_contract(name, pattern):
    w, _, statistics = layer()
    chosen = PATTERNS[pattern]
    for sparsity in (0.3, 0.5):
        with jax.numpy_dtype_promotion("strict"):
            new, mask = METHODS[name](w, statistics, sparsity, chosen)
        assert new.shape == mask.shape == w.shape
        assert (new.dtype, mask.dtype) == (jnp.float32, jnp.bool_)
        assert bool(jnp.all(jnp.isfinite(new))) and not jnp.any(new[~mask])
        # `select` keeps the right number of cells, and the mask is one that the pattern can make.
        expected = jp.select(jnp.abs(w), sparsity, pattern=chosen)
        assert int(mask.sum()) == int(expected.sum())
        again = jp.select(mask.astype(jnp.float32), sparsity, pattern=chosen)
        assert bool(jnp.all(again == mask))


@pytest.mark.parametrize("name", ["alps", "sparsegpt"])
def test_a_second_sparsity_compiles_nothing(name):
    w, _, statistics = layer()
    method = METHODS[name]
    method(w, statistics, 0.5)
    module = __import__(f"jaxprune.layerwise._{name}", fromlist=[name])
    compiled = [f for f in vars(module).values() if hasattr(f, "_cache_size")]
    before = [f._cache_size() for f in compiled]
    method(w, statistics, 0.7)
    assert len(before) > 1 and [f._cache_size() for f in compiled] == before


@pytest.mark.parametrize("name", ["wanda", "ria"])
@pytest.mark.parametrize("sparsity", [0.5, 0.37])
def test_masks_are_those_of_numpy(name, sparsity):
    w, x, statistics = layer()
    w64, x64 = np.abs(np.asarray(w, np.float64)), np.asarray(x, np.float64)
    norms = np.sqrt(np.sum(x64**2, 0))[:, None]
    if name == "ria":
        shares = w64 / w64.sum(1, keepdims=True) + w64 / w64.sum(0, keepdims=True)
        scores = shares * np.sqrt(norms)
    else:
        scores = w64 * norms
    _, mask = METHODS[name](w, statistics, sparsity)
    pruned = np.sum(~np.asarray(mask), 0)
    assert pruned.sum() == round(sparsity * w.size) and np.ptp(pruned) <= 1
    for j, column in enumerate(scores.T):
        expected = np.ones(len(column), bool)
        expected[np.argsort(column)[: pruned[j]]] = False
        np.testing.assert_array_equal(mask[:, j], expected)


def by_inverses(w, h, sparsity, size):
    """SparseGPT with the inverse of the rest of the Gram at every input, in float64."""
    w, mask = np.array(w, np.float64), np.ones(w.shape, bool)
    corner = [np.linalg.inv(h[i:, i:]) for i in range(len(h))]
    for start in range(0, len(w), size):
        block = slice(start, min(start + size, len(w)))
        scores = w[block] ** 2 / np.array([c[0, 0] for c in corner[block]])[:, None]
        ends = [round(sparsity * w.size) * n // len(w) for n in (block.start, block.stop)]
        kept = np.ones(scores.size, bool)
        kept[np.argsort(scores, None)[: ends[1] - ends[0]]] = False
        mask[block] = kept.reshape(scores.shape)
        for i in range(block.start, block.stop):
            error = np.where(mask[i], 0, w[i]) / corner[i][0, 0]
            w[i:] -= corner[i][:, :1] * error[None]
    return np.where(mask, w, 0)


@pytest.mark.parametrize("inputs", [24, 150])
def test_sparsegpt_is_the_direct_implementation(inputs):
    w, _, statistics = layer(inputs, 6, 400)
    h = damped(statistics)
    expected = by_inverses(w, h, 0.5, 128)
    new, _ = jp.layerwise.sparsegpt(w, statistics, 0.5)
    scale = output_error(h, w, expected)
    assert output_error(h, expected, new) < 1e-6 * scale
    assert abs(output_error(h, w, new) / scale - 1) < 1e-3


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_error_of_sparsegpt_is_the_sum_of_its_columns(pattern):
    w, _, statistics = layer(150, 6, 400)
    sparsity = None if pattern == "2:4" else 0.5
    if pattern == "2:4":
        w, _, statistics = layer(152, 6, 400)
    new, _, errors = _sparsegpt._sparsegpt(w, statistics, sparsity, PATTERNS[pattern])
    expected = output_error(damped(statistics), w, new)
    np.testing.assert_allclose(float(jnp.sum(errors**2)), expected, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_alps_lies_between_the_best_support_and_its_start(seed):
    w, _, statistics = layer(8, 1, 100, seed)
    h = np.asarray(statistics.gram, np.float64)
    scale = np.sqrt(np.diag(h))
    h += 0.01 * np.diag(scale**2)  # the damping of ALPS
    dense = np.asarray(w, np.float64)
    errors = []
    for support in itertools.combinations(range(8), 4):
        kept = list(support)
        best = np.zeros_like(dense)
        best[kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ dense)
        errors.append(output_error(h, dense, best))
    new, _ = jp.layerwise.alps(w, statistics, 0.5)
    start, _ = jp.layerwise.wanda(w, statistics, 0.5)
    error = output_error(h, dense, new)
    assert min(errors) * (1 - 1e-4) <= error <= output_error(h, dense, start)
    assert error <= np.quantile(errors, 0.1)


def test_alps_fits_what_it_keeps():
    w, _, statistics = layer()
    h = np.asarray(statistics.gram, np.float64)
    h += 0.01 * np.diag(np.diag(h))
    new, mask = jp.layerwise.alps(w, statistics, 0.5)
    for j in range(w.shape[1]):
        kept = np.flatnonzero(mask[:, j])
        best = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ np.asarray(w[:, j], np.float64))
        np.testing.assert_allclose(new[kept, j], best, atol=1e-3)


def swapped(w, mask, x):
    """DSnoT with loops."""
    w, x, mask = np.asarray(w, np.float64), np.asarray(x, np.float64), np.array(mask)
    mean, spread, norms = x.mean(0), x.var(0), np.linalg.norm(x, axis=0)
    for j in range(w.shape[1]):
        effect = mean * w[:, j]
        for _ in range(50):
            kept = mask[:, j]
            error = effect[~kept].sum()
            sign = np.sign(error)
            grow = max(np.flatnonzero(~kept), key=lambda i: sign * effect[i] / spread[i])
            able = [i for i in np.flatnonzero(kept) if sign * effect[i] < 0]
            if not able:
                break
            drop = min(able, key=lambda i: abs(w[i, j]) * norms[i])
            if not abs(error - effect[grow] + effect[drop]) < abs(error):
                break
            mask[[grow, drop], j] = True, False
    return mask


def test_dsnot_swaps_as_loops_do():
    w, x, statistics = layer()
    _, before = jp.layerwise.wanda(w, statistics, 0.6)
    _, after = jp.layerwise.dsnot(w, statistics, 0.6)
    expected = swapped(w, before, x)
    np.testing.assert_array_equal(after, expected)
    assert (np.asarray(before) != expected).any()

    def error(mask):
        return jnp.abs(jnp.sum(jnp.where(mask, 0, w * statistics.mean[:, None]), 0))

    assert bool(jnp.all(error(after) <= error(before) + 1e-5))


def test_dead_inputs_lose_their_weights():
    w, x, _ = layer()
    statistics = jp.calibrate(lambda w, x: x @ w, w, [x.at[:, 3].set(0.0)], gram=True)[""]
    for name in ("alps", "sparsegpt", "wanda", "ria"):
        new, mask = METHODS[name](w, statistics, 0.5)
        assert not jnp.any(new[3]) and not jnp.any(mask[3]), name


def test_owl_follows_the_outliers_to_an_exact_total():
    shapes = {"a": (16, 8), "b": (8, 24), "stack": (3, 24, 24)}
    params = normal(shapes)
    params["a"] = params["a"].at[0].multiply(40.0)  # a row of outliers

    def apply_fn(p, x):
        x = jnp.tanh(x @ p["a"]) @ p["b"]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]

    stats = jp.calibrate(apply_fn, params, [normal((32, 16))])
    scope = jp.layerwise.owl(stats, params, 0.6)
    assert scope["stack"].shape == (3,)
    pruned = scope["a"] * 128 + scope["b"] * 192 + np.sum(scope["stack"]) * 576
    np.testing.assert_allclose(pruned, 0.6 * (128 + 192 + 3 * 576))
    flat = [scope["a"], scope["b"], *scope["stack"]]
    assert scope["a"] == min(flat) and 0.15 < np.ptp(flat) < 0.17
    sparse = jp.layerwise.owl(stats, params, 0.95)
    pruned = sparse["a"] * 128 + sparse["b"] * 192 + np.sum(sparse["stack"]) * 576
    np.testing.assert_allclose(pruned, 0.95 * (128 + 192 + 3 * 576))
    assert max(sparse["b"], *sparse["stack"]) <= 0.995 + 1e-9
    blocks = jp.layerwise.owl(stats, params, 0.6, block=lambda path: path in "ab")
    assert blocks["a"] == blocks["b"]
    _, masks = jp.reconstruct(
        apply_fn, params, [normal((32, 16))], method=jp.layerwise.wanda, scope=scope
    )
    np.testing.assert_allclose(1 - masks["stack"].mean((1, 2)), scope["stack"], atol=1e-3)


def test_the_allocation_has_the_least_sum_of_errors():
    random = np.random.default_rng(0)
    choices, sizes = np.array([0.0, 0.25, 0.5, 0.75]), np.array([40, 80, 20])

    def hull(s, curve):
        """The lowest line between two choices around s."""
        pairs = itertools.product(range(4), repeat=2)
        around = [(i, j) for i, j in pairs if choices[i] <= s <= choices[j]]
        return min(np.interp(s, choices[[i, j]], curve[[i, j]]) for i, j in around)

    for _ in range(20):
        curves = np.cumsum(random.random((3, 4)) * (random.random((3, 4)) > 0.2), 1)
        curves -= curves[:, :1]
        shares = _allocate._least(sizes, choices, curves, 0.5)
        np.testing.assert_allclose(shares @ sizes, 0.5 * 140)
        error = sum(map(hull, shares, curves))
        others = [
            sum(curve[i] for curve, i in zip(curves, at, strict=True))
            for at in itertools.product(range(4), repeat=3)
            if choices[list(at)] @ sizes >= 70
        ]
        assert error <= min(others) + 1e-9


def test_allocate_protects_the_layers_that_lose_most():
    params = normal({"easy": (16, 16), "hard": (16, 16), "stack": (2, 16, 16)})
    params["easy"] = params["easy"] * (normal((16, 16), seed=5) > 0.7)  # mostly zeros

    def apply_fn(p, x):
        x = jnp.tanh(jnp.tanh(x @ p["easy"]) @ p["hard"])
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]

    stats = jp.calibrate(apply_fn, params, [normal((64, 16))], gram=True)
    scope = jp.layerwise.allocate(stats, params, 0.4, method=jp.layerwise.wanda)
    assert scope["stack"].shape == (2,)
    flat = [scope["easy"], scope["hard"], *scope["stack"]]
    np.testing.assert_allclose(np.mean(flat), 0.4)
    assert max(flat) == scope["easy"] > 0.6
    with pytest.raises(ValueError, match="sparsity must be at most that of the choices"):
        jp.layerwise.allocate(stats, params, 0.96)
    without = jp.calibrate(apply_fn, params, [normal((64, 16))])
    with pytest.raises(ValueError, match="needs the Gram"):
        jp.layerwise.allocate(without, params, 0.4)


def test_errors():
    w, _, statistics = layer()
    without = statistics._replace(gram=None)
    for method in (jp.layerwise.sparsegpt, jp.layerwise.alps):
        with pytest.raises(ValueError, match="needs the Gram, got none. Use `jp.calibrate"):
            method(w, without, 0.5)
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
            method(w, statistics, 1.0)
        with pytest.raises(ValueError, match="sparsity must be a number"):
            method(w, statistics)
        with pytest.raises(ValueError, match="axis -2 must be divisible by 5"):
            method(w, statistics, pattern=patterns.n_of_m(2, 5))
    with pytest.raises(ValueError, match="the Gram must be positive definite with a damping of"):
        jp.layerwise.sparsegpt(w, statistics._replace(gram=-statistics.gram), 0.5)
    with pytest.raises(ValueError, match="dsnot: pattern must be"):
        jp.layerwise.dsnot(w, statistics, 0.5, patterns.n_of_m(2, 4))
