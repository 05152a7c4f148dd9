r"""Efficiency–quality curves: methods × sparsities × seeds, in one table.

A pruning method yields a family of networks, one for each sparsity. It is a function of the initial
params of a seed::

    (params, sparsity, key, train) -> (params, masks)

Inside the method, ``train(params)`` returns the trained dense network, which all methods of a seed
share, and ``train(params, masks)`` trains a pruned one. One-shot, iterative, gradual and rewound
pruning and sparse training from scratch can all be written in this form, for single weights as well
as for units:

>>> import jaxprune as jp
>>> def iterative(params, sparsity, key, train, rounds=3):
...     trained, masks = train(params), None
...     for i in range(1, rounds + 1):
...         trained = trained if masks is None else train(trained, masks)
...         scores = jp.scores.magnitude(trained)
...         masks = jp.select(scores, 1 - (1 - sparsity) ** (i / rounds), within=masks)
...     return trained, masks

References:
  Blalock et al, `What is the State of Neural Network Pruning?
  <https://arxiv.org/abs/2003.03033>`_, 2020
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import _loss, _progress, _select, _tree, scores
from jaxprune._tree import Masks, Params, Score, Select
from jaxprune.curves import _settings, _table
from jaxprune.curves._point import Method, Train, runner
from jaxprune.curves._table import DENSE, MEASURES, Curves, load, over_seeds, save, summary
from jaxprune.masks import apply_masks
from jaxprune.optimizer import enforce

__all__ = ["DENSE", "MEASURES", "load", "method", "over_seeds", "save", "summary", "sweep"]
__all__ += ["trainer"]


def method(
    score: Score, *batch: Any, select: Select = _select.select, trained: bool = True
) -> Method:
    """Makes a method from a score: ``select(score(params, *batch), sparsity)``, in one shot.

    Args:
      score: maps ``(params, *batch)`` to scores.
      *batch: passed to ``score``.
      select: maps ``(scores, sparsity)`` to masks: ``jp.select``, ``groups.select``, or one of them
        with ``functools.partial``.
      trained: whether the trained network is pruned, or the initial one, which is then trained.

    Examples:
      >>> prune = method(scores.magnitude, trained=False)
      >>> params = jnp.array([[1.0, 4.0], [3.0, 2.0]])
      >>> params, masks = prune(params, 0.5, jax.random.key(0), lambda params, masks: params)
      >>> print(masks)
      [[False  True]
       [ True False]]
    """
    _tree.check_function("method: score", score, _loss.CURRIED)

    def prune(params, sparsity, key, train):
        params = train(params) if trained else params
        masks = select(score(params, *batch), sparsity)
        return (params if trained else train(apply_masks(params, masks), masks)), masks

    return prune


def _random(params: Params, sparsity: float, key: jax.Array, train: Any) -> tuple[Params, Masks]:
    return train(params), _select.select(scores.random(params, key), sparsity)


_magnitude = method(scores.magnitude)


def trainer(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *data: Any,
    steps: int,
    batch_size: int = 64,
) -> Train:
    """Makes a train function for :func:`sweep`: steps on random batches, under ``enforce``.

    Batch statistics are not updated: write your own train function for a network that has them.

    Args:
      loss: maps ``(params, *batch)`` to a scalar.
      optimizer: any optimizer; its state is initialised in every call of the train function.
      *data: arrays whose first axis counts the examples.
      steps: the number of steps.
      batch_size: the number of examples in a batch, drawn with replacement.

    Raises:
      ValueError: for data of different lengths.
      TypeError: from the train function, for a loss that is not scalar.

    Examples:
      >>> data = jnp.ones((8, 1))
      >>> train = trainer(lambda w, x: jnp.mean((w - x) ** 2), optax.sgd(0.5), data, steps=20)
      >>> mask = jnp.array([[True, False]])
      >>> print(train(jnp.zeros((1, 2)), mask, jax.random.key(0)).round(2))
      [[1. 0.]]
    """
    if len(sizes := {len(array) for array in data}) != 1:
        raise ValueError(f"trainer: arrays of data must have one length, got {sorted(sizes)}.")

    @jax.jit
    def step(floats: Any, state: Any, params: Any, masks: Any, key: jax.Array, data: Any) -> Any:
        index = jax.random.randint(key, (batch_size,), 0, len(data[0]))
        batch = [array[index] for array in data]
        grads = _loss.grad("trainer", loss, _tree.merge(floats, params), *batch)
        updates, state = enforce(optimizer, masks).update(grads, state, floats)
        return optax.apply_updates(floats, updates), state

    def train(params: Params, masks: Masks, key: jax.Array) -> Params:
        floats = _tree.floating(params)  # not counters and random keys
        state = enforce(optimizer, masks).init(floats)
        arrays = jax.tree.map(jnp.asarray, data)
        for step_key in jax.random.split(key, steps):  # XLA on CPU convolves slowly inside a scan
            floats, state = step(floats, state, params, masks, step_key, arrays)
        return _tree.merge(floats, params)

    return train


def sweep(
    methods: Mapping[str, Method],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    train: Train,
    evaluate: Callable[[Params], float],
    *,
    init: Callable[[jax.Array], Params],
    apply_fn: Callable[..., Any],
    inputs: Sequence[Any],
    store: str | os.PathLike[str] | None = None,
) -> Curves:
    """Prunes with every method, to every sparsity, for every seed, and measures the results.

    The result of a method is masked and evaluated (``before``), trained once more, and evaluated
    again (``after``). Random and magnitude pruning of the trained network are always added to the
    methods. Rows named ``dense`` are the control, which is trained twice and never pruned. Units
    that are masked entirely are removed by :func:`jaxprune.shrink` before timing. If there are
    none, or if they cannot be removed, the masked dense network is timed. If a point fails, its
    error is reported and the sweep continues; a quality of NaN is such an error.

    Args:
      methods: a function ``(params, sparsity, key, train) -> (params, masks)`` for every name.
      sparsities: fractions of weights to prune, in [0, 1): 1 - 1 / c compresses about c times.
      seeds: integers.
      train: maps ``(params, masks, key)`` to trained params, in which masked weights must be zero:
        :func:`trainer` makes such a function.
      evaluate: maps params to their quality, a number; higher is better.
      init: maps a PRNG key to the initial params: random ones, or those of a checkpoint.
      apply_fn: the network, ``apply_fn(params, *inputs)``, whose FLOPs and time are measured.
      inputs: the list of its inputs; time is measured at this batch size.
      store: a ``.csv`` or ``.json`` file that keeps finished points; they are not computed again.
        On Linux and macOS several processes may write to it at a time. Its points must have the
        settings of this sweep.

    Returns:
      A dict of arrays with one entry for each point:

      - ``method``, ``sparsity``, ``seed``
      - ``before``, ``after``: quality before and after the last training
      - ``compression``: number of params divided by the number kept; ``params``: the number kept
      - ``theoretical_speedup``: dense FLOPs divided by those of kept weights; ``flops``: the latter
      - ``measured_speedup``: time of the dense network divided by that of the pruned one: the
        median of 30 pairs, run in turn
      - ``stored_bytes``: see :func:`jaxprune.metrics.stored_bytes`
      - ``trainings``: number of calls of ``train``, including that of the dense network
      - ``seconds``: time of the point, excluding the training of the dense network
      - ``error``: the error of a failed point, whose numbers are NaN, or an empty string
      - ``settings``: fingerprints of the functions and inputs, read from their code and from the
        values that it uses, such as the learning rate of an optimizer, and data

    Raises:
      ValueError: for a sparsity outside [0, 1), no or repeated seeds, a method named "dense", or a
        store that is not a table of curves or holds points of other settings, which are named.
      TypeError: for a method that is not callable.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> loss = lambda w, x: jnp.mean((x @ w - x) ** 2)
      >>> train = trainer(loss, optax.adam(1e-2), x, steps=20)
      >>> table = sweep(
      ...     {"SNIP": method(scores.snip(loss), x, trained=False)}, sparsities=[0.5, 0.75],
      ...     seeds=range(2), train=train, evaluate=lambda w: -loss(w, x),
      ...     init=lambda key: jax.random.normal(key, (4, 4)),
      ...     apply_fn=lambda w, x: x @ w, inputs=[x],
      ... )
      >>> mean = over_seeds(table)
      >>> list(zip(mean["method"].tolist(), mean["compression"].tolist()))[-2:]
      [('SNIP', 2.0), ('SNIP', 4.0)]
    """
    if DENSE in methods:
        raise ValueError(f"sweep: methods must not be named {DENSE!r}, the name of the control.")
    for name, prune in methods.items():
        if not callable(prune):
            raise TypeError(f"sweep: method {name!r} must be callable, got {type(prune).__name__}.")
    sparsities = [_select.check_sparsity(s) for s in sparsities]
    if not len(seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"sweep: seeds must be distinct and at least one, got {list(seeds)}.")
    methods = {"random": _random, "magnitude": _magnitude} | dict(methods)
    points = [(DENSE, 0.0)] + [(name, s) for name in methods for s in sparsities]
    methods[DENSE] = _magnitude  # at sparsity 0
    shared = {"train": train, "evaluate": evaluate, "init": init, "apply_fn": apply_fn}
    settings = _settings.by_method(shared | {"inputs": tuple(inputs)}, methods)
    rows = _table.finished(store, settings)
    wanted = [(name, s, seed) for seed in seeds for name, s in points]
    network = jax.jit(apply_fn)
    bar = _progress.bar([key for key in wanted if key not in rows])
    run = functools.lru_cache(maxsize=1)(  # seeds follow each other: only one dense network is held
        lambda seed: runner(seed, init, train, evaluate, network, tuple(inputs))
    )
    for name, sparsity, seed in bar:
        bar.set_description(f"{name} {sparsity:.4g}, seed {seed}")
        try:
            row = run(seed)(methods[name], sparsity)
        except Exception as error:  # a method may raise anything; the sweep continues
            if name == DENSE:
                raise
            row = {"error": f"{type(error).__name__}: {error}"}
            bar.write(f"{name} at sparsity {sparsity}, seed {seed}: {error}", file=sys.stderr)
        row |= {"method": name, "sparsity": sparsity, "seed": seed, "settings": settings[name]}
        rows[name, sparsity, seed] = row
        if store is not None:
            _table.add(row, store)
    return _table.tabulate(rows[key] for key in wanted)
