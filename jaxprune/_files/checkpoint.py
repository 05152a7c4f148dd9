"""The common form of all checkpoints: tensors that are read in pieces, and a way to save a copy."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import _atomic

# Maps a tensor to its new entries as `(start, entries)`, or to `None` to copy it.
Edit = Callable[["Tensor"], "Iterable[tuple[int, np.ndarray]] | None"]
Tick = Callable[[int], object]  # is called with a number of bytes


class FileError(ValueError):
    """An error in a file or in a request, as one line."""


class Tensor(NamedTuple):
    """One tensor of a checkpoint; its entries are uint8 for bool and packed types."""

    file: str  # the path of the checkpoint
    path: str
    dtype: str
    shape: tuple[int, ...]
    entries: np.dtype
    size: int  # the number of entries
    read: Callable[[int, int], np.ndarray]  # (start, stop) -> entries of the flat tensor, a copy
    packed: bool = False  # whether several weights share a byte

    @property
    def bytes(self) -> int:
        return self.size * self.entries.itemsize

    @property
    def prunable(self) -> bool:
        """Whether the entries are weights: two or more axes, floating-point, of a type with a 0."""
        floating = jnp.issubdtype(self.entries, jnp.floating) and self.dtype != "float8_e8m0fnu"
        return floating and len(self.shape) >= 2 and self.size > 0


class Checkpoint(NamedTuple):
    """An open checkpoint."""

    format: str  # "safetensors" or "orbax"
    tensors: list[Tensor]  # in the order of the file
    metadata: dict[str, Any]
    save: Callable[[Path, Edit], None]  # writes a copy with edited tensors


def check_output(path: str, format: str) -> None:
    """Raises a `FileError` if a checkpoint cannot, or should not, be written to a path."""
    out = Path(os.path.realpath(path))
    if not out.parent.is_dir():
        raise FileError(f"{path}: the folder {out.parent} does not exist. Create it first.")
    if format == "safetensors":
        kind, fits = "a regular file", out.is_file()
    else:
        kind, is_empty = "an Orbax checkpoint", out.is_dir() and not any(out.iterdir())
        fits = is_empty or (out / "_METADATA").exists()
    if out.exists() and not fits:
        raise FileError(f"{path}: is not {kind} and will not be overwritten. Choose another path.")


@contextlib.contextmanager
def saving(path: Path) -> Iterator[Path]:
    """Like ``_atomic.replacing``, but an error of the operating system becomes a `FileError`."""
    try:
        with _atomic.replacing(path) as new:
            yield new
    except OSError as error:
        message = f"{path}: could not be written ({reason(error)}). Nothing was changed."
        raise FileError(message) from None


def reason(error: BaseException) -> str:
    """Returns the message of an error, short and on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]
