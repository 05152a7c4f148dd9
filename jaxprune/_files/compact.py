"""The file of :func:`jaxprune.masks.save`: the kept weights, and one bit per weight for the masks.

It is a safetensors file. A leaf with a mask is two tensors, ``path/values`` and ``path/bitmap``;
any other leaf is one, under its path. The metadata have a format, a version, a checksum, the shapes
of the leaves with a mask, and the kinds of PRNG keys.
"""

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
from jaxprune._files import safetensors as _files
from jaxprune._files.safetensors import Checkpoint, FileError, Tensor

FORMAT, VERSION = "jaxprune", "1"
INTERNAL = ("shapes", "keys")  # metadata that the list of leaves shows
_KINDS = {name: kind for kind, name in _files._DTYPES.items()}


class Leaf(NamedTuple):
    """A leaf in a file: its entries, or those that a mask kept.

    Attributes:
      path: its path.
      shape: that of the leaf.
      values: the tensor of its entries.
      bitmap: the tensor of its packed mask, if it has one.
    """

    path: str
    shape: tuple[int, ...]
    values: Tensor
    bitmap: Tensor | None

    @property
    def bytes(self) -> int:
        return self.values.bytes + (self.bitmap.bytes if self.bitmap else 0)


class _Piece(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def is_compact(source: Checkpoint) -> bool:
    """Says whether a file has kept weights alone."""
    return source.format == "safetensors" and source.metadata.get("format") == FORMAT


def leaves(path: Any, source: Checkpoint) -> list[Leaf]:
    """Lists the leaves in a file; of a file without bitmaps, all tensors.

    Raises:
      FileError: for another version, or where tensors and metadata do not fit.
    """
    if not is_compact(source):
        return [Leaf(t.path, t.shape, t, None) for t in source.tensors]
    version = source.metadata.get("version")
    if version != VERSION:
        raise FileError(
            f"{path}: has version {version!r:.20} of its format, needed {VERSION!r}. If a newer "
            "jaxprune wrote it, upgrade jaxprune."
        )
    shapes = _table(path, source, "shapes")
    tensors = {t.path: t for t in source.tensors}
    found = []
    for name, shape in shapes.items():
        whole = isinstance(shape, list) and all(type(i) is int and i >= 0 for i in shape)
        values, bitmap = (tensors.pop(f"{name}/{part}", None) for part in ("values", "bitmap"))
        if not whole or values is None or bitmap is None:
            raise _damaged(path, f"{name!r} needs a shape, values and a bitmap")
        size = math.prod(shape)
        if len(values.shape) != 1 or values.packed or values.size > size:
            raise _damaged(path, f"the values of {name!r} are {values.dtype} of {values.shape}")
        if (bitmap.dtype, bitmap.shape) != ("uint8", (-(-size // 8),)):
            raise _damaged(path, f"the bitmap of {name!r} does not fit the shape {tuple(shape)}")
        found.append(Leaf(name, tuple(shape), values, bitmap))
    return found + [Leaf(t.path, t.shape, t, None) for t in tensors.values()]


def _table(path: Any, source: Checkpoint, name: str) -> dict[str, Any]:
    try:
        found = json.loads(source.metadata.get(name, ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _damaged(path, f"its metadata need {name!r}, a JSON object")
    return found


def _damaged(path: Any, what: str) -> FileError:
    return FileError(f"{path}: is damaged: {what}. Copy or save it again.")


def _checksum(metadata: dict[str, str], digests: dict[str, tuple[Any, ...]]) -> str:
    """Hashes what the file says, whatever the order of its tensors."""
    said = [metadata[name] for name in INTERNAL], sorted(digests.items())
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _digest(dtype: str, shape: Sequence[int], entries: np.ndarray) -> tuple[Any, ...]:
    return dtype, list(shape), hashlib.sha256(entries.reshape(-1).view(np.uint8).data).hexdigest()


def write(path: str | os.PathLike[str], params: Any, masks: Any) -> None:
    """Writes params and masks; see :func:`jaxprune.masks.save`."""
    pieces: list[_Piece] = []
    shapes: dict[str, list[int]] = {}
    keys: dict[str, str] = {}
    for (name, leaf), mask in zip(_named(params), _tree.align_masks(params, masks), strict=True):
        pieces += _pieces(name, leaf, mask)
        if (kind := _key_kind(leaf)) is not None:
            keys[name] = str(kind)
        if mask is not None:
            shapes[name] = list(np.shape(leaf))
    names = ["__metadata__", *(piece.name for piece in pieces)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice}: this name is needed twice in a file. Rename a leaf.")
    # As the safetensors library does, so that all are aligned.
    pieces.sort(key=lambda piece: -np.dtype(piece.dtype).itemsize)
    metadata = {"format": FORMAT, "version": VERSION, "checksum": "0" * 64}
    metadata |= {"shapes": json.dumps(shapes), "keys": json.dumps(keys)}
    _files.check_output(os.fspath(path), "safetensors")
    with _files.saving(Path(os.path.realpath(path))) as new, open(new, "xb") as target:
        target.write(_header(metadata, pieces))
        digests = {}
        for piece in pieces:
            entries = piece.read()
            digests[piece.name] = _digest(piece.dtype, piece.shape, entries)
            target.write(entries.reshape(-1).view(np.uint8).data)
        metadata["checksum"] = _checksum(metadata, digests)
        target.seek(0)
        target.write(_header(metadata, pieces))
        target.flush()
        if os.path.exists(path):
            os.chmod(new, os.stat(path).st_mode & 0o7777)
        os.fsync(target.fileno())


def _named(tree: Any) -> list[tuple[str, Any]]:
    named = _tree.named_leaves(tree)
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_tree.show(twice)}: two leaves have this path. Rename one.")
    return named


def _key_kind(leaf: Any) -> Any:
    """Gives the kind of a PRNG key, also an abstract one; `None` for other leaves."""
    kinds: list[Any] = [None]
    if jax.dtypes.issubdtype(_tree.dtype(leaf), jax.dtypes.prng_key):
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
    return kinds[-1]


def _pieces(name: str, leaf: Any, mask: Any) -> Iterator[_Piece]:
    if not isinstance(leaf, _tree.ARRAYS) or isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{_tree.show(name)}: params to save must be arrays, got {type(leaf).__name__}."
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"{_tree.show(name)}: other processes hold parts of this leaf. Save with Orbax."
        )
    if _key_kind(leaf) is not None:
        leaf = jax.random.key_data(leaf)  # type: ignore[arg-type]
    shape, dtype = np.shape(leaf), np.dtype(_tree.dtype(leaf)).name
    if dtype not in _KINDS:
        raise TypeError(
            f"{_tree.show(name)}: safetensors has no {dtype}, only {', '.join(_KINDS)}. Convert "
            "the leaf with `astype`."
        )
    if mask is None:
        yield _Piece(name, dtype, shape, lambda: np.asarray(leaf, dtype))
        return
    if np.shape(mask) != shape:
        raise ValueError(f"{_tree.show(name)}: a PRNG key has no weights to mask; use `None`.")
    kept = (int(np.count_nonzero(np.asarray(mask))),)
    yield _Piece(
        f"{name}/values",
        dtype,
        kept,
        lambda: _kept(name, np.asarray(leaf, dtype), np.asarray(mask)),
    )
    bits = (-(-math.prod(shape) // 8),)
    yield _Piece(f"{name}/bitmap", "uint8", bits, lambda: np.packbits(np.asarray(mask)))


def _kept(name: str, entries: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values = entries[mask]
    if lost := int(np.count_nonzero(entries) - np.count_nonzero(values)):
        raise ValueError(
            f"{_tree.show(name)}: {lost} masked weights are not zero, and would be lost. Save "
            "`jp.apply_masks(params, masks)`."
        )
    return values


def _header(metadata: dict[str, str], pieces: Sequence[_Piece]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, _ in pieces:
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _KINDS[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(path: str | os.PathLike[str], like: Any) -> tuple[Any, Any]:
    """Reads params and masks; see :func:`jaxprune.masks.load`."""
    if os.path.isdir(path):
        raise FileError(f"{path}: is a folder, needed a file. Orbax restores its own folders.")
    wanted = dict(_named(like))
    with _files.opened(os.fspath(path)) as source:
        if not is_compact(source):
            raise FileError(
                f"{path}: was not written by `jp.masks.save`. Read it with the safetensors library."
            )
        found = {leaf.path: leaf for leaf in leaves(path, source)}
        keys = _table(path, source, "keys")
        if lone := wanted.keys() ^ found.keys():
            name = sorted(lone)[0]
            where = "the file" if name in found else "`like`"
            raise FileError(
                f"{path}: {_tree.show(name)}: only {where} has this leaf; the file has "
                f"{sorted(found)[:10]}. Load with `like` of the structure that was saved."
            )
        for name, leaf in found.items():
            _check(path, leaf, wanted[name], keys.get(name))
        digests: dict[str, tuple[Any, ...]] = {}
        params, masks = [], []
        for name, leaf in wanted.items():  # placed one by one, so that the host holds no model
            entries, mask = _read(path, found[name], digests)
            params.append(_place(entries, leaf, keys.get(name)))
            masks.append(None if mask is None else _place(mask, leaf))
        if source.metadata.get("checksum") != _checksum(source.metadata, digests):
            raise _damaged(path, "its checksum is not that of what it holds")
    return _tree.rebuild(like, params), _tree.rebuild(like, masks)


def _check(path: Any, leaf: Leaf, like: Any, key: Any) -> None:
    _mesh.check_held(f"{path}: {_tree.show(leaf.path)}", like)
    kind = _key_kind(like)
    if kind is not None:
        like = jax.eval_shape(jax.random.key_data, like)
    found = leaf.values.dtype, leaf.shape, key
    wanted = np.dtype(_tree.dtype(like)).name, np.shape(like), kind and str(kind)
    if found != wanted:
        raise FileError(
            f"{path}: {_tree.show(leaf.path)}: the file has {_spell(*found)}, `like` has "
            f"{_spell(*wanted)}. Load with `like` of the shapes and dtypes that were saved."
        )
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        narrow = jax.dtypes.canonicalize_dtype(wanted[0])
        if narrow != wanted[0]:
            raise FileError(
                f"{path}: {_tree.show(leaf.path)}: JAX would make {narrow} of {wanted[0]}. Enable "
                "`jax_enable_x64`, or give `like` a NumPy array here."
            )


def _spell(dtype: str, shape: tuple[int, ...], kind: Any) -> str:
    return f"{dtype} of shape {shape}" + ("" if kind is None else f", a {kind!s:.60} key")


def _read(
    path: Any, leaf: Leaf, digests: dict[str, tuple[Any, ...]]
) -> tuple[np.ndarray, np.ndarray | None]:
    def entries(tensor: Tensor) -> np.ndarray:
        found = tensor.read(0, tensor.size)
        digests[tensor.path] = _digest(tensor.dtype, tensor.shape, found)
        return found.astype(bool) if tensor.dtype == "bool" else found

    values = entries(leaf.values)
    if leaf.bitmap is None:
        return values.reshape(leaf.shape), None
    size = math.prod(leaf.shape)
    mask = np.unpackbits(entries(leaf.bitmap), count=size).view(bool).reshape(leaf.shape)
    if (kept := int(np.count_nonzero(mask))) != values.size:
        raise _damaged(path, f"{leaf.path!r} has {values.size:,} values, its bitmap keeps {kept:,}")
    dense = np.zeros(leaf.shape, values.dtype)
    dense[mask] = values
    return dense, mask


def _place(entries: np.ndarray, like: Any, key: Any = None) -> Any:
    """Puts entries where ``like`` is: on the host, or as it is sharded."""
    if not hasattr(like, "shape"):
        return entries.item()
    if isinstance(like, np.ndarray | np.generic):
        return entries
    if key:
        data = jax.numpy.asarray(entries)
        return _mesh.place(jax.random.wrap_key_data(data, impl=_key_kind(like)), like)
    return jax.numpy.asarray(_mesh.place(entries, like))  # no leaf goes to one device first
