"""Losses as criteria take them: of the floating leaves, scalar, or of one example at a time."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _tree


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
    with differentiating(name, scalar, floats):
        return jax.grad(scalar)(floats)


@contextlib.contextmanager
def differentiating(name: str, scalar: Callable[..., jax.Array], floats: Any) -> Iterator[None]:
    """Raises a `TypeError` that names the criterion where the loss runs, but has no derivative."""
    try:
        yield
    except Exception as error:
        jax.eval_shape(scalar, floats)  # an error of the loss itself stays as it is
        raise TypeError(
            f"{name}: the loss cannot be differentiated: {error} First derivatives are needed, and "
            "second ones by obd, obd_hutchinson and grasp; magnitude needs none."
        ) from error


def check_examples(name: str, batch: Any) -> None:
    """Raises a `ValueError` unless all batch arrays have as many examples, on their first axis."""
    shapes = {path: jnp.shape(x) for path, x in _tree.named_leaves(batch)}
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{name}: needed the examples along the first axis of every batch array, got the "
            f"shapes {shapes}. Close the loss over what is not split by example."
        )


def example(batch: Any, i: Any) -> Any:
    """Gives one example, as a batch of one."""
    one = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=1)
    return jax.tree.map(lambda x: _mesh.automatic(one, x, i), batch)


def fold(step: Callable[[Any, Any], Any], carry: Any, count: int, traced: bool) -> Any:
    """Calls ``carry = step(carry, i)`` for every i, in a loop of Python where nothing is traced.

    XLA on CPUs takes gradients of convolutions ten times slower in a loop of its own.
    """
    numbers = np.arange(count, dtype=np.int32)
    if traced:
        return jax.lax.scan(lambda carry, i: (step(carry, i), None), carry, numbers)[0]
    for i in numbers:
        carry = step(carry, i)
    return carry


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
