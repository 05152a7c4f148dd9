import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp


def apply_fn(params, x):
    hidden = jax.nn.relu(x @ params["w"] + params["b"])
    return hidden @ params["v"]


def loss(params, x, y):
    return jnp.mean((apply_fn(params, x) - y) ** 2)


def problem(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (4, 5), dtype),
        "b": jnp.zeros((1, 5), dtype),
        "v": jax.random.normal(keys[1], (5, 2), dtype),
        "step": jnp.array(3),
        "key": jax.random.key(7),
        "none": None,
    }
    return params, (jax.random.normal(keys[2], (6, 4), dtype), jnp.ones((6, 2), dtype))


SCORES = {  # a new score adds one row here: (params, batch) -> scores
    "magnitude": lambda p, b: jp.scores.magnitude(p),
    "random": lambda p, b: jp.scores.random(p, jax.random.key(1)),
    "gradient": lambda p, b: jp.scores.gradient(loss)(p, *b),
    "taylor": lambda p, b: jp.scores.taylor(loss)(p, *b),
    "snip": lambda p, b: jp.scores.snip(loss)(p, *b),
    "grasp": lambda p, b: jp.scores.grasp(loss)(p, *b),
    "synflow": lambda p, b: jp.scores.synflow(apply_fn)(p, b[0]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SCORES)
def test_score_contract(name, dtype):
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


def numpy_oracles():
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
    return {
        "magnitude": (np.abs(w), np.abs(v)),
        "gradient": (np.abs(gw), np.abs(gv)),
        "taylor": (np.abs(gw * w), np.abs(gv * v)),
        "snip": (np.abs(gw * w) / total, np.abs(gv * v) / total),
        "synflow": (flow_w / largest, flow_v / largest),
        "grasp": (w * (pw - mw) / (2 * e), v * (pv - mv) / (2 * e)),
    }


@pytest.mark.parametrize("name", numpy_oracles())
def test_score_equals_numpy(name):
    params, batch = problem()
    if name == "grasp":  # b stays fixed in the oracle
        fixed = {k: params[k] for k in "wv"}
        f = lambda p, x, y: loss({**p, "b": params["b"]}, x, y)  # noqa: E731
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
    with pytest.raises(ValueError, match="flow R is 0"):
        jp.scores.synflow(deep)([jnp.zeros((3, 3))], jnp.ones((1, 3)))


def test_synflow_ignores_running_means():
    f = lambda p, x: (x @ p["w"] - p["mean"]) @ p["v"]  # noqa: E731
    p = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 1)), "mean": jnp.full((1, 2), 9.0)}
    assert jp.scores.synflow(f)(p, jnp.ones((1, 2)))["w"].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_half_precision_products_do_not_underflow():
    f = lambda w: jnp.sum(w * jnp.float16(1e-4))  # noqa: E731
    assert jp.scores.taylor(f)(jnp.full((1, 1), 1e-4, jnp.float16)).item() > 0


def test_bad_params_are_named():
    with pytest.raises(
        TypeError, match="act: params must hold arrays, got function.*eqx.partition"
    ):
        jp.scores.magnitude({"act": lambda x: x, "w": jnp.ones(2)})
    with pytest.raises(ValueError, match="floating-point"):
        jp.scores.magnitude({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="p above 0"):
        jp.scores.magnitude(jnp.ones(2), p=0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", SCORES)
def test_scores_have_the_sharding_of_their_leaf(name, kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    params, batch = problem()
    params = {k: params[k] for k in "wbv"}
    specs = {"w": P("x"), "b": P(), "v": P(None, "x")}
    place = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))  # noqa: E731
    sharded = jax.tree.map(place, params, specs)
    batch = tuple(place(x, P()) for x in batch)

    def f(p, x):
        hidden = jax.nn.relu(jnp.einsum("ni,io->no", x, p["w"], **out(P())) + p["b"])
        return jnp.einsum("ni,io->no", hidden, p["v"], **out(P(None, "x")))

    def out(spec):
        return {"out_sharding": NamedSharding(mesh, spec)} if kind == AxisType.Explicit else {}

    objective = lambda p, x, y: jnp.sum(f(p, x) ** 2)  # noqa: E731
    scores = {
        "magnitude": lambda p: jp.scores.magnitude(p),
        "random": lambda p: jp.scores.random(p, jax.random.key(1)),
        "synflow": lambda p: jp.scores.synflow(f)(p, batch[0]),
    }.get(name) or (lambda p: getattr(jp.scores, name)(objective)(p, *batch))
    result = scores(sharded)
    for leaf in "wv":
        assert result[leaf].sharding.is_equivalent_to(NamedSharding(mesh, specs[leaf]), 2), leaf
