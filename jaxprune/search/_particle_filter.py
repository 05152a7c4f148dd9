import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _program, _ranks, _select, _tree
from jaxprune._tree import Masks, Params
from jaxprune.groups import Groups
from jaxprune.masks import apply_masks


class Particles(NamedTuple):
    """Result of :func:`particle_filter`.

    Attributes:
      masks: the masks of the particle with the lowest loss of all rounds.
      scores: how often each unit is kept in the last round, weighted by particle, in [0, 1].
      errors: the loss of each particle in each round.
    """

    masks: Masks
    scores: jax.Array  # shape=(len(groups),), dtype=float32
    errors: jax.Array  # shape=(rounds, particles), dtype=float32


def particle_filter(
    groups: Groups,
    loss: Callable[..., jax.Array],
    params: Params,
    sparsity: float,
    key: jax.Array,
    *batch: Any,
    particles: int = 64,
    rounds: int = 10,
    temperature: float = 1.0,
    mutation: float = 0.01,
    batch_size: int = 8,
) -> Particles:
    r"""Searches the units to keep with a population of masks, resampled by their loss.

    .. math:: p_i \propto \exp(-e_i / (T \sigma_e))

    is the probability that particle :math:`i` becomes a parent, where :math:`e_i` is its loss and
    :math:`\sigma_e` the standard deviation of the losses of a round. (The paper takes
    :math:`1 - e_i`, which is nearly flat, and needs losses in [0, 1].) A child takes each unit from
    one of two parents, and flips it with a small probability. Then units drawn at random are
    removed or restored, until exactly ``round(sparsity · units)`` are removed, or all but one of
    every group. The best particle so far is always part of the next round.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar, lower is better; an error rate will do.
      params: the trained params.
      sparsity: the fraction of the units removed, in [0, 1).
      key: a PRNG key; the same key returns the same masks.
      *batch: passed to ``loss``.
      particles: the number of masks.
      rounds: the number of times that all particles are evaluated.
      temperature: the :math:`T` of the equation; lower values prefer the best particles more.
      mutation: the probability that a child flips a unit.
      batch_size: the number of networks evaluated in parallel; for convolutions on a CPU use 1.

    Raises:
      ValueError: for a number out of range, groups without units, params other than those of the
        groups, or a loss that is never finite.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> params = {"in": jnp.eye(4), "out": jnp.array([[1.0], [3.0], [2.0], [4.0]])}
      >>> apply_fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x = jnp.ones((1, 4))
      >>> groups = jp.find_groups(apply_fn, params, x)
      >>> loss = lambda p, x: jnp.mean(10 - apply_fn(p, x))
      >>> result = particle_filter(groups, loss, params, 0.5, jax.random.key(0), x)
      >>> print(result.masks["out"][:, 0], groups.select(result.scores, 0.5)["out"][:, 0])
      [False  True False  True] [False  True False  True]

    References:
      Anwar et al, `Structured Pruning of Deep Convolutional Neural Networks
      <https://arxiv.org/abs/1512.08571>`_, 2015
    """
    _loss.check_groups("particle_filter", groups)
    _tree.check_function("particle_filter: loss", loss, "Pass it before the params.")
    for name, value in (("particles", particles), ("rounds", rounds), ("batch_size", batch_size)):
        _tree.check_count(name, value)
    if not _tree.is_number(temperature) or not temperature > 0:
        raise ValueError(f"temperature must be positive, got {_tree.brief(temperature)}.")
    if not _tree.is_number(mutation) or not 0 <= mutation <= 1:
        raise ValueError(f"mutation must be in [0, 1], got {_tree.brief(mutation)}.")
    if not len(groups):
        raise ValueError(
            f"groups must have at least one unit, got none; the table says why.\n{groups}"
        )
    sparsity = _select.check_sparsity(sparsity)
    _ranks.check_params(groups, params)
    first, *keys = jax.random.split(key, rounds + 1)

    def start(key: jax.Array, sparsity: Any) -> _State:
        kept = _repair(groups, jax.random.uniform(key, (particles, len(groups))), sparsity)
        return _State(kept, kept[0], jnp.float32(jnp.inf))

    state = _program.freeze(start, first, sparsity)(first, sparsity)
    args, errors = ((sparsity, temperature, mutation), params, *batch), []
    fn = functools.partial(_round, loss, groups, batch_size)
    play = _program.freeze(fn, state, first, *args, donate=True)
    for key in keys:
        state, scores, error = play(state, key, *args)
        errors.append(error)
    if not np.isfinite(jax.device_get(state.least)):
        raise ValueError(
            f"loss must be finite, got NaN or infinity for all {particles} particles in all "
            f"{rounds} rounds. Check it on the dense params, or remove fewer units."
        )
    return Particles(groups.masks(state.best), scores, jnp.stack(errors))


class _State(NamedTuple):
    kept: jax.Array  # shape=(particles, len(groups)), dtype=bool
    best: jax.Array  # shape=(len(groups),), dtype=bool
    least: jax.Array  # shape=(), dtype=float32, the loss of the best


def _round(
    loss: Callable[..., jax.Array],
    groups: Groups,
    batch_size: int,
    state: _State,
    key: jax.Array,
    numbers: tuple[Any, Any, Any],
    params: Params,
    *batch: Any,
) -> tuple[_State, jax.Array, jax.Array]:
    """Evaluates all particles, and draws those of the next round."""
    sparsity, temperature, mutation = numbers

    def measure(kept: jax.Array) -> jax.Array:
        masked = apply_masks(params, _ranks.masks_like(groups, kept, params))
        value = _program.inlined(loss)(masked, *batch)
        if jnp.shape(value):
            raise TypeError(
                f"particle_filter: the loss must return one number, got {jax.typeof(value)}. "
                "Average over the examples."
            )
        return jnp.float32(value)

    kept = state.kept
    losses = jax.lax.map(measure, kept, batch_size=batch_size)
    finite = jnp.isfinite(losses)
    cost = jnp.where(finite, losses, jnp.inf)
    winner = jnp.argmin(cost)
    best = jnp.where(cost[winner] < state.least, kept[winner], state.best)
    spread = jnp.std(cost, where=finite)
    weights = jax.nn.softmax(-cost / (temperature * jnp.where(spread > 0, spread, 1)))

    parents, crossing, flipping, choosing = jax.random.split(key, 4)
    a, b = kept[jax.random.choice(parents, len(kept), (2, len(kept)), p=weights)]
    genes = jnp.where(jax.random.bernoulli(crossing, 0.5, kept.shape), a, b)
    genes ^= jax.random.bernoulli(flipping, mutation, kept.shape)
    # A gene is 0 or 1, and the draw less than 1: of the units with one gene, chance decides.
    children = _repair(
        groups, genes.astype(jnp.float32) + jax.random.uniform(choosing, kept.shape), sparsity
    )
    state = _State(children.at[0].set(best), best, jnp.minimum(cost[winner], state.least))
    return state, weights @ kept.astype(weights.dtype), losses


@functools.partial(jax.jit, static_argnames="groups")
def _repair(groups: Groups, wishes: jax.Array, sparsity: Any) -> jax.Array:
    """Keeps an exact number of units, those with the highest wishes, and one of every group."""
    pools = np.zeros(len(groups.groups), int)

    def repair(wish: jax.Array) -> jax.Array:
        return _ranks.kept(_ranks.order(groups, wish, pools, None, 1), jnp.reshape(sparsity, 1))

    return jax.vmap(repair)(wishes)
