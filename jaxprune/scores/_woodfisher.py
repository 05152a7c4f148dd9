import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _mesh, _tree
from jaxprune._tree import Masks, Params, Score, Scores, Tree
from jaxprune.masks import apply_masks


def woodfisher(loss: Callable[..., jax.Array], block: int = 50, damping: float = 1e-7) -> Score:
    r"""Scores a weight by the growth of the loss without it, after the others have adapted.

    .. math:: s_i = \frac{w_i^2}{2 [F^{-1}]_{ii}}, \qquad
        F = \lambda I + \frac{1}{m} \sum_{n=1}^{m} g_n g_n^\top

    This is Optimal Brain Surgeon with the empirical Fisher information as Hessian, in blocks of
    consecutive weights of a leaf. The inverse is updated one example at a time, in :math:`O(m b)`
    operations and 8 b bytes per weight for blocks of b weights. It is held in float64, because
    float32 is off by several percent if the gradients of a block differ much in size.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, the mean over examples. It is called with one
        example at a time, as a batch of one, so batch norm must be in inference mode.
      block: the number of weights in a block; 1 gives a damped :func:`fisher`.
      damping: :math:`\lambda`. Before training has converged 1e-7 may be too small, so that an
        entire layer is pruned: try 1e-5.

    Returns:
      A function of ``(params, *batch)`` that returns one float32 score per weight; higher is kept.
      All arrays of the batch must have the examples along their first axis; use a few times more
      examples than weights in a block.

    Raises:
      ValueError: for a block below 1, a damping not above 0, or batch arrays of different lengths;
        outside jit also if gradients are not finite, or 0 everywhere.

    Examples:
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> x = jnp.array([[1.0, 1.0], [3.0, 1.0]])
      >>> print(woodfisher(loss)(jnp.array([1.0, -2.0]), x).round(3))
      [0.5 0.4]

    References:
      Singh and Alistarh, `WoodFisher: Efficient Second-Order Approximation for Neural Network
      Compression <https://arxiv.org/abs/2004.14340>`_, 2020

      Kurtic et al, `The Optimal BERT Surgeon <https://arxiv.org/abs/2203.07259>`_, 2022 (blocks of
      50, 1024 gradients)
    """
    _check(block, damping)
    return functools.partial(_score, loss, block, damping)


def woodfisher_update(
    loss: Callable[..., jax.Array], block: int = 50, damping: float = 1e-7
) -> Callable[..., Params]:
    r"""Removes weights, and moves the others of their blocks so that the loss grows least.

    .. math:: \delta w = -[F^{-1}]_{:Q} \, \left([F^{-1}]_{QQ}\right)^{-1} w_Q

    Q are all pruned weights of a block together, so they become exactly 0. The papers of
    :func:`woodfisher` sum the updates of single weights, which is exact only for one.

    Args:
      loss: as in :func:`woodfisher`.
      block: the number of weights in a block.
      damping: :math:`\lambda`.

    Returns:
      A function of ``(params, masks, *batch)`` that returns params: pruned weights are 0, kept ones
      have moved, and leaves without a mask are unchanged.

    Raises:
      ValueError: as in :func:`woodfisher`, and for masks of other paths or shapes.
      TypeError: if masks are not bool.

    Examples:
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> x = jnp.array([[1.0, 1.0], [3.0, 1.0]])
      >>> params, masks = jnp.array([1.0, -2.0]), jnp.array([True, False])
      >>> print(woodfisher_update(loss)(params, masks, x).round(3))
      [0.2 0. ]
    """
    _check(block, damping)
    return functools.partial(_update, loss, block, damping)


def _check(block: int, damping: float) -> None:
    _tree.check_count("woodfisher: block", block)
    if not _tree.is_number(damping) or not damping > 0:
        got = _tree.brief(damping)
        raise ValueError(f"woodfisher: damping must be a number above 0, got {got}.")


def _score(loss: _loss.Loss, block: int, damping: float, params: Params, *batch: Any) -> Scores:
    params, inverses = _inverses(loss, params, *batch, block=block, damping=damping)
    with jax.enable_x64(True):
        return _scores(params, inverses)


def _update(
    loss: _loss.Loss, block: int, damping: float, params: Params, masks: Masks, *batch: Any
) -> Params:
    _tree.check_params(params)
    aligned = _tree.rebuild(params, _tree.align_masks(params, masks))
    params, inverses = _inverses(loss, params, *batch, block=block, damping=damping)
    with jax.enable_x64(True):
        return _moved(block, params, aligned, inverses)


