import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits, mlp

import jaxprune as jp


def problem(dtype="float32"):
    apply_fn, params, x = mlp((4, 6, 5, 2))
    params, x = jax.tree.map(lambda w: w.astype(dtype), (params, x))
    return params, lambda p: jnp.mean((apply_fn(p, x) - 1) ** 2)


def numpy_movement(params, x, y, sparsities, rate):
    """Trains a linear network and its scores by plain gradient descent."""
    w, s, x, y = (np.asarray(a, np.float64) for a in (params, np.zeros_like(params), x, y))
    for sparsity in sparsities:
        kept = np.ones(w.size, bool)
        kept[np.argsort(s, None)[: round(sparsity * w.size)]] = False
        kept = kept.reshape(w.shape)
        g = 2 * x.T @ (x @ (w * kept) - y) / y.size
        w, s = w - rate * g * kept, s - rate * g * w
    return w, s, kept


def test_movement_equals_numpy():
    x = jax.random.normal(jax.random.key(1), (8, 4))
    y = x @ jax.random.normal(jax.random.key(2), (4, 3))
    w = jax.random.normal(jax.random.key(3), (4, 3))
    sparsities = [0.0, 0.25, 0.5, 0.5, 0.75, 0.75]
    trained, tx = (w, jnp.zeros((4, 3))), optax.sgd(0.3)
    state, traces, before = tx.init(trained), [], None

    def sparse_loss(trained, masks):
        traces.append(0)
        return jnp.mean((x @ jp.movement.apply(*trained, masks) - y) ** 2)

    @jax.jit
    def step(trained, state, sparsity):
        masks = jp.select(trained[1], sparsity)
        updates, state = tx.update(jax.grad(sparse_loss)(trained, masks), state)
        return optax.apply_updates(trained, updates), state, masks

    came_back = False
    for sparsity in sparsities:
        trained, state, masks = step(trained, state, sparsity)
        came_back |= before is not None and bool((masks & ~before).any())
        before = masks
    expected = numpy_movement(w, x, y, sparsities, 0.3)
    for got, want in zip((*trained, masks), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert came_back and len(traces) == 1


def test_movement_keeps_dtypes_and_leaves_without_masks():
    params, loss = problem("bfloat16")
    scores = jax.tree.map(lambda w: jnp.zeros(w.shape), params)
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    assert masks["layer0"]["b"] is None
    sparse = lambda p, s: loss(jp.movement.apply(p, s, masks))
    for_params, for_scores = jax.jit(jax.grad(sparse, (0, 1)))(params, scores)
    plain = jax.jit(jax.grad(loss))(jp.apply_masks(params, masks))
    assert bits(for_params) == bits(jp.apply_masks(plain, masks))
    moved = np.float32(plain["layer0"]["w"]) * np.float32(params["layer0"]["w"])
    np.testing.assert_allclose(for_scores["layer0"]["w"], moved, rtol=1e-6)
    assert for_scores["layer0"]["w"].dtype == "float32"
    assert not for_scores["layer0"]["b"].any()
    with pytest.raises(ValueError, match="layer0/w: scores must be given where there is a mask"):
        jp.movement.apply(params, scores | {"layer0": {"w": None, "b": None}}, masks)


def test_soft_movement_has_a_threshold_and_a_penalty():
    scores = {"w": jnp.array([[-3.0, -2.0, 0.0]]), "b": None}
    masks = jp.movement.masks(scores, 0.1)
    assert masks["w"].tolist() == [[False, True, True]] and masks["b"] is None
    expected = (1 / (1 + np.exp([3.0, 2.0, 0.0]))).sum()
    np.testing.assert_allclose(jp.movement.penalty(scores), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\), got 1.5"):
        jp.movement.masks(scores, 1.5)


def test_gradual_takes_scores_that_are_accumulated():
    params, loss = problem()
    tx = jp.gradual(optax.sgd(0.1), lambda p, scores: scores, jp.schedules.linear(0.5, 0, 4))
    state, scores = tx.init(params), jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, state, scores):
        grads = jax.grad(loss)(params)
        scores = jax.tree.map(lambda s, w, g: s - 0.1 * w * g, scores, params, grads)
        updates, state = tx.update(grads, state, params, batch=(scores,))
        return optax.apply_updates(params, updates), state, scores

    for _ in range(6):
        params, state, scores = step(params, state, scores)
    assert jp.metrics.sparsity(jp.get_masks(state)) == 0.5
