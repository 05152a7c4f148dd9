"""Orbax checkpoint folders, which are read into memory entirely."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune import _tree
from jaxprune._files.checkpoint import Checkpoint, Edit, FileError, Tensor, Tick, reason, saving


@contextlib.contextmanager
def opened(path: str, tick: Tick) -> Iterator[Checkpoint]:
    """Opens the checkpoint of a tree, and calls ``tick`` with the size of every read."""
    folder = Path(path).absolute()
    if not (folder / "_METADATA").exists():
        inner = sorted(p.parent for n in ("*", "*/*") for p in folder.glob(f"{n}/_METADATA"))
        fix = f" Pass the one inside, {inner[-1]}." if inner else ""
        raise FileError(f"{path}: this folder is not an Orbax checkpoint of a tree.{fix}")
    try:
        import orbax.checkpoint as ocp  # slow to import, and not needed for files
    except ImportError as error:
        message = f"{path}: Orbax could not be imported ({reason(error)})."
        raise FileError(f"{message} Install it with `pip install 'jaxprune[orbax]'`.") from None
    with _quiet(path):
        checkpointer = ocp.PyTreeCheckpointer()
        description: Any = checkpointer.metadata(folder)
        if (item := description.item_metadata) is None:
            raise ValueError("its metadata cannot be read")
        args = jax.tree.map(
            # NumPy arrays need none of the devices that wrote the checkpoint. Text has no storage.
            lambda leaf: ocp.RestoreArgs(np.ndarray if getattr(leaf, "storage", None) else None),
            item.tree,
        )
        tree = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))
        names = [leaf.name for leaf in jax.tree.leaves(item.tree)]
        keys = _key_implementations(folder)
    tensors = {}  # by position; text is copied
    for i, (name, leaf) in enumerate(_tree.named_leaves(tree)):
        if (array := np.asarray(leaf)).dtype.kind not in "OSU":
            tensors[i] = _tensor(path, name, array, tick)

    def save(out: Path, edit: Edit) -> None:
        leaves, treedef = jax.tree.flatten(tree)
        for i, tensor in tensors.items():
            if (pieces := edit(tensor)) is not None:
                flat = np.empty(tensor.size, tensor.entries)
                for start, entries in pieces:
                    flat[start : start + len(entries)] = entries
                leaves[i] = flat.reshape(tensor.shape)
        with saving(out) as new, _quiet(path):
            leaves = [
                jax.random.wrap_key_data(leaf, impl=keys[name]) if name in keys else leaf
                for name, leaf in zip(names, leaves, strict=True)
            ]
            copy = jax.tree.unflatten(treedef, leaves)
            args = ocp.args.PyTreeSave(copy, custom_metadata=item.custom_metadata)
            checkpointer.save(new, args, custom_metadata=description.custom_metadata or None)

    metadata = {**(description.custom_metadata or {}), **(item.custom_metadata or {})}
    yield Checkpoint("orbax", list(tensors.values()), metadata, save)


def _tensor(path: str, name: str, array: np.ndarray, tick: Tick) -> Tensor:
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.view(np.uint8) if array.dtype == bool else flat

    def read(start: int, stop: int) -> np.ndarray:
        tick((stop - start) * flat.itemsize)
        return flat[start:stop].copy()

    return Tensor(path, name, array.dtype.name, array.shape, flat.dtype, flat.size, read)


@contextlib.contextmanager
def _quiet(path: str) -> Iterator[None]:
    """Silences Orbax, and turns its errors into one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:  # is reported with the name of its file
        raise
    except Exception as error:
        message = f"{path}: Orbax could not process this checkpoint ({reason(error)})."
        raise FileError(f"{message} Check that it is complete.") from None
    finally:
        logger.setLevel(level)


def _key_implementations(folder: Path) -> dict[str, str]:
    """Maps the names of PRNG keys to their implementations, which NumPy arrays lose."""
    files = [json.loads(file.read_text()) for file in folder.glob("array_metadatas/*")]
    entries = [e["array_metadata"] for file in files for e in file["array_metadatas"]]
    keys = {e["param_name"]: (e["ext_metadata"] or {}).get("random_key_impl") for e in entries}
    return {name: key for name, key in keys.items() if key}
