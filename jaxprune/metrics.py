"""What pruning saved: sparsity, compression and a table."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree


def sparsity(masks: Any) -> float:
    """Gives the fraction of prunable weights that are removed; leaves without a mask do not count.

    Raises:
      ValueError: if there is no mask.

    Examples:
      >>> sparsity({"w": jnp.array([True, False]), "b": None})
      0.5
    """
    leaves = jax.tree.leaves(masks)
    total = sum(math.prod(m.shape) for m in leaves)
    if not total:
        raise ValueError("sparsity needs at least one mask, got none.")
    if _tree.is_traced(masks):
        return 1 - sum(jnp.sum(m, dtype=jnp.float32) for m in leaves) / total
    return 1 - sum(int(jnp.count_nonzero(m)) for m in leaves) / total


def compression(params: Any, masks: Any) -> float:
    """Gives all params over those kept; leaves without a mask (biases, norms) count as kept.

    Examples:
      >>> compression({"w": jnp.ones(6), "b": jnp.ones(2)}, {"w": jnp.arange(6) < 2, "b": None})
      2.0
    """
    table = summary(params, masks)
    return sum(row.size for row in table.rows) / max(sum(row.kept for row in table.rows), 1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a :class:`Summary`."""

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    masked: bool
    bytes: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What :func:`summary` found; printing it shows a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        size, kept = sum(r.size for r in self.rows), sum(r.kept for r in self.rows)
        table = [("path", "shape", "kept", "sparsity", "bytes", "")]
        for r in self.rows:
            shape = "×".join(map(str, r.shape)) or "scalar"
            removed = f"{1 - r.kept / max(r.size, 1):.2%}" if r.masked else "-"
            table.append(
                (r.path, shape, f"{r.kept:,} of {r.size:,}", removed, f"{r.bytes:,}", r.note)
            )
        stored = sum(r.bytes for r in self.rows)
        share = f"{1 - kept / max(size, 1):.2%}"
        table.append(("total", "", f"{kept:,} of {size:,}", share, f"{stored:,}", ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i in (0, 1, 5) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        rule = "─" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(params: Any, masks: Any) -> Summary:
    """Tabulates shape, kept weights, sparsity and bytes of every leaf, with totals.

    Bytes are those of the arrays as they are stored, zeros included: masks alone save none. A 2-D
    leaf that is named bias or scale and masked is flagged: it looks like a stack of layers, and
    ``select`` wants to know with ``stacked=``.

    Raises:
      ValueError: for masks of other paths or shapes.
      TypeError: for masks that are not bool.

    Examples:
      >>> print(summary({"w": jnp.ones((2, 2))}, {"w": jnp.array([[True, False]] * 2)}))
      path   shape    kept  sparsity  bytes
      ─────────────────────────────────────
      w      2×2    2 of 4    50.00%     16
      ─────────────────────────────────────
      total         2 of 4    50.00%     16
    """
    names = [(path, leaf) for path, leaf in _tree.named_leaves(params) if leaf is not None]
    rows = []
    for (path, leaf), mask in zip(names, _tree.align_masks(params, masks), strict=True):
        size = math.prod(jnp.shape(leaf))
        kept = size if mask is None else int(jnp.count_nonzero(mask))
        dtype = getattr(leaf, "dtype", None) or np.result_type(leaf)
        last = path.split("/")[-1]
        odd = mask is not None and jnp.ndim(leaf) == 2 and last in ("bias", "scale")
        note = "a stack of layers? see select(stacked=)" if odd else ""
        rows.append(
            Row(path, jnp.shape(leaf), size, kept, mask is not None, size * dtype.itemsize, note)
        )
    return Summary(tuple(rows))
