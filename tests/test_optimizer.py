import dataclasses
import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import equal, explicit_and_slowly_auto, mesh, normal, python, slow_unless
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

OPTIMIZERS = {  # a new optimizer adds one row here
    "sgd": optax.sgd(0.1, 0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2),
    "rmsprop": optax.rmsprop(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": optax.contrib.muon(1e-2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(1e-2),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "chain": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
}


def problem(dtype="float32"):
    params = normal({"w": (8, 16), "b": jnp.zeros(16, dtype), "v": (16, 4), "none": None}, dtype)
    return params, normal({"w": (8, 16), "b": (16,), "v": (16, 4), "none": None}, dtype, seed=1)


def pruned_are_zero(params, masks):
    full = jp.apply_masks(params, masks)
    same = functools.partial(jnp.array_equal, equal_nan=True)  # optax's own NaN in bfloat16
    return all(same(a, b) for a, b in zip(*map(jax.tree.leaves, (params, full)), strict=True))


@pytest.mark.parametrize("dtype", slow_unless(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("name", slow_unless({"adam", "adamw", "muon", "chain"}, OPTIMIZERS))
def test_zero_means_zero(name, dtype):
    if name == "inject_hyperparams" and dtype == "bfloat16":
        pytest.skip("optax casts b2 to bfloat16, where 0.999 is 1, and Adam gives NaN")
    params, grads = problem(dtype)
    masks = jp.select(jp.scores.magnitude(params), 0.7)
    tx = jp.enforce(OPTIMIZERS[name], masks)
    state, traces = tx.init(params), []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        traces.append(0)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(4):
        params, state = step(params, state, grads)
        assert pruned_are_zero(params, masks)
    assert len(traces) == step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    other = jp.select(jp.scores.random(grads, jax.random.key(5)), 0.7)
    params, state = step(params, jp.set_masks(state, other), grads)
    assert pruned_are_zero(params, other) and len(traces) == step._cache_size() == 1
    assert equal(jp.get_masks(state), other)


def test_init_on_shapes_and_inside_jit():
    params, _ = problem()
    tx = jp.enforce(optax.adam(1e-2), lambda p: jp.select(jp.scores.magnitude(p), 0.5))
    shapes = jax.eval_shape(tx.init, params)
    state = jax.jit(tx.init)(params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda s: s.shape, shapes)


def test_extra_arguments_reach_the_inner_optimizer():
    seen = []
    inner = optax.GradientTransformationExtraArgs(
        lambda p: (), lambda u, s, p=None, **extra: (u, seen.append(extra["value"]) or s)
    )
    params, grads = problem()
    tx = jp.enforce(inner, jp.select(jp.scores.magnitude(params), 0.5))
    tx.update(grads, tx.init(params), params, value=3)
    assert seen == [3]


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False, "v": True, "none": None}),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "multi_transform": lambda tx: optax.multi_transform(
        {"x": tx, "y": optax.sgd(0.1)}, {"w": "x", "b": "y", "v": "x", "none": None}
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("name", slow_unless({"MultiSteps", "multi_transform"}, WRAPPERS))
def test_inside_wrappers(name):
    params, grads = problem()
    masks = jp.select(jp.scores.magnitude(params), 0.7)
    params = jp.apply_masks(params, masks)
    tx = WRAPPERS[name](jp.enforce(optax.adam(1e-2), masks))
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert pruned_are_zero(params, masks)
    found = jp.get_masks(state)
    assert found["b"] is None and bool((found["w"] == masks["w"]).all())
    assert pruned_are_zero(params, jp.get_masks(jp.set_masks(state, masks)))


def test_two_links_with_disjoint_leaves_are_merged():
    params, _ = problem()
    masks = jp.select(jp.scores.magnitude(params), 0.7)
    link = lambda: jp.enforce(optax.sgd(0.1), masks)
    labels = {"w": "x", "b": "x", "v": "y", "none": None}
    found = jp.get_masks(optax.multi_transform({"x": link(), "y": link()}, labels).init(params))
    assert bool((found["w"] == masks["w"]).all()) and bool((found["v"] == masks["v"]).all())


def test_links_on_whole_parts():
    params = {"encoder": problem()[0], "head": problem()[0]}
    masks = jp.select(jp.scores.magnitude(params), 0.7)
    params = jp.apply_masks(params, masks)
    link = lambda: jp.enforce(optax.adam(0.1), masks)
    labels = {"encoder": "x", "head": "y"}  # one label for all below
    for other, both in ((link(), True), (optax.sgd(0.1), False)):
        tx = optax.multi_transform({"x": link(), "y": other}, labels)
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        after = optax.apply_updates(params, updates)
        found = jp.get_masks(state)
        assert pruned_are_zero(after, found)
        assert bool((found["encoder"]["w"] == masks["encoder"]["w"]).all())
        assert (found["head"] is not None) == both
        assert pruned_are_zero(after, jp.get_masks(jp.set_masks(state, masks)))


def test_two_links_on_one_leaf_are_an_error():
    params, _ = problem()
    masks = jp.select(jp.scores.magnitude(params), 0.7)
    tx = jp.enforce(jp.enforce(optax.sgd(0.1), masks), masks)
    with pytest.raises(ValueError, match="v: two links mask this leaf"):
        jp.get_masks((tx.init(params), tx.init(params)))


def test_map_params_finds_the_optimizer_state():
    params, _ = problem()
    tx = jp.enforce(optax.adam(0.1), jp.select(jp.scores.magnitude(params), 0.7))
    doubled = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    assert jax.tree.structure(doubled) == jax.tree.structure(tx.init(params))
    assert optax.tree_utils.tree_get(tx.init(params), "masks")["w"].dtype == bool


def test_gradual_follows_the_schedule_and_hits_the_end_off_the_grid():
    params, grads = problem()
    schedule = jp.schedules.cubic(0.75, begin=1, end=11)
    tx = jp.gradual(optax.adam(1e-2), jp.scores.magnitude, schedule, every=3)
    state, traces, previous = tx.init(params), [], None

    @jax.jit
    def step(params, state):
        traces.append(0)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(14):
        params, state = step(params, state)
        masks = jp.get_masks(state)
        assert pruned_are_zero(params, masks)
        if previous is not None:
            assert jax.tree.all(jax.tree.map(lambda a, b: jnp.all(a | ~b), previous, masks))
        if i % 3 == 0:
            asked = round(float(schedule(i)) * 192)
            assert sum(int((~m).sum()) for m in jax.tree.leaves(masks)) == asked
        previous = masks
    assert jp.metrics.sparsity(masks) == 0.75 and len(traces) == step._cache_size() == 1


def test_gradual_leaves_all_to_its_score():
    params = jax.random.normal(jax.random.key(0), (8, 4))
    pattern = functools.partial(jp.select, pattern=jp.patterns.n_of_m(2, 4))
    score = lambda p: -jnp.abs(p)
    schedule = jp.schedules.one_shot(0.5, begin=1)
    tx = jp.gradual(optax.sgd(0.0), score, schedule, select=pattern)
    state = tx.init(params)
    assert jp.get_masks(state).all()
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert (jp.get_masks(state) == pattern(score(params), 0.5)).all()


def test_gradual_hands_the_batch_to_a_data_driven_score():
    params, grads = problem()
    loss = lambda p, x: jnp.sum((x @ p["w"] @ p["v"]) ** 2)
    select = functools.partial(jp.select, scope="layer")
    tx = jp.gradual(optax.sgd(0.1), jp.scores.snip(loss), jp.schedules.one_shot(0.5), select=select)
    _, state = tx.update(grads, tx.init(params), params, batch=(jnp.ones((2, 8)),))
    assert [float(m.mean()) for m in jax.tree.leaves(jp.get_masks(state))] == [0.5, 0.5]


def test_gradients_of_pruned_weights_do_not_reach_clipping():
    params, grads = jnp.ones((1, 4)), jnp.array([[3.0, 4.0, 100.0, 100.0]])
    masks = jnp.array([[True, True, False, False]])
    tx = jp.enforce(optax.clip_by_global_norm(10.0), masks)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates, [[3.0, 4.0, -1.0, -1.0]])


@dataclasses.dataclass
class Pair:
    w: Any
    b: Any


jax.tree_util.register_dataclass(Pair, ["w", "b"], [])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x)))


