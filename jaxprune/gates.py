r"""L0 regularisation with hard concrete gates: the network learns which gates to close.

A gate in [0, 1] multiplies a weight or a unit. Gates are sampled in training. Many samples are
exactly 0 or 1, and yet the expected number of open gates is differentiable. A gate has one
parameter, ``log_alpha``, which is trained together with the params. All functions take a pytree of
these parameters, with `None` for leaves without gates.

>>> import jax, jax.numpy as jnp
>>> log_alpha = {"w": jnp.array([-8.0, 0.0, 8.0]), "b": None}
>>> mean(log_alpha)["w"].tolist(), masks(log_alpha)["w"].tolist()
([0.0, 0.5, 1.0], [False, True, True])

References:
  Louizos et al, `Learning Sparse Neural Networks through L0 Regularization
  <https://arxiv.org/abs/1712.01312>`_, 2018
"""

import math

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune._tree import Masks, Params

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1  # a concrete variable is stretched to this interval, then clipped to [0, 1]


def sample(log_alpha: Params, key: jax.Array) -> Params:
    r"""Samples the gates of a training step.

    .. math:: z = \mathrm{clip}\left(\sigma\left(\frac{\log u - \log(1 - u) + \log \alpha}{\beta}
       \right) (\zeta - \gamma) + \gamma,\; 0,\; 1\right), \qquad u \sim U(0, 1)

    with :math:`\beta = 2/3,\ \gamma = -0.1,\ \zeta = 1.1`.

    Args:
      log_alpha: a pytree of floating arrays; a gate with a higher value is open more often.
      key: a PRNG key.

    Examples:
      >>> gates = sample(jnp.zeros(1000), jax.random.key(0))
      >>> float(gates.min()), float(gates.max())
      (0.0, 1.0)
    """
    gates = []
    for i, a in enumerate(jax.tree.leaves(log_alpha)):
        # log u - log(1 - u) has the logistic distribution
        noise = jax.random.logistic(jax.random.fold_in(key, i), a.shape, a.dtype)
        gates.append(_stretch((noise + a) / TEMPERATURE))
    return _tree.rebuild(log_alpha, gates)


def mean(log_alpha: Params) -> Params:
    r"""Returns the gates for evaluation, without noise and temperature.

    .. math:: \hat z = \mathrm{clip}(\sigma(\log \alpha) (\zeta - \gamma) + \gamma,\; 0,\; 1)

    This is the estimate of the paper. It is not the mean of the distribution that :func:`sample`
    draws from.

    Examples:
      >>> mean(jnp.array([-3.0, 0.0, 3.0])).tolist()
      [0.0, 0.5, 1.0]
    """
    return jax.tree.map(_stretch, log_alpha)


def penalty(log_alpha: Params) -> jax.Array:
    r"""Computes the expected number of open gates in training.

    .. math:: \sum_i P(z_i \neq 0) = \sum_i \sigma(\log \alpha_i - \beta \log(-\gamma / \zeta))

    Multiply it by a strength and add it to the loss.

    Examples:
      >>> print(penalty({"w": jnp.array([-99.0, 99.0, 99.0]), "b": None}))
      2.0
    """
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    sums = [jnp.sum(jax.nn.sigmoid(_tree.wide(a) - shift)) for a in jax.tree.leaves(log_alpha)]
    return sum(sums, start=jnp.float32(0))


def masks(log_alpha: Params) -> Masks:
    r"""Keeps the weights whose gate is open in evaluation: :math:`\hat z > 0`.

    Examples:
      >>> masks(jnp.array([-3.0, 0.0])).tolist()
      [False, True]
    """
    return jax.tree.map(lambda z: z > 0, mean(log_alpha))


def _stretch(logit: jax.Array) -> jax.Array:
    return jnp.clip(jax.nn.sigmoid(logit) * (HIGH - LOW) + LOW, 0, 1)
