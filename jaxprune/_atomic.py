"""Replaces a file or a folder: either entirely, or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to, and moves the result to ``path``, unless an error is raised."""
    target = Path(os.path.realpath(path))
    # A rename is atomic only within one file system, so the workspace is in the same folder.
    workspace = target.parent / f".jaxprune-{secrets.token_hex(8)}"
    new, old = workspace / "new", workspace / "old"
    try:
        workspace.mkdir()
        yield new
        if target.is_dir():  # a folder cannot be replaced in one step
            os.rename(target, old)
        os.replace(new, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        if workspace.exists():
            shutil.rmtree(workspace)
