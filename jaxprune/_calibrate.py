"""What flows into each param, read from the traced program."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _program, _progress, _tree
from jaxprune._tree import Params


class Statistics(NamedTuple):
    """Statistics of the rows that flow into a weight, in float32; ``d`` inputs.

    For a stacked param each array has leading axes of layers; for a grouped or batched contraction,
    such as that of experts, then one of groups.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), the number of rows
    mean: jax.Array  # shape=(d,)
    norms: jax.Array  # shape=(d,), the Euclidean norm of each input over all rows
    gram: jax.Array | None = None  # shape=(d, d), XᵀX, if it was asked for


class Calibration(dict[str, Statistics]):
    """Statistics by path, as :func:`calibrate` returns them.

    Attributes:
      skipped: why a param has no statistics, by path.

    Examples:
      >>> apply_fn = lambda p, x: (x @ p["w"].T) * p["scale"]
      >>> params = {"w": jnp.ones((4, 3)), "scale": jnp.ones((1, 4))}
      >>> stats = jp.calibrate(apply_fn, params, [jnp.ones((5, 3))])
      >>> stats
      w: shape (3,)
      scale: read by `mul`
      >>> print(stats.matrices(params)["w"].shape)
      (3, 4)
    """

    skipped: dict[str, str]
    _walk: _program.Walk
    _names: list[list[tuple[str, str, tuple[int, ...]]]]  # entry, path and layer of every weight

    def matrices(self, params: Params) -> dict[str, jax.Array]:
        """Returns the weights as the matrices that the statistics belong to.

        Args:
          params: those of the calibration, or others of the same shapes.

        Returns:
          For every path of the statistics an array of shape ``(..., inputs, outputs)``, in float32.
        """
        self._walk.start(params, [])
        matrices = []
        for weight in self._walk.weights:
            self._walk.advance(weight.at)
            matrices.append(_ungrouped(weight.matrix(self._walk.env)))
        return _by_path(self._names, matrices)

    def __repr__(self) -> str:
        rows = [f"{_tree.show(path)}: shape {s.norms.shape}" for path, s in self.items()]
        rows += [f"{_tree.show(path)}: {why}" for path, why in self.skipped.items()]
        return "\n".join(rows)


def calibrate(
    apply_fn: Callable[..., Any], params: Params, batches: Iterable[Any], gram: bool = False
) -> Calibration:
    r"""Measures what flows into every param that a matrix product or a convolution consumes.

    A contraction is :math:`Y = X W`: the rows of X are the activations of all examples and
    positions, for a convolution its patches. The traced program tells which param is W, also
    through casts, transposes, reshapes, masks and scales, in a `scan`, a loop or a branch. Batches
    are read one after another, and the program is compiled once for each shape of them.

    A param that is used in the same way in several places has the statistics of all of them. If
    several contractions consume different parts of a param, those after the first are named
    ``"path (2)"``, and so on; a part that was consumed before in another way is left out.

    Args:
      apply_fn: maps ``(params, *inputs)`` to anything.
      params: a pytree of arrays.
      batches: an iterable; each batch is the tuple of inputs, or the only input.
      gram: whether to sum :math:`X^\top X` too.

    Returns:
      A dict from paths to :class:`Statistics`. Its attribute ``skipped`` tells for every other
      param why it has none.

    Raises:
      ValueError: for no batches, tokens outside of a table, or activations that are not finite;
        the message names the equation and the line of code where they began.
      TypeError: for params or inputs that are not arrays.

    Examples:
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"] + p["bias"]) @ p["out"]
      >>> params = {"in": jnp.eye(2), "bias": jnp.zeros((1, 2)), "out": jnp.ones((2, 1))}
      >>> stats = calibrate(apply_fn, params, [jnp.array([[3.0, -1.0], [4.0, 0.0]])])
      >>> print(stats["in"].norms, stats["out"].norms)
      [5. 1.] [5. 0.]
      >>> print(stats.skipped["bias"])
      read by `add`
    """
    check_params(params)
    walks: dict[Any, _program.Walk] = {}
    totals: list[Any] = []
    for n, given in enumerate(_progress.bar(batches, desc="calibrate", unit="batch")):
        batch = as_batch(given, n)
        key = signature(batch)
        if key not in walks:
            walks[key] = _program.Walk(apply_fn, params, batch)
        walk = walks[key]
        parts = _sums(walk, params, batch, gram)
        if not totals:
            first, totals = walk, parts
        elif [w.leaves for w in walk.weights] != [w.leaves for w in first.weights]:
            raise ValueError(
                f"batches[{n}]: must reach the same params as batch 0, got a program that reaches "
                "others. Use inputs for which the function does the same."
            )
        else:
            totals = [_program.add(a, b) for a, b in zip(totals, parts, strict=True)]
    if not totals:
        raise_empty(walks)
    return _finish(first, totals)


