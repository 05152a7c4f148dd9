"""Leaf paths, `None` leaves and structure checks: the one file that knows about them.

Trees are matched by path and shape, never by node type, and rebuilt with the params' structure, so
that an ``nnx.State``, a dict and an optimizer's own containers all fit each other.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jaxprune import _mesh

Tree = Any
Params = Any  # a pytree of arrays
Masks = Any  # params -> bool: True is kept, `None` is never pruned
Scores = Any  # params -> float32: higher is kept, `None` has no score
Score = Callable[..., Scores]  # (params, *batch) -> scores
Where = Callable[[str, Any], bool]  # (path, leaf) -> whether it is meant
Select = Callable[..., Masks]  # (scores, sparsity, within=masks) -> masks
ARRAYS = (jax.Array, np.ndarray, np.generic, int, float, complex, jax.ShapeDtypeStruct)


def _is_hole(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _name(key_path: tuple[Any, ...]) -> str:
    """Spells a path as ``a/kernel``, without the ``value`` under which nnx keeps its arrays."""
    if key_path and key_path[-1] == GetAttrKey("value"):
        key_path = key_path[:-1]
    return keystr(key_path, simple=True, separator="/")


def _is_inside(path: str, part: str) -> bool:
    return part in ("", path) or path.startswith(part + "/")


def show(path: str) -> str:
    """Names a leaf in a message; a bare array has an empty path."""
    return path or "(the array itself)"


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Lists ``(path, leaf)``; `None` is no leaf."""
    return [(_name(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def named_entries(tree: Tree) -> dict[str, Any]:
    """Lists leaves by path, and `None` where a leaf is `None`."""
    entries, _ = tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return {_name(path): leaf for path, leaf in entries}


def other_axes(ndim: int, axis: int) -> tuple[int, ...]:
    """Lists all axes but one."""
    return tuple(i for i in range(ndim) if i != axis)


def check_word(name: str, word: Any, words: Sequence[Any]) -> None:
    """Raises a `ValueError` for an argument that is not one of the allowed words."""
    if word not in words:
        raise ValueError(f"{name} must be one of {tuple(words)}, got {word!r}.")


def dtype(leaf: Any) -> Any:
    """Gives the dtype of an array, a shape or a Python scalar."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)


def is_floating(leaf: Any) -> bool:
    """Says whether a leaf is a floating-point array or scalar."""
    return jnp.issubdtype(dtype(leaf), jnp.floating)


def is_traced(*trees: Tree) -> bool:
    """Says whether any leaf is a tracer, so that its values cannot be read."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def check_params(params: Tree) -> None:
    """Raises a `TypeError` for a leaf that is no array, a `ValueError` without floating leaves."""
    for path, leaf in named_leaves(params):
        if not isinstance(leaf, ARRAYS):
            raise TypeError(
                f"{show(path)}: params must hold arrays, got {type(leaf).__name__} ({leaf!r:.60}). "
                "Split other things off first, e.g. with `eqx.partition(model, eqx.is_array)`."
            )
    if not any(map(is_floating, jax.tree.leaves(params))):
        raise ValueError(
            "params: needed at least one floating-point array, got none. "
            f"Leaves: {[path for path, _ in named_leaves(params)][:10]}."
        )


def checked(
    score: Callable[..., Tree], loss: Callable[..., Any], params: Tree, *batch: Any
) -> Tree:
    """Calls a jitted score, its params checked before any tracing."""
    check_params(params)
    return score(loss, params, *batch)


def floating(params: Tree) -> Tree:
    """Puts `None` in place of every leaf that is not floating."""
    return jax.tree.map(lambda w: w if is_floating(w) else None, params)


def merge(floats: Tree, params: Tree) -> Tree:
    """Puts the floating leaves back among the others."""
    return jax.tree.map(
        lambda f, w: w if f is None else f, floats, params, is_leaf=lambda x: x is None
    )


def map_floating(f: Callable[..., Any], params: Tree, *rest: Tree) -> Tree:
    """Maps over floating leaves of trees of one structure; `None` for the others."""
    return jax.tree.map(lambda w, *others: f(w, *others) if is_floating(w) else None, params, *rest)


def align(params: Tree, tree: Tree, name: str = "masks") -> list[Any]:
    """Lists, for every leaf of params, the entry of another tree at the same path or `None`.

    A ``MaskedNode`` hides a leaf or a whole part (as `optax.masked` does): where params hold one,
    entries are ignored; where the other tree holds one, or `None`, it stands for all below it.

    Raises:
      ValueError: for a path that only one of the two trees has, or another shape.
    """
    entries, _ = tree_flatten_with_path(tree, is_leaf=_is_hole)
    found = {_name(path): None if _is_hole(leaf) else leaf for path, leaf in entries}
    aligned: list[Any] = []
    hidden: list[str] = []
    holes = [path for path, leaf in found.items() if leaf is None]
    covering: set[str] = set()
    for key_path, leaf in tree_flatten_with_path(params, is_leaf=_is_hole)[0]:
        path = _name(key_path)
        if isinstance(leaf, optax.MaskedNode):
            hidden.append(path)
        elif leaf is None:
            found.pop(path, None)
        elif path not in found and (above := [h for h in holes if _is_inside(path, h)]):
            covering.update(above)
            aligned.append(None)
        elif path not in found:
            raise ValueError(
                f"{show(path)}: {name} have no entry for this leaf of shape {jnp.shape(leaf)}; "
                f"they have {sorted(found)[:10]}. Make {name} from these params; `None` marks a "
                "leaf to leave alone."
            )
        else:
            entry = found.pop(path)
            if entry is not None and jnp.shape(entry) != jnp.shape(leaf):
                raise ValueError(
                    f"{show(path)}: {name} have shape {jnp.shape(entry)} here, needed "
                    f"{jnp.shape(leaf)}, that of the params. Make {name} from these params."
                )
            aligned.append(entry)
    for path in found:
        if path not in covering and not any(_is_inside(path, h) for h in hidden):
            raise ValueError(
                f"{show(path)}: {name} have an entry here, the params have none. "
                f"Make {name} from these params."
            )
    return aligned


def align_masks(params: Tree, masks: Tree) -> list[Any]:
    """Aligns masks with params, and checks that they are bool."""
    aligned = align(params, masks)
    for (path, _), mask in zip(named_leaves(params), aligned, strict=True):
        if mask is not None and dtype(mask) != jnp.bool_:
            raise TypeError(
                f"{show(path)}: masks must be bool, True for kept, got {dtype(mask)}. "
                "Convert with `mask.astype(bool)`."
            )
    return aligned


def map_masks(f: Callable[[Any, Any], Any], params: Tree, masks: Tree) -> Tree:
    """Maps over params and their masks; leaves without a mask stay as they are."""
    leaves, treedef = jax.tree.flatten(params)
    aligned = align_masks(params, masks)
    for (path, w), m in zip(named_leaves(params), aligned, strict=True):
        _mesh.check_together([(f"the params at {show(path)}", w), (f"the mask of {show(path)}", m)])
    return jax.tree.unflatten(
        treedef, [w if m is None else f(w, m) for w, m in zip(leaves, aligned, strict=True)]
    )


def check_pruned(params: Tree, masks: Tree) -> None:
    """Raises a `ValueError` where a train function let masked weights come back."""
    aligned = align_masks(params, masks)
    for (path, leaf), mask in zip(named_leaves(params), aligned, strict=True):
        if mask is not None and (count := int(((leaf != 0) & ~mask).sum())):
            raise ValueError(
                f"{show(path)}: after `train`, {count} masked weights are not zero. Train "
                "with `jp.enforce(optimizer, masks)`."
            )


def rebuild(params: Tree, leaves: Sequence[Any]) -> Tree:
    """Gives leaves (some `None`) the structure of params."""
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def place(array: Any, like: Any) -> Any:
    """Puts an array where another is, or is to be, with the same shape."""
    if isinstance(like, jax.Array) and is_traced(like, array):
        sharding = jax.typeof(like).sharding
        return array if sharding.mesh.empty else jax.sharding.reshard(array, sharding)
    # What is not committed to a device stays so: to commit one array would compile a step twice.
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    return array if sharding is None else jax.device_put(array, sharding)


def zero_means(tree: Tree) -> Tree:
    """Zeroes the leaves named ``mean``: the running means of a batch norm."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.zeros_like(w) if _name(path).split("/")[-1] == "mean" else w, tree
    )


def union(trees: Sequence[Tree]) -> Tree:
    """Merges trees that each hide with ``MaskedNode`` what the others hold."""
    return jax.tree.map(
        lambda m: None if _is_hole(m) else m, functools.reduce(_union, trees), is_leaf=_is_hole
    )


def _union(a: Tree, b: Tree, path: tuple[Any, ...] = ()) -> Tree:
    if _is_hole(a) or _is_hole(b):
        return b if _is_hole(a) else a
    children, treedef = tree_flatten_with_path(a, is_leaf=lambda x: x is not a)
    if jax.tree_util.treedef_is_leaf(treedef):
        raise ValueError(f"{show(_name(path))}: two links mask this leaf. Use one of them.")
    pairs = zip(children, treedef.flatten_up_to(b), strict=True)  # type: ignore[attr-defined]
    return jax.tree.unflatten(treedef, [_union(x, y, path + key) for (key, x), y in pairs])


def refit(old: Tree, new: Tree) -> Tree:
    """Gives new masks the structure of old ones, in which `None` and hidden parts have their place.

    Raises:
      ValueError: where one has `None` and the other a mask.
    """
    before, after = named_entries(old), named_entries(new)
    for path in before.keys() & after.keys():
        if (before[path] is None) != (after[path] is None):
            raise ValueError(
                f"{show(path)}: masks must keep `None` where it was: the state has "
                f"{'None' if before[path] is None else 'a mask'}, the new masks have "
                f"{'None' if after[path] is None else 'a mask'}. Use the same `where`."
            )
    return rebuild(old, align_masks(old, new))


def prefixes(paths: Iterable[str]) -> list[str]:
    """Lists the parts in which leaves are, as prefixes of their paths, the outermost first."""
    found = {"": None}
    for path in paths:
        steps = path.split("/")
        found |= {"/".join(steps[:i]) + "/": None for i in range(1, len(steps) + 1)}
    return sorted(found, key=lambda prefix: prefix.count("/"))


def children(tree: Tree) -> tuple[list[tuple[str, Any]], Callable[[Sequence[Any]], Tree]] | None:
    """Lists the parts right below a node, by name, and how to rebuild it; `None` for a leaf."""
    parts, treedef = tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(parts) == 1 and parts[0][1] is tree:
        return None
    return [(_name(path), part) for path, part in parts], functools.partial(
        jax.tree.unflatten, treedef
    )
