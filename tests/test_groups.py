import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def mlp(widths=(6, 8, 12, 4), seed=0):
    """A plain network and its params, with an input."""
    rng = np.random.default_rng(seed)
    params = {
        f"layer{i}": {
            "w": rng.normal(size=(a, b)).astype("f4"),
            "b": rng.normal(size=b).astype("f4"),
        }
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    }

    def fn(params, x):
        for i in range(len(params)):
            x = jnp.tanh(x) if i else x
            x = x @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"][None]
        return x

    return fn, jax.tree.map(jnp.asarray, params), jnp.asarray(rng.normal(size=(5, widths[0])), "f4")


def kept(masks, path="layer0/b"):
    return np.asarray(dict(jp._tree.named_leaves(masks))[path])


def test_members_and_pins():
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    assert len(groups) == 20
    assert [g.members for g in groups.groups] == [
        (("layer0/w", 1, 1), ("layer0/b", 0, 1), ("layer1/w", 0, 1)),
        (("layer1/w", 1, 1), ("layer1/b", 0, 1), ("layer2/w", 0, 1)),
    ]
    assert [(path, axis, why) for path, axis, _, why in groups.pinned] == [
        ("layer0/w", 0, ("an input",)),
        ("layer2/b", 0, ("an output",)),
        ("layer2/w", 1, ("an output",)),
    ]


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
def test_scores_of_units_by_numpy(reduce):
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    scores = jp.scores.magnitude(params)
    w = jax.tree.map(lambda a: np.abs(np.asarray(a)), params)
    slices = np.stack([w["layer0"]["w"].sum(0), w["layer1"]["w"].sum(1)])
    unit = {"mean": slices.mean(0), "sum": slices.sum(0), "max": slices.max(0), "first": slices[0]}
    masks = groups.select(scores, scope={"layer0/w": 0.5}, reduce=reduce)
    assert set(np.flatnonzero(kept(masks))) == set(np.argsort(unit[reduce])[4:])
    assert kept(masks, "layer1/b").all()
    units = jp.units.reduce(groups, scores, where=lambda path, s: True)
    everything = groups.select(units, scope={"layer0/w": 0.5})
    slices = np.stack([*slices, w["layer0"]["b"]])
    assert set(np.flatnonzero(kept(everything))) == set(np.argsort(slices.mean(0))[4:])


def test_li_2016_filters_by_l1_norm():
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, lambda x: x.reshape(2, -1), nn.Dense(3)])
    x = jnp.ones((2, 4, 4, 1))
    params = model.init(jax.random.key(0), x)
    groups = jp.find_groups(model.apply, params, x)
    masks = groups.select(jp.scores.magnitude(params), 0.25, reduce="first")
    norms = np.abs(np.asarray(params["params"]["layers_0"]["kernel"])).sum((0, 1, 2))
    gone = np.flatnonzero(~kept(masks, "params/layers_0/bias"))
    assert set(gone) == set(np.argsort(norms)[:2])
    dense = kept(masks, "params/layers_3/kernel").all(1).reshape(16, 8)
    assert not dense[:, gone].any() and dense.sum() == 16 * 6  # H·W inputs leave with a channel


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.77])
def test_exact_count_of_units(sparsity):
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    scores = jp.scores.magnitude(params)
    masks = groups.select(scores, sparsity)
    gone = sum((~kept(masks, f"layer{i}/b")).sum() for i in (0, 1))
    assert gone == round(sparsity * 20)
    for i, size in ((0, 8), (1, 12)):
        masks = groups.select(scores, sparsity, scope="layer")
        assert (~kept(masks, f"layer{i}/b")).sum() == round(sparsity * size)


def test_never_empties_a_group():
    fn, params, x = mlp()
    params["layer0"]["w"] = params["layer0"]["w"] * 1e-6
    params["layer1"]["w"] = params["layer1"]["w"] * 1e-3
    groups = jp.find_groups(fn, params, x)
    masks = groups.select(jp.scores.magnitude(params), 0.9, reduce="first")
    assert kept(masks).sum() == 1 and kept(masks, "layer1/b").sum() == 1


def test_equal_scores_leave_evenly():
    fn, params, x = mlp((4, 100, 100, 100, 4))
    groups = jp.find_groups(fn, params, x)
    units = jp.units.reduce(groups, jax.tree.map(jnp.ones_like, params), "max", normalize="max")
    masks = groups.select(units, 0.5)
    for i in range(3):
        assert 35 <= kept(masks, f"layer{i}/b").sum() <= 65