@_loss.checked("woodfisher", compiled=False, examples=True, curvature=True)
def _inverses(
    loss: _loss.Loss, params: Params, *batch: Any, block: int, damping: float
) -> tuple[tuple[Params, Tree], Tree]:
    """Returns the params as arrays with the inverses of their blocks, and the largest gradients."""
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    count = len(jax.tree.leaves(batch)[0])
    outer = bool(jax.enable_x64.value)  # the loss runs as the caller has it
    with jax.enable_x64(True):
        grow = functools.partial(_grow, loss, block, outer)
        start = _start(block, params, jax.device_put(damping))
        inverses, largest = _loss.fold(grow, start, count, params, batch)
    return (params, inverses), largest


@functools.partial(jax.jit, static_argnames="block")
def _start(block: int, params: Params, damping: float) -> tuple[Tree, Tree]:
    """Returns the inverses of all blocks before the first example, and zeros."""

    def start(w: jax.Array) -> jax.Array:
        rows, size = jax.eval_shape(lambda w: _blocked(w, block), w).shape
        return jnp.broadcast_to(jnp.eye(size) / damping, (rows, size, size))

    floats = _tree.floating(params)
    return jax.tree.map(start, floats), jax.tree.map(lambda w: jnp.zeros((), w.dtype), floats)


def _grow(
    loss: _loss.Loss, block: int, outer: bool, state: Any, i: jax.Array, params: Params, batch: Tree
) -> tuple[Tree, Tree]:
    """Adds one example to the inverses by the formula of Sherman and Morrison."""
    inverses, largest = state
    count = len(jax.tree.leaves(batch)[0])
    with jax.enable_x64(outer):
        grad = _loss.grad("woodfisher", loss, params, *_loss.example(batch, i))

    def update(inverse: jax.Array, g: jax.Array) -> jax.Array:
        g = _blocked(g.astype(jnp.float64), block)
        v = jnp.einsum("kij,kj->ki", inverse, g)
        scale = count + jnp.sum(v * g, axis=1)[:, None, None]
        return inverse - v[:, :, None] * v[:, None] / scale

    largest = jax.tree.map(jnp.maximum, largest, _loss.largest(grad))
    return jax.tree.map(update, inverses, grad), largest


@jax.jit
def _scores(params: Params, inverses: Tree) -> Scores:
    def score(w: jax.Array, inverse: jax.Array) -> jax.Array:
        diagonal = _unblocked(jnp.diagonal(inverse, axis1=1, axis2=2), w)
        return (w.astype(jnp.float64) ** 2 / (2 * diagonal)).astype(jnp.float32)

    return _tree.map_floating(score, params, inverses)


@functools.partial(jax.jit, static_argnames="block")
def _moved(block: int, params: Params, masks: Masks, inverses: Tree) -> Params:
    def move(w: jax.Array, inverse: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        if inverse is None or mask is None:
            return w
        pruned = ~_blocked(mask, block, fill=True)

        def remove(i: jax.Array, state: Any) -> Any:
            # One weight after the other: all of a block need a batched LAPACK solve, and several of
            # these in one program wait for each other forever on CPUs with JAX 0.10.
            weights, inverse = state
            column = jnp.take(inverse, i, axis=2)
            factor = jnp.where(pruned[:, i], 1 / column[:, i], 0)[:, None]
            moved = weights - factor * weights[:, i, None] * column
            return moved, inverse - factor[:, :, None] * column[:, :, None] * column[:, None]

        weights = _blocked(w.astype(jnp.float64), block)
        weights, _ = jax.lax.fori_loop(0, weights.shape[1], remove, (weights, inverse))
        return _unblocked(weights, w).astype(w.dtype)

    return apply_masks(jax.tree.map(move, params, inverses, masks), masks)


def _blocked(leaf: jax.Array, block: int, fill: Any = 0) -> jax.Array:
    """Cuts a leaf into rows of ``block`` consecutive entries, the last one filled up."""
    block = max(min(block, leaf.size), 1)
    flat = _mesh.replicated(leaf).ravel()
    return jnp.pad(flat, (0, -flat.size % block), constant_values=fill).reshape(-1, block)


def _unblocked(blocks: jax.Array, leaf: jax.Array) -> jax.Array:
    """Puts rows of blocks back into the shape of their leaf."""
    return blocks.ravel()[: leaf.size].reshape(leaf.shape)
