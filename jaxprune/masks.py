"""Masks: pytrees of bools beside the params, ``True`` for kept, ``None`` for never pruned.

>>> import jax.numpy as jnp
>>> params = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(1)}
>>> apply_masks(params, {"w": jnp.array([True, False]), "b": None})["w"].tolist()
[1.0, 0.0]
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _mesh, _tree

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

    Examples:
      >>> pack(jnp.array([True, False, True])).tolist()
      [160]
    """
    return jax.tree.map(lambda m: _mesh.automatic(jnp.packbits, m), masks)


def unpack(packed: Any, params: Any) -> Masks:
    """Unpacks what :func:`pack` packed, to the shapes of the params.

    Raises:
      ValueError: if a leaf has no entry, or the wrong number of bytes.

    Examples:
      >>> unpack(pack(jnp.array([True, False, True])), jnp.zeros(3)).tolist()
      [True, False, True]
    """
    entries = _tree.named_entries(packed)
    masks = []
    for path, leaf in _tree.named_leaves(params):
        if path not in entries:
            raise ValueError(
                f"{_tree.show(path)}: packed masks have no entry for this leaf; they have "
                f"{sorted(entries)[:10]}. Unpack with the params they are for."
            )
        bits = entries[path]
        size = math.prod(jnp.shape(leaf))
        if bits is not None and bits.shape != (-(-size // 8),):
            raise ValueError(
                f"{_tree.show(path)}: packed masks hold {bits.shape} bytes, needed "
                f"{-(-size // 8)} for shape {jnp.shape(leaf)}. Unpack with the params they are for."
            )
        unpacked = None
        if bits is not None:
            unpacked = jnp.unpackbits(bits, count=size).astype(bool).reshape(jnp.shape(leaf))
            unpacked = _mesh.follow(unpacked, leaf)
        masks.append(unpacked)
    return _tree.rebuild(params, masks)
