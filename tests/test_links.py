"""What all parts of a training step promise: true derivatives, strict settings, empty labels."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import mesh, normal, place, slow_unless
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxprune as jp


def apply_fn(params, x):
    return jnp.tanh((x @ params["w"]) * params["scale"][None]) @ params["v"]


@functools.cache
def problem():
    params = normal({"w": (4, 8), "scale": (8,), "v": (8, 4)})
    # A unit at zero, where a norm has no derivative.
    zeros = {"w": params["w"].at[:, 2].set(0), "v": params["v"].at[2].set(0)}
    return params | zeros | {"scale": params["scale"].at[2].set(0)}, normal((5, 4), seed=1)


def loss(params):
    x = problem()[1].astype(params["w"].dtype)
    return jnp.mean((apply_fn(params, x) - x) ** 2)


@pytest.fixture(autouse=True)
def cached():
    masks(), units()  # not first inside a trace


@functools.cache
def units():
    return jp.find_groups(apply_fn, *problem())


@functools.cache
def masks():
    return jp.select(jp.scores.magnitude(problem()[0]), 0.5)


def gradual(score=jp.scores.magnitude, **choices):
    select = functools.partial(jp.select, **choices)
    return lambda tx, c: jp.gradual(tx, score, jp.schedules.linear(0.5, 0, 2), select=select)


LINKS = {  # of an optimizer and a strength; a new link adds one row here
    "enforce": lambda tx, c: jp.enforce(tx, masks()),
    "enforce a function": lambda tx, c: jp.enforce(tx, lambda p: jp.select(p, 0.5)),
    "gradual": gradual(),
    "gradual by loss": gradual(jp.scores.taylor(loss)),
    "gradual by blocks": gradual(pattern=jp.patterns.block((2, 2))),
    "slimming": lambda tx, c: optax.chain(jp.regularizers.slimming(c), tx),
    "group_lasso": lambda tx, c: optax.chain(jp.regularizers.group_lasso(units(), c), tx),
    "growing": lambda tx, c: optax.chain(jp.regularizers.growing(masks(), c, every=2), tx),
}


def by_movement(trained, strength):
    params, scores = trained
    sparse = jp.movement.apply(params, scores, jp.select(jax.lax.stop_gradient(scores), 0.5))
    return loss(sparse) + strength * jp.movement.penalty(scores)


def by_gates(trained, strength):
    params, log_alpha = trained
    gates = jp.gates.sample(log_alpha, jax.random.key(0))
    total = loss(jax.tree.map(jnp.multiply, params, gates)) + loss(jp.gates.mean(log_alpha))
    return total + strength * jp.gates.penalty(log_alpha)


LOSSES = {"movement": by_movement, "gates": by_gates}  # of params and a second tree


def train(name, params, rate, strength):
    """Returns a smooth function of what two steps have trained."""
    if name in LINKS:
        tx = LINKS[name](optax.sgd(rate, momentum=0.9), strength)
        gradient, trained = jax.grad(loss), params
    else:
        tx = optax.sgd(rate, momentum=0.9)
        gradient = lambda trained: jax.grad(LOSSES[name])(trained, strength)
        trained = params, jax.tree.map(lambda w: w[..., ::-1] / 2, params)
    state = tx.init(trained)
    for _ in range(2):
        updates, state = tx.update(gradient(trained), state, trained)
        trained = optax.apply_updates(trained, updates)
    return sum(jnp.sum(w**2) for w in jax.tree.leaves(trained))


def perturbed(name, deltas, rate, strength):
    # Relative changes, so that what is zero stays zero: there, some penalties have a kink.
    params = jax.tree.map(lambda w, d: w.astype(d.dtype) * (1 + d), problem()[0], deltas)
    return train(name, params, rate, strength)


@pytest.mark.parametrize("name", slow_unless({"enforce"}, [*LINKS, *LOSSES]))
def test_derivatives_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        deltas = jax.tree.map(lambda w: jnp.zeros(w.shape, "float64"), problem()[0])
        point = deltas, jnp.float64(0.1), jnp.float64(0.2)
        outer = jax.jit(functools.partial(perturbed, name))
        check_grads(outer, point, order=2, modes=["fwd", "rev"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*LINKS, *LOSSES])
def test_strict_settings(name):
    params, _ = problem()
    outer = jax.jit(jax.value_and_grad(functools.partial(train, name), argnums=(0, 1, 2)))
    point = params, jnp.float32(0.1), jnp.float32(0.2)
    expected = outer(*point)
    with contextlib.ExitStack() as settings:
        for setting in (
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
            jax.debug_nans(True),
            jax.transfer_guard("disallow"),
        ):
            settings.enter_context(setting)
        strict = outer(*point)
    assert all(map(jnp.allclose, jax.tree.leaves(strict), jax.tree.leaves(expected)))


@pytest.mark.parametrize("name", LINKS)
def test_a_label_that_no_leaf_carries(name):
    link, other, w = LINKS[name](optax.sgd(0.1), 0.2), optax.sgd(1.0), {"w": jnp.ones((2, 2))}
    for tx, params, expected in (
        (optax.partition({"p": link, "q": other}, {"w": "q"}), w, {"w": -w["w"]}),
        (optax.masked(link, {"w": False}), w, w),
        (link, {}, {}),
    ):
        state = tx.init(params)
        for _ in range(2):
            updates, after = tx.update(params, state, params)
            assert jax.tree.all(jax.tree.map(jnp.array_equal, updates, expected))
            assert jax.tree.structure(after) == jax.tree.structure(state)
            state = after


@pytest.mark.parametrize("name", LINKS)
def test_link_inits_on_shapes(name):
    tx, params = LINKS[name](optax.adam(0.1), 0.2), problem()[0]
    shapes = tx.init(jax.eval_shape(lambda: params))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, tx.init(params))


@pytest.mark.parametrize("name", LINKS)
def test_link_keeps_types_and_explicit_shardings(name):
    tx, devices = LINKS[name](optax.adam(0.1), 0.2), mesh(AxisType.Explicit, x=4)
    specs = {"w": P(), "scale": P(), "v": P(None, "x")}
    with jax.set_mesh(devices):
        params = place(jax.tree.map(jnp.float16, problem()[0]), devices, specs)
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types
        assert jax.tree.map(jax.typeof, tx.update(params, state, params)[1]) == types
        assert jax.tree.map(jax.typeof, jax.jit(tx.update)(params, state, params)[1]) == types
