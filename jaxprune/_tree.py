"""Leaf paths, `None` leaves and structure checks: the one file that knows about them.

Trees are matched by path and shape, never by node type, and rebuilt with the params' structure, so
that an ``nnx.State``, a dict and the containers of an optimizer fit each other.
"""

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jaxprune import _mesh

Tree = Any  # a pytree; its leaves need not be arrays
Params = Any  # a pytree of arrays
Masks = Any  # the structure of params, bool leaves: True is kept, `None` is never pruned
Scores = Any  # the structure of params, float32 leaves: higher is kept, `None` has no score
Score = Callable[..., Scores]  # (params, *batch) -> scores
Where = Callable[[str, Any], bool]  # (path, leaf) -> whether the leaf is chosen
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


def brief(x: Any) -> str:
    """Shows a value in a message: arrays by their type, containers by their length, on one line."""
    if isinstance(x, jax.Array | np.ndarray):
        return f"{x.dtype}{list(x.shape)}"
    if isinstance(x, str | int | float | complex | np.generic | None):
        return f"{x!r:.60}"
    return f"{type(x).__name__} of {len(x)}" if hasattr(x, "__len__") else type(x).__name__


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Returns the path and the leaf of every leaf; `None` is not a leaf."""
    return [(_name(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def named_entries(tree: Tree) -> dict[str, Any]:
    """Returns leaves by path, with `None` where a leaf is `None`."""
    entries, _ = tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return {_name(path): leaf for path, leaf in entries}


def order(path: str) -> list[tuple[bool, int, str]]:
    """Orders paths as a tree of dicts and lists does: level by level, numbers by their value.

    So leaves have one order, in which ties are broken, in a tree, a flat dict and a file.
    """
    parts = path.split("/")
    digits = [part.lstrip("0") if part.isascii() and part.isdigit() else None for part in parts]
    return [
        (number is None, len(number or ""), number or part)
        for number, part in zip(digits, parts, strict=True)
    ]


def other_axes(ndim: int, axis: int) -> tuple[int, ...]:
    """Returns all axes but one."""
    return tuple(i for i in range(ndim) if i != axis)


def check_word(name: str, word: Any, words: Sequence[Any]) -> None:
    """Raises a `ValueError` for an argument that is not one of the allowed words."""
    if not isinstance(word, Hashable) or word not in words:
        raise ValueError(f"{name} must be one of {tuple(words)}, got {brief(word)}.")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a `ValueError` for a value that is not an integer of at least ``least``."""
    if not hasattr(value, "__index__") or np.ndim(value) or operator.index(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {brief(value)}.")


def is_number(value: Any) -> bool:
    """Returns whether a value is one number: of Python, of NumPy, or an array without axes."""
    return hasattr(value, "__float__") and not np.ndim(value)


def check_function(name: str, value: Any, fix: str) -> None:
    """Raises a `TypeError` for a value that cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {type(value).__name__}. {fix}")


def dtype(leaf: Any) -> Any:
    """Returns the dtype of an array, an abstract array or a Python scalar."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)


def is_floating(leaf: Any) -> bool:
    """Returns whether a leaf is a floating-point array or scalar."""
    return jnp.issubdtype(dtype(leaf), jnp.floating)


def wide(x: jax.Array) -> jax.Array:
    """Converts an array to float32, unless it is float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def is_traced(*trees: Tree) -> bool:
    """Returns whether any leaf is a tracer, whose values cannot be read."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def check_params(params: Tree) -> None:
    """Raises a `TypeError` for a leaf that is not an array, a `ValueError` if none is floating."""
    for path, leaf in named_leaves(params):
        if not isinstance(leaf, ARRAYS):
            raise TypeError(
                f"{show(path)}: params must hold arrays, got {type(leaf).__name__} ({leaf!r:.60}). "
                "Split other things off first, e.g. with `eqx.partition(model, eqx.is_array)`."
            )
    if not any(map(is_floating, jax.tree.leaves(params))):
        raise ValueError(
            "params must hold at least one floating-point array, got none among "
            f"{[path for path, _ in named_leaves(params)][:10]}."
        )


def floating(params: Tree) -> Tree:
    """Replaces every leaf that is not floating with `None`."""
    return jax.tree.map(lambda w: w if is_floating(w) else None, params)


def merge(floats: Tree, params: Tree) -> Tree:
    """Returns params with their floating leaves replaced: the inverse of :func:`floating`."""
    return jax.tree.map(
        lambda f, w: w if f is None else f, floats, params, is_leaf=lambda x: x is None
    )


def map_floating(f: Callable[..., Any], params: Tree, *rest: Tree) -> Tree:
    """Maps a function over the floating leaves of trees of one structure; `None` elsewhere."""
    return jax.tree.map(lambda w, *others: f(w, *others) if is_floating(w) else None, params, *rest)


def match(
    params: Tree, tree: Tree, name: str = "masks", shapes: bool = True
) -> list[tuple[str, Any, Any]]:
    """Matches another tree to params by path.

    A ``MaskedNode`` hides a leaf or an entire subtree, as in `optax.masked`: where params hold one,
    entries are ignored; where the other tree holds one, or `None`, it stands for all leaves below.

    Returns ``(path, leaf, entry)`` for every leaf of params; leaf and entry may be `None`. Raises a
    `ValueError`, with the name of the other tree, for a path that only one of the two trees has,
    and, if ``shapes`` are checked, for an entry of another shape than its leaf.
    """
    nodes, _ = tree_flatten_with_path(tree, is_leaf=_is_hole)
    entries: dict[str, Any] = {_name(p): None if _is_hole(node) else node for p, node in nodes}
    holes = [path for path, entry in entries.items() if entry is None]
    matched: list[tuple[str, Any, Any]] = []
    hidden: list[str] = []
    for key_path, leaf in tree_flatten_with_path(params, is_leaf=_is_hole)[0]:
        path = _name(key_path)
        if isinstance(leaf, optax.MaskedNode):
            hidden.append(path)
            continue
        if leaf is not None and path not in entries and not any(_is_inside(path, h) for h in holes):
            raise ValueError(
                f"{show(path)}: {name} have no entry for this leaf of shape {jnp.shape(leaf)}; "
                f"they have {sorted(entries)[:10]}. Make {name} from these params; `None` marks a "
                "leaf to leave alone."
            )
        entry = entries.pop(path, None)
        both = leaf is not None and entry is not None
        if shapes and both and jnp.shape(entry) != jnp.shape(leaf):
            raise ValueError(
                f"{show(path)}: {name} have shape {jnp.shape(entry)} here, must have "
                f"{jnp.shape(leaf)} as the params. Make {name} from these params."
            )
        matched.append((path, leaf, entry))
    for path, entry in entries.items():
        if entry is not None and not any(_is_inside(path, h) for h in hidden):
            raise ValueError(
                f"{show(path)}: {name} have an entry here, the params have none. "
                f"Make {name} from these params."
            )
    return matched


def align(params: Tree, tree: Tree, name: str = "masks") -> list[Any]:
    """Matches another tree to params by path; returns one entry (or `None`) per leaf."""
    return [entry for _, leaf, entry in match(params, tree, name) if leaf is not None]


def align_masks(params: Tree, masks: Tree) -> list[Any]:
    """Aligns masks with params; raises a `TypeError` for masks that are not bool."""
    matched = [(path, mask) for path, leaf, mask in match(params, masks) if leaf is not None]
    for path, mask in matched:
        if mask is not None and dtype(mask) != jnp.bool_:
            raise TypeError(
                f"{show(path)}: masks must be bool (True is kept), got {dtype(mask)}. "
                "Convert with `mask.astype(bool)`."
            )
    return [mask for _, mask in matched]


def map_masks(f: Callable[[Any, Any], Any], params: Tree, masks: Tree) -> Tree:
    """Maps a function over params and their masks; a leaf without a mask is returned unchanged."""
    pairs = list(zip(named_leaves(params), align_masks(params, masks), strict=True))
    for (path, w), m in pairs:
        _mesh.check_together([(f"the params at {show(path)}", w), (f"the mask of {show(path)}", m)])
    changed = iter(_mesh.map_arrays(f, [(w, m) for (_, w), m in pairs if m is not None]))
    return rebuild(params, [w if m is None else next(changed) for (_, w), m in pairs])


def rebuild(params: Tree, leaves: Sequence[Any]) -> Tree:
    """Returns a tree with the structure of params and other leaves, some of them `None`."""
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def union(trees: Sequence[Tree]) -> Tree:
    """Merges trees, each of which hides the leaves of the others with ``MaskedNode``."""
    return jax.tree.map(
        lambda m: None if _is_hole(m) else m, functools.reduce(_union, trees), is_leaf=_is_hole
    )


def _union(a: Tree, b: Tree, path: tuple[Any, ...] = ()) -> Tree:
    if _is_hole(a) or _is_hole(b):
        return b if _is_hole(a) else a
    treedef: Any  # a PyTreeDef has no methods in JAX's stubs
    nodes, treedef = tree_flatten_with_path(a, is_leaf=lambda x: x is not a)
    if jax.tree_util.treedef_is_leaf(treedef):
        raise ValueError(f"{show(_name(path))}: two links mask this leaf, one must. Use one link.")
    pairs = zip(nodes, treedef.flatten_up_to(b), strict=True)
    return jax.tree.unflatten(treedef, [_union(x, y, path + key) for (key, x), y in pairs])


def refit(old: Tree, new: Tree) -> Tree:
    """Returns new masks in the structure of old ones, which may hold ``MaskedNode``."""
    before, after = named_entries(old), named_entries(new)
    for path in before.keys() & after.keys():
        if (before[path] is None) != (after[path] is None):
            raise ValueError(
                f"{show(path)}: masks must keep `None` in place: the state has "
                f"{'None' if before[path] is None else 'a mask'}, got "
                f"{'None' if after[path] is None else 'a mask'}. Use the same `where`."
            )
    return rebuild(old, align_masks(old, new))


def prefixes(paths: Iterable[str]) -> list[str]:
    """Returns the prefix ``a/b/`` of every subtree that holds leaves, the outermost first."""
    steps = [path.split("/") for path in paths]
    ends = {"/".join([*s[:i], ""]): None for s in steps for i in range(1, len(s) + 1)}
    return sorted({"": None} | ends, key=lambda prefix: prefix.count("/"))


def children(tree: Tree) -> tuple[list[tuple[str, Any]], Callable[[Sequence[Any]], Tree]] | None:
    """Returns the named children of a node and how to rebuild it from others; `None` for a leaf."""
    nodes, treedef = tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(nodes) == 1 and nodes[0][1] is tree:
        return None
    rebuild = functools.partial(jax.tree.unflatten, treedef)
    return [(_name(path), node) for path, node in nodes], rebuild
