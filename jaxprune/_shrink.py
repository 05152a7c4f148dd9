"""Masks to a smaller network: a function and params without the masked units."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _ranks, _tree
from jaxprune._plan import Plan, Shapes
from jaxprune._tree import Masks, Params
from jaxprune.groups import Groups
from jaxprune.masks import apply_masks

Removed = Mapping[tuple[str, int], np.ndarray]  # for each path and axis, the removed indices


class CannotShrink(ValueError):
    """Raised by :func:`shrink` for masks that no smaller network can follow.

    Either no masked slice can be removed, or the masks remove all slices of an axis.

    Examples:
      >>> issubclass(CannotShrink, ValueError)
      True
    """


def shrink(
    apply_fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *inputs: Any,
    groups: Groups | None = None,
    verify: bool = True,
    has_aux: bool = False,
) -> tuple[Callable[..., Any], Params, Plan]:
    """Removes the masked units: returns a smaller function, and smaller params.

    A unit is removed if all slices of all its members are masked. Other masks are applied to the
    params, so that ``small_fn(small_params, *inputs)`` returns what ``apply_fn`` returns with
    masked params. ``small_fn`` is an ordinary function: jit, differentiate, vmap and export it, for
    inputs of any batch size or length that ``apply_fn`` takes. It traces ``apply_fn`` for each
    shape of inputs, and holds no params.

    On a mesh the small params are sharded as the dense ones. An axis that the mesh no longer
    divides is replicated; ``groups.select(..., round_to=...)`` keeps axes divisible.

    Args:
      apply_fn: maps ``(params, *inputs)`` to arrays.
      params: arrays or shapes.
      masks: masks of the params; `None` keeps an entire leaf.
      *inputs: example inputs, arrays or shapes.
      groups: if given, checks that the masks remove each of its units entirely or not at all.
      verify: whether to compare both functions on the example inputs.
      has_aux: whether ``apply_fn`` returns ``(output, aux)``. Unlike the output, aux (new batch
        statistics, a cache) is cut along with the params.

    Returns:
      ``(small_fn, small_params, plan)``. ``plan.inexact`` lists where, and why, the results differ
      from those of masked params.

    Raises:
      CannotShrink: a `ValueError` that names a leaf, for masks that empty one of its axes, and for
        masks that remove slices of which none can be removed.
      ValueError: for masks of other paths or shapes, or masks that do not follow ``groups``.
      TypeError: for params or inputs that are not arrays, or masks that are not bool.

    Examples:
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.arange(8.0).reshape(4, 2)}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> kept = jnp.arange(4) > 1
      >>> masks = {"in": jnp.ones((3, 1), bool) & kept, "out": kept[:, None] & jnp.ones(2, bool)}
      >>> small_fn, small, plan = shrink(apply_fn, params, masks, jnp.ones((5, 3)))
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
    shapes = {path: leaf.shape for path, leaf in _tree.named_leaves(like)}
    masked = _masked_slices(params, masks)
    if groups is not None:
        _tree.align(like, groups.like, "groups")
        _check_follows(groups, masked)
    _check_not_empty(shapes, masked)

    cut = functools.partial(_cut, apply_fn, like, masked, has_aux)
    example = cut(inputs)
    if not any(len(indices) for indices in masked.values()):
        warnings.warn(
            "shrink: the masks remove no entire slice, so the network keeps its size.", stacklevel=2
        )
    elif not example.kept:
        raise CannotShrink(_disagreement(example.structure, list(shapes), masked))
    walk = example.structure.walk
    changes = [*walk.inexact, *walk.redraws]
    reasons = dict.fromkeys(why for axis, why in changes if example.cut.kept(axis) is not None)
    plan = Plan(tuple(shapes.items()), example.kept, tuple(reasons))
    trace = functools.partial(_program.trace, apply_fn, like, has_aux=has_aux)
    small_fn = _small_fn(cut, trace, example, inputs, plan._small())

    def cut_params(params: Params, masks: Masks) -> Params:
        return plan.take(apply_masks(params, masks))

    if _abstract(params):
        return small_fn, jax.eval_shape(cut_params, like, masks), plan
    if on_host := _mesh.on_host(params, masks):
        small_masks = plan.take(masks)
        remaining = jax.tree.map(lambda m: None if _mesh.read(m).all() else m, small_masks)
        small_params = apply_masks(plan.take(params), remaining)
    else:
        small = plan._small()
        shardings = [_mesh.resized(w, small[path]) for path, w in _tree.named_leaves(params)]
        cut_in_jax = jax.jit(cut_params, out_shardings=_tree.rebuild(params, shardings))
        small_params = cut_in_jax(params, masks)
    if verify and not _abstract(inputs):
        # It runs once, so on a CPU LLVM need not optimize it.
        options = {"xla_backend_optimization_level": 0} if on_host else None
        masked = plan.put(small_params) if on_host else apply_masks(params, masks)
        full = jax.tree.leaves(jax.jit(apply_fn, compiler_options=options)(masked, *inputs))
        outs = zip(full, example.structure.program.outs, strict=True)
        expected = [
            example.cut.take(_mesh.read(x), v) if _tree.is_floating(x) and not v.full else x
            for x, v in outs
        ]
        differs = differences(expected, small_fn(small_params, *inputs))
        plan = dataclasses.replace(plan, inexact=plan.inexact + differs)
    return small_fn, small_params, plan


