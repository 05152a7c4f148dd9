"""Placement of arrays on meshes: checks, shardings that fit, masks sharded as their leaves."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, auto_axes, use_abstract_mesh
from jax.sharding import PartitionSpec as P


def is_explicit(x: Any) -> bool:
    """Returns whether the sharding of an array is part of its type."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def check_together(leaves: Iterable[tuple[str, Any]]) -> None:
    """Raises a `ValueError` that names the first array on other devices than the ones before."""
    placed = [
        (path, x.sharding)
        for path, x in leaves
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    ]
    for path, sharding in placed:
        if sharding.device_set != placed[0][1].device_set:
            raise ValueError(
                f"{path}: lies on other devices ({sharding}) than {placed[0][0]} ({placed[0][1]}). "
                "Put all arrays on one mesh: `jax.device_put(array, NamedSharding(mesh, spec))`. "
                "`None` in the spec replicates an axis that the mesh does not divide."
            )


def on_host(*trees: Any) -> bool:
    """Returns whether NumPy can read all arrays where they are: on one CPU device, no PRNG key."""

    def readable(x: jax.Array) -> bool:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
        return _is_on_one(x) and not is_key and next(iter(x.devices())).platform == "cpu"

    return all(not isinstance(x, jax.Array) or readable(x) for x in jax.tree.leaves(trees))


def on_one_device(arrays: Sequence[Any]) -> bool:
    """Returns whether it is known that no array is sharded; all lie on the same devices."""
    return all(
        jax.device_count() == 1 if isinstance(x, jax.core.Tracer) else _is_on_one(x)
        for x in arrays
        if isinstance(x, jax.Array)
    )


def _is_on_one(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and len(x.sharding.device_set) == 1


def map_arrays(f: Callable[..., Any], rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Calls a function of arrays for each row, in one program for all rows of the same devices.

    It compiles anew for each function, which must therefore not be made for the call. NumPy arrays
    come first in their row, and are not converted.
    """
    results: list[Any] = [None] * len(rows)
    programs: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        arrays = [x for x in row if isinstance(x, jax.Array)]
        if not isinstance(row[0], jax.Array) or any(isinstance(x, jax.core.Tracer) for x in arrays):
            results[i] = f(*row)
        else:
            programs.setdefault(frozenset(row[0].sharding.device_set), []).append(i)
    for members in programs.values():
        made = _map(f, [rows[i] for i in members])
        for i, result in zip(members, made, strict=True):
            results[i] = result
    return results


@functools.partial(jax.jit, static_argnums=0)
def _map(f: Callable[..., Any], rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [f(*row) for row in rows]


def check_held(path: str, like: Any) -> None:
    """Raises a `ValueError` that names an abstract leaf whose axes its mesh does not divide."""
    if isinstance(like, jax.ShapeDtypeStruct) and like.sharding is not None:
        try:
            like.sharding.shard_shape(like.shape)
        except ValueError as error:
            raise ValueError(
                f"{path}: its mesh cannot hold this leaf of shape {like.shape}: {error}. Replicate "
                "an axis that the mesh does not divide by `None` in the spec."
            ) from error


def fitting(sharding: NamedSharding, before: Sequence[int], after: Sequence[int]) -> NamedSharding:
    """Returns the sharding for a new shape, which replicates the axes that no longer divide."""
    if len(before) != len(after):
        return sharding.update(spec=P())  # which axes became which is not known
    spec = [*sharding.spec, *[None] * (len(before) - len(sharding.spec))]
    for i, (axis, size) in enumerate(zip(spec, after, strict=True)):
        names = (axis,) if isinstance(axis, str) else tuple(axis or ())
        if size % math.prod(sharding.mesh.shape[name] for name in names):
            spec[i] = None
    return sharding.update(spec=P(*spec))


def automatic(f: Callable[..., jax.Array], leaf: Any, *args: Any) -> jax.Array:
    """Calls a function that sorts, reshapes or slices arrays, however they are sharded.

    On a mesh with explicit axes each of these operations needs an output sharding; here the
    compiler chooses them. The result has the sharding of the leaf, the first array, where it fits.
    """
    if not is_explicit(leaf):
        return f(leaf, *args)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (leaf, *args))
    sharding = jax.typeof(leaf).sharding
    out = fitting(sharding, leaf.shape, jax.eval_shape(f, *shapes).shape)
    with use_abstract_mesh(sharding.mesh):
        return auto_axes(f, out_sharding=out)(leaf, *args)


def replicating(f: Callable[..., Any], *args: Any) -> Any:
    """Calls a function however its operands are sharded; on an explicit mesh results are not."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args) if is_explicit(x)]
    if not meshes:
        return f(*args)
    with use_abstract_mesh(meshes[0]):
        return auto_axes(f, out_sharding=P())(*args)


def resized(leaf: Any, shape: tuple[int, ...]) -> NamedSharding | None:
    """Returns the sharding for a slice of a leaf, along the axes that the mesh still divides."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return fitting(sharding, leaf.shape, shape) if isinstance(sharding, NamedSharding) else None


def follow(mask: jax.Array, leaf: Any) -> jax.Array:
    """Shards a mask as its leaf is."""
    # The right factor is always true, but XLA cannot prove it, so it reads the leaf elementwise:
    # sharding propagation then gives the mask, computed from replicated values, the sharding of the
    # leaf. Under jit with automatic axes no API copies a sharding that is not in the type.
    return mask & (jnp.greater(leaf, 0) | jax.lax.optimization_barrier(jnp.array(True)))


def beside(x: Any, arrays: Sequence[Any]) -> Any:
    """Puts a small NumPy array where other arrays lie, by a transfer that no guard forbids.

    On a mesh with explicit axes its type would change, so `jit` has to move it there. Under a
    transformation it stays a constant, or what was traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in (x, *arrays)):
        return x
    for leaf in arrays:
        if isinstance(leaf, jax.Array):
            sharding = leaf.sharding
            if is_explicit(leaf):
                break
            if isinstance(sharding, NamedSharding):
                return jax.device_put(x, NamedSharding(sharding.mesh, P()))
            return jax.device_put(x, sharding if leaf.committed else None)
    return jax.device_put(x)


def replicated(x: jax.Array) -> jax.Array:
    """Replicates a small array on an explicit mesh, for operations that need one sharding."""
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(x, sharding.update(spec=P())) if is_explicit(x) else x


def read(x: Any) -> np.ndarray:
    """Reads an array, shards of which may be in other processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        everywhere = NamedSharding(x.sharding.mesh, P())  # type: ignore[attr-defined]
        # jit instead of `reshard`, which takes no automatic axes.
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return np.asarray(x)


def place_all(arrays: Sequence[Any], likes: Sequence[Any]) -> list[Any]:
    """Puts arrays where other ones lie, in one transfer where none is committed."""
    if any(getattr(x, "committed", False) for x in likes):
        return list(map(place, arrays, likes))
    return jax.device_put(list(arrays))


def place(array: Any, like: Any) -> Any:
    """Puts an array of the same shape on the devices of another one, which may be abstract."""
    if isinstance(like, jax.Array) and any(isinstance(x, jax.core.Tracer) for x in (like, array)):
        sharding = jax.typeof(like).sharding
        return array if sharding.mesh.empty else jax.sharding.reshard(array, sharding)
    # Where `like` is not committed to a device the array must not be: a jitted step that gets one
    # more committed array compiles a second time.
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    return jax.device_put(array, sharding)
