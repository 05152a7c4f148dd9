"""Sums that do not depend on the order of their terms, so a mesh does not change the last bit.

Each device adds its shard first, so a plain sum of floats depends on the mesh. Here all terms are
rounded to multiples of one power of two: small enough for a float32 result, and large enough that
every partial sum fits a mantissa and is exact.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh

_LARGE = 1 << 22  # terms are worth a program, which NumPy takes twice as long for


def exact_sum(x: jax.Array, axes: tuple[int, ...]) -> Any:
    """Sums over axes to float32, independent of the order of the terms.

    Terms become multiples of a power of two, of which n terms of the largest size make at most 2⁴⁶.
    Float64 adds these exactly, also on TPUs, where it is two float32. The rounding is finer than
    that of float32 for up to millions of terms. NaN and infinities remain what they are.
    """
    if x.size < _LARGE and _mesh.on_host(x):
        with np.errstate(invalid="ignore"):  # inf - inf
            return _sum(np, jax.device_get(x), axes)
    with jax.enable_x64(True):
        return _sum_in_jax(x, axes)


def _sum(xp: Any, x: Any, axes: tuple[int, ...]) -> Any:
    x = x.astype(np.float32)
    options = {"axis": axes, "keepdims": True}
    largest = xp.maximum(x.max(initial=0, **options), -x.min(initial=0, **options))
    shift = 46 - (x.size // max(largest.size, 1)).bit_length() - xp.frexp(largest)[1]
    half, rest = _powers(xp, shift)
    scale = half.astype(np.float64) * rest.astype(np.float64)
    total = xp.sum(xp.rint(x.astype(np.float64) * scale), **options) / scale
    return xp.squeeze(total.astype(np.float32), axes)


_sum_in_jax = jax.jit(functools.partial(_sum, jnp), static_argnames="axes")


@functools.partial(jax.jit, static_argnames="block")
def exact_block_sum(x: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """Sums blocks of the last axes to float32, independent of the order of the terms.

    Blocks are windows of ``reduce_window``, for which devices exchange only the blocks that they
    share; a reshape to blocks would gather an axis whose shards are not multiples of the block.
    TPUs have no float64 windows, so the terms are cut into digits of ``width`` bits, and each digit
    is summed in int32::

        x / 2**e  =  0.ddd ddd ddd …     e: the exponent of the largest term of the block
                       1   2   3         digits, until they cover the 24 bits of a float32 sum
    """
    window = (1,) * (x.ndim - len(block)) + block
    pad = [(0, -size % length) for size, length in zip(x.shape, window, strict=True)]

    def reduce(op: Callable[..., Any], x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, jnp.zeros((), x.dtype), op, window, window, pad)

    x = x.astype(jnp.float32)
    largest = reduce(jax.lax.max, jnp.abs(x))
    finite = jnp.isfinite(largest)
    exponent = jnp.frexp(jnp.where(finite, largest, 1))[1]
    powers, rest = _powers(jnp, exponent), x
    for power in powers:
        rest *= spread_blocks(1 / power, block, x.shape)  # now |rest| < 1
    bits = math.prod(block).bit_length()  # a sum of n digits is this much longer than one
    width = 31 - bits
    total = jnp.zeros_like(largest)
    for i in range(1, 1 + -(-(24 + bits) // width)):
        rest *= 2.0**width
        digit = jnp.round(rest)
        rest -= digit  # exact: the bits that follow, at most half a unit in size
        # Behind a barrier, so that the window adds integers and no conversion is fused into it.
        part = reduce(jax.lax.add, jax.lax.optimization_barrier(digit.astype(jnp.int32)))
        total += part.astype(jnp.float32) * 2.0 ** (-i * width)
    # NaN and infinities have no leading bits; their plain sum has no order either.
    return jnp.where(finite, total * powers[0] * powers[1], reduce(jax.lax.add, x))


def _powers(xp: Any, exponent: Any) -> list[Any]:
    """Returns two factors of 2**exponent, which itself may exceed the range of float32."""
    return [xp.ldexp(xp.float32(1), e) for e in (exponent // 2, exponent - exponent // 2)]


def spread_blocks(x: jax.Array, block: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Repeats the entry of each block over the block, to an array of the given shape."""
    for axis, length in enumerate(block, len(shape) - len(block)):
        x = jnp.repeat(x, length, axis)
    return jax.lax.slice(x, (0,) * len(shape), shape)
