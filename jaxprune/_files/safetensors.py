"""Checkpoints on disk, a piece at a time: safetensors files and Orbax folders.

A safetensors file is an eight-byte length, a JSON header of that length, and the tensors one after
another. Pruning changes none of what the header says, so it is copied as it is.
"""

import contextlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree

_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_COPY = 1 << 22
_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
_PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # bits; several to a byte, so read as bytes

Edit = Callable[["Tensor"], "Iterable[tuple[int, np.ndarray]] | None"]


class FileError(ValueError):
    """What is wrong with a file or a request, in one line."""


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      path: its name.
      dtype: the name of its dtype.
      shape: its shape.
      entries: the dtype of what ``read`` gives: uint8, for bool and what is packed.
      size: how many of them there are.
      read: gives entries ``start`` to ``stop`` of the flat tensor, as a new array.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    entries: np.dtype
    size: int
    read: Callable[[int, int], np.ndarray]

    @property
    def bytes(self) -> int:
        return self.size * self.entries.itemsize

    @property
    def packed(self) -> bool:
        return self.dtype in _PACKED

    @property
    def prunable(self) -> bool:
        """Says whether these are weights: floating, in two or more axes, of a type with a zero."""
        floating = jnp.issubdtype(self.entries, jnp.floating) and self.dtype != "float8_e8m0fnu"
        return floating and len(self.shape) >= 2 and self.size > 0


class Checkpoint(NamedTuple):
    """An open file or folder.

    Attributes:
      format: ``"safetensors"`` or ``"orbax"``.
      tensors: in the order of the file.
      metadata: what the file says about itself.
      save: writes a copy; of a tensor for which ``edit`` is not `None`, what that gives.
    """

    format: str
    tensors: list[Tensor]
    metadata: dict[str, Any]
    save: Callable[[Path, Edit], None]

    def ordered(self) -> list[Tensor]:
        """Lists the tensors in the order of the leaves of a tree."""
        if self.format == "orbax":
            return self.tensors
        return sorted(self.tensors, key=lambda t: t.path)


@contextlib.contextmanager
def opened(path: str, tick: Callable[[int], object] = lambda n: None) -> Iterator[Checkpoint]:
    """Opens what lies at a path; ``tick`` hears of every byte read.

    Raises:
      FileError: if that is neither a safetensors file nor an Orbax checkpoint.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path}: {_reason(error)}; needed a file or a checkpoint folder."
        ) from None
    if stat.S_ISDIR(mode):
        yield _open_orbax(path, tick)
    elif stat.S_ISREG(mode):
        with open(path, "rb") as file:
            yield _open_safetensors(path, file, tick)
    else:
        raise FileError(f"{path}: is no regular file; needed one that can be read more than once.")


def check_output(path: str, format: str) -> None:
    """Raises a `FileError` where a checkpoint cannot, or should not, be written."""
    out = Path(os.path.realpath(path))
    if not out.parent.is_dir():
        raise FileError(f"{path}: there is no folder {out.parent}; make it first.")
    if format == "safetensors" and out.exists() and not out.is_file():
        raise FileError(f"{path}: is no regular file, so it is not replaced; name another.")
    if format == "orbax" and out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / "_METADATA").exists()):
            raise FileError(
                f"{path}: is no Orbax checkpoint, so it is not replaced; name a new folder."
            )


@contextlib.contextmanager
def replacing(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path that takes the place of ``out`` in the end, and is gone after an error."""
    out = Path(os.path.realpath(out))
    beside = out.parent / f".jaxprune-{secrets.token_hex(8)}"
    new, old = beside / "new", beside / "old"
    try:
        beside.mkdir()
        yield new
        if out.is_dir():  # a folder cannot be replaced in one step
            os.rename(out, old)
        os.replace(new, out)
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        if beside.exists():
            shutil.rmtree(beside)


