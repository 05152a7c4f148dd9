"""Checkpoint files: read, pruned, compared and written in pieces.

::

    path ──opened──▶ Checkpoint ──stream.select──▶ limits ──stream.prune──▶ path
    params, masks ──compact.write──▶ safetensors file ──compact.read──▶ params, masks

``masks.save``, ``masks.load`` and ``python -m jaxprune`` are its only callers.
"""

from jaxprune._files.compact import read, write
from jaxprune._files.safetensors import FileError, replacing

__all__ = ["FileError", "read", "replacing", "write"]
