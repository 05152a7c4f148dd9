import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import jaxprune as jp
from jaxprune.units import _taylor


class CNN(nn.Module):
    """Two convolutions, the second under batch norm; `gates` multiply what they compute."""

    @nn.compact
    def __call__(self, x, gates=None):
        g = (jnp.ones(4), jnp.ones(6)) if gates is None else gates
        x = nn.relu(nn.Conv(4, (3, 3), bias_init=nn.initializers.normal(1))(x) * g[0][None])
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(True, bias_init=nn.initializers.normal(1))(x) * g[1][None]
        return nn.Dense(3)(nn.gelu(x).reshape(len(x), -1))


def is_norm(path, leaf):
    return path.startswith("params/BatchNorm_0")


def loss(params, x, y, gates=None):
    return jnp.mean((CNN().apply(params, x, gates) - y) ** 2)


@pytest.fixture(scope="module")
def cnn():
    with jax.numpy_rank_promotion("allow"):
        keys = jax.random.split(jax.random.key(0), 3)
        x, y = jax.random.normal(keys[0], (5, 4, 4, 2)), jax.random.normal(keys[1], (5, 3))
        params = jax.jit(CNN().init)(keys[2], x)
        groups = jp.find_groups(CNN().apply, params, x)
    assert [len(group.units) for group in groups.groups] == [4, 6]
    return groups, params, (x, y)


def gate_derivatives(params, x, y):
    ones = (jnp.ones(4), jnp.ones(6))
    return np.concatenate(jax.jit(jax.grad(loss, 3))(params, x, y, ones))


@pytest.fixture
def allow():
    with jax.numpy_rank_promotion("allow"):  # of flax
        yield


SCORES = {  # a new score of units adds one row here: (groups, params, batch) -> scores
    "taylor": lambda g, p, b: jp.units.taylor(g, loss, where=is_norm)(p, *b),
    "gates": lambda g, p, b: jp.units.taylor_gates(g, loss, where=is_norm)(p, *b),
    "activation": lambda g, p, b: jp.units.activation(g, CNN().apply, "std")(p, b[0]),
    "flops": lambda g, p, b: jp.units.flops(g),
    "reduce": lambda g, p, b: jp.units.reduce(g, jp.scores.magnitude(p), normalize="l2"),
}


@pytest.mark.parametrize("name", SCORES)
def test_contract(name, cnn, allow):
    groups, params, batch = cnn
    traces = []
    score = jax.jit(lambda *a: traces.append(0) or SCORES[name](groups, *a))
    result = score(params, batch)
    score(params, batch)
    assert len(traces) == 1
    assert result.shape == (len(groups),) and result.dtype == jnp.float32
    np.testing.assert_allclose(result, SCORES[name](groups, params, batch), rtol=1e-4)
    kept = np.asarray(groups._kept(groups.select(result, 0.5, scope="layer")))
    for group in groups.groups:  # the better half of each group
        worst, best = (result[group.units[kept[group.units - 1] == keep] - 1] for keep in (0, 1))
        assert len(best) == len(worst) and worst.max() <= best.min()


