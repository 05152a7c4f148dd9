import functools

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, mesh, normal, place, slow_unless
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.scores import _fpgm, _synflow


def apply_fn(params, x):
    w, b, v = (params[k].astype(x.dtype) for k in "wbv")  # JAX multiplies no 8-bit floats
    return jax.nn.relu(x @ w + b) @ v


def loss(params, x, y):
    return jnp.mean((apply_fn(params, x) - y) ** 2)


def problem(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    wide = "float32" if dtype.startswith("float8") else dtype
    params = {
        "w": jax.random.normal(keys[0], (4, 5), wide).astype(dtype),
        "b": jnp.zeros((1, 5), dtype),
        "v": jax.random.normal(keys[1], (5, 2), wide).astype(dtype),
        "step": jnp.array(3),
        "key": jax.random.key(7),
        "none": None,
    }
    return params, (jax.random.normal(keys[2], (6, 4), wide), jnp.ones((6, 2), wide))


SCORES = {  # a new score adds one row here: (params, batch) -> scores
    "magnitude": lambda p, b: jp.scores.magnitude(p),
    "random": lambda p, b: jp.scores.random(p, jax.random.key(1)),
    "slimming": lambda p, b: jp.scores.slimming(p, where=lambda path, w: True),
    "gradient": lambda p, b: jp.scores.gradient(loss)(p, *b),
    "taylor": lambda p, b: jp.scores.taylor(loss)(p, *b),
    "snip": lambda p, b: jp.scores.snip(loss)(p, *b),
    "grasp": lambda p, b: jp.scores.grasp(loss)(p, *b),
    "synflow": lambda p, b: jp.scores.synflow(apply_fn)(p, b[0]),
    "standardized_magnitude": lambda p, b: jp.scores.standardized_magnitude(p),
    "lamp": lambda p, b: jp.scores.lamp(p),
    "fpgm": lambda p, b: jp.scores.fpgm(p),
    "fisher": lambda p, b: jp.scores.fisher(loss)(p, *b),
    "woodfisher": lambda p, b: jp.scores.woodfisher(loss, block=4)(p, *b),
    "obd": lambda p, b: jp.scores.obd(loss)(p, *b),
    "obd_hutchinson": lambda p, b: jp.scores.obd_hutchinson(loss, 3)(p, jax.random.key(1), *b),
}


DTYPES = ["float32", "bfloat16", "float64", "float16", "float8_e5m2"]


@pytest.mark.filterwarnings("ignore:obd")
@pytest.mark.parametrize("dtype", slow_unless(["bfloat16"], DTYPES))
@pytest.mark.parametrize("name", SCORES)
def test_score_contract(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, batch = problem(dtype)
        traces = []
        score = jax.jit(lambda *a: traces.append(0) or SCORES[name](*a))
        result = score(params, batch)
        score(params, batch)
        assert len(traces) == 1
        assert result["step"] is None and result["key"] is None and result["none"] is None
        eager = SCORES[name](params, batch)
    for leaf in ("w", "b", "v"):
        assert result[leaf].dtype == jnp.float32 and result[leaf].shape == params[leaf].shape
        np.testing.assert_allclose(result[leaf], eager[leaf], rtol=2e-2, atol=1e-3)


@functools.cache
def numpy_oracles():
    """Computes scores of `w` and `v` in plain NumPy, in float64."""
    params, (x, y) = problem()
    w, b, v = (np.asarray(params[k], np.float64) for k in "wbv")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def grads(w, v):
        h = np.maximum(x @ w + b, 0)
        d = 2 * (h @ v - y) / y.size
        return x.T @ ((d @ v.T) * (h > 0)), h.T @ d

    gw, gv = grads(w, v)
    e = 1e-6
    (pw, pv), (mw, mv) = grads(w + e * gw, v + e * gv), grads(w - e * gw, v - e * gv)
    total = np.abs(gw * w).sum() + np.abs(gv * v).sum()
    flow_w = np.abs(w) * np.abs(v).sum(1)[None]
    flow_v = np.abs(v) * np.abs(w).sum(0)[:, None]
    largest = max(flow_w.max(), flow_v.max())

    def lamp(w):
        return w**2 / np.sum(w**2 * (np.abs(w) >= np.abs(w)[..., None, None]), (-2, -1))

    def fpgm(w):
        distances = np.linalg.norm(w[:, :, None] - w[:, None], axis=0).sum(0)
        return np.broadcast_to(distances / len(w), w.shape)

    return {
        "standardized_magnitude": (np.abs(w) / w.std(), np.abs(v) / v.std()),
        "lamp": (lamp(w), lamp(v)),
        "fpgm": (fpgm(w), fpgm(v)),
        "magnitude": (np.abs(w), np.abs(v)),
        "slimming": (np.abs(w), np.abs(v)),
        "gradient": (np.abs(gw), np.abs(gv)),
        "taylor": (np.abs(gw * w), np.abs(gv * v)),
        "snip": (np.abs(gw * w) / total, np.abs(gv * v) / total),
        "synflow": (flow_w / largest, flow_v / largest),
        "grasp": (w * (pw - mw) / (2 * e), v * (pv - mv) / (2 * e)),
    }


@pytest.mark.parametrize(
    "name",
    ["standardized_magnitude", "lamp", "fpgm", "magnitude", "slimming"]
    + ["gradient", "taylor", "snip", "synflow", "grasp"],
)
def test_score_equals_numpy(name):
    params, batch = problem()
    if name == "grasp":  # b stays fixed in the oracle
        fixed = {k: params[k] for k in "wv"}
        f = lambda p, x, y: loss({**p, "b": params["b"]}, x, y)
        scores = jp.scores.grasp(f)(fixed, *batch)
    else:
        scores = SCORES[name](params, batch)
    w, v = numpy_oracles()[name]
    np.testing.assert_allclose(scores["w"], w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scores["v"], v, rtol=1e-3, atol=1e-5)


def chain(depth, width=16, scale=1.0):
    keys = jax.random.split(jax.random.key(0), depth)
    return [scale * jax.random.normal(k, (width, width)) for k in keys]


def deep(params, x):
    for w in params:
        x = jax.nn.relu(x @ w)
    return x


def test_synflow_is_conserved_from_layer_to_layer():
    scores = jp.scores.synflow(deep)(chain(5), jnp.ones((1, 16)))
    sums = [float(s.sum()) for s in scores]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)


def test_synflow_survives_depths_where_float32_overflows():
    scores = jp.scores.synflow(deep)(chain(60, scale=5.0), jnp.ones((1, 16)))
    assert all(bool(jnp.all(jnp.isfinite(s))) for s in scores)


@pytest.mark.slow
def test_synflow_keeps_a_path_where_others_lose_a_layer():
    params = [
        jax.random.normal(k, s) * c
        for k, s, c in zip(
            jax.random.split(jax.random.key(0), 3),
            [(16, 64), (64, 64), (64, 4)],
            [0.1, 1.0, 1.0],
            strict=True,
        )
    ]
    x = jnp.ones((2, 16))
    masks = jp.select_iteratively(jp.scores.synflow(deep), params, 0.997, x, rounds=100)
    assert all(bool(m.any()) for m in masks)
    assert not all(bool(m.any()) for m in jp.select(jp.scores.magnitude(params), 0.997))
    snip = jp.scores.snip(lambda p, x: jnp.sum(deep(p, x)))(params, x)
    assert sum(int(m.sum()) for m in jp.select(snip, 0.997)) == sum(int(m.sum()) for m in masks)


def test_synflow_without_flow_is_an_error():
    with pytest.raises(ValueError, match="flow R must be positive and finite, got 0.0"):
        jp.scores.synflow(deep)([jnp.zeros((3, 3))], jnp.ones((1, 3)))


def linen_norm():
    net = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.Dense(1)])
    return net.apply, net.init(jax.random.key(0), jnp.ones((1, 2)))


