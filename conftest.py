"""The environment of tests and doctests: eight CPU devices, quick compilation, a compile cache."""

import gc
import importlib.metadata
import os
import pathlib

# Set before JAX is imported, and inherited by the processes that tests start.
flags = "--xla_force_host_platform_device_count=8"
if importlib.metadata.version("jaxlib") == "0.10.2":
    flags += " --xla_cpu_use_fusion_emitters=false"  # half the time; later ones lack it
os.environ["XLA_FLAGS"] = flags
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # tests run little and compile much
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402


def pytest_xdist_auto_num_workers(config):
    """Runs files and single tests in this process: workers take seconds to start."""
    if config.option.keyword or not all(map(os.path.isdir, config.args)):
        return 0
    return None  # one worker per core


def pytest_xdist_make_scheduler(config, log):
    """Gives a worker one module at a time; tests that start processes fill the gaps at the end."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            alone = nodeid.startswith(("tests/test_examples.py", "tests/test_notebooks.py"))
            return nodeid if alone else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def compilation(request, monkeypatch):
    """Compiles `optimized` tests as users do; what they compile must not be compiled before."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def rank_promotion(request):
    if isinstance(request.node, pytest.DoctestItem):  # runs as for a reader
        yield
        return
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="session")
def names_of_examples(doctest_namespace):
    """Lets examples of docstrings use the package and `jnp` without importing them."""
    import jaxprune

    doctest_namespace.update(jp=jaxprune, jnp=jnp)


@pytest.fixture(autouse=True, scope="module")
def caches_cleared():
    """Drops the programs of a module: all of them together are more mappings than Linux allows."""
    yield
    jax.clear_caches()
    gc.collect()
