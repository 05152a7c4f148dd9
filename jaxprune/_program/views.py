"""Contractions as matrix products: the rows that flow into a weight, and the weight as a matrix.

Every matmul, grouped matmul and convolution is ``(groups, rows, inputs) @ (groups, inputs,
outputs)``: groups are the batch axes of a `dot_general`, the experts of a `ragged_dot` and the
feature groups of a convolution, whose rows are patches.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Sums(NamedTuple):
    """What is summed over the rows that flow into a weight; ``g`` groups, ``d`` inputs."""

    count: jax.Array  # type: ignore[assignment]  # shape=(g,)
    total: jax.Array  # shape=(g, d)
    squares: jax.Array  # shape=(g, d)
    gram: jax.Array | None  # shape=(g, d, d), if it is asked for


class View(NamedTuple):
    """How a contraction is a product of matrices; hashable."""

    axes: tuple[int, ...]  # of the weight: those of groups, then inputs, then outputs
    counts: tuple[int, int]  # how many axes are those of groups, and how many those of inputs
    rows: tuple[int, ...] = ()  # the axes of the activation: those of groups, rows, inputs
    others: tuple[int, int] = (0, 0)  # how many of them are those of groups, and of inputs
    split: int = 1  # into how many groups the features of a convolution are split
    window: Any = None  # the parameters of a convolution, hashable
    ragged: bool = False  # whether each row belongs to one group


def view(eqn: Any, weight: int) -> View | str:
    """Returns how a contraction is a product of matrices, or why it is not."""
    name, params = eqn.primitive.name, eqn.params
    ndims = [len(atom.aval.shape) for atom in eqn.invars]
    if name == "dot_general":
        (contracted, batch) = params["dimension_numbers"]
        groups, inputs = tuple(batch[weight]), tuple(contracted[weight])
        other = 1 - weight
        free = [
            tuple(i for i in range(ndims[k]) if i not in (*batch[k], *contracted[k]))
            for k in (weight, other)
        ]
        rows = (*batch[other], *free[1], *contracted[other])
        counts = len(groups), len(inputs)
        return View((*groups, *inputs, *free[0]), counts, rows, counts)
    if weight != 1:
        return "it is the left operand"
    if name == "conv_general_dilated":
        if params["batch_group_count"] > 1:
            return "the batch is grouped"
        numbers = params["dimension_numbers"]
        outputs, *inputs = numbers.rhs_spec
        names = "window_strides padding lhs_dilation rhs_dilation".split()
        window = tuple((n, tuple(params[n])) for n in names)
        sizes = tuple(eqn.invars[1].aval.shape[axis] for axis in inputs[1:])
        window += (("filter_shape", sizes),)
        split = params["feature_group_count"]
        # A matrix of all groups has the outputs first: they are split into groups.
        return View((outputs, *inputs), (0, len(inputs)), numbers.lhs_spec, (0, 0), split, window)
    ragged = params["ragged_dot_dimension_numbers"]
    (contracted, batch) = ragged.dot_dimension_numbers
    if tuple(map(tuple, contracted)) != ((1,), (1,)) or any(batch) or ndims[:2] != [2, 3]:
        return "it is ragged along another axis than the rows"
    return View((0, 1, 2), (1, 1), (0, 1), (0, 1), ragged=True)


def matrix(view: View, w: jax.Array) -> jax.Array:
    """Returns a weight as an array of shape ``(groups, inputs, outputs)``."""
    w = w.transpose(view.axes)
    if view.window is not None:
        return w.reshape(view.split, w.shape[0] // view.split, -1).swapaxes(1, 2)
    groups, inputs = view.counts
    shape = w.shape[:groups], w.shape[groups : groups + inputs], w.shape[groups + inputs :]
    return w.reshape(*map(math.prod, shape))


def unmatrix(view: View, m: jax.Array, like: Any) -> jax.Array:
    """Returns the inverse of :func:`matrix`, for a weight of the shape of ``like``."""
    shape = tuple(like.shape[axis] for axis in view.axes)
    m = m.swapaxes(1, 2) if view.window is not None else m
    back = sorted(range(len(shape)), key=view.axes.__getitem__)
    return m.reshape(shape).transpose(back)


def of_rows(view: View) -> View:
    """Returns what :func:`sums` needs of a view, the same for weights that read the same rows."""
    return view._replace(axes=(), counts=(0, 0))


def sums(view: View, gram: bool, x: jax.Array, *sizes: jax.Array) -> Sums:
    """Sums over the rows that flow into a weight."""
    x = x.astype(jnp.float32)
    if view.ragged:
        return _ragged(gram, x, sizes[0])
    if view.window is not None:
        rows = _patches(view, x.transpose(view.rows))
    else:
        x = x.transpose(view.rows)
        groups, inputs = view.others
        end = x.ndim - inputs
        rows = x.reshape(*map(math.prod, (x.shape[:groups], x.shape[groups:end], x.shape[end:])))
    count = jnp.full(rows.shape[0], rows.shape[1], jnp.float32)
    product = _gram(rows) if gram else None
    return Sums(count, jnp.sum(rows, 1), jnp.sum(rows * rows, 1), product)


def _gram(rows: jax.Array) -> jax.Array:
    return jnp.einsum("...nd,...ne->...de", rows, rows, precision=lax.Precision.HIGHEST)


def _patches(view: View, x: jax.Array) -> jax.Array:
    options: dict[str, Any] = {**dict(view.window), "precision": lax.Precision.HIGHEST}
    x = lax.conv_general_dilated_patches(x, **options)  # batch, features·window, space
    x = x.reshape(x.shape[0], view.split, x.shape[1] // view.split, -1)
    return x.transpose(1, 0, 3, 2).reshape(view.split, -1, x.shape[2])


def _ragged(gram: bool, x: jax.Array, sizes: jax.Array) -> Sums:
    """Sums over the rows of each group: the first ``sizes[0]`` belong to the first, and so on."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")

    def of_group(g: jax.Array) -> Sums:
        inside = (group == g).astype(jnp.float32)
        rows = x * inside[:, None]
        product = _gram(rows) if gram else None
        return Sums(jnp.sum(inside), jnp.sum(rows, 0), jnp.sum(rows * rows, 0), product)

    return lax.map(of_group, jnp.arange(len(sizes)))
