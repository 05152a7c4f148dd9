import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import compilations, slow_unless

import jaxprune as jp
from jaxprune.search import _oracle, _particle_filter


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"]


def loss(p, x, y):
    return jnp.mean((network(p, x) - y) ** 2)


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"a": (4, 6), "b": (1, 6), "c": (6, 4), "d": (4, 2)}
    params = {n: jax.random.normal(k, shapes[n]) for k, n in zip(keys, shapes, strict=False)}
    x = jax.random.normal(keys[4], (16, 4))
    return jp.find_groups(network, params, x), params, (x, 0.3 * network(params, x))


def error_without(groups, params, batch, kept):
    return float(loss(jp.apply_masks(params, groups.masks(np.asarray(kept))), *batch))


@pytest.mark.parametrize("absolute, memory", [(False, 2e3), (True, 1e9)])
def test_oracle_equals_a_loop(absolute, memory, problem):
    groups, params, batch = problem
    rows = ~np.eye(10, dtype=bool)
    change = [
        error_without(groups, params, batch, row) - float(loss(params, *batch)) for row in rows
    ]
    score = jp.search.oracle(groups, loss, absolute=absolute, memory=memory)
    found = score(params, *batch)
    expected = np.abs(change) if absolute else change
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.dtype == jnp.float32
    assert min(change) < 0  # so that the two differ


def by_masks(groups, loss, params, *batch):
    """The change of the loss by the masks of each unit alone."""
    kept = ~np.eye(len(groups), dtype=bool)
    measure = jax.jit(lambda k: loss(jp.apply_masks(params, groups.masks(k)), *batch))
    return np.array([measure(k) for k in kept]) - measure(np.ones(len(groups), bool))


ORACLES = {  # a network: whether its units are exact, and the memory in bytes
    "linen_resnet_basic": (True, 0),  # batch norm, and a stream through all layers
    "linen_lenet": (True, 1e5),  # biases, and a flatten
    "jax_gqa_decoder": (True, 0),  # heads
    "linen_squeeze_excitation": (True, 0),  # sigmoid is not zero at zero
    "linen_lstm": (True, 0),
    "jax_cond": (True, 1e6),
    "linen_mixer": (False, 0),  # what changes the result beyond its masks
}


