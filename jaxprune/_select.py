"""Scores to masks: which weights stay, to an exact count."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _threshold, _tree, patterns
from jaxprune import masks as _masks
from jaxprune._tree import Masks, Params, Scores, Select

SCOPES = ("global", "layer", "erk")


def select(
    scores: Any,
    sparsity: float | jax.Array | None = None,
    *,
    scope: str | Mapping[str, float] = "global",
    pattern: patterns.Pattern = patterns.unstructured,
    where: Callable[[str, Any], bool] | None = None,
    within: Any = None,
    stacked: Callable[[str], bool] | None = None,
) -> Any:
    r"""Keeps the weights with the largest scores: exactly ``round(sparsity * n)`` of n go.

    Ties are broken by a hash of the position, so that equal scores spread evenly. Jittable; a
    Python sparsity is exact, a traced float32 one within 6e-8 n. Under jit NaN counts as lowest.

    Args:
      scores: a pytree, higher is kept; `None` leaves are never pruned.
      sparsity: the fraction to remove, in [0, 1): of weights, or of the units of a pattern. One
        such as n:m has a sparsity of its own: there it may be left out, and less makes no
        difference.
      scope: ``"global"`` compares all weights; ``"layer"`` removes the same fraction of every leaf;
        ``"erk"`` keeps leaf densities proportional to :math:`\sum_d n_d / \prod_d n_d`; a mapping
        from path to sparsity sets leaves one by one, and ``sparsity`` (else 0) the others.
      pattern: the units inside a leaf.
      where: maps ``(path, score leaf)`` to whether the leaf may be pruned; by default those with
        two or more axes.
      within: masks to prune further. What they removed counts towards the sparsity and stays
        removed, even where it is more than asked.
      stacked: maps a path to whether the leaf's first axis stacks layers, as `jax.lax.scan` wants
        them; the default ``where`` and ERK ignore that axis.

    Returns:
      Masks: bool leaves, `True` for kept; `None` for leaves that are never pruned.

    Raises:
      ValueError: for a sparsity outside [0, 1), an unknown scope or path, no leaf to prune, other
        paths or shapes in ``within``, a leaf that the pattern does not fit, and (outside jit)
        scores that are not finite or on different devices.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(select({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, 0.5)["w"])
      [[False  True]
       [ True False]]

    References:
      Evci et al, `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020 (ERK)
    """
    stacked = stacked or (lambda path: False)
    where = where or (lambda path, leaf: jnp.ndim(leaf) - stacked(path) >= 2)
    names = _tree.named_leaves(scores)
    inside = [None] * len(names) if within is None else _tree.align_masks(scores, within)
    chosen = [
        i
        for i, (path, leaf) in enumerate(names)
        if where(path, leaf) and (within is None or inside[i] is not None)
    ]
    if not chosen:
        raise ValueError(
            f"select found no leaf to prune among {[path for path, _ in names][:10]}. By default "
            "leaves with two or more axes are pruned; name others with `where=lambda path, s: ...`."
        )
    paths = [names[i][0] for i in chosen]
    for i in chosen:
        if not hasattr(names[i][1], "dtype"):
            raise TypeError(f"{_tree.show(names[i][0])}: scores must be arrays.")
    _mesh.check_together(
        [(_tree.show(names[i][0]), x) for i in chosen for x in (names[i][1], inside[i])]
    )
    if sparsity is None and pattern.share is not None:
        sparsity = 0.0
    sparsity = _check_scope(scope, sparsity, paths)
    with jax.enable_x64(True):
        units = [_pool(pattern, *names[i]) for i in chosen]
        held = [
            None if (m := inside[i]) is None else _mesh.automatic(pattern.pool, m).astype(bool)
            for i in chosen
        ]
        shapes = [jnp.shape(names[i][1])[stacked(names[i][0]) :] for i in chosen]
        sizes = [math.prod(u.shape) for u in units]
        keep = budget(scope, sparsity, paths, sizes, shapes, pattern.share or 1.0)
        group = (0,) * len(units) if scope == "global" else tuple(range(len(units)))
        kept, bad = _largest(units, held, keep, group, pattern.limit)
    if not _tree.is_traced(bad):
        for count, path in zip(np.asarray(bad), paths, strict=True):
            if count:
                raise ValueError(
                    f"{_tree.show(path)}: {count} scores are NaN or infinite. Check the loss and "
                    "the params, or leave this leaf out with `where=lambda path, s: ...`."
                )
    leaves: list[Any] = [None] * len(names)
    for i, mask in zip(chosen, kept, strict=True):
        leaves[i] = mask
        if pattern is not patterns.unstructured:
            leaves[i] = _mesh.automatic(functools.partial(_spread, pattern), names[i][1], mask)
        if inside[i] is not None and pattern is not patterns.unstructured:
            leaves[i] &= inside[i]  # a kept unit may hold weights that are gone already
    return _tree.rebuild(scores, leaves)


def _pool(pattern: patterns.Pattern, path: str, scores: Any) -> jax.Array:
    try:
        return _mesh.automatic(pattern.pool, jnp.asarray(scores))
    except ValueError as error:
        raise ValueError(
            f"{_tree.show(path)}: {error} Leave this array out with `where=lambda path, s: ...`."
        ) from error


def _spread(pattern: patterns.Pattern, scores: Any, kept: jax.Array) -> jax.Array:
    return _mesh.follow(pattern.spread(kept, jnp.shape(scores)), scores)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _largest(scores, within, keep, group, limit):
    scores = [s.astype(jnp.float32) for s in scores]
    if limit is None:
        return _threshold.largest(scores, within, keep, group)
    fraction = keep / np.bincount(group, [s.size for s in scores])
    allowed = [
        _mesh.automatic(limit, s, m, fraction[g])
        for s, m, g in zip(scores, within, group, strict=True)
    ]
    kept, bad = _threshold.largest(scores, allowed, keep, group)
    lost = [~a if m is None else m & ~a for a, m in zip(allowed, within, strict=True)]
    pairs = zip(scores, lost, strict=True)
    return kept, bad + jnp.stack([jnp.sum(m & ~jnp.isfinite(s)) for s, m in pairs])


def check_sparsity(sparsity: Any, name: str = "sparsity") -> Any:
    """Returns a concrete sparsity as a Python float, a traced one as it is."""
    if _tree.is_traced(sparsity):
        return sparsity
    try:
        value = float(sparsity)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number in [0, 1), got {sparsity!r}.") from None
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {value}. It is the fraction of weights removed: "
            "0.9 keeps every tenth."
        )
    return value


def _check_scope(scope: Any, sparsity: Any, paths: Sequence[str]) -> Any:
    if isinstance(scope, Mapping):
        for path, value in scope.items():
            if path not in paths:
                raise ValueError(f"{path}: this scope path matches no prunable leaf of {paths}.")
            check_sparsity(value, f"the sparsity of {path}")
        sparsity = 0.0 if sparsity is None else sparsity
    elif scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; needed one of {SCOPES} or {{path: sparsity}}.")
    if sparsity is None:
        raise ValueError("select needs a sparsity in [0, 1), such as `select(scores, 0.9)`.")
    return check_sparsity(sparsity)


def budget(scope, sparsity, paths, sizes, shapes, share=1.0) -> Any:
    """Counts what each group keeps: on the host for a Python sparsity, so that it is exact.

    Of no leaf more than a ``share`` can stay; where ERK would keep more, other leaves keep it.
    """
    xp: Any = jnp if _tree.is_traced(sparsity) else np
    total = np.array(sizes, np.int64)

    def keep(sparsity, n):
        return n - xp.round(xp.asarray(sparsity, np.float64) * n).astype(np.int64)

    if isinstance(scope, Mapping):
        parts = [xp.asarray(scope.get(p, sparsity), np.float64) for p in paths]
        return keep(xp.stack(parts), total)
    if scope == "layer":
        return keep(sparsity, total)
    kept = keep(sparsity, np.array([total.sum()]))
    if scope == "global":
        return kept
    room = np.round(total * share).astype(np.int64)
    return _erk(xp, xp.minimum(kept[0], room.sum()), room, shapes)


def _erk(xp: Any, kept: Any, sizes: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Any:
    """Shares out kept weights by Erdős–Rényi kernel densities, to an exact total."""
    density = np.array([sum(s) / max(math.prod(s), 1) for s in shapes])
    order = np.argsort(-density, kind="stable")  # which leaves become dense first
    n, d = sizes[order], density[order]
    dense = np.cumsum(n) - n  # weights in the leaves before
    rest = np.cumsum((n * d)[::-1])[::-1]
    scale = (kept - dense) / rest  # if exactly the leaves before are dense
    fits = scale * d <= 1
    first = xp.sum(xp.cumsum(fits[:-1]) == 0)  # the last leaf at the latest
    share = xp.where(np.arange(len(n)) < first, n, xp.minimum(scale[first] * d, 1) * n)
    whole = xp.clip(xp.floor(share), 0, n).astype(np.int64)
    rank = xp.argsort(xp.argsort(-xp.where(whole < n, share - whole, -1)))
    whole = whole + (rank < kept - whole.sum())
    return whole[np.argsort(order)]


def select_iteratively(
    score: Callable[..., Any],
    params: Any,
    sparsity: float,
    *batch: Any,
    rounds: int = 100,
    select: Callable[..., Any] = select,
) -> Any:
    r"""Masks, scores what is left, and masks again, without training in between.

    After round k of n a fraction :math:`(1 - s)^{k / n}` is kept. All rounds run in one jit.

    Args:
      score: maps ``(params, *batch)`` to scores, such as ``jp.scores.synflow(apply_fn)``.
      params: the params to score.
      sparsity: the fraction removed in the end, in [0, 1).
      *batch: passed to ``score``.
      rounds: how often to score.
      select: ``functools.partial(jp.select, scope=..., where=...)`` for other choices.

    Returns:
      Masks.

    Raises:
      ValueError: for a sparsity outside [0, 1), fewer than one round, or scores not finite.

    Examples:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = jnp.array([[1.0, 4.0], [3.0, 2.0]])
      >>> print(select_iteratively(jp.scores.magnitude, params, 0.5, rounds=2))
      [[False  True]
       [ True False]]

    References:
      Tanaka et al, `Pruning neural networks without any data by iteratively conserving synaptic
      flow <https://arxiv.org/abs/2006.05467>`_, 2020
    """
    _tree.check_params(params)
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    sparsity = check_sparsity(sparsity)
    sparsities = 1 - (1 - sparsity) ** (np.arange(1, rounds + 1) / rounds)
    sparsities[-1] = sparsity  # whatever rounding made of it
    outer = bool(jax.enable_x64.value)
    with jax.enable_x64(True):
        masks, bad = _iterate(score, select, outer, params, sparsities, batch)
    if not _tree.is_traced(bad):
        for found, (path, _) in zip(np.asarray(bad), _tree.named_leaves(masks), strict=True):
            if found:
                raise ValueError(
                    f"{_tree.show(path)}: scores became NaN or infinite in some round. Check the "
                    "params and the score; SynFlow's are NaN where no signal reaches the output."
                )
    return masks


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _iterate(score, select, outer, params, sparsities, batch):
    def scored(masks):
        with jax.enable_x64(outer):
            return score(params if masks is None else _masks.apply_masks(params, masks), *batch)

    def round_(masks, sparsity):
        scores = scored(masks)
        pairs = zip(jax.tree.leaves(scores), _tree.align(scores, masks), strict=True)
        bad = jnp.stack([~jnp.all(jnp.isfinite(s)) for s, m in pairs if m is not None])
        return select(scores, sparsity, within=masks), bad

    start = whole_masks(params, select, jax.eval_shape(lambda: scored(None)))
    # Behind a barrier: XLA copies masks in every round if it knows what they hold in the first.
    masks, bad = jax.lax.scan(round_, jax.lax.optimization_barrier(start), sparsities)
    return masks, jnp.any(bad, axis=0)


def whole_masks(params: Params, select: Select, scores: Scores | None = None) -> Masks:
    """Returns masks that keep everything, for the leaves that a selection would mask.

    ``select(scores, 0.0)`` would not do as a start: n:m prunes its share all the same.

    Args:
      params: the params; the masks have their shardings.
      select: maps ``(scores, sparsity)`` to masks.
      scores: arrays or shapes, `None` for leaves without a score; by default every floating leaf
        has one.
    """
    if scores is None:
        _tree.check_params(params)
        scores = _tree.map_floating(
            lambda w: jax.ShapeDtypeStruct(jnp.shape(w), jnp.float32), params
        )
    masks = jax.eval_shape(lambda scores: select(scores, 0.0), scores)
    pairs = zip(jax.tree.leaves(params), _tree.align(params, masks, "scores"), strict=True)
    return _tree.rebuild(masks, [jnp.ones_like(w, bool) for w, m in pairs if m is not None])
