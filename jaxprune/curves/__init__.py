r"""Efficiency–quality curves: methods × sparsities × seeds, as a tidy table.

A pruning method is not one network but a family. Here it is a function::

    (params, sparsity, key, train) -> (params, masks)

of the initial params of a seed. Inside it, ``train(params)`` gives the dense network, trained once
per seed for all methods, and ``train(params, masks)`` trains a pruned one, whichever it is. So one
shot, iterative, gradual and rewound pruning and training sparse from scratch are points of one
family, whether weights leave one by one or in groups:

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

import csv
import functools
import io
import itertools
import json
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _atomic, _loss, _progress, _select, _timing, _tree, metrics, scores
from jaxprune._shrink import shrink
from jaxprune._table import Table
from jaxprune.masks import apply_masks
from jaxprune.optimizer import enforce

Method = Callable[..., tuple[Any, Any]]
Curves = Mapping[str, np.ndarray]

DENSE = "dense"
_KEY = {"method": str, "sparsity": float, "seed": int}
MEASURES = {
    "before": float,
    "after": float,
    "compression": float,
    "theoretical_speedup": float,
    "measured_speedup": float,
    "stored_bytes": float,
    "params": float,
    "flops": float,
    "trainings": float,
    "seconds": float,
}
_COLUMNS = _KEY | MEASURES | {"error": str}


def method(
    score: Callable[..., Any],
    *batch: Any,
    select: Callable[..., Any] = _select.select,
    trained: bool = True,
) -> Method:
    """Makes a method of a score: ``select(score(params, *batch), sparsity)``, once.

    Args:
      score: maps ``(params, *batch)`` to scores.
      *batch: passed to ``score``.
      select: maps ``(scores, sparsity)`` to masks: ``jp.select``, ``groups.select``, or one of them
        with ``functools.partial``.
      trained: whether the trained network is pruned; else the initial one is, and then trained.

    Examples:
      >>> prune = method(scores.magnitude, trained=False)
      >>> params = jnp.array([[1.0, 4.0], [3.0, 2.0]])
      >>> params, masks = prune(params, 0.5, jax.random.key(0), lambda params, masks: params)
      >>> print(masks)
      [[False  True]
       [ True False]]
    """

    def prune(params: Any, sparsity: float, key: jax.Array, train: Any) -> tuple[Any, Any]:
        params = train(params) if trained else params
        masks = select(score(params, *batch), sparsity)
        return (params if trained else train(apply_masks(params, masks), masks)), masks

    return prune


def _random(params: Any, sparsity: float, key: jax.Array, train: Any) -> tuple[Any, Any]:
    return train(params), _select.select(scores.random(params, key), sparsity)


_magnitude = method(scores.magnitude)


def trainer(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *data: Any,
    steps: int,
    batch_size: int = 64,
) -> Callable[[Any, Any, jax.Array], Any]:
    """Makes a train function for :func:`sweep`: some steps on random batches, under ``enforce``.

    Batch statistics stay as they are: a network that has some needs a train function of its own.

    Args:
      loss: maps ``(params, *batch)`` to a scalar.
      optimizer: any optimizer; its state starts anew.
      *data: arrays whose first axis is that of the examples.
      steps: how many.
      batch_size: examples in a batch, drawn with replacement.

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
    sizes = {len(array) for array in data}
    if len(sizes) != 1:
        raise ValueError(f"trainer needs data of one length, got {[len(array) for array in data]}.")
    (size,) = sizes

    @jax.jit
    def step(floats: Any, state: Any, params: Any, masks: Any, key: jax.Array, data: Any) -> Any:
        index = jax.random.randint(key, (batch_size,), 0, size)
        grads = _loss.grad(
            "trainer", loss, _tree.merge(floats, params), *(array[index] for array in data)
        )
        updates, state = enforce(optimizer, masks).update(grads, state, floats)
        return optax.apply_updates(floats, updates), state

    def train(params: Any, masks: Any, key: jax.Array) -> Any:
        floats = _tree.floating(params)  # counts and random keys are not trained
        state = enforce(optimizer, masks).init(floats)
        arrays = jax.tree.map(jnp.asarray, data)
        for step_key in jax.random.split(key, steps):  # XLA on CPU convolves slowly in a scan
            floats, state = step(floats, state, params, masks, step_key, arrays)
        return _tree.merge(floats, params)

    return train


