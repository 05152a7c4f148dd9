import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp


def test_gates_equal_closed_forms():
    a = np.linspace(-6, 6, 25, dtype=np.float32)
    sigmoid = lambda t: 1 / (1 + np.exp(-np.float64(t)))
    mean = np.clip(sigmoid(a) * 1.2 - 0.1, 0, 1)
    np.testing.assert_allclose(jp.gates.mean(jnp.array(a)), mean, atol=1e-6)
    assert jp.gates.masks(jnp.array(a)).tolist() == (mean > 0).tolist()
    is_open = sigmoid(a - 2 / 3 * np.log(0.1 / 1.1))
    np.testing.assert_allclose(jp.gates.penalty({"a": jnp.array(a)}), is_open.sum(), rtol=1e-6)
    slope = jax.grad(jp.gates.penalty)(jnp.array(a))
    np.testing.assert_allclose(slope, is_open * (1 - is_open), atol=1e-6)


def test_sampled_gates_have_the_distribution():
    n, a = 20000, jnp.array([-3.0, -1.0, 0.0, 2.0])
    z = np.asarray(jp.gates.sample(jnp.tile(a, (n, 1)), jax.random.key(0)))
    error = 4 * 0.5 / np.sqrt(n)
    probabilities = jax.vmap(jp.gates.penalty)(a)
    np.testing.assert_allclose((z != 0).mean(0), probabilities, atol=error)
    for limit in (0.2, 0.5, 1.0):
        logit = np.log((limit + 0.1) / (1.1 - limit))
        below = 1 / (1 + np.exp(a - 2 / 3 * logit))
        np.testing.assert_allclose((z < limit).mean(0), below, atol=error)


def test_gates_of_a_tree():
    log_alpha = {"w": jnp.zeros((3, 2), "bfloat16"), "v": jnp.zeros((3, 2)), "b": None}
    gates = jp.gates.sample(log_alpha, jax.random.key(0))
    assert gates["b"] is None and gates["w"].dtype == "bfloat16" and gates["v"].dtype == "float32"
    assert not np.allclose(np.float32(gates["w"]), gates["v"], atol=0.1)
    slope = jax.grad(lambda a: jp.gates.sample(a, jax.random.key(0))["v"].sum())(log_alpha)
    inside = (gates["v"] > 0) & (gates["v"] < 1)
    assert bool(((slope["v"] > 0) == inside).all()) and inside.any()


def test_gates_close_on_what_the_loss_does_not_need():
    x = jax.random.normal(jax.random.key(0), (64, 6))
    w = jnp.array([3.0, -2.0, 1.5, 0.0, 0.0, 0.0])[:, None]

    def gated(trained, key):
        weights, log_alpha = trained
        error = jnp.mean((x @ (weights * jp.gates.sample(log_alpha, key)) - x @ w) ** 2)
        return error + 0.1 * jp.gates.penalty(log_alpha)

    trained, tx = (jnp.ones((6, 1)), jnp.full((6, 1), 1.0)), optax.adam(0.05)

    @jax.jit
    def train(trained):
        def step(carry, key):
            updates, state = tx.update(jax.grad(gated)(carry[0], key), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        keys = jax.random.split(jax.random.key(1), 400)
        return jax.lax.scan(step, (trained, tx.init(trained)), keys)[0][0]

    weights, log_alpha = train(trained)
    masks = jp.gates.masks(log_alpha)
    assert masks.tolist() == (w != 0).tolist()
    np.testing.assert_allclose(weights * jp.gates.mean(log_alpha), w, atol=0.2)