class _Cutting(NamedTuple):
    """A program, how to run it without what is removed, and the indices of leaves that remain."""

    structure: _program.Structure
    cut: _program.Cut
    kept: tuple[tuple[str, int, tuple[int, ...]], ...]  # as in a plan


def _cut(
    apply_fn: Callable[..., Any], like: Params, masked: Removed, has_aux: bool, inputs: Any
) -> _Cutting:
    """Analyses the program on inputs of some shapes, and finds the masked slices to remove.

    The walk pins all slices that are not masked, so what is free in the end is removed.
    """
    structure = _program.analyse(
        apply_fn, like, jax.tree.map(_shape, inputs), exact=False, has_aux=has_aux, removed=masked
    )
    atoms = structure.walk.atoms
    roots = [atoms.find(axis)[atoms.free(axis)] for leaf in structure.leaves for axis in leaf.axes]
    kept = tuple(
        (path, axis, tuple(np.flatnonzero(~free).tolist()))
        for (path, _), leaf in zip(_tree.named_leaves(like), structure.leaves, strict=True)
        for axis, numbers in enumerate(leaf.axes)
        if (free := atoms.free(numbers)).any()
    )
    table = atoms.all_roots()
    removed = np.isin(table, np.unique(np.concatenate(roots)))
    cut = _program.Cut(removed, table, structure.program)
    return _Cutting(structure, cut, kept)


def _small_fn(
    cut: Callable[[Any], _Cutting],  # for other inputs than the examples
    trace: Callable[..., Any],  # for inputs of symbolic sizes
    example: _Cutting,
    inputs: Any,
    shapes: Shapes,
) -> Callable[..., Any]:
    """Returns the function of the small params, which have these shapes."""
    # For the first trace on these inputs, by `verify`: a second one may come under another matmul
    # precision or x64, and has to trace `apply_fn` under it.
    walked = [_signature(inputs)]

    def small_fn(small_params: Params, *inputs: Any) -> Any:
        for path, leaf in _tree.named_leaves(small_params):
            if jnp.shape(leaf) != shapes.get(path):
                raise ValueError(
                    f"{_tree.show(path)}: small params must have shape {shapes.get(path)}, got "
                    f"{jnp.shape(leaf)}. Cut dense params with `plan.take(params)`."
                )
        cutting, sizes = example, jax.tree.map(jnp.shape, inputs)
        if all(isinstance(n, int) for x in jax.tree.leaves(inputs) for n in jnp.shape(x)):
            if _signature(inputs) in walked:
                walked.clear()
            else:
                cutting = cut(inputs)
            if cutting.kept != example.kept:
                raise ValueError(_BRANCHES.format(sizes))
            program = cutting.structure.program
        else:
            try:  # atoms need sizes, so a program of symbolic ones has the atoms of the examples
                program = example.structure.program.on(trace(inputs)[0])
            except _program.ProgramMismatch:
                raise ValueError(_BRANCHES.format(sizes)) from None
        args = [*jax.tree.leaves(small_params), *jax.tree.leaves(inputs)]
        return jax.tree.unflatten(cutting.structure.out_tree, cutting.cut.run(program, *args))

    return jax.jit(small_fn)


