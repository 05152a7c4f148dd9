import json
import os
from pathlib import Path

import numpy as np
import pytest
from files import check, expected, raw, run, same_bits, weights, write
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxprune._files import safetensors


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


def test_reads_files_of_the_library(tmp_path, capsys):
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


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x01\0\0", "not a safetensors file"),
    "text": (b"hello world, this is text", "not a safetensors file"),
    "no JSON": (b"{nope", "not a JSON object"),
    "no UTF-8": (b"{\xff\xfe}", "not a JSON object"),
    "a list": (b'["a"]', "not a JSON object"),
    "deep": (b"[" * 100_000, "not a JSON object"),
    "a big number": (b'{"w": ' + b"1" * 5000 + b"}", "not a JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, "must map strings to strings"),
    "twice": (b'{"w": {}, "w": {}}', "key 'w' twice"),
    "inner twice": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "key 'dtype' twice"),
    "no entry": ({"w": 3}, "must have dtype, shape and data_offsets"),
    "missing": ({"w": {"dtype": "F32", "shape": []}}, "must have dtype"),
    "unknown dtype": ({"w": entry("F31")}, "unknown"),
    "odd dtype": ({"w": entry(["F32"])}, "unknown"),
    "negative shape": ({"w": entry(shape=(-2, -2))}, "shape must be a list of whole numbers"),
    "bool shape": ({"w": entry(shape=(True, 4))}, "shape must be a list of whole numbers"),
    "float offsets": ({"w": entry(offsets=(0.0, 16))}, "data_offsets must be a list"),
    "one offset": ({"w": entry(offsets=(16,))}, "truncated or damaged"),
    "backwards": ({"w": entry(offsets=(16, 0))}, "truncated or damaged"),
    "beyond": ({"w": entry(shape=(2, 4), offsets=(0, 32))}, "truncated or damaged"),
    "size": ({"w": entry(shape=(2, 3))}, "do not hold F32 of shape"),
    "huge": ({"w": entry(shape=(2**62, 2**62))}, "do not hold F32 of shape"),
    "overlap": ({"v": entry(shape=(3,), offsets=(0, 12)), "w": entry(shape=(2,), offsets=(8, 16))},
                "overlaps"),
    "gap": ({"v": entry(shape=(1,), offsets=(0, 4)), "w": entry(shape=(2,), offsets=(8, 16))},
            "gap"),
    "late": ({"w": entry(shape=(2,), offsets=(8, 16))}, "gap"),
    "trailing": ({"w": entry(shape=(2,), offsets=(0, 8))}, "describes 8 bytes"),
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
    assert code == 2 and "a header of at most 100,000,000" in err


def test_every_truncation_is_noticed(tmp_path, capsys):
    whole = Path(write(tmp_path / "in", {"w": np.ones((3, 4), np.float32)})).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        code, out, err = run(capsys, "inspect", tmp_path / "cut")
        assert code == 2 and out == "" and err.count("\n") == 1


def test_the_output_keeps_its_mode_and_its_link(tmp_path, capsys):
    file = write(tmp_path / "in", weights())
    os.chmod(file, 0o640)
    (tmp_path / "link").symlink_to("in")
    assert run(capsys, "prune", file, tmp_path / "link", "--sparsity", 0.5)[0] == 0
    assert (tmp_path / "link").is_symlink() and os.stat(file).st_mode & 0o777 == 0o640
    check(file, expected(weights(), 0.5))


def test_repeated_names():
    assert safetensors.repeated(["a", "b", "c", "b", "a"]) == "a"
    assert safetensors.repeated(iter("abc")) is None


def test_a_header_that_is_written_is_read(tmp_path):
    tensors = [(f"w/{kind}", name, (2, 3)) for kind, name in safetensors.DTYPES.items()]
    with safetensors.writing(tmp_path / "file") as file:
        safetensors.write_header(file, {"by": "a test"}, tensors)
        file.write(bytes(sum(6 * np.dtype(name).itemsize for _, name, _ in tensors)))
    with safetensors.opened(str(tmp_path / "file")) as source:
        assert [(t.path, t.dtype, t.shape) for t in source.tensors] == tensors
        assert source.metadata == {"by": "a test"}