def haiku_norm():
    def network(x, train):
        return hk.Linear(1)(hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), train))

    net = hk.without_apply_rng(hk.transform_with_state(network))
    params = net.init(jax.random.key(0), jnp.ones((1, 2)), True)
    return (lambda p, x: net.apply(*p, x, False)[0]), params


def written(norm, **shapes):
    """A network around a norm of some leaves."""
    shapes = {"w": (2, 3), "v": (3, 1), **shapes}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return (lambda p, x: norm(x @ p["w"], p) @ p["v"]), params


def folded(x, p):
    scale = jax.lax.rsqrt(p["variance"])
    return x * scale + (p["b"] - p["mean"] * scale)


def scanned(x, p):
    return jax.lax.scan(lambda x, m: (jax.nn.relu(x - m[None]), None), x, p["m"])[0]


ROW = (1, 3)
RUNNING_MEANS = {  # a network with params, and the leaves that are running means
    "linen": (linen_norm, {"batch_stats/layers_1/mean"}),
    "haiku": (haiku_norm, {"1/batch_norm/~/mean_ema/average"}),
    "minus": (lambda: written(lambda x, p: x - p["m"] + p["b"], m=ROW, b=ROW), {"m"}),
    "plus the negative": (lambda: written(lambda x, p: x + -p["m"], m=ROW), {"m"}),
    "scan": (lambda: written(scanned, m=(2, 3)), {"m"}),
    "one scale and one shift": (
        lambda: written(folded, b=ROW, mean=ROW, variance=ROW),
        {"mean"},
    ),
    "an offset": (lambda: written(lambda x, p: x + p["mean"], mean=ROW), set()),
    "a layer": (lambda: written(lambda x, p: x @ p["mean"], mean=(3, 3)), set()),
    "a gate": (lambda: written(lambda x, p: x * (1.5 - p["m"]), m=ROW), set()),
    "a residual": (lambda: written(lambda x, p: (1.5 * x - p["m"]) * p["m"], m=ROW), set()),
}


