r"""Movement pruning: the scores are trained together with the params and determine the masks.

The scores are a second tree of trained arrays, initialised with zeros. In every step, masks are
made from the scores: ``jp.select(scores, sparsity)`` keeps the highest ones, :func:`masks` those
above a threshold (the soft variant). The network then runs on ``apply(params, scores, masks)``. The
score of a weight rises while the weight moves away from zero, and falls while it moves towards
zero. Masked weights may come back.

References:
  Sanh et al, `Movement Pruning: Adaptive Sparsity by Fine-Tuning
  <https://arxiv.org/abs/2005.07683>`_, 2020
"""

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune._tree import Masks, Params, Scores


def apply(params: Params, scores: Scores, masks: Masks) -> Params:
    r"""Masks the params in the forward pass and propagates gradients to their scores.

    .. math:: \tilde w = m \odot w, \qquad
       \frac{\partial \tilde w}{\partial w} = m, \qquad
       \frac{\partial \tilde w}{\partial s} := w

    Gradient descent with learning rate :math:`\alpha` thus accumulates the score
    :math:`-\alpha \sum_t w \, \partial L / \partial \tilde w`, for kept and for masked weights. A
    masked weight itself does not change. Derivatives of such a training step are the true ones.

    Args:
      params: any pytree of arrays.
      scores: a pytree of floating arrays with the same paths and shapes.
      masks: the masks made from the scores; leaves whose mask is `None` are returned unchanged.

    Raises:
      ValueError: if paths or shapes differ, or for a mask without scores.
      TypeError: if a mask is not bool.

    Examples:
      >>> import optax
      >>> target = jnp.array([[4.0, 2.0]])
      >>> loss = lambda trained, masks: jnp.sum((apply(*trained, masks) - target) ** 2)
      >>> trained = jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))  # params and their scores
      >>> tx = optax.sgd(0.1)
      >>> state = tx.init(trained)
      >>> for sparsity in (0.0, 0.5):
      ...     masks = jp.select(trained[1], sparsity)
      ...     updates, state = tx.update(jax.grad(loss)(trained, masks), state)
      ...     trained = optax.apply_updates(trained, updates)
      >>> print(apply(*trained, jp.select(trained[1], 0.5)).round(2))
      [[2.08 0.  ]]
    """
    gated = []
    aligned = _tree.align(params, scores, "scores"), _tree.align_masks(params, masks)
    for (path, w), s, m in zip(_tree.named_leaves(params), *aligned, strict=True):
        if m is not None and s is None:
            raise ValueError(
                f"{_tree.show(path)}: scores must be given where there is a mask, got None. Make "
                "the masks from the scores."
            )
        gated.append(w if m is None else _gate(w, s, m))
    return _tree.rebuild(params, gated)


@jax.custom_jvp
def _gate(weights: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, weights, jnp.zeros_like(weights))


@_gate.defjvp
def _gate_jvp(primals, tangents):
    weights, _, mask = primals
    kept = jnp.where(mask, tangents[0], jnp.zeros_like(weights))
    moved = weights.astype(tangents[1].dtype) * tangents[1]
    # Not by `_gate`: the derivative of this rule itself, as in meta-learning, is the true one.
    masked = jnp.where(mask, weights, jnp.zeros_like(weights))
    return masked, kept + moved.astype(weights.dtype)


def masks(scores: Scores, threshold: float) -> Masks:
    r"""Keeps the weights whose score is above a threshold: :math:`\sigma(s) > \tau`.

    This is soft movement pruning. The resulting sparsity depends on the threshold and on the
    strength of the :func:`penalty`.

    Args:
      scores: a pytree of floating arrays.
      threshold: :math:`\tau`, in (0, 1). Below 1/2, scores of zero are kept.

    Raises:
      ValueError: for a threshold outside (0, 1).

    Examples:
      >>> masks(jnp.array([-3.0, 0.0]), threshold=0.1).tolist()
      [False, True]
    """
    if not _tree.is_traced(threshold) and not 0 < threshold < 1:
        raise ValueError(f"movement.masks: threshold must be in (0, 1), got {threshold}.")
    return jax.tree.map(lambda s: jax.nn.sigmoid(s) > threshold, scores)


def penalty(scores: Scores) -> jax.Array:
    r"""Computes the penalty of soft movement pruning, which lowers scores.

    .. math:: \sum_i \sigma(s_i)

    Multiply it by a strength and add it to the loss.

    Examples:
      >>> print(penalty({"w": jnp.zeros(4), "b": None}))
      2.0
    """
    sums = [jnp.sum(jax.nn.sigmoid(_tree.wide(s))) for s in jax.tree.leaves(scores)]
    return sum(sums, start=jnp.float32(0))
