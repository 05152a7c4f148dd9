import jax
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp


class Block(nnx.Module):
    """A dense layer under batch norm, after attention; `encode` is a part of it."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def encode(self, x):
        return nnx.relu(self.norm(self.inner(x)))

    def __call__(self, x):
        return self.out(self.encode(self.attention(x)))


@pytest.fixture(scope="module")
def block():
    model = Block(nnx.Rngs(0))
    model.eval()
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    fn, state = jp.nnx.split(model)
    return model, fn, state, x, jp.find_groups(fn, state, x)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_there_and_back(block):
    model, fn, state, x, groups = block
    masks = groups.select(jp.scores.magnitude(state), scope={"inner/bias": 0.5})
    small_fn, small, _ = jp.shrink(fn, state, masks, x, groups=groups)
    module = jp.nnx.merge(model, small_fn, small, x)
    assert module.norm.mean.shape == (4,) and model.norm.mean.shape == (8,)
    close(module(x), fn(jp.apply_masks(state, masks), x))


def test_a_module_that_needs_its_dense_sizes(block):
    model, fn, state, x, groups = block  # Flax's attention takes sizes from its attributes
    masks = groups.select(jp.scores.magnitude(state), scope={"attention/value/kernel": 0.5})
    small_fn, small, plan = jp.shrink(fn, state, masks, x)
    assert any(path == "attention/value/kernel" for path, *_ in plan.kept)
    with pytest.raises(ValueError, match="Block cannot run with .*use the shrunk function"):
        jp.nnx.merge(model, small_fn, small, x)


def test_a_module_that_returns_something_else(block):
    model, fn, state, x, _ = block
    with pytest.raises(ValueError, match="Block .*use the shrunk function"):
        jp.nnx.merge(model, lambda state, x: fn(state, x) + 1, state, x)


def test_split_of_a_method(block):
    model, _, _, x, _ = block
    fn, state = jp.nnx.split(model, method="encode")
    close(fn(state, x), model.encode(x))
    # The hidden units are the output of `encode`, so they are pinned; in a call they are not.
    assert not jp.find_groups(fn, state, x).unit["inner/bias"][0].any()
    assert jp.find_groups(jp.nnx.split(model)[0], state, x).unit["inner/bias"][0].all()


def test_split_of_a_training_step():
    model = Block(nnx.Rngs(0))
    model.train()
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    fn, state = jp.nnx.split(model, has_aux=True)
    out, new = fn(state, x)
    assert not state["norm"]["mean"][...].any() and not model.norm.mean[...].any()
    assert new["norm"]["mean"][...].all()
    close(out, nnx.clone(model)(x))
    groups = jp.find_groups(fn, state, x, has_aux=True)
    masks = groups.select(jp.scores.magnitude(state), scope={"inner/bias": 0.5})
    small_fn, small, _ = jp.shrink(fn, state, masks, x, has_aux=True)
    out, new = small_fn(small, x)
    assert new["norm"]["mean"].shape == (4,)
    close(out, fn(jp.apply_masks(state, masks), x)[0])
