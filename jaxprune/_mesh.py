"""Arrays on meshes: what needs care where leaves are spread over devices."""

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
    """Says whether the type of an array tells how it is sharded."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def check_together(leaves: Iterable[tuple[str, Any]]) -> None:
    """Raises a `ValueError` that names the first array on other devices than those before."""
    placed = [
        (path, x.sharding)
        for path, x in leaves
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    ]
    for path, sharding in placed:
        if sharding.device_set != placed[0][1].device_set:
            raise ValueError(
                f"{path}: lies on other devices ({sharding}) than {placed[0][0]} "
                f"({placed[0][1]}). Put all on one mesh, as with `jax.device_put(array, "
                "NamedSharding(mesh, spec))`; an axis that the mesh does not divide is replicated, "
                "by `None` in the spec."
            )


def check_held(path: str, like: Any) -> None:
    """Raises a `ValueError` that names an abstract leaf which its mesh does not divide."""
    if isinstance(like, jax.ShapeDtypeStruct) and like.sharding is not None:
        try:
            like.sharding.shard_shape(like.shape)
        except ValueError as error:
            raise ValueError(
                f"{path}: its mesh cannot hold this leaf of shape {like.shape}: {error}. Replicate "
                "an axis that the mesh does not divide, by `None` in the spec."
            ) from error


def fitting(sharding: NamedSharding, before: Sequence[int], after: Sequence[int]) -> NamedSharding:
    """Shards an array of a new shape along the axes that still divide, if it has as many axes."""
    spec = [*sharding.spec, *[None] * (len(before) - len(sharding.spec))]
    if len(before) != len(after):
        return sharding.update(spec=P())
    for i, (axis, size) in enumerate(zip(spec, after, strict=True)):
        names = (axis,) if isinstance(axis, str) else tuple(axis or ())
        if size % math.prod(sharding.mesh.shape[name] for name in names):
            spec[i] = None
    return sharding.update(spec=P(*spec))


def automatic(f: Callable[..., jax.Array], leaf: Any, *args: Any) -> jax.Array:
    """Calls a function that may sort, reshape and slice arrays, however they are sharded.

    On a mesh with explicit axes every such operation would need a sharding: there the compiler is
    left to choose them. The result is sharded as the leaf is, the first array, where that fits it.
    """
    if not is_explicit(leaf):
        return f(leaf, *args)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (leaf, *args))
    sharding = jax.typeof(leaf).sharding
    out = fitting(sharding, leaf.shape, jax.eval_shape(f, *shapes).shape)
    with use_abstract_mesh(sharding.mesh):
        return auto_axes(f, out_sharding=out)(leaf, *args)


def resized(x: jax.Array, leaf: Any) -> jax.Array:
    """Places what was cut from a leaf as it was, along the axes that the mesh still divides."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.device_put(x, fitting(sharding, leaf.shape, x.shape))


def follow(mask: jax.Array, leaf: Any) -> jax.Array:
    """Shards a mask as its leaf is."""
    # True, but XLA cannot see it.
    return mask & (jnp.greater(leaf, 0) | jax.lax.optimization_barrier(jnp.array(True)))


def replicated(x: jax.Array) -> jax.Array:
    """Spreads a small array over an explicit mesh, for operations that need one sharding."""
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(x, sharding.update(spec=P())) if is_explicit(x) else x


def read(x: Any) -> np.ndarray:
    """Reads an array, parts of which may be in other processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        # jit, not `reshard`, so that it works on automatic axes as well.
        whole = NamedSharding(x.sharding.mesh, P())  # type: ignore[attr-defined]
        x = jax.jit(lambda x: x, out_shardings=whole)(x)
    return np.asarray(x)


@functools.partial(jax.jit, static_argnums=1)
def exact_sum(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """Sums to float32 in no order, so that a mesh makes no difference in the last bit.

    Entries are rounded to multiples of a power of two, 2⁴⁶ of which hold as many of the largest as
    there are: float64 adds those exactly, also where it is two float32. Finer than float32 up to
    millions of entries.
    """
    with jax.enable_x64(True):
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
        finite = jnp.isfinite(largest)
        shift = 46 - (x.size // max(largest.size, 1)).bit_length() - jnp.frexp(largest)[1]
        half = jnp.ldexp(jnp.float32(1), shift // 2)  # the whole power may be beyond float32
        rest = jnp.ldexp(jnp.float32(1), shift - shift // 2)
        scale = half.astype(jnp.float64) * rest
        total = jnp.sum(jnp.round(x * scale), axes, keepdims=True) / scale

        def odd():  # NaN and infinities have an order neither, but no largest multiple
            return jnp.where(finite, total, jnp.sum(x, axes, keepdims=True))

        total = jax.lax.cond(jnp.all(finite), lambda: total, odd)
        return jnp.squeeze(total.astype(jnp.float32), axes)


@functools.partial(jax.jit, static_argnums=1)
def exact_block_sum(x: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """Sums blocks of the last axes to float32 in no order.

    A block is a window: devices send each other the blocks that they share. Cutting an axis into
    blocks by a reshape gathers it where shards are no whole number of blocks. TPUs have no windows
    of float64. So integers are added, as many bits at a time as an int32 can hold the sums of, from
    the leading bits of the largest entry down to where those of a float32 sum end.
    """
    window = (1,) * (x.ndim - len(block)) + block
    pad = [(0, -size % length) for size, length in zip(x.shape, window, strict=True)]

    def reduce(op: Callable[..., Any], x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, jnp.zeros((), x.dtype), op, window, window, pad)

    x = x.astype(jnp.float32)
    largest = reduce(jax.lax.max, jnp.abs(x))
    finite = jnp.isfinite(largest)
    exponent = jnp.frexp(jnp.where(finite, largest, 1))[1]
    # Two factors, since one may be beyond float32; powers of two, so that nothing is rounded.
    powers = [jnp.ldexp(jnp.float32(1), e) for e in (exponent // 2, exponent - exponent // 2)]
    rest = x
    for power in powers:
        rest *= spread_blocks(1 / power, block, x.shape)
    bits = math.prod(block).bit_length()
    width = 31 - bits
    total = jnp.zeros_like(largest)
    for i in range(1, 1 + -(-(24 + bits) // width)):
        rest *= 2.0**width
        whole = jnp.round(rest)
        rest -= whole
        part = reduce(jax.lax.add, jax.lax.optimization_barrier(whole.astype(jnp.int32)))
        total += part.astype(jnp.float32) * 2.0 ** (-i * width)
    # NaN and infinities have an order neither, but no leading bits.
    return jnp.where(finite, total * powers[0] * powers[1], reduce(jax.lax.add, x))


def spread_blocks(x: jax.Array, block: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Repeats the entry of a block all over it."""
    for axis, length in enumerate(block, len(shape) - len(block)):
        x = jnp.repeat(x, length, axis)
    return jax.lax.slice(x, (0,) * len(shape), shape)