def sweep(
    methods: Mapping[str, Method],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    train: Callable[[Any, Any, jax.Array], Any],
    evaluate: Callable[[Any], float],
    *,
    init: Callable[[jax.Array], Any],
    apply_fn: Callable[..., Any],
    inputs: Sequence[Any],
    store: str | os.PathLike[str] | None = None,
) -> Curves:
    """Prunes with every method, to every sparsity, for every seed, and measures what came of it.

    What a method returns is masked and evaluated (``before``), trained once more, and evaluated
    again (``after``). Random and magnitude pruning of the trained network are always among the
    methods. Rows named ``dense`` are the control: trained twice, never pruned. A point that
    fails is reported, and the others go on.

    A unit that the masks remove whole leaves before time is taken, as :func:`jaxprune.shrink` does
    it. Where none does, the time is that of the dense program with zeros in it.

    Args:
      methods: for every name a function ``(params, sparsity, key, train) -> (params, masks)``.
      sparsities: fractions removed, in [0, 1): 1 - 1 / c for a compression of about c.
      seeds: integers.
      train: maps ``(params, masks, key)`` to trained params whose masked weights are zero, such as
        :func:`trainer` makes.
      evaluate: maps params to their quality, a number; higher is better.
      init: maps a key to the params to begin with: random ones, or those of a checkpoint.
      apply_fn: the network, ``apply_fn(params, *inputs)``, whose FLOPs and time are measured.
      inputs: its inputs; time is measured at this batch size.
      store: a ``.csv`` or ``.json`` file that keeps finished points; those are not run again.

    Returns:
      A dict of arrays, one entry for each point:

      - ``method``, ``sparsity``, ``seed``
      - ``before``, ``after``: quality before and after the last training
      - ``compression``: all params over those kept; ``params``: those kept
      - ``theoretical_speedup``: dense FLOPs over those of kept weights; ``flops``: the latter
      - ``measured_speedup``: time of the dense network over that of the pruned one, which runs
        right before or after it: the median of 30 such pairs
      - ``stored_bytes``: see :func:`jaxprune.metrics.stored_bytes`
      - ``trainings``: how often ``train`` was called for it, the dense network's included
      - ``seconds``: what the point took, training of the dense network excluded
      - ``error``: why it failed, with NaN for the numbers; or nothing

    Raises:
      ValueError: for a sparsity outside [0, 1), no or repeated seeds, a method named "dense", a
        store that holds something else, or one of another network.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> loss = lambda w, x: jnp.mean((x @ w - x) ** 2)
      >>> table = sweep(
      ...     {"SNIP": method(scores.snip(loss), x, trained=False)},
      ...     sparsities=[0.5, 0.75],
      ...     seeds=range(2),
      ...     train=trainer(loss, optax.adam(1e-2), x, steps=20),
      ...     evaluate=lambda w: -loss(w, x),
      ...     init=lambda key: jax.random.normal(key, (4, 4)),
      ...     apply_fn=lambda w, x: x @ w,
      ...     inputs=[x],
      ... )
      >>> mean = over_seeds(table)
      >>> list(zip(mean["method"].tolist(), mean["compression"].tolist()))[-2:]
      [('SNIP', 2.0), ('SNIP', 4.0)]

    References:
      Blalock et al, `What is the State of Neural Network Pruning?
      <https://arxiv.org/abs/2003.03033>`_, 2020
    """
    methods = {"random": _random, "magnitude": _magnitude} | dict(methods)
    _check(methods, sparsities, seeds)
    rows = _done(store)
    points = [(DENSE, 0.0)] + [(name, float(s)) for name in methods for s in sparsities]
    wanted = [(name, s, seed) for seed in seeds for name, s in points]
    network = jax.jit(apply_fn)
    bar = _progress.bar([key for key in wanted if key not in rows])
    run = functools.lru_cache(maxsize=1)(
        lambda seed: _runner(seed, init, train, evaluate, network, tuple(inputs))
    )
    for name, sparsity, seed in bar:
        bar.set_description(f"{name} {sparsity:.4g}, seed {seed}")
        if name == DENSE:
            row = run(seed)(_magnitude, 0.0)
        else:
            try:
                row = run(seed)(methods[name], sparsity)
            except Exception as error:  # whatever a method raises: the other points go on
                row = {"error": f"{type(error).__name__}: {error}"}
                bar.write(f"{name} at sparsity {sparsity}, seed {seed}: {error}", file=sys.stderr)
        rows[name, sparsity, seed] = {"method": name, "sparsity": sparsity, "seed": seed} | row
        if store is not None:
            _check_one_network(rows.values(), store)
            save(_table(rows.values()), store)
    return _table([rows[key] for key in wanted])