@contextlib.contextmanager
def saving(out: Path) -> Iterator[Path]:
    """Like :func:`replacing`, and what the system refuses is a `FileError`."""
    try:
        with replacing(out) as new:
            yield new
    except OSError as error:
        raise FileError(
            f"{out}: could not be written ({_reason(error)}); nothing changed."
        ) from None


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


def _open_safetensors(
    path: str, file: io.BufferedReader, tick: Callable[[int], object]
) -> Checkpoint:
    total = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(total - 8, _HEADER):
        raise FileError(
            f"{path}: not a safetensors file, or a truncated one: its {total:,} bytes have no "
            f"header of at most {_HEADER:,}."
        )
    header = file.read(length)
    entries, metadata = _parse(path, header, total - 8 - length)

    def reader(first: int, dtype: np.dtype) -> Callable[[int, int], np.ndarray]:
        def read(start: int, stop: int) -> np.ndarray:
            array = np.empty((stop - start) * dtype.itemsize, np.uint8)
            file.seek(first + start * dtype.itemsize)
            if file.readinto(array.data) < array.size:
                raise FileError(f"{path}: became shorter while it was read.")
            tick(array.size)
            return array.view(dtype)

        return read

    tensors = []
    for name, kind, shape, first, stop in entries:
        dtype = np.dtype("uint8" if kind in ("BOOL", *_PACKED) else _DTYPES[kind])
        read = reader(8 + length + first, dtype)
        size = (stop - first) // dtype.itemsize
        tensors.append(Tensor(name, _DTYPES.get(kind, kind), shape, dtype, size, read))

    def save(out: Path, edit: Edit) -> None:
        with saving(out) as new:
            with open(new, "xb") as target:
                target.write(start + header)
                for tensor, (*_, first, _stop) in zip(tensors, entries, strict=True):
                    pieces = edit(tensor)
                    for at, values in _whole(tensor) if pieces is None else pieces:
                        target.seek(8 + length + first + at * tensor.entries.itemsize)
                        target.write(values.view(np.uint8).data)
                target.flush()
                if os.path.exists(out):
                    shutil.copymode(out, new)
                os.fsync(target.fileno())

    return Checkpoint("safetensors", tensors, metadata, save)


