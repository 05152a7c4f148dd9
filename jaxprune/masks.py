"""Masks: pytrees of bools next to the params, ``True`` for kept, ``None`` for never pruned."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxprune import _files, _mesh, _tree
from jaxprune._tree import Masks, Params, Tree


def apply_masks(params: Params, masks: Masks) -> Params:
    r"""Sets pruned weights to exactly zero.

    .. math:: w_i \leftarrow w_i \text{ if } m_i \text{ else } 0

    A pruned NaN or infinity becomes 0 too. The arguments are ordered as in ``optax.apply_updates``.

    Args:
      params: any pytree of arrays.
      masks: a pytree with the same paths and shapes; a leaf with `None` is returned unchanged.

    Returns:
      The masked params, with their structure, dtypes and shardings.

    Raises:
      ValueError: if paths or shapes differ.
      TypeError: if a mask is not bool.

    Examples:
      >>> params = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(1)}
      >>> apply_masks(params, {"w": jnp.array([True, False]), "b": None})["w"].tolist()
      [1.0, 0.0]
    """
    return _tree.map_masks(_apply, params, masks)


def _apply(weights: Any, mask: Any) -> Any:
    if isinstance(weights, np.ndarray):  # which may have a dtype that JAX would convert
        return np.where(mask, weights, weights.dtype.type(0))
    return jnp.where(mask, weights, jnp.zeros_like(weights))


def straight_through(params: Params, masks: Masks) -> Params:
    r"""Masks the params in the forward pass, but passes gradients to all of them.

    .. math:: \tilde w = m \odot w, \qquad \partial \tilde w / \partial w := 1

    Pruned weights continue to learn, and new masks may keep them again.

    Args:
      params: any pytree of arrays.
      masks: as in :func:`apply_masks`, which raises the same errors.

    Returns:
      The masked params.

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
    return _apply(weights, mask)


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _apply(*primals), tangents[0]


def combine(masks: Masks, *more: Masks) -> Masks:
    r"""Keeps the weights that all masks keep: :math:`m_i = \bigwedge_j m_i^{(j)}`.

    Args:
      masks: the first masks, whose structure is returned.
      *more: masks with the same paths and shapes. If one tree has `None`, the others decide.

    Returns:
      Masks.

    Raises:
      ValueError: if paths or shapes differ.

    Examples:
      >>> combine(jnp.array([True, True]), jnp.array([True, False])).tolist()
      [True, False]
    """
    treedef = jax.tree.structure(masks, is_leaf=lambda m: m is None)
    for other in more:
        pairs = _tree.match(masks, other, "the other masks")
        leaves = [b if a is None else a if b is None else a & b for _, a, b in pairs]
        masks = jax.tree.unflatten(treedef, leaves)
    return masks


def pack(masks: Tree) -> Tree:
    r"""Packs masks to bits: a leaf of n weights becomes :math:`\lceil n / 8 \rceil` bytes.

    Eight bits become a byte along the last axis that is divisible by 8, so that a mask on a mesh is
    packed where it lies. Without such an axis, the bytes form one row. Leaves that are not bool are
    returned unchanged, so an optimizer state, or a complete training state, can be packed for a
    checkpoint. Abstract leaves are packed too, for use as a restore target.

    Args:
      masks: masks, or any pytree that holds them.

    Returns:
      The tree with uint8 leaves in place of the bool leaves.

    Raises:
      ValueError: for an abstract leaf that its mesh does not divide.

    Examples:
      >>> pack(jnp.array([True, False, True])).tolist()
      [160]
    """
    for path, leaf in _tree.named_leaves(masks):
        _mesh.check_held(_tree.show(path), leaf)
    return jax.tree.map(lambda m: _bits(m) if _is_mask(m) else m, masks)


def _is_mask(leaf: Any) -> bool:
    return not isinstance(leaf, bool) and _tree.dtype(leaf) == jnp.bool_


def _byte_axis(shape: tuple[int, ...]) -> int | None:
    """Returns the last axis that is divisible by 8, along which bits are packed."""
    return max((i for i, size in enumerate(shape) if size and size % 8 == 0), default=None)


def _bits(mask: Any) -> Any:
    if isinstance(mask, jax.ShapeDtypeStruct):
        packed = jax.eval_shape(_pack_bits, jax.ShapeDtypeStruct(mask.shape, mask.dtype))
        if isinstance(mask.sharding, NamedSharding):
            return packed.update(sharding=_mesh.fitting(mask.sharding, mask.shape, packed.shape))
        return packed.update(sharding=mask.sharding)
    if _mesh.on_host(mask):
        bits = np.asarray(jax.device_get(mask))
        return _mesh.place(np.packbits(bits, _byte_axis(mask.shape)), mask)
    return _mesh.automatic(_pack_bits, mask)


