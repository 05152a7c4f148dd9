import concurrent.futures
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import python, slow_unless

import jaxprune as jp
from jaxprune import curves
from jaxprune.curves import _settings, _table

SPARSITIES = [0.5, 0.75]


def init(key):
    first, second = jax.random.split(key)
    return {"in": jax.random.normal(first, (6, 16)), "out": jax.random.normal(second, (16, 3))}


def apply_fn(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = apply_fn(init(jax.random.key(99)), X)


def loss(params, x, y):
    return jnp.mean((apply_fn(params, x) - y) ** 2)


@jax.jit
def train(params, masks, key):
    tx = jp.enforce(optax.adam(1e-2), masks)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, X, Y), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=20)[0][0]


def evaluate(params):
    return -loss(params, X, Y)


sweep = functools.partial(curves.sweep, evaluate=evaluate, init=init, apply_fn=apply_fn, inputs=[X])


def neurons(params, sparsity, key, train):
    params = train(params)
    groups = jp.find_groups(apply_fn, params, X)
    return params, groups.select(jp.scores.magnitude(params), sparsity)


def rewound(params, sparsity, key, train):
    trained = train(params)
    return params, jp.select(jp.scores.magnitude(trained), sparsity)


METHODS = {
    "SNIP": curves.method(jp.scores.snip(loss), X, Y, trained=False),
    "neurons": neurons,
    "rewound": rewound,
}


def test_every_point_is_measured():
    table = sweep(METHODS, SPARSITIES, range(2), train=train)
    assert {len(column) for column in table.values()} == {2 * (1 + 5 * 2)}
    assert not table["error"].any()
    assert all(np.isfinite(v).all() for v in table.values() if v.dtype == float)
    dense = table["method"] == "dense"
    assert (table["compression"][dense] == 1).all() and (table["before"][dense] < 0).all()
    for name in ("random", "magnitude", "SNIP", "rewound"):
        rows = table["method"] == name
        np.testing.assert_allclose(table["compression"][rows], [2, 4, 2, 4])
        np.testing.assert_allclose(table["theoretical_speedup"][rows], [2, 4, 2, 4])
        # kept weights, and a bit for each of 144; fewer where a neuron happens to be masked whole
        kept = np.array([72, 36, 72, 36]) * 4
        assert (table["stored_bytes"][rows] > kept).all()
        assert (table["stored_bytes"][rows] <= kept + 18).all()
    rows = table["method"] == "neurons"
    assert table["stored_bytes"][rows].tolist() == [72 * 4, 36 * 4] * 2  # really smaller
    assert (table["trainings"] == 2).all()


def test_slices_that_cannot_be_removed_are_timed_masked():
    def outputs(params, sparsity, key, train):
        masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
        return params, masks | {"out": masks["out"].at[:, 0].set(False)}

    table = sweep({"outputs": outputs}, [0.5], [0], train=train)
    row = table["method"].tolist().index("outputs")
    assert table["error"][row] == "" and table["measured_speedup"][row] > 0
    assert table["stored_bytes"][row] == 4 * 96 + 4 * 32 + 6  # kept weights, and a bit for each


