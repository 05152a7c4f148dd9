import gc
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def caches_cleared():
    """Drops the programs of a module: all of them together are more mappings than Linux allows."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def quick_compilation():
    """Compiles with few optimisations, for what runs little and compiles much."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
