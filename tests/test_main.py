import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxprune as jp
from jaxprune.__main__ import main
from jaxprune._files import safetensors as _files
from jaxprune._files import stream as _stream

DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]


def weights(dtype="float32", levels=None):
    """Makes tensors whose order in the file is not that of their names."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        w = rng.standard_normal(shape)
        return (w if levels is None else np.round(w * levels) / levels).astype(dtype)

    return {
        "z/kernel": draw(12, 8),
        "a/bias": draw(8),
        "conv": draw(3, 3, 8, 4),
        "b/kernel": draw(8, 20),
        "empty": draw(0, 4),
        "step": np.array(7),
        "flag": np.array([True, False]),
    }


def name_of(array):
    name = array.dtype.name
    short = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    return short.get(name) or {"f": "F", "i": "I", "b": "BOOL", "c": "C"}[array.dtype.kind] + (
        str(8 * array.itemsize) if array.dtype.kind != "b" else ""
    )


def write(path, tensors, metadata=None, order=None):
    """Writes safetensors in the order given, as the library does not."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, w in tensors.items():
        offsets = [len(data), len(data) + w.nbytes]
        header[name] = {"dtype": name_of(w), "shape": list(w.shape), "data_offsets": offsets}
        data += w.tobytes()
    return raw(path, json.dumps(header).encode() + b"   ", data)


def raw(path, header, data, length=None):
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return str(path)


def read(path):
    """Reads with the safetensors library, and with ml_dtypes what that has no NumPy type for."""
    with safe_open(path, "np") as file:
        found = {}
        with open(path, "rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
            for name in file.keys():
                entry = header[name]
                data.seek(8 + length + entry["data_offsets"][0])
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                dtype = _files._DTYPES[entry["dtype"]]
                found[name] = np.frombuffer(data.read(size), dtype).reshape(entry["shape"])
    return found


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def expected(tensors, sparsity, **options):
    floats = {n: w for n, w in tensors.items() if w.size and jnp.issubdtype(w.dtype, jnp.floating)}
    masks = jp.select(jp.scores.magnitude(floats), sparsity, **options)
    return {
        n: w if masks.get(n) is None else np.where(masks[n], w, np.zeros((), w.dtype))
        for n, w in tensors.items()
    }


def check(path, tensors):
    found = read(path)
    assert found.keys() == tensors.keys()
    for name, w in tensors.items():
        assert same_bits(found[name], w), name


@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prunes_the_weights_that_select_does(tmp_path, dtype, scope, levels, monkeypatch):
    tensors = weights(dtype, levels)
    file, out = write(tmp_path / "in", tensors), str(tmp_path / "out")
    for sparsity in (0.0, 0.37, 0.9, 0.999):
        wanted = expected(tensors, sparsity, scope=scope)
        for piece in (1 << 20, 24):
            monkeypatch.setattr(_stream, "_PIECE", piece)
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
    for sparsity in (None, 0.3, 0.8):
        limit = jp.patterns.n_of_m(n, m, axis)
        wanted = expected(tensors, sparsity, scope=scope, pattern=limit)
        for piece in (1 << 20, 24, 5):
            monkeypatch.setattr(_stream, "_PIECE", piece)
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
    np.testing.assert_array_equal(_stream._hash([(0, 2), (2, 6)], first, True), wanted)


def test_a_threshold_of_64_bits():
    values = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    for keep in (1, 500, 999):
        threshold, count, _ = _stream._search(lambda: [values], (48, 32, 16, 0), keep)
        assert count == keep == (values >= np.uint64(threshold)).sum()


def test_names_dtypes_metadata_and_order_stay_byte_for_byte(tmp_path, capsys):
    tensors = weights()
    metadata = {"format": "pt", "ключ": 'значение\n\t"quoted" \\'}
    file, out = write(tmp_path / "in", tensors, metadata), str(tmp_path / "out")
    assert run(capsys, "prune", file, out, "--sparsity", 0.5)[0] == 0
    before, after = (Path(p).read_bytes() for p in (file, out))
    length = 8 + int.from_bytes(before[:8], "little")
    assert before[:length] == after[:length] and len(before) == len(after)
    with safe_open(out, "np") as found:
        assert found.metadata() == metadata


def test_reads_what_the_library_writes(tmp_path, capsys):
    tensors = {n: w for n, w in weights().items() if w.size}
    tensors["complex"] = np.array([1j, 0], np.complex64)
    tensors["sparse"] = np.array([[0.0, -0.0, 1.0]], np.float32)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"by": "a test"})
    code, out, _ = run(capsys, "inspect", path, "--json")
    found = json.loads(out)
    assert code == 0 and found["format"] == "safetensors" and found["metadata"] == {"by": "a test"}
    rows = {row.pop("path"): row for row in found["tensors"]}
    assert rows == {
        n: {
            "dtype": w.dtype.name,
            "shape": list(w.shape),
            "size": w.size,
            "zeros": int((w == 0).sum()),
            "bytes": w.nbytes,
        }
        for n, w in tensors.items()
    }
    assert found["total"]["bytes"] == sum(w.nbytes for w in tensors.values())
    assert run(capsys, "prune", path, path, "--sparsity", 0.5)[0] == 0
    wanted = expected(tensors, 0.5)
    assert all(same_bits(w, wanted[n]) for n, w in load_file(path).items())


