"""From scores to masks: which weights are kept, to an exact count."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _partition, _program, _threshold, _tree, patterns
from jaxprune import masks as _masks
from jaxprune._tree import Masks, Params, Score, Scores, Select, Where

SCOPES = ("global", "layer", "erk")


def select(
    scores: Scores,
    sparsity: float | jax.Array | None = None,
    *,
    scope: str | Mapping[str, float] = "global",
    pattern: patterns.Pattern = patterns.unstructured,
    where: Where | None = None,
    within: Masks | None = None,
    stacked: Callable[[str], bool] | None = None,
) -> Masks:
    r"""Builds masks that keep the highest-scoring weights.

    Exactly ``round(sparsity * n)`` of the n prunable weights are removed; a sparsity that is traced
    as float32 is exact to 6e-8 n, and clipped to [0, 1], or an error under `checkify`. Ties are
    broken by a hash of the position, so equal scores are pruned evenly. The function can be jitted,
    with the same result; under jit NaN counts as the lowest score.

    Args:
      scores: a pytree of arrays; higher is kept, `None` leaves are never pruned. Float64 and 32-bit
        integers are compared as they are, means over the cells of a pattern as float32.
      sparsity: the fraction to remove, in [0, 1): of weights, or of the cells of a pattern. n:m
        patterns imply a sparsity; it may then be omitted, and a smaller value has no effect.
      scope: ``"global"`` compares all weights; ``"layer"`` removes the same fraction of every leaf,
        which counts as a layer here; ``"erk"`` keeps leaf densities proportional to
        :math:`\sum_d n_d / \prod_d n_d`; a mapping from paths to sparsities sets single leaves, and
        ``sparsity`` (by default 0) the others.
      pattern: the cells of a leaf that are kept or pruned together. Make a pattern once: `select`
        compiles anew for each object.
      where: maps ``(path, score leaf)`` to whether the leaf may be pruned; by default a leaf with
        two or more axes may.
      within: masks to prune further. Weights already pruned there count towards ``sparsity`` and
        stay pruned, even if they exceed it.
      stacked: maps a path to whether the first axis of the leaf stacks layers, as `jax.lax.scan`
        takes them; the default ``where`` and ERK ignore that axis.

    Returns:
      Masks: bool leaves, `True` for kept, and `None` for leaves that are never pruned.

    Raises:
      ValueError: for a sparsity outside [0, 1), an unknown scope or path, no leaf to prune, masks
        of other paths or shapes, or a leaf that the pattern does not fit; outside jit also for
        scores that are not finite or lie on different devices.
      TypeError: for scores that are complex or have other 64-bit dtypes, and other wrong kinds.

    Examples:
      >>> print(select({"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, 0.5)["w"])
      [[False  True]
       [ True False]]

    References:
      Evci et al, `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020 (ERK)
    """
    if not isinstance(pattern, patterns.Pattern):
        raise TypeError(
            f"pattern must be a pattern, got {pattern!r:.60}. Use e.g. `jp.patterns.n_of_m(2, 4)`."
        )
    stacked = stacked or (lambda path: False)
    where = where or (lambda path, leaf: jnp.ndim(leaf) - stacked(path) >= 2)
    leaves = _tree.named_leaves(scores)
    masks = [None] * len(leaves) if within is None else _tree.align_masks(scores, within)
    chosen = [
        (i, path, leaf, mask)
        for i, ((path, leaf), mask) in enumerate(zip(leaves, masks, strict=True))
        if where(path, leaf) and (within is None or mask is not None)
    ]
    chosen.sort(key=lambda entry: _tree.order(entry[1]))
    if not chosen:
        raise ValueError(
            f"select found no leaf to prune among {[path for path, _ in leaves][:10]}. By default "
            "leaves with two or more axes are pruned; choose others with "
            "`where=lambda path, score: ...`."
        )
    numbers, paths, arrays, before = zip(*chosen, strict=True)
    for path, leaf in zip(paths, arrays, strict=True):
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{_tree.show(path)}: scores must be arrays, got {type(leaf).__name__}. Convert "
                "with `jnp.asarray`."
            )
        if _threshold.comparable([leaf.dtype]) is None:
            raise TypeError(
                f"{_tree.show(path)}: scores must be real, of at most 32 bits or float64, got "
                f"{leaf.dtype}. Convert with `score.astype(jnp.float32)`."
            )
    _mesh.check_together([(_tree.show(path), x) for _, path, *pair in chosen for x in pair])
    # Masks are piecewise constant, and not all that selects them can be differentiated.
    arrays = tuple(jax.lax.stop_gradient(s) if _tree.is_traced(s) else s for s in arrays)
    if sparsity is None and pattern.share is not None:
        sparsity = 0.0
    sparsity = _check_scope(scope, sparsity, paths)
    pools = (0,) * len(chosen) if scope == "global" else tuple(range(len(chosen)))
    with jax.enable_x64(True):
        sizes = [_cell_count(pattern, path, s.shape, s.dtype) for _, path, s, _ in chosen]
        shapes = [leaf.shape[stacked(path) :] for _, path, leaf, _ in chosen]
        keep = budget(scope, sparsity, paths, sizes, shapes, pattern.share or 1.0)
        if pattern is patterns.unstructured and _mesh.on_host(arrays, before, keep):
            on_host = jax.device_get(arrays), jax.device_get(before)
            kept, finite = _partition.largest(*on_host, keep, pools)
            kept = _mesh.place_all(kept, arrays)
        else:
            together = _mesh.on_one_device(arrays)
            keep = _mesh.beside(keep, arrays)
            kept, finite = _largest(arrays, before, keep, pattern, pools, together)
    if not _tree.is_traced(finite) and not jax.device_get(finite):
        _raise_not_finite(paths, arrays, before)
    by_number = dict(zip(numbers, kept, strict=True))
    return _tree.rebuild(scores, [by_number.get(i) for i in range(len(leaves))])


@functools.cache  # a trace takes longer than the rest of the checks
def _cell_count(pattern: patterns.Pattern, path: str, shape: tuple[int, ...], dtype: Any) -> int:
    try:
        return math.prod(jax.eval_shape(pattern.pool, jax.ShapeDtypeStruct(shape, dtype)).shape)
    except ValueError as error:
        raise ValueError(
            f"{_tree.show(path)}: {error} Exclude this leaf with `where=lambda path, score: ...`."
        ) from error


def _raise_not_finite(
    paths: Sequence[str], scores: Sequence[jax.Array], within: Sequence[jax.Array | None]
) -> NoReturn:
    for path, s, m in zip(paths, scores, within, strict=True):  # noqa: B007
        count = int(jnp.sum(~jnp.isfinite(s) if m is None else ~jnp.isfinite(s) & m))
        if count:
            break
    raise ValueError(
        f"{_tree.show(path)}: {count} scores are NaN or infinite. Check the loss and the params, "
        "or exclude this leaf with `where=lambda path, score: ...`."
    )


@functools.partial(jax.jit, static_argnames=("pattern", "pools", "one_device"))
def _largest(
    scores: Sequence[jax.Array],
    within: Sequence[jax.Array | None],
    keep: jax.Array,
    pattern: patterns.Pattern,
    pools: tuple[int, ...],
    one_device: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Returns the mask of every leaf, and whether all cells that compete are finite.

    ``pools`` holds the pool in which each leaf competes; ``keep`` how many cells each pool keeps.
    """
    pool = functools.partial(_mesh.automatic, pattern.pool)
    dtype = _threshold.comparable(s.dtype for s in scores)
    cells = [pool(s).astype(dtype) for s in scores]
    # A cell competes while any of its weights is left.
    competing = [None if m is None else pool(m).astype(bool) for m in within]
    allowed = competing
    if pattern.limit is not None:
        share = keep.astype(np.float64) / np.bincount(pools, [c.size for c in cells])
        limit = functools.partial(_mesh.automatic, pattern.limit)
        allowed = [limit(c, m, share[i]) for c, m, i in zip(cells, competing, pools, strict=True)]
    kept = _threshold.largest(cells, allowed, keep, pools, one_device)
    finite = _threshold.all_finite(cells, competing)  # a limit does not let NaN compete
    return [_spread(pattern, *x) for x in zip(scores, kept, within, strict=True)], finite


def _spread(
    pattern: patterns.Pattern, scores: jax.Array, kept: jax.Array, within: jax.Array | None
) -> jax.Array:
    """Turns the kept cells of a leaf into its mask."""
    if pattern is patterns.unstructured:
        return kept

    def spread(scores: jax.Array, kept: jax.Array) -> jax.Array:
        return _mesh.follow(pattern.spread(kept, scores.shape), scores)

    mask = _mesh.automatic(spread, scores, kept)
    return mask if within is None else mask & within  # a kept cell may hold pruned weights


def check_sparsity(sparsity: Any, name: str = "sparsity") -> Any:
    """Checks a sparsity; returns a concrete one as a Python float, a traced one clipped."""
    if _tree.is_traced(sparsity):
        from jax.experimental import checkify

        message = f"{name} must be in [0, 1), got {{}}"
        checkify.debug_check((sparsity >= 0) & (sparsity < 1), message, sparsity)
        return jnp.clip(jnp.nan_to_num(sparsity, nan=0.0), 0, 1)
    try:
        value = sparsity.__float__()  # not float(), which reads text
    except (AttributeError, TypeError):
        raise TypeError(f"{name} must be a number in [0, 1), got {sparsity!r:.60}.") from None
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {value}. It is the fraction of weights removed: "
            "0.9 keeps every tenth."
        )
    return value


def _check_scope(scope: str | Mapping[str, float], sparsity: Any, paths: Sequence[str]) -> Any:
    """Checks both; returns the sparsity of leaves that a mapping does not set."""
    if not isinstance(scope, Mapping):
        _tree.check_word("scope", scope, SCOPES)
        if sparsity is None:
            raise ValueError(
                "sparsity must be a number in [0, 1), got None. Pass it: `select(scores, 0.9)`."
            )
        return check_sparsity(sparsity)
    for path, value in scope.items():
        if path not in paths:
            raise ValueError(
                f"{path}: a path of `scope` must be the path of a prunable leaf, got none of "
                f"{list(paths)}. Correct the path, or choose the leaf with `where`."
            )
        check_sparsity(value, f"{path}: sparsity")
    return check_sparsity(0.0 if sparsity is None else sparsity)


def budget(
    scope: str | Mapping[str, float],
    sparsity: float | jax.Array,
    paths: Sequence[str],
    sizes: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    share: float = 1.0,
) -> Any:
    """Returns how many cells each pool keeps: on the host, so exact, for a Python sparsity.

    At most ``share`` of each leaf is kept; ERK redistributes any excess to the other leaves.
    """
    xp: Any = jnp if _tree.is_traced(sparsity) else np
    total = np.array(sizes, np.int64)

    def keep(sparsity: Any, n: np.ndarray) -> Any:
        return n - xp.round(xp.asarray(sparsity, np.float64) * n.astype(np.float64)).astype(
            np.int64
        )

    if isinstance(scope, Mapping):
        sparsity = xp.stack([xp.asarray(scope.get(p, sparsity), np.float64) for p in paths])
    if isinstance(scope, Mapping) or scope == "layer":
        return keep(sparsity, total)
    kept = keep(sparsity, np.array([total.sum()]))
    if scope == "global":
        return kept
    room = np.round(total * share).astype(np.int64)
    return _erk(xp, xp.minimum(kept[0], room.sum()), room, shapes)


def _erk(xp: Any, kept: Any, sizes: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Any:
    """Distributes kept weights by Erdős–Rényi kernel densities, to an exact total.

    Densities above 1 are not possible, so the leaves with the largest ones become dense and the
    rest is distributed over the others. `xp` is NumPy, or jax.numpy for a traced count.
    """
    density = np.array([max(sum(s), 1) / max(math.prod(s), 1) for s in shapes])
    order = np.argsort(-density, kind="stable")  # in which leaves become dense
    n, d = sizes[order], density[order]
    dense = np.cumsum(n) - n  # weights in the leaves before
    rest = np.cumsum((n * d)[::-1])[::-1]
    scale = (kept - dense) / np.maximum(rest, 1)  # if exactly the leaves before are dense
    fits = scale * d <= 1
    first = xp.sum(xp.cumsum(fits[:-1]) == 0)  # the first leaf that is not dense, or the last one
    share = xp.where(np.arange(len(n)) < first, n, xp.minimum(scale[first] * d, 1) * n)
    floor = xp.clip(xp.floor(share), 0, n).astype(np.int64)
    # The weights lost by rounding down go to the leaves with the largest remainders.
    rank = xp.argsort(xp.argsort(-xp.where(floor < n, share - floor, -1)))
    count = floor + (rank < kept - floor.sum())
    return count[np.argsort(order)]


def select_iteratively(
    score: Score,
    params: Params,
    sparsity: float,
    *batch: Any,
    rounds: int = 100,
    select: Select = select,
) -> Masks:
    r"""Scores and prunes in rounds, without training in between.

    After round k of n, a fraction :math:`(1 - s)^{k / n}` of the weights is kept. Each round scores
    the params masked by the round before. All rounds run in one jit.

    Args:
      score: maps ``(params, *batch)`` to scores, such as ``jp.scores.synflow(apply_fn)``.
      params: the params to score.
      sparsity: the fraction that is removed in the end, in [0, 1).
      *batch: passed to ``score``.
      rounds: the number of rounds.
      select: ``functools.partial(jp.select, scope=..., where=...)`` for other choices.

    Returns:
      Masks, as :func:`select` returns them.

    Raises:
      ValueError: for a sparsity outside [0, 1) or fewer than one round; outside jit also for scores
        that are not finite in some round.

    Examples:
      >>> params = jnp.array([[1.0, 4.0], [3.0, 2.0]])
      >>> print(select_iteratively(jp.scores.magnitude, params, 0.5, rounds=2))
      [[False  True]
       [ True False]]

    References:
      Tanaka et al, `SynFlow <https://arxiv.org/abs/2006.05467>`_, 2020
    """
    _tree.check_function("score", score, "Pass `jp.scores.magnitude`, not its result.")
    _tree.check_params(params)
    _tree.check_count("rounds", rounds)
    sparsity = check_sparsity(sparsity)
    sparsities = 1 - (1 - sparsity) ** (np.arange(1, rounds + 1) / rounds)
    sparsities[-1] = sparsity  # exactly, without rounding errors
    outer = bool(jax.enable_x64.value)
    with jax.enable_x64(True):
        args = params, sparsities, batch
        run = functools.partial(_iterate, score, select, outer)
        masks, bad = _program.freeze(run, *args)(*args)
    if not _tree.is_traced(bad):
        for is_bad, (path, _) in zip(np.asarray(bad), _tree.named_leaves(masks), strict=True):
            if is_bad:
                raise ValueError(
                    f"{_tree.show(path)}: scores became NaN or infinite in some round. Check the "
                    "params and the score; SynFlow scores NaN if no signal reaches the output."
                )
    return masks


def _iterate(
    score: Score, select: Select, outer: bool, params: Params, sparsities: jax.Array, batch: Any
) -> tuple[Masks, jax.Array]:
    def scored(masks: Masks | None) -> Scores:
        with jax.enable_x64(outer):  # the score runs as the caller has it
            masked = params if masks is None else _masks.apply_masks(params, masks)
            return _program.inlined(score)(masked, *batch)

    def round_(masks: Masks, sparsity: jax.Array) -> tuple[Masks, jax.Array]:
        scores = scored(masks)
        pairs = zip(jax.tree.leaves(scores), _tree.align(scores, masks), strict=True)
        bad = jnp.stack([~jnp.all(jnp.isfinite(s)) for s, m in pairs if m is not None])
        return select(scores, sparsity, within=masks), bad

    start = whole_masks(params, select, jax.eval_shape(lambda: scored(None)))
    # Behind a barrier: XLA copies masks in every round if it knows their values in the first.
    masks, bad = jax.lax.scan(round_, jax.lax.optimization_barrier(start), sparsities)
    return masks, jnp.any(bad, axis=0)


def whole_masks(params: Params, select: Select, scores: Scores | None = None) -> Masks:
    """Returns masks that keep all weights of the leaves that a selection would mask.

    ``select(scores, 0.0)`` is not a valid start, because n:m prunes its share regardless. Scores
    may be abstract; by default every floating leaf has some.
    """
    if scores is None:
        _tree.check_params(params)
        like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        scores = _tree.map_floating(lambda w: like(jnp.shape(w)), params)
    masks = jax.eval_shape(lambda scores: select(scores, 0.0), scores)
    pairs = zip(jax.tree.leaves(params), _tree.align(params, masks, "scores"), strict=True)
    whole = [
        _mesh.place(np.ones(jnp.shape(w), bool), w) if _mesh.on_host(w) else jnp.ones_like(w, bool)
        for w, m in pairs
        if m is not None
    ]
    return _tree.rebuild(masks, whole)
