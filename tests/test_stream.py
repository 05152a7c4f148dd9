import json
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from files import DTYPES, check, expected, run, weights, write

import jaxprune as jp
from jaxprune._files import safetensors, stream
from jaxprune._files.command_line import main


@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prunes_the_same_weights_as_select(tmp_path, dtype, scope, levels, monkeypatch):
    tensors = weights(dtype, levels)
    file, out = write(tmp_path / "in", tensors), str(tmp_path / "out")
    for sparsity in (0.0, 0.37, 0.9, 0.999):
        wanted = expected(tensors, sparsity, scope=scope)
        for piece in (1 << 20, 24):
            monkeypatch.setattr(stream, "_PIECE", piece)
            assert main(["prune", file, out, "--sparsity", str(sparsity), "--scope", scope]) == 0
            check(out, wanted)


@pytest.mark.parametrize(
    "pattern, axis, scope", [("2:4", -2, "global"), ("1:4", -1, "layer"), ("3:8", -2, "erk")]
)
def test_prunes_n_of_m_as_select_does(tmp_path, pattern, axis, scope, monkeypatch):
    n, m = map(int, pattern.split(":"))
    tensors = weights(levels=3)
    tensors["z/kernel"] = tensors["z/kernel"].reshape(8, 12)
    file, out = write(tmp_path / "in", tensors), str(tmp_path / "out")
    argv = ["prune", file, out, "--pattern", pattern, "--scope", scope]
    argv += [] if axis == -2 else ["--axis", str(axis)]
    for sparsity in (None, 0.8):
        limit = jp.patterns.n_of_m(n, m, axis)
        wanted = expected(tensors, sparsity, scope=scope, pattern=limit)
        for piece in (1 << 20, 24, 5):
            monkeypatch.setattr(stream, "_PIECE", piece)
            assert main([*argv, *([] if sparsity is None else ["--sparsity", str(sparsity)])]) == 0
            check(out, wanted)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    st.lists(st.sampled_from([0, 1, -1, 2, 1e-45, 1e-40, 3e38, 0.5]), min_size=12, max_size=12),
    st.floats(0, 0.999),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_thresholds_of_any_weights(tmp_path_factory, values, sparsity, dtype):
    folder = tmp_path_factory.mktemp("x")
    with np.errstate(over="ignore"):
        tensors = {"w": np.array(values).clip(-6e4, 6e4).astype(dtype).reshape(3, 4)}
    file = write(folder / "in", tensors)
    assert main(["prune", file, file, "--sparsity", str(sparsity)]) == 0
    check(file, expected(tensors, sparsity))


def test_indices_beyond_32_bits_hash_as_in_select():
    from jaxprune import _threshold

    first = 2**32 + 5
    with jax.enable_x64(True):
        wanted = np.asarray(_threshold.hashed((6,), jnp.uint64(first)))
    np.testing.assert_array_equal(stream._ranks([(0, 2), (2, 6)], np.uint64(first)), wanted)


def test_a_threshold_of_64_bits():
    values = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    for keep in (1, 500, 999):
        threshold, count, _ = stream._search(lambda: [values], (48, 32, 16, 0), keep)
        assert count == keep == (values >= np.uint64(threshold)).sum()


def test_memory_does_not_grow_with_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE", 1 << 14)
    monkeypatch.setattr(safetensors, "_COPY", 1 << 16)
    size = 1 << 20  # two tensors of 4 MB
    w = np.random.default_rng(0).standard_normal(size, np.float32)
    file = write(tmp_path / "in", {"w": w.reshape(4, -1), "v": w})
    out = tmp_path / "out"
    for argv in (
        ("inspect", file),
        ("prune", file, out, "--sparsity", "0.9"),
        ("prune", file, out, "--pattern", "2:4"),
        ("diff", file, out),
    ):
        tracemalloc.start()
        assert run(capsys, *argv)[0] in (0, 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3e6, argv


def test_diff_counts_every_change_once(tmp_path, capsys):
    a = {
        "same": np.array([np.nan, 1], np.float32),
        "w": np.array([[1, 2, 0, -0.0, np.nan, 5]], ml_dtypes.bfloat16),
        "i": np.array([-(2**63), 2**53], np.int64),
        "only a": np.ones(1),
        "kind": np.ones(2, np.float32),
        "shape": np.ones((2, 3)),
    }
    b = {
        "i": np.array([2**63 - 1, 2**53 + 1], np.int64),
        "w": np.array([[0, 2.5, 3, 0.0, np.nan, 5]], ml_dtypes.bfloat16),
        "same": a["same"],
        "kind": np.ones(2, np.float16),
        "shape": np.ones((3, 2)),
        "only b": np.ones(1),
    }
    files = write(tmp_path / "a", a, {"x": "1"}), write(tmp_path / "b", b, {"x": "2"})
    code, out, _ = run(capsys, "diff", *files, "--json")
    assert code == 1
    assert json.loads(out) == {
        "equal": False,
        "only_in_a": ["only a"],
        "only_in_b": ["only b"],
        "other": [
            {"path": "kind", "dtype": ["float32", "float16"]},
            {"path": "shape", "shape": [[2, 3], [3, 2]]},
        ],
        "changes": [
            {"path": "w", "zeroed": 1, "revived": 1, "changed": 2, "largest": 3.0},
            {"path": "i", "zeroed": 0, "revived": 0, "changed": 2, "largest": 2**64 - 1},
        ],
        "total": {"zeroed": 1, "revived": 1, "changed": 4, "largest": 2**64 - 1},
        "metadata": ["x"],
    }
    code, out, _ = run(capsys, "diff", *files)
    assert code == 1 and "2×3 → 3×2" in out and "only in B" in out
    code, out, _ = run(capsys, "diff", files[0], files[0])
    assert code == 0 and out == "no difference in 6 tensors\n"
    nan = write(tmp_path / "nan", {"w": np.array([[np.nan]])})
    one = write(tmp_path / "one", {"w": np.ones((1, 1))})
    assert json.loads(run(capsys, "diff", nan, one, "--json")[1])["changes"][0]["largest"] == "nan"