def test_another_error_of_shrink_is_reported(monkeypatch):
    def broken(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr(curves._point, "shrink", broken)
    with pytest.raises(ValueError, match="broken"):
        sweep({}, [0.5], [0], train=train)


def test_points_of_a_seed_share_what_is_random():
    one, two = (sweep({"again": curves._magnitude}, [0.5], [3], train=train) for _ in range(2))
    for name in ("before", "after"):
        assert one[name].tolist() == two[name].tolist()
        assert one[name][2] == one[name][3]  # magnitude and the same under another name


def test_control_is_the_dense_network_trained_as_long():
    table = sweep({}, [0.5], [0], train=train)
    keys = jax.random.split(jax.random.key(0), 4)
    params = init(keys[0])
    full = jp.select(jp.scores.magnitude(params), 0.0)
    once = train(params, full, keys[1])
    assert table["before"][0] == float(evaluate(once))
    assert table["after"][0] == float(evaluate(train(once, full, keys[3])))


@pytest.mark.parametrize("suffix", slow_unless({".csv"}, [".csv", ".json"]))
def test_a_finished_point_is_not_run_again(tmp_path, suffix):
    store = tmp_path / "new" / f"points{suffix}"
    log = tmp_path / "log"  # not a list, which would be another setting when it has grown

    def logged(params, sparsity, key, train):
        with log.open("a") as file:
            print(sparsity, file=file)
        if log.read_text() == "0.5\n0.75\n":
            raise KeyboardInterrupt
        return rewound(params, sparsity, key, train)

    with pytest.raises(KeyboardInterrupt):
        sweep({"logged": logged}, SPARSITIES, [0], train=train, store=store)
    assert len(curves.load(store)["method"]) == 6
    resumed = sweep({"logged": logged}, SPARSITIES, [0], train=train, store=store)
    assert log.read_text().split() == ["0.5", "0.75", "0.75"]
    whole = sweep({"logged": rewound}, SPARSITIES, [0], train=train)
    for name in ("method", "sparsity", "before", "after", "compression", "flops"):
        assert resumed[name].tolist() == whole[name].tolist()
    assert [p.name for p in store.parent.iterdir()] == [store.name]


def test_a_failed_point_is_marked_and_run_again(tmp_path, capsys):
    store = tmp_path / "points.csv"
    malformed = {
        "malformed": lambda params, sparsity, key, train: (params, {"in": None, "or": None}),
        "numbers": lambda p, s, key, train: (p, jax.tree.map(jnp.ones_like, p)),
        "nothing": lambda params, sparsity, key, train: None,
        "sometimes": lambda params, s, key, train: (
            1 / 0 if s == 0.5 else rewound(params, s, key, train)
        ),
    }
    table = sweep(malformed, SPARSITIES, [0], train=train, store=store)
    failed = table["error"] != ""
    assert failed.sum() == 7
    assert np.isnan(table["after"][failed]).all()
    assert np.isfinite(table["after"][~failed]).all()
    assert "malformed at sparsity 0.75, seed 0: out: masks have no entry" in capsys.readouterr().err
    assert table["error"][table["method"] == "numbers"][0].startswith("TypeError: in: masks must")
    assert "failed" in str(curves.summary(table))
    mended = dict.fromkeys(malformed, rewound)
    with pytest.raises(ValueError, match="got another method for 'sometimes' at sparsity 0.75"):
        sweep(mended, SPARSITIES, [0], train=train, store=store)
    del mended["sometimes"]
    again = sweep(mended, SPARSITIES, [0], train=train, store=store)
    assert not again["error"].any()


def test_training_that_lets_pruned_weights_come_back_is_an_error():
    def forgetful(params, masks, key):
        return train(params, jax.tree.map(jnp.ones_like, masks), key)

    table = sweep({}, [0.5], [0], train=forgetful)
    assert table["error"][1].startswith("ValueError: in: after `train`")


def test_trainer_trains_under_masks_and_compiles_once():
    traces = []

    def traced(params, x, y):
        traces.append(0)
        return loss(params, x, y)

    train = curves.trainer(traced, optax.adam(1e-2), X, Y, steps=30, batch_size=8)
    params = init(jax.random.key(0))
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    for i in range(2):
        tuned = train(jp.apply_masks(params, masks), masks, jax.random.key(i))
    assert len(traces) == 1
    assert loss(tuned, X, Y) < loss(jp.apply_masks(params, masks), X, Y)
    assert jax.tree.all(jax.tree.map(lambda w, m: not (w[~m] != 0).any(), tuned, masks))
    with pytest.raises(ValueError, match="one length"):
        curves.trainer(loss, optax.adam(1e-2), X, Y[:3], steps=1)


def test_the_control_must_not_fail():
    def broken(params, masks, key):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        sweep({}, [0.5], [0], train=broken)


@pytest.mark.parametrize(
    "methods, sparsities, seeds, match",
    [
        ({"dense": neurons}, [0.5], [0], "must not be named 'dense'"),
        ({"a": 3}, [0.5], [0], "method 'a' must be callable"),
        ({}, [1.0], [0], r"sparsity must be in \[0, 1\)"),
        ({}, [0.5], [], "seeds must be distinct and at least one"),
        ({}, [0.5], [1, 1], r"got \[1, 1\]"),
    ],
)
def test_bad_arguments(methods, sparsities, seeds, match):
    with pytest.raises((ValueError, TypeError), match=match):
        sweep(methods, sparsities, seeds, train=train)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_corrupt_and_foreign_files(tmp_path, suffix):
    path = tmp_path / f"points{suffix}"
    table = sweep({}, [0.5], [0], train=train, store=path)
    loaded = curves.load(path)
    assert all(loaded[name].tolist() == table[name].tolist() for name in table)
    text = path.read_text()
    for wrong in (text[: len(text) // 2], "a,b\n1,2\n", "", "{}", "[1", text.replace("0.5", "x")):
        path.write_text(wrong)
        with pytest.raises(
            ValueError, match="points.*must be a table with the columns method, .* got a truncated"
        ):
            sweep({}, [0.5], [0], train=train, store=path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a table with the columns"):
        curves.load(path)
    with pytest.raises(ValueError, match=r"suffix must be \.csv or \.json, got '\.txt'"):
        curves.load(tmp_path / "points.txt")


def settings(rate=1e-2, steps=2, scale=1.0, data=X, first=16, shift=0.0, batch=32, keep=0.0):
    """Returns the arguments of a sweep, read by what is in closures, defaults and partials."""
    config = {"scale": scale}
    network = (lambda p, x: apply_fn(p, x) + shift) if shift > 1 else apply_fn

    def objective(params, x):
        return config["scale"] * jnp.mean(apply_fn(params, x) ** 2)

    def start(key, width=first):
        params = init(key)
        return {"in": params["in"][:, :width], "out": params["out"][:width]}

    def prune(params, sparsity, key, train, power=1):
        return params, jp.select(jp.scores.magnitude(params, power), max(sparsity, keep))

    return {
        "train": curves.trainer(objective, optax.adam(rate), data, steps=steps, batch_size=4),
        "evaluate": functools.partial(lambda shift, params: shift - loss(params, X, Y), shift),
        "init": start,
        "apply_fn": jax.jit(network),
        "inputs": [X[:batch]],
        "methods": {"mine": prune},
    }


OTHER = {  # a change of the settings, and the arguments that it changes
    "the learning rate": ({"rate": 1.0}, ["train"]),
    "the number of steps": ({"steps": 3}, ["train"]),
    "a number in a dict": ({"scale": 2.0}, ["train"]),
    "the data": ({"data": X + 1}, ["train"]),
    "a default": ({"first": 8}, ["init"]),
    "a partial": ({"shift": 1.0}, ["evaluate"]),
    "the network": ({"shift": 2.0}, ["evaluate", "apply_fn"]),  # and what is added
    "the inputs": ({"batch": 16}, ["inputs"]),
    "a method": ({"keep": 0.25}, ["method"]),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_store_holds_points_of_one_setting(tmp_path, name):
    change, expected = OTHER[name]
    path = tmp_path / "points.csv"
    run = lambda s, **more: curves.sweep(sparsities=s, seeds=[0], store=path, **settings(**more))
    if name == "the learning rate":
        table, again = run([0.5]), run([0.5])
        assert all(again[column].tolist() == table[column].tolist() for column in table)
    else:  # without the training of all points
        texts = [by_method(**settings(**more)) for more in ({}, change)]
        assert _settings.differing(texts[0], texts[1]) == expected
        row = {"method": "mine", "sparsity": 0.5, "seed": 0, "error": "", "settings": texts[0]}
        _table.add(row, path)
    with pytest.raises(ValueError, match=f"got another {', '.join(expected)} for '"):
        run([0.5, 0.75], **change)


def by_method(methods, inputs, **shared):
    shared["inputs"] = tuple(inputs)
    return _settings.by_method(shared, methods)["mine"]


def test_settings_are_those_of_another_process():
    code = """
import sys; sys.path.append({folder!r})
import test_curves
print(test_curves.by_method(**test_curves.settings()))
"""
    code = code.format(folder=str(pathlib.Path(__file__).parent))
    printed = {python("-c", code, PYTHONHASHSEED=seed).strip() for seed in "12"}
    assert printed == {by_method(**settings())}


def test_processes_share_a_store(tmp_path):
    code = """
import sys
from jaxprune.curves import _table
for i in range(20):
    point = {"method": sys.argv[1], "sparsity": i / 20, "seed": i, "error": "", "settings": ""}
    _table.add(point, sys.argv[2])
"""
    path = tmp_path / "points.csv"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: python("-c", code, name, str(path)), "abc"))
    table = curves.load(path)
    points = zip(table["method"].tolist(), table["seed"].tolist(), strict=True)
    assert sorted(points) == [(name, i) for name in "abc" for i in range(20)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_quality_of_nan_is_a_failed_point(when, tmp_path):
    def tuned(params, masks, key):  # by its last training, a pruned network has no number
        ruined = when == "after" and float(jp.metrics.sparsity(masks)) > 0
        return jax.tree.map(lambda w: jnp.where(w == 0, 0, jnp.nan), params) if ruined else params

    def broken(params, sparsity, key, train):
        bad = when == "before" and sparsity > 0
        masks = jp.select(jp.scores.magnitude(params), sparsity)
        return jax.tree.map(lambda w: w * jnp.nan, params) if bad else params, masks

    path = tmp_path / "points.json"
    table = sweep({"broken": broken}, [0.5], [0], train=tuned, store=path)
    assert f"got NaN {when} the last training" in table["error"][-1]
    assert not table["error"][0] and "failed" in str(curves.summary(curves.load(path)))


def test_over_seeds():
    table = sweep({}, [0.5], range(3), train=train)
    mean = curves.over_seeds(table)
    after = table["after"][table["method"] == "random"]
    dense = table["after"][table["method"] == "dense"]
    row = mean["method"].tolist().index("random")
    np.testing.assert_allclose(mean["after"][row], after.mean())
    np.testing.assert_allclose(mean["after_std"][row], after.std(ddof=1))
    np.testing.assert_allclose(mean["change"][row], (after - dense).mean())
    assert mean["seeds"].tolist() == [3, 3, 3]


def descend(objective, trained, steps=10):
    """Trains whatever tree an objective takes, by Adam."""
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trained, state):
        updates, state = tx.update(jax.grad(objective)(trained), state)
        return optax.apply_updates(trained, updates), state

    state = tx.init(trained)
    for _ in range(steps):
        trained, state = step(trained, state)
    return trained


def moved(params, sparsity, key, train):
    def objective(both):
        params, scores = both
        return loss(jp.movement.apply(params, scores, jp.select(scores, sparsity)), X, Y)

    params, scores = descend(objective, (params, jax.tree.map(jnp.zeros_like, params)))
    return params, jp.select(scores, sparsity)


def gated(params, sparsity, key, train):
    def objective(both):
        params, log_alpha = both
        gates = jp.gates.sample(log_alpha, key)
        gated = jax.tree.map(jnp.multiply, params, gates)
        return loss(gated, X, Y) + 1e-3 * jp.gates.penalty(log_alpha)

    params, log_alpha = descend(objective, (params, jax.tree.map(jnp.zeros_like, params)))
    return params, jp.select(log_alpha, sparsity)


def penalized(link):
    def prune(params, sparsity, key, train):
        tx = optax.chain(link(params, sparsity), optax.sgd(1e-2))
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(params, X, Y), state, params)
            params = optax.apply_updates(params, updates)
        return params, units(params).select(jp.scores.magnitude(params), sparsity)

    return prune


def units(params):
    return jp.find_groups(apply_fn, params, X)


def scored(score):
    """Makes a method of a score of units, ``score(groups)(params)``."""
    return lambda params, s, key, train: (
        params,
        units(params).select(score(units(params))(params), s),
    )


def rounds(params, sparsity, key, train):
    steps = jp.recipes.iterative(
        params, lambda p, m: train(p, m), jp.scores.magnitude, [sparsity / 2, sparsity]
    )
    *_, last = steps
    return last.params, last.masks


EVERY_METHOD = {  # a new criterion adds one row here
    **{
        name: curves.method(getattr(jp.scores, name), trained=False)
        for name in ("lamp", "fpgm", "standardized_magnitude")
    },
    **{
        name: curves.method(getattr(jp.scores, name)(loss), X, Y, trained=False)
        for name in ("gradient", "taylor", "snip", "grasp", "fisher", "woodfisher")
    },
    "synflow": lambda p, s, key, train: (
        p,
        jp.select_iteratively(
            jp.scores.synflow(lambda p, x: x @ p["in"] @ p["out"]), p, s, X, rounds=3
        ),
    ),
    "obd": curves.method(jp.scores.obd(loss), X, Y),
    "obd_hutchinson": lambda p, s, key, train: (
        p,
        jp.select(jp.scores.obd_hutchinson(loss, 2)(p, key, X, Y), s),
    ),
    "slimming": penalized(lambda p, s: jp.regularizers.slimming(1e-3, where=lambda path, w: True)),
    "group_lasso": penalized(lambda p, s: jp.regularizers.group_lasso(units(p), 1e-3)),
    "growing": penalized(
        lambda p, s: jp.regularizers.growing(
            units(p).select(jp.scores.magnitude(p), s), 1e-3, every=1
        )
    ),
    "movement": moved,
    "gates": gated,
    "units.taylor": scored(lambda g: lambda p: jp.units.taylor(g, loss)(p, X, Y)),
    "units.taylor_gates": scored(lambda g: lambda p: jp.units.taylor_gates(g, loss)(p, X, Y)),
    "units.activation": scored(lambda g: lambda p: jp.units.activation(g, apply_fn)(p, X)),
    "oracle": scored(lambda g: lambda p: jp.search.oracle(g, loss)(p, X, Y)),
    "particle_filter": lambda p, s, key, train: (
        p,
        jp.search.particle_filter(units(p), loss, p, s, key, X, Y, particles=8, rounds=2).masks,
    ),
    "iterative": rounds,
    "rewound": rewound,
    **{
        name: curves.method(
            jp.scores.magnitude, select=functools.partial(jp.select, pattern=pattern)
        )
        for name, pattern in {
            "n_of_m": jp.patterns.n_of_m(None, 4, pad=True),
            "block": jp.patterns.block((2, 3)),
            "axis": jp.patterns.axis(-1),
        }.items()
    },
}


def check_methods(methods):
    table = sweep(methods, [0.5], [0], train)
    failed = {m: e for m, e in zip(table["method"], table["error"], strict=True) if e}
    assert not failed
    assert set(table["method"]) == {*methods, "random", "magnitude", curves.DENSE}
    pruned = table["method"] != curves.DENSE
    assert (table["compression"][pruned] > 1.2).all()


def test_trained_scores_and_rounds_take_part():
    check_methods({name: EVERY_METHOD[name] for name in ("movement", "gates", "iterative")})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:obd")
def test_every_criterion_and_recipe_takes_part():
    check_methods(EVERY_METHOD)