@pytest.mark.parametrize("name", RUNNING_MEANS)
def test_synflow_zeroes_running_means(name):
    make, expected = RUNNING_MEANS[name]
    with jax.numpy_rank_promotion("allow"):  # of flax
        f, params = make()
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        flat = {jax.tree_util.keystr(n, simple=True, separator="/"): w for n, w in flat}
        x = jnp.ones((1, 2))
        means = zip(flat, _synflow._running_means(f, params, (x,)), strict=True)
        assert {n for n, is_mean in means if is_mean} == expected
        changed = ([w + c * (n in expected) for n, w in flat.items()] for c in (0, 9))
        before, after = (jp.scores.synflow(f)(structure.unflatten(c), x) for c in changed)
        assert bits(before) == bits(after)


def test_half_precision_products_do_not_underflow():
    f = lambda w: jnp.sum(w * jnp.float16(1e-4))
    assert jp.scores.taylor(f)(jnp.full((1, 1), 1e-4, jnp.float16)).item() > 0


def test_bad_params_are_named():
    with pytest.raises(
        TypeError, match="act: params must hold arrays, got function.*eqx.partition"
    ):
        jp.scores.magnitude({"act": lambda x: x, "w": jnp.ones(2)})
    with pytest.raises(ValueError, match="floating-point"):
        jp.scores.magnitude({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="p must be above 0"):
        jp.scores.magnitude(jnp.ones(2), p=0)


@pytest.mark.filterwarnings("ignore:obd")
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", SCORES)
def test_scores_have_the_sharding_of_their_leaf(name, kind):
    on = mesh(kind, x=2)
    params, batch = problem()
    specs = {"w": P("x"), "b": P(), "v": P(None, "x")}
    sharded = place({k: params[k] for k in "wbv"}, on, specs)
    batch = place(batch, on, P())

    def f(p, x):
        hidden = jax.nn.relu(jnp.einsum("ni,io->no", x, p["w"], **out(P())) + p["b"])
        return jnp.einsum("ni,io->no", hidden, p["v"], **out(P(None, "x")))

    def out(spec):
        return {"out_sharding": NamedSharding(on, spec)} if kind == AxisType.Explicit else {}

    objective = lambda p, x, y: jnp.sum(f(p, x) ** 2)
    data_free = lambda p: getattr(jp.scores, name)(p)
    scores = {
        **dict.fromkeys(("magnitude", "standardized_magnitude", "lamp", "fpgm"), data_free),
        "obd_hutchinson": lambda p: jp.scores.obd_hutchinson(objective)(
            p, jax.random.key(1), *batch
        ),
        "slimming": lambda p: jp.scores.slimming(p, where=lambda path, w: True),
        "random": lambda p: jp.scores.random(p, jax.random.key(1)),
        "synflow": lambda p: jp.scores.synflow(f)(p, batch[0]),
    }.get(name) or (lambda p: getattr(jp.scores, name)(objective)(p, *batch))
    result = scores(sharded)
    for leaf in "wv":
        assert result[leaf].sharding.is_equivalent_to(NamedSharding(on, specs[leaf]), 2), leaf


def test_standardized_magnitude_is_one_threshold_for_all_layers():
    params = {"w": 5 * jax.random.normal(jax.random.key(0), (8, 8)), "v": jnp.eye(8)}
    scores = jp.scores.standardized_magnitude(params)
    for leaf, w in params.items():
        np.testing.assert_array_equal(scores[leaf] > 0.7, np.abs(w) > 0.7 * np.std(w))
    equal = jp.scores.standardized_magnitude({"ones": jnp.ones((2, 2)), "zeros": jnp.zeros(2)})
    assert np.all(np.isfinite(equal["ones"])) and equal["ones"].min() > 1e6
    assert equal["zeros"].tolist() == [0, 0]


def test_lamp_keeps_the_order_and_the_largest_of_every_layer():
    params = {"w": jax.random.normal(jax.random.key(0), (300, 1000)), "v": jnp.full((2, 2), 1e-25)}
    scores = jp.scores.lamp({**params, "zeros": jnp.zeros((2, 2)), "none": jnp.zeros((0, 2))})
    order = np.argsort(np.abs(params["w"]), axis=None, kind="stable")
    ordered = np.asarray(scores["w"]).ravel()[order]
    assert np.all(np.diff(ordered) >= 0)
    squares = np.asarray(params["w"], np.float64).ravel()[order] ** 2
    np.testing.assert_allclose(ordered, squares / np.cumsum(squares[::-1])[::-1], rtol=1e-5)
    np.testing.assert_allclose(np.sort(scores["v"].ravel()), [1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-6)
    assert not scores["zeros"].any() and scores["none"].shape == (0, 2)
    masks = jp.select(scores, 1 - 2 / 300004, where=lambda path, s: path in "wv")
    assert masks["w"].any() and masks["v"].any()


@pytest.mark.parametrize("axis", [-1, 0, 2])
def test_fpgm_ranks_filters_by_their_distances(axis):
    w = np.random.default_rng(0).normal(size=(3, 4, 5, 6))
    filters = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    distances = np.linalg.norm(filters[:, None] - filters[None], axis=-1).sum(1)
    scores = jp.scores.fpgm({"w": jnp.array(w, "float32"), "b": jnp.ones(6)}, axis)
    assert scores["b"] is None
    summed = np.moveaxis(scores["w"], axis, 0).reshape(len(filters), -1).sum(1)
    np.testing.assert_allclose(summed, distances, rtol=1e-5)


FILTERS = {  # arrays on which products of filters cancel, or are too many, or none
    "near-duplicates beside a large one": lambda r: (
        np.concatenate([1 + 1e-4 * r.normal(size=(31, 20)), 10 * r.normal(size=(1, 20))]).T
    ),
    "two clusters": lambda r: np.repeat([[1.0], [50.0]], 8, 0).T + 1e-3 * r.normal(size=(20, 16)),
    "equal": lambda r: np.full((3, 4), 0.1),
    "in several blocks": lambda r: r.normal(size=(3, 50)),
    "one": lambda r: r.normal(size=(5, 1)),
    "none": lambda r: np.zeros((5, 0)),
    "empty": lambda r: np.zeros((0, 5)),
}


@pytest.mark.parametrize("name", FILTERS)
def test_fpgm_is_exact(name, monkeypatch):
    monkeypatch.setattr(_fpgm, "_PAIRS", 500)  # ten of fifty filters at a time
    w = FILTERS[name](np.random.default_rng(0)).astype(np.float32)
    with jax.debug_nans(True):
        scores = jp.scores.fpgm({"w": jnp.asarray(w), "v": jnp.ones((2, 2))})["w"]
    assert scores.shape == w.shape
    exact = w.astype(np.float64).T
    sums = np.array([np.linalg.norm(exact - row, axis=1).sum() for row in exact])
    rounding = 1e-7 * np.abs(exact).sum()
    np.testing.assert_allclose(scores.sum(0), sums, rtol=2e-6, atol=rounding)
    if len(w) and len(sums) > 10:
        np.testing.assert_array_equal(np.argsort(sums)[:8], np.argsort(scores[0])[:8])


@pytest.mark.optimized
def test_fpgm_of_a_vocabulary_fits_memory():
    w = jax.ShapeDtypeStruct((64, 50257), jnp.float32)
    used = jax.jit(jp.scores.fpgm).lower(w).compile().memory_analysis()
    assert used.temp_size_in_bytes < 40 * w.size


def test_fpgm_removes_the_filter_in_the_middle():
    params = {"w": jnp.array([[1.0, 5.0, 2.0, 3.0]] * 2), "v": jnp.ones((4, 3))}
    groups = jp.find_groups(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, jnp.ones((1, 2)))
    masks = groups.select(jp.scores.fpgm(params), 0.5, scope="layer", reduce="first")
    assert masks["w"][0].tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="v: the axis of fpgm must .* got axis 2"):
        jp.scores.fpgm(params | {"w": jnp.ones((2, 2, 4))}, axis=2)


def test_obd_on_a_diagonal_quadratic_is_the_change_of_the_loss():
    minimum = {"w": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "b": jnp.array([[1.0]])}
    curvature = {"w": jnp.array([[1.0, 2.0], [-3.0, 4.0]]), "b": jnp.array([[5.0]])}

    def f(params):
        squares = jax.tree.map(lambda w, m, h: h * (w - m) ** 2 / 2, params, minimum, curvature)
        return sum(jnp.sum(s) for s in jax.tree.leaves(squares))

    change = {"b": [[f(minimum | {"b": jnp.zeros((1, 1))})]], "w": np.zeros((2, 2))}
    for i in np.ndindex(2, 2):
        change["w"][i] = f(minimum | {"w": minimum["w"].at[i].set(0)})
    estimate = jp.scores.obd_hutchinson(f, 1)(minimum, jax.random.key(0))
    for scores in (jp.scores.obd(f)(minimum), estimate):
        for leaf in minimum:
            np.testing.assert_array_equal(scores[leaf], change[leaf])


def converged():
    params, batch = problem()
    params = {k: params[k] for k in "wbv"}
    smooth = lambda p, x, y: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] - y) ** 2)
    step = jax.jit(lambda p: jax.tree.map(lambda w, g: w - 0.2 * g, p, jax.grad(smooth)(p, *batch)))
    for _ in range(300):
        params = step(params)
    return smooth, params, batch


