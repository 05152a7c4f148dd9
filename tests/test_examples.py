"""Every example runs at tiny settings, with warnings as errors."""

import importlib.util
import pathlib

import pytest
from helpers import python, slow_unless

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
TINY = {  # settings that run in seconds; an example that is not named here runs with none
    "quickstart.py": ["--epochs", "1", "--sparsities", "0.9"],
    "prune_retrain.py": ["--epochs", "1", "--rounds", "2"],
    "benchmarks.py": ["--tiny"],
    "collapse.py": ["--widths", "4", "8", "--rounds", "5", "--steps", "3", "--seeds", "1"],
    "criteria.py": "--epochs 1 --compressions 4 --seeds 1 --methods WoodFisher movement".split(),
    "curves.py": ["--epochs", "1", "--compressions", "4", "--seeds", "1"],
    "filters.py": "--seeds 1 --ratios 0.5 --steps 1 --particles 2 --rounds 1".split(),
    "large_sparse.py": ["--steps", "11", "--seeds", "1", "--sparsities", "0.9"],
    "layerwise.py": ["--steps", "20", "--seeds", "1", "--sparsities", "0.5"],
    "lottery.py": ["--steps", "20", "--rounds", "2", "--seeds", "1"],
    "obd.py": ["--width", "4", "--steps", "100", "--seeds", "1"],
    "ranking.py": ["--seeds", "1", "--steps", "5", "--examples", "10"],
    "structured.py": ["--epochs", "1", "--tuning-epochs", "1", "--ratios", "0.5"],
    "tpu_pod.py": ["--models", "tiny", "--programs", "select"],
}
FAST = "collapse.py", "prune_retrain.py", "quickstart.py"


def write_mnist(folder):
    """Writes random images in the IDX format."""
    import gzip

    import numpy as np

    rng = np.random.default_rng(0)
    for name, n in (("train", 256), ("t10k", 64)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        labels = rng.integers(0, 10, n, np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as f:
                f.write(header + array.tobytes())


NAMES = sorted(p.name for p in EXAMPLES.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", slow_unless(FAST, NAMES))
def test_example_runs(name, tmp_path):
    options = TINY.get(name, [])
    if name == "tpu_pod.py" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPUs, is missing: pip install 'jax[tpu]'")
    if name == "lenet_mnist.py":
        write_mnist(tmp_path)
        options = ["--data", str(tmp_path), "--seeds", "2", "--epochs", "1"]
    if "args.out" in (EXAMPLES / name).read_text():
        options = [*options, "--out", str(tmp_path)]
    assert python(EXAMPLES / name, *options, cwd=tmp_path)
