"""The file of :func:`jaxprune.masks.save`: the kept weights, and one bit per weight for the masks.

It is a safetensors file. A leaf with a mask becomes two tensors, ``path/values`` and
``path/bitmap``; any other leaf becomes one, under its path. The metadata holds a format, a
version, a checksum, the shapes of the leaves with a mask, and the implementations of PRNG keys.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import _mesh, _tree
from jaxprune._files import safetensors
from jaxprune._files.checkpoint import Checkpoint, FileError, Tensor, check_output
from jaxprune._tree import Masks, Params

FORMAT, VERSION = "jaxprune", "1"
INTERNAL = ("shapes", "keys")  # metadata that `leaves` reads, so that `inspect` need not list them
Digests = dict[str, tuple[Any, ...]]  # tensor -> dtype, shape, hash


class Leaf(NamedTuple):
    """A leaf in a file."""

    path: str
    shape: tuple[int, ...]
    values: Tensor  # its entries; with a mask, only those that are kept
    bitmap: Tensor | None  # its packed mask

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.values.bytes + (self.bitmap.bytes if self.bitmap else 0)


class _NewTensor(NamedTuple):
    """A tensor to write; ``read`` makes its entries only when it is their turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def is_compact(source: Checkpoint) -> bool:
    """Returns whether a checkpoint was written by :func:`write`."""
    return source.format == "safetensors" and source.metadata.get("format") == FORMAT


