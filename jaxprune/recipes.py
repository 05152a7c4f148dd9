"""Pruning and training in rounds, with your own train function."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import _select, _tree
from jaxprune._dead import remove_dead
from jaxprune._tree import Masks, Params, Score, Select
from jaxprune.masks import apply_masks

__all__ = ["Round", "iterative", "keep", "reinitialize", "rewind", "rounds"]
__all__ += ["dropout_rate", "remove_dead"]

Restart = Callable[[Params, int], Params]  # (params, number of the round) -> params


class Round(NamedTuple):
    """The result of one round of :func:`iterative`: a pytree, which can be saved as any other."""

    round: int  # from 1
    sparsity: float  # the fraction of weights that is pruned
    params: Params  # trained; pruned weights are zero
    masks: Masks


def keep(params: Params, round: int) -> Params:
    """Continues with the trained weights in every round (fine-tuning).

    Examples:
      >>> keep(jnp.array([1.0, 2.0]), 1).tolist()
      [1.0, 2.0]
    """
    return params


def rewind(early: Params) -> Restart:
    """Returns to the weights of an early training step in every round (lottery tickets).

    Examples:
      >>> rewind(jnp.array([1.0, 2.0]))(jnp.array([3.0, 4.0]), 1).tolist()
      [1.0, 2.0]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_, 2019

      Frankle et al, `Linear Mode Connectivity and the Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1912.05671>`_, 2020 (from step k instead of 0)
    """
    return lambda params, round: early


def reinitialize(init: Callable[[jax.Array], Params], key: jax.Array) -> Restart:
    """Starts from new random weights in every round: a control that keeps the masks only.

    Args:
      init: maps a PRNG key to params.
      key: a PRNG key, which is folded with the number of the round.

    Examples:
      >>> import jax
      >>> restart = reinitialize(lambda key: jax.random.normal(key, (2,)), jax.random.key(0))
      >>> bool((restart(None, 1) != restart(None, 2)).all())
      True
    """
    return lambda params, round: init(jax.random.fold_in(key, round))


def rounds(fraction: float, count: int) -> list[float]:
    """Lists the sparsities of rounds that each prune the same fraction of the kept weights.

    .. math:: s_k = 1 - (1 - r)^k

    Args:
      fraction: r, in [0, 1). A fifth is usual; ``1 - (1 - s) ** (1 / count)`` ends at s.
      count: the number of rounds.

    Raises:
      ValueError: for a fraction outside [0, 1), or a count below 1.

    Examples:
      >>> [round(s, 3) for s in rounds(0.2, 3)]
      [0.2, 0.36, 0.488]
    """
    _select.check_sparsity(fraction, "fraction")
    _tree.check_count("rounds: count", count)
    return [1 - (1 - fraction) ** k for k in range(1, count + 1)]


def iterative(
    params: Params | Round,
    train: Callable[..., Params],
    score: Score,
    sparsities: Sequence[float],
    *,
    select: Select = _select.select,
    restart: Restart = keep,
    key: jax.Array | None = None,
) -> Iterator[Round]:
    r"""Scores, prunes and trains in rounds, one for each sparsity.

    .. math:: m_k = \mathrm{select}(\mathrm{score}(w_{k-1}), s_k, m_{k-1}), \qquad
        w_k = \mathrm{train}(m_k \odot \mathrm{restart}(w_{k-1}, k), m_k)

    With one sparsity this is one-shot pruning: of trained params, or, with a score such as SNIP, of
    params before training. To stop, break out of the loop; to resume, pass the last `Round`.

    Args:
      params: the params that are scored first, or the `Round` to resume from.
      train: maps ``(params, masks)`` to trained params, in which masked weights must be zero. It
        chooses the learning rate and initialises the optimizer.
      score: maps params to scores, such as ``jp.scores.magnitude``.
      sparsities: fractions of the weights of the dense network, in ascending order.
      select: maps ``(scores, sparsity, within=masks)`` to masks: ``jp.select``, ``groups.select``,
        or one of them with ``functools.partial``.
      restart: maps ``(params, round)`` to the params at which training starts: :func:`keep`,
        ``rewind(early)`` or ``reinitialize(init, key)``. ``round`` is the number of the round.
      key: a PRNG key. If given, it is folded with the number of the round and passed to ``train``
        as a third argument, so that a resumed round equals an uninterrupted one.

    Returns:
      An iterator of `Round`. A round is computed when it is requested.

    Raises:
      ValueError: for sparsities outside [0, 1) or not in ascending order. A round raises it if
        ``train`` or ``restart`` returns params of another structure or shape, or if masked weights
        are not zero after ``train``.
      TypeError: if ``train`` or ``score`` is not a function.

    Examples:
      >>> def train(params, masks):  # your code: some steps under `jp.enforce(optimizer, masks)`
      ...     return params
      >>> params = jnp.array([[1.0, 4.0, 3.0, 2.0]])
      >>> for result in iterative(params, train, jp.scores.magnitude, [0.25, 0.5]):
      ...     print(result.round, result.sparsity, result.params)
      1 0.25 [[0. 4. 3. 2.]]
      2 0.5 [[0. 4. 3. 0.]]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015

      Renda et al, `Comparing Rewinding and Fine-tuning in Neural Network Pruning
      <https://arxiv.org/abs/2003.02389>`_, 2020
    """
    sparsities = [_select.check_sparsity(s) for s in sparsities]
    last = params if isinstance(params, Round) else Round(0, -1.0, params, None)
    steps = [last.sparsity, *sparsities[last.round :]]
    for low, high in itertools.pairwise(steps):
        if not low < high:
            raise ValueError(f"iterative: sparsities must be ascending, got {high} after {low}.")
    _tree.check_function("iterative: train", train, "Pass a function of params and masks.")
    _tree.check_function("iterative: score", score, "Pass `jp.scores.magnitude`, not its result.")
    _tree.check_params(last.params)

    def iterate(last: Round) -> Iterator[Round]:  # a generator: it checks nothing when called
        for number, sparsity in enumerate(sparsities[last.round :], last.round + 1):
            masks = select(score(last.params), sparsity, within=last.masks)
            start = restart(last.params, number)
            _check_same(last.params, start, "restart")
            random = [] if key is None else [jax.random.fold_in(key, number)]
            params = train(apply_masks(start, masks), masks, *random)
            _check_same(start, params, "train")
            check_pruned(params, masks)
            last = Round(number, sparsity, params, masks)
            yield last

    return iterate(last)


def check_pruned(params: Params, masks: Masks) -> None:
    """Raises a `ValueError` if a train function returned masked weights that are not zero."""
    aligned = _tree.align_masks(params, masks)
    for (path, leaf), mask in zip(_tree.named_leaves(params), aligned, strict=True):
        if mask is not None and (count := int(((leaf != 0) & ~mask).sum())):
            raise ValueError(
                f"{_tree.show(path)}: after `train`, {count} masked weights are not zero. Train "
                "with `jp.enforce(optimizer, masks)`."
            )


def _check_same(params: Params, returned: Any, name: str) -> None:
    expected, shapes = (
        {path: f"shape {jnp.shape(leaf)}" for path, leaf in _tree.named_leaves(tree)}
        for tree in (params, returned)
    )
    for path in expected | shapes:
        if expected.get(path) != shapes.get(path):
            raise ValueError(
                f"{_tree.show(path)}: `{name}` must return {expected.get(path, 'no leaf')} here, "
                f"got {shapes.get(path, 'no leaf')}. Return params alone, of the same shapes."
            )


def dropout_rate(rate: float, kept: int, total: int) -> float:
    r"""Lowers the dropout rate of a pruned layer, which overfits less than the dense one.

    .. math:: D_r = D_o \sqrt{C_{ir} / C_{io}}

    Args:
      rate: the rate :math:`D_o` of the dense network, in [0, 1].
      kept: the number of kept weights of the layer, :math:`C_{ir}`.
      total: the number of all its weights, :math:`C_{io}`.

    Raises:
      ValueError: for a rate outside [0, 1], or unless 0 <= kept <= total and total > 0.

    Examples:
      >>> dropout_rate(0.5, kept=25, total=100)
      0.25

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout_rate: rate must be in [0, 1], got {rate}.")
    if not 0 <= kept <= total or total < 1:
        raise ValueError(f"dropout_rate: kept must be in [0, {total=}] and total > 0, got {kept=}.")
    return rate * math.sqrt(kept / total)
