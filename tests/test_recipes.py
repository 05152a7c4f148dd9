import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import equal

import jaxprune as jp
from jaxprune import recipes


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (6, 8)), "b": jnp.ones(8)}
    x, y = jax.random.normal(keys[1], (32, 6)), jax.random.normal(keys[2], (32, 8))
    return params, lambda p: jnp.mean((x @ p["w"] + p["b"][None] - y) ** 2)


@functools.cache
def trainer():
    loss = problem()[1]

    @jax.jit
    def train(params, masks):
        tx = jp.enforce(optax.adam(1e-2), masks)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, 5)[0][0]

    return train


def drawn(key=None):
    """Returns other params: fixed ones, or random ones."""
    if key is None:
        return {"w": jnp.full((6, 8), 0.5), "b": jnp.zeros(8)}
    return {"w": jax.random.normal(key, (6, 8)), "b": jax.random.normal(key, 8)}


SPARSITIES = [0.25, 0.5, 0.75]
RESTARTS = {  # a new restart adds one row here, and the params at which a round starts
    "keep": (lambda: recipes.keep, lambda params, round: params),
    "rewind": (lambda: recipes.rewind(drawn()), lambda params, round: drawn()),
    "reinitialize": (
        lambda: recipes.reinitialize(drawn, jax.random.key(3)),
        lambda params, round: drawn(jax.random.fold_in(jax.random.key(3), round)),
    ),
}


@pytest.mark.parametrize("name", RESTARTS)
def test_iterative_is_the_loop_by_hand(name):
    restart, start = RESTARTS[name]
    params, train = problem()[0], trainer()
    rounds = recipes.iterative(params, train, jp.scores.magnitude, SPARSITIES, restart=restart())
    masks = None
    for i, (sparsity, got) in enumerate(zip(SPARSITIES, rounds, strict=True), 1):
        masks = jp.select(jp.scores.magnitude(params), sparsity, within=masks)
        params = train(jp.apply_masks(start(params, i), masks), masks)
        assert got.round == i and got.sparsity == sparsity
        assert equal(got.masks, masks) and equal(got.params, params)
        assert jp.metrics.sparsity(got.masks) == sparsity


@pytest.mark.parametrize("name", RESTARTS)
def test_iterative_goes_on_from_any_round(name):
    go = lambda params: recipes.iterative(
        params, trainer(), jp.scores.magnitude, SPARSITIES, restart=RESTARTS[name][0]()
    )
    whole = list(go(problem()[0]))
    for done in (1, 2, 3):
        rest = list(go(whole[done - 1]))
        assert [r.round for r in rest] == [r.round for r in whole[done:]]
        assert all(equal(a.params, b.params) for a, b in zip(rest, whole[done:], strict=True))


def test_iterative_gives_every_round_its_key():
    keys = []

    def train(params, masks, key):
        keys.append(jax.random.key_data(key).tolist())
        return params

    go = functools.partial(
        recipes.iterative, train=train, score=jp.scores.magnitude, sparsities=SPARSITIES
    )
    whole = list(go(problem()[0], key=jax.random.key(5)))
    assert len({tuple(key) for key in keys}) == 3
    list(go(whole[0], key=jax.random.key(5)))
    assert keys[3:] == keys[1:3]


def test_iterative_computes_when_asked_and_compiles_once():
    calls = []

    def train(params, masks):
        calls.append(0)
        return trainer()(params, masks)

    rounds = recipes.iterative(problem()[0], train, jp.scores.magnitude, SPARSITIES)
    assert not calls
    next(rounds)
    size = trainer()._cache_size()
    next(rounds)
    assert len(calls) == 2 and trainer()._cache_size() == size


def test_iterative_before_training_and_with_groups():
    params, loss = problem()
    (one,) = recipes.iterative(params, trainer(), jp.scores.snip(loss), [0.5])
    masks = jp.select(jp.scores.snip(loss)(params), 0.5)
    assert equal(one.masks, masks)
    assert equal(one.params, trainer()(jp.apply_masks(params, masks), masks))
    params = {"in": jnp.arange(1.0, 13).reshape(3, 4), "out": jnp.ones((4, 2))}
    groups = jp.find_groups(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((1, 3)))
    same = lambda params, masks: params
    *_, last = recipes.iterative(
        params, same, jp.scores.magnitude, [0.25, 0.5], select=groups.select
    )
    assert last.masks["in"].astype(int).tolist() == [[0, 0, 1, 1]] * 3


