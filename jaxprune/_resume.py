"""Stores the layers that a walk has finished, so that an interrupted one goes on from there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune import _atomic, _mesh
from jaxprune._fingerprint import fingerprint

Pairs = list[tuple[jax.Array, jax.Array]]  # a root, and its mask


def begin(folder: Any, *run: Any) -> Path:
    """Returns the folder, which must be new or that of the same run, by its fingerprint."""
    mine = fingerprint(*run)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    mark = path / "run"
    if not mark.exists():
        with _atomic.replacing(mark) as new:
            new.write_text(mine)
    elif mark.read_text() != mine:
        raise ValueError(
            f"{path}: must be an empty folder or that of the same run, got one of other params, "
            "batches, sparsities, another method or pattern. Use another folder, or delete it."
        )
    return path


def store(folder: Path, number: int, pairs: Pairs) -> None:
    """Stores a finished weight."""
    arrays = {f"value{i}": _bytes(value) for i, (value, _) in enumerate(pairs)}
    arrays |= {f"mask{i}": np.packbits(_mesh.read(mask)) for i, (_, mask) in enumerate(pairs)}
    with _atomic.replacing(folder / f"{number}.npz") as new, open(new, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def restore(folder: Path, number: int, likes: Sequence[Any]) -> Pairs | None:
    """Returns a finished weight, or `None` for one that is not."""
    path = folder / f"{number}.npz"
    if not path.exists():
        return None
    pairs = []
    with np.load(path) as arrays:
        for i, like in enumerate(likes):
            value = arrays[f"value{i}"].view(like.dtype).reshape(like.shape)
            bits = np.unpackbits(arrays[f"mask{i}"], count=value.size)
            mask = bits.astype(bool).reshape(like.shape)
            pairs.append((_mesh.place(value, like), _mesh.place(mask, like)))
    return pairs


def _bytes(x: Any) -> np.ndarray:
    """Returns the bytes of an array, also of a type that NumPy cannot store."""
    return np.ascontiguousarray(_mesh.read(x)).reshape(-1).view(np.uint8)
