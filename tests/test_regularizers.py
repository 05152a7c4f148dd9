import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import auto_and_explicit, mesh, normal, place
from jax.sharding import PartitionSpec as P

import jaxprune as jp


def apply_fn(params, x):
    hidden = jax.nn.relu(params["scale"][None] * (x @ params["w"]))
    return jax.nn.relu(hidden @ params["v"]) @ params["out"]


gradient = jax.jit(jax.grad(lambda params, x, y: jnp.mean((apply_fn(params, x) - y) ** 2)))


@functools.cache
def problem(dtype="float32"):
    params = normal({"w": (4, 6), "scale": (6,), "v": (6, 5), "out": (5, 2)}, dtype)
    return params | {"none": None}, normal(((8, 4), (8, 2)), dtype, seed=1)


@functools.cache
def units():
    params, (x, _) = problem()
    return jp.find_groups(apply_fn, params, x)


@functools.cache
def masks():
    return units().select(jp.scores.magnitude(problem()[0]), 0.5)


REGULARIZERS = {  # a new regularizer adds one row here
    "slimming": lambda: jp.regularizers.slimming(0.1),
    "group_lasso": lambda: jp.regularizers.group_lasso(units(), 0.1),
    "growing": lambda: jp.regularizers.growing(masks(), 0.1, every=2),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_contract(name, dtype):
    tx = REGULARIZERS[name]()
    params, _ = problem(dtype)
    grads, _ = problem(dtype)
    state, traces = tx.init(params), []
    shapes = tx.init(jax.eval_shape(lambda: params))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)

    @functools.partial(jax.jit, donate_argnums=1)
    def update(grads, state, params):
        traces.append(0)
        return tx.update(grads, state, params, value=1.0)

    updates, state = update(grads, state, params)
    update(grads, state, params)
    assert len(traces) == update._cache_size() == 1
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match=f"{name}: params must be given, got None"):
        tx.update(grads, tx.init(params))
    tx = optax.chain(tx, optax.adam(1e-3))
    doubled = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    assert jax.tree.structure(doubled) == jax.tree.structure(tx.init(params))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_on_some_leaves(name):
    params, _ = problem()
    grads = jax.tree.map(jnp.zeros_like, params)
    chosen = {"w": True, "scale": True, "v": False, "out": False, "none": None}
    tx = optax.masked(REGULARIZERS[name](), chosen)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["scale"].any() and not updates["v"].any()


@auto_and_explicit
@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_keeps_shardings(name, kind):
    devices = mesh(kind, x=2)
    params, _ = problem()
    tx = REGULARIZERS[name]()
    expected, _ = tx.update(params, tx.init(params), params)
    specs = {"w": P(None, "x"), "scale": P(), "v": P("x"), "out": P(None, "x"), "none": None}
    with jax.set_mesh(devices):
        sharded = place(params, devices, specs)
        updates, _ = jax.jit(tx.update)(sharded, tx.init(sharded), sharded)
    for path in ("w", "scale", "v", "out"):
        assert updates[path].sharding.is_equivalent_to(sharded[path].sharding, params[path].ndim)
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5)


def penalty_gradient(name, params):
    """Differentiates the penalty, written out."""
    if name == "slimming":
        return jax.grad(lambda p: 0.1 * jnp.abs(p["scale"]).sum())(params)
    if name == "growing":
        kept = {path: m for path, m in masks().items() if m is not None}
        squares = lambda p: [jnp.sum(jnp.where(m, 0, p[k]) ** 2) for k, m in kept.items()]
        return jax.grad(lambda p: 0.05 * sum(squares(p)))(params)

    def lasso(p):
        first = jnp.sum(p["w"] ** 2, 0) + p["scale"] ** 2 + jnp.sum(p["v"] ** 2, 1)
        second = jnp.sum(p["v"] ** 2, 0) + jnp.sum(p["out"] ** 2, 1)
        return 0.1 * (jnp.sqrt(first).sum() + jnp.sqrt(second).sum())

    return jax.grad(lasso)(params)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_adds_the_gradient_of_its_penalty(name):
    params, batch = problem()
    grads = gradient(params, *batch)
    tx = REGULARIZERS[name]()
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = jax.tree.map(jnp.add, grads, penalty_gradient(name, params))
    for path in ("w", "scale", "v", "out"):
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5, atol=1e-6)