@pytest.mark.parametrize("name", slow_unless({"linen_lenet", "jax_cond", "linen_mixer"}, ORACLES))
def test_oracle_equals_masks(name):
    exact, memory = ORACLES[name]
    with jax.numpy_rank_promotion("allow"):  # of flax
        net = zoo.NETWORKS[name]()
        groups = jp.find_groups(net.fn, net.params, *net.inputs, exact=exact)

        def loss(params, *inputs):
            outs = jax.tree.leaves(net.fn(params, *inputs))
            return sum(jnp.mean(jnp.sin(1.0 + jnp.arange(x.size)) * x.reshape(-1)) for x in outs)

        expected = by_masks(groups, loss, net.params, *net.inputs)
        found = jp.search.oracle(groups, loss, memory=memory)(net.params, *net.inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_oracle_of_a_loss_that_unites_units(problem):
    groups, params, batch = problem
    united = lambda p, x, y: loss(p, x, y) + jnp.sum(p["b"] * p["b"][:, ::-1] * p["a"][:1])
    found = jp.search.oracle(groups, united)(params, *batch)
    expected = by_masks(groups, united, params, *batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_oracle_starts_where_units_meet(problem):
    groups, params, batch = problem
    program = jax.make_jaxpr(lambda p, *b: _oracle._scores(loss, groups, False, 0, None, p, *b))
    text = str(program(params, *batch))
    # The dense network, each first layer without its units, then the layers after it, in a loop.
    assert text.count("dot_general[") == 3 + (1 + 2) + (1 + 1)


@pytest.mark.optimized
def test_oracle_keeps_to_its_memory():
    params = {"in": jnp.ones((4, 64)), "out": jnp.ones((64, 32))}
    batch = jnp.ones((16, 4)), jnp.ones((16, 32))
    fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]
    loss = lambda p, x, y: jnp.mean((fn(p, x) - y) ** 2)
    groups = jp.find_groups(fn, params, batch[0])

    def temporary(memory):
        score = jax.jit(jp.search.oracle(groups, loss, memory=memory))
        return score.lower(params, *batch).compile().memory_analysis().temp_size_in_bytes

    single, few, every = (temporary(memory) for memory in (0, 1e5, 1e9))
    assert single < few < 2e5 < every


@pytest.mark.parametrize("memory", [0, 1e9])
def test_oracle_shows_progress(memory, problem, monkeypatch, capsys):
    groups, params, batch = problem
    score = jp.search.oracle(groups, loss, memory=memory)
    found = []
    for seen, shown in ((False, ""), (True, "10/10")):
        monkeypatch.setattr(_oracle._progress, "seen", lambda seen=seen: seen)
        found.append(score(params, *batch))
        text = capsys.readouterr().err
        assert shown in text and bool(text) == seen
    np.testing.assert_array_equal(*found)


def test_oracle_without_units(problem):
    _, params, (x, y) = problem
    groups = jp.find_groups(lambda p, x: x @ p["a"], params, x)
    assert jp.search.oracle(groups, loss)(params, x, y).shape == (0,)


@pytest.mark.parametrize("seen", [False, True])
def test_oracle_compiles_once(seen, problem, monkeypatch):
    groups, params, batch = problem
    monkeypatch.setattr(_oracle._progress, "seen", lambda: seen)
    score = lambda: jp.search.oracle(groups, lambda *a: loss(*a))(params, *batch)
    score()
    with compilations() as compiled:
        score()
    assert not compiled


def search(problem, seed=0, **options):
    groups, params, batch = problem
    options = {"particles": 32, "rounds": 6} | options
    return jp.search.particle_filter(
        groups, loss, params, 0.5, jax.random.key(seed), *batch, **options
    )


@pytest.mark.slow
def test_particles_beat_random_masks():
    worth = np.random.default_rng(0).permutation(24) + 1.0
    params = {"in": jnp.eye(24), "out": jnp.asarray(worth, jnp.float32)[:, None]}
    x = jnp.ones((1, 24))
    fn = lambda p, x: x @ p["in"] @ p["out"]
    groups = jp.find_groups(fn, params, x)
    error = lambda p, x: 1 - jnp.mean(fn(p, x)) / worth.sum()
    found = jp.search.particle_filter(
        groups, error, params, 0.5, jax.random.key(0), x, rounds=12, batch_size=64
    )
    rng = np.random.default_rng(1)
    random = [1 - rng.choice(worth, 12, replace=False).sum() / worth.sum() for _ in range(12 * 64)]
    lowest = 1 - np.sort(worth)[12:].sum() / worth.sum()
    best = 1 - worth[np.asarray(groups._kept(found.masks))].sum() / worth.sum()
    assert found.errors.shape == (12, 64)
    np.testing.assert_allclose(best, found.errors.min(), rtol=1e-5)
    assert (np.diff(found.errors.min(1)) <= 0).all()  # the best particle is never lost
    assert best - lowest < 0.2 * (min(random) - lowest)
    np.testing.assert_allclose(found.scores.sum(), 12, rtol=1e-5)
    assert np.corrcoef(found.scores, worth)[0, 1] > 0.7


def test_every_particle_keeps_an_exact_number(problem):
    groups, params, batch = problem
    for sparsity, gone in ((0.0, 0), (0.3, 3), (0.5, 5), (0.8, 8), (0.99, 8)):
        wishes = jax.random.uniform(jax.random.key(0), (32, 10))
        kept = _particle_filter._repair(groups, wishes, sparsity)
        state = _particle_filter._State(kept, kept[0], jnp.float32(jnp.inf))
        for i in range(3):
            assert (10 - np.asarray(state.kept).sum(1) == gone).all()
            assert state.kept[:, :6].any(1).all() and state.kept[:, 6:].any(1).all()
            numbers = (sparsity, 1.0, 0.3)
            state, *_ = _particle_filter._round(
                loss, groups, 8, state, jax.random.key(i), numbers, params, *batch
            )
            error = error_without(groups, params, batch, state.best)
            np.testing.assert_allclose(state.least, error, rtol=1e-5)


def test_rounds_and_sparsities_are_one_compiled_program(problem):
    groups, params, batch = problem
    for sparsity in (0.5, 0.3):
        with compilations() as compiled:
            jp.search.particle_filter(
                groups, lambda *a: loss(*a), params, sparsity, jax.random.key(0), *batch, rounds=3
            )
    assert not compiled


def test_same_key_same_result(problem):
    first, second, other = (search(problem, seed, rounds=2) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.errors, second.errors)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert (first.errors != other.errors).any()


def test_particles_without_an_error_lose(problem):
    groups, params, batch = problem
    broken = lambda p, *b: jnp.where((p["b"] != 0)[0, 0], jnp.nan, loss(p, *b))
    found = jp.search.particle_filter(
        groups, broken, params, 0.5, jax.random.key(0), *batch, particles=32, rounds=2
    )
    assert not groups._kept(found.masks)[0] and found.scores[0] == 0
    assert jnp.isfinite(found.scores).all()


def test_a_method_of_curves(problem):
    groups, params, batch = problem

    def prune(params, sparsity, key, train):
        params = train(params)
        found = jp.search.particle_filter(
            groups, loss, params, sparsity, key, *batch, particles=4, rounds=1
        )
        return params, found.masks

    _, masks = prune(params, 0.5, jax.random.key(0), lambda p: p)
    assert int(groups._kept(masks).sum()) == 5
    ablate = jp.curves.method(jp.search.oracle(groups, loss), *batch, select=groups.select)
    _, masks = ablate(params, 0.5, jax.random.key(0), lambda p: p)
    assert int(groups._kept(masks).sum()) == 5


def test_errors(problem):
    groups, params, batch = problem
    for options, message in (
        ({"particles": 0}, "particles"),
        ({"rounds": 0}, "rounds"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": 0}, "temperature"),
        ({"mutation": 2}, "mutation"),
    ):
        with pytest.raises(ValueError, match=message):
            search(problem, **options)
    with pytest.raises(ValueError, match="sparsity"):
        jp.search.particle_filter(groups, loss, params, 1.0, jax.random.key(0), *batch)
    with pytest.raises(ValueError, match="memory"):
        jp.search.oracle(groups, loss, memory=-1)
    with pytest.raises(TypeError, match="search.oracle: the loss"):
        jp.search.oracle(groups, lambda p, x, y: network(p, x))(params, *batch)
    with pytest.raises(TypeError, match="particle_filter: the loss must return one number"):
        jp.search.particle_filter(
            groups, lambda p, x, y: network(p, x), params, 0.5, jax.random.key(0), *batch
        )
    with pytest.raises(ValueError, match="params"):
        jp.search.oracle(groups, loss)({"a": params["a"]}, *batch)
    with pytest.raises(ValueError, match="loss must be finite"):
        search((groups, params, (batch[0], batch[1] * jnp.nan)), rounds=1)
    bare = jp.find_groups(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="groups must have at least one unit"):
        jp.search.particle_filter(bare, loss, jnp.ones((2, 3)), 0.5, jax.random.key(0))
