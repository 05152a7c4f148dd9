import json
import os

import fuzz_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files import sparse_model
from helpers import auto_and_explicit, bits, mesh, normal, place
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.flax import save_file

import jaxprune as jp
from jaxprune._files import safetensors


@pytest.fixture
def model():
    return sparse_model()


@pytest.mark.parametrize("cases", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_fuzzing(tmp_path, cases):
    counts = fuzz_files.fuzz(str(tmp_path / "file"), cases)
    assert counts["round trip"] == cases // 2 and counts.total() == cases


@pytest.mark.parametrize("abstract", [False, True])
def test_a_round_trip_keeps_every_bit(tmp_path, model, abstract):
    path = tmp_path / "model"
    jp.masks.save(path, *model)
    like = jax.eval_shape(lambda: model[0]) if abstract else model[0]
    assert bits(jp.masks.load(path, like)) == bits(model)
    assert not jax.tree.leaves(jp.masks.load(path, like)[0])[0].committed


def test_leaves_of_numpy_and_python_keep_their_types(tmp_path):
    params = {
        "wide": np.array([[np.nan, 0.0, -0.0, 1e300]]),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.int64(2**60),
        "python": [1.5, 3, True],
    }
    masks = {**dict.fromkeys(params), "wide": np.array([[True, False, True, True]])}
    jp.masks.save(tmp_path / "file", params, masks)
    loaded, found = jp.masks.load(tmp_path / "file", params)
    assert loaded["wide"].tobytes() == params["wide"].tobytes() and found["wide"].dtype == bool
    assert loaded["big"].tolist() == [0, 1, 2] and loaded["scalar"] == 2**60
    assert loaded["python"] == [1.5, 3, True] and loaded["python"][2] is True
    like = {**params, "wide": jax.ShapeDtypeStruct((1, 4), np.float64)}
    with pytest.raises(ValueError, match="file: wide: .*jax_enable_x64"):
        jp.masks.load(tmp_path / "file", like)


def test_a_bare_array_and_masks_with_holes(tmp_path):
    w, mask = jnp.array([0.0, 2.0]), jnp.array([False, True])
    jp.masks.save(tmp_path / "file", w, mask)
    assert bits(jp.masks.load(tmp_path / "file", w)) == bits((w, mask))
    jp.masks.save(tmp_path / "file", {"a": {"b": w}}, {"a": None})
    assert jp.masks.load(tmp_path / "file", {"a": {"b": w}})[1] == {"a": {"b": None}}


@pytest.mark.parametrize(
    "dtype, sparsity", [("float32", 0.5), ("bfloat16", 0.9), ("float8_e4m3fn", 0.99)]
)
def test_size_on_disk(tmp_path, dtype, sparsity):
    params = normal({"a": (400, 400), "b": (400, 400)})
    masks = jp.select(jp.scores.magnitude(params), sparsity)
    params = jax.tree.map(lambda w: w.astype(dtype), jp.apply_masks(params, masks))
    jp.masks.save(tmp_path / "file", params, masks)
    kept = sum(int(m.sum()) for m in masks.values())
    size = kept * jnp.dtype(dtype).itemsize + 2 * 400 * 400 / 8
    assert size < (tmp_path / "file").stat().st_size <= 1.05 * size


def test_the_safetensors_library_reads_and_writes_it(tmp_path, model):
    jp.masks.save(tmp_path / "file", *model)
    with safe_open(tmp_path / "file", "flax") as file:
        metadata, found = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}
    kernel, mask = model[0]["dense"]["kernel"], model[1]["dense"]["kernel"]
    assert found["dense/kernel/values"].tolist() == kernel[mask].tolist()
    assert found["dense/kernel/bitmap"].tolist() == np.packbits(mask).tolist()
    assert found["dense/bias"].shape == (10,) and metadata["version"] == "1"
    save_file(dict(sorted(found.items())), tmp_path / "again", metadata)
    assert bits(jp.masks.load(tmp_path / "again", model[0])) == bits(model)


