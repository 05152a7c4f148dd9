"""Search by measured cost: the loss itself says which units leave.

>>> import jax, jax.numpy as jnp
>>> import jaxprune as jp
>>> params = {"in": jnp.eye(3, 4), "out": jnp.array([[1.0], [4.0], [2.0], [3.0]])}
>>> fn = lambda p, x: x @ p["in"] @ p["out"]
>>> x = jnp.ones((1, 3))
>>> groups = jp.find_groups(fn, params, x)
>>> loss = lambda p, x: jnp.mean((fn(p, x) - 7) ** 2)
>>> print(oracle(groups, loss)(params, x))
[ 1. 16.  4.  0.]
>>> found = particle_filter(groups, loss, params, 0.5, jax.random.key(0), x, rounds=4)
>>> print(found.masks["out"][:, 0])
[False  True  True False]
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _progress, _select, _tree
from jaxprune._ranks import Ranks
from jaxprune.groups import Groups
from jaxprune.masks import apply_masks
from jaxprune.search._oracle import losses_without
from jaxprune.units import _checked


def oracle(
    groups: Groups,
    loss: Callable[..., jax.Array],
    *,
    absolute: bool = False,
    memory: float = 0,
) -> Callable[..., jax.Array]:
    r"""Scores a unit by how much the loss rises without it, measured.

    .. math:: s_u = L(w \odot m_u) - L(w)

    with :math:`m_u` the masks that remove the unit alone. It is what :func:`jaxprune.units.taylor`
    estimates. For every unit the traced loss is evaluated again, from the first equation in which
    the units of its group meet: what comes before is computed once, so that late layers cost
    little. In a loop, and along a residual stream, that is nearly all. All is one compiled program,
    which moves a progress bar in a terminal or a notebook.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar.
      absolute: takes :math:`|s_u|` instead, so that units whose removal improves the loss stay as
        well; Molchanov et al found that better.
      memory: the bytes that units evaluated side by side may take, counted as all values that are
        computed again. 0 evaluates one unit at a time, which is fastest on a CPU; more may fill an
        accelerator.

    Returns:
      A function of ``(params, *batch)`` giving a float32 array of shape ``(len(groups),)``.

    Raises:
      ValueError: for params that the groups were not found for, or a negative ``memory``.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.eye(2), "out": jnp.array([[1.0], [-3.0]])}
      >>> fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> groups = jp.find_groups(fn, params, jnp.ones((5, 2)))
      >>> print(oracle(groups, lambda p, x: jnp.mean(fn(p, x)))(params, jnp.ones((5, 2))))
      [-1.  3.]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    if not memory >= 0:
        raise ValueError(f"memory must be a number of bytes, 0 or more, got {memory!r}.")
    score = functools.partial(_oracle, loss, groups, absolute, float(memory))

    def shown(params, *batch):
        if not _progress.seen() or _tree.is_traced((params, batch)):
            return score(None, params, *batch)
        with _progress.compiled(len(groups), desc="oracle", unit="unit") as bar:
            return jax.block_until_ready(score(bar, params, *batch))

    return functools.partial(_checked, shown, groups)


@functools.partial(jax.jit, static_argnums=range(4))
def _oracle(loss, groups, absolute, memory, bar, params, *batch):
    dense, losses = losses_without(groups, loss, memory, bar, params, *batch)
    return jnp.abs(losses - dense) if absolute else losses - dense


class Particles(NamedTuple):
    """What :func:`particle_filter` found.

    Attributes:
      masks: those of the particle with the lowest error of all rounds.
      scores: how often each unit is kept in the last round, particles weighted, in [0, 1].
      errors: of every round and particle, shape ``(rounds, particles)``.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x, key = jnp.ones((5, 3)), jax.random.key(0)
      >>> groups, loss = jp.find_groups(fn, params, x), lambda p, x: jnp.mean(fn(p, x) ** 2)
      >>> found = particle_filter(groups, loss, params, 0.5, key, x, particles=8, rounds=2)
      >>> found.errors.shape, found.scores.shape
      ((2, 8), (4,))
    """

    masks: Any
    scores: jax.Array  # shape=(len(groups),), dtype=float32
    errors: jax.Array  # shape=(rounds, particles), dtype=float32