def test_group_lasso_leaves_units_at_zero_alone():
    params = jax.tree.map(jnp.zeros_like, problem()[0])
    tx = REGULARIZERS["group_lasso"]()
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(bool((u == 0).all()) for u in jax.tree.leaves(updates))


def test_growing_follows_its_staircase_to_the_limit():
    params = jnp.full((1, 2), 2.0)
    tx = jp.regularizers.growing(jnp.array([[True, False]]), 0.1, every=3, limit=0.25)
    state, factors = tx.init(params), []
    for _ in range(9):
        updates, state = tx.update(jnp.zeros((1, 2)), state, params)
        assert updates[0, 0] == 0
        factors.append(float(updates[0, 1]) / 2)
    np.testing.assert_allclose(factors, [0.1] * 3 + [0.2] * 3 + [0.25] * 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["group_lasso", "growing"])
def test_regularized_units_fade(name):
    params, batch = problem()
    norm = lambda p: jnp.linalg.norm(jnp.where(masks()["w"], 0, p["w"]))
    tx = {
        "group_lasso": jp.regularizers.group_lasso(units(), 1.0),
        "growing": jp.regularizers.growing(masks(), 0.5, every=2, limit=5.0),
    }[name]
    tx = optax.chain(tx, optax.sgd(0.05))
    state, before = tx.init(params), norm(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert norm(params) < 0.5 * before


def test_slimming_removes_the_channels_of_the_smallest_scales():
    params, (x, _) = problem()
    params = params | {"scale": jnp.array([0.5, -3.0, 0.1, 2.0, -0.2, 1.0])}
    scores = jp.scores.slimming(params)
    assert scores["w"] is None and scores["v"] is None

    def everywhere(scores, sparsity):
        every = jp.units.reduce(units(), scores, where=lambda path, score: True)
        return units().select(every, sparsity)

    half = everywhere(scores, 0.5)
    assert half["scale"].tolist() == [False, True, False, True, False, True]
    assert half["v"][:, 0].tolist() == half["scale"].tolist() and half["out"].all()
    nearly_all = everywhere(scores, 0.99)
    assert nearly_all["scale"].tolist() == [False, True, False, False, False, False]
    method = jp.curves.method(jp.scores.slimming, select=everywhere)
    _, selected = method(params, 0.5, jax.random.key(0), lambda params: params)
    assert selected["scale"].tolist() == half["scale"].tolist()


def test_bad_input_is_named():
    params, _ = problem()
    no_scales = {"w": params["w"]}
    with pytest.raises(ValueError, match=r"no scales among the leaves \['w'\]"):
        jp.scores.slimming(no_scales)
    with pytest.raises(ValueError, match="no scales"):
        jp.regularizers.slimming(0.1).init(no_scales)
    with pytest.raises(ValueError, match="extra: groups have no entry"):
        REGULARIZERS["group_lasso"]().init({**params, "extra": jnp.ones(3)})
    with pytest.raises(ValueError, match="groups must have at least one unit, got none"):
        none = jp.find_groups(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
        jp.regularizers.group_lasso(none, 0.1)
    with pytest.raises(TypeError, match="groups must be Groups, got dict"):
        jp.regularizers.group_lasso(masks(), 0.1)
    with pytest.raises(ValueError, match="growing: every must be an integer of at least 1, got 0"):
        jp.regularizers.growing(masks(), 0.1, every=0)
    with pytest.raises(TypeError, match="w: masks must be bool"):
        floats = {**masks(), "w": jnp.ones((4, 6))}
        jp.regularizers.growing(floats, 0.1, every=1).init(params)
