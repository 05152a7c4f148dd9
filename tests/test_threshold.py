import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import removed

import jaxprune as jp
from jaxprune import _threshold


@pytest.mark.parametrize("dtype", [jnp.uint32, jnp.uint64])
def test_hash_of_the_index_is_one_to_one_and_spreads(dtype):
    with jax.enable_x64(True):
        hashed = np.asarray(_threshold.hashed((64, 32, 32), jnp.asarray(7, dtype)))
    assert hashed.dtype == dtype and len(np.unique(hashed)) == hashed.size
    share = (hashed < np.iinfo(hashed.dtype).max // 2).mean((1, 2))
    assert abs(share - 0.5).max() < 0.08


@pytest.mark.parametrize("pattern", [jp.patterns.unstructured, jp.patterns.n_of_m(2, 3, 0)])
def test_counts_and_indices_of_64_bits(monkeypatch, pattern):
    scores = {"ties": jnp.ones((33, 65)), "w": jax.random.normal(jax.random.key(0), (33, 67))}
    monkeypatch.setattr(_threshold, "_INT32_END", 100)
    monkeypatch.setattr(_threshold, "UINT32_END", 100)
    wide = jp.select(scores, 0.6, pattern=pattern)
    monkeypatch.undo()
    jax.clear_caches()
    narrow = jp.select(scores, 0.6, pattern=pattern)
    assert sum(removed(wide).values()) == round(0.6 * 33 * (65 + 67))
    assert (wide["w"] == narrow["w"]).all() and not (wide["ties"] == narrow["ties"]).all()