def test_inspect_prints_a_table(tmp_path, capsys):
    tensors = {"w": np.array([[0, 1, 2], [0, 3, 0]], np.float16), "n\x1b[1m\n": np.ones(3, "int8")}
    file = write(tmp_path / "in", tensors, {"a": "b"})
    assert run(capsys, "inspect", file) == (
        0,
        """path        dtype    shape  zeros  sparsity  bytes
──────────────────────────────────────────────────
w           float16  2×3        3    50.00%     12
n\\x1b[1m\\n  int8     3          0     0.00%      3
──────────────────────────────────────────────────
total                9          3    33.33%     15

metadata
───────────
a         b
""",
        "",
    )


def test_types_without_weights_are_copied(tmp_path, capsys):
    header = {
        "four": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
        "scale": {"dtype": "F8_E8M0", "shape": [1, 2], "data_offsets": [3, 5]},
        "w": {"dtype": "F8_E5M2", "shape": [1, 2], "data_offsets": [5, 7]},
    }
    file = raw(tmp_path / "in", json.dumps(header).encode(), bytes([0, 1, 2, 3, 4, 60, 61]))
    code, out, _ = run(capsys, "prune", file, file, "--sparsity", 0.5, "--json")
    assert code == 0
    assert [t["path"] for t in json.loads(out)["tensors"] if t["pruned"]] == ["w"]
    assert Path(file).read_bytes()[-7:] == bytes([0, 1, 2, 3, 4, 0, 61])
    assert json.loads(run(capsys, "inspect", file, "--json")[1])["tensors"][0]["zeros"] is None
    other = raw(tmp_path / "b", json.dumps(header).encode(), bytes([0, 9, 2, 3, 4, 0, 61]))
    code, out, _ = run(capsys, "diff", file, other, "--json")
    assert code == 1 and json.loads(out)["changes"][0]["changed"] == 1


