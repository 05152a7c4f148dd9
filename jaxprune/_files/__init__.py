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

from jaxprune._files.compact import read, write

__all__ = ["read", "write"]
