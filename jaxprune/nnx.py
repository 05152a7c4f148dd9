"""Flax nnx: a module as a function of its state, and back.

>>> from flax import nnx
>>> import jax.numpy as jnp, jaxprune as jp
>>> model = nnx.Sequential(
...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
... )
>>> x = jnp.ones((5, 3))
>>> fn, state = jp.nnx.split(model)
>>> masks = jp.find_groups(fn, state, x).select(jp.scores.magnitude(state), 0.5)
>>> small_fn, small_state, plan = jp.shrink(fn, state, masks, x)
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
    """Gives a module as ``(fn, state)``, where ``fn(state, *inputs)`` calls it.

    Call ``model.eval()`` or ``model.train()`` before: the function keeps the mode.

    Args:
      model: the module; it is not changed, nor does ``fn`` change it.
      method: what to call.
      has_aux: whether ``fn`` returns ``(output, new state)``, with new batch statistics and random
        counts, to shrink a training step with ``has_aux=True``.

    Examples:
      >>> fn, state = split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> fn(state, jax.numpy.ones((5, 3))).shape
      (5, 2)
    """
    graph, state = nnx.split(model)

    def fn(state: nnx.State, *inputs: Any) -> Any:
        module = nnx.merge(graph, state)
        output = getattr(module, method)(*inputs)
        return (output, nnx.state(module)) if has_aux else output

    return fn, state


def merge(
    model: nnx.Module, small_fn: Callable[..., Any], small_state: nnx.State, *inputs: Any
) -> nnx.Module:
    """Gives a module of the same code with smaller arrays, if its code then does the same.

    A module may hold sizes of its own, and divide by the size that it sees: the result is compared
    with ``small_fn`` on the inputs. Attributes such as ``out_features`` stay as they were.

    Args:
      model: the module that was shrunk, in the mode that was shrunk.
      small_fn: the shrunk function.
      small_state: the shrunk state.
      *inputs: examples.

    Raises:
      ValueError: if the module cannot run with these arrays, or gives another result.

    Examples:
      >>> model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jax.numpy.ones((5, 3))
      >>> fn, state = split(model)  # then `shrink`, which gives a smaller function and state
      >>> merge(model, fn, state, x).kernel.shape
      (3, 2)
    """
    small = nnx.merge(nnx.graphdef(model), small_state)
    expected = small_fn(small_state, *inputs)
    advice = "Its own code needs the dense sizes: use the shrunk function."
    try:
        result = nnx.clone(small)(*inputs)
    except Exception as error:  # whatever the module's code raises
        raise ValueError(
            f"{type(model).__name__} cannot run with the shrunk state ({error!s:.200}). {advice}"
        ) from error
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (result, expected)]
    if shapes[0] != shapes[1] or differences(jax.tree.leaves(expected), result):
        raise ValueError(
            f"{type(model).__name__} runs with the shrunk state, but gives another result than "
            f"the shrunk function. {advice}"
        )
    return small
