r"""Sparsity schedules: each is an ``optax.Schedule`` from the step to the fraction removed.

:math:`t` is the progress from ``begin`` to ``end``, clipped to [0, 1]. A `ValueError` is raised for
a final sparsity outside [0, 1), and unless begin < end.

>>> float(cubic(0.8, begin=0, end=10)(5)), float(cubic(0.8, begin=0, end=10)(99))
(0.699999988079071, 0.800000011920929)
"""

import jax
import jax.numpy as jnp
import optax

from jaxprune import _tree
from jaxprune._select import check_sparsity


def one_shot(final: float, begin: int = 0) -> optax.Schedule:
    """Jumps to the final sparsity at step ``begin``.

    Examples:
      >>> float(one_shot(0.5, begin=3)(2)), float(one_shot(0.5, begin=3)(3))
      (0.0, 0.5)
    """
    check_sparsity(final, "final")
    return lambda step: jnp.where(jnp.asarray(step) >= begin, jnp.float32(final), 0.0)


def linear(final: float, begin: int, end: int) -> optax.Schedule:
    """Rises linearly: :math:`s_f t`.

    Examples:
      >>> float(linear(0.5, begin=0, end=10)(5))
      0.25
    """
    t = _progress("linear", final, begin, end)
    return lambda step: _ends(final, t(step), final * t(step))


def exponential(final: float, begin: int, end: int) -> optax.Schedule:
    """Removes the same fraction of the kept weights at every step: :math:`1 - (1 - s_f)^t`.

    Examples:
      >>> float(exponential(0.75, begin=0, end=10)(5))
      0.5
    """
    t = _progress("exponential", final, begin, end)
    return lambda step: _ends(final, t(step), 1 - (1 - final) ** t(step))


def cubic(final: float, begin: int, end: int) -> optax.Schedule:
    """Rises fast first, then slowly: :math:`s_f (1 - (1 - t)^3)`.

    Examples:
      >>> float(cubic(0.5, begin=0, end=10)(5))
      0.4375

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017
    """
    t = _progress("cubic", final, begin, end)
    return lambda step: _ends(final, t(step), final * (1 - (1 - t(step)) ** 3))


def stepwise(final: float, begin: int, end: int, steps: int) -> optax.Schedule:
    r"""Rises in equal steps, the first at ``begin`` and the last at ``end``.

    .. math:: s_f \lfloor (n - 1) t + 1 \rfloor / n

    Examples:
      >>> schedule = stepwise(0.5, begin=2, end=10, steps=2)
      >>> [float(schedule(i)) for i in (1, 2, 9, 10)]
      [0.0, 0.25, 0.25, 0.5]
    """
    _tree.check_count("stepwise: steps", steps, least=2)
    t = _progress("stepwise", final, begin, end)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        passed = jnp.floor((steps - 1) * t(step) + 1e-6)
        risen = _ends(final, t(step), final * (passed + 1) / steps)
        return jnp.where(jnp.asarray(step) < begin, 0.0, risen)

    return schedule


def _progress(name: str, final: float, begin: int, end: int) -> optax.Schedule:
    if not begin < end:
        raise ValueError(f"{name}: begin must be below end, got {begin=} and {end=}.")
    check_sparsity(final, "final")
    return lambda step: (jnp.clip(jnp.asarray(step), begin, end) - begin) / (end - begin)


def _ends(final: float, t: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(t >= 1, jnp.float32(final), value)  # exactly final, without rounding errors
