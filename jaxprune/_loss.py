"""Helpers for data-driven criteria: checks around a score, gradients, loops over examples.

A criterion is a function ``(loss, params, *batch) -> scores`` decorated with :func:`checked`. It
differentiates with :func:`grad`, with respect to the floating leaves alone, and is compiled by
:func:`checked` or :func:`fold`, so that it follows what the loss closes over.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _tree
from jaxprune._tree import Params, Tree

CURRIED = "Pass the function itself; its arguments follow in a second call."
Loss = Callable[..., jax.Array]  # (params, *batch) -> scalar


def checked(
    name: str, *, compiled: bool = True, examples: bool = False, curvature: bool = False
) -> Callable[..., Any]:
    """Returns a decorator that checks the arguments of a criterion before it is traced.

    A criterion that is ``compiled`` runs as one program. With ``examples``, all arrays of the batch
    must have the examples along their first axis. With ``curvature``, the criterion also returns
    the :func:`largest` curvature, which is checked here.
    """

    def decorate(criterion: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(criterion)
        def run(loss: Loss, params: Params, *batch: Any, **options: Any) -> Any:
            _tree.check_function(f"{name}: loss", loss, CURRIED)
            _tree.check_params(params)
            if examples:
                check_examples(name, batch)
            score = functools.partial(criterion, loss, **options)
            args = (params, *batch)
            result = (_program.freeze(score, *args) if compiled else score)(*args)
            if curvature:
                result, largest = result
                _check_curvature(name, largest)
            return result

        return run

    return decorate


def check_groups(name: str, groups: Any) -> None:
    """Raises a `TypeError` for anything else in place of groups."""
    if not hasattr(groups, "groups") or not hasattr(groups, "unit"):
        raise TypeError(
            f"{name}: groups must come from `jp.find_groups`, got {type(groups).__name__}. Pass "
            "them as the first argument."
        )


def of_floats(name: str, loss: Loss, params: Params, *batch: Any) -> tuple[Loss, Tree]:
    """Returns the loss as a function of the floating leaves, and these leaves."""

    def scalar(floats: Tree) -> jax.Array:
        value = loss(_tree.merge(floats, params), *batch)
        if not isinstance(value, _tree.ARRAYS) or jnp.shape(value) or not _tree.is_floating(value):
            raise TypeError(
                f"{name}: the loss must return one floating-point number, got "
                f"{jax.tree.map(jax.typeof, value)}. Average over the examples, and leave "
                "auxiliary outputs out."
            )
        return value

    return scalar, jax.tree.map(jnp.asarray, _tree.floating(params))


def grad(name: str, loss: Loss, params: Params, *batch: Any) -> Tree:
    """Returns the gradient of a loss in the floating leaves, and `None` for the others."""
    scalar, floats = of_floats(name, loss, params, *batch)
    with differentiating(name, scalar, floats):
        return jax.grad(scalar)(floats)


@contextlib.contextmanager
def differentiating(name: str, scalar: Loss, floats: Tree) -> Iterator[None]:
    """Raises a `TypeError` that names the criterion if the loss runs but has no derivative."""
    try:
        yield
    except Exception as error:
        jax.eval_shape(scalar, floats)  # raises first, if the loss itself has an error
        raise TypeError(
            f"{name}: the loss cannot be differentiated: {error} All criteria with a loss need "
            "first derivatives; obd, obd_hutchinson and grasp need second ones. Use a "
            "differentiable loss, or `magnitude`."
        ) from error


def check_examples(name: str, batch: Tree) -> None:
    """Raises a `ValueError` unless all batch arrays have equally many examples on axis 0."""
    shapes = {path: jnp.shape(x) for path, x in _tree.named_leaves(batch)}
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{name}: every batch array must have the examples along the first axis, got the "
            f"shapes {shapes}. Close the loss over arrays that are not split by example."
        )


def example(batch: Tree, i: Any) -> Tree:
    """Returns example i as a batch of one."""
    one = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=1)
    return jax.tree.map(lambda x: _mesh.automatic(one, x, i), batch)


def fold(step: Callable[..., Any], carry: Any, count: int, *args: Any) -> Any:
    """Computes ``carry = step(carry, i, *args)`` for every i below count.

    Outside jit this is a Python loop over a compiled step, because XLA on CPUs computes gradients
    of convolutions ten times slower inside its own loops. Under jit it is a scan: one step.
    """
    numbers = np.arange(count, dtype=np.int32)
    if _tree.is_traced(carry, args):
        return jax.lax.scan(lambda carry, i: (step(carry, i, *args), None), carry, numbers)[0]
    step = _program.freeze(step, carry, np.int32(0), *args, donate=True)
    return functools.reduce(lambda carry, i: step(carry, i, *args), numbers, carry)


def zeros(params: Params) -> Tree:
    """Returns float32 zeros for floating leaves, sharded as they are."""
    with jax.transfer_guard_host_to_device("allow"):  # of one zero
        return _tree.map_floating(lambda w: jnp.zeros_like(w, jnp.float32), params)


def largest(curvature: Tree) -> Tree:
    """Returns the largest absolute value of every leaf."""
    return jax.tree.map(lambda h: jnp.max(jnp.abs(h), initial=0), curvature)


def _check_curvature(name: str, largest: Tree) -> None:
    """Raises a `ValueError`, outside jit, for a curvature that is not finite or 0 everywhere."""
    if _tree.is_traced(largest):
        return
    sizes = {_tree.show(path): float(x) for path, x in _tree.named_leaves(jax.device_get(largest))}
    bad = next((path for path, size in sizes.items() if not np.isfinite(size)), None)
    if bad:
        raise ValueError(
            f"{name}: {bad} has a curvature that is NaN or infinite. Check the loss and the params."
        )
    if not any(sizes.values()):
        raise ValueError(
            f"{name}: the curvature is exactly 0 in every leaf ({next(iter(sizes))}, ...), as for "
            "a loss that is linear in the outputs of a piecewise linear network. Use another "
            "loss, or `taylor`."
        )
