"""Fuzzes the files of `jp.masks.save`: ``python tests/fuzz_files.py --cases 10000``.

Half of the cases are round trips of random trees. The other half are damaged files, which must be
refused or load to the params and masks that were saved.
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes  # noqa: F401  # names its types to NumPy
import numpy as np
from helpers import bits

import jaxprune as jp
from jaxprune._files import compact, safetensors

DTYPES = [name for name in safetensors.DTYPES.values() if name != "float8_e8m0fnu"]  # has no zero
seeds = st.integers(0, 2**32 - 1)


@st.composite
def trees(draw):
    """Draws masks, and params of random bits, which include NaN, infinity and -0."""
    params, masks = {}, {}
    for name in draw(st.lists(st.sampled_from(["a", "b", "ключ", "c/d"]), unique=True, min_size=1)):
        shape = draw(st.lists(st.integers(0, 6), max_size=3))
        rng, dtype = np.random.default_rng(draw(seeds)), np.dtype(draw(st.sampled_from(DTYPES)))
        bits = rng.integers(0, 256, [int(np.prod(shape)), dtype.itemsize], np.uint8)
        leaf = (bits % 2 if dtype.kind == "b" else bits).view(dtype).reshape(shape)
        density = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
        mask = None if density is None else rng.random(shape) < density
        params[name] = leaf if mask is None else np.where(mask, leaf, np.zeros((), dtype))
        masks[name] = mask
    return {"layer": params, "last": [params.pop("b", np.float32(1))]}, {
        "layer": masks,
        "last": [masks.pop("b", None)],
    }


def parts(data):
    """Splits a file into its header and the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def resigned(data):
    """Corrects the checksum, if there is one."""
    try:
        header, body = parts(data)
        metadata = header.pop("__metadata__")
        digests = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype = safetensors.DTYPES[entry["dtype"]]
            entries = np.frombuffer(body[start:stop], np.uint8)
            digests[name] = compact._digest(dtype, entry["shape"], entries)
        metadata["checksum"] = compact._checksum(metadata, digests)
        return joined({"__metadata__": metadata, **header}, body)
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError):
        return data


NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**62, 2**64, 10**30, 1.0, True, None, "1", [], {}]),
)


@st.composite
def lies(draw, data):
    """Draws a file with a wrong header."""
    header, body = parts(data)
    metadata, names = header["__metadata__"], [n for n in header if n != "__metadata__"]
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    entry = header[name]
    kind = draw(
        st.sampled_from("dtype shape dim offset swap rename drop more metadata table".split())
    )
    if kind == "dtype":
        kinds = [*safetensors.DTYPES, *safetensors.PACKED, "F31", 3, None]
        entry["dtype"] = draw(st.sampled_from(kinds))
    elif kind == "shape":
        entry["shape"] = draw(st.one_of(NUMBERS, st.lists(NUMBERS, max_size=4)))
    elif kind == "dim" and entry["shape"]:
        entry["shape"][draw(st.integers(0, len(entry["shape"]) - 1))] = draw(NUMBERS)
    elif kind == "offset":
        entry["data_offsets"][draw(st.integers(0, 1))] = draw(NUMBERS)
    elif kind == "swap":
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        entry[key], header[other][key] = header[other][key], entry[key]
    elif kind == "rename":
        header[draw(st.sampled_from([other, "new", "", "../x", "a/values"]))] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "more":
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
    elif kind == "metadata":
        key = draw(st.sampled_from([*metadata, "new"]))
        values = ["", "0", "2", "10", "jaxprune", "{}", "[]", "null", "[" * 9999, 3, None, {}]
        metadata[key] = draw(st.sampled_from(values))
    else:
        key = draw(st.sampled_from(compact.INTERNAL))
        table = json.loads(metadata[key])
        table[draw(st.sampled_from([*table, name, "new"]))] = draw(
            st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3))
        )
        metadata[key] = json.dumps(table)
    return joined(header, body)


@st.composite
def damages(draw, data):
    """Draws a kind of damage, and the bytes of the damaged file."""
    kind = draw(
        st.sampled_from("cut flip flip overwrite insert delete length lie lie resign".split())
    )
    at = draw(st.integers(0, len(data) - 1))
    noise = draw(st.binary(min_size=1, max_size=16))
    if kind == "cut":
        return kind, data[:at]
    if kind == "flip":
        flipped = bytearray(data)
        for place in [at, *draw(st.lists(st.integers(0, len(data) - 1), max_size=2))]:
            flipped[place] ^= 1 << draw(st.integers(0, 7))
        return kind, bytes(flipped)
    if kind == "overwrite":
        return kind, data[:at] + noise + data[at + len(noise) :]
    if kind == "insert":
        return kind, data[:at] + noise + data[at:]
    if kind == "delete":
        return kind, data[:at] + data[at + len(noise) :]
    if kind == "length":
        length = draw(st.one_of(st.integers(0, len(data)), st.integers(0, 2**64 - 1)))
        return kind, length.to_bytes(8, "little") + data[8:]
    if kind == "lie":
        return kind, draw(lies(data))
    return kind, resigned(draw(st.one_of(lies(data), damages(data).map(lambda d: d[1]))))


def check_round_trip(path, tree):
    params, masks = tree
    jp.masks.save(path, params, masks)
    assert bits(jp.masks.load(path, params)) == bits(tree)


def check_damaged(path, tree, kind, data):
    """Returns whether a damaged file is refused; if not, checks what it loads to."""
    Path(path).write_bytes(data)
    try:
        loaded = jp.masks.load(path, tree[0])
    except ValueError as error:  # one raised by NumPy or JSON would not name the file
        assert str(error).startswith(f"{path}: "), error
        return True
    if kind == "resign":  # a valid file of other weights
        assert [w[:2] for w in bits(loaded[0])[1]] == [w[:2] for w in bits(tree[0])[1]]
        leaves = [jax.tree.leaves(t, is_leaf=lambda m: m is None) for t in loaded]
        assert not any((w[~m] != 0).any() for w, m in zip(*leaves, strict=True) if m is not None)
    else:
        assert bits(loaded) == bits(tree)
    return False


def settings(count):
    """Runs this many cases without a time limit."""
    return hypothesis.settings(
        max_examples=count, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip


def fuzz(path, cases):
    """Runs half of the cases as round trips, and half on damaged files; returns their counts."""
    counts = collections.Counter()

    @settings(cases // 2)
    @hypothesis.given(trees())
    def round_trips(tree):
        check_round_trip(path, tree)
        counts["round trip"] += 1

    @settings(cases - cases // 2)
    @hypothesis.given(trees(), st.data())
    def damaged(tree, data):
        jp.masks.save(path, *tree)
        kind, damage = data.draw(damages(Path(path).read_bytes()))
        refused = check_damaged(path, tree, kind, damage)
        counts[f"{kind} {'refused' if refused else 'loaded'}"] += 1

    round_trips()
    damaged()
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    cases, start = parser.parse_args().cases, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(f"{folder}/model.safetensors", cases)
    for result, count in sorted(counts.items()):
        print(f"{result:20} {count:8,}")
    print(f"{sum(counts.values()):,} cases in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
