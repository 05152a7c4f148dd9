"""Checkpoint files: read, pruned, compared and written a piece at a time.

::

    a file or a folder                                 params, masks
            │ opened: safetensors, or orbax              │ ▲
            ▼                                compact.write │ compact.read
    Checkpoint of Tensors                                ▼ │
            │                                a safetensors file of the kept weights
            ├─ stream.thresholds, stream.pruned ─▶ Checkpoint.save ─▶ a copy with zeros
            └─ stream.zeros, stream.changes     ─▶ what the command line prints

``masks.save`` and ``masks.load`` call :func:`write` and :func:`read`. ``python -m jaxprune`` runs
``command_line``. Nothing else opens this room.
"""

import contextlib
import os

from jaxprune._files import orbax, safetensors
from jaxprune._files.checkpoint import Checkpoint, FileError, Tick
from jaxprune._files.compact import read, write

__all__ = ["FileError", "opened", "read", "write"]


def opened(
    path: str, tick: Tick = lambda size: None
) -> contextlib.AbstractContextManager[Checkpoint]:
    """Opens a safetensors file or an Orbax folder, and calls ``tick`` with the size of every read.

    Raises:
      FileError: if this is neither, or it is damaged.
    """
    return (orbax if os.path.isdir(path) else safetensors).opened(path, tick)