def test_rounds_remove_a_fraction_of_what_is_left():
    np.testing.assert_allclose(recipes.rounds(0.2, 3), [0.2, 0.36, 0.488])
    np.testing.assert_allclose(recipes.rounds(1 - (1 - 0.9) ** (1 / 4), 4)[-1], 0.9)
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        recipes.rounds(0.2, 0)
    with pytest.raises(TypeError, match="iterative: score must be a function, got dict"):
        recipes.iterative({"w": jnp.ones(3)}, lambda p, m: p, {"w": jnp.ones(3)}, [0.5])


@pytest.mark.parametrize(
    "train, restart, words",
    [
        (
            lambda p, m: (p, 0.0),
            recipes.keep,
            r"`train` must return shape \(8,\) here, got no leaf",
        ),
        (
            lambda p, m: p | {"w": p["w"].T},
            recipes.keep,
            r"^w: `train` must return shape \(6, 8\) here, got shape \(8, 6\)",
        ),
        (
            lambda p, m: p | {"v": 0.0},
            recipes.keep,
            "^v: `train` must return no leaf here, got shape",
        ),
        (
            lambda p, m: p,
            lambda p, round: {"w": p["w"]},
            r"^b: `restart` must return shape \(8,\) here, got no leaf",
        ),
        (
            lambda p, m: jax.tree.map(lambda w: w + 1, p),
            recipes.keep,
            "^w: after `train`, 24 masked weights are not zero",
        ),
    ],
)
def test_what_train_returns_is_checked(train, restart, words):
    rounds = recipes.iterative(problem()[0], train, jp.scores.magnitude, [0.5], restart=restart)
    with pytest.raises(ValueError, match=words):
        next(rounds)


@pytest.mark.parametrize(
    "sparsities, words", [([0.5, 0.5], "got 0.5 after 0.5"), ([0.5, 1.0], "got 1.0")]
)
def test_sparsities_are_checked_before_anything_runs(sparsities, words):
    with pytest.raises(ValueError, match=words):
        recipes.iterative(problem()[0], None, None, sparsities)


def test_rounds_in_a_sweep():
    params, loss = problem()
    x = jax.random.normal(jax.random.key(1), (32, 6))

    def lottery(params, sparsity, key, train):
        early = recipes.rewind(params)
        sparsities = recipes.rounds(1 - (1 - sparsity) ** (1 / 2), 2)
        *_, last = recipes.iterative(
            train(params), train, jp.scores.magnitude, sparsities, restart=early
        )
        return last.params, last.masks

    table = jp.curves.sweep(
        {"lottery": lottery},
        [0.5],
        [0],
        lambda params, masks, key: trainer()(params, masks),
        lambda params: -loss(params),
        init=lambda key: params,
        apply_fn=lambda p, x: x @ p["w"] + p["b"][None],
        inputs=[x],
    )
    row = list(table["method"]).index("lottery")
    assert table["error"][row] == "" and table["params"][row] == 24 + 8


@pytest.mark.parametrize("rate, kept, total, expected", [(0.5, 25, 100, 0.25), (0.5, 8, 8, 0.5)])
def test_dropout_rate(rate, kept, total, expected):
    assert recipes.dropout_rate(rate, kept, total) == pytest.approx(expected)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((1.5, 1, 2), r"rate must be in \[0, 1\], got 1.5"),
        ((0.5, 3, 2), r"kept must be in \[0, total=2\] .* got kept=3"),
        ((0.5, 0, 0), r"total > 0, got kept=0"),
    ],
)
def test_dropout_rate_needs_a_fraction(arguments, words):
    with pytest.raises(ValueError, match=words):
        recipes.dropout_rate(*arguments)
