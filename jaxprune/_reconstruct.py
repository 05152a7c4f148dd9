"""Prunes a network layer by layer, in one walk along its traced program."""

import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _progress, _resume, _select, _tree, layerwise
from jaxprune._calibrate import (
    Statistics,
    as_batch,
    check_finite,
    check_params,
    raise_empty,
    signature,
    statistics,
)
from jaxprune._tree import Masks, Params
from jaxprune.patterns import Pattern

Method = Callable[..., tuple[jax.Array, jax.Array]]


def reconstruct(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    method: Method = layerwise.sparsegpt,
    pattern: Pattern | None = None,
    scope: Mapping[str, Any] | None = None,
    host: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[Params, Masks]:
    r"""Prunes every weight that a contraction consumes, in the order in which data reaches it.

    One walk along the traced program carries all batches. Where a weight meets an activation, the
    method gets the weight and the statistics of that activation, which the pruned weights before
    it have made; the walk goes on with the weight that the method returns. The layers of a `scan`
    are visited one at a time. A weight in a loop, or one that is used several times in the same
    way, is pruned once, with the rows of all its uses.

    All weights have the same sparsity; the methods differ in what competes inside of a weight.

    Args:
      apply_fn: maps ``(params, *inputs)`` to anything.
      params: a pytree of arrays.
      batches: all calibration batches, of one shape; each is the tuple of inputs, or the only one.
      sparsity: the fraction to remove of each weight, or of its cells. n:m patterns imply one.
      method: maps ``(weights, statistics, sparsity)``, and ``pattern`` if one is given, to the new
        weights and their mask; weights have the shape ``(inputs, outputs)``. Set its attribute
        ``gram = False`` if it does not use the Gram, which is then not computed.
      pattern: the cells that are kept or pruned together, of matrices ``(inputs, outputs)``; by
        default that of the method.
      scope: sparsities by path, for a stacked leaf also one for each layer, as of
        :func:`jaxprune.layerwise.owl`. 0 leaves a param as it is.
      host: whether activations are stored in the memory of the host between two stretches.
      checkpoint: a folder in which every finished weight is stored. The same call goes on from the
        last one, to the same result.

    Returns:
      The params, in which pruned weights are zero, and their masks, `None` for a param that was not
      pruned. ``apply_fn`` of them is what the walk computed. A warning tells why a param with two
      or more axes was not pruned.

    Raises:
      ValueError: for no batches, batches of several shapes, tokens outside of a table, activations
        that are not finite, a sparsity outside [0, 1), a path that is not a pruned param, a pattern
        or a Gram that the method cannot use, a checkpoint of another run; the message names the
        param.
      TypeError: for params or inputs that are not arrays, or a method that returns other shapes.

    Examples:
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"in": jax.random.normal(keys[0], (4, 8)), "out": jnp.ones((8, 2))}
      >>> params, masks = reconstruct(apply_fn, params, [jax.random.normal(keys[1], (16, 4))], 0.5)
      >>> print(jp.metrics.sparsity(masks))
      0.5

    References:
      Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023
    """
    check_params(params)
    _tree.check_function("method", method, "Use e.g. `jp.layerwise.sparsegpt`.")
    given = [as_batch(batch, n) for n, batch in enumerate(batches)]
    raise_empty(given)
    _check_shapes(given)
    if sparsity is not None:
        sparsity = _select.check_sparsity(sparsity)
    elif scope is None and (pattern is None or pattern.share is None):
        raise ValueError("sparsity must be a number in [0, 1), got None. Pass it, or a `scope`.")
    walk = _program.Walk(apply_fn, params, given[0])
    if sparsity is None and (pattern is None or pattern.share is None):
        sparsity = 0.0  # of what `scope` does not set
    shares = _shares(walk, sparsity, scope or {})
    folder = None
    if checkpoint is not None:
        # Not the closure of the method, in which a list of a user may grow.
        partial = [getattr(method, name, None) for name in ("args", "keywords")]
        by_name = [getattr(getattr(method, "func", method), "__qualname__", ""), *partial, pattern]
        leaves = _tree.named_leaves((params, given))
        folder = _resume.begin(checkpoint, leaves, list(shares.values()), by_name)
    walk.start(params, given, host)
    kept, skipped = _prune(walk, shares, method, pattern, folder)
    new, masks = [], []
    for root, leaf in zip(walk.line.roots, jax.tree.leaves(params), strict=True):
        parts = list(walk.line.layers(root))
        pruned = any(part in kept for part in parts)
        whole = {p: kept[p] if p in kept else jnp.ones(walk.env[p].shape, bool) for p in parts}
        new.append(_mesh.place(walk.leaf(root, walk.env), leaf) if pruned else leaf)
        masks.append(_mesh.place(walk.leaf(root, whole), leaf) if pruned else None)
    asked = {p: (scope or {}).get(p, sparsity) for p in walk.paths}
    _warn(walk, params, skipped, masks, asked)
    return _tree.rebuild(params, new), _tree.rebuild(params, masks)


def _check_shapes(batches: list[Any]) -> None:
    first = signature(batches[0])
    for n, batch in enumerate(batches):
        if signature(batch) != first:
            raise ValueError(
                f"batches[{n}]: must have the shapes of batch 0, {first[1]}, got "
                f"{signature(batch)[1]}. Leave it out, or pad it."
            )


def _shares(
    walk: _program.Walk, sparsity: float | None, scope: Mapping[str, Any]
) -> dict[Any, float | None]:
    """Returns the sparsity of every weight."""
    paths = {path for weight in walk.weights for path, _ in weight.leaves}
    for path, value in scope.items():
        if path not in paths and (path not in walk.paths or np.any(np.asarray(value) != 0)):
            raise ValueError(
                f"{_tree.show(path)}: a path of `scope` must be that of a param that a contraction "
                f"consumes, got none of {sorted(paths)}. "
                + walk.reasons().get(path, "There is no such param.")
            )
    shares: dict[Any, float | None] = {}
    for weight in walk.weights:
        values = set()
        for path, place in weight.leaves:
            value = scope.get(path, sparsity)
            if value is not None and np.ndim(value):
                try:
                    value = np.asarray(value)[place]
                except IndexError:
                    value = np.nan
                if np.ndim(value) or not np.isfinite(value):
                    raise ValueError(
                        f"{_tree.show(path)}: scope must hold a number, or one for each layer, got "
                        f"shape {np.shape(scope[path])}."
                    )
            name = f"{_tree.show(path)}: sparsity"
            values.add(None if value is None else _select.check_sparsity(value, name))
        if len(values) > 1:
            raise ValueError(
                f"{weight.name}: must have the same sparsity, as one contraction consumes them "
                f"together, got {sorted(values, key=str)}. Change `scope`."
            )
        shares[weight] = values.pop()
    return shares


def _prune(
    walk: _program.Walk,
    shares: Mapping[Any, float | None],
    method: Method,
    pattern: Pattern | None,
    folder: Path | None,
) -> tuple[dict[int, jax.Array], dict[str, str]]:
    """Walks; returns the masks of roots, and why leaves were not pruned, by path."""
    kept: dict[int, jax.Array] = {}
    skipped: dict[str, str] = {}
    gram = getattr(getattr(method, "func", method), "gram", True)
    for number, weight in enumerate(_progress.bar(walk.weights, desc="reconstruct", unit="weight")):
        walk.advance(weight.at)
        if walk.is_covered(weight) or shares[weight] == 0:
            continue
        why, masks = _read_before(walk, weight), None
        finished = _resume.restore(folder, number, weight.values(walk.env)) if folder else None
        if finished:
            masks = [mask for _, mask in finished]
            walk.replace(weight, [value for value, _ in finished])
        elif not why:
            sums = walk.sums(weight, gram)
            check_finite(walk, weight, sums)
            why = "" if bool(jnp.any(sums.count > 0)) else "no row of the batches reaches it"
        if not why and not finished:
            pruned = _matrices(walk, weight, sums, shares[weight], method, pattern)
            masks = walk.write(weight, *pruned)
            why = "" if masks else "its entries appear several times in the contraction"
        if masks is None:
            skipped |= {path: why for path, _ in weight.leaves}
            continue
        if folder and not finished:
            _resume.store(folder, number, list(zip(weight.values(walk.env), masks, strict=True)))
        for root, mask in zip(weight.roots, masks, strict=True):
            kept[root] = kept[root] & mask if root in kept else mask
    walk.advance()
    return kept, skipped


def _read_before(walk: _program.Walk, weight: _program.Weight) -> str:
    """Returns how a root was read before the walk reached the weight, or nothing."""
    for root in weight.roots:
        for at, how in walk.reads(root):
            if at < weight.at:
                return f"{how} before a contraction consumes it"
    return "it has one axis" if jnp.ndim(walk.env[weight.roots[0]]) < 2 else ""


def _matrices(
    walk: _program.Walk,
    weight: _program.Weight,
    sums: Any,
    share: float | None,
    method: Method,
    pattern: Pattern | None,
) -> tuple[jax.Array, jax.Array]:
    """Applies the method to every group of a weight, to an exact total."""
    w = weight.matrix(walk.env)
    groups, cells = len(w), w[0].size
    if pattern is not None:
        try:
            cells = math.prod(jax.eval_shape(pattern.pool, w[0]).shape)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {error}") from error
    ends = np.arange(groups + 1) * round((share or 0.0) * cells * groups) // groups
    # A small group may lose all cells, but 1 is no sparsity: the next number rounds to as many.
    below = np.nextafter(1.0, 0.0)
    shares = [None if share is None else float(min(n / cells, below)) for n in np.diff(ends)]
    results = []
    for g, of_cells in enumerate(shares):
        of_group = statistics(jax.tree.map(operator.itemgetter(g), sums))
        # A group without a row, such as an expert that no token chose, has nothing to fit.
        chosen = method if float(of_group.count) > 0 else layerwise.magnitude
        results.append(_apply(weight.name, chosen, w[g], of_group, of_cells, pattern))
    new, masks = zip(*results, strict=True)
    return jnp.stack(new), jnp.stack(masks)


def _apply(
    name: str,
    method: Method,
    w: jax.Array,
    of_group: Statistics,
    share: float | None,
    pattern: Pattern | None,
) -> tuple[jax.Array, jax.Array]:
    try:
        result = method(w, of_group, share, *([] if pattern is None else [pattern]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    pair = isinstance(result, (tuple, list)) and len(result) == 2
    shapes = [jnp.shape(x) for x in result] if pair else []
    if shapes != [w.shape] * 2 or _tree.dtype(result[1]) != jnp.bool_:
        got = [f"{_tree.dtype(x)}{list(jnp.shape(x))}" for x in result] if pair else type(result)
        raise TypeError(
            f"{name}: the method must return weights and a bool mask of shape {w.shape}, got {got}."
        )
    if not bool(jnp.all(jnp.isfinite(result[0]))):
        raise ValueError(f"{name}: the method must return finite weights, got NaN or infinity.")
    return jnp.where(result[1], result[0], 0), result[1]


def _warn(
    walk: _program.Walk,
    params: Params,
    skipped: Mapping[str, str],
    masks: list[Any],
    shares: Mapping[str, Any],
) -> None:
    reasons = walk.reasons() | dict(skipped)
    names = _tree.named_leaves(params)
    lines = []
    for root, (path, leaf), mask in zip(walk.line.roots, names, masks, strict=True):
        part = next(walk.line.layers(root))
        layers = 0 if part == root else jnp.ndim(leaf) - jnp.ndim(walk.env[part])
        asked = np.any(np.asarray(shares[path]) != 0)
        incomplete = mask is None or path in skipped
        if incomplete and asked and _tree.is_floating(leaf) and jnp.ndim(leaf) - layers >= 2:
            lines.append(f"{_tree.show(path)}: {reasons.get(path, 'not reached')}")
    if lines:
        warnings.warn(
            "reconstruct did not prune these params:\n  " + "\n  ".join(lines), stacklevel=3
        )
