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
from jax.sharding import NamedSharding
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
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 1e-2),
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


EVERY = functools.partial(jp.select, where=lambda path, score: True)
SCORES = {  # of params alone
    "magnitude": jp.scores.magnitude,
    "slimming": jp.scores.slimming,
    "fpgm": jp.scores.fpgm,
    "lamp": jp.scores.lamp,
    "all but one": lambda params: jp.scores.magnitude(params | {"w": None}),
}


@pytest.mark.parametrize("name", SCORES)
def test_gradual_asks_its_score_which_leaves_have_masks(name):
    params = normal({"w": (4, 4), "scale": (4,), "v": (4, 4)}) | {"none": None, "step": 1}
    tx = jp.gradual(optax.sgd(0.0), SCORES[name], jp.schedules.one_shot(0.5), select=EVERY)
    start = tx.init(params)
    _, state = tx.update(params, start, params)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    assert equal(state.masks, EVERY(SCORES[name](params), 0.5))


def test_gradual_keeps_leaves_that_a_score_of_a_batch_leaves_out():
    params = normal({"w": (4, 4), "scale": (4,)})
    score = lambda params, x: {"w": None, "scale": x * params["scale"]}
    tx = jp.gradual(optax.sgd(0.0), score, jp.schedules.one_shot(0.5), select=EVERY)
    _, state = tx.update(params, tx.init(params), params, batch=(2.0,))
    assert state.masks["w"].all() and state.masks["scale"].sum() == 2


@pytest.mark.parametrize("begin", [0, 2])
def test_gradual_prunes_from_the_begin_of_its_grid(begin):
    schedule, params = jp.schedules.linear(0.5, begin=2, end=12), jnp.arange(40.0).reshape(2, 20)
    tx = jp.gradual(optax.sgd(0.0), jp.scores.magnitude, schedule, every=4, begin=begin)
    state, steps = tx.init(params), []
    for i in range(15):
        before, (_, state) = state, tx.update(params, state, params)
        steps += [i] if (state.masks != before.masks).any() else []
    assert steps == {0: [4, 8, 12], 2: [6, 10, 12]}[begin]


def test_gradual_prunes_again_after_set_masks():
    params = jnp.arange(8.0).reshape(2, 4)
    tx = jp.gradual(optax.sgd(0.0), jp.scores.magnitude, jp.schedules.linear(0.5, 0, 2))
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
    pruned = state.masks
    state = jp.set_masks(state, jnp.ones((2, 4), bool).at[1, 3].set(False))
    _, state = tx.update(params, state, params)
    assert state.masks.sum() == 4 and not state.masks[1, 3] and pruned[1, 3]


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
    sgd, score, schedule = optax.sgd(0.1), jp.scores.magnitude, jp.schedules.one_shot(0.5)
    for every in (0, 1.5):
        with pytest.raises(
            ValueError, match=f"every must be an integer of at least 1, got {every}"
        ):
            jp.gradual(sgd, score, schedule, every=every)
    for message, kinds in {
        "inner must be a gradient transformation, got <function sgd": (optax.sgd, score, schedule),
        "score must be a function, got dict": (sgd, masks, schedule),
        "schedule must be a function, got float": (sgd, score, 0.5),
        "select must be a function, got str": (sgd, score, schedule, 1, "layer"),
    }.items():
        with pytest.raises(TypeError, match=f"gradual: {message}"):
            jp.gradual(*kinds)
    with pytest.raises(ValueError, match="begin must be an integer of at least 0, got -1"):
        jp.gradual(sgd, score, schedule, begin=-1)
    with pytest.raises(TypeError, match="enforce: inner must be a gradient transformation"):
        jp.enforce(optax.sgd, masks)


def train(tx, steps=20):
    params, x = normal({"w": (8, 8), "b": (8,)}), normal((8,), seed=1)
    loss = lambda p: jnp.sum((jnp.tanh(p["w"]) @ x + p["b"] - 1) ** 2)
    state, average = tx.init(params), params
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.1)
    return params, average, state


PRUNING = {
    "gradual": lambda tx: jp.gradual(tx, jp.scores.magnitude, jp.schedules.linear(0.5, 2, 6)),
    "enforce": lambda tx: jp.enforce(tx, lambda p: jp.select(jp.scores.magnitude(p), 0.5)),
}


@pytest.mark.parametrize("name", PRUNING)
def test_evaluated_params_of_schedule_free_are_pruned(name):
    evaluate = optax.contrib.schedule_free_eval_params
    schedule_free = optax.contrib.schedule_free_adamw(1e-2, weight_decay=0.1)
    params, _, state = train(PRUNING[name](schedule_free))
    masks = jp.get_masks(state)
    assert pruned_are_zero(params, masks) and pruned_are_zero(evaluate(state.inner, params), masks)


def test_averages_keep_what_gradual_prunes_until_they_are_masked():
    """What the docstring says of weights that the link does not see."""
    adam, schedule_free = optax.adam(1e-2), optax.contrib.schedule_free
    params, average, state = train(schedule_free(PRUNING["gradual"](adam), 1e-2))
    evaluated = optax.contrib.schedule_free_eval_params(state, params)
    _, average, state = train(PRUNING["gradual"](adam))
    masks = jp.get_masks(state)
    for copy in (params, evaluated, average):
        assert not pruned_are_zero(copy, masks)
        assert pruned_are_zero(jp.apply_masks(copy, masks), masks)


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


def test_lookahead_mixes_in_what_gradual_prunes():
    params, grads = problem()
    schedule = jp.schedules.one_shot(0.5, begin=1)
    tx = optax.lookahead(jp.gradual(optax.sgd(1e-2), jp.scores.magnitude, schedule), 3, 0.5)
    both = optax.LookaheadParams.init_synced(params)
    state, pruned = tx.init(both), []
    for _ in range(3):
        updates, state = tx.update(grads, state, both)
        both = optax.apply_updates(both, updates)
        pruned.append(pruned_are_zero(both.fast, jp.get_masks(state)))
    assert pruned == [True, True, False]


def test_value_from_state_is_that_before_pruning():
    loss = lambda p: jnp.sum((p - jnp.arange(8.0).reshape(2, 4)) ** 2)
    schedule = jp.schedules.one_shot(0.5, begin=2)
    tx = jp.gradual(optax.lbfgs(), jp.scores.magnitude, schedule)
    params, same = jnp.ones((2, 4)), []
    state, from_state = tx.init(params), optax.value_and_grad_from_state(loss)
    for _ in range(4):
        value, grad = from_state(params, state=state)
        same.append(bool(jnp.allclose(value, loss(params), atol=1e-5)))
        value, grad = jax.value_and_grad(loss)(params)
        extra = {"value": value, "grad": grad, "value_fn": loss}
        updates, state = tx.update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
    assert same == [True, True, True, False]


def test_functions_and_trees_of_masks_are_told_apart():
    params = equinox()
    select = lambda p: jp.select(jp.scores.magnitude(p), 0.5)
    masks = select(params)
    given = [masks, select, jax.jit(select), eqx.filter_jit(select), jax.tree_util.Partial(select)]
    for argument in given:
        assert equal(jp.enforce(optax.sgd(0.1), argument).init(params).masks, masks)


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