@pytest.mark.parametrize("cost", ["params", "flops"])
def test_cost_is_that_of_the_shrunk_network(cost):
    fn, params, x = mlp((6, 30, 40, 4))
    groups = jp.find_groups(fn, params, x)
    masks = groups.select(jp.scores.magnitude(params), 0.6, cost=cost)
    small_fn, small, _ = jp.shrink(fn, params, masks, x)

    def measure(fn, params):
        if cost == "flops":
            return jp.metrics.flops(fn, params, x)
        return sum(w.size for w in jax.tree.leaves(params))

    left = measure(small_fn, small) / measure(fn, params)
    assert 0.36 < left <= 0.4
    everything = np.ones(len(groups), bool)
    assert groups.costs(everything, cost) == measure(fn, params)


def test_a_cost_out_of_reach():
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    with pytest.raises(ValueError, match="sparsity must be at most .* of the params"):
        groups.select(jp.scores.magnitude(params), 0.99, cost="params")


def test_round_to_says_so():
    fn, params, x = mlp((6, 24, 10, 5, 4))
    groups = jp.find_groups(fn, params, x)
    with pytest.warns(UserWarning, match="layer0/w 11 -> 8, layer1/w 4 -> 8, layer2/w 2 -> 5"):
        masks = groups.select(jp.scores.magnitude(params), 0.55, scope="layer", round_to=8)
    assert [kept(masks, f"layer{i}/b").sum() for i in range(3)] == [8, 8, 5]


def test_isomorphic_compares_layers_of_one_kind():
    fn, params, x = mlp((4, 20, 20, 4))
    params["layer1"]["w"] = params["layer1"]["w"] * 100
    groups = jp.find_groups(fn, params, x)
    scores = jp.scores.magnitude(params)
    alike = groups.select(scores, 0.5, scope="isomorphic", reduce="first")
    together = groups.select(scores, 0.5, reduce="first")
    for i in (0, 1):
        assert (kept(alike, f"layer{i}/b") == kept(together, f"layer{i}/b")).all()


def test_select_jits_and_takes_within():
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    scores = jp.scores.magnitude(params)
    jitted = jax.jit(lambda scores, s: groups.select(scores, s))
    half = jitted(scores, 0.5)
    assert all(
        map(np.array_equal, jax.tree.leaves(half), jax.tree.leaves(groups.select(scores, 0.5)))
    )
    further = groups.select(scores, 0.75, within=half)
    assert not (kept(further) & ~kept(half)).any()
    assert sum(kept(further, f"layer{i}/b").sum() for i in (0, 1)) == 5


def test_units_leave_gradually_inside_an_optimizer():
    import optax

    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    tx = jp.gradual(
        optax.adam(1e-2), jp.scores.magnitude, jp.schedules.linear(0.5, 0, 4), select=groups.select
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(fn(p, x) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        params, state = step(params, state)
    masks = jp.get_masks(state)
    small_fn, small, plan = jp.shrink(fn, params, masks, x)
    assert sum(w.size for w in jax.tree.leaves(small)) < sum(
        w.size for w in jax.tree.leaves(params)
    )
    np.testing.assert_allclose(small_fn(small, x), fn(params, x), rtol=1e-4, atol=1e-5)


def heads(p, x):
    q, k, v = (((x @ p[n]).reshape(*x.shape[:2], 4, 6)) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), -1)
    return jnp.einsum("bhts,bshd->bthd", a, v).reshape(*x.shape[:2], 24) @ p["o"]


def attention():
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(8, 24)) / 3, "f4") for n in "qkv"}
    params["o"] = jnp.asarray(rng.normal(size=(24, 8)), "f4")
    return params, jnp.asarray(rng.normal(size=(2, 5, 8)), "f4")


def test_split_chooses_heads_or_head_dims():
    params, x = attention()
    dims = jp.find_groups(heads, params, x)
    assert [len(g.units) for g in dims.groups] == [6, 6]  # of q and k, of v and o
    assert "split={'q': 0} would cut it along factor 0 (4 units)" in str(dims)
    by_head = jp.find_groups(heads, params, x, split={"q": 0})
    assert [len(g.units) for g in by_head.groups] == [4]
    for groups in (dims, by_head):
        masks = groups.select(jp.scores.magnitude(params), 0.5, scope="layer")
        small_fn, small, plan = jp.shrink(heads, params, masks, x, groups=groups)
        assert small["q"].shape == (8, 12) and plan.inexact == ()
        masked = heads(jp.apply_masks(params, masks), x)
        np.testing.assert_allclose(small_fn(small, x), masked, rtol=1e-4, atol=1e-5)


def test_masks_alone_tell_how_a_merged_axis_was_split():
    params, x = attention()
    masks = jp.find_groups(heads, params, x, split={"q": 0}).select(
        jp.scores.magnitude(params), 0.5
    )
    small_fn, small, _ = jp.shrink(heads, params, masks, x)
    assert small["q"].shape == (8, 12)


