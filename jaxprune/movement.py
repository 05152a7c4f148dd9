r"""Movement pruning: scores that are trained beside the params, and choose what is masked.

Scores are one more tree of params, zeros at first. The network is run on ``apply(params, scores,
masks)``, with masks made of the scores in every step: the highest of them, by ``jp.select(scores,
sparsity)``, or in the soft variant those above a threshold, by :func:`masks`. A weight that moves
away from zero gains score, one that moves towards it loses, and what was masked may come back.

>>> import optax
>>> import jaxprune as jp
>>> target = jnp.array([[4.0, 2.0]])
>>> loss = lambda trained, masks: jnp.sum((apply(*trained, masks) - target) ** 2)
>>> trained = jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))
>>> tx = optax.sgd(0.1)
>>> state = tx.init(trained)
>>> for sparsity in (0.0, 0.5):
...     masks_ = jp.select(trained[1], sparsity)
...     updates, state = tx.update(jax.grad(loss)(trained, masks_), state)
...     trained = optax.apply_updates(trained, updates)
>>> print(apply(*trained, jp.select(trained[1], 0.5)).round(2))
[[2.08 0.  ]]
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree


def apply(params: Any, scores: Any, masks: Any) -> Any:
    r"""Masks the params in the forward pass, and passes gradients on to their scores.

    .. math:: \tilde w = m \odot w, \qquad
       \frac{\partial \tilde w}{\partial w} = m, \qquad
       \frac{\partial \tilde w}{\partial s} := w

    so that gradient descent at rate :math:`\alpha` accumulates in a score
    :math:`-\alpha \sum_t w \, \partial L / \partial \tilde w`, masked or not. A masked weight stays
    as it was.

    Args:
      params: any pytree of arrays.
      scores: a floating pytree with the same paths and shapes.
      masks: made of the scores; leaves whose mask is `None` stay as they are.

    Returns:
      The masked params, with their structure and dtypes.

    Raises:
      ValueError: if paths or shapes differ, or for a mask without scores.
      TypeError: if a mask is not bool.

    Examples:
      >>> w, mask = jnp.array([3.0, 4.0]), jnp.array([True, False])
      >>> loss = lambda w, s: jnp.sum(2 * apply(w, s, mask))
      >>> for grads in jax.grad(loss, (0, 1))(w, jnp.zeros(2)):
      ...     print(grads)
      [2. 0.]
      [6. 8.]

    References:
      Sanh et al, `Movement Pruning: Adaptive Sparsity by Fine-Tuning
      <https://arxiv.org/abs/2005.07683>`_, 2020
    """
    applied = []
    aligned = _tree.align(params, scores, "scores"), _tree.align_masks(params, masks)
    for (path, w), s, m in zip(_tree.named_leaves(params), *aligned, strict=True):
        if m is not None and s is None:
            raise ValueError(
                f"{_tree.show(path)}: has a mask, but no scores. Make the masks from the scores."
            )
        applied.append(w if m is None else _gate(w, s, m))
    return _tree.rebuild(params, applied)


@jax.custom_jvp
def _gate(weights: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, weights, jnp.zeros_like(weights))


@_gate.defjvp
def _gate_jvp(primals, tangents):
    weights, _, mask = primals
    kept = jnp.where(mask, tangents[0], jnp.zeros_like(weights))
    moved = weights.astype(tangents[1].dtype) * tangents[1]
    return _gate(*primals), kept + moved.astype(weights.dtype)


def masks(scores: Any, threshold: float) -> Any:
    r"""Keeps what scores above a threshold, as in soft movement pruning: :math:`\sigma(s) > \tau`.

    How much leaves depends on the strength of the :func:`penalty`, not on the threshold alone.

    Args:
      scores: a pytree of arrays.
      threshold: :math:`\tau`, between 0 and 1; below 1/2 all is kept at first.

    Raises:
      ValueError: for a threshold outside (0, 1).

    Examples:
      >>> masks(jnp.array([-3.0, 0.0]), threshold=0.1).tolist()
      [False, True]

    References:
      Sanh et al, `Movement Pruning: Adaptive Sparsity by Fine-Tuning
      <https://arxiv.org/abs/2005.07683>`_, 2020
    """
    if not _tree.is_traced(threshold) and not 0 < threshold < 1:
        raise ValueError(f"movement.masks needs a threshold between 0 and 1, got {threshold}.")
    return jax.tree.map(lambda s: jax.nn.sigmoid(s) > threshold, scores)


def penalty(scores: Any) -> jax.Array:
    r"""Sums what makes scores fall in soft movement pruning: :math:`\sum_i \sigma(s_i)`.

    Times a strength, it is added to the loss.

    Examples:
      >>> print(penalty({"w": jnp.zeros(4), "b": None}))
      2.0

    References:
      Sanh et al, `Movement Pruning: Adaptive Sparsity by Fine-Tuning
      <https://arxiv.org/abs/2005.07683>`_, 2020
    """
    sums = [jnp.sum(jax.nn.sigmoid(s), dtype=jnp.float32) for s in jax.tree.leaves(scores)]
    return sum(sums, start=jnp.float32(0))