def check_params(params: Params) -> None:
    """Raises a `TypeError` for params that are not arrays with values."""
    _tree.check_params(params)
    for path, leaf in _tree.named_leaves(params):
        if isinstance(leaf, jax.ShapeDtypeStruct) or _tree.is_traced(leaf):
            raise TypeError(
                f"{_tree.show(path)}: params must have values, got {type(leaf).__name__}. Call "
                "this function outside of `jit`, with arrays."
            )


def as_batch(given: Any, number: int) -> tuple[Any, ...]:
    """Returns the tuple of inputs of a batch."""
    batch = given if isinstance(given, tuple) else (given,)
    for path, leaf in _tree.named_leaves(batch):
        known = isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex))
        if not known or _tree.is_traced(leaf):
            raise TypeError(
                f"batches[{number}], input {path}: must be an array, got {type(leaf).__name__}. "
                "A batch is the tuple of inputs, or the only input."
            )
        if not np.size(leaf):
            raise ValueError(
                f"batches[{number}], input {path}: must hold examples, got shape {jnp.shape(leaf)}."
            )
    return batch


def signature(batch: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the structure of a batch, and the shape and dtype of every input."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((jnp.shape(x), _tree.dtype(x)) for x in leaves)


def raise_empty(seen: Any) -> None:
    """Raises a `ValueError` for no batches, or for a function without a weight."""
    if not seen:
        raise ValueError(
            "batches must hold at least one batch, got none. An iterator can be read only once: "
            "pass a list."
        )


def statistics(sums: Any) -> Statistics:
    """Returns the statistics of one or all groups from what was summed."""
    count = jnp.maximum(sums.count, 1)
    return Statistics(sums.count, sums.total / count[..., None], jnp.sqrt(sums.squares), sums.gram)


def check_finite(walk: _program.Walk, weight: _program.Weight, sums: Any) -> None:
    """Raises a `ValueError` if what flows into a weight is not finite."""
    if not bool(jnp.all(jnp.isfinite(sums.squares))):
        raise ValueError(
            f"{weight.name}: the activations that flow in must be finite, got NaN or infinity, "
            f"first from {walk.first_not_finite(weight)}. Check the batches and the params."
        )


def _sums(walk: _program.Walk, params: Params, batch: tuple[Any, ...], gram: bool) -> list[Any]:
    walk.start(params, [batch])
    parts = []
    for weight in walk.weights:
        walk.advance(weight.at)
        parts.append(None if walk.is_covered(weight) else walk.sums(weight, gram))
        if parts[-1] is not None:
            check_finite(walk, weight, parts[-1])
    return parts


def _finish(walk: _program.Walk, totals: list[Any]) -> Calibration:
    names = []
    counts: dict[Any, int] = {}
    for weight, total in zip(walk.weights, totals, strict=True):
        leaves = [] if total is None else weight.leaves
        number = {leaf: counts.get(leaf, 0) + 1 for leaf in leaves}
        counts |= number
        names.append([(p if n == 1 else f"{p} ({n})", p, i) for (p, i), n in number.items()])
    entries = [t and statistics(jax.tree.map(_ungrouped, t)) for t in totals]
    result = Calibration(_by_path(names, entries))
    result.skipped = walk.reasons()
    result._walk, result._names = walk, names
    return result


def _ungrouped(x: jax.Array) -> jax.Array:
    return x[0] if len(x) == 1 else x


def _stack(lengths: tuple[int, ...], *layers: jax.Array) -> jax.Array:
    return jnp.stack(layers).reshape(*lengths, *layers[0].shape)


def _by_path(
    names: list[list[tuple[str, str, tuple[int, ...]]]], entries: list[Any]
) -> dict[str, Any]:
    """Collects by name, and stacks the entries of the layers of a stacked param."""
    layers: dict[str, dict[tuple[int, ...], Any]] = {}
    for places, entry in zip(names, entries, strict=True):
        for path, _, place in places:
            layers.setdefault(path, {})[place] = entry
    result = {}
    for path, by_place in layers.items():
        if () in by_place:
            result[path] = by_place[()]
        else:
            lengths = tuple(np.max(list(by_place), 0) + 1)
            in_order = [by_place[place] for place in sorted(by_place)]
            result[path] = jax.tree.map(functools.partial(_stack, lengths), *in_order)
    return result