def leaves(path: Any, source: Checkpoint) -> list[Leaf]:
    """Lists the leaves in a checkpoint; without bitmaps, these are its tensors."""
    if not is_compact(source):
        return [Leaf(t.path, t.shape, t, None) for t in source.tensors]
    if (version := source.metadata.get("version")) != VERSION:
        raise FileError(
            f"{path}: the version of the format must be {VERSION!r}, got {version!r:.20}. If a "
            "newer jaxprune wrote this file, upgrade jaxprune."
        )
    tensors = {t.path: t for t in source.tensors}
    masked = []
    for name, shape in _json_metadata(path, source, "shapes").items():
        values, bitmap = (tensors.pop(f"{name}/{part}", None) for part in ("values", "bitmap"))
        if not safetensors.is_sizes(shape) or values is None or bitmap is None:
            raise _damaged(path, f"{name!r} must have a shape, values and a bitmap")
        size = math.prod(shape)
        if len(values.shape) != 1 or values.packed or values.size > size:
            raise _damaged(path, f"the values of {name!r} are {values.dtype} of {values.shape}")
        if (bitmap.dtype, bitmap.shape) != ("uint8", (-(-size // 8),)):
            raise _damaged(path, f"the bitmap of {name!r} does not fit the shape {tuple(shape)}")
        masked.append(Leaf(name, tuple(shape), values, bitmap))
    return masked + [Leaf(t.path, t.shape, t, None) for t in tensors.values()]


def _json_metadata(path: Any, source: Checkpoint, name: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(contents := json.loads(source.metadata.get(name, "")), dict):
            return contents
    raise _damaged(path, f"its metadata must have {name!r}, a JSON object")


def _damaged(path: Any, message: str) -> FileError:
    return FileError(f"{path}: is damaged: {message}. Copy or save it again.")


def _checksum(metadata: dict[str, str], digests: Digests) -> str:
    """Hashes the contents of a file, in any order of its tensors."""
    contents = [metadata[name] for name in INTERNAL], sorted(digests.items())
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _digest(dtype: str, shape: Sequence[int], entries: np.ndarray) -> tuple[Any, ...]:
    return dtype, list(shape), hashlib.sha256(_bytes(entries)).hexdigest()


def _bytes(entries: np.ndarray) -> memoryview:
    return entries.reshape(-1).view(np.uint8).data


def write(path: str | os.PathLike[str], params: Params, masks: Masks) -> None:
    """Writes params and masks; see :func:`jaxprune.masks.save`."""
    named = _unique_leaves(params)
    aligned = list(zip(named, _tree.align_masks(params, masks), strict=True))
    tensors = [tensor for pair, mask in aligned for tensor in _new_tensors(*pair, mask)]
    shapes = {name: np.shape(leaf) for (name, leaf), mask in aligned if mask is not None}
    implementations = {name: _key_implementation(leaf) for name, leaf in named}
    keys = {name: str(i) for name, i in implementations.items() if i is not None}
    if (twice := safetensors.repeated(["__metadata__", *(t.name for t in tensors)])) is not None:
        raise ValueError(f"{twice}: two tensors of the file would have this name. Rename a leaf.")
    # As the safetensors library does, so that all are aligned.
    tensors.sort(key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    entries = [tensor[:3] for tensor in tensors]
    metadata = {"format": FORMAT, "version": VERSION, "checksum": "0" * 64}
    metadata |= {"shapes": json.dumps(shapes), "keys": json.dumps(keys)}
    check_output(os.fspath(path), "safetensors")
    with safetensors.writing(Path(os.path.realpath(path))) as file:
        safetensors.write_header(file, metadata, entries)
        digests: Digests = {}
        for tensor in tensors:
            array = tensor.read()
            digests[tensor.name] = _digest(tensor.dtype, tensor.shape, array)
            file.write(_bytes(array))
        metadata["checksum"] = _checksum(metadata, digests)
        safetensors.write_header(file, metadata, entries)  # of the same length


def _unique_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = _tree.named_leaves(tree)
    if (twice := safetensors.repeated(name for name, _ in leaves)) is not None:
        raise ValueError(f"{_tree.show(twice)}: two leaves have this path. Rename one.")
    return leaves


def _key_implementation(leaf: Any) -> Any:
    """Returns the implementation of a PRNG key, also an abstract one; `None` for other leaves."""
    implementations: list[Any] = [None]
    if jax.dtypes.issubdtype(_tree.dtype(leaf), jax.dtypes.prng_key):
        jax.eval_shape(lambda key: implementations.append(jax.random.key_impl(key)), leaf)
    return implementations[-1]


def _new_tensors(name: str, leaf: Any, mask: Any) -> Iterator[_NewTensor]:
    """Yields the tensor of a leaf, or its values and its bitmap."""
    path = _tree.show(name)
    if not isinstance(leaf, _tree.ARRAYS) or isinstance(leaf, jax.ShapeDtypeStruct):
        kind = type(leaf).__name__
        raise TypeError(f"{path}: params to save must be arrays, got {kind}. Save it separately.")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"{path}: the leaf must be on one process, got a part. Save with Orbax.")
    if _key_implementation(leaf) is not None:
        leaf = jax.random.key_data(leaf)  # type: ignore[arg-type]
    shape, dtype = np.shape(leaf), np.dtype(_tree.dtype(leaf)).name
    if dtype not in safetensors.DTYPES.values():
        names = ", ".join(safetensors.DTYPES.values())
        raise TypeError(f"{path}: the dtype must be one of {names}, got {dtype}. Use `astype`.")
    if mask is None:
        yield _NewTensor(name, dtype, shape, lambda: np.asarray(leaf, dtype))
        return
    if np.shape(mask) != shape:
        raise ValueError(f"{path}: the mask of a PRNG key must be `None`, got {np.shape(mask)}.")
    kept = int(np.count_nonzero(np.asarray(mask)))

    def values() -> np.ndarray:
        entries = np.asarray(leaf, dtype)
        values = entries[np.asarray(mask)]
        if lost := int(np.count_nonzero(entries) - np.count_nonzero(values)):
            raise ValueError(
                f"{path}: masked weights must be zero, got {lost} that are not and would be lost. "
                "Save `jp.apply_masks(params, masks)`."
            )
        return values

    yield _NewTensor(f"{name}/values", dtype, (kept,), values)
    size = -(-math.prod(shape) // 8)
    yield _NewTensor(f"{name}/bitmap", "uint8", (size,), lambda: np.packbits(np.asarray(mask)))


def read(path: str | os.PathLike[str], like: Params) -> tuple[Params, Masks]:
    """Reads params and masks; see :func:`jaxprune.masks.load`."""
    targets = dict(_unique_leaves(like))
    if os.path.isdir(path):
        raise FileError(f"{path}: must be a file, got a folder. Restore a folder with Orbax.")
    with safetensors.opened(os.fspath(path)) as source:
        if not is_compact(source):
            raise FileError(
                f"{path}: must be a file that `jp.masks.save` wrote, got another safetensors file. "
                "Read it with the safetensors library."
            )
        stored = {leaf.path: leaf for leaf in leaves(path, source)}
        keys = _json_metadata(path, source, "keys")
        if lone := targets.keys() ^ stored.keys():
            name = sorted(lone)[0]
            owner = "the file" if name in stored else "`like`"
            raise FileError(
                f"{path}: {_tree.show(name)}: only {owner} has this leaf; the file has "
                f"{sorted(stored)[:10]}. Pass `like` with the structure that was saved."
            )
        for name, leaf in stored.items():
            _check_like(path, leaf, targets[name], keys.get(name))
        digests: Digests = {}
        params, masks = [], []
        for name, target in targets.items():  # placed one by one, so the host holds only one leaf
            entries, mask = _read_leaf(path, stored[name], digests)
            params.append(_placed(entries, target, keys.get(name)))
            masks.append(None if mask is None else _placed(mask, target))
        if source.metadata.get("checksum") != _checksum(source.metadata, digests):
            raise _damaged(path, "its contents do not match its checksum")
    return _tree.rebuild(like, params), _tree.rebuild(like, masks)


def _check_like(path: Any, leaf: Leaf, target: Any, key: Any) -> None:
    """Checks that a leaf of ``like`` has the dtype and shape of the leaf that is stored."""
    place = f"{path}: {_tree.show(leaf.path)}"
    _mesh.check_held(place, target)
    implementation = _key_implementation(target)
    if implementation is not None:
        target = jax.eval_shape(jax.random.key_data, target)
    dtype = np.dtype(_tree.dtype(target)).name
    stored = _spelled(leaf.values.dtype, leaf.shape, key)
    given = _spelled(dtype, np.shape(target), implementation)
    if stored != given:
        raise FileError(
            f"{place}: `like` must have {stored}, as the file does, got {given}. Pass `like` with "
            "the shapes and dtypes that were saved."
        )
    canonical = jax.dtypes.canonicalize_dtype(dtype)
    if isinstance(target, jax.Array | jax.ShapeDtypeStruct) and canonical != dtype:
        raise FileError(
            f"{place}: JAX would convert {dtype} to {canonical}. Enable `jax_enable_x64`, or pass "
            "a NumPy array in `like`."
        )


def _spelled(dtype: str, shape: tuple[int, ...], key: Any) -> str:
    return f"{dtype} of shape {shape}" + ("" if key is None else f", a {key!s:.60} key")


def _read_leaf(path: Any, leaf: Leaf, digests: Digests) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the dense entries of a leaf and its mask, and adds their digests."""

    def read(tensor: Tensor) -> np.ndarray:
        entries = tensor.read(0, tensor.size)
        digests[tensor.path] = _digest(tensor.dtype, tensor.shape, entries)
        return entries.astype(bool) if tensor.dtype == "bool" else entries

    values = read(leaf.values)
    if leaf.bitmap is None:
        return values.reshape(leaf.shape), None
    mask = np.unpackbits(read(leaf.bitmap), count=leaf.size).view(bool).reshape(leaf.shape)
    if (kept := int(np.count_nonzero(mask))) != values.size:
        raise _damaged(path, f"{leaf.path!r} has {values.size:,} values, its bitmap keeps {kept:,}")
    dense = np.zeros(leaf.shape, values.dtype)
    dense[mask] = values
    return dense, mask


def _placed(entries: np.ndarray, target: Any, key: Any = None) -> Any:
    """Puts entries on the host or on devices, as a leaf of ``like`` is."""
    if not hasattr(target, "shape"):
        return entries.item()
    if isinstance(target, np.ndarray | np.generic):
        return entries
    if key:
        data = jax.numpy.asarray(entries)
        return _mesh.place(jax.random.wrap_key_data(data, impl=_key_implementation(target)), target)
    return jax.numpy.asarray(_mesh.place(entries, target))  # an entire leaf may not fit one device
