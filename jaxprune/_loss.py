"""Losses as criteria take them: of the floating leaves, scalar, or of one example at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree


def of_floats(name: str, loss: Callable[..., jax.Array], params: Any, *batch: Any) -> Any:
    """Gives the loss as a function of the floating leaves, and these leaves."""

    def scalar(floats):
        value = loss(_tree.merge(floats, params), *batch)
        if not isinstance(value, _tree.ARRAYS) or jnp.shape(value) or not _tree.is_floating(value):
            raise TypeError(
                f"{name}: the loss must return one floating-point number, got "
                f"{jax.tree.map(jax.typeof, value)}. Average over the examples, and leave "
                "auxiliary outputs out."
            )
        return value

    return scalar, jax.tree.map(jnp.asarray, _tree.floating(params))


def grad(name: str, loss: Callable[..., jax.Array], params: Any, *batch: Any) -> Any:
    """Takes ``jax.grad`` over the floating leaves alone; `None` for the others."""
    scalar, floats = of_floats(name, loss, params, *batch)
    return jax.grad(scalar)(floats)


def check_examples(name: str, batch: Any) -> None:
    """Raises a `ValueError` unless all batch arrays have as many examples, on their first axis."""
    shapes = {path: jnp.shape(x) for path, x in _tree.named_leaves(batch)}
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{name}: needed the examples along the first axis of every batch array, got the "
            f"shapes {shapes}. Close the loss over what is not split by example."
        )


def example_grads(name: str, loss: Callable[..., jax.Array], params: Any) -> Any:
    """Gives the gradient as a function of one example, taken as a batch of one."""

    def grads(example):
        return grad(name, loss, params, *jax.tree.map(lambda x: x[None], example))

    return grads


def mean_squares(grads: Callable[[Any], Any], batch: Any) -> Any:
    """Averages the squares of the gradients of all examples, in float32.

    One at a time: a square is then added where it is made, which no batched matmul allows.
    """
    count = len(jax.tree.leaves(batch)[0])

    def add(total, example):
        squares = jax.tree.map(lambda g: g.astype(jnp.float32) ** 2, grads(example))
        return jax.tree.map(jnp.add, total, squares), None

    shapes = jax.eval_shape(grads, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda t: t / count, total)


def largest(curvature: Any) -> Any:
    """Finds the largest absolute value of every leaf."""
    return jax.tree.map(lambda h: jnp.max(jnp.abs(h), initial=0), curvature)


def check_curvature(name: str, largest: Any) -> None:
    """Raises a `ValueError`, outside jit, for a curvature that is not finite, or 0 everywhere."""
    if _tree.is_traced(largest):
        return
    sizes = {path: float(size) for path, size in _tree.named_leaves(jax.device_get(largest))}
    for path, size in sizes.items():
        if not np.isfinite(size):
            raise ValueError(
                f"{name}: {_tree.show(path)} has a curvature that is NaN or infinite. Check the "
                "loss and the params."
            )
    if not any(sizes.values()):
        raise ValueError(
            f"{name}: the curvature is exactly 0 in every leaf ({_tree.show(next(iter(sizes)))}, "
            "...), so that scores say nothing. Needed a loss with a curvature: one that is linear "
            "in the outputs of a piecewise linear network has none. Try `taylor`."
        )
