"""What flows into a param: read from every form of contraction, checked by the output alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mlp, normal
from jax import lax

import jaxprune as jp
from jaxprune._program import calibrate


def conv(w, x, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def experts(w, x):
    return lax.ragged_dot(x, w, jnp.array([4, 0, 3], jnp.int32))


MASK = normal((6, 4)) > -0.5

# Each function is one contraction of a param, and returns its result: (function, shape of the
# param, shape of the input). Whatever the layout, the sum of squares of the result is tr(Wᵀ G W).
CONTRACTIONS = {
    "matmul": (lambda w, x: x @ w, (6, 4), (5, 7, 6)),
    "left operand": (lambda w, x: w @ x, (4, 6), (6, 5)),
    "transposed": (lambda w, x: x @ w.T, (4, 6), (5, 6)),
    "heads": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (6, 2, 3), (5, 7, 6)),
    "output of heads": (lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), (2, 3, 6), (5, 7, 2, 3)),
    "reshaped": (lambda w, x: x @ w.reshape(6, -1), (2, 3, 4), (5, 6)),
    "vmapped": (lambda w, x: jax.vmap(lambda x: w @ x)(x), (4, 6), (5, 6)),
    "masked": (lambda w, x: x @ jnp.where(MASK, w, 0), (6, 4), (5, 6)),
    "scaled": (lambda w, x: x @ (w * jnp.arange(1.0, 5.0)[None]), (6, 4), (5, 6)),
    "cast": (lambda w, x: x @ w.astype(jnp.float16).astype(jnp.float32), (6, 4), (5, 6)),
    "batched": (lambda w, x: jnp.einsum("gnd,gdm->gnm", x, w), (3, 6, 4), (3, 5, 6)),
    "batched last": (lambda w, x: jnp.einsum("nde,dme->nme", x, w), (6, 4, 3), (5, 6, 3)),
    "ragged": (experts, (3, 6, 4), (7, 6)),
    "convolution": (conv, (3, 3, 2, 4), (2, 5, 5, 2)),
    "strided": (lambda w, x: conv(w, x, window_strides=(2, 1)), (3, 2, 2, 4), (2, 5, 5, 2)),
    "dilated": (lambda w, x: conv(w, x, rhs_dilation=(2, 1)), (2, 2, 2, 4), (2, 5, 5, 2)),
    "transposed convolution": (
        lambda w, x: conv(w, x, lhs_dilation=(2, 2), padding=((1, 1), (1, 1))),
        (2, 2, 2, 4),
        (2, 3, 3, 2),
    ),
    "grouped": (lambda w, x: conv(w, x, feature_group_count=2), (3, 3, 2, 6), (2, 5, 5, 4)),
    "depthwise": (lambda w, x: conv(w, x, feature_group_count=4), (3, 3, 1, 8), (2, 5, 5, 4)),
    "jit": (lambda w, x: jax.jit(jnp.matmul)(x, w), (6, 4), (5, 6)),
    "remat": (lambda w, x: jax.checkpoint(jnp.matmul)(x, w), (6, 4), (5, 6)),
    "loop over time": (
        lambda w, x: lax.scan(lambda c, x: (c, x @ w), 0.0, x)[1],
        (6, 4),
        (5, 7, 6),
    ),
    "nested loops": (
        lambda w, x: lax.map(lambda x: lax.map(lambda x: x @ w, x), x),
        (6, 4),
        (5, 7, 6),
    ),
    "branch": (
        lambda w, x: lax.cond(x[0, 0] > 9, lambda w, x: x @ w * 2, lambda w, x: x @ w, w, x),
        (6, 4),
        (5, 6),
    ),
    "custom derivative": (lambda w, x: jax.nn.relu(x + 99) @ w, (6, 4), (5, 6)),
    "tied": (lambda w, x: (x @ w, (2 * x) @ w), (6, 4), (5, 6)),
    "stacked": (
        lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0.0, w)[1],
        (3, 6, 4),
        (5, 6),
    ),
    "reversed": (
        lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0.0, w, reverse=True)[1],
        (3, 6, 4),
        (5, 6),
    ),
    "cast stack": (
        lambda w, x: lax.map(lambda w: x @ w.astype(x.dtype), w.astype(jnp.float16)),
        (3, 6, 4),
        (5, 6),
    ),
    "masked stack": (
        lambda w, x: lax.map(lambda w: x @ w, jnp.where(MASK[None], w, 0) * 2),
        (3, 6, 4),
        (5, 6),
    ),
    "transposed stack": (
        lambda w, x: lax.map(lambda w: x @ w, w.transpose(1, 0, 2)),
        (6, 3, 4),
        (5, 6),
    ),
    "stacks of stacks": (
        lambda w, x: lax.map(lambda w: lax.map(lambda w: x @ w, w), w),
        (2, 3, 6, 4),
        (5, 6),
    ),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_the_gram_gives_the_size_of_the_output(name):
    fn, shape, inputs = CONTRACTIONS[name]
    w, batches = normal(shape), [normal(inputs, seed=1), normal(inputs, seed=2)]
    stats = jp.calibrate(fn, w, batches, gram=True)
    (statistics,) = stats.values()
    matrices = stats.matrices(w)[""]
    gram = jnp.einsum("...de,...dm,...em->...", statistics.gram, matrices, matrices).sum()
    outs = [leaf for batch in batches for leaf in jax.tree.leaves(fn(w, batch))]
    np.testing.assert_allclose(gram, sum(float(jnp.sum(x**2)) for x in outs), rtol=1e-4)
    sums = statistics.mean * statistics.count[..., None]
    total = jnp.einsum("...d,...dm->...", sums, matrices).sum()
    np.testing.assert_allclose(total, sum(float(jnp.sum(x)) for x in outs), rtol=1e-3, atol=1e-3)
    diagonal = jnp.sqrt(jnp.diagonal(statistics.gram, axis1=-2, axis2=-1))
    np.testing.assert_allclose(statistics.norms, diagonal, rtol=1e-5)
    assert matrices.size == w.size and not stats.skipped


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_a_pruned_matrix_is_a_pruned_param(name):
    fn, shape, inputs = CONTRACTIONS[name]
    w, batch = normal(shape), normal(inputs, seed=1)
    seen = []

    def method(weights, statistics, sparsity):
        new, mask = jp.layerwise.magnitude(weights, statistics, sparsity)
        seen.append(jnp.sum(new**2))
        return new, mask

    with jax.numpy_dtype_promotion("strict" if name != "scaled" else "standard"):
        new, mask = jp.reconstruct(fn, w, [batch], 0.5, method=method)
    assert not jnp.any(new[~mask])
    expected = w.astype(jnp.float16).astype(jnp.float32) if "cast" in name else w
    np.testing.assert_allclose(new, jnp.where(mask, expected, 0), rtol=1e-6)
    assert int(jnp.sum(mask)) == w.size // 2


def test_a_repeated_param_is_an_activation():
    def apply_fn(p, x):
        queries = jnp.broadcast_to(p["queries"][None], (len(x), 3, 6)) @ p["w"]
        return jnp.einsum("bqd,bd->bq", queries, x)

    params, x = normal({"queries": (3, 6), "w": (6, 4)}), normal((5, 4))
    stats = jp.calibrate(apply_fn, params, [x, x], gram=True)
    assert list(stats) == ["w"] and stats.skipped["queries"].startswith("read by `dot_general`")
    gram = params["queries"].T @ params["queries"]
    np.testing.assert_allclose(stats["w"].gram, 2 * 5 * gram, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_numpy():
    apply_fn, params, x = mlp()
    batches = [x, normal((3, 6), seed=7)]
    stats = jp.calibrate(apply_fn, params, iter(batches), gram=True)
    h = np.concatenate(batches).astype(np.float64)
    for i in range(3):
        h = np.tanh(h) if i else h
        path = f"layer{i}/w"
        assert float(stats[path].count) == 8
        np.testing.assert_allclose(stats[path].mean, h.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats[path].norms, np.linalg.norm(h, axis=0), rtol=1e-5)
        np.testing.assert_allclose(stats[path].gram, h.T @ h, rtol=1e-4, atol=1e-5)
        h = h @ np.asarray(params[f"layer{i}"]["w"]) + np.asarray(params[f"layer{i}"]["b"])
    assert stats.skipped == {f"layer{i}/b": "read by `add`" for i in range(3)}
    assert jp.calibrate(apply_fn, params, batches)["layer0/w"].gram is None
    assert_close(
        stats.matrices(params), {f"layer{i}/w": params[f"layer{i}"]["w"] for i in range(3)}
    )
    assert "layer0/w: shape (6,)" in repr(stats) and "layer0/b: read by" in repr(stats)


def test_alike_layers_share_programs():
    def apply_fn(params, x):
        for w in params:
            x = jax.nn.gelu(x @ w)
        return x

    x, compiled = normal((5, 8)), []
    for depth in (3, 6, 6):  # also those of another call
        jp.calibrate(apply_fn, [normal((8, 8), seed=i) for i in range(depth)], [x, x])
        compiled.append(calibrate._run._cache_size())
    assert len(set(compiled)) == 1


def test_recurrent_weights_see_every_step():
    def apply_fn(p, x):
        def step(h, x):
            return jnp.tanh(x @ p["in"] + h @ p["state"]), h

        return lax.scan(step, jnp.zeros((5, 4)), x)[1]

    params = normal({"in": (6, 4), "state": (4, 4)})
    x = normal((7, 5, 6))
    stats = jp.calibrate(apply_fn, params, [x], gram=True)
    states = np.asarray(apply_fn(params, x)).reshape(35, 4)
    np.testing.assert_allclose(stats["state"].gram, states.T @ states, rtol=1e-4, atol=1e-5)
    assert float(stats["in"].count) == 35


SKIPPED = {
    "nonlinear": (lambda w, x: x @ jnp.tanh(w), "read by `tanh`"),
    "normalized": (lambda w, x: x @ (w / jnp.linalg.norm(w)), "read by"),
    "gathered": (lambda w, x: w[jnp.argmax(x, 1)], "read by `gather`"),
    "two params": (lambda w, x: x * (w @ w)[0, :6][None], "which multiplies two params"),
    "unused": (lambda w, x: x, "not used"),
    "carried": (lambda w, x: lax.fori_loop(0, 3, lambda i, w: w * 2, w) + x[0, 0], "loop"),
    "added": (lambda w, x: x + w[:1], "read by `add`"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_param_without_a_contraction_has_a_reason(name):
    fn, why = SKIPPED[name]
    w, x = normal((6, 6)), normal((5, 6))
    stats = jp.calibrate(fn, w, [x])
    assert not stats and why in stats.skipped[""]
    with pytest.warns(UserWarning, match="reconstruct did not prune these params:"):
        new, masks = jp.reconstruct(fn, w, [x], 0.5)
    assert new is w and masks is None


def nan_at(x):
    return jnp.log(x)  # the line that is named


def test_errors():
    apply_fn, params, x = mlp()
    for run in (jp.calibrate, lambda *a: jp.reconstruct(*a, 0.5)):
        with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
            run(apply_fn, params, [])
        with pytest.raises(TypeError, match=r"batches\[0\], input 0: must be an array, got str"):
            run(apply_fn, params, ["text"])
        with pytest.raises(ValueError, match=r"batches\[1\], input 0: must hold examples, got"):
            run(apply_fn, params, [x, x[:0]])
        with pytest.raises(TypeError, match="layer0/b: params must have values, got .*Tracer"):
            jax.jit(lambda params: run(apply_fn, params, [x]))(params)  # noqa: B023
        with pytest.raises(ValueError, match=r"layer0/w: the activations .* from an input, in"):
            run(apply_fn, params, [x.at[2, 1].set(jnp.nan)])

        def broken(params, x):
            return apply_fn(params, nan_at(x))

        with pytest.raises(ValueError, match=r"layer0/w: .* from `log` at .*test_calibrate.py:\d"):
            run(broken, params, [x])

        def language(params, ids):
            return jnp.take(params["table"], ids, axis=0) @ params["head"]

        words = normal({"table": (7, 4), "head": (4, 7)})
        with pytest.raises(ValueError, match=r"table: tokens must be in \[0, 7\), got 7"):
            run(language, words, [jnp.array([1, 7])])
        with pytest.raises(ValueError, match=r"table: tokens must be in \[0, 7\), got 9"):
            run(lambda p, ids: p["table"][ids] @ p["head"], words, [jnp.array([1, 9])])