def particle_filter(
    groups: Groups,
    error: Callable[..., jax.Array],
    params: Any,
    sparsity: float,
    key: jax.Array,
    *batch: Any,
    particles: int = 64,
    rounds: int = 10,
    temperature: float = 1.0,
    mutation: float = 0.01,
    batch_size: int = 8,
) -> Particles:
    r"""Searches the units to keep with a population of masks that are resampled by their error.

    .. math:: p_i \propto \exp(-e_i / (T \sigma_e))

    is the chance of particle :math:`i` to be a parent, with :math:`\sigma_e` the standard deviation
    of the errors of a round (the paper takes :math:`1 - e_i`, which is nearly flat, and needs
    errors in [0, 1]). A child takes each unit from one of two parents, or with a small chance the
    opposite; then units drawn at random leave or come back, until exactly ``round(sparsity ·
    units)`` are gone, or all but one of every group. The best particle so far is always in the next
    round.

    Args:
      groups: from ``find_groups``.
      error: maps ``(params, *batch)`` to a scalar, lower is better: a misclassification rate on
        examples held out, or a loss.
      params: the trained params.
      sparsity: the fraction of the units removed, in [0, 1).
      key: a PRNG key; the same key gives the same masks.
      *batch: passed to ``error``.
      particles: how many masks there are.
      rounds: how often all are evaluated.
      temperature: the :math:`T` of the equation; lower prefers the best more.
      mutation: the chance of a unit to change in a child.
      batch_size: how many networks are evaluated at once; 1 is faster for convolutions on a CPU.

    Returns:
      The best masks, one score per unit for ``groups.select``, and all errors.

    Raises:
      ValueError: for a number that is out of range, groups without units, params that the groups
        were not found for, or an error that is never finite.
      TypeError: for an error that is not scalar.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.eye(4), "out": jnp.array([[1.0], [3.0], [2.0], [4.0]])}
      >>> fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x = jnp.ones((1, 4))
      >>> groups = jp.find_groups(fn, params, x)
      >>> error = lambda p, x: jnp.mean(10 - fn(p, x))
      >>> found = particle_filter(groups, error, params, 0.5, jax.random.key(0), x)
      >>> print(found.masks["out"][:, 0], groups.select(found.scores, 0.5)["out"][:, 0])
      [False  True False  True] [False  True False  True]

    References:
      Anwar et al, `Structured Pruning of Deep Convolutional Neural Networks
      <https://arxiv.org/abs/1512.08571>`_, 2015
    """
    for name, value in (("particles", particles), ("rounds", rounds), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}.")
    if not 0 <= mutation <= 1:
        raise ValueError(f"mutation must be a probability, got {mutation!r}.")
    if not len(groups):
        raise ValueError(f"Nothing can leave, so there is nothing to search.\n{groups}")
    sparsity = _select.check_sparsity(sparsity)
    _tree.check_params(params)
    _tree.align(groups.like, params, "params")
    first, *keys = jax.random.split(key, rounds + 1)
    kept = _first(groups, particles, first, sparsity)
    state = _State(kept, kept[0], jnp.float32(jnp.inf))
    errors = []
    numbers = (sparsity, temperature, mutation)
    for key in keys:
        state, scores, found = _round(
            error, groups, batch_size, state, key, numbers, params, *batch
        )
        errors.append(found)
    if not jnp.isfinite(state.least):
        raise ValueError(
            f"The error of all {particles} particles was NaN or infinite in all {rounds} rounds. "
            "Check it on the dense params, or remove less."
        )
    return Particles(groups.masks(state.best), scores, jnp.stack(errors))


class _State(NamedTuple):
    kept: jax.Array  # shape=(particles, len(groups)), dtype=bool
    best: jax.Array  # shape=(len(groups),), dtype=bool
    least: jax.Array  # shape=(), dtype=float32, the error of the best


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first(groups, particles, key, sparsity):
    return _repair(groups, jax.random.uniform(key, (particles, len(groups))), sparsity)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _round(error, groups, batch_size, state, key, numbers, params, *batch):
    sparsity, temperature, mutation = numbers

    def measure(kept):
        found = error(apply_masks(params, groups._masks(kept, params)), *batch)
        if jnp.shape(found):
            raise TypeError(
                f"particle_filter: the error must be one number, got {jax.typeof(found)}. Average "
                "over the examples."
            )
        return jnp.float32(found)

    kept = state.kept
    errors = jax.lax.map(measure, kept, batch_size=batch_size)
    finite = jnp.isfinite(errors)
    cost = jnp.where(finite, errors, jnp.inf)
    winner = jnp.argmin(cost)
    better = cost[winner] < state.least
    best = jnp.where(better, kept[winner], state.best)
    spread = jnp.std(cost, where=finite)
    weights = jax.nn.softmax(-cost / (temperature * jnp.where(spread > 0, spread, 1)))

    parents, crossing, flipping, choosing = jax.random.split(key, 4)
    a, b = kept[jax.random.choice(parents, len(kept), (2, len(kept)), p=weights)]
    genes = jnp.where(jax.random.bernoulli(crossing, 0.5, kept.shape), a, b)
    genes ^= jax.random.bernoulli(flipping, mutation, kept.shape)
    children = _repair(groups, genes + jax.random.uniform(choosing, kept.shape), sparsity)
    state = _State(children.at[0].set(best), best, jnp.minimum(cost[winner], state.least))
    return state, weights @ kept, errors


def _repair(groups, wishes, sparsity):
    """Keeps the units with the highest wishes, an exact number, and one of every group."""
    together = np.zeros(len(groups), np.int32)
    shape = groups._group(), together, len(groups.groups), 1, groups._multiples()
    return jax.vmap(lambda wish: Ranks(wish, *shape).kept(jnp.reshape(sparsity, 1)))(wishes)