def test_obd_is_half_the_diagonal_of_the_hessian_times_the_square():
    smooth, params, batch = converged()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = np.zeros((flat.size, flat.size))
    with jax.enable_x64(True):  # differences of gradients
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), "float64"), (unravel(flat), batch))
        flat, unravel = jax.flatten_util.ravel_pytree(wide[0])
        grads = jax.jit(jax.grad(lambda w: smooth(unravel(w), *wide[1])))
        for i, e in enumerate(np.eye(flat.size) * 1e-5):
            hessian[i] = (grads(flat + e) - grads(flat - e)) / 2e-5
    expected = np.diag(hessian) * np.asarray(flat) ** 2 / 2
    scores, _ = jax.flatten_util.ravel_pytree(jp.scores.obd(smooth)(params, *batch))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    samples = 4000
    estimate = jp.scores.obd_hutchinson(smooth, samples)(params, jax.random.key(0), *batch)
    estimate, _ = jax.flatten_util.ravel_pytree(estimate)
    off = np.sum(hessian**2, 1) - np.diag(hessian) ** 2
    deviation = np.sqrt(off / samples) * np.asarray(flat) ** 2 / 2
    assert np.all(np.abs(estimate - expected) < 4 * deviation + 1e-5)


def test_obd_warns_of_params_that_are_not_at_a_minimum():
    params, batch = problem()
    with pytest.warns(UserWarning, match="^obd: the params are not at a minimum"):
        jp.scores.obd(loss)(params, *batch)
    with pytest.warns(UserWarning, match="^obd_hutchinson: .*or use `taylor`"):
        jp.scores.obd_hutchinson(loss, 5)(params, jax.random.key(0), *batch)


