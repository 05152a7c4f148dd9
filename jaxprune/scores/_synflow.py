import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _program, _tree
from jaxprune._tree import Params, Score, Scores, Tree

_MEANS = ("mean", "mean_ema/average")  # in Flax, and running_mean, moving_mean; in Haiku


def synflow(apply_fn: Callable[..., Any]) -> Score:
    r"""Scores a weight by the synaptic flow through it: needs no data, and collapses no layer.

    .. math:: R = \mathbb{1}^\top f_{|w|}(\mathbb{1}), \qquad s = |w \, \partial R / \partial |w||

    The scores are divided by the largest one. They are computed in float64, so that deep networks
    do not overflow; TPUs emulate float64 by two float32, with the range of one. All floating leaves
    are made positive, except running means, which are set to zero: the leaves that the program only
    subtracts from values that depend on the inputs, as batch norm does. A leaf whose name ends in
    ``mean`` (``mean_ema/average`` in Haiku) also counts as one if it meets only other params, as in
    a batch norm that is written as one scale and one shift. Networks of linear layers, ReLU-like
    units and batch norm in inference mode conserve the flow; GELU, softmax and LayerNorm do not.
    Use the scores in :func:`jaxprune.select_iteratively`.

    Args:
      apply_fn: maps ``(params, *inputs)`` to outputs, in inference mode.

    Returns:
      A function of ``(params, *inputs)`` that returns one float32 score per weight; higher is kept.
      Of floating inputs only the shapes are used, so `jax.ShapeDtypeStruct` suffices; a batch of 1
      gives the same scores at the least cost. Other inputs are passed unchanged.

    Raises:
      ValueError: outside jit, if no flow reaches the output.
      TypeError: if an input that is not floating is given by its shape alone.

    Examples:
      >>> f = lambda w, x: jax.nn.relu(x @ w[0]) @ w[1]
      >>> params = [jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [1.0]])]
      >>> synflow(f)(params, jax.ShapeDtypeStruct((1, 1), jnp.float32))[1].tolist()
      [[1.0], [0.6666666865348816]]

    References:
      Tanaka et al, `Pruning neural networks without any data by iteratively conserving synaptic
      flow <https://arxiv.org/abs/2006.05467>`_, 2020
    """
    return functools.partial(_synflow, apply_fn)


@_loss.checked("synflow", compiled=False)
def _synflow(apply_fn: Callable[..., Any], params: Params, *inputs: Any) -> Scores:
    for path, leaf in _tree.named_leaves(inputs):
        if isinstance(leaf, jax.ShapeDtypeStruct) and not _tree.is_floating(leaf):
            raise TypeError(
                f"input {path}: synflow needs the values of an input of dtype {leaf.dtype}, got "
                "only its shape. Pass an array."
            )
    leaves, treedef = jax.tree.flatten(inputs)
    shapes = tuple(jnp.shape(x) if _tree.is_floating(x) else None for x in leaves)
    others = [None if shape is not None else x for shape, x in zip(shapes, leaves, strict=True)]
    with jax.enable_x64(True):
        flow_scores = functools.partial(_scores, apply_fn, treedef, shapes)
        scores, flow = _program.freeze(flow_scores, params, others)(params, others)
    if not _tree.is_traced(flow) and not 0 < float(jax.device_get(flow)) < float("inf"):
        raise ValueError(
            f"synflow: the flow R must be positive and finite, got {flow}. Use the network in "
            "inference mode, with an output that grows with its weights."
        )
    return scores


def _scores(
    apply_fn: Callable[..., Any], treedef: Any, shapes: tuple, params: Params, others: list
) -> tuple[Scores, jax.Array]:
    inputs = treedef.unflatten(
        [x if s is None else jnp.ones(s, jnp.float64) for s, x in zip(shapes, others, strict=True)]
    )

    def wide(*args: Any) -> Any:  # params are float64, what the network closes over is not
        with jax.numpy_dtype_promotion("standard"):
            return apply_fn(*args)

    def positive(w: Any, is_mean: bool) -> Any:
        if not _tree.is_floating(w):
            return None
        w = jnp.abs(jnp.asarray(w, jnp.float64))
        return jnp.zeros_like(w) if is_mean else w

    to_float64 = functools.partial(jnp.asarray, dtype=jnp.float64)
    like = _tree.merge(_tree.map_floating(to_float64, params), params)
    means = _running_means(wide, like, inputs)
    pairs = zip(jax.tree.leaves(params), means, strict=True)
    floats = _tree.rebuild(params, [positive(w, is_mean) for w, is_mean in pairs])

    def flow(floats: Tree) -> jax.Array:
        outputs = jax.tree.leaves(wide(_tree.merge(floats, params), *inputs))
        sums = (jnp.sum(y.astype(jnp.float64)) for y in outputs if _tree.is_floating(y))
        return sum(sums, jnp.float64(0))

    total, grads = jax.value_and_grad(flow)(floats)
    scores = jax.tree.map(lambda g, w: jnp.abs(g * w), grads, floats)
    largest = functools.reduce(jnp.maximum, [jnp.max(s) for s in jax.tree.leaves(scores) if s.size])
    return jax.tree.map(lambda s: (s / largest).astype(jnp.float32), scores), total


def _running_means(apply_fn: Callable[..., Any], params: Params, inputs: Any) -> list[bool]:
    """Returns for every leaf whether the network only subtracts it from activations."""
    paths = [path for path, _ in _tree.named_leaves(params)]
    return [
        not use.joined and (use.subtracted or path.endswith(_MEANS))
        for path, use in zip(paths, _program.uses(apply_fn, params, inputs), strict=True)
    ]