def _pack_bits(mask: jax.Array) -> jax.Array:
    return jnp.packbits(mask, _byte_axis(mask.shape))


def unpack(packed: Tree, params: Tree) -> Tree:
    """Unpacks the masks in a tree that :func:`pack` returned.

    Args:
      packed: the packed tree.
      params: arrays or ``jax.ShapeDtypeStruct`` with the shapes and shardings of the masks, such as
        the params, or the tree before packing.

    Returns:
      The tree with bool leaves in place of the packed ones, sharded like the leaves of ``params``.

    Raises:
      ValueError: if paths or numbers of bytes differ, or a mesh does not divide a leaf.

    Examples:
      >>> state = {"count": jnp.array(5), "masks": jnp.array([True, False, True])}
      >>> unpack(pack(state), state)["masks"].tolist()
      [True, False, True]
    """
    matched = _tree.match(params, packed, "packed masks", shapes=False)
    return _tree.rebuild(params, [_unpacked(*m) for m in matched if m[1] is not None])


def _unpacked(path: str, leaf: Any, entry: Any) -> Any:
    shape = jnp.shape(leaf)
    if entry is None:
        return None
    # Bytes may also be a uint8 array that `pack` left unchanged: the leaf is then uint8 itself.
    may_be_bits = _tree.dtype(entry) == jnp.uint8 and _tree.dtype(leaf) != jnp.uint8
    if not may_be_bits and jnp.shape(entry) == shape:
        return entry
    packed_shape = _bits(jax.ShapeDtypeStruct(shape, jnp.bool_)).shape
    if _tree.dtype(entry) != jnp.uint8 or jnp.shape(entry) != packed_shape:
        raise ValueError(
            f"{_tree.show(path)}: packed masks must be uint8 of shape {packed_shape} for a mask of "
            f"shape {shape}, got {_tree.dtype(entry)} of shape {jnp.shape(entry)}. Unpack with the "
            "params they were made for."
        )
    _mesh.check_held(_tree.show(path), leaf)
    axis = _byte_axis(shape)

    count = math.prod(shape) if axis is None else None
    if _mesh.on_host(entry, leaf):
        bits = np.unpackbits(jax.device_get(entry), axis, count)
        return _mesh.place(bits.astype(bool).reshape(shape), leaf)

    def unpack_bits(bits: jax.Array) -> jax.Array:
        return jnp.unpackbits(bits, axis, count).astype(bool).reshape(shape)

    mask = _mesh.automatic(unpack_bits, jnp.asarray(entry))
    return _mesh.follow(mask, leaf) if _tree.is_traced(leaf) else _mesh.place(mask, leaf)


def save(path: str | os.PathLike[str], params: Params, masks: Masks) -> None:
    r"""Saves a sparse model compactly: the kept weights, and one bit per weight for the masks.

    The file is a safetensors file. A leaf of n weights of b bytes, k of them kept, is stored in
    :math:`k b + n / 8` bytes: as ``path/values`` of shape (k,) and ``path/bitmap`` of dtype uint8.
    A leaf without a mask is stored as ``path``, with its dtype. The file is written leaf by leaf,
    and replaces an existing file only when it is complete.

    Kept weights are stored bit by bit, including NaN and -0. Pruned weights must be zero, because
    they are loaded as 0. PRNG keys are stored as key data plus implementation name.

    Args:
      path: the file to write, such as ``"model.safetensors"``.
      params: a pytree of arrays that this process holds entirely.
      masks: their masks.

    Raises:
      ValueError: if paths or shapes differ, pruned weights are not zero, or writing fails.
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


def load(path: str | os.PathLike[str], like: Params) -> tuple[Params, Masks]:
    """Loads the params and masks that :func:`save` wrote.

    A checksum covers everything that is loaded. Nothing is executed, because the file holds only
    JSON and numbers.

    Args:
      path: the file to read.
      like: arrays or ``jax.ShapeDtypeStruct`` with the structure of the saved params, such as
        ``jax.eval_shape(init, key)``. Every leaf gets the sharding that it has here, and is a NumPy
        array if it is one here.

    Returns:
      The params, and their masks, with `None` for a leaf without one.

    Raises:
      ValueError: if the file is missing, damaged or of a newer version, if paths, shapes or dtypes
        differ from those of ``like``, or if a mesh does not divide a leaf.

    Examples:
      >>> import tempfile
      >>> like = jax.ShapeDtypeStruct((2,), jnp.float32)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/model.safetensors", jnp.ones(2), jnp.array([True, True]))
      ...     load(f"{folder}/model.safetensors", like)[1].tolist()
      [True, True]
    """
    return _files.read(path, like)
