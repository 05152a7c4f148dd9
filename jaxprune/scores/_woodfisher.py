import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _mesh, _tree
from jaxprune.masks import apply_masks


def woodfisher(
    loss: Callable[..., jax.Array], block: int = 50, damping: float = 1e-7
) -> Callable[..., Any]:
    r"""Scores a weight by the growth of the loss without it, after the others have adapted.

    .. math:: s_i = \frac{w_i^2}{2 [F^{-1}]_{ii}}, \qquad
        F = \lambda I + \frac{1}{m} \sum_{n=1}^{m} g_n g_n^\top

    Optimal Brain Surgeon with the empirical Fisher information as Hessian, in blocks of consecutive
    weights of a leaf. Its inverse grows by one example at a time. Takes :math:`O(m b)` operations
    and 8 b bytes a weight, b being the block: the inverse is held in float64, since in float32 it
    can be wrong by percents where weights have gradients of very different size.

    Args:
      loss: maps ``(params, *batch)`` to a scalar, the mean over examples. It is called with one
        example at a time, as a batch of one: batch norm needs its inference mode.
      block: how many weights share a block; 1 gives :func:`fisher`, damped.
      damping: :math:`\lambda`. Before training has converged 1e-7 may be too little, and empty
        a layer: try 1e-5.

    Returns:
      A function of ``(params, *batch)`` giving one float32 score per weight; higher is kept. All
      arrays of the batch have the examples along their first axis; there should be a few times more
      of them than the block has weights.

    Raises:
      ValueError: for a block below 1, a damping not above 0, batch arrays of different lengths and
        (outside jit) gradients that are not finite, or 0 everywhere.
      TypeError: for a loss that is not scalar.

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
) -> Callable[..., Any]:
    r"""Removes weights and moves the others of their blocks to where the loss grows least.

    .. math:: \delta w = -[F^{-1}]_{:Q} \, \left([F^{-1}]_{QQ}\right)^{-1} w_Q

    for all removed weights Q of a block together, so that these become exactly 0. The papers sum
    the updates of single weights, which is exact for one.

    Args:
      loss: as in :func:`woodfisher`.
      block: how many weights share a block.
      damping: :math:`\lambda`.

    Returns:
      A function of ``(params, masks, *batch)`` giving params: those removed are 0, those kept have
      moved, and leaves without a mask are as they were.

    Raises:
      ValueError: as in :func:`woodfisher`, and for masks of other paths or shapes.
      TypeError: for a loss that is not scalar, or masks that are not bool.

    Examples:
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> x = jnp.array([[1.0, 1.0], [3.0, 1.0]])
      >>> params, masks = jnp.array([1.0, -2.0]), jnp.array([True, False])
      >>> print(woodfisher_update(loss)(params, masks, x).round(3))
      [0.2 0. ]

    References:
      Kurtic et al, `The Optimal BERT Surgeon <https://arxiv.org/abs/2203.07259>`_, 2022
    """
    _check(block, damping)
    return functools.partial(_update, loss, block, damping)


def _check(block, damping):
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"woodfisher needs a block of at least one weight, got {block!r}.")
    if not damping > 0:
        raise ValueError(f"woodfisher needs a damping above 0, got {damping}: F may be singular.")


def _score(loss, block, damping, params, *batch):
    return _run(lambda inverses: _scores(params, inverses), loss, block, damping, params, batch)


def _update(loss, block, damping, params, masks, *batch):
    _tree.check_params(params)
    aligned = _tree.align_masks(params, masks)

    def move(inverses):
        return _moved(block, params, aligned, inverses)

    return apply_masks(_run(move, loss, block, damping, params, batch), masks)


def _run(f, loss, block, damping, params, batch):
    _tree.check_params(params)
    _loss.check_examples("woodfisher", batch)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    count = len(jax.tree.leaves(batch)[0])
    outer = bool(jax.enable_x64.value)
    with jax.enable_x64(True):
        grow = functools.partial(_grow, loss, block, outer, params, batch)
        start = _start(block, params, damping)
        inverses, largest = _loss.fold(grow, start, count, _tree.is_traced(params, batch))
        result = f(inverses)
    _loss.check_curvature("woodfisher", largest)
    return result


@functools.partial(jax.jit, static_argnums=0)
def _start(block, params, damping):
    """Gives the inverses of the blocks of every floating leaf before any example, and zeros."""

    def start(w):
        rows, size = jax.eval_shape(lambda w: _blocked(w, block), w).shape
        return jnp.broadcast_to(jnp.eye(size) / damping, (rows, size, size))

    floats = _tree.floating(params)
    return jax.tree.map(start, floats), jax.tree.map(lambda w: jnp.zeros((), w.dtype), floats)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _grow(loss, block, outer, params, batch, state, i):
    """Takes one more example into the inverses, and its largest gradient."""
    inverses, largest = state
    count = len(jax.tree.leaves(batch)[0])
    with jax.enable_x64(outer):
        grad = _loss.grad("woodfisher", loss, params, *_loss.example(batch, i))

    def update(inverse, g):
        g = _blocked(g.astype(jnp.float64), block)
        v = jnp.einsum("kij,kj->ki", inverse, g)
        scale = count + jnp.sum(v * g, axis=1)[:, None, None]
        return inverse - v[:, :, None] * v[:, None] / scale

    largest = jax.tree.map(jnp.maximum, largest, _loss.largest(grad))
    return jax.tree.map(update, inverses, grad), largest


@jax.jit
def _scores(params, inverses):
    def score(w, inverse):
        diagonal = _unblocked(jnp.diagonal(inverse, axis1=1, axis2=2), w)
        return (w.astype(jnp.float64) ** 2 / (2 * diagonal)).astype(jnp.float32)

    return _tree.map_floating(score, params, inverses)


@functools.partial(jax.jit, static_argnums=0)
def _moved(block, params, masks, inverses):
    def move(w, inverse, mask):
        gone = ~_blocked(mask, block, fill=True)

        def remove(i, state):
            # One after the other: all at once is a batched LAPACK solve, and several of these in
            # one program wait for each other forever on CPUs with JAX 0.10.
            weights, inverse = state
            column = jnp.take(inverse, i, axis=2)
            factor = jnp.where(gone[:, i], 1 / column[:, i], 0)[:, None]
            moved = weights - factor * weights[:, i, None] * column
            return moved, inverse - factor[:, :, None] * column[:, :, None] * column[:, None]

        weights = _blocked(w.astype(jnp.float64), block)
        weights, _ = jax.lax.fori_loop(0, weights.shape[1], remove, (weights, inverse))
        return _unblocked(weights, w).astype(w.dtype)

    leaves = jax.tree.leaves(params)
    inverse_leaves = jax.tree.structure(params).flatten_up_to(inverses)
    moved = [
        w if mask is None or inverse is None else move(w, inverse, mask)
        for w, inverse, mask in zip(leaves, inverse_leaves, masks, strict=True)
    ]
    return _tree.rebuild(params, moved)


def _blocked(leaf, block, fill=0):
    """Cuts a leaf into rows of ``block`` consecutive entries, the last one filled up."""
    block = max(min(block, leaf.size), 1)
    flat = _mesh.replicated(leaf).ravel()
    return jnp.pad(flat, (0, -flat.size % block), constant_values=fill).reshape(-1, block)


def _unblocked(blocks, leaf):
    return blocks.ravel()[: leaf.size].reshape(leaf.shape)
