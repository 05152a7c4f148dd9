"""Numbers the units of an analysed program, and finds those that are identical.

An atom is one index along one axis (see ``_program``). Atoms with one root are removed together, so
the roots that axes of params have are the units: numbered from 1, and 0 for what is pinned.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxprune import _program, _tree

Units = dict[str, tuple[np.ndarray, ...]]  # for each path and axis, the unit of each index


@dataclasses.dataclass(frozen=True)
class Group:
    """Identical units: each has the same number of indices of the same axes.

    Attributes:
      units: the numbers of the units, from 1.
      members: ``(path, axis, indices per unit)``, in the order in which the program uses them.
    """

    units: np.ndarray
    members: tuple[tuple[str, int, int], ...]


def number(structure: _program.Structure, names: Sequence[str]) -> Units:
    """Numbers the units; leaves come in the order in which the program uses them."""
    atoms = structure.walk.atoms
    roots = {
        names[i]: [np.where(atoms.free(a), atoms.find(a), 0) for a in structure.leaves[i].axes]
        for i in [*structure.order, *sorted(set(range(len(names))) - set(structure.order))]
    }
    every = np.unique(np.concatenate([[0], *(root for leaf in roots.values() for root in leaf)]))
    return {
        path: tuple(np.searchsorted(every, root).astype(np.int32) for root in leaf)
        for path, leaf in roots.items()
    }


def identical(unit: Units) -> tuple[Group, ...]:
    """Groups units that have the same number of indices in the same axes.

    A table of units by axes would have millions of entries, nearly all 0. So every axis draws a
    random number, and a unit sums it up over its indices, modulo 2⁶⁴: units of one group have one
    sum, and other units have the same one by a chance of 2⁻⁶⁴. Sorting the sums finds the groups.
    """
    axes = {(path, axis): units for path, leaf in unit.items() for axis, units in enumerate(leaf)}
    count = 1 + max((int(units.max(initial=0)) for units in axes.values()), default=0)
    random = np.random.default_rng(0).integers(1 << 63, size=len(axes), dtype=np.uint64)
    sums = np.zeros(count, np.uint64)
    for key, units in zip(random, axes.values(), strict=True):
        sums += np.bincount(units, minlength=count).astype(np.uint64) * key
    _, first, group = np.unique(sums[1:], return_index=True, return_inverse=True)
    members: list[list[tuple[str, int, int]]] = [[] for _ in first]
    for (path, axis), units in axes.items():
        counts = np.bincount(units, minlength=count)[first + 1]
        for i in np.flatnonzero(counts):
            members[i].append((path, axis, int(counts[i])))
    order = np.argsort(group, kind="stable")
    parts = np.split(order + 1, np.cumsum(np.bincount(group))[:-1]) if len(first) else []
    return tuple(Group(parts[i], tuple(members[i])) for i in np.argsort(first))


def held(structure: _program.Structure, names: Sequence[str], unit: Units) -> dict[str, int]:
    """Counts for each reason the params that no unit removes because of it, the most first.

    An entry of a leaf is held by the reasons of its index along every axis, and counts for each.
    Of a leaf with p pinned indices along an axis, c of them for a reason, the others have p - c.
    """
    atoms, counts = structure.walk.atoms, collections.Counter[str]()
    for path, leaf in zip(names, structure.leaves, strict=True):
        pinned = [int(np.count_nonzero(units == 0)) for units in unit[path]]
        if leaf.axes and all(pinned):
            reasons = [atoms.reason(axis) for axis in leaf.axes]
            for why in dict.fromkeys(why for axis in reasons for why in axis):
                others = [p - axis.get(why, 0) for p, axis in zip(pinned, reasons, strict=True)]
                counts[why] += math.prod(pinned) - math.prod(others)
    return dict(counts.most_common())


def choices(
    structure: _program.Structure, spread: np.ndarray, groups: Sequence[Group]
) -> tuple[str, ...]:
    """Describes merged axes that could be cut along several factors, from the unit of each atom."""
    lines = []
    for merge, factor, counts in structure.choices:
        sizes = "×".join(str(len(f)) for f in merge.factors)
        line = f"{merge.where} ({sizes}) is cut along factor {factor}"
        cut = np.unique(spread[merge.factors[factor]])
        members = [m for group in groups if np.isin(group.units, cut).any() for m in group.members]
        if paths := list(dict.fromkeys(path for path, *_ in members)):
            other = next(i for i, n in enumerate(counts) if n and i != factor)
            line = (
                f"{', '.join(map(_tree.show, paths))}: {line} ({counts[factor]} units); "
                f"split={{{paths[0]!r}: {other}}} would cut it along factor {other} "
                f"({counts[other]} units)"
            )
        lines.append(f"{line}.")
    return tuple(lines)
