"""Prune, train, repeat: with a train function of your own.

>>> import jax.numpy as jnp
>>> import jaxprune as jp
>>> def train(params, masks):  # yours: some steps under `jp.enforce(optimizer, masks)`
...     return params
>>> params = jnp.array([[1.0, 4.0, 3.0, 2.0]])
>>> for last in iterative(params, train, jp.scores.magnitude, [0.25, 0.5]):
...     print(last.round, last.sparsity, last.params)
1 0.25 [[0. 4. 3. 2.]]
2 0.5 [[0. 4. 3. 0.]]
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune._select import check_sparsity
from jaxprune._select import select as _select
from jaxprune.masks import apply_masks


class Round(NamedTuple):
    """What :func:`iterative` yields after a round; a pytree, to be saved as any other.

    Attributes:
      round: its number, from 1.
      sparsity: the fraction removed.
      params: the trained params, pruned weights at zero.
      masks: `True` for kept.

    Examples:
      >>> Round(1, 0.5, jnp.array([0.0, 2.0]), jnp.array([False, True])).sparsity
      0.5
    """

    round: int
    sparsity: float
    params: Any
    masks: Any


def keep(params: Any, round: int) -> Any:
    """Goes on from the trained weights: fine-tuning.

    Examples:
      >>> keep(jnp.array([1.0, 2.0]), 1).tolist()
      [1.0, 2.0]
    """
    return params


def rewind(early: Any) -> Callable[[Any, int], Any]:
    """Goes back to the weights of an early step: the lottery-ticket experiment.

    Examples:
      >>> rewind(jnp.array([0.1, 0.2]))(jnp.array([1.0, 2.0]), 1).round(1).tolist()
      [0.10000000149011612, 0.20000000298023224]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_, 2019

      Frankle et al, `Linear Mode Connectivity and the Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1912.05671>`_, 2020 (from step k instead of 0)
    """
    return lambda params, round: early


def reinitialize(init: Callable[[jax.Array], Any], key: jax.Array) -> Callable[[Any, int], Any]:
    """Starts from new random weights in every round: a control, with the masks alone.

    Args:
      init: maps a key to params.
      key: folded with the number of the round.

    Examples:
      >>> import jax
      >>> restart = reinitialize(lambda key: jax.random.normal(key, (2,)), jax.random.key(0))
      >>> bool((restart(None, 1) != restart(None, 2)).all())
      True
    """
    return lambda params, round: init(jax.random.fold_in(key, round))


def rounds(fraction: float, count: int) -> list[float]:
    """Lists the sparsities of rounds that remove the same fraction of what is left.

    .. math:: s_k = 1 - (1 - r)^k

    Args:
      fraction: r, in [0, 1). A fifth is usual; ``1 - (1 - s) ** (1 / count)`` ends at s.
      count: how many rounds.

    Raises:
      ValueError: for a fraction outside [0, 1), or fewer than one round.

    Examples:
      >>> [round(s, 3) for s in rounds(0.2, 3)]
      [0.2, 0.36, 0.488]
    """
    check_sparsity(fraction, "fraction")
    if count < 1:
        raise ValueError(f"rounds needs a count of at least one, got {count}.")
    return [1 - (1 - fraction) ** k for k in range(1, count + 1)]


def iterative(
    params: Any,
    train: Callable[..., Any],
    score: Callable[[Any], Any],
    sparsities: Sequence[float],
    *,
    select: Callable[..., Any] = _select,
    restart: Callable[[Any, int], Any] = keep,
    key: jax.Array | None = None,
) -> Iterator[Round]:
    r"""Scores, prunes and trains, once for every sparsity, and yields after every round.

    .. math:: m_k = \mathrm{select}(\mathrm{score}(w_{k-1}), s_k, m_{k-1}), \qquad
        w_k = \mathrm{train}(m_k \odot \mathrm{restart}(w_{k-1}, k), m_k)

    With one sparsity it prunes in one shot: trained params, or, with a score such as SNIP, those
    before training. Stop by leaving the loop; go on by giving a round in place of the params.

    Args:
      params: those that are scored first, or a `Round`, after which it goes on.
      train: maps ``(params, masks)`` to params whose masked weights are zero. Learning rate and
        optimizer state are its own.
      score: maps params to scores, such as ``jp.scores.magnitude``.
      sparsities: fractions removed, of the dense network, each above the one before.
      select: ``jp.select`` or ``groups.select``, or one of them with ``functools.partial``.
      restart: maps ``(params, round)`` to those that are trained: :func:`keep`,
        ``rewind(early)``, ``reinitialize(init, key)``.
      key: folded with the number of the round and given to ``train`` as a third argument, so that
        a round is the same after going on from the one before. By default ``train`` gets none.

    Returns:
      An iterator of rounds, each computed when it is asked for.

    Raises:
      ValueError: for sparsities outside [0, 1) or that do not rise; from a round, for params of
        another structure or shape from ``train`` or ``restart``, or masked weights that are not
        zero after ``train``.

    Examples:
      >>> import jaxprune as jp
      >>> early, trained = jnp.array([[5.0, 6.0, 7.0, 8.0]]), jnp.array([[1.0, 4.0, 3.0, 2.0]])
      >>> double = lambda params, masks: 2 * params
      >>> *_, last = iterative(
      ...     trained, double, jp.scores.magnitude, rounds(0.5, 2), restart=rewind(early)
      ... )
      >>> last.params.tolist()
      [[0.0, 0.0, 14.0, 0.0]]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015

      Renda et al, `Comparing Rewinding and Fine-tuning in Neural Network Pruning
      <https://arxiv.org/abs/2003.02389>`_, 2020
    """
    sparsities = [check_sparsity(s) for s in sparsities]
    last = params if isinstance(params, Round) else Round(0, -1.0, params, None)
    steps = [last.sparsity, *sparsities[last.round :]]
    for before, after in zip(steps, steps[1:], strict=False):
        if not before < after:
            raise ValueError(f"iterative needs sparsities that rise, got {before} before {after}.")
    _tree.check_params(last.params)
    return _iterative(last, train, score, sparsities, select, restart, key)


def _iterative(last, train, score, sparsities, select, restart, key):
    for number, sparsity in enumerate(sparsities[last.round :], last.round + 1):
        masks = select(score(last.params), sparsity, within=last.masks)
        start = restart(last.params, number)
        _check_same(last.params, start, "restart")
        random = [] if key is None else [jax.random.fold_in(key, number)]
        params = train(apply_masks(start, masks), masks, *random)
        _check_same(start, params, "train")
        _tree.check_pruned(params, masks)
        last = Round(number, sparsity, params, masks)
        yield last


def _check_same(params: Any, got: Any, name: str) -> None:
    needed = {path: jnp.shape(leaf) for path, leaf in _tree.named_leaves(params)}
    found = {path: jnp.shape(leaf) for path, leaf in _tree.named_leaves(got)}
    for path in needed | found:
        if needed.get(path) != found.get(path):
            raise ValueError(
                f"{_tree.show(path)}: `{name}` returned {_leaf(found, path)} here, needed "
                f"{_leaf(needed, path)}. Return params like those that it got, and nothing else."
            )


def _leaf(shapes: dict[str, Any], path: str) -> str:
    return f"shape {shapes[path]}" if path in shapes else "no leaf"


def dropout_rate(rate: float, kept: int, total: int) -> float:
    r"""Lowers a dropout rate as a layer loses weights, since it overfits less.

    .. math:: D_r = D_o \sqrt{C_{ir} / C_{io}}

    Args:
      rate: that of the dense network, in [0, 1].
      kept: weights of the layer that are left.
      total: all its weights.

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
        raise ValueError(f"a dropout rate must be in [0, 1], got {rate}.")
    if not 0 <= kept <= total or total < 1:
        raise ValueError(f"dropout_rate needs 0 <= kept <= total, got {kept=} and {total=}.")
    return rate * math.sqrt(kept / total)


