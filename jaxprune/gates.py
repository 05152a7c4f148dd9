r"""L0 regularisation by hard concrete gates: the network learns which gates to close.

A gate in [0, 1] multiplies a weight, or a whole unit. It is sampled in training, so that the
expected number of open gates is differentiable, and many are exactly 0 or 1. Its one parameter,
``log_alpha``, is trained beside the params; trees of them work, with `None` for what has no gate.

>>> import jax, jax.numpy as jnp
>>> log_alpha = {"w": jnp.array([-8.0, 0.0, 8.0]), "b": None}
>>> mean(log_alpha)["w"].tolist(), masks(log_alpha)["w"].tolist()
([0.0, 0.5, 1.0], [False, True, True])

References:
  Louizos et al, `Learning Sparse Neural Networks through L0 Regularization
  <https://arxiv.org/abs/1712.01312>`_, 2018
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1  # a concrete variable is stretched to this interval, then clipped to [0, 1]


def sample(log_alpha: Any, key: jax.Array) -> Any:
    r"""Draws the gates of a training step.

    .. math:: z = \mathrm{clip}\left(\sigma\left(\frac{\log u - \log(1 - u) + \log \alpha}{\beta}
       \right) (\zeta - \gamma) + \gamma,\; 0,\; 1\right), \qquad u \sim U(0, 1)

    with :math:`\beta = 2/3,\ \gamma = -0.1,\ \zeta = 1.1`.

    Args:
      log_alpha: a pytree of floating arrays: how far each gate is open.
      key: a PRNG key.

    Examples:
      >>> gates = sample(jnp.zeros(1000), jax.random.key(0))
      >>> float(gates.min()), float(gates.max())
      (0.0, 1.0)

    References:
      Louizos et al, `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018
    """
    leaves, treedef = jax.tree.flatten(log_alpha)
    noise = [  # log u - log(1 - u) has the logistic distribution
        jax.random.logistic(jax.random.fold_in(key, i), a.shape, a.dtype)
        for i, a in enumerate(leaves)
    ]
    gates = [_stretch((n + a) / TEMPERATURE) for n, a in zip(noise, leaves, strict=True)]
    return jax.tree.unflatten(treedef, gates)


def mean(log_alpha: Any) -> Any:
    r"""Gives the gates of evaluation, without noise and without the temperature.

    .. math:: \hat z = \mathrm{clip}(\sigma(\log \alpha) (\zeta - \gamma) + \gamma,\; 0,\; 1)

    Args:
      log_alpha: a pytree of floating arrays.

    Examples:
      >>> mean(jnp.array([-3.0, 0.0, 3.0])).tolist()
      [0.0, 0.5, 1.0]

    References:
      Louizos et al, `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018
    """
    return jax.tree.map(_stretch, log_alpha)


def penalty(log_alpha: Any) -> jax.Array:
    r"""Counts the gates that are expected to be open in training.

    .. math:: \sum_i P(z_i \neq 0) = \sum_i \sigma(\log \alpha_i - \beta \log(-\gamma / \zeta))

    Times a strength, it is added to the loss.

    Args:
      log_alpha: a pytree of floating arrays.

    Examples:
      >>> print(penalty({"w": jnp.array([-99.0, 99.0, 99.0]), "b": None}))
      2.0

    References:
      Louizos et al, `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018
    """
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    counts = [
        jnp.sum(jax.nn.sigmoid(a - shift), dtype=jnp.float32) for a in jax.tree.leaves(log_alpha)
    ]
    return sum(counts, start=jnp.float32(0))


def masks(log_alpha: Any) -> Any:
    r"""Keeps what has an open gate in evaluation: :math:`\hat z > 0`.

    Args:
      log_alpha: a pytree of floating arrays.

    Examples:
      >>> masks(jnp.array([-3.0, 0.0])).tolist()
      [False, True]

    References:
      Louizos et al, `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018
    """
    return jax.tree.map(lambda z: z > 0, mean(log_alpha))


def _stretch(logit: jax.Array) -> jax.Array:
    return jnp.clip(jax.nn.sigmoid(logit) * (HIGH - LOW) + LOW, 0, 1)
