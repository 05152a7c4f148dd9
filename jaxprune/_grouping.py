"""Numbers the units of an analysed program, and finds those that are identical.

An atom is one index along one axis (see ``_program``). Atoms with one root are removed together, so
the roots that axes of params have are the units: numbered from 1, and 0 for what is pinned.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune import _program, _tree

Units = Mapping[str, tuple[np.ndarray, ...]]  # for each path and axis, the unit of each index
Members = tuple[tuple[str, int, int], ...]  # (path, axis, indices per unit)


def number(structure: _program.Structure, names: Sequence[str]) -> Units:
    """Numbers the units; leaves come in the order in which the program uses them."""
    atoms = structure.walk.atoms
    order = [*structure.order, *(i for i in range(len(names)) if i not in set(structure.order))]
    roots = {
        names[i]: [np.where(atoms.free(a), atoms.find(a), 0) for a in structure.leaves[i].axes]
        for i in order
    }
    axes = [root for leaf in roots.values() for root in leaf]
    every = np.unique(np.concatenate([np.zeros(1, np.int32), *axes]))
    return {
        path: tuple(np.searchsorted(every, root).astype(np.int32) for root in leaf)
        for path, leaf in roots.items()
    }


def identical(unit: Units) -> list[tuple[np.ndarray, Members]]:
    """Groups units that have the same number of indices in the same axes.

    A table of units by axes would have millions of entries, nearly all 0. So every axis draws a
    random number, and a unit sums it up over its indices, modulo 2⁶⁴: units of one group have one
    sum, and other units have the same one by a chance of 2⁻⁶⁴. Sorting the sums finds the groups.
    """
    axes = {(path, axis): own for path, leaf in unit.items() for axis, own in enumerate(leaf)}
    count = 1 + max((int(own.max(initial=0)) for own in axes.values()), default=0)
    random = np.random.default_rng(0).integers(1 << 63, size=len(axes), dtype=np.uint64)
    sums = np.zeros(count, np.uint64)
    for key, own in zip(random, axes.values(), strict=True):
        sums += np.bincount(own, minlength=count).astype(np.uint64) * key
    _, first, group = np.unique(sums[1:], return_index=True, return_inverse=True)
    members: list[list[tuple[str, int, int]]] = [[] for _ in first]
    for (path, axis), own in axes.items():
        counts = np.bincount(own, minlength=count)[first + 1]
        for i in np.flatnonzero(counts):
            members[i].append((path, axis, int(counts[i])))
    order = np.argsort(group, kind="stable")
    parts = np.split(order + 1, np.cumsum(np.bincount(group))[:-1]) if len(first) else []
    return [(parts[i], tuple(members[i])) for i in np.argsort(first)]


def pinned(
    structure: _program.Structure, names: Sequence[str]
) -> tuple[tuple[str, int, int, tuple[str, ...]], ...]:
    """Lists ``(path, axis, indices, reasons)`` for indices that cannot be removed."""
    atoms = structure.walk.atoms
    return tuple(
        (path, axis, int((~free).sum()), tuple(atoms.reason(own)))
        for path, leaf in zip(names, structure.leaves, strict=True)
        for axis, own in enumerate(leaf.axes)
        if not (free := atoms.free(own)).all()
    )


def choices(
    structure: _program.Structure, spread: np.ndarray, groups: Sequence[tuple[np.ndarray, Members]]
) -> tuple[str, ...]:
    """Describes the merged axes that could be cut along several factors.

    Args:
      structure: the analysed program.
      spread: the unit of every atom.
      groups: the units and members of each group.
    """
    lines = []
    for merge, factor, counts in structure.choices:
        cut = np.unique(spread[merge.factors[factor]])
        members = [m for units, members in groups if np.isin(units, cut).any() for m in members]
        paths = list(dict.fromkeys(path for path, *_ in members))
        lines.append(_describe(merge, factor, counts, paths))
    return tuple(lines)


def _describe(
    merge: _program.Merge, factor: int, counts: Sequence[int], paths: Sequence[str]
) -> str:
    sizes = "×".join(str(len(f)) for f in merge.factors)
    cut = f"{merge.where} ({sizes}) is cut along factor {factor}"
    if not paths:
        return f"{cut}."
    other = next(i for i, n in enumerate(counts) if n and i != factor)
    first = ", ".join(map(_tree.show, paths))
    return (
        f"{first}: {cut} ({counts[factor]} units); split={{{paths[0]!r}: {other}}} would cut it "
        f"along factor {other} ({counts[other]} units)."
    )