def test_tensors_are_aligned(tmp_path, model):
    jp.masks.save(tmp_path / "file", *model)
    data = (tmp_path / "file").read_bytes()
    header = fuzz_files.parts(data)[0]
    assert int.from_bytes(data[:8], "little") % 8 == 0
    for name, entry in header.items():
        if name != "__metadata__":
            assert (
                entry["data_offsets"][0] % np.dtype(safetensors.DTYPES[entry["dtype"]]).itemsize
                == 0
            )


@auto_and_explicit
def test_sharded_leaves_load_onto_another_mesh(tmp_path, kind):
    params = {"w": jnp.arange(64.0).reshape(8, 8), "b": jnp.ones(8)}
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    params = jp.apply_masks(params, masks)
    jp.masks.save(tmp_path / "file", *place((params, masks), mesh(kind, x=8), P("x")))
    other = mesh(kind, a=2, b=4)
    shardings = {"w": NamedSharding(other, P("b", "a")), "b": NamedSharding(other, P("a"))}
    like = jax.tree.map(
        lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), params, shardings
    )
    loaded = jp.masks.load(tmp_path / "file", like)
    assert bits(loaded) == bits((params, masks))
    for tree in loaded:
        for name, w in tree.items():
            assert w is None or w.sharding == shardings[name]


def test_a_mesh_that_cannot_hold_a_leaf_is_named(tmp_path):
    params, masks = {"w": jnp.ones((6, 4))}, {"w": jnp.ones((6, 4), bool)}
    sharding = NamedSharding(mesh(x=4), P("x"))
    like = {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32, sharding=sharding)}
    jp.masks.save(tmp_path / "file", params, masks)
    with pytest.raises(ValueError, match="file: w: its mesh cannot hold this leaf .*by `None` in"):
        jp.masks.load(tmp_path / "file", like)
    with pytest.raises(ValueError, match="^w: its mesh cannot hold this leaf of shape .6, 4.: "):
        jp.masks.unpack(jp.masks.pack(masks), like)
    with pytest.raises(ValueError, match="^w: its mesh cannot hold this leaf of shape .6, 4.: "):
        jp.masks.pack(like)  # before Orbax would say so of no leaf


ONE, HALF = jnp.array([True]), jnp.array([True, False])


SAVES = {  # params and masks that cannot be saved, and the error
    "other paths": ({"a": 1}, {"b": None}, "a: masks have no entry"),
    "floats": ({"w": HALF}, {"w": jnp.ones(2)}, "w: masks must be bool"),
    "not zero": (
        {"w": jnp.ones(2)},
        {"w": HALF},
        "w: masked weights must be zero, got 1 .*apply_masks",
    ),
    "pruned NaN": (
        {"w": jnp.full(1, jnp.nan)},
        {"w": ~ONE},
        "w: masked weights must be zero, got 1",
    ),
    "no array": ({"name": "x"}, None, "name: params to save must be arrays, got str"),
    "abstract": (jax.ShapeDtypeStruct((), "f4"), None, "itself.: params .* got ShapeDtypeStruct"),
    "dtype": (
        {"w": jnp.ones(2, jnp.int4)},
        None,
        "w: the dtype must be one of .*bool.*, got int4",
    ),
    "key": ({"k": jax.random.key(0)}, {"k": ONE[0]}, "k: the mask of a PRNG key must be `None`"),
    "two of a name": ({"a": {"b": 1}, "a/b": 2}, None, "a/b: two leaves have this path"),
    "a taken name": (
        {"a": ONE, "a/values": 2},
        {"a": ONE, "a/values": None},
        "a/values: two tensors",
    ),
    "metadata": ({"__metadata__": 1}, None, "__metadata__: two tensors"),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_refused_save_leaves_the_old_file(tmp_path, name):
    params, masks, words = SAVES[name]
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises((ValueError, TypeError), match=words):
        jp.masks.save(path, params, masks)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, model, monkeypatch, name):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(ValueError, match="file: could not be written .No space left"):
        jp.masks.save(path, *model)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    monkeypatch.undo()
    jp.masks.save(path, *model)
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ValueError, match="the folder .*no does not exist"):
        jp.masks.save(tmp_path / "no" / "file", *model)
    with pytest.raises(ValueError, match="is not a regular file"):
        jp.masks.save(tmp_path, *model)


def metadata(**changes):
    def change(data):
        header, body = fuzz_files.parts(data)
        header["__metadata__"] |= changes
        return fuzz_files.joined(header, body)

    return change


