"""Flax nnx: a module as a function of its state, and back.

>>> from flax import nnx
>>> import jax.numpy as jnp, jaxprune as jp
>>> model = nnx.Sequential(
...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
... )
>>> x = jnp.ones((5, 3))
>>> apply_fn, state = jp.nnx.split(model)
>>> masks = jp.find_groups(apply_fn, state, x).select(jp.scores.magnitude(state), 0.5)
>>> small_fn, small_state, plan = jp.shrink(apply_fn, state, masks, x)
>>> small_model = jp.nnx.merge(model, small_fn, small_state, x)
>>> small_model.layers[0].kernel.shape
(3, 4)
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxprune._shrink import differences


def split(
    model: nnx.Module, *, method: str = "__call__", has_aux: bool = False
) -> tuple[Callable[..., Any], nnx.State]:
    """Splits a module into ``(apply_fn, state)``, where ``apply_fn(state, *inputs)`` calls it.

    Call ``model.eval()`` or ``model.train()`` first: the function keeps the mode.

    Args:
      model: the module. Neither ``split`` nor ``apply_fn`` changes it, or the state.
      method: the name of the method to call.
      has_aux: whether ``apply_fn`` returns ``(output, new state)``, with new batch statistics and
        random counts, to shrink a training step with ``has_aux=True``.

    Examples:
      >>> apply_fn, state = split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> apply_fn(state, jnp.ones((5, 3))).shape
      (5, 2)
    """
    graph, state = nnx.split(model)

    def apply_fn(state: nnx.State, *inputs: Any) -> Any:
        module = nnx.merge(graph, _copy(state))
        output = getattr(module, method)(*inputs)
        return (output, nnx.state(module)) if has_aux else output

    return apply_fn, _copy(state)


def merge(
    model: nnx.Module, small_fn: Callable[..., Any], small_state: nnx.State, *inputs: Any
) -> nnx.Module:
    """Returns the module with the shrunk arrays, after checking that it computes the same function.

    A module may store sizes, or divide by the size of an array. So its result is compared with that
    of ``small_fn`` on the inputs. Attributes such as ``out_features`` keep their dense values.

    Args:
      model: the module that was shrunk, in the same mode.
      small_fn: the shrunk function.
      small_state: the shrunk state.
      *inputs: example inputs.

    Raises:
      ValueError: if the module cannot run with these arrays, or returns another result.

    Examples:
      >>> model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3))
      >>> merge(model, *split(model), x).kernel.shape  # `shrink` makes the second and third smaller
      (3, 2)
    """
    small = nnx.merge(nnx.graphdef(model), _copy(small_state))
    expected = small_fn(small_state, *inputs)
    advice = "Its code needs the dense sizes: use the shrunk function."
    try:
        result = nnx.clone(small)(*inputs)
    except Exception as error:  # whatever the module's code raises
        raise ValueError(
            f"{type(model).__name__} cannot run with the shrunk state ({error!s:.200}). {advice}"
        ) from error
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (result, expected)]
    if shapes[0] != shapes[1] or differences(jax.tree.leaves(expected), result):
        raise ValueError(
            f"{type(model).__name__} must return the result of the shrunk function, got another "
            f"one. {advice}"
        )
    return small


def _copy(state: nnx.State) -> nnx.State:
    """Copies the variables, not their arrays: a module updates the variables that it is made of."""
    return jax.tree.map(lambda w: w, state)