def _runner(
    seed: int, init: Any, train: Any, evaluate: Any, network: Any, inputs: Any
) -> Callable[[Method, float], dict[str, Any]]:
    """Gives a function that measures one point of a seed; its points share the dense network."""
    init_key, dense_key, method_key, tune_key = jax.random.split(jax.random.key(seed), 4)
    initial = init(init_key)
    full = _select.whole_masks(initial, _select.select)
    dense = functools.cache(lambda: train(initial, full, dense_key))
    dense_flops = functools.cache(lambda: metrics.flops(network, initial, *inputs))

    def point(prune: Method, sparsity: float) -> dict[str, Any]:
        calls = itertools.count(1)

        def counted(params: Any, masks: Any = None, key: Any = None) -> Any:
            nth = next(calls)
            if params is initial and masks is None and key is None:
                return dense()
            key = jax.random.fold_in(tune_key, nth) if key is None else key
            return train(params, full if masks is None else masks, key)

        dense()
        start = time.perf_counter()
        params, masks = prune(initial, sparsity, method_key, counted)
        params = apply_masks(params, masks)
        before = float(evaluate(params))
        params = counted(params, masks)
        _tree.check_pruned(params, masks)
        after = float(evaluate(params))
        return {
            "before": before,
            "after": after,
            **_efficiency(network, initial, dense_flops(), params, masks, inputs),
            "trainings": next(calls) - 1,
            "seconds": time.perf_counter() - start,
            "error": "",
        }

    return point


def _efficiency(
    network: Any, dense: Any, dense_flops: float, params: Any, masks: Any, inputs: Any
) -> dict[str, float]:
    """Measures the pruned network beside the dense one."""
    small, small_params, small_masks = _smaller(network, params, masks, inputs)
    functions = {"dense": (network, dense), "pruned": (small, small_params)}
    times = _timing.interleave(functions, inputs, rounds=30)
    flops = metrics.flops(network, dense, *inputs, masks=masks)
    table = metrics.summary(params, masks)
    return {
        "compression": table.size / max(table.kept, 1),
        "theoretical_speedup": dense_flops / max(flops, 1),
        "measured_speedup": np.median(np.divide(times["dense"], times["pruned"])),
        "stored_bytes": metrics.stored_bytes(small_params, small_masks),
        "params": table.kept,
        "flops": flops,
    }