def test_fisher_is_the_mean_of_squared_gradients():
    params, (x, y) = problem()
    scores = jp.scores.fisher(loss)(params, x, y)
    floats = {k: params[k] for k in "wbv"}
    grads = [jax.grad(loss)(floats, x[i : i + 1], y[i : i + 1]) for i in range(6)]
    for leaf in "wbv":
        square = np.mean([g[leaf] ** 2 for g in grads], 0)
        np.testing.assert_allclose(
            scores[leaf], square * np.asarray(params[leaf]) ** 2 / 2, rtol=1e-5
        )


CURVED = {  # criteria of curvature: (loss, params, batch) -> scores
    "grasp": lambda f, p, b: jp.scores.grasp(f)(p, *b),
    "obd": lambda f, p, b: jp.scores.obd(f)(p, *b),
    "obd_hutchinson": lambda f, p, b: jp.scores.obd_hutchinson(f, 2)(p, jax.random.key(0), *b),
    "fisher": lambda f, p, b: jp.scores.fisher(f)(p, *b),
    "woodfisher": lambda f, p, b: jp.scores.woodfisher(f, block=3)(p, *b),
}
LINEAR = ("grasp", "obd", "obd_hutchinson")  # a loss without a gradient has a Fisher matrix of 0


@pytest.mark.parametrize("name", ["gradient", "taylor", "snip", *CURVED])
def test_a_loss_that_is_not_scalar_is_an_error(name):
    params, batch = problem()
    score = CURVED.get(name) or (lambda f, p, b: getattr(jp.scores, name)(f)(p, *b))
    with pytest.raises(TypeError, match=f"^{name}: the loss must return one .*float32\\[.,2\\]"):
        score(lambda p, x, y: apply_fn(p, x) - y, params, batch)
    with pytest.raises(TypeError, match=f"^{name}: the loss must return one .*int32"):
        score(lambda p, x, y: jnp.argmax(p["b"]), params, batch)
    with pytest.raises(TypeError, match=f"^{name}: .*auxiliary outputs out"):
        score(lambda p, x, y: (loss(p, x, y), {"aux": x}), params, batch)


