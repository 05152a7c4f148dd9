"""The safetensors format: the only module that reads or writes its headers.

::

    ┌─────────────────┬───────────────────┬──────────┬──────────┬───
    │ length, 8 bytes │ header, as JSON   │ tensor 0 │ tensor 1 │ …
    └─────────────────┴───────────────────┴──────────┴──────────┴───
      little-endian     {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, …}

Pruning changes nothing that the header states, so :func:`opened` saves copies with the same header.
"""

import collections
import contextlib
import io
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxprune._files.checkpoint import Checkpoint, Edit, FileError, Tensor, Tick, reason, saving

_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_COPY = 1 << 22  # bytes that are copied at a time
DTYPES = {
    "BOOL": "bool", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "C64": "complex64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # bits; several share a byte: read as bytes
_KINDS = {name: kind for kind, name in DTYPES.items()}
Entry = dict[str, Any]  # of a header: dtype, shape, data_offsets, which count from its end


@contextlib.contextmanager
def opened(path: str, tick: Tick = lambda size: None) -> Iterator[Checkpoint]:
    """Opens a safetensors file, and calls ``tick`` with the size of every read."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        fix = "Pass a safetensors file or an Orbax checkpoint folder."
        raise FileError(f"{path}: {reason(error)}. {fix}") from None
    if not stat.S_ISREG(mode):  # a pipe can be read only once
        raise FileError(f"{path}: is not a regular file. Copy its contents to a file first.")
    with open(path, "rb") as file:
        header, entries, metadata = read_header(path, file)
        tensors = [_tensor(file, len(header), *item, tick) for item in entries.items()]

        def save(out: Path, edit: Edit) -> None:
            with writing(out) as copy:
                copy.write(header)
                for tensor in tensors:
                    start, pieces = entries[tensor.path]["data_offsets"][0], edit(tensor)
                    for first, array in _unchanged(tensor) if pieces is None else pieces:
                        copy.seek(len(header) + start + first * array.itemsize)
                        copy.write(array.view(np.uint8).data)

        yield Checkpoint("safetensors", tensors, metadata, save)


def _tensor(file: io.BufferedReader, offset: int, name: str, entry: Entry, tick: Tick) -> Tensor:
    kind, shape, (first, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    packed = kind in PACKED
    dtype = np.dtype("uint8" if packed or kind == "BOOL" else DTYPES[kind])

    def read(start: int, stop: int) -> np.ndarray:
        array = np.empty((stop - start) * dtype.itemsize, np.uint8)
        file.seek(offset + first + start * dtype.itemsize)
        if file.readinto(array.data) < array.size:
            raise FileError(f"{file.name}: became shorter while it was read.")
        tick(array.size)
        return array.view(dtype)

    size = (end - first) // dtype.itemsize
    kind = kind if packed else DTYPES[kind]
    return Tensor(file.name, name, kind, shape, dtype, size, read, packed)


def _unchanged(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    step = _COPY // tensor.entries.itemsize
    for start in range(0, tensor.size, step):
        yield start, tensor.read(start, min(start + step, tensor.size))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces the one at ``path`` at the end, and keeps its permissions."""
    with saving(path) as new, open(new, "xb") as file:
        yield file
        file.flush()
        if os.path.exists(path):
            shutil.copymode(path, new)
        os.fsync(file.fileno())


def write_header(
    file: BinaryIO, metadata: dict[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
) -> None:
    """Writes a header for tensors ``(name, dtype, shape)`` that follow without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, dtype, shape in tensors:
        start, stop = stop, stop + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _KINDS[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)


def read_header(path: str, file: BinaryIO) -> tuple[bytes, dict[str, Entry], dict[str, str]]:
    """Reads a header and checks it; returns its bytes, its entries by position, its metadata."""
    total = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(total - 8, _HEADER):
        message = f"its {total:,} bytes do not contain a header of at most {_HEADER:,} bytes"
        raise FileError(f"{path}: is not a safetensors file, or is truncated: {message}.")
    text = file.read(length)
    contents = _json_object(path, text)
    metadata = contents.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ must map strings to strings.")
    space = total - 8 - length
    for name, entry in contents.items():
        _check_entry(path, name, entry, space)
    entries = dict(sorted(contents.items(), key=lambda item: item[1]["data_offsets"]))
    end = 0
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        if start != end:
            fault = "overlaps" if start < end else "leaves a gap after"
            message = f"{fault} the previous one, at byte {start:,}"
            raise FileError(f"{path}: the tensor {name!r} {message}.")
        end = stop
    if end != space:
        message = f"describes {end:,} bytes of tensors, but {space:,} bytes follow it"
        raise FileError(f"{path}: the header {message}.")
    return prefix + text, entries, metadata


def _json_object(path: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (name := repeated(name for name, _ in pairs)) is not None:
            raise ValueError(f"it has the key {name!r} twice")
        return dict(pairs)

    try:
        contents = json.loads(text.decode(), object_pairs_hook=unique)
        if not isinstance(contents, dict):
            raise ValueError(f"it is a {type(contents).__name__}")
        return contents
    except (ValueError, RecursionError) as error:
        message = f"its header is not a JSON object with unique keys ({reason(error)})"
        raise FileError(f"{path}: is not a safetensors file: {message}.") from None


def _check_entry(path: str, name: str, entry: Any, space: int) -> None:
    """Checks the header entry of one tensor; ``space`` bytes follow the header."""
    place = f"{path}: the header entry of {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{place} must have dtype, shape and data_offsets, and nothing else.")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in (*DTYPES, *PACKED):
        raise FileError(f"{place} has the unknown dtype {kind!r:.60}. Upgrade jaxprune.")
    for word, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not is_sizes(numbers):
            message = f"{word} must be a list of whole numbers, got {numbers!r:.60}"
            raise FileError(f"{place}: {message}.")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= space:
        raise FileError(
            f"{place}: data_offsets must lie within the {space:,} bytes after the header, got "
            f"{offsets!r:.60}. The file is truncated or damaged; copy or save it again."
        )
    bits = PACKED.get(kind) or 8 * np.dtype(DTYPES[kind]).itemsize
    size = offsets[1] - offsets[0]
    if bits * math.prod(shape) != 8 * size:
        message = f"{size:,} bytes, which do not hold {kind} of shape {shape!r:.60}"
        raise FileError(f"{place} has {message}.")


def is_sizes(numbers: Any) -> bool:
    """Returns whether a JSON value is a list of whole numbers."""
    return isinstance(numbers, list) and all(type(i) is int and i >= 0 for i in numbers)


def repeated(names: Iterable[str]) -> str | None:
    """Returns the first name that occurs more than once, or `None`."""
    counts = collections.Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)