@pytest.mark.parametrize(
    "split, message",
    [
        ({"w": 0}, "w: split must name leaves of the params"),
        ({"q": 7}, "split must name leaves with ambiguous axes"),
    ],
)
def test_bad_split(split, message):
    params, x = attention()
    with pytest.raises(ValueError, match=message):
        jp.find_groups(heads, params, x, split=split)
    fn, params, x = mlp()
    with pytest.raises(ValueError, match="ambiguous axes, got .*. Ambiguous are: none"):
        jp.find_groups(fn, params, x, split={"layer0/w": 0})


def test_an_unknown_primitive_pins_and_is_reported():
    def fn(p, x):
        return jax.lax.linalg.hessenberg(x @ p["a"])[0] @ p["b"]

    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 3))}
    groups = jp.find_groups(fn, params, jnp.ones((6, 4)))
    assert len(groups) == 0 and "no rule for `hessenberg`" in str(groups)
    with pytest.raises(ValueError, match="groups must have at least one unit"):
        groups.select(jp.scores.magnitude(params), 0.5)


def test_each_reason_holds_the_params_that_only_it_and_others_pin():
    fn, params, x = mlp()
    assert jp.find_groups(fn, params, x).held == {"an output": 4}  # the last bias

    def sorted_features(params, x):
        return jnp.sort(x @ params["layer0"]["w"], -1) @ jnp.ones((8, 2))

    groups = jp.find_groups(sorted_features, {"layer0": params["layer0"]}, x)
    why = "ordered by `sort`"
    assert groups.held == {why: 6 * 8, "an input": 6 * 8, "not used": 8}
    assert "85.7%  ordered by `sort`" in str(groups)


def test_unused_params_stay():
    fn, params, x = mlp()
    expected = [group.members for group in jp.find_groups(fn, params, x).groups]
    params = {**params, "unused": jnp.ones((3, 3))}
    groups = jp.find_groups(lambda p, x: fn({k: p[k] for k in p if k != "unused"}, x), params, x)
    assert ("unused", 0, 3, ("not used",)) in groups.pinned
    assert [group.members for group in groups.groups] == expected
    assert groups.masks(np.zeros(len(groups), bool))["unused"] is None


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sparsity": 1.0}, ValueError, r"in \[0, 1\)"),
        ({"sparsity": None}, ValueError, "sparsity must be a number"),
        ({"sparsity": 0.5, "scope": "leaf"}, ValueError, "scope must be"),
        ({"scope": {"layer9/w": 0.5}}, ValueError, "must be in a group, got 'layer9/w'"),
        ({"sparsity": 0.5, "reduce": "median"}, ValueError, "reduce must be one of"),
        ({"sparsity": 0.5, "normalize": "l1"}, TypeError, "unexpected keyword .*'normalize'"),
        ({"sparsity": 0.5, "cost": "bytes"}, ValueError, "cost must be one of"),
        ({"sparsity": 0.5, "round_to": 0}, ValueError, "round_to must be"),
        ({"sparsity": 0.5, "where": lambda path, s: False}, TypeError, "unexpected keyword"),
    ],
)
def test_bad_select(options, error, message):
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    with pytest.raises(error, match=message):
        groups.select(jp.scores.magnitude(params), **options)


def test_bad_scores():
    fn, params, x = mlp()
    groups = jp.find_groups(fn, params, x)
    scores = jp.scores.magnitude(params)
    with pytest.raises(ValueError, match="layer1/w: scores have shape"):
        groups.select({**scores, "layer1": {**scores["layer1"], "w": jnp.ones((3, 3))}}, 0.5)
    with pytest.raises(ValueError, match="layer1/w: scores must be finite"):
        bad = scores["layer1"]["w"].at[0, 0].set(jnp.nan)
        groups.select({**scores, "layer1": {**scores["layer1"], "w": bad}}, 0.5)


def test_nothing_to_remove_is_said():
    fn, params, x = mlp((6, 2, 2, 4))
    groups = jp.find_groups(fn, params, x)
    with pytest.warns(UserWarning, match="removed no unit at a sparsity of 0.1"):
        groups.select(jp.scores.magnitude(params), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups.select(jp.scores.magnitude(params), 0.0)


def test_inputs_must_be_arrays():
    fn, params, x = mlp()
    with pytest.raises(TypeError, match="must be an array or its shape, got str"):
        jp.find_groups(fn, params, "x")
    with pytest.raises(TypeError, match="layer0: params must hold arrays"):
        jp.find_groups(fn, {"layer0": "w"}, x)


def test_shapes_alone_are_enough():
    fn, params, x = mlp()
    shapes = jax.eval_shape(lambda: (params, x))
    assert str(jp.find_groups(fn, *shapes)) == str(jp.find_groups(fn, params, x))
