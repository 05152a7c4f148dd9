"""Masks to a smaller network: a function and params that are really smaller."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _tree
from jaxprune._program import Cut, take
from jaxprune._table import Shown, Table, spell
from jaxprune.groups import Groups
from jaxprune.masks import apply_masks

Removed = Mapping[tuple[str, int], np.ndarray]


class CannotShrink(ValueError):
    """Raised by :func:`shrink` for masks that no smaller network can follow.

    Either none of the slices that they remove can be removed, or they remove all slices of an axis.

    Examples:
      >>> params, masks = {"w": jnp.ones((3, 2))}, {"w": jnp.zeros((3, 2), bool)}
      >>> try:
      ...     shrink(lambda p, x: x @ p["w"], params, masks, jnp.ones((5, 3)))
      ... except CannotShrink as error:
      ...     print(str(error)[:51])
      w: the masks remove all 3 slices of axis 0, which w
    """


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What :func:`shrink` cut; shows the old and new shapes as a table.

    Attributes:
      shapes: ``(path, shape)`` of every leaf of the dense params.
      kept: ``(path, axis, indices)`` of every axis that lost some.
      inexact: why, and where, the shrunk function differs from the masked one.

    Examples:
      >>> plan = Plan(shapes=(("w", (3, 2)),), kept=(("w", 0, (0, 2)),))
      >>> plan.take({"w": jnp.arange(6).reshape(3, 2)})["w"].tolist()
      [[0, 1], [4, 5]]
      >>> plan.put({"w": jnp.ones((2, 2))})["w"].tolist()
      [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
      >>> Plan.from_json(plan.to_json()).kept
      (('w', 0, (0, 2)),)
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    kept: tuple[tuple[str, int, tuple[int, ...]], ...]
    inexact: tuple[str, ...] = ()

    def _show(self) -> list[Table | str]:
        small = self._small()
        rows: list[tuple[str, ...]] = []
        for path, shape in self.shapes:
            before, after = int(np.prod(shape)), int(np.prod(small[path]))
            share = f"{after / max(before, 1):.1%}" if before != after else ""
            sizes = spell(shape), spell(small[path])
            rows.append((_tree.show(path), *sizes, f"{after:,}", share))
        total = sum(int(np.prod(shape)) for _, shape in self.shapes)
        left = sum(int(np.prod(shape)) for shape in small.values())
        rows.append(("total", f"{total:,}", "", f"{left:,}", f"{left / max(total, 1):.1%}"))
        header = ("path", "dense", "shrunk", "params", "")
        table = Table(header, rows, left=(0, 1, 2), total=True)
        reasons = "\n".join(f"inexact: {reason}" for reason in self.inexact)
        return [table, reasons] if reasons else [table]

    def to_json(self) -> str:
        """Writes the plan as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads a plan from what :meth:`to_json` wrote."""
        found = json.loads(text)
        return cls(
            shapes=tuple((path, tuple(shape)) for path, shape in found["shapes"]),
            kept=tuple((path, axis, tuple(kept)) for path, axis, kept in found["kept"]),
            inexact=tuple(found["inexact"]),
        )

    def take(self, tree: Any) -> Any:
        """Cuts a dense tree: params, an optimizer state, an EMA, batch statistics.

        Every part whose paths and shapes are those of the params, or of a part of them, is cut in
        the same way; scalars and random keys stay as they are. On a mesh what is cut is sharded as
        before, save axes that the mesh no longer divides.

        Raises:
          ValueError: for an array that is not shaped as the params (Adafactor's factors, say).
        """
        indices = self._indices()

        def cut(path: str, x: Any) -> Any:
            return _mesh.resized(_mesh.automatic(lambda x: _cut(x, indices.get(path, ())), x), x)

        return self._map(tree, dict(self.shapes), cut, "dense")

    def put(self, small_tree: Any) -> Any:
        """Puts a small tree back among zeros: the inverse of :meth:`take`.

        Raises:
          ValueError: for an array that is not shaped as the small params.
        """
        indices, dense = self._indices(), dict(self.shapes)

        def fill(path: str, x: Any) -> Any:
            shape = dense.get(path, jnp.shape(x))
            filled = _mesh.automatic(lambda x: _fill(x, indices.get(path, ()), shape), x)
            return _mesh.resized(filled, x)

        return self._map(small_tree, self._small(), fill, "shrunk")

    def _indices(self) -> dict[str, list[tuple[int, np.ndarray]]]:
        indices: dict[str, list[tuple[int, np.ndarray]]] = {}
        for path, axis, kept in self.kept:
            indices.setdefault(path, []).append((axis, np.asarray(kept)))
        return indices

    def _small(self) -> dict[str, tuple[int, ...]]:
        small = {path: list(shape) for path, shape in self.shapes}
        for path, axis, kept in self.kept:
            small[path][axis] = len(kept)
        return {path: tuple(shape) for path, shape in small.items()}

    def _map(
        self,
        tree: Any,
        shapes: Mapping[str, tuple[int, ...]],
        change: Callable[[str, Any], Any],
        kind: str,
    ) -> Any:
        parts = _tree.prefixes(shapes)

        def change_part(part: Any, prefix: str) -> Any:
            leaves = [
                change(prefix + path if path else prefix.rstrip("/"), leaf)
                for path, leaf in _tree.named_leaves(part)
            ]
            return _tree.rebuild(part, leaves)

        def visit(part: Any, path: str) -> Any:
            leaves = _tree.named_leaves(part)
            for prefix in parts:
                inside = [prefix + p if p else prefix.rstrip("/") for p, _ in leaves]
                fits = all(
                    shapes.get(p) == jnp.shape(leaf)
                    for p, (_, leaf) in zip(inside, leaves, strict=True)
                )
                if fits and leaves and (not prefix or len(leaves) > 1 or path.endswith(inside[0])):
                    return change_part(part, prefix)
            children = _tree.children(part)
            if children is not None:
                named, rebuild = children
                return rebuild([visit(c, f"{path}/{n}" if path else n) for n, c in named])
            if jnp.ndim(part) == 0 or not self.kept:
                return part
            raise ValueError(
                f"{_tree.show(path)}: an array of shape {jnp.shape(part)} that is not shaped as "
                f"any part of the {kind} params at such a path, so it cannot be cut with them. "
                "Re-initialise it: `optimizer.init(small_params)`."
            )

        return visit(tree, "")


def shrink(
    fn: Callable[..., Any],
    params: Any,
    masks: Any,
    *inputs: Any,
    groups: Groups | None = None,
    verify: bool = True,
    has_aux: bool = False,
) -> tuple[Callable[..., Any], Any, Plan]:
    """Makes the network that masks describe really smaller.

    A unit leaves iff all slices of all its members are masked. What stays is masked, so the new
    function of the new params gives what ``fn`` gives with masked params. It is an ordinary
    function: jit, differentiate, vmap and export it, for inputs of any batch size or length that
    ``fn`` takes. It traces ``fn`` for each shape of inputs, and holds no params. On a mesh the
    small params are sharded as the dense ones, save axes that the mesh no longer divides, which are
    replicated: ``groups.select(..., round_to=...)`` keeps them divisible.

    Args:
      fn: maps ``(params, *inputs)`` to arrays.
      params: arrays or shapes.
      masks: masks of the params; `None` keeps a leaf whole.
      *inputs: examples, arrays or shapes.
      groups: if given, masks must remove every unit of them whole, or not at all.
      verify: whether to compare both functions on the example inputs.
      has_aux: whether ``fn`` returns ``(output, aux)``, where aux (new batch statistics, a cache)
        is cut along with the params.

    Returns:
      ``(small_fn, small_params, plan)``. ``plan.inexact`` lists where the results differ from
      those of masked params, and why.

    Raises:
      ValueError: for masks of other paths or shapes, for masks that would empty an axis, and for
        masks that remove slices of which none can leave, naming what would have to leave with them.
      TypeError: for params or inputs that are not arrays, masks that are not bool.

    Examples:
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.arange(8.0).reshape(4, 2)}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> stays = jnp.arange(4) > 1
      >>> masks = {"in": jnp.ones((3, 1), bool) & stays, "out": stays[:, None] & jnp.ones(2, bool)}
      >>> small_fn, small, plan = shrink(fn, params, masks, jnp.ones((5, 3)))
      >>> print(plan)
      path   dense  shrunk  params
      ───────────────────────────────────
      in     3×4    3×2          6  50.0%
      out    4×2    2×2          4  50.0%
      ───────────────────────────────────
      total  20                 10  50.0%
      >>> print(small_fn(small, jnp.ones((1, 3))))
      [[30. 36.]]
    """
    _tree.check_params(params)
    _program.check_inputs(inputs)
    like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(jnp.shape(w), _tree.dtype(w)), params)
    masked = _masked_slices(params, masks)
    if groups is not None:
        _check_follows(groups, like, masked)
    _check_not_empty(like, masked)

    def structure(*inputs: Any) -> tuple[_program.Structure, Cut, Removed]:
        found = _program.analyse(fn, like, inputs, exact=False, has_aux=has_aux, removed=masked)
        return found, *_leaving(found, like)

    found, cut, removed = structure(*jax.tree.map(_shape, inputs))
    if not any(len(gone) for gone in masked.values()):
        warnings.warn("shrink: the masks remove no whole slice, so nothing shrinks.", stacklevel=2)
    elif not removed:
        raise CannotShrink(_disagreement(found, like, masked))
    shapes = dict(_shapes(like))
    kept = tuple(
        (path, axis, tuple(np.delete(np.arange(shapes[path][axis]), gone).tolist()))
        for (path, axis), gone in removed.items()
    )
    plan = Plan(_shapes(like), kept, _inexact(found, cut))
    small_shapes = plan._small()

    @jax.jit
    def small_fn(small_params: Any, *inputs: Any) -> Any:
        for path, leaf in _tree.named_leaves(small_params):
            if jnp.shape(leaf) != small_shapes.get(path):
                raise ValueError(
                    f"{_tree.show(path)}: the shrunk function got params of shape "
                    f"{jnp.shape(leaf)}, needed {small_shapes.get(path)}. Cut dense params with "
                    "`plan.take(params)`."
                )
        program, out_tree, cut_here = found.program, found.out_tree, cut
        if any(_symbolic(x) for x in jax.tree.leaves(inputs)):
            try:
                program = found.program.on(_program.trace(fn, like, inputs, has_aux)[0])
            except ValueError:
                raise ValueError(_BRANCHES.format(jax.tree.map(jnp.shape, inputs))) from None
        else:
            again, cut_here, leaves = structure(*jax.tree.map(_shape, inputs))
            program, out_tree = again.program, again.out_tree
            if _listed(leaves) != _listed(removed):
                raise ValueError(_BRANCHES.format(jax.tree.map(jnp.shape, inputs)))
        args = [*jax.tree.leaves(small_params), *jax.tree.leaves(inputs)]
        return jax.tree.unflatten(out_tree, cut_here.run(program, *args))

    def cut_params(params: Any, masks: Any) -> Any:
        return plan.take(apply_masks(params, masks))

    if _abstract(params):
        return small_fn, jax.eval_shape(cut_params, like, masks), plan
    small_params = jax.tree.map(_mesh.resized, jax.jit(cut_params)(params, masks), params)
    if verify and not _abstract(inputs):
        expected = [
            cut.take(x, v) if not v.full else x
            for x, v in zip(
                jax.tree.leaves(jax.jit(fn)(apply_masks(params, masks), *inputs)),
                found.program.outs,
                strict=True,
            )
        ]
        differs = differences(expected, small_fn(small_params, *inputs))
        plan = dataclasses.replace(plan, inexact=plan.inexact + differs)
    return small_fn, small_params, plan


_Indices = Sequence[tuple[int, np.ndarray]]  # an axis, and what stays of it


def _cut(x: Any, indices: _Indices) -> Any:
    for axis, kept in indices:
        x = take(x, kept, axis)
    return x


def _fill(x: Any, indices: _Indices, dense: Sequence[int]) -> Any:
    for axis, kept in indices:
        shape = (*x.shape[:axis], dense[axis], *x.shape[axis + 1 :])
        x = jnp.zeros(shape, x.dtype).at[(slice(None),) * axis + (kept,)].set(x)
    return x


_BRANCHES = (
    "On inputs of shapes {} the function has another structure than on the examples: it branches "
    "on them. Call `shrink` again with examples of these shapes."
)


def _symbolic(x: Any) -> bool:
    return not all(isinstance(n, int) for n in jnp.shape(x))


def _listed(removed: Removed) -> dict[tuple[str, int], list[int]]:
    return {key: gone.tolist() for key, gone in removed.items()}


def _shapes(like: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((path, leaf.shape) for path, leaf in _tree.named_leaves(like))


def _shape(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _abstract(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _masked_slices(params: Any, masks: Any) -> Removed:
    """Lists, for every axis, the indices whose slices are masked whole."""
    if _tree.is_traced(masks):
        raise TypeError("shrink needs masks whose values are known: call it outside of jit.")
    aligned = zip(_tree.named_leaves(params), _tree.align_masks(params, masks), strict=True)
    own = {
        path: mask for (path, leaf), mask in aligned if mask is not None and _tree.is_floating(leaf)
    }
    return {
        (path, axis): np.flatnonzero(_mesh.read(gone))
        for path, mask in own.items()
        for axis, gone in enumerate(_gone(mask))
    }


@jax.jit  # of one mask, so that those of alike layers share a program
def _gone(mask: jax.Array) -> list[jax.Array]:
    """Says for every axis of a mask which slices are masked whole."""
    axes = range(jnp.ndim(mask))
    return [~jnp.any(mask, [i for i in axes if i != axis]) for axis in axes]


def _check_not_empty(like: Any, masked: Removed) -> None:
    shapes = dict(_shapes(like))
    for (path, axis), gone in masked.items():
        if len(gone) and len(gone) == shapes[path][axis] and len(shapes[path]) > 1:
            raise CannotShrink(
                f"{_tree.show(path)}: the masks remove all {len(gone)} slices of axis {axis}, "
                "which would leave an empty layer. Keep at least one, as `groups.select` does."
            )


def _check_follows(groups: Groups, like: Any, masked: Removed) -> None:
    """Raises unless masks remove all members of a unit, or none."""
    _tree.align(like, groups.like, "groups")
    removing: dict[int, str] = {}
    keeping: dict[int, str] = {}
    for path, axes in groups.unit.items():
        for axis, unit in enumerate(axes):
            gone = np.zeros(len(unit), bool)
            gone[masked.get((path, axis), [])] = True
            member = f"{_tree.show(path)} axis {axis}"
            removing |= dict.fromkeys(unit[gone & (unit > 0)].tolist(), member)
            keeping |= dict.fromkeys(unit[~gone & (unit > 0)].tolist(), member)
    for number in sorted(removing.keys() & keeping.keys()):
        raise ValueError(
            f"masks do not follow the groups: they remove unit {number} from {removing[number]}, "
            f"and keep it in {keeping[number]}. Take them from `groups.select`."
        )


def _leaving(found: _program.Structure, like: Any) -> tuple[Cut, Removed]:
    """Gives the atoms that leave, and what that makes of every axis of the params."""
    atoms = found.walk.atoms
    roots = [atoms.find(axis)[atoms.free(axis)] for leaf in found.leaves for axis in leaf.axes]
    cut = Cut(np.isin(atoms.all_roots(), np.unique(np.concatenate(roots))))
    removed = {}
    for (path, _), leaf in zip(_tree.named_leaves(like), found.leaves, strict=True):
        for axis, own in enumerate(leaf.axes):
            if (free := atoms.free(own)).any():
                removed[path, axis] = np.flatnonzero(free)
    return cut, removed


def _disagreement(found: _program.Structure, like: Any, masked: Removed) -> str:
    """Says which leaf keeps the first masked slice from leaving."""
    atoms = found.walk.atoms
    names = [path for path, _ in _tree.named_leaves(like)]
    for i in found.order:
        for axis, own in enumerate(found.leaves[i].axes):
            gone = masked.get((names[i], axis), np.empty(0, int))
            if len(gone):
                reasons = atoms.reason(own[gone[:1]])
                return (
                    f"{_tree.show(names[i])}: index {gone[0]} of axis {axis} is masked whole, but "
                    f"cannot leave: {'; '.join(reasons)}. None of the masked slices can leave. A "
                    "unit leaves iff the masks of all its members remove it, biases, norms and the "
                    "next layer's inputs included: take the masks from "
                    "`jp.find_groups(fn, params, *inputs).select(scores, sparsity)`."
                )
    return "Nothing can leave."


def _inexact(found: _program.Structure, cut: Cut) -> tuple[str, ...]:
    noted = [*found.walk.inexact, *found.walk.redraws]
    return tuple(dict.fromkeys(why for axis, why in noted if cut.kept(axis) is not None))


def differences(expected: Sequence[Any], shrunk: Any) -> tuple[str, ...]:
    """Says which floating outputs differ, relative to their largest entry."""
    found = []
    for (path, small), dense in zip(_tree.named_leaves(shrunk), expected, strict=True):
        if not _tree.is_floating(dense) or not dense.size:
            continue
        a, b = (_mesh.read(x).astype(np.float64) for x in (dense, small))
        error = np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float32).tiny)
        tolerance = 1e-4 if jnp.finfo(dense.dtype).bits > 16 else 5e-2
        if not error <= tolerance:
            found.append(f"output {_tree.show(path)} differs by {error:.2g} relative")
    return tuple(found)