def test_prune_reports_what_is_kept(tmp_path, capsys):
    file = write(tmp_path / "in", weights())
    argv = "prune", file, tmp_path / "out", "--sparsity", 0.5, "--exclude", "z/*", "b*"
    code, out, err = run(capsys, *argv, "--json")
    found = json.loads(out)
    assert code == 0 and err == ""
    pruned = {t["path"]: t["kept"] for t in found["tensors"] if t["pruned"]}
    assert pruned == {"conv": 144} and found["total"]["sparsity"] == 0.5
    _, out, _ = run(capsys, *argv)
    assert "conv      3×3×8×4  144 of 288    50.00%" in out


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


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x01\0\0", "not a safetensors file"),
    "text": (b"hello world, this is text", "not a safetensors file"),
    "no JSON": (b"{nope", "no JSON object"),
    "no UTF-8": (b"{\xff\xfe}", "no JSON object"),
    "a list": (b'["a"]', "no JSON object"),
    "deep": (b"[" * 100_000, "no JSON object"),
    "a big number": (b'{"w": ' + b"1" * 5000 + b"}", "no JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, "must map text to text"),
    "twice": (b'{"w": {}, "w": {}}', "key 'w' twice"),
    "inner twice": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "key 'dtype' twice"),
    "no entry": ({"w": 3}, "must have dtype, shape and data_offsets"),
    "missing": ({"w": {"dtype": "F32", "shape": []}}, "must have dtype"),
    "unknown dtype": ({"w": entry("F31")}, "unknown"),
    "odd dtype": ({"w": entry(["F32"])}, "unknown"),
    "negative shape": ({"w": entry(shape=(-2, -2))}, "whole numbers as shape"),
    "bool shape": ({"w": entry(shape=(True, 4))}, "whole numbers as shape"),
    "float offsets": ({"w": entry(offsets=(0.0, 16))}, "whole numbers as data_offsets"),
    "one offset": ({"w": entry(offsets=(16,))}, "truncated or damaged"),
    "backwards": ({"w": entry(offsets=(16, 0))}, "truncated or damaged"),
    "beyond": ({"w": entry(shape=(2, 4), offsets=(0, 32))}, "truncated or damaged"),
    "size": ({"w": entry(shape=(2, 3))}, "not F32 of shape"),
    "huge": ({"w": entry(shape=(2**62, 2**62))}, "not F32 of shape"),
    "overlap": ({"v": entry(shape=(3,), offsets=(0, 12)), "w": entry(shape=(2,), offsets=(8, 16))},
                "overlaps"),
    "gap": ({"v": entry(shape=(1,), offsets=(0, 4)), "w": entry(shape=(2,), offsets=(8, 16))},
            "gap"),
    "late": ({"w": entry(shape=(2,), offsets=(8, 16))}, "gap"),
    "trailing": ({"w": entry(shape=(2,), offsets=(0, 8))}, "accounts for 8 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line(tmp_path, capsys, name):
    header, words = BROKEN[name]
    path = tmp_path / "a file"
    if name in ("empty", "short", "text"):
        path.write_bytes(header)
    else:
        raw(path, header if isinstance(header, bytes) else json.dumps(header).encode(), b"1" * 16)
    for argv in (("inspect", path), ("prune", path, path, "--sparsity", 0.5), ("diff", path, path)):
        before = path.read_bytes()
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and words in err
        assert err.startswith(f"jaxprune: {path}: ") and err.count("\n") == 1
        assert path.read_bytes() == before


@pytest.mark.parametrize("length", [25, 100_000_001, 2**63])
def test_headers_longer_than_the_file_or_the_limit(tmp_path, capsys, length):
    path = tmp_path / "in"
    raw(path, b"{}" + b" " * 10, b"", length)
    if length == 100_000_001:
        os.truncate(path, 100_000_100)  # sparse: long enough, but too long
    code, _, err = run(capsys, "inspect", path)
    assert code == 2 and "no header of at most 100,000,000" in err


def test_every_truncation_is_noticed(tmp_path, capsys):
    whole = Path(write(tmp_path / "in", {"w": np.ones((3, 4), np.float32)})).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        code, out, err = run(capsys, "inspect", tmp_path / "cut")
        assert code == 2 and out == "" and err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", "required: COMMAND"),
        ("frobnicate", "invalid choice"),
        ("inspect", "required: FILE"),
        ("inspect missing", "missing: No such file"),
        ("inspect /dev/null", "no regular file"),
        ("inspect .", "no Orbax checkpoint"),
        ("inspect in --what", "unrecognized arguments: --what"),
        ("diff in missing", "missing: No such file"),
        ("prune in out", "--sparsity 0.9"),
        ("prune in out --sparsity 1.0", "[0, 1), got 1.0"),
        ("prune in out --sparsity nan", "got nan"),
        ("prune in out --sparsity x", "invalid float"),
        ("prune in out --spars 0.5", "unrecognized arguments"),
        ("prune in out --sparsity 0.5 --scope rows", "invalid choice: 'rows'"),
        ("prune in out --pattern 4:2", "needed unstructured or N:M"),
        ("prune in out --pattern 0:2", "needed unstructured or N:M"),
        ("prune in out --pattern 2:5", "z/kernel: 2:5 sparsity needs axis -2 divisible by 5"),
        ("prune in out --pattern 2:4 --axis 2", "--exclude"),
        ("prune in out --sparsity 0.5 --axis -1", "--pattern 2:4"),
        ("prune in out --sparsity 0.5 --exclude nope*", "no tensor matches --exclude 'nope*'"),
        ("prune in out --sparsity 0.5 --exclude *", "no floating tensor"),
        ("prune in no/folder/out --sparsity 0.5", "there is no folder"),
        ("prune in . --sparsity 0.5", "is no regular file"),
        ("prune in /dev/null --sparsity 0.5", "is no regular file"),
        ("prune nan out --sparsity 0.5", "nan: w: holds weights that are NaN or infinite"),
        ("prune inf out --pattern 1:2", "inf: w: holds weights that are NaN or infinite"),
        ("prune far out --sparsity 0", "far: w: holds weights that are NaN or infinite"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", {"z/kernel": np.ones((6, 4), np.float32), "b": np.ones(3)})
    write(tmp_path / "nan", {"w": np.array([[1, np.nan]], np.float16)})
    write(tmp_path / "inf", {"w": np.array([[1], [-np.inf]], np.float32)})
    write(tmp_path / "far", {"w": np.array([[1, 1e300]])})
    names = set(os.listdir())
    code, out, err = run(capsys, *argv.split())
    assert (code, out) == (2, "") and words in err
    assert err.startswith("jaxprune: ") and err.count("\n") == 1
    assert set(os.listdir()) == names


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit(143), OSError(28, "No space left")]
)
def test_an_interrupted_write_leaves_the_old_file(tmp_path, capsys, monkeypatch, error):
    file, out = write(tmp_path / "in", weights()), tmp_path / "out"
    out.write_bytes(b"old")
    prune, calls = _stream.prune, []

    def fail(*arguments):
        calls.append(os.listdir(tmp_path))
        if len(calls) == 2:
            raise error
        yield from prune(*arguments)

    monkeypatch.setattr(_stream, "prune", fail)
    try:
        code = main(["prune", file, str(out), "--sparsity", "0.5"])
    except SystemExit as exit:
        code = exit.code
    assert code in (2, 130, 143) and len(calls[1]) == 3
    assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert capsys.readouterr().err.count("\n") == (code != 143)