@pytest.mark.parametrize("normalize", [None, "l2"])
def test_taylor_equals_gates_on_single_examples(normalize, cnn, allow):
    groups, params, (x, y) = cnn
    single = [gate_derivatives(params, x[i : i + 1], y[i : i + 1]) for i in range(5)]
    expected = np.abs(single).mean(0)
    if normalize:
        expected[:4] /= np.linalg.norm(expected[:4])
        expected[4:] /= np.linalg.norm(expected[4:])
    found = jp.units.taylor(groups, loss, where=is_norm, normalize=normalize)(params, x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_gates_after_batch_norm(cnn, allow):
    groups, params, batch = cnn
    expected = gate_derivatives(params, *batch) ** 2
    np.testing.assert_allclose(SCORES["gates"](groups, params, batch), expected, rtol=1e-4)


def test_gate_by_default_is_kernel_and_bias(cnn, allow):
    groups, params, batch = cnn
    found = jp.units.taylor_gates(groups, loss)(params, *batch)
    grads = jax.jit(jax.grad(loss))(params, *batch)
    kernel = params["params"]["Conv_1"]["kernel"] * grads["params"]["Conv_1"]["kernel"]
    np.testing.assert_allclose(found[4:], kernel.sum((0, 1, 2)) ** 2, rtol=1e-4)
    np.testing.assert_allclose(found[:4], gate_derivatives(params, *batch)[:4] ** 2, rtol=1e-4)


def test_gate_on_what_is_read():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"up": (3, 5), "shift": (1, 5), "down": (5, 2)}
    params = {n: jax.random.normal(k, shapes[n]) for k, n in zip(keys, shapes, strict=False)}
    x = jax.random.normal(keys[3], (7, 3))

    def f(p, x, gate=1.0):
        return jnp.sum(jnp.sin((jnp.tanh(x @ p["up"] + p["shift"]) * gate) @ p["down"]))

    groups = jp.find_groups(lambda p, x: jnp.tanh(x @ p["up"] + p["shift"]) @ p["down"], params, x)
    expected = jax.grad(f, 2)(params, x, jnp.ones((1, 5)))[0] ** 2
    found = jp.units.taylor_gates(groups, f, where=lambda path, w: path == "down")(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_biases_of_many_shapes():
    def producers(params, fn, x):
        groups = jp.find_groups(fn, params, x)
        made = _taylor.gates(groups, _taylor.choose(groups, None), fn, params, (x,))
        return [[path for path, _ in gate] for gate in made]

    def layers(p, x):  # a stack, as of `nn.scan`
        body = lambda x, q: (x + jnp.tanh(x @ q["in"] + q["b"][None]) @ q["out"], None)
        return jax.lax.scan(body, x, p)[0]

    x = jnp.ones((2, 5))
    stack = {"in": jnp.ones((3, 5, 4)), "b": jnp.ones((3, 4)), "out": jnp.ones((3, 4, 5))}
    assert producers(stack, layers, x) == [["in", "b"]]
    heads = {"v": jnp.ones((5, 2, 4)), "b": jnp.ones((2, 4)), "out": jnp.ones((2, 4, 5))}

    def attend(p, x):
        v = jnp.tanh(jnp.einsum("nd,dhk->nhk", x, p["v"]) + p["b"][None])
        return jnp.einsum("nhk,hkd->nd", v, p["out"])

    assert producers(heads, attend, x) == [["v", "b"]] * 2
    narrow = {"in": jnp.ones((5, 4)), "out": jnp.ones((4, 1))}
    assert producers(narrow, lambda p, x: x @ p["in"] @ p["out"], x) == [["in"]]


GATED = {  # what follows a kernel, with the gate on what its layer computes
    "bias": lambda z, p, gate: jnp.tanh(gate(z + p["b"])),
    "scale": lambda z, p, gate: gate(z) * p["g"],
    "bias and scale": lambda z, p, gate: gate(z + p["b"]) * p["g"] + p["s"],
    "norm": lambda z, p, gate: (gate(z) - p["m"]) * p["g"] * jax.lax.rsqrt(p["v"]) + p["b"],
    "constant factor": lambda z, p, gate: gate(z / 3 + p["b"]) * p["g"],
    "square": lambda z, p, gate: gate(z + p["b"]) ** 2 + p["s"],
    "activation": lambda z, p, gate: jax.nn.relu(gate(z)) + p["b"],
    "loop": lambda z, p, gate: jax.lax.fori_loop(0, 2, lambda _, h: h * p["g"], gate(z + p["b"])),
}
NAMINGS = {  # as in a flat dict, as in one module, and with a module for each leaf
    "flat": lambda p: p,
    "module": lambda p: {"layer": p},
    "modules": lambda p: {name: {"kernel": w} for name, w in p.items()},
}


@pytest.mark.parametrize("name", GATED)
def test_gates_do_not_depend_on_names(name):
    shapes = {"in": (3, 5), "out": (5, 2)} | dict.fromkeys("bgmsv", (1, 5))
    params = normal(shapes) | {"v": jnp.full((1, 5), 2.0)}
    x = normal((7, 3), seed=1)

    def f(p, x, gate=1.0):
        return GATED[name](x @ p["in"], p, lambda z: z * gate) @ p["out"]

    loss = lambda p, x, gate=1.0: jnp.sum(jnp.sin(f(p, x, gate)))
    expected = jax.grad(loss, 2)(params, x, jnp.ones((1, 5)))[0] ** 2
    flat = lambda p: dict(zip(sorted(params), jax.tree.leaves(p), strict=True))
    for nest in NAMINGS.values():
        named = nest(params)
        groups = jp.find_groups(lambda p, x: f(flat(p), x), named, x)
        assert len(groups) == 5
        found = jp.units.taylor_gates(groups, lambda p, x: loss(flat(p), x))(named, x)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


STATISTICS = {
    # of an array (example, position, unit, entry), in NumPy
    "mean": lambda a: np.abs(a).mean((0, 1, 3)),
    "std": lambda a: a.std((0, 1, 3)),
    "mean_l2": lambda a: np.linalg.norm(np.abs(a).mean((1, 3)), axis=0),
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_activation_of_a_cnn(statistic, cnn, allow):
    groups, params, (x, _) = cnn
    catch = lambda module, _: type(module) in (nn.Conv, nn.BatchNorm)
    _, state = CNN().apply(params, x, capture_intermediates=catch)
    hidden = {name: s["__call__"][0] for name, s in state["intermediates"].items()}
    read = nn.relu(hidden["Conv_0"]), nn.gelu(hidden["BatchNorm_0"])
    expected = [STATISTICS[statistic](np.asarray(a).reshape(5, 16, -1, 1)) for a in read]
    found = jp.units.activation(groups, CNN().apply, statistic)(params, x)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4)


@pytest.mark.parametrize("split, statistic", [(None, "mean_l2"), ({"v": 1}, "std")])
def test_activation_of_a_block(statistic, split):
    rng = np.random.default_rng(0)
    shapes = {"embed": (7, 6), "q": (6, 6), "k": (6, 6), "v": (6, 6), "o": (6, 6), "up": (6, 5)}
    shapes |= {"down": (5, 6), "head": (6, 7)}
    params = {name: jnp.asarray(rng.normal(size=n), "f4") for name, n in shapes.items()}

    def block(p, tokens, seen=None):
        x = p["embed"][tokens]
        q, k, v = ((x @ p[n]).reshape(*x.shape[:2], 3, 2) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + mixed.reshape(x.shape) @ p["o"]
        hidden = jax.checkpoint(jax.nn.silu)(x @ p["up"])
        y = x + hidden @ p["down"]
        return y @ p["head"] if seen is None else (p["embed"][tokens], mixed, hidden)

    tokens = jnp.asarray(rng.integers(7, size=(4, 3)))
    groups = jp.find_groups(block, params, tokens[:2], split=split)
    found = jp.units.activation(groups, block, statistic)(params, tokens)
    stream, mixed, hidden = (np.asarray(a) for a in jax.jit(block)(params, tokens, True))
    mixed = mixed.swapaxes(2, 3) if split else mixed
    read = {"embed": stream[..., None], "v": mixed, "up": hidden[..., None]}
    for path, a in read.items():
        (group,) = (g for g in groups.groups if path in {p for p, *_ in g.members[:3]} - {"q"})
        if path == "v" and split:
            assert ("v", 1, 3) in group.members
        np.testing.assert_allclose(
            found[group.units - 1], STATISTICS[statistic](a), rtol=1e-4, err_msg=path
        )


def test_activation_errors(cnn, allow):
    groups, params, (x, _) = cnn
    with pytest.raises(ValueError, match="statistic"):
        jp.units.activation(groups, CNN().apply, "median")
    largest = lambda p: jnp.sort(p["params"]["Conv_0"]["bias"])[-1]
    other = lambda p, x: CNN().apply(p, x) * largest(p)
    with pytest.raises(ValueError, match="must be those of this function"):
        jp.units.activation(groups, other)(params, x)
    stack = {"in": jnp.ones((3, 5, 4)), "out": jnp.ones((3, 4, 5))}

    def layers(p, x):
        return jax.lax.scan(lambda x, q: (jnp.tanh(x @ q["in"]) @ q["out"], None), x, p)[0]

    groups = jp.find_groups(layers, stack, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="in: the units"):
        jp.units.activation(groups, layers)(stack, jnp.ones((2, 5)))


def test_flops_equal_costs(cnn):
    groups, *_ = cnn
    kept = ~np.eye(len(groups), dtype=bool)
    total = groups.costs(np.ones(len(groups), bool), "flops")
    expected = [total - groups.costs(row, "flops") for row in kept]
    np.testing.assert_allclose(jp.units.flops(groups), expected)


def test_select_takes_one_score_per_unit(cnn):
    groups, *_ = cnn
    scores = np.array([3, 1, 2, 4, 9, 5, 6, 7, 8, 10.0])
    kept = np.asarray(groups._kept(groups.select(scores, 0.3)))
    assert set(np.flatnonzero(~kept)) == {0, 1, 2}
    kept = np.asarray(groups._kept(groups.select(scores, 0.5, scope="layer")))
    assert set(np.flatnonzero(~kept)) == {1, 2, 5, 6, 7}
    traced = jax.jit(lambda s: groups.select(s, 0.5, scope="layer"))(scores)
    np.testing.assert_array_equal(groups._kept(traced), kept)


@pytest.mark.parametrize("how", ["mean", "sum", "max", "first"])
def test_select_reduces_a_tree_of_scores(how, cnn):
    groups, params, _ = cnn
    scores = jp.scores.magnitude(params)
    units = jp.units.reduce(groups, scores, how)
    for scope in ("global", "layer"):
        direct = groups.select(scores, 0.5, scope=scope, reduce=how)
        np.testing.assert_array_equal(
            groups._kept(groups.select(units, 0.5, scope=scope)), groups._kept(direct)
        )


@pytest.mark.parametrize("normalize", ["mean", "max", "sum", "l2"])
def test_reduce_normalizes_each_group(normalize, cnn):
    groups, params, _ = cnn
    scores = jp.scores.magnitude(params)
    plain = np.asarray(jp.units.reduce(groups, scores))
    norm = {"mean": np.mean, "max": np.max, "sum": np.sum, "l2": np.linalg.norm}[normalize]
    expected = [plain[group.units - 1] / norm(plain[group.units - 1]) for group in groups.groups]
    found = jp.units.reduce(groups, scores, normalize=normalize)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6)
    np.testing.assert_array_equal(jp.units.reduce(groups, plain, normalize=normalize), found)
    zero = jp.units.reduce(groups, jax.tree.map(jnp.zeros_like, params), normalize=normalize)
    assert not zero.any()


@pytest.mark.parametrize("jit", [False, True])
def test_a_group_without_scores_is_kept_and_counts_in_no_budget(jit, cnn):
    groups, params, _ = cnn
    scores = jp.scores.magnitude(params)
    where = lambda path, s: path == "params/Conv_0/bias"

    def select(scores, sparsity):
        units = jp.units.reduce(groups, scores, where=where, normalize="max")
        return units, groups.select(units, sparsity)

    select = jax.jit(select) if jit else select
    units, masks = select(scores, 0.5)
    bias = np.abs(params["params"]["Conv_0"]["bias"])
    np.testing.assert_allclose(units, [*(bias / bias.max()), *[np.inf] * 6], rtol=1e-6)
    kept = np.asarray(groups._kept(masks))
    assert kept[4:].all() and set(np.flatnonzero(~kept[:4])) == set(np.argsort(bias)[:2])
    _, within = select(scores, 0.75)
    kept = np.asarray(groups._kept(groups.select(units, 0.25, within=within)))
    np.testing.assert_array_equal(kept, groups._kept(within))
    for scope in ("layer", {"params/Conv_0/kernel": 0.5}):
        kept = np.asarray(groups._kept(groups.select(units, 0.5, scope=scope)))
        assert kept[4:].all() and kept[:4].sum() == 2
    removed = groups.masks(np.arange(10) != 9)  # a unit of the group without scores
    kept = np.asarray(groups._kept(groups.select(units, 0.5, within=removed)))
    assert kept.sum() == 7 and not kept[9]


def test_errors(cnn, allow):
    groups, params, (x, y) = cnn
    for scores, options, message in (
        (np.ones(9), {}, r"shape \(10,\)"),
        (np.ones(10), {"reduce": "first"}, "for 'first' or where=, got one score per unit"),
        (np.full(10, np.nan), {}, "10 of 10 units"),
        (np.where(np.arange(10) == 2, np.inf, 1), {}, "1 of 10 units, first for unit 2"),
        (np.full(10, -np.inf), {}, "10 of 10 units"),
    ):
        with pytest.raises(ValueError, match=message):
            groups.select(scores, 0.5, **options)
    for how, options, message in (
        ("median", {}, "how must be one of"),
        ("mean", {"normalize": "l1"}, "normalize must be one of"),
        ("mean", {"where": lambda path, s: False}, "at least one scored leaf"),
    ):
        with pytest.raises(ValueError, match=message):
            jp.units.reduce(groups, jp.scores.magnitude(params), how, **options)
    with pytest.raises(ValueError, match="normalize"):
        jp.units.taylor(groups, loss, normalize="l1")
    with pytest.raises(ValueError, match="must choose a leaf"):
        jp.units.taylor_gates(groups, loss, where=lambda path, w: False)
    with pytest.raises(ValueError, match="must have the examples along the first axis"):
        jp.units.taylor(groups, loss)(params, x, y[:3])
    with pytest.raises(ValueError, match="params"):
        jp.units.taylor_gates(groups, loss)({"params": {"other": jnp.ones(3)}}, x, y)
