import functools
import itertools
import json
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compilations, mesh, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _program


def close(a, b, tolerance=1e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


def randomize(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.uniform(0.2, 1, w.shape), w.dtype), tree)


def halve(fn, params, *inputs, has_aux=False, **options):
    """Selects half of the units and shrinks; also gives the masked params."""
    groups = jp.find_groups(fn, params, *inputs, has_aux=has_aux, **options)
    masks = groups.select(jp.scores.magnitude(params), 0.5, scope="layer")
    shrunk = jp.shrink(fn, params, masks, *inputs, has_aux=has_aux)
    return *shrunk, jp.apply_masks(params, masks)


def mlp():
    params = {
        "a": {"w": jnp.ones((6, 8)), "b": jnp.ones(8)},
        "c": {"w": jnp.ones((8, 3)), "b": jnp.ones(3)},
    }

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"][None])
        return h @ p["c"]["w"] + p["c"]["b"][None]

    return fn, randomize(params), jax.random.normal(jax.random.key(1), (5, 6))


class ConvNet(nn.Module):
    """BatchNorm, a residual, dropout and a flatten."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        x = nn.relu(x + norm()(nn.Conv(8, (3, 3))(x)))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def conv_net():
    model, x = ConvNet(), jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    return model, randomize(jax.eval_shape(model.init, jax.random.key(0), x)), x


def test_an_ordinary_function():
    fn, params, x = mlp()
    small_fn, small, plan, masked = halve(fn, params, x)
    close(jax.jit(small_fn)(small, x), fn(masked, x))
    for batch in (1, 3, 17):  # any batch size
        other = jax.random.normal(jax.random.key(batch), (batch, 6))
        close(small_fn(small, other), fn(masked, other))
    many = jnp.stack([x, 2 * x])
    close(jax.vmap(small_fn, (None, 0))(small, many), jax.vmap(fn, (None, 0))(masked, many))

    def loss(f):
        return lambda p: jnp.sum(jnp.sin(f(p, x)))

    close(jax.grad(loss(small_fn))(small), plan.take(jax.grad(loss(fn))(masked)))

    def hessian(f, p):
        return jax.jacfwd(jax.grad(lambda b: loss(f)({**p, "c": {**p["c"], "b": b}})))(p["c"]["b"])

    close(hessian(small_fn, small), hessian(fn, masked))


def test_one_trace_for_one_shape():
    traces = []
    fn, params, x = mlp()
    small_fn, small, _, _ = halve(lambda p, x: traces.append(0) or fn(p, x), params, x)
    before = len(traces)
    small_fn(small, x), small_fn(small, x + 1)
    assert len(traces) == before


@pytest.mark.parametrize("verify", [True, False])
def test_the_example_shapes_are_walked_once(verify, monkeypatch):
    fn, params, x = mlp()
    masks = jp.find_groups(fn, params, x).select(jp.scores.magnitude(params), 0.5)
    walks, analyse = [], _program.analyse
    monkeypatch.setattr(_program, "analyse", lambda *a, **k: walks.append(0) or analyse(*a, **k))
    small_fn, small, _ = jp.shrink(fn, params, masks, x, verify=verify)
    close(small_fn(small, x), fn(jp.apply_masks(params, masks), x))
    assert len(walks) == 1
    small_fn(small, x[:2])  # another shape
    assert len(walks) == 2
    with jax.default_matmul_precision("float32"):  # a new trace, since it may differ
        text = str(jax.make_jaxpr(small_fn)(small, x))
    assert len(walks) == 3 and "Precision.HIGHEST" in text


def test_it_exports():
    fn, params, x = mlp()
    small_fn, small, _, masked = halve(fn, params, x)
    shape = jax.ShapeDtypeStruct((5, 6), x.dtype)
    exported = jax.export.export(small_fn)(jax.eval_shape(lambda: small), shape)
    close(exported.call(small, x), fn(masked, x))


def test_it_exports_with_an_open_batch():
    model, variables, x = conv_net()

    def fn(v, x):
        return jax.nn.softmax(model.apply(v, x) @ jnp.ones((3, 5)), -1)

    small_fn, small, _, masked = halve(fn, variables, x)
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 6, 6, 2), x.dtype)
    exported = jax.export.export(small_fn)(jax.eval_shape(lambda: small), shape)
    for batch in (1, 4, 7):
        x = jax.random.normal(jax.random.key(batch), (batch, 6, 6, 2))
        close(exported.call(small, x), fn(masked, x))


def test_batch_statistics_and_flatten():
    model, variables, x = conv_net()
    small_fn, small, plan, masked = halve(model.apply, variables, x)
    assert plan.inexact == ()
    assert small["batch_stats"]["BatchNorm_0"]["var"].shape == (4,)
    assert small["params"]["Dense_0"]["kernel"].shape == (36 * 4, 3)
    close(small_fn(small, x), model.apply(masked, x))
    wide = jnp.ones((2, 6, 6, 2))
    close(small_fn(small, wide), model.apply(masked, wide))


def test_training_the_shrunk_network():
    model, variables, x = conv_net()
    y = jnp.arange(4) % 3

    def apply(variables, x, key):
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    key = jax.random.key(3)
    groups = jp.find_groups(model.apply, variables, x)
    masks = groups.select(jp.scores.magnitude(variables), 0.5, scope="layer")
    small_fn, small, plan = jp.shrink(apply, variables, masks, x, key, has_aux=True)
    assert any("random draw" in reason for reason in plan.inexact)

    def train(fn, variables, tx, state, steps=25):
        @jax.jit
        def step(variables, state, key):
            def loss(params):
                logits, aux = fn({**variables, "params": params}, x, key)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), aux

            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            updates, state = tx.update(grads, state, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            return {"params": params, **aux}, state, value

        losses = []
        for i in range(steps):
            variables, state, value = step(variables, state, jax.random.key(i))
            losses.append(float(value))
        return variables, state, losses

    masked = jp.apply_masks(variables, masks)
    tx = jp.enforce(optax.adam(1e-2), masks["params"])
    dense, dense_state, dense_losses = train(apply, masked, tx, tx.init(masked["params"]))
    tx = optax.adam(1e-2)
    state = plan.take(tx.init(variables["params"]))
    trained, state, losses = train(small_fn, small, tx, state)
    assert losses[-1] < 0.3 * losses[0] and dense_losses[-1] < 0.3 * dense_losses[0]
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, small)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def plain_net():
    """A network in train mode, which gives its output and new batch statistics."""
    model, x = Plain(), jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    variables = randomize(jax.eval_shape(model.init, jax.random.key(0), x))
    return lambda v, x: model.apply(v, x, mutable=["batch_stats"]), variables, x


def test_fine_tuning_shrunk_is_fine_tuning_masked():
    fn, variables, x = plain_net()
    groups = jp.find_groups(fn, variables, x, has_aux=True)
    masks = groups.select(jp.scores.magnitude(variables), 0.5)
    small_fn, small, plan = jp.shrink(fn, variables, masks, x, has_aux=True)

    def train(fn, variables, tx):
        @jax.jit
        def step(variables, state):
            def loss(params):
                out, aux = fn({**variables, "params": params}, x)
                return jnp.mean((out - 1) ** 2), aux

            params = variables["params"]
            grads, aux = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return {"params": optax.apply_updates(params, updates), **aux}, state

        state = tx.init(variables["params"])
        for _ in range(10):
            variables, state = step(variables, state)
        return variables

    adam = optax.adamw(1e-2, eps=1e-3)
    masked = jp.apply_masks(variables, masks)
    expected = train(fn, masked, jp.enforce(adam, masks["params"]))
    close(train(small_fn, small, adam), plan.take(expected), 1e-3)


def test_train_mode_statistics_are_those_of_the_masked_network():
    fn, variables, x = plain_net()
    assert len(jp.find_groups(fn, variables, x)) == 0  # the new statistics are an output
    small_fn, small, plan, masked = halve(fn, variables, x, has_aux=True)
    assert plan.inexact == ()
    out, stats = fn(masked, x)
    small_out, small_stats = small_fn(small, x)
    close(small_out, out)
    close(small_stats, plan.take(stats))


def test_take_and_put():
    fn, params, x = mlp()
    small_fn, small, plan, masked = halve(fn, params, x)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    state = tx.init(params)
    grads = jax.grad(lambda p: fn(p, x).sum())(masked)
    _, state = tx.update(grads, state, params)
    taken = plan.take(state)
    assert jax.tree.map(jnp.shape, taken) == jax.tree.map(jnp.shape, tx.init(small))
    close(taken[1][0].mu["c"]["w"], plan.take(params | {"c": state[1][0].mu["c"]})["c"]["w"])
    again = plan.take(plan.put(taken))
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(taken)))
    close(plan.put(small), masked)
    model, variables, x = conv_net()
    *_, plan, masked = halve(model.apply, variables, x)  # an optimizer of a part of the params
    adam = optax.adam(1e-3).init(variables["params"])
    shapes = jax.tree.map(jnp.shape, plan.take(masked)["params"])
    assert jax.tree.map(jnp.shape, plan.take(adam)[0].nu) == shapes
    masked_adam = optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda w: w.ndim > 1, p))
    taken = plan.take(masked_adam.init(variables["params"]))
    assert taken.inner_state[0].mu["Conv_0"]["kernel"].shape == shapes["Conv_0"]["kernel"]


def test_take_refuses_what_it_does_not_know():
    fn, params, x = mlp()
    _, _, plan, _ = halve(fn, params, x)
    state = optax.adafactor(1e-3, min_dim_size_to_factor=2).init(params)
    with pytest.raises(ValueError, match="v_row.*Re-initialise it"):
        plan.take(state)


def test_the_plan_is_text():
    fn, params, x = mlp()
    _, _, plan, _ = halve(fn, params, x)
    assert jp.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert [kept[:2] for kept in plan.kept] == [("a/b", 0), ("a/w", 1), ("c/w", 0)]
    assert "6×8    6×4" in str(plan)


def test_kept_literals_and_closed_over_constants():
    scale = jnp.linspace(0.5, 2, 8)

    def fn(p, x):
        h = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None]) * scale  # a constant is sliced
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)  # mean: / 8.0 stays
        return h @ p["c"]["w"]

    _, params, x = mlp()
    with jax.numpy_rank_promotion("allow"):
        small_fn, small, plan, masked = halve(fn, params, x)
        assert plan.inexact == ()
        close(small_fn(small, x), fn(masked, x))


def test_what_is_not_exact_is_listed():
    def fn(p, x):
        return jax.nn.softmax(x @ p["a"]["w"] + jnp.arange(8.0)[None], -1) @ p["c"]["w"]

    _, params, x = mlp()
    assert len(jp.find_groups(fn, params, x)) == 0
    groups = jp.find_groups(fn, params, x, exact=False)
    masks = groups.select(jp.scores.magnitude(params), 0.5)
    _, small, plan = jp.shrink(fn, params, masks, x)
    assert small["a"]["w"].shape == (6, 4)
    assert "different for every index since `add`" in plan.inexact
    assert any(reason.startswith("output") and "differs by" in reason for reason in plan.inexact)
    _, _, quiet = jp.shrink(fn, params, masks, x, verify=False)
    assert quiet.inexact == plan.inexact[: len(quiet.inexact)]
    assert not any("differs" in reason for reason in quiet.inexact)


def test_a_custom_gradient_survives():
    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), x.shape), lambda shape, g: (2 * g,))

    def fn(p, x):
        return straight_through(x @ p["a"]["w"]) @ p["c"]["w"]

    _, params, x = mlp()
    small_fn, small, plan, masked = halve(fn, params, x)

    def loss(f):
        return lambda p: jnp.sum(jnp.sin(f(p, x)))

    close(jax.grad(loss(small_fn))(small), plan.take(jax.grad(loss(fn))(masked)))

    def relu(p, x):
        return jax.nn.relu(0.0 * (x @ p["a"]["w"])) @ p["c"]["w"]  # gradient 0 at 0

    small_fn, small, plan, masked = halve(relu, params, x)
    assert not jax.grad(lambda p: small_fn(p, x).sum())(small)["c"]["w"].any()


def test_frozen_low_precision_integer_and_tied_params():
    def fn(p, x):
        h = jax.nn.relu(x.astype(jnp.bfloat16) @ jax.lax.stop_gradient(p["a"]))
        return (h @ p["b"] + h @ p["tied"]) @ p["tied"].T * p["step"].astype(jnp.bfloat16)

    shapes = {"a": (6, 8), "b": (8, 4), "tied": (8, 4)}
    params = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in shapes.items()}
    params = {**randomize(params), "step": jnp.array(2, jnp.int32)}
    x = jnp.ones((3, 6))

    def out(p, x):
        return fn(p, x) @ jnp.ones((8, 2), jnp.bfloat16)

    small_fn, small, plan, masked = halve(out, params, x)
    assert small["tied"].shape == (4, 2) and small["b"].dtype == jnp.bfloat16
    assert small["step"].dtype == jnp.int32
    close(small_fn(small, x), out(masked, x), 2e-2)


def test_sharded_functions(shards=8):
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(AxisType.Auto,))
    _, params, _ = mlp()

    def fn(p, x):
        return jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None]) @ p["c"]["w"]

    sharded = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    x = jax.random.normal(jax.random.key(0), (16, 6))
    small_fn, small, plan, masked = halve(sharded, params, x)
    assert small["a"]["w"].shape == (6, 4) and plan.inexact == ()
    close(jax.jit(small_fn)(small, x), fn(masked, x))


def test_shapes_alone_skip_verification():
    fn, params, x = mlp()
    shapes = jax.eval_shape(lambda: params)
    masks = jp.find_groups(fn, shapes, x).select(jp.scores.magnitude(params), 0.5)
    small_fn, small, plan = jp.shrink(fn, shapes, masks, x)
    assert small["a"]["w"] == jax.ShapeDtypeStruct((6, 4), jnp.float32)
    assert small_fn(plan.take(jp.apply_masks(params, masks)), x).shape == (5, 3)


def test_bad_masks():
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    masks = groups.select(jp.scores.magnitude(params), 0.5)
    with pytest.raises(jp.CannotShrink, match="a/b: index . of axis 0 is masked, but cannot be"):
        whole = {**masks, "a": {**masks["a"], "w": jnp.ones((6, 8), bool)}}
        jp.shrink(fn, params, whole, x)
    with pytest.raises(ValueError, match="unit . removed from .*, and kept in a/w axis 1"):
        jp.shrink(fn, params, whole, x, groups=groups)
    with pytest.raises(jp.CannotShrink, match="c/w: masks must keep a slice .* none of 8"):
        jp.shrink(fn, params, {**masks, "c": {**masks["c"], "w": jnp.zeros((8, 3), bool)}}, x)
    with pytest.raises(ValueError, match="c/w: masks have shape"):
        jp.shrink(fn, params, {**masks, "c": {**masks["c"], "w": jnp.ones((3, 3), bool)}}, x)
    with pytest.raises(TypeError, match="masks must be bool"):
        jp.shrink(fn, params, jax.tree.map(lambda m: m.astype(int), masks), x)
    with pytest.warns(UserWarning, match="remove no entire slice"):
        jp.shrink(fn, params, jax.tree.map(jnp.ones_like, masks), x)


def test_bad_calls():
    fn, params, x = mlp()
    small_fn, small, _, _ = halve(fn, params, x)
    with pytest.raises(ValueError, match="a/b: small params must have shape .4,., got .8,."):
        small_fn(params, x)
    with pytest.raises(TypeError, match="must be an array or its shape, got function"):
        jp.shrink(fn, params, jax.tree.map(lambda w: w > 0, params), lambda: x)
    with pytest.raises(ValueError, match="has_aux=True: apply_fn must return a pair"):
        jp.find_groups(fn, params, x, has_aux=True)


def test_a_function_that_branches_on_shapes():
    def fn(p, x):
        h = jax.nn.relu(x @ p["a"]["w"])
        return h @ p["c"]["w"] if len(x) > 4 else jnp.sort(h, -1) @ p["c"]["w"]

    _, params, x = mlp()
    small_fn, small, _, _ = halve(fn, params, x)
    with pytest.raises(ValueError, match="branches on them"):
        small_fn(small, x[:2])


def test_random_keys_beside_the_params_stay_as_they_are():
    fn, params, x = mlp()
    params = params | {"key": jax.random.key(0), "keys": jax.random.split(jax.random.key(1), 3)}
    _, small, plan, _ = halve(fn, params, x)
    for tree in (small, plan.take(params), plan.put(small)):
        assert (tree["keys"] == params["keys"]).all() and tree["key"] == params["key"]


def test_verified_quietly():
    fn, params, x = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, plan, _ = halve(fn, params, x)
    assert plan.inexact == ()


@pytest.mark.parametrize("spec", [None, P("x")], ids=["one device", "mesh"])
def test_few_programs_are_compiled_however_many_layers_differ(spec):
    sizes = [16, 24, 40, 56, 72, 88, 8]
    params = normal([(a, b) for a, b in itertools.pairwise(sizes)])
    if spec is not None:
        params = jax.device_put(params, NamedSharding(mesh(x=2), spec))
    fn, x = lambda params, x: functools.reduce(jnp.matmul, params, x), jnp.ones((2, 16))
    groups = jp.find_groups(fn, params, x)
    masks = groups.select(params, 0.5, scope="layer")
    with compilations() as of_shrink:
        small_fn, small, _ = jp.shrink(fn, params, masks, x)
    with compilations() as of_small:
        small_fn(small, x)
    assert len(of_shrink) <= 8 and not of_small, (of_shrink, of_small)


def test_selections_of_one_device_compile_little():
    params = normal([(7 + i, 9 + i) for i in range(12)])
    fn = lambda params, x: [x @ w[:7] for w in params]
    groups = jp.find_groups(lambda params, x: fn(params, x), params, jnp.ones((2, 7)), exact=False)
    with compilations() as names:
        masks = jp.select(params, 0.5)
        jp.masks.unpack(jp.masks.pack(masks), params)
    assert not names
    with compilations() as names:
        jp.apply_masks(params, masks)
        groups.select(params, 0.5, scope="layer")
    assert len(names) <= 9, names