def equinox():
    return eqx.filter(eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0)), eqx.is_array)


def haiku():
    linear = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x)))
    return linear.init(jax.random.key(0), jnp.ones((2, 4)))


CONTAINERS = {  # a new container adds one row here, made of a matrix and a vector
    "dict": lambda w, b: {"w": w, "b": b, "none": None, "step": jnp.array(1)},
    "nnx": lambda w, b: nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0))),
    "array": lambda w, b: w,
    "tuple": lambda w, b: (w, b),
    "list": lambda w, b: [w, b, jnp.float32(2.0)],
    "dataclass": lambda w, b: Pair(w, b),
    "linen": lambda w, b: Linen().init(jax.random.key(0), jnp.ones((2, 4))),
    "haiku": lambda w, b: haiku(),
    "equinox": lambda w, b: equinox(),
}


@pytest.mark.parametrize("name", slow_unless({"dict", "nnx", "array"}, CONTAINERS))
def test_any_container(name):
    params = CONTAINERS[name](*normal(((4, 6), (6,))))
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    floats = lambda w: jnp.issubdtype(w.dtype, jnp.floating)
    params = jp.apply_masks(params, masks)
    tx = jp.enforce(optax.sgd(0.1), masks)
    state = tx.init(params)
    grads = jax.tree.map(lambda w: w if floats(w) else jnp.zeros_like(w), params)
    updates, state = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert pruned_are_zero(after, masks)
    assert equal(jp.masks.unpack(jp.masks.pack(masks), params), masks)
    assert "total" in str(jp.summary(params, masks))
    combined = jp.masks.combine(masks, masks)
    assert jax.tree.structure(combined) == jax.tree.structure(masks)


