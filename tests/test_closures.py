"""Everything that takes a function follows what it closes over, as `jax.grad` does, or a jit."""

import functools
import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, compilations, normal

import jaxprune as jp

PARAMS = normal({"a": (4, 6), "c": (6, 2)})
X, Y = normal((3, 4), seed=1), normal((3, 2), seed=2)
MASKS = jp.select(jp.scores.magnitude(PARAMS), 0.5)
KEY = jax.random.key(0)


def network(p, x, scale):
    return jnp.tanh(x @ p["a"] * scale) @ p["c"]


GROUPS = jp.find_groups(functools.partial(network, scale=1.0), PARAMS, X)

LOSSES = {  # all that take a loss: (loss) -> result
    **{
        name: lambda loss, name=name: getattr(jp.scores, name)(loss)(PARAMS, X, Y)
        for name in ("gradient", "taylor", "snip", "grasp", "obd", "fisher")
    },
    "woodfisher": lambda loss: jp.scores.woodfisher(loss, 4, 1e-3)(PARAMS, X, Y),
    "woodfisher_update": lambda loss: jp.scores.woodfisher_update(loss, 4, 1e-3)(
        PARAMS, MASKS, X, Y
    ),
    "obd_hutchinson": lambda loss: jp.scores.obd_hutchinson(loss, 3)(PARAMS, KEY, X, Y),
    "units.taylor": lambda loss: jp.units.taylor(GROUPS, loss)(PARAMS, X, Y),
    "units.taylor_gates": lambda loss: jp.units.taylor_gates(GROUPS, loss)(PARAMS, X, Y),
    "oracle": lambda loss: jp.search.oracle(GROUPS, loss)(PARAMS, X, Y),
    "particle_filter": lambda loss: jp.search.particle_filter(
        GROUPS, loss, PARAMS, 0.5, KEY, X, Y, particles=8, rounds=2
    ),
}
FUNCTIONS = {  # all that take a network
    "synflow": lambda f: jp.scores.synflow(f)(PARAMS, X),
    "select_iteratively": lambda f: jp.select_iteratively(
        jp.scores.synflow(f), PARAMS, 0.5, X, rounds=3
    ),
    "activation": lambda f: jp.units.activation(GROUPS, f)(PARAMS, X),
}
SCORES = LOSSES | FUNCTIONS


def closing(name, scale):
    """Returns what a row takes, as a new function that closes over a scale."""

    def apply_fn(p, x):
        return network(p, x, scale.value)

    if name in FUNCTIONS:
        return apply_fn
    return lambda p, x, y: jnp.mean((apply_fn(p, x) - y) ** 2)


def boxed(value):
    """A scale of every hidden unit: units differ, so no score is the same for two scales."""
    return types.SimpleNamespace(value=value * jnp.arange(1.0, 7.0)[None])


@pytest.mark.filterwarnings("ignore:obd")
@pytest.mark.parametrize("name", SCORES)
def test_it_follows_what_it_closes_over(name):
    box = boxed(0.3)
    fn = closing(name, box)
    before = SCORES[name](fn)
    box.value = boxed(0.2).value[:, ::-1]
    after = SCORES[name](fn)
    assert bits(after) != bits(before)
    assert bits(after) == bits(SCORES[name](closing(name, box)))


@pytest.mark.filterwarnings("ignore:obd")
@pytest.mark.parametrize("name", SCORES)
def test_a_function_of_the_same_structure_compiles_nothing(name):
    SCORES[name](closing(name, boxed(0.3)))
    other = closing(name, boxed(0.2))
    with compilations() as compiled:
        SCORES[name](other)
    assert not compiled


@pytest.mark.filterwarnings("ignore:obd")
@pytest.mark.parametrize("name", SCORES)
def test_it_keeps_nothing_alive(name):
    box = boxed(0.3)
    fn = closing(name, box)
    SCORES[name](fn)
    SCORES[name](jax.jit(fn))  # whose program holds the array
    dead = weakref.ref(fn), weakref.ref(box.value)
    del fn, box
    gc.collect()
    assert [ref() is None for ref in dead] == [True, True]


STRUCTURES = {  # losses of one weight that differ in one thing; each is compiled on its own
    "literal": lambda c: lambda w: jnp.sum(w * c),
    "numpy": lambda c: lambda w: jnp.sum(w * np.full(3, c, np.float32)),
    "dtype": lambda c: lambda w: jnp.sum(w * jnp.full(3, c, jnp.int32 if c > 1 else jnp.float32)),
    "parameter": lambda c: lambda w: jnp.sum(w ** int(c)),
    "sign of zero": lambda c: (
        lambda w: jnp.sum(
            w * (4 + jnp.arctan2(jnp.where(w > -1, -0.0 if c > 1 else 0.0, 1.0), -1.0))
        )
    ),
    "branch": lambda c: lambda w: jnp.sum(jnp.sin(w) if c > 1 else jnp.cos(w)),
    "scan": lambda c: lambda w: jax.lax.scan(lambda x, _: (x * c, None), w.sum(), None, 2)[0],
    "rule": lambda c: lambda w: jnp.sum(ruled(c)(w)),
    "inner jit": lambda c: lambda w: jnp.sum(jax.jit(lambda w: jnp.full(3, c) * w)(w)),
    "checkpoint": lambda c: lambda w: jnp.sum(jax.checkpoint(lambda w: jnp.full(3, c) * w)(w)),
    "callback": lambda c: (
        lambda w: jnp.sum(
            w
            * jax.pure_callback(lambda: np.full(3, c, np.float32), jax.ShapeDtypeStruct((3,), "f4"))
        )
    ),
    "cond": lambda c: lambda w: jax.lax.cond(w[0] > 0, lambda: w.sum() * c, lambda: w.sum()),
}


def ruled(c):
    """The identity, whose gradient is c."""
    f = jax.custom_vjp(lambda x: x)
    f.defvjp(lambda x: (x, None), lambda _, g: (g * c,))
    return f


@pytest.mark.parametrize("name", STRUCTURES)
def test_programs_that_differ_are_told_apart(name):
    w = jnp.array([1.0, 2.0, 3.0])
    results = []
    for c in (1.0, 2.0, 3.0, 1.0):
        loss = STRUCTURES[name](c)
        scores = jp.scores.gradient(loss)(w)
        np.testing.assert_array_equal(scores, jnp.abs(jax.jit(jax.grad(loss))(w)))
        results.append(bits(scores))
    assert results[0] == results[3] and (results[0] != results[2])


def test_inside_a_transformation_it_is_part_of_it():
    loss = lambda w, x: jnp.sum(jnp.sin(w) * x)
    w, x = jnp.arange(3.0), jnp.ones((2, 3))
    score = lambda x: jp.scores.taylor(lambda w: loss(w, x))(w)  # closes over a tracer
    np.testing.assert_allclose(jax.vmap(score)(x), jnp.stack([score(row) for row in x]), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(score)(x[0]), score(x[0]), rtol=1e-6)
    slope = jax.grad(lambda w: jp.scores.taylor(loss)(w, x[0]).sum())(w)
    expected = jax.grad(lambda w: jnp.abs(w * jax.grad(loss)(w, x[0])).sum())(w)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
    closed = lambda c: jp.scores.gradient(lambda w: jnp.sum(w * ruled(3.0)(c)))(w).sum()
    assert jax.grad(closed)(1.0) == 9  # by the rule, for three weights