def _smaller(network: Any, params: Any, masks: Any, inputs: Any) -> tuple[Any, Any, Any]:
    """Shrinks as far as the masks allow; gives the function, its params and their masks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "shrink: the masks remove no whole slice")
        try:
            small, small_params, plan = shrink(network, params, masks, *inputs, verify=False)
        except ValueError:  # slices that cannot leave, or a whole layer: the network stays as it is
            return network, params, masks
    if not plan.kept:
        return network, params, masks
    return small, small_params, plan.take(masks)


def _check(
    methods: Mapping[str, Method], sparsities: Sequence[float], seeds: Sequence[int]
) -> None:
    if DENSE in methods:
        raise ValueError(f"a method cannot be named {DENSE!r}: that is the unpruned control.")
    for name, prune in methods.items():
        if not callable(prune):
            raise TypeError(f"method {name!r} must be callable, got {type(prune).__name__}.")
    for s in sparsities:
        _select.check_sparsity(s)
    if not len(seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"sweep needs seeds, each once, got {list(seeds)}.")


def _check_one_network(rows: Iterable[Mapping[str, Any]], store: Any) -> None:
    sizes = {round(row["params"] * row["compression"]) for row in rows if not row["error"]}
    if len(sizes) > 1:
        raise ValueError(
            f"{store}: its points are of another network: sizes are {sorted(sizes)} params. Use "
            "another file."
        )


def _done(store: Any) -> dict[tuple[str, float, int], dict[str, Any]]:
    """Reads the points that are finished, by method, sparsity and seed."""
    if store is None:
        return {}
    path = _path(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    table = load(path)
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    return {(r["method"], r["sparsity"], r["seed"]): r for r in rows if not r["error"]}


def _table(rows: Iterable[Mapping[str, Any]]) -> Curves:
    return {
        name: np.array([row.get(name, np.nan) for row in rows], kind)
        for name, kind in _COLUMNS.items()
    }


def save(table: Curves, path: str | os.PathLike[str]) -> None:
    """Writes a table to a ``.csv`` or ``.json`` file, whole or not at all.

    Examples:
      >>> import tempfile
      >>> table = {name: np.zeros(2).astype(kind) for name, kind in _COLUMNS.items()}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(table, folder + "/points.csv")
      ...     load(folder + "/points.csv")["seed"].tolist()
      [0, 0]
    """
    path = _path(path)
    columns = {name: table[name].tolist() for name in _COLUMNS}
    text = io.StringIO()
    if path.suffix == ".csv":
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    else:
        finite = {k: [None if x != x else x for x in cells] for k, cells in columns.items()}
        json.dump({"jaxprune": "curves", "columns": finite}, text, indent=1)
    with _atomic.replacing(path) as new:
        new.write_text(text.getvalue(), encoding="utf-8", newline="")


def load(path: str | os.PathLike[str]) -> Curves:
    """Reads a table that :func:`save` or :func:`sweep` wrote.

    Examples:
      >>> import tempfile
      >>> table = {name: np.zeros(2).astype(kind) for name, kind in _COLUMNS.items()}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(table, folder + "/points.json")
      ...     sorted(load(folder + "/points.json")) == sorted(table)
      True

    Raises:
      ValueError: for a file that is cut short or holds something else.
    """
    path = _path(path)
    try:
        text = path.read_bytes().decode()
        if path.suffix == ".csv":
            header, *lines = csv.reader(io.StringIO(text, newline=""))
            columns = dict(zip(header, zip(*lines, strict=True), strict=True))
        else:
            columns = json.loads(text)["columns"]
        sizes = {len(columns[name]) for name in _COLUMNS}
        if len(sizes) != 1:
            raise ValueError(f"columns of {sorted(sizes)} entries")
        return {
            name: np.array([np.nan if cell is None else kind(cell) for cell in columns[name]], kind)
            for name, kind in _COLUMNS.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a table of curves, or cut short ({error}). Needed are the columns "
            f"{', '.join(_COLUMNS)}, as `jp.curves.save` writes them."
        ) from error


def _path(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: tables of curves are .csv or .json files, got {path.suffix!r}.")
    return path


def over_seeds(table: Curves) -> Curves:
    """Averages over seeds: for every method and sparsity the mean and standard deviation.

    Returns:
      A dict of arrays: ``method``, ``sparsity``, ``seeds`` (how many finished), and for every
      measure its mean, and with the suffix ``_std`` the standard deviation of the sample (0 for
      one seed). ``change`` is ``after`` less that of the dense network of the same seed.

    Examples:
      >>> table = {name: np.zeros(2).astype(kind) for name, kind in _COLUMNS.items()}
      >>> table |= {"error": np.array(["", ""]), "after": np.array([0.7, 0.9])}
      >>> over_seeds(table)["after"].round(3).tolist(), over_seeds(table)["seeds"].tolist()
      ([0.8], [2])
    """
    ok = table["error"] == ""
    dense = {
        seed: after
        for name, seed, after in zip(table["method"], table["seed"], table["after"], strict=True)
        if name == DENSE
    }
    change = table["after"] - np.array([dense.get(seed, np.nan) for seed in table["seed"]])
    measures = {name: table[name] for name in MEASURES} | {"change": change}
    keys = list(
        dict.fromkeys(zip(table["method"].tolist(), table["sparsity"].tolist(), strict=True))
    )
    found: dict[str, list[Any]] = {"method": [], "sparsity": [], "seeds": []}
    for name, sparsity in keys:
        rows = ok & (table["method"] == name) & (table["sparsity"] == sparsity)
        found["method"].append(name)
        found["sparsity"].append(sparsity)
        found["seeds"].append(int(rows.sum()))
        for measure, values in measures.items():
            some = values[rows]
            found.setdefault(measure, []).append(some.mean() if len(some) else np.nan)
            spread = some.std(ddof=1) if len(some) > 1 else 0.0 if len(some) else np.nan
            found.setdefault(f"{measure}_std", []).append(spread)
    return {name: np.array(values) for name, values in found.items()}


def summary(table: Curves) -> Table:
    """Tabulates curves: quality, mean ± standard deviation over seeds, beside the savings.

    Examples:
      >>> table = {name: np.ones(2).astype(kind) for name, kind in _COLUMNS.items()}
      >>> table |= {"method": np.array(["dense", "SNIP"]), "error": np.array(["", ""])}
      >>> [row[0] for row in summary(table).rows]
      ['dense', 'SNIP']
    """
    mean = over_seeds(table)
    rows = []
    for i, (name, seeds) in enumerate(zip(mean["method"], mean["seeds"], strict=True)):
        point = str(name), f"{mean['sparsity'][i]:.4g}", str(seeds)
        if not seeds:
            rows.append((*point, *[""] * 6, "failed"))
            continue
        quality = [
            f"{mean[q][i]:.4g} ± {mean[q + '_std'][i]:.2g}" if seeds > 1 else f"{mean[q][i]:.4g}"
            for q in ("before", "after")
        ]
        ratios = [
            f"{mean[r][i]:.2f}×" for r in ("compression", "theoretical_speedup", "measured_speedup")
        ]
        stored = f"{mean['stored_bytes'][i]:,.0f}"
        rows.append((*point, *quality, f"{mean['change'][i]:+.2g}", *ratios, stored))
    header = ("method", "sparsity", "seeds", "before", "after", "change", "compression")
    return Table((*header, "FLOPs", "time", "bytes"), rows)
