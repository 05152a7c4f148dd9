"""Sums: no order of the terms changes the last bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import _sums


def axis_sum(x):
    return _sums.exact_sum(x, x.ndim - 1)


def block_sum(x):
    return _sums.exact_block_sum(x, x.shape[-1:])[..., 0]


@pytest.mark.parametrize("total", [axis_sum, block_sum])
@pytest.mark.parametrize("size", [16, 4096, 2**17])
def test_sums_have_no_order(total, size):
    random = np.random.default_rng(0)
    values = random.normal(size=(3, size)) * np.exp(random.normal(size=(3, size)) * 5)
    values = values.astype(np.float32)
    sums = [np.asarray(total(jnp.asarray(v))) for v in (values, values[:, ::-1])]
    np.testing.assert_array_equal(*sums)
    values = values.astype(np.float64)
    assert (np.abs(sums[0] - values.sum(1)) < 2e-7 * np.abs(values).sum(1)).all()
    for scale in (1e-35, 1e35):  # the power of two that makes integers is beyond float32
        scaled = total(jnp.array([1.0, 2.0, -0.5]) * jnp.float32(scale))
        np.testing.assert_allclose(scaled, np.float32(2.5) * np.float32(scale), rtol=3e-7)
    special = jnp.array([[1.0, jnp.nan], [jnp.inf, 1.0], [-jnp.inf, 1.0], [jnp.inf, -jnp.inf]])
    np.testing.assert_array_equal(total(special), special.sum(1))
    assert total(jnp.zeros((2, 3))).tolist() == [0, 0]


def test_sums_of_nothing():
    assert _sums.exact_sum(jnp.zeros((2, 0)), 1).tolist() == [0, 0]
    assert _sums.exact_block_sum(jnp.zeros((2, 0)), (2,)).shape == (2, 0)