@pytest.mark.parametrize("name", ["gradient", *CURVED])
def test_a_loss_without_a_derivative_is_an_error(name):
    params, batch = problem()
    score = CURVED.get(name) or (lambda f, p, b: jp.scores.gradient(f)(p, *b))
    outside = lambda p, x, y: jax.pure_callback(np.sum, y[0, 0], p["w"])
    with pytest.raises(TypeError, match=f"^{name}: the loss cannot be differentiated: .*callback"):
        score(outside, params, batch)
    with pytest.raises(TypeError, match="^dot_general"):
        score(lambda p, x, y: jnp.sum(x @ p["v"]), params, batch)


@pytest.mark.parametrize("name", CURVED)
def test_a_loss_without_curvature_is_an_error(name):
    params, (x, y) = problem()
    score = CURVED[name]
    fixed = lambda p, x, y: sum(jnp.sum(p[k]) for k in "wbv") * (name in LINEAR)
    with pytest.raises(ValueError, match=f"^{name}: the curvature is exactly 0 .*b, \\.\\.\\."):
        score(fixed, params, (x, y))
    with pytest.raises(ValueError, match=f"^{name}: . has a curvature that is NaN"):
        score(loss, params | {"b": params["b"] + 1, "w": params["w"] * jnp.nan}, (x, y))