_BRANCHES = (
    "apply_fn must have one structure for all inputs, got another on inputs of shapes {} than on "
    "the examples: it branches on them. Call `shrink` again with examples of these shapes."
)


def _signature(inputs: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(jax.tree.map(_shape, inputs))


def _shape(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _abstract(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _masked_slices(params: Params, masks: Masks) -> Removed:
    """Lists for each axis the indices whose slices are masked entirely."""
    if _tree.is_traced(masks):
        raise TypeError("masks must have known values, got tracers. Call `shrink` outside of jit.")
    slices = _ranks.kept_slices(_tree.align_masks(params, masks))
    return {
        (path, axis): np.flatnonzero(~_mesh.read(kept))
        for (path, leaf), axes in zip(_tree.named_leaves(params), slices, strict=True)
        if axes is not None and _tree.is_floating(leaf)
        for axis, kept in enumerate(axes)
    }


def _check_not_empty(shapes: Shapes, masked: Removed) -> None:
    for (path, axis), indices in masked.items():
        size = shapes[path][axis]
        if size and len(indices) == size and len(shapes[path]) > 1:
            raise CannotShrink(
                f"{_tree.show(path)}: masks must keep a slice of axis {axis}, got none of {size}. "
                "`groups.select` keeps at least one unit of every group."
            )


def _check_follows(groups: Groups, masked: Removed) -> None:
    """Raises unless masks remove all members of a unit, or none."""
    removing: dict[int, str] = {}
    keeping: dict[int, str] = {}
    for path, axes in groups.unit.items():
        for axis, unit in enumerate(axes):
            removed = np.isin(np.arange(len(unit)), masked.get((path, axis), []))
            member = f"{_tree.show(path)} axis {axis}"
            removing |= dict.fromkeys(unit[removed & (unit > 0)].tolist(), member)
            keeping |= dict.fromkeys(unit[~removed & (unit > 0)].tolist(), member)
    for number in sorted(removing.keys() & keeping.keys()):
        raise ValueError(
            f"masks must remove entire units of the groups, got unit {number} removed from "
            f"{removing[number]}, and kept in {keeping[number]}. Take them from `groups.select`."
        )


def _disagreement(structure: _program.Structure, names: Sequence[str], masked: Removed) -> str:
    """Describes why the first masked slice cannot be removed."""
    for i in structure.order:
        for axis, numbers in enumerate(structure.leaves[i].axes):
            indices = masked.get((names[i], axis), np.empty(0, int))
            if len(indices):
                reasons = "; ".join(structure.walk.atoms.reason(numbers[indices[:1]]))
                return (
                    f"{_tree.show(names[i])}: index {indices[0]} of axis {axis} is masked, but "
                    f"cannot be removed: {reasons}. No other masked slice can be removed either. "
                    "The masks of all members of a unit must remove it, including biases, norms "
                    "and the inputs of the next layer. Take them from "
                    "`jp.find_groups(apply_fn, params, *inputs).select(scores, sparsity)`."
                )
    return "masks must remove slices of params that apply_fn uses, got none."


def differences(expected: Sequence[Any], shrunk: Any) -> tuple[str, ...]:
    """Describes the floating outputs that differ, relative to their largest entry."""
    reasons = []
    for (path, small), dense in zip(_tree.named_leaves(shrunk), expected, strict=True):
        if not _tree.is_floating(dense) or not dense.size:
            continue
        a, b = (_mesh.read(x).astype(np.float64) for x in (dense, small))
        error = np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float32).tiny)
        tolerance = 1e-4 if jnp.finfo(dense.dtype).bits > 16 else 5e-2
        if not error <= tolerance:
            reasons.append(f"output {_tree.show(path)} differs by {error:.2g} relative")
    return tuple(reasons)