def test_nnx_optimizer():
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    masks = jp.select(jp.scores.magnitude(nnx.state(model, nnx.Param)), 0.5)
    optimizer = nnx.Optimizer(model, jp.enforce(optax.adamw(1e-2), masks), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda m: jnp.mean(m.layers[1](m.layers[0](x)) ** 2)
        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(3):
        step(model, optimizer, jnp.ones((2, 4)))
    state = nnx.state(model, nnx.Param)
    assert pruned_are_zero(state, jp.get_masks(optimizer.opt_state))
    assert jp.metrics.sparsity(jp.get_masks(optimizer.opt_state)) == 0.5


def test_linen_train_state():
    x = jnp.ones((2, 4))
    params = Linen().init(jax.random.key(0), x)["params"]
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    state = TrainState.create(apply_fn=None, params=params, tx=jp.enforce(optax.adam(1e-2), masks))
    state = state.apply_gradients(grads=params)
    assert pruned_are_zero(state.params, masks)


@explicit_and_slowly_auto
@pytest.mark.parametrize("link", ["enforce", "gradual"])
def test_masks_have_the_sharding_of_their_leaf(kind, link):
    sharding = NamedSharding(mesh(kind, x=8), P("x"))
    params, grads = problem()
    params, grads = jax.device_put((params, grads), sharding)
    tx = jp.enforce(optax.adam(1e-2), lambda p: jp.select(jp.scores.magnitude(p), 0.5))
    if link == "gradual":
        tx = jp.gradual(optax.adam(1e-2), jp.scores.magnitude, jp.schedules.one_shot(0.5))
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    for leaf in ("w", "v"):
        assert jp.get_masks(state)[leaf].sharding.is_equivalent_to(sharding, 2)
        assert updates[leaf].sharding.is_equivalent_to(sharding, 2)
    assert jp.metrics.sparsity(jp.get_masks(state)) == 0.5


def test_bad_input_is_named():
    params, grads = problem()
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    tx = jp.enforce(optax.sgd(0.1), masks)
    with pytest.raises(ValueError, match="enforce: params must be given, got None"):
        tx.update(grads, tx.init(params))
    with pytest.raises(ValueError, match="w: masks have no entry"):
        jp.enforce(optax.sgd(0.1), {"b": None, "v": None}).init(params)
    with pytest.raises(ValueError, match=r"w: masks have shape \(16, 8\)"):
        jp.apply_masks(params, {**masks, "w": masks["w"].T})
    with pytest.raises(TypeError, match="w: masks must be bool"):
        jp.apply_masks(params, {**masks, "w": masks["w"].astype(int)})
    with pytest.raises(ValueError, match="x: masks have an entry here"):
        jp.apply_masks(params, {**masks, "x": masks["w"]})
    with pytest.raises(ValueError, match="opt_state must hold masks"):
        jp.get_masks(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="v: masks must keep `None`"):
        jp.set_masks(tx.init(params), {**masks, "v": None})
    with pytest.raises(ValueError, match="gradual: every must be an integer of at least 1, got 0"):
        jp.gradual(optax.sgd(0.1), jp.scores.magnitude, jp.schedules.one_shot(0.5), every=0)


LINKS = {  # (2, 8, 4) params; a new link adds one row here
    "enforce": jp.enforce(optax.adam(1.0), lambda p: jp.select(jp.scores.magnitude(p), 0.5)),
    "enforce a tree": jp.enforce(optax.adam(1.0), np.arange(64).reshape(2, 8, 4) < 32),
    "gradual": jp.gradual(optax.adam(1.0), jp.scores.magnitude, jp.schedules.linear(0.5, 0, 9)),
}


@pytest.mark.parametrize("name", LINKS)
def test_link_inits_on_shapes(name):
    state = LINKS[name].init(jax.ShapeDtypeStruct((2, 8, 4), jnp.float32))
    assert jp.get_masks(state).shape == (2, 8, 4)


@pytest.mark.parametrize("name", LINKS)
def test_link_keeps_types_and_explicit_shardings(name):
    tx = LINKS[name]
    devices = mesh(AxisType.Explicit, x=8)
    with jax.set_mesh(devices):
        sharding = NamedSharding(devices, P(None, "x"))
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=sharding)
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        assert jp.get_masks(state).sharding.is_equivalent_to(sharding, 3)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types
        assert jax.tree.map(jax.typeof, tx.update(params, state, params)[1]) == types
        assert jax.tree.map(jax.typeof, jax.jit(tx.update)(params, state, params)[1]) == types


def test_lookahead_keeps_its_fast_params_pruned():
    params, grads = problem()
    masks = jp.select(jp.scores.magnitude(params), 0.7)
    tx = optax.lookahead(jp.enforce(optax.adam(1e-2), masks), sync_period=2, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(jp.apply_masks(params, masks))
    state = tx.init(both)
    for _ in range(5):
        updates, state = tx.update(grads, state, both)
        both = optax.apply_updates(both, updates)
        assert pruned_are_zero(both.fast, masks) and pruned_are_zero(both.slow, masks)


def test_importing_and_building_links_starts_no_backend():
    code = """
import jax, optax, jaxprune as jp
from jaxprune import *
jp.gradual(optax.adam(1e-3), jp.scores.magnitude, jp.schedules.cubic(0.9, 0, 10))
jp.enforce(optax.adam(1e-3), lambda p: jp.select(jp.scores.magnitude(p), 0.5))
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    python("-c", code)