def test_sigterm_removes_what_is_unfinished(tmp_path, monkeypatch):
    file = write(tmp_path / "in", weights())
    monkeypatch.setattr(_stream, "prune", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        main(["prune", file, file, "--sparsity", "0.5"])
    assert os.listdir(tmp_path) == ["in"] and signal.getsignal(signal.SIGTERM) is before
    check(file, weights())


def test_the_output_keeps_its_mode_and_its_link(tmp_path, capsys):
    file = write(tmp_path / "in", weights())
    os.chmod(file, 0o640)
    (tmp_path / "link").symlink_to("in")
    assert run(capsys, "prune", file, tmp_path / "link", "--sparsity", 0.5)[0] == 0
    assert (tmp_path / "link").is_symlink() and os.stat(file).st_mode & 0o777 == 0o640
    check(file, expected(weights(), 0.5))


def test_memory_does_not_grow_with_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_stream, "_PIECE", 1 << 14)
    monkeypatch.setattr(_files, "_COPY", 1 << 16)
    size = 1 << 22  # entries: 16 MB
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
        assert peak < 4e6, argv


@pytest.fixture
def checkpoint(tmp_path):
    import orbax.checkpoint as ocp

    params = {
        "a": {"kernel": jnp.array(weights()["z/kernel"]), "bias": jnp.ones(8)},
        "layers": [jnp.array(weights("bfloat16")["b/kernel"]), {"flag": jnp.array([True, False])}],
        "rest": (None, {}, 1.5, 3),
    }
    opt = {"adam": optax.adam(1e-3).init(params["a"]), "key": jax.random.key(3)}
    state = {"params": params, "opt": opt}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ckpt", state)
    return tmp_path / "ckpt", state


