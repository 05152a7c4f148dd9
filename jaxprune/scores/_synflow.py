import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree


@functools.cache  # the same function again, so that jits around it do not retrace
def synflow(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    r"""Scores a weight by the synaptic flow through it: no data, and no layer collapses.

    .. math:: R = \mathbb{1}^\top f_{|w|}(\mathbb{1}), \qquad s = |w \, \partial R / \partial |w||

    divided by the largest score. Evaluated in float64, so that deep networks do not overflow; a TPU
    makes float64 of two float32, with the range of one. All floating leaves are made positive;
    running means (leaves named ``mean``) count as zero, because batch norm subtracts them. The flow
    is conserved in networks of linear layers, ReLU-like units and batch norm in inference mode;
    GELU, softmax and LayerNorm break that. Use it in :func:`jaxprune.select_iteratively`.

    Args:
      apply_fn: maps ``(params, *inputs)`` to outputs, in inference mode.

    Returns:
      A function of ``(params, *inputs)`` giving one float32 score per weight; higher is kept.
      Only the shapes of floating inputs are used, so that `jax.ShapeDtypeStruct` will do; a batch
      of 1 costs least and gives the same. Other inputs pass unchanged. Raises a `ValueError`,
      outside jit, if no flow reaches the output.

    Examples:
      >>> f = lambda w, x: jax.nn.relu(x @ w[0]) @ w[1]
      >>> params = [jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [1.0]])]
      >>> synflow(f)(params, jax.ShapeDtypeStruct((1, 1), jnp.float32))[1].tolist()
      [[1.0], [0.6666666865348816]]

    References:
      Tanaka et al, `Pruning neural networks without any data by iteratively conserving synaptic
      flow <https://arxiv.org/abs/2006.05467>`_, 2020
    """
    return functools.partial(_checked, apply_fn)


def _checked(apply_fn, params, *inputs):
    _tree.check_params(params)
    for path, leaf in _tree.named_leaves(inputs):
        if isinstance(leaf, jax.ShapeDtypeStruct) and not _tree.is_floating(leaf):
            raise TypeError(
                f"input {path}: synflow uses inputs of dtype {leaf.dtype} as they are, got a shape "
                "alone. Pass an array."
            )
    leaves, treedef = jax.tree.flatten(inputs)
    shapes = tuple(jnp.shape(x) if _tree.is_floating(x) else None for x in leaves)
    others = [None if shape is not None else x for shape, x in zip(shapes, leaves, strict=True)]
    with jax.enable_x64(True):
        scores, flow = _synflow(apply_fn, treedef, shapes, params, others)
    if not _tree.is_traced(flow) and not 0 < float(flow) < float("inf"):
        raise ValueError(
            f"synflow: the flow R is {flow}, so that scores say nothing. Needed a positive, finite "
            "one: use the network in inference mode, with an output that grows with its weights."
        )
    return scores


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _synflow(apply_fn, treedef, shapes, params, others):
    inputs = treedef.unflatten(
        [x if s is None else jnp.ones(s, jnp.float64) for s, x in zip(shapes, others, strict=True)]
    )
    floats = jax.tree.map(lambda w: jnp.abs(jnp.asarray(w, jnp.float64)), _tree.floating(params))
    floats = _tree.zero_means(floats)

    def flow(floats):
        outputs = apply_fn(_tree.merge(floats, params), *inputs)
        return sum(
            jnp.sum(y.astype(jnp.float64)) for y in jax.tree.leaves(outputs) if _tree.is_floating(y)
        )

    total, grads = jax.value_and_grad(flow)(floats)
    scores = jax.tree.map(lambda g, w: jnp.abs(g * w), grads, floats)
    largest = functools.reduce(jnp.maximum, [jnp.max(s) for s in jax.tree.leaves(scores) if s.size])
    return jax.tree.map(lambda s: (s / largest).astype(jnp.float32), scores), total
