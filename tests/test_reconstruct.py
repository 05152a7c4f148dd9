"""One walk prunes any network: what it computed is what the pruned params compute."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import (
    assert_close,
    bits,
    explicit_and_slowly_auto,
    mesh,
    mlp,
    normal,
    place,
    slow_unless,
)
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _program

FAST = """
    jax_cond jax_gqa_decoder jax_mixture_of_experts jax_scan_decoder jax_while_loop linen_lenet
    nnx_vit
""".split()


def smallest(weights, statistics, sparsity):
    """A method that compiles nothing."""
    count = round(sparsity * weights.size)
    order = np.argsort(np.abs(np.asarray(weights)), None, stable=True)
    mask = np.ones(weights.size, bool)
    mask[order[:count]] = False
    mask = mask.reshape(weights.shape)
    return jnp.asarray(np.where(mask, weights, 0)), jnp.asarray(mask)


smallest.gram = False


def reconstruct(monkeypatch, *args, **options):
    """Also returns the walk, and what is said of leaves that were not pruned."""
    walks, walk = [], _program.Walk

    def kept(*args):
        walks.append(walk(*args))
        return walks[-1]

    monkeypatch.setattr(_program, "Walk", kept)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        params, masks = jp.reconstruct(*args, **options)
    monkeypatch.undo()
    return params, masks, walks[0], "\n".join(str(w.message) for w in said)


@pytest.mark.parametrize("name", slow_unless(FAST, list(zoo.NETWORKS)))
def test_a_network_is_what_the_walk_computed(name, monkeypatch):
    net = zoo.NETWORKS[name]()
    params, masks, walk, said = reconstruct(
        monkeypatch, net.fn, net.params, [net.inputs], 0.5, method=smallest
    )
    named = jp._tree.named_entries(masks)
    assert any(mask is not None for mask in named.values())
    for (path, leaf), (_, old) in zip(
        jp._tree.named_leaves(params), jp._tree.named_leaves(net.params), strict=True
    ):
        mask = named[path]
        assert leaf.shape == old.shape and leaf.dtype == old.dtype
        if mask is None:
            assert leaf is old
            reported = f"\n  {path}: " in said or path in walk.reasons() or path == ""
            assert not jp._tree.is_floating(leaf) or leaf.ndim < 2 or reported
        else:
            assert not jnp.any(leaf[~mask])
    outputs = jax.tree.leaves(jax.jit(net.fn)(params, *net.inputs))
    assert_close(walk.outputs()[0], outputs, 2e-2 if "bfloat16" in name else 1e-5)
    total = sum(int(w.size) for w in jax.tree.leaves(masks))
    pruned = total - sum(int(w.sum()) for w in jax.tree.leaves(masks))
    assert abs(pruned / total - 0.5) < 0.01


def decoder():
    """Two ways to run four layers, and the params of both."""

    def layer(x, w):
        return x + jnp.tanh(x @ w["up"] + w["bias"][None]) @ w["down"]

    def scanned(p, x):
        return lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, p)[0]

    def unrolled(p, x):
        for w in p:
            x = layer(x, w)
        return x

    stack = normal({"up": (4, 8, 16), "bias": (4, 16), "down": (4, 16, 8)})
    stack = jax.tree.map(lambda w: w / 4, stack)
    return scanned, stack, unrolled, [jax.tree.map(lambda w, i=i: w[i], stack) for i in range(4)]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_scanned_is_unrolled(method):
    scanned, stack, unrolled, layers = decoder()
    batches = [normal((32, 8), seed=i) for i in range(2)]
    method = getattr(jp.layerwise, method)
    params, masks = jp.reconstruct(scanned, stack, batches, 0.5, method=method)
    others, other_masks = jp.reconstruct(unrolled, layers, batches, 0.5, method=method)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *others)
    for name in ("up", "down"):
        assert bool(jnp.all(masks[name] == jnp.stack([m[name] for m in other_masks])))
    assert_close(params, stacked, 1e-5)
    assert masks["bias"] is None


def test_statistics_are_those_of_the_pruned_weights_upstream():
    scanned, stack, _, _ = decoder()
    batches, grams = [normal((32, 8), seed=i) for i in range(3)], []

    def method(weights, statistics, sparsity):
        grams.append(statistics.gram)
        return jp.layerwise.sparsegpt(weights, statistics, sparsity)

    params, _ = jp.reconstruct(scanned, stack, batches, 0.5, method=method)
    after = jp.calibrate(scanned, params, batches, gram=True)
    for i in range(4):
        assert_close(grams[2 * i], after["up"].gram[i], 1e-5)
        assert_close(grams[2 * i + 1], after["down"].gram[i], 1e-5)
    dense = jp.calibrate(scanned, stack, batches, gram=True)
    assert jnp.max(jnp.abs(dense["down"].gram - after["down"].gram)) > 1


def test_activations_on_the_host_change_nothing():
    scanned, stack, _, _ = decoder()
    batches = [normal((32, 8), seed=i) for i in range(2)]
    method = jp.layerwise.wanda
    results = [
        jp.reconstruct(scanned, stack, batches, 0.5, method=method, host=host)
        for host in (False, True)
    ]
    assert bits(results[0]) == bits(results[1])


SPECS = {
    AxisType.Auto: {"up": P(None, "x", "y"), "bias": P(), "down": P(None, "y", "x")},
    AxisType.Explicit: {"up": P(), "bias": P(), "down": P()},  # the others are an error of users
}


@explicit_and_slowly_auto
def test_any_mesh_gives_the_same(kind):
    scanned, stack, _, _ = decoder()
    batch, on = normal((32, 8)), mesh(kind, x=4, y=2)
    one = jp.calibrate(scanned, stack, [batch], gram=True)
    expected = jp.reconstruct(scanned, stack, [batch], 0.5)
    params, batch = place(stack, on, SPECS[kind]), place(batch, on, P("x"))
    with jax.set_mesh(on):
        stats = jp.calibrate(scanned, params, [batch], gram=True)
        new, masks = jp.reconstruct(scanned, params, [batch], 0.5)
    assert_close(dict(stats), dict(one), 1e-5)
    assert_close(new, expected[0], 1e-5)
    for name in ("up", "down"):
        assert bool(np.all(np.asarray(masks[name]) == np.asarray(expected[1][name])))
        for leaf in (new[name], masks[name]):
            assert leaf.sharding.is_equivalent_to(params[name].sharding, 3)


def test_only_live_activations_are_held():
    def apply_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    params, batches = [normal((8, 8), seed=i) for i in range(5)], [normal((16, 8))] * 3
    walk = _program.Walk(apply_fn, params, (batches[0],))
    walk.start(params, [(x,) for x in batches])
    for weight in walk.weights:
        walk.advance(weight.at)
        assert sum(isinstance(x, list) for x in walk.env.values()) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_walk_goes_on_to_the_same_bits(tmp_path, dtype):
    scanned, stack, _, _ = decoder()
    stack, batches = jax.tree.map(lambda w: w.astype(dtype), stack), [normal((32, 8), dtype)]
    expected = jp.reconstruct(scanned, stack, batches, 0.5)
    calls, folder = [], tmp_path / "run"

    def sparsegpt(weights, statistics, sparsity):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return jp.layerwise.sparsegpt(weights, statistics, sparsity)

    with pytest.raises(KeyboardInterrupt):
        jp.reconstruct(scanned, stack, batches, 0.5, method=sparsegpt, checkpoint=folder)
    result = jp.reconstruct(scanned, stack, batches, 0.5, method=sparsegpt, checkpoint=folder)
    assert len(calls) == 6 + 3 and bits(result) == bits(expected)
    with pytest.raises(ValueError, match="must be an empty folder or that of the same run"):
        jp.reconstruct(scanned, stack, batches, 0.6, method=sparsegpt, checkpoint=folder)
    for other in ({"pattern": jp.patterns.block((2, 2))}, {"pattern": jp.patterns.block((4, 2))}):
        with pytest.raises(ValueError, match="another method or pattern"):
            jp.reconstruct(
                scanned, stack, batches, 0.5, method=sparsegpt, checkpoint=folder, **other
            )


def test_a_scope_alone_leaves_other_params():
    apply_fn, params, x = mlp()
    _, masks = jp.reconstruct(apply_fn, params, [x], scope={"layer1/w": 0.5})
    assert masks["layer0"]["w"] is None and int(masks["layer1"]["w"].sum()) == 48
    _, others = jp.reconstruct(apply_fn, params, [x], 0.5, scope={"layer0/w": 0, "layer0/b": 0})
    assert others["layer0"]["w"] is None and int(others["layer1"]["w"].sum()) == 48


def test_a_fused_param_is_pruned_in_parts():
    def apply_fn(p, x):
        query, key = jnp.split(p["fused"], 2, axis=1)
        return jnp.tanh(x @ query) * (jnp.sin(x) @ key) @ p["out"]

    params, x = normal({"fused": (8, 12), "out": (6, 3)}), normal((32, 8))
    new, masks = jp.reconstruct(apply_fn, params, [x], 0.5)
    halves = [int(m.sum()) for m in jnp.split(masks["fused"], 2, axis=1)]
    assert halves == [24, 24] and not jnp.any(new["fused"][~masks["fused"]])
    stats = jp.calibrate(apply_fn, params, [x])
    assert sorted(stats) == ["fused", "fused (2)", "out"]
    assert sorted(jp.layerwise.owl(stats, params, 0.5)) == ["fused", "out"]


def test_a_tied_param_is_pruned_where_it_is_reached_first():
    def apply_fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    params, x = normal({"w": (8, 6)}), normal((32, 8))
    stats = jp.calibrate(apply_fn, params, [x])
    np.testing.assert_allclose(stats["w"].norms, jnp.linalg.norm(x, axis=0), rtol=1e-5)
    new, masks = jp.reconstruct(apply_fn, params, [x], 0.5, method=jp.layerwise.wanda)
    expected, _ = jp.layerwise.wanda(params["w"], stats["w"], 0.5)
    assert_close(new["w"], expected, 1e-6)


def test_totals_are_exact_over_small_groups():
    def apply_fn(w, x):
        return jnp.einsum("gnd,gdm->gnm", x, w)

    w, x = normal((5, 3, 1)), normal((5, 16, 3))
    for sparsity, kept in ((0.5, 7), (0.9, 1)):  # of 15; some groups lose all of their weights
        for method in (jp.layerwise.wanda, jp.layerwise.sparsegpt, jp.layerwise.alps):
            _, mask = jp.reconstruct(apply_fn, w, [x], sparsity, method=method)
            assert int(mask.sum()) == kept


def test_experts_without_rows_are_pruned_by_magnitude():
    def apply_fn(w, x):
        return lax.ragged_dot(x, w, jnp.array([16, 0, 16], jnp.int32))

    w, x = normal((3, 8, 6)), normal((32, 8))
    new, mask = jp.reconstruct(apply_fn, w, [x], 0.5)
    assert bool(jnp.all(new[1] == jnp.where(mask[1], w[1], 0))) and int(mask[1].sum()) == 24
    assert jnp.any(new[0] != jnp.where(mask[0], w[0], 0))


@pytest.mark.parametrize(
    "pattern", [jp.patterns.n_of_m(2, 4), jp.patterns.block((4, 2)), jp.patterns.per_output]
)
def test_patterns_hold_for_every_layer(pattern):
    scanned, stack, _, _ = decoder()
    sparsity = None if pattern.share else 0.5
    new, masks = jp.reconstruct(scanned, stack, [normal((32, 8))], sparsity, pattern=pattern)
    for name in ("up", "down"):
        for mask in masks[name]:
            again = jp.select(mask.astype(jnp.float32), 0.5, pattern=pattern)
            assert bool(jnp.all(mask == again))
            assert int(mask.sum()) == mask.size // 2


def test_sparsegpt_beats_masks_alone():
    apply_fn, params, _ = mlp((16, 32, 32, 4))
    x = normal((256, 16)) @ normal((16, 16), seed=3)
    dense = apply_fn(params, x)

    def error(method):
        new, _ = jp.reconstruct(apply_fn, params, [x], 0.5, method=method)
        return float(jnp.mean((apply_fn(new, x) - dense) ** 2))

    by_name = {n: error(getattr(jp.layerwise, n)) for n in ("alps", "sparsegpt", "wanda")}
    assert by_name["alps"] < by_name["sparsegpt"] < by_name["wanda"]


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_alps_is_not_worse_than_sparsegpt(name):
    net = zoo.NETWORKS[name]()
    errors = []

    def both(weights, statistics, sparsity):
        h = np.asarray(statistics.gram, np.float64)
        for method in (jp.layerwise.alps, jp.layerwise.sparsegpt):
            change = np.asarray(method(weights, statistics, sparsity)[0] - weights, np.float64)
            errors.append(np.sum(change * (h @ change)))
        return weights, jnp.ones(weights.shape, bool)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jp.reconstruct(net.fn, net.params, [net.inputs], 0.5, method=both)
    errors = np.reshape(errors, (-1, 2))
    errors = errors[errors.max(1) > 1e-6]
    assert not len(errors) or np.mean(errors[:, 0]) <= np.mean(errors[:, 1]) * 1.001


def test_errors():
    apply_fn, params, x = mlp()
    wanda = jp.layerwise.wanda
    with pytest.raises(ValueError, match=r"batches\[1\]: must have the shapes .*\(3, 6"):
        jp.reconstruct(apply_fn, params, [x, x[:3]], 0.5)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        jp.reconstruct(apply_fn, params, [x], 1.0)
    with pytest.raises(ValueError, match="sparsity must be a number in"):
        jp.reconstruct(apply_fn, params, [x])
    with pytest.raises(ValueError, match=r"layer0/b: a path of `scope` must be .*read by `add`"):
        jp.reconstruct(apply_fn, params, [x], 0.5, scope={"layer0/b": 0.5})
    with pytest.raises(ValueError, match=r"layer0/w: sparsity must be in \[0, 1\), got 2"):
        jp.reconstruct(apply_fn, params, [x], 0.5, scope={"layer0/w": 2.0})
    with pytest.raises(ValueError, match="layer0/w: axis -2 must be divisible by 4 for 2:4"):
        jp.reconstruct(apply_fn, params, [x], pattern=jp.patterns.n_of_m(2, 4), method=wanda)
    with pytest.raises(TypeError, match="method must be a function, got str"):
        jp.reconstruct(apply_fn, params, [x], 0.5, method="wanda")
    with pytest.raises(TypeError, match="layer0/w: the method must return weights and a"):
        jp.reconstruct(apply_fn, params, [x], 0.5, method=lambda w, s, f: (w.T, w.T > 0))
    with pytest.raises(TypeError, match=r"layer0/w: the method must return .*got <class"):
        jp.reconstruct(apply_fn, params, [x], 0.5, method=lambda w, s, f: w)
    with pytest.raises(ValueError, match="layer0/w: the method must return finite weights"):
        jp.reconstruct(apply_fn, params, [x], 0.5, method=lambda w, s, f: (w / 0, w > 0))
    with pytest.raises(ValueError, match="up: scope must hold a number, or one for each layer"):
        scanned, stack, _, _ = decoder()
        scope = {"up": np.ones(3) / 2}
        jp.reconstruct(lambda p, x: scanned(p, x), stack, [normal((4, 8))], scope=scope)
