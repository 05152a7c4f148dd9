"""The plan of a shrunk network: which indices of which axes it keeps."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _tree
from jaxprune._table import Shown, Table, spell

Shapes = Mapping[str, tuple[int, ...]]  # by path
_Axes = Sequence[tuple[int, np.ndarray, int]]  # that lost indices: those kept, and the dense size


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The indices that :func:`jaxprune.shrink` kept; prints the old and new shapes as a table.

    Attributes:
      shapes: ``(path, shape)`` of every leaf of the dense params.
      kept: ``(path, axis, indices)`` for every axis that lost indices.
      inexact: where, and why, the shrunk function differs from the masked one.

    Examples:
      >>> plan = Plan(shapes=(("w", (3, 2)),), kept=(("w", 0, (0, 2)),))
      >>> plan.take({"w": jnp.arange(6).reshape(3, 2)})["w"].tolist()
      [[0, 1], [4, 5]]
      >>> plan.put({"w": jnp.ones((2, 2))})["w"].tolist()
      [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    kept: tuple[tuple[str, int, tuple[int, ...]], ...]
    inexact: tuple[str, ...] = ()

    def _show(self) -> list[Table | str]:
        small = self._small()
        rows: list[tuple[str, ...]] = []
        total = kept = 0
        for path, shape in self.shapes:
            before, after = math.prod(shape), math.prod(small[path])
            total, kept = total + before, kept + after
            share = f"{after / max(before, 1):.1%}" if before != after else ""
            rows.append((_tree.show(path), spell(shape), spell(small[path]), f"{after:,}", share))
        rows.append(("total", f"{total:,}", "", f"{kept:,}", f"{kept / max(total, 1):.1%}"))
        table = Table(("path", "dense", "shrunk", "params", ""), rows, left=(0, 1, 2), total=True)
        reasons = "\n".join(f"inexact: {reason}" for reason in self.inexact)
        return [table, reasons] if reasons else [table]

    def to_json(self) -> str:
        """Returns the plan as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads a plan from the text that :meth:`to_json` returned."""
        fields = json.loads(text)
        shapes = tuple((path, tuple(shape)) for path, shape in fields["shapes"])
        kept = tuple((path, axis, tuple(kept)) for path, axis, kept in fields["kept"])
        return cls(shapes, kept, tuple(fields["inexact"]))

    def take(self, tree: Any) -> Any:
        """Cuts a dense tree: params, an optimizer state, an EMA, batch statistics.

        Every part with the paths and shapes of the params, or of a part of them, is cut in the same
        way. Scalars and PRNG keys pass unchanged. On a mesh, the result is sharded as before; an
        axis that the mesh no longer divides is replicated.

        Raises:
          ValueError: for an array that is not shaped as the params (e.g. Adafactor's factors).
        """
        return self._map(tree, dict(self.shapes), _cut, "dense")

    def put(self, small_tree: Any) -> Any:
        """Fills a small tree with zeros up to the dense shapes: the inverse of :meth:`take`."""
        return self._map(small_tree, self._small(), _fill, "shrunk")

    def _small(self) -> dict[str, tuple[int, ...]]:
        small = {path: list(shape) for path, shape in self.shapes}
        for path, axis, kept in self.kept:
            small[path][axis] = len(kept)
        return {path: tuple(shape) for path, shape in small.items()}

    def _map(
        self, tree: Any, shapes: Shapes, change: Callable[[Any, _Axes], Any], kind: str
    ) -> Any:
        """Changes every part of a tree that has the paths and shapes of a part of the params."""
        prefixes, dense = _tree.prefixes(shapes), dict(self.shapes)
        axes: dict[str, list[tuple[int, np.ndarray, int]]] = {path: [] for path in dense}
        for path, axis, kept in self.kept:
            axes[path].append((axis, np.asarray(kept), dense[path][axis]))

        def resize(path: str, x: Any) -> Any:
            if _mesh.on_host(x):
                return _mesh.place(change(np.asarray(jax.device_get(x)), axes[path]), x)
            changed = _mesh.automatic(lambda x: change(x, axes[path]), x)
            sharding = _mesh.resized(x, changed.shape)
            return changed if sharding is None else jax.device_put(changed, sharding)

        def visit(part: Any, path: str) -> Any:
            leaves = _tree.named_leaves(part)
            prefix = _prefix(leaves, path, shapes, prefixes)
            if prefix is not None:
                resized = [resize(_join(prefix, name), leaf) for name, leaf in leaves]
                return _tree.rebuild(part, resized)
            children = _tree.children(part)
            if children is not None:
                named, rebuild = children
                return rebuild([visit(c, f"{path}/{n}" if path else n) for n, c in named])
            if jnp.ndim(part) == 0 or not self.kept:
                return part
            raise ValueError(
                f"{_tree.show(path)}: arrays must be shaped as the {kind} params at a path that "
                f"ends in this one, got shape {jnp.shape(part)}. Re-initialise it: "
                "`optimizer.init(small_params)`."
            )

        return visit(tree, "")


def _prefix(
    leaves: Sequence[tuple[str, Any]], path: str, shapes: Shapes, prefixes: Sequence[str]
) -> str | None:
    """Returns the part of the params that has the paths and shapes of a part of another tree.

    ::

        params          {"a": {"w": 6×8, "b": 8}, "c": {"w": 8×3}}
        state.mu        {"a": {"w": 6×8, "b": 8}, "c": {"w": 8×3}}     ""
        state.inner.nu  {"w": 6×8, "b": 8}                             "a/"

    A single array has no inner paths to compare, and other params may have its shape. So its own
    path must end in that of the param: ``mu/a/w`` in ``a/w``.
    """
    for prefix in prefixes if leaves else ():
        fits = all(shapes.get(_join(prefix, name)) == jnp.shape(leaf) for name, leaf in leaves)
        if fits and (not prefix or len(leaves) > 1 or path.endswith(_join(prefix, leaves[0][0]))):
            return prefix
    return None


def _join(prefix: str, name: str) -> str:
    return prefix + name if name else prefix.rstrip("/")


def _cut(x: Any, axes: _Axes) -> Any:
    for axis, kept, _ in axes:
        x = _program.take(x, kept, axis)
    return x


def _fill(x: Any, axes: _Axes) -> Any:
    shape, at = list(x.shape), [np.arange(size) for size in x.shape]
    for axis, kept, size in axes:
        shape[axis], at[axis] = size, kept
    if isinstance(x, np.ndarray):
        full = np.zeros(shape, x.dtype)
        full[np.ix_(*at)] = x
        return full
    for axis, kept, size in axes:
        larger = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        x = jnp.zeros(larger, x.dtype).at[(slice(None),) * axis + (kept,)].set(x)
    return x
