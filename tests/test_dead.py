import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal

import jaxprune as jp
from jaxprune.recipes import remove_dead


def mlp(activation):
    def apply_fn(p, x):
        for i in range(3):
            x = x @ p[f"w{i}"] + p[f"b{i}"][None]
            x = activation(x) if i < 2 else x
        return x

    return apply_fn


def dead_by_hand(params, masks, stays):
    """Gives masks and dead neurons by following connections in NumPy, neuron by neuron."""
    w = [np.asarray(masks[f"w{i}"]).copy() for i in range(3)]
    b = [np.asarray(params[f"b{i}"] != 0).copy() for i in range(3)]
    gone = [np.zeros(len(b[i]), bool) for i in range(2)]
    changed = True
    while changed:
        changed = False
        for i in range(2):
            for j in range(len(b[i])):
                no_input = not stays and not w[i][:, j].any() and not b[i][j]
                if not gone[i][j] and (no_input or not w[i + 1][j].any()):
                    w[i][:, j], w[i + 1][j], gone[i][j], changed = False, False, True, True
    return w, gone


@pytest.mark.parametrize(
    "activation", [jax.nn.relu6, pytest.param(jax.nn.sigmoid, marks=pytest.mark.slow)]
)
def test_matches_a_walk_over_neurons(activation):
    random, sizes = np.random.default_rng(3), (5, 12, 12, 4)
    params, masks = {}, {}
    for i, shape in enumerate(zip(sizes, sizes[1:], strict=False)):
        bias = random.normal(size=shape[1]) * random.integers(0, 2, shape[1])
        params |= {f"w{i}": random.normal(size=shape), f"b{i}": bias}
        masks |= {f"w{i}": jnp.array(random.random(shape) < 0.15), f"b{i}": None}
    params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)
    x = jax.random.normal(jax.random.key(0), (16, 5))
    apply_fn = mlp(activation)
    found = remove_dead(apply_fn, params, masks, x)
    weights, gone = dead_by_hand(params, masks, activation is jax.nn.sigmoid)
    assert sum(map(np.sum, gone)) > 3
    for i in range(3):
        np.testing.assert_array_equal(found[f"w{i}"], weights[i])
    for i in range(2):
        np.testing.assert_array_equal(found[f"b{i}"], ~gone[i])
    before, after = (apply_fn(jp.apply_masks(params, m), x) for m in (masks, found))
    np.testing.assert_array_equal(before, after)
    if activation is jax.nn.relu6:
        _, small, _ = jp.shrink(apply_fn, params, found, x)
        assert [small[f"b{i}"].size for i in range(2)] == [(~g).sum() for g in gone]


def norms(p, x):
    """A block with batch norm, a residual, layer norm and a softmax; inputs that are shifted."""
    x = jax.nn.relu((x @ p["a"] - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"])
    x = x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return jax.nn.softmax(x @ p["head"]), p["step"] + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_networks_with_norms_a_residual_and_a_softmax():
    shapes = {"a": (4, 6), "up": (6, 8), "down": (8, 6), "head": (6, 5)}
    keys = jax.random.split(jax.random.key(0), 4)
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    params |= {n: jnp.ones((1, 6)) for n in ("mean", "var", "scale")}
    params |= {"bias": jnp.ones((1, 8)), "step": jnp.int32(3), "key": jax.random.key(0)}
    masks = jp.select(jp.scores.magnitude(params), 0.0, where=lambda p, s: p in shapes)
    masks["down"] = masks["down"].at[3].set(False)  # neuron 3 has no outputs
    masks["up"] = masks["up"].at[:, 5].set(False)  # neuron 5 has no inputs, but a bias
    found = remove_dead(norms, params, masks, jnp.ones((3, 4)))
    expected = masks | {"up": masks["up"].at[:, 3].set(False)}
    expected["bias"] = jnp.ones((1, 8), bool).at[0, 3].set(False)
    assert equal(found, expected)


def test_notices_a_change():
    params = {"in": jnp.ones((2, 2)), "out": jnp.ones((2, 1))}
    masks = {"in": jnp.ones((2, 2), bool), "out": None}

    def apply_fn(p, x):
        return jnp.concatenate([jnp.sign(x @ p["in"][:, :1]), x @ p["in"][:, 1:]], 1) @ p["out"]

    with pytest.raises(ValueError, match="apply_fn must return the same output"):
        remove_dead(apply_fn, params, masks, jnp.ones((1, 2)))


def test_follows_what_the_network_closes_over():
    params = {"in": jnp.ones((2, 2)), "out": jnp.ones((2, 1))}
    masks = {"in": jnp.ones((2, 2), bool), "out": jnp.ones((2, 1), bool)}
    gate = {"open": jnp.array([1.0, 1.0])}
    apply_fn = lambda p, x: (jax.nn.relu(x @ p["in"]) * gate["open"][None]) @ p["out"]
    assert remove_dead(apply_fn, params, masks, jnp.ones((1, 2)))["in"].all()
    gate["open"] = jnp.array([1.0, 0.0])
    assert remove_dead(apply_fn, params, masks, jnp.ones((1, 2)))["in"][0].tolist() == [True, False]


def test_strict_settings():
    params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
    masks = {"in": jnp.ones((2, 3), bool), "out": jnp.ones((3, 1), bool).at[1].set(False)}
    apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        alive = remove_dead(apply_fn, params, masks, jnp.ones((1, 2)))
    assert alive["in"].any(0).tolist() == [True, False, True]