@pytest.mark.filterwarnings("ignore")  # Orbax has much to say
def test_orbax_checkpoints_keep_their_structure(tmp_path, capsys, checkpoint):
    import orbax.checkpoint as ocp

    path, state = checkpoint
    code, out, err = run(capsys, "inspect", path, "--json")
    names = {jax.tree_util.keystr(k, simple=True, separator="/")
             for k, _ in jax.tree_util.tree_leaves_with_path(state)}  # fmt: skip
    assert code == 0 and err == "" and {t["path"] for t in json.loads(out)["tensors"]} == names
    argv = "prune", path, tmp_path / "new", "--sparsity", 0.6, "--exclude", "opt/*"
    code, out, err = run(capsys, *argv)
    assert code == 0 and err == ""
    with ocp.StandardCheckpointer() as checkpointer:
        after = checkpointer.restore(tmp_path / "new", state)
    assert after["opt"]["key"].dtype == state["opt"]["key"].dtype
    masks = jp.select(jp.scores.magnitude(state["params"]), 0.6)
    wanted = {**state, "params": jp.apply_masks(state["params"], masks)}
    keys = [jax.random.key_data(tree["opt"].pop("key")) for tree in (after, wanted)]
    assert jnp.array_equal(*keys)
    assert jax.tree.structure(after) == jax.tree.structure(wanted)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: same_bits(*map(np.asarray, (a, b))), after, wanted)
    )
    assert run(capsys, "diff", path, tmp_path / "new")[0] == 1
    assert run(capsys, "prune", path, path, *argv[3:])[0] == 0  # in place
    assert run(capsys, "diff", path, tmp_path / "new")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "new"]


@pytest.mark.filterwarnings("ignore")
def test_orbax_folders_are_not_replaced_lightly(tmp_path, capsys, monkeypatch, checkpoint):
    path, _ = checkpoint
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").write_text("dear")
    for out, words in ((home, "no Orbax checkpoint"), (home / "thesis", "no Orbax checkpoint")):
        code, _, err = run(capsys, "prune", path, out, "--sparsity", 0.5)
        assert code == 2 and words in err and (home / "thesis").read_text() == "dear"
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and f"name the one inside, {path}" in err
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, _, err = run(capsys, "prune", path, path, "--sparsity", 0.5)
    assert code == 2 and "No space left" in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    (path / "_METADATA").write_text("{")
    code, _, err = run(capsys, "inspect", path)
    assert code == 2 and err.startswith(f"jaxprune: {path}: ") and err.count("\n") == 1


def test_a_bar_is_shown_on_a_terminal_alone(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "in", weights())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "B/s" in run(capsys, "prune", file, file, "--sparsity", 0.5)[2]
    assert run(capsys, "inspect", file, "--json")[2] == ""


def test_runs_as_a_module(tmp_path):
    file = write(tmp_path / "in", weights())
    argv = [sys.executable, "-m", "jaxprune", "diff", file]
    done = subprocess.run([*argv, file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*argv, "nope"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
