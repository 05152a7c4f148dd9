"""Masks: pytrees of bools beside the params, ``True`` for kept, ``None`` for never pruned.

>>> import jax.numpy as jnp
>>> params = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(1)}
>>> apply_masks(params, {"w": jnp.array([True, False]), "b": None})["w"].tolist()
[1.0, 0.0]
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxprune import _files, _mesh, _tree

Masks = Any


def apply_masks(params: Any, masks: Masks) -> Any:
    r"""Sets pruned weights to exactly zero: :math:`w_i \leftarrow w_i` if kept, else 0.

    A pruned NaN or infinity becomes 0 too. Arguments are ordered as in ``optax.apply_updates``.

    Args:
      params: any pytree of arrays.
      masks: a pytree with the same paths and shapes; `None` leaves a leaf as it is.

    Returns:
      The masked params, with their structure, dtypes and shardings.

    Raises:
      ValueError: if paths or shapes differ.
      TypeError: if a mask is not bool.

    Examples:
      >>> apply_masks(jnp.array([3.0, 4.0]), jnp.array([False, True])).tolist()
      [0.0, 4.0]
    """
    return _tree.map_masks(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, masks)


def straight_through(params: Any, masks: Masks) -> Any:
    r"""Masks the params in the forward pass, and passes gradients to all of them.

    .. math:: \tilde w = m \odot w, \qquad \partial \tilde w / \partial w := 1

    so that pruned weights go on learning and may come back when the masks are made anew.

    Raises:
      ValueError: if paths or shapes differ.
      TypeError: if a mask is not bool.

    Examples:
      >>> mask = jnp.array([True, False])
      >>> loss = lambda w: jnp.sum(straight_through(w, mask) ** 2 + 3 * straight_through(w, mask))
      >>> jax.grad(loss)(jnp.array([1.0, 5.0])).tolist()
      [5.0, 3.0]

    References:
      Bengio et al, `Estimating or Propagating Gradients Through Stochastic Neurons
      <https://arxiv.org/abs/1308.3432>`_, 2013
    """
    return _tree.map_masks(_straight_through, params, masks)


@jax.custom_jvp
def _straight_through(weights: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, weights, jnp.zeros_like(weights))


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return _straight_through(*primals), tangents[0]


def combine(masks: Masks, *more: Masks) -> Masks:
    r"""Keeps what every tree of masks keeps: :math:`m_i = \bigwedge_j m_i^{(j)}`.

    Where one tree has `None`, the others decide.

    Raises:
      ValueError: if paths or shapes differ.

    Examples:
      >>> combine(jnp.array([True, True]), jnp.array([True, False])).tolist()
      [True, False]
    """
    for other in more:
        leaves, treedef = jax.tree.flatten(masks, is_leaf=lambda m: m is None)
        names, others = _tree.named_entries(masks), _tree.named_entries(other)
        if names.keys() != others.keys():
            raise ValueError(
                f"masks to combine must have the same paths; {names.keys() ^ others.keys()} are "
                "in one tree only."
            )
        for path, m in names.items():
            if m is not None and others[path] is not None and m.shape != others[path].shape:
                raise ValueError(
                    f"{_tree.show(path)}: masks to combine have shapes {m.shape} and "
                    f"{others[path].shape}, needed the same."
                )
        pairs = zip(leaves, (others[path] for path in names), strict=True)
        masks = jax.tree.unflatten(
            treedef, [b if a is None else a if b is None else a & b for a, b in pairs]
        )
    return masks


def pack(masks: Masks) -> Any:
    r"""Packs masks to bits: a leaf of n weights becomes :math:`\lceil n / 8 \rceil` bytes.

    Eight masks become a byte along the last axis that 8 divides, so that a mask spread over a mesh
    is packed where it is; where there is no such axis the bytes are one row. Leaves that are not
    bool stay: an optimizer state, or all of a training, can be packed for a checkpoint with the
    masks in it. Abstract leaves are packed too, for what restores by them.

    Raises:
      ValueError: for an abstract leaf that its mesh does not divide.

    Examples:
      >>> pack(jnp.array([True, False, True])).tolist()
      [160]
    """
    for path, leaf in _tree.named_leaves(masks):
        _mesh.check_held(_tree.show(path), leaf)
    return jax.tree.map(lambda m: _bits(m) if _tree.dtype(m) == jnp.bool_ else m, masks)


def _byte_axis(shape: tuple[int, ...]) -> int | None:
    """Gives the last axis that 8 divides, along which bits are packed."""
    return max((i for i, size in enumerate(shape) if size and size % 8 == 0), default=None)


def _bits(mask: Any) -> Any:
    pack_bits = functools.partial(jnp.packbits, axis=_byte_axis(mask.shape))
    if not isinstance(mask, jax.ShapeDtypeStruct):
        return _mesh.automatic(pack_bits, mask)
    packed = jax.eval_shape(pack_bits, jax.ShapeDtypeStruct(mask.shape, mask.dtype))
    if isinstance(mask.sharding, NamedSharding):
        return packed.update(sharding=_mesh.fitting(mask.sharding, mask.shape, packed.shape))
    return packed.update(sharding=mask.sharding)


def unpack(packed: Any, params: Any) -> Masks:
    """Unpacks what :func:`pack` packed, to the shapes of the params.

    Args:
      packed: what was packed.
      params: arrays or ``jax.ShapeDtypeStruct`` of the shapes of the masks, or all that was packed.
        A mask is placed as its leaf is here.

    Raises:
      ValueError: if a leaf has no entry, an entry no leaf, for the wrong number of bytes, or for a
        mesh that does not divide a leaf.

    Examples:
      >>> unpack(pack(jnp.array([True, False, True])), jnp.zeros(3)).tolist()
      [True, False, True]
      >>> state = {"count": jnp.array(5), "masks": jnp.array([True, False, True])}
      >>> unpack(pack(state), state)["count"].tolist()
      5
    """
    entries = _tree.named_entries(packed)
    masks = []
    for path, leaf in _tree.named_leaves(params):
        if path not in entries:
            raise ValueError(
                f"{_tree.show(path)}: packed masks have no entry for this leaf; they have "
                f"{sorted(entries)[:10]}. Unpack with the params they are for."
            )
        masks.append(_unpacked(path, entries.pop(path), leaf))
    if lone := [path for path, entry in entries.items() if entry is not None]:
        raise ValueError(
            f"{_tree.show(lone[0])}: packed masks have an entry here, the params have none. Unpack "
            "with the params they are for."
        )
    return _tree.rebuild(params, masks)


def _unpacked(path: str, entry: Any, leaf: Any) -> Any:
    shape = jnp.shape(leaf)
    if entry is None:
        return None
    is_bits = _tree.dtype(entry) == jnp.uint8 != _tree.dtype(leaf)
    if not is_bits and jnp.shape(entry) == shape:  # was not bool, so was not packed
        return entry
    needed = _bits(jax.ShapeDtypeStruct(shape, jnp.bool_)).shape
    if _tree.dtype(entry) != jnp.uint8 or jnp.shape(entry) != needed:
        raise ValueError(
            f"{_tree.show(path)}: packed masks hold {_tree.dtype(entry)} of shape "
            f"{jnp.shape(entry)}, needed uint8 of shape {needed} for a mask of shape {shape}. "
            "Unpack with the params they are for."
        )
    _mesh.check_held(_tree.show(path), leaf)
    axis = _byte_axis(shape)

    def unpack_bits(bits: jax.Array) -> jax.Array:
        count = math.prod(shape) if axis is None else None
        return jnp.unpackbits(bits, axis, count).astype(bool).reshape(shape)

    mask = _mesh.automatic(unpack_bits, jnp.asarray(entry))
    return _mesh.follow(mask, leaf) if _tree.is_traced(leaf) else _mesh.place(mask, leaf)


def save(path: str | os.PathLike[str], params: Any, masks: Masks) -> None:
    r"""Saves a sparse model compactly: the kept weights, and one bit per weight for the masks.

    A leaf of n weights of b bytes each, k of them kept, takes :math:`k b + n / 8` bytes.

    The file is a safetensors file. A leaf with a mask is stored as ``path/values`` of shape (k,)
    and ``path/bitmap`` of dtype uint8. Any other leaf is stored as ``path``, with its dtype. The
    file is written leaf by leaf, and replaces an existing file only when it is complete.

    Kept weights are stored bit by bit, including NaN and -0. Pruned weights must be zero, because
    they are loaded as 0. PRNG keys are stored as key data plus implementation name.

    Args:
      path: the file to write, such as ``"model.safetensors"``.
      params: a pytree of arrays that this process holds entirely.
      masks: their masks.

    Raises:
      ValueError: if paths or shapes differ, masked weights are not zero, or the file cannot be
        written.
      TypeError: if safetensors does not support the dtype of a leaf, or a mask is not bool.

    Examples:
      >>> import tempfile
      >>> params, masks = jnp.array([0.0, 2.0, 3.0]), jnp.array([False, True, True])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/model.safetensors", params, masks)
      ...     load(f"{folder}/model.safetensors", like=params)[0].tolist()
      [0.0, 2.0, 3.0]
    """
    _files.write(path, params, masks)


def load(path: str | os.PathLike[str], like: Any) -> tuple[Any, Masks]:
    """Loads the params and masks that :func:`save` wrote.

    A checksum covers everything that is loaded. Nothing is executed, because the file holds only
    JSON and numbers.

    Args:
      path: the file to read.
      like: arrays or ``jax.ShapeDtypeStruct`` with the structure of the saved params, such as
        ``jax.eval_shape(init, key)``. Every leaf is placed with the sharding that it has here.
        NumPy arrays are returned for NumPy arrays.

    Returns:
      The params, and their masks, with `None` for a leaf without one.

    Raises:
      ValueError: if the file is missing, truncated, damaged or of a newer version, if paths, shapes
        or dtypes differ from those of ``like``, or if a mesh does not divide a leaf. The message
        names the file and the leaf.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/model.safetensors", jnp.ones(2), jnp.array([True, True]))
      ...     params, masks = load(
      ...         f"{folder}/model.safetensors", like=jax.ShapeDtypeStruct((2,), jnp.float32)
      ...     )
      >>> masks.tolist()
      [True, True]
    """
    return _files.read(path, like)