def remove_dead(apply_fn: Callable[..., Any], params: Any, masks: Any, *inputs: Any) -> Any:
    r"""Masks also what no longer matters: weights to or from neurons that lost all the others.

    A weight is dead if no signal reaches it, or none leads on from it to an output: the derivative
    of the output with respect to it is zero, whatever the other weights are. Eight random networks
    tell, beside the given one; zeros stay zeros in them: those of the masks, and those of leaves
    without a mask. It is repeated until nothing more dies.

    The masked function stays what it was. So a neuron without inputs stays if it has a bias that is
    not zero, or a sigmoid: it feeds a constant to the next layer. Han et al remove it all the same,
    and leave the rest to retraining.

    Biases and norms of a neuron without outputs are masked too, so that :func:`jaxprune.shrink` can
    remove it. A leaf with nothing alive is left as it is: it may serve something else.

    Args:
      apply_fn: the network in inference mode, ``apply_fn(params, *inputs)``.
      params: the params.
      masks: their masks.
      *inputs: a few examples, on which the result is checked.

    Returns:
      Masks; those of some leaves without one are new.

    Raises:
      ValueError: for masks of other paths or shapes, or if the output would change.

    Examples:
      >>> params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> masks = {"in": jnp.ones((2, 3), bool).at[:, 0].set(False),
      ...          "out": jnp.ones((3, 1), bool).at[1].set(False)}
      >>> masks = remove_dead(apply_fn, params, masks, jnp.ones((1, 2)))
      >>> print(masks["in"].astype(int), masks["out"].astype(int).ravel())
      [[0 0 1]
       [0 0 1]] [0 0 1]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    _tree.check_params(params)
    leaves, found = jax.tree.leaves(params), _tree.align_masks(params, masks)
    dying = True
    while dying:
        present = [_present(w, m) for w, m in zip(leaves, found, strict=True)]
        with jax.enable_x64(True):  # in deep networks signals vanish in float32
            alive = _alive(apply_fn, params, present, inputs)
        dying = False
        for i, (there, a) in enumerate(zip(present, alive, strict=True)):
            mask = jnp.ones_like(there) if found[i] is None else found[i]
            if (mask & ~a).any() and (mask & a).any():
                found[i], dying = mask & a, True
    result = _tree.rebuild(params, found)
    run = jax.jit(lambda masks: apply_fn(apply_masks(params, masks), *inputs))
    before, after = jax.tree.leaves(run(masks)), jax.tree.leaves(run(result))
    if not all(jnp.allclose(x, y, 1e-4, 1e-6, True) for x, y in zip(before, after, strict=True)):
        raise ValueError(
            "remove_dead: the output would change, so that not all it found is dead. Needed a "
            "network in inference mode, without steps such as `sign`, whose derivative is zero."
        )
    return result


def _present(leaf: Any, mask: Any) -> Any:
    if mask is None:
        return (
            jnp.asarray(leaf != 0) if _tree.is_floating(leaf) else jnp.ones(jnp.shape(leaf), bool)
        )
    return mask


@functools.partial(jax.jit, static_argnums=0)
def _alive(apply_fn, params, present, inputs):
    """Marks what has a derivative, for what is given or in some draw, where ReLUs may be off."""
    leaves, (data, treedef) = jax.tree.leaves(params), jax.tree.flatten(inputs)
    floating = [i for i, w in enumerate(leaves) if _tree.is_floating(w)]

    def derivative(draw):
        key, given, signed, scale = draw
        keys = jax.random.split(key, len(leaves) + len(data) + 1)
        weights = [None] * len(leaves)
        for i in floating:
            there = present[i]
            random = jax.random.uniform(keys[i], there.shape, jnp.float64, 0.5, 1.5)
            # As many as an output has of them: no signal outgrows the others.
            fan = jnp.maximum(jnp.sum(there) / there.shape[-1], 1) if there.ndim > 1 else 1
            bias = jnp.minimum(scale, 1) if there.ndim < 2 else 1
            weights[i] = jnp.where(there, jnp.where(given, leaves[i], bias * random / fan), 0)
        drawn = list(data)
        for i, x in enumerate(data):
            if _tree.is_floating(x):
                random = jax.random.normal(keys[len(leaves) + i], jnp.shape(x), jnp.float64)
                random = scale * jnp.where(signed, random, jnp.abs(random))
                drawn[i] = jnp.where(given, x, random)

        def output(weights):
            outputs = apply_fn(_tree.merge(weights, params), *treedef.unflatten(drawn))
            total = jnp.zeros((), jnp.float64)
            for i, y in enumerate(jax.tree.leaves(outputs)):
                if _tree.is_floating(y):  # a plain sum of a softmax would not move
                    total += jnp.sum(
                        y * jax.random.normal(jax.random.fold_in(keys[-1], i), y.shape)
                    )
            return total

        grads = jax.tree.leaves(jax.grad(output)(_tree.rebuild(params, weights)))
        return [~(g == 0) for g in grads]  # so that NaN counts as alive

    each = jnp.arange(9)
    draws = (
        jax.random.split(jax.random.key(0), 9),
        each == 8,
        each % 2 == 1,
        10.0 ** (each // 2 - 1),
    )
    alive = [jnp.ones_like(there) for there in present]
    for i, found in zip(floating, jax.lax.map(derivative, draws), strict=True):
        alive[i] = jnp.any(found, axis=0)
    return alive