def flipped(data):
    """Flips a bit of the last kept weight of the kernel."""
    header, body = fuzz_files.parts(data)
    body = bytearray(body)
    body[header["dense/kernel/values"]["data_offsets"][1] - 1] ^= 1
    return fuzz_files.joined(header, body)


LOADS = {  # a change of a file, and the error
    "cut short": (lambda data: data[:-1], "truncated or damaged"),
    "empty": (lambda data: b"", "not a safetensors file"),
    "pickle": (lambda data: b"cos\nsystem\n(S'exit'\ntR.", "not a safetensors file"),
    "a flipped bit": (flipped, "is damaged: its contents do not match"),
    "checksum": (metadata(checksum="0" * 64), "is damaged: .* its checksum"),
    "newer": (metadata(version="2"), "format must be '1', got '2'.*upgrade jaxprune"),
    "another format": (metadata(format="pt"), "must be a file that `jp.masks.save` wrote"),
    "shapes": (metadata(shapes="[1"), "metadata must have 'shapes', a JSON object"),
    "keys": (metadata(keys="[]"), "metadata must have 'keys', a JSON object"),
    "no values": (metadata(shapes='{"a": [2]}'), "'a' must have a shape, values and a bitmap"),
    "a larger shape": (metadata(shapes='{"dense/kernel": [24, 11]}'), "bitmap .* does not fit"),
    "a huge shape": (metadata(shapes='{"dense/kernel": [1%s]}' % ("0" * 30)), "does not fit"),
    "a small shape": (metadata(shapes='{"dense/kernel": [1]}'), "values of 'dense/kernel' are"),
    "a turned shape": (metadata(shapes=json.dumps(
                           {"dense/kernel": [10, 24], "half/0": [8, 16], "empty": [0, 4]})),
                       r"dense/kernel: `like` must have float32 of shape \(10, 24\), .*got"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_damaged_files_are_refused(tmp_path, model, name):
    change, words = LOADS[name]
    path = tmp_path / "file"
    jp.masks.save(path, *model)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=words) as error:
        jp.masks.load(path, model[0])
    assert str(error.value).startswith(f"{path}: ")


def test_a_bitmap_that_keeps_another_number_is_refused(tmp_path, model):
    jp.masks.save(tmp_path / "file", *model)
    data = bytearray((tmp_path / "file").read_bytes())
    header, body = fuzz_files.parts(data)
    start = header["dense/kernel/bitmap"]["data_offsets"][0]
    data[len(data) - len(body) + start] ^= 255
    (tmp_path / "file").write_bytes(fuzz_files.resigned(bytes(data)))
    with pytest.raises(ValueError, match="'dense/kernel' has 21 values, its bitmap keeps"):
        jp.masks.load(tmp_path / "file", model[0])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: {**p, "more": 1}, "more: only `like` has this leaf"),
        (lambda p: {**p, "dense": {"bias": p["dense"]["bias"]}}, "dense/kernel: only the file has"),
        (
            lambda p: {**p, "steps": jnp.array(3.0)},
            "steps: `like` must have int32 .* got float32",
        ),
        (
            lambda p: {**p, "empty": jnp.zeros((4, 0))},
            "empty: `like` must have float32 of shape .0, 4",
        ),
        (lambda p: {**p, "rngs": p["rngs"][::-1]}, "rngs/0: .* a threefry2x32 key, .* a rbg key"),
        (lambda p: {**p, "rngs": (jnp.zeros(2, "uint32"), 1)}, "rngs/0: .* a threefry2x32 key, "),
        (
            lambda p: {**p, "flags": jax.random.key(0)},
            "flags: `like` must have bool of .* a threefry",
        ),
    ],
)
def test_another_structure_is_refused(tmp_path, model, change, words):
    jp.masks.save(tmp_path / "file", *model)
    with pytest.raises(ValueError, match="file: " + words):
        jp.masks.load(tmp_path / "file", change(model[0]))


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="missing: No such file"):
        jp.masks.load(tmp_path / "missing", jnp.ones(1))
    with pytest.raises(ValueError, match="must be a file, got a folder. .* Orbax"):
        jp.masks.load(tmp_path, jnp.ones(1))