def test_obd_of_a_piecewise_linear_loss_is_an_error():
    params, (x, _) = problem()
    with pytest.raises(ValueError, match="^obd: the curvature is exactly 0 .*piecewise linear"):
        jp.scores.obd(lambda p, x: apply_fn(p, x).mean())(params, x)


@pytest.mark.parametrize("name", ["fisher", "woodfisher"])
def test_examples_lie_along_the_first_axis(name):
    params, (x, y) = problem()
    for bad in ((x, y[:3]), (x, 0.5), (x[:0], y[:0])):
        with pytest.raises(ValueError, match=f"^{name}: every batch array must have .*first axis"):
            CURVED[name](loss, params, bad)
    prime = tuple(jnp.concatenate([a] * 4)[:19] for a in (x, y))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        jp.scores.obd_hutchinson(loss, 0)
    assert CURVED[name](loss, params, prime)["w"].shape == (4, 5)


def blocks_of_fisher(f, params, x, y, block, damping):
    """Yields for every leaf the dampened empirical Fisher matrix, zero outside its blocks."""
    grads = [jax.grad(f)(params, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    for leaf in params:
        g = np.stack([np.asarray(g[leaf], np.float64).ravel() for g in grads])
        index = np.arange(g.shape[1]) // block
        yield leaf, g.T @ g / len(g) * (index[:, None] == index) + damping * np.eye(len(index))


@pytest.mark.parametrize("damping", [1e-7, 1e-2])
def test_woodfisher_equals_the_direct_inverse(damping):
    smooth, params, batch = converged()
    scores = jp.scores.woodfisher(smooth, block=6, damping=damping)(params, *batch)
    for leaf, fisher in blocks_of_fisher(smooth, params, *batch, 6, damping):
        w = np.asarray(params[leaf], np.float64).ravel()
        expected = w**2 / (2 * np.diag(np.linalg.inv(fisher)))
        np.testing.assert_allclose(scores[leaf].ravel(), expected, rtol=2e-3)


def test_woodfisher_update_is_where_the_quadratic_is_least():
    smooth, params, batch = converged()
    masks = jp.select(jp.scores.random(params, jax.random.key(0)), 0.4) | {"b": None}
    update = jp.scores.woodfisher_update(smooth, block=6, damping=1e-3)
    moved = update(params, masks, *batch)
    np.testing.assert_array_equal(moved["b"], params["b"])
    for leaf, fisher in blocks_of_fisher(smooth, params, *batch, 6, 1e-3):
        if leaf != "b":
            w, keep = np.asarray(params[leaf], np.float64).ravel(), np.asarray(masks[leaf]).ravel()
            least = np.linalg.solve(fisher[keep][:, keep], fisher[keep][:, ~keep] @ w[~keep])
            np.testing.assert_allclose(moved[leaf].ravel()[keep], w[keep] + least, rtol=1e-4)
            assert not moved[leaf].ravel()[~keep].any()
    with pytest.raises(TypeError, match="w: masks must be bool"):
        update(params, masks | {"w": params["w"]}, *batch)
    for bad in ({"block": 0}, {"damping": 0.0}):
        with pytest.raises(ValueError, match="^woodfisher: " + next(iter(bad))):
            jp.scores.woodfisher(smooth, **bad)


def test_synflow_of_primitives_that_take_one_dtype():
    def apply_fn(kernel, x):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    kernel = normal((2, 3, 3, 3))
    scores = jp.scores.synflow(apply_fn)(kernel, jnp.ones((1, 3, 5, 5)))
    assert scores.shape == kernel.shape and float(scores.max()) == 1