def _whole(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    step = _COPY // tensor.entries.itemsize
    for start in range(0, tensor.size, step):
        yield start, tensor.read(start, min(start + step, tensor.size))


def _parse(
    path: str, header: bytes, space: int
) -> tuple[list[tuple[str, str, tuple[int, ...], int, int]], dict[str, str]]:
    """Reads a header, and checks all that it says against the ``space`` for tensors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FileError(f"{path}: the header has the key {twice!r} twice.")
        return found

    try:
        found = json.loads(header.decode(), object_pairs_hook=unique)
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: not a safetensors file: its header is no JSON object ({_reason(error)})."
        ) from None
    if not isinstance(found, dict):
        raise FileError(f"{path}: not a safetensors file: its header is no JSON object.")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ must map text to text.")
    entries = []
    for name, entry in found.items():
        said = f"{path}: the header entry of {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise FileError(f"{said} must have dtype, shape and data_offsets, and no more.")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in (*_DTYPES, *_PACKED):
            raise FileError(f"{said} has the dtype {kind!r:.60}, which is unknown.")
        for word, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(type(i) is int and i >= 0 for i in numbers):
                raise FileError(f"{said} needs whole numbers as {word}, got {numbers!r:.60}.")
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= space:
            raise FileError(
                f"{said} has data_offsets {offsets!r:.60}, but {space:,} bytes follow the header: "
                "the file is truncated or damaged."
            )
        each = _PACKED.get(kind) or 8 * np.dtype(_DTYPES[kind]).itemsize
        if each * math.prod(shape) != 8 * (offsets[1] - offsets[0]):
            raise FileError(
                f"{said} has {offsets[1] - offsets[0]:,} bytes, which is not {kind} of shape "
                f"{shape!r:.60}."
            )
        entries.append((name, kind, tuple(shape), *offsets))
    entries.sort(key=lambda entry: entry[3:])
    end = 0
    for name, _, _, first, stop in entries:
        if first != end:
            word = "overlaps the one before it" if first < end else "leaves a gap before it"
            raise FileError(f"{path}: the tensor {name!r} {word}, at byte {first:,}.")
        end = stop
    if end != space:
        raise FileError(
            f"{path}: the header accounts for {end:,} bytes of tensors, but {space:,} follow."
        )
    return entries, metadata


@contextlib.contextmanager
def _quiet(path: str) -> Iterator[None]:
    """Makes one line of whatever Orbax has to say."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:
        raise FileError(
            f"{path}: Orbax could not use this checkpoint ({_reason(error)})."
        ) from None
    finally:
        logger.setLevel(level)


def _open_orbax(path: str, tick: Callable[[int], object]) -> Checkpoint:
    folder = Path(path).absolute()
    if not (folder / "_METADATA").exists():
        inner = sorted(p.parent for n in ("*", "*/*") for p in folder.glob(f"{n}/_METADATA"))
        fix = f"; name the one inside, {inner[-1]}." if inner else "."
        raise FileError(f"{path}: this folder is no Orbax checkpoint of a tree{fix}")
    import orbax.checkpoint as ocp  # slow to import, and not needed for files

    with _quiet(path):
        checkpointer = ocp.PyTreeCheckpointer()
        found: Any = checkpointer.metadata(folder)
        args = jax.tree.map(
            # NumPy needs no devices like those that wrote the checkpoint; text has no storage
            lambda leaf: ocp.RestoreArgs(np.ndarray if getattr(leaf, "storage", None) else None),
            found.item_metadata.tree,
        )
        tree = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))
        names = [leaf.name for leaf in jax.tree.leaves(found.item_metadata.tree)]
        keys = _random_keys(folder)

    def reader(flat: np.ndarray) -> Callable[[int, int], np.ndarray]:
        def read(start: int, stop: int) -> np.ndarray:
            tick((stop - start) * flat.itemsize)
            return flat[start:stop].copy()

        return read

    tensors, places = [], {}
    for place, (name, leaf) in enumerate(_tree.named_leaves(tree)):
        array = np.asarray(leaf)
        if array.dtype.kind not in "OSU":  # text stays what it is
            flat = np.ascontiguousarray(array).reshape(-1)
            flat = flat.view(np.uint8) if array.dtype == bool else flat
            dtype = array.dtype.name
            tensors.append(Tensor(name, dtype, array.shape, flat.dtype, flat.size, reader(flat)))
            places[name] = place

    def save(out: Path, edit: Edit) -> None:
        leaves, treedef = jax.tree.flatten(tree)
        for tensor in tensors:
            pieces = edit(tensor)
            if pieces is not None:
                flat = np.empty(tensor.size, tensor.entries)
                for at, values in pieces:
                    flat[at : at + len(values)] = values
                leaves[places[tensor.path]] = flat.reshape(tensor.shape)
        with saving(out) as new, _quiet(path):
            pairs = zip(names, leaves, strict=True)
            leaves = [
                jax.random.wrap_key_data(w, impl=keys[n]) if n in keys else w for n, w in pairs
            ]
            save_args = ocp.args.PyTreeSave(
                jax.tree.unflatten(treedef, leaves),
                custom_metadata=found.item_metadata.custom_metadata,
            )
            checkpointer.save(new, save_args, custom_metadata=found.custom_metadata or None)

    metadata = {**(found.custom_metadata or {}), **(found.item_metadata.custom_metadata or {})}
    return Checkpoint("orbax", tensors, metadata, save)


def _random_keys(folder: Path) -> dict[str, str]:
    """Maps the names of PRNG keys to their kind: as NumPy arrays they are their data alone."""
    kinds = {}
    for file in folder.glob("array_metadatas/*"):
        for entry in json.loads(file.read_text())["array_metadatas"]:
            about = entry["array_metadata"]
            kinds[about["param_name"]] = (about["ext_metadata"] or {}).get("random_key_impl")
    return {name: kind for name, kind in kinds.items() if kind}
