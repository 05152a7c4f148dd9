"""Criteria that live in training: regularizers, movement, gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp


def apply_fn(params, x):
    hidden = jax.nn.relu(params["scale"][None] * (x @ params["w"]))
    return jax.nn.relu(hidden @ params["v"]) @ params["out"]


@jax.jit
def loss(params, x, y):
    return jnp.mean((apply_fn(params, x) - y) ** 2)


gradient = jax.jit(jax.grad(loss))


def problem(dtype="float32"):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(scale=0.7, size=shape), dtype)  # noqa: E731
    params = {"w": normal(4, 6), "scale": normal(6), "v": normal(6, 5), "out": normal(5, 2)}
    return params | {"none": None}, (normal(8, 4), normal(8, 2))


@functools.cache
def units():
    params, (x, _) = problem()
    return jp.find_groups(apply_fn, params, x)


@functools.cache
def leaving():
    return units().select(jp.scores.magnitude(problem()[0]), 0.5)


REGULARIZERS = {  # a new regularizer adds one row here
    "slimming": jp.regularizers.slimming(0.1),
    "group_lasso": jp.regularizers.group_lasso(units(), 0.1),
    "growing": jp.regularizers.growing(leaving(), 0.1, every=2),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_contract(name, dtype):
    tx = REGULARIZERS[name]
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
    with pytest.raises(ValueError, match=f"`{name}` needs the params"):
        tx.update(grads, tx.init(params))
    tx = optax.chain(tx, optax.adam(1e-3))
    doubled = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    assert jax.tree.structure(doubled) == jax.tree.structure(tx.init(params))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_on_some_leaves(name):
    params, _ = problem()
    grads = jax.tree.map(jnp.zeros_like, params)
    chosen = {"w": True, "scale": True, "v": False, "out": False, "none": None}
    tx = optax.masked(REGULARIZERS[name], chosen)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["scale"].any() and not updates["v"].any()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_keeps_shardings(name, kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    params, _ = problem()
    tx = REGULARIZERS[name]
    expected, _ = tx.update(params, tx.init(params), params)
    specs = {"w": P(None, "x"), "scale": P(), "v": P("x"), "out": P(None, "x"), "none": None}
    with jax.set_mesh(mesh):
        place = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))  # noqa: E731
        sharded = jax.tree.map(place, params, specs)
        updates, _ = jax.jit(tx.update)(sharded, tx.init(sharded), sharded)
    for path in ("w", "scale", "v", "out"):
        assert updates[path].sharding.is_equivalent_to(sharded[path].sharding, params[path].ndim)
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5)


def penalty_gradient(name, params):
    """Differentiates the penalty, written out."""
    if name == "slimming":
        return jax.grad(lambda p: 0.1 * jnp.abs(p["scale"]).sum())(params)
    if name == "growing":
        kept = {path: m for path, m in leaving().items() if m is not None}
        squares = lambda p: [jnp.sum(jnp.where(m, 0, p[k]) ** 2) for k, m in kept.items()]  # noqa: E731
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
    tx = REGULARIZERS[name]
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = jax.tree.map(jnp.add, grads, penalty_gradient(name, params))
    for path in ("w", "scale", "v", "out"):
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5, atol=1e-6)


def test_group_lasso_leaves_units_at_zero_alone():
    params = jax.tree.map(jnp.zeros_like, problem()[0])
    tx = REGULARIZERS["group_lasso"]
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
    masks, norm = leaving(), lambda p, m: jnp.linalg.norm(jnp.where(m, 0, p["w"]))
    tx = {
        "group_lasso": jp.regularizers.group_lasso(units(), 1.0),
        "growing": jp.regularizers.growing(masks, 0.5, every=2, limit=5.0),
    }[name]
    tx = optax.chain(tx, optax.sgd(0.05))
    state, before = tx.init(params), norm(params, masks["w"])

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert norm(params, masks["w"]) < 0.5 * before


def test_slimming_removes_the_channels_of_the_smallest_scales():
    params, (x, _) = problem()
    params["scale"] = jnp.array([0.5, -3.0, 0.1, 2.0, -0.2, 1.0])
    scores = jp.scores.slimming(params)
    assert scores["w"] is None and scores["v"] is None
    masks = units().select(scores, 0.5, where=lambda path, score: True)
    assert masks["scale"].tolist() == [False, True, False, True, False, True]
    assert masks["v"][:, 0].tolist() == masks["scale"].tolist() and masks["out"].all()
    everything = units().select(scores, 0.99, where=lambda path, score: True)
    assert everything["scale"].tolist() == [False, True, False, False, False, False]


def test_bad_input_is_named():
    params, _ = problem()
    no_scales = {"w": params["w"]}
    with pytest.raises(ValueError, match=r"no scales among the leaves \['w'\]"):
        jp.scores.slimming(no_scales)
    with pytest.raises(ValueError, match="no scales"):
        jp.regularizers.slimming(0.1).init(no_scales)
    with pytest.raises(ValueError, match="extra: groups have no entry"):
        REGULARIZERS["group_lasso"].init({**params, "extra": jnp.ones(3)})
    with pytest.raises(ValueError, match="Nothing can leave"):
        none = jp.find_groups(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
        jp.regularizers.group_lasso(none, 0.1)
    with pytest.raises(ValueError, match="every >= 1"):
        jp.regularizers.growing(leaving(), 0.1, every=0)
    with pytest.raises(TypeError, match="w: masks must be bool"):
        floats = {**leaving(), "w": jnp.ones((4, 6))}
        jp.regularizers.growing(floats, 0.1, every=1).init(params)


def numpy_movement(params, x, y, sparsities, rate):
    """Trains a linear network and its scores by plain gradient descent."""
    w, s, x, y = (np.asarray(a, np.float64) for a in (params, np.zeros_like(params), x, y))
    for sparsity in sparsities:
        kept = np.ones(w.size, bool)
        kept[np.argsort(s, None)[: round(sparsity * w.size)]] = False
        kept = kept.reshape(w.shape)
        g = 2 * x.T @ (x @ (w * kept) - y) / y.size
        w, s = w - rate * g * kept, s - rate * g * w
    return w, s, kept


def test_movement_equals_numpy():
    x = jax.random.normal(jax.random.key(1), (8, 4))
    y = x @ jax.random.normal(jax.random.key(2), (4, 3))
    w = jax.random.normal(jax.random.key(3), (4, 3))
    sparsities = [0.0, 0.25, 0.5, 0.5, 0.75, 0.75]
    trained, tx = (w, jnp.zeros((4, 3))), optax.sgd(0.3)
    state, traces, before = tx.init(trained), [], None

    def sparse_loss(trained, masks):
        traces.append(0)
        return jnp.mean((x @ jp.movement.apply(*trained, masks) - y) ** 2)

    @jax.jit
    def step(trained, state, sparsity):
        masks = jp.select(trained[1], sparsity)
        updates, state = tx.update(jax.grad(sparse_loss)(trained, masks), state)
        return optax.apply_updates(trained, updates), state, masks

    came_back = False
    for sparsity in sparsities:
        trained, state, masks = step(trained, state, sparsity)
        came_back |= before is not None and bool((masks & ~before).any())
        before = masks
    expected = numpy_movement(w, x, y, sparsities, 0.3)
    for got, want in zip((*trained, masks), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert came_back and len(traces) == 1


def test_movement_keeps_dtypes_and_what_has_no_mask():
    params, batch = problem("bfloat16")
    scores = jax.tree.map(lambda w: jnp.zeros(w.shape), params)
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    assert masks["scale"] is None
    sparse = lambda p, s: loss(jp.movement.apply(p, s, masks), *batch)  # noqa: E731
    for_params, for_scores = jax.jit(jax.grad(sparse, (0, 1)))(params, scores)
    plain = gradient(jp.apply_masks(params, masks), *batch)
    np.testing.assert_array_equal(
        np.float32(for_params["w"]), np.float32(jp.apply_masks(plain, masks)["w"])
    )
    moved = np.float32(plain["w"]) * np.float32(params["w"])
    np.testing.assert_allclose(for_scores["w"], moved, rtol=1e-6)
    assert for_params["w"].dtype == "bfloat16" and for_scores["w"].dtype == "float32"
    assert not for_scores["scale"].any()
    with pytest.raises(ValueError, match="w: has a mask, but no scores"):
        jp.movement.apply(params, {**scores, "w": None}, masks)


def test_soft_movement_has_a_threshold_and_a_penalty():
    scores = {"w": jnp.array([[-3.0, -2.0, 0.0]]), "b": None}
    masks = jp.movement.masks(scores, 0.1)
    assert masks["w"].tolist() == [[False, True, True]] and masks["b"] is None
    expected = (1 / (1 + np.exp([3.0, 2.0, 0.0]))).sum()
    np.testing.assert_allclose(jp.movement.penalty(scores), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="threshold between 0 and 1, got 1.5"):
        jp.movement.masks(scores, 1.5)


def test_gradual_takes_scores_that_are_accumulated():
    params, batch = problem()
    tx = jp.gradual(optax.sgd(0.1), lambda p, scores: scores, jp.schedules.linear(0.5, 0, 4))
    state, scores = tx.init(params), jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, state, scores):
        grads = gradient(params, *batch)
        scores = jax.tree.map(lambda s, w, g: s - 0.1 * w * g, scores, params, grads)
        updates, state = tx.update(grads, state, params, batch=(scores,))
        return optax.apply_updates(params, updates), state, scores

    for _ in range(6):
        params, state, scores = step(params, state, scores)
    assert jp.metrics.sparsity(jp.get_masks(state)) == 0.5


def test_gates_equal_closed_forms():
    a = np.linspace(-6, 6, 25, dtype=np.float32)
    sigmoid = lambda t: 1 / (1 + np.exp(-np.float64(t)))  # noqa: E731
    mean = np.clip(sigmoid(a) * 1.2 - 0.1, 0, 1)
    np.testing.assert_allclose(jp.gates.mean(jnp.array(a)), mean, atol=1e-6)
    assert jp.gates.masks(jnp.array(a)).tolist() == (mean > 0).tolist()
    is_open = sigmoid(a - 2 / 3 * np.log(0.1 / 1.1))
    np.testing.assert_allclose(jp.gates.penalty({"a": jnp.array(a)}), is_open.sum(), rtol=1e-6)
    slope = jax.grad(jp.gates.penalty)(jnp.array(a))
    np.testing.assert_allclose(slope, is_open * (1 - is_open), atol=1e-6)


def test_sampled_gates_have_the_distribution():
    n, a = 20000, jnp.array([-3.0, -1.0, 0.0, 2.0])
    z = np.asarray(jp.gates.sample(jnp.tile(a, (n, 1)), jax.random.key(0)))
    error = 4 * 0.5 / np.sqrt(n)
    probabilities = jax.vmap(jp.gates.penalty)(a)
    np.testing.assert_allclose((z != 0).mean(0), probabilities, atol=error)
    for limit in (0.2, 0.5, 1.0):
        logit = np.log((limit + 0.1) / (1.1 - limit))
        below = 1 / (1 + np.exp(a - 2 / 3 * logit))
        np.testing.assert_allclose((z < limit).mean(0), below, atol=error)


def test_gates_of_a_tree():
    log_alpha = {"w": jnp.zeros((3, 2), "bfloat16"), "v": jnp.zeros((3, 2)), "b": None}
    gates = jp.gates.sample(log_alpha, jax.random.key(0))
    assert gates["b"] is None and gates["w"].dtype == "bfloat16" and gates["v"].dtype == "float32"
    assert not np.allclose(np.float32(gates["w"]), gates["v"], atol=0.1)
    slope = jax.grad(lambda a: jp.gates.sample(a, jax.random.key(0))["v"].sum())(log_alpha)
    inside = (gates["v"] > 0) & (gates["v"] < 1)
    assert bool(((slope["v"] > 0) == inside).all()) and inside.any()


def test_gates_close_on_what_the_loss_does_not_need():
    x = jax.random.normal(jax.random.key(0), (64, 6))
    w = jnp.array([3.0, -2.0, 1.5, 0.0, 0.0, 0.0])[:, None]

    def gated(trained, key):
        weights, log_alpha = trained
        error = jnp.mean((x @ (weights * jp.gates.sample(log_alpha, key)) - x @ w) ** 2)
        return error + 0.1 * jp.gates.penalty(log_alpha)

    trained, tx = (jnp.ones((6, 1)), jnp.full((6, 1), 1.0)), optax.adam(0.05)

    @jax.jit
    def train(trained):
        def step(carry, key):
            updates, state = tx.update(jax.grad(gated)(carry[0], key), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        keys = jax.random.split(jax.random.key(1), 400)
        return jax.lax.scan(step, (trained, tx.init(trained)), keys)[0][0]

    weights, log_alpha = train(trained)
    masks = jp.gates.masks(log_alpha)
    assert masks.tolist() == (w != 0).tolist()
    np.testing.assert_allclose(weights * jp.gates.mean(log_alpha), w, atol=0.2)


def movement_method(params, sparsity, key, train, steps=5):
    params = train(params)
    trained, tx = (params, jax.tree.map(jnp.zeros_like, params)), optax.sgd(0.1)
    state, (_, batch) = tx.init(trained), problem()

    @jax.jit
    def step(trained, state):
        masks = jp.select(trained[1], sparsity)
        sparse = lambda t: loss(jp.movement.apply(*t, masks), *batch)  # noqa: E731
        updates, state = tx.update(jax.grad(sparse)(trained), state)
        return optax.apply_updates(trained, updates), state

    for _ in range(steps):
        trained, state = step(trained, state)
    return trained[0], jp.select(trained[1], sparsity)


def gates_method(params, sparsity, key, train, steps=5):
    params = train(params)
    log_alpha = jax.tree.map(lambda w: jnp.full(w.shape, 2.0), params)
    _, batch = problem()

    @jax.jit
    def step(log_alpha, key):
        gated = lambda a: jax.tree.map(jnp.multiply, params, jp.gates.sample(a, key))  # noqa: E731
        grads = jax.grad(lambda a: loss(gated(a), *batch))(log_alpha)
        return jax.tree.map(jnp.subtract, log_alpha, grads)

    for k in jax.random.split(key, steps):
        log_alpha = step(log_alpha, k)
    gated = jax.tree.map(jnp.multiply, params, jp.gates.mean(log_alpha))
    return gated, jp.select(log_alpha, sparsity)  # log_alpha is a score: higher is kept


everything = functools.partial(units().select, where=lambda path, score: True)
METHODS = {
    "slimming": jp.curves.method(jp.scores.slimming, select=everything),
    "movement": movement_method,
    "gates": gates_method,
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_a_sweep(name):
    params, _ = problem()
    train = lambda params, masks=None, key=None: params  # noqa: E731
    pruned, masks = METHODS[name](params, 0.5, jax.random.key(0), train)
    assert jp.apply_masks(pruned, masks)["w"].shape == (4, 6)
    if name == "slimming":
        assert masks["scale"].sum() == 3
    else:
        assert jp.metrics.sparsity(masks) == 0.5
