"""Atoms: which indices of which axes must be removed together.

Every index along every axis of a program has an atom, an integer. Walking the program unites the
atoms of indices that can only be removed together; what is connected in the end is a unit. Negative
atoms are reasons: an atom that is united with one of them is pinned, and the reason says why.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Axis = np.ndarray  # one atom per index, dtype=int32


@dataclasses.dataclass(frozen=True, eq=False)
class Merge:
    """An axis that a reshape merged from factors, or split into them, first factor slowest."""

    merged: Axis
    factors: tuple[Axis, ...]
    where: str  # the equation, for a report


Choice = tuple[Merge, int, list[int]]  # the factor along which it is cut, units by factor


class Atoms:
    """A union-find forest over integers, every operation over entire axes.

    The root of a tree is its lowest atom, so that a pinned atom has the first reason it met as its
    root. A reason is never united with another. Atom n is at place n of a table, and reason -n at
    place -n, counted from the end, so that plain indexing finds both, however many there are::

        place    0   1    2   ...        ...   -3        -2        -1
        table  [ -   atom 1, atom 2, ...  reason -3, reason -2, reason -1 ]

    Place 0 is of no atom, so that 0 may stand for none.
    """

    def __init__(self) -> None:
        self.cut: list[Axis] = []  # the factors along which merged axes were decided to be cut
        self._size = 1  # the places for atoms, and for reasons
        self._parent = np.array([0, -1], np.int32)
        self._count = 1
        self._reasons: dict[str, int] = {}
        self._pinned: dict[tuple[int, int], Axis] = {}

    def fresh(self, size: int) -> Axis:
        """Makes new atoms, united with nothing."""
        start, self._count = self._count, self._count + size
        self._reserve()
        return np.arange(start, self._count, dtype=np.int32)

    def pinned(self, size: int, reason: str) -> Axis:
        """Makes an axis of which nothing can be removed; one array for a size and a reason."""
        key = size, self._reasons.setdefault(reason, -1 - len(self._reasons))
        self._reserve()
        if key not in self._pinned:
            self._pinned[key] = np.full(*key, np.int32)
        return self._pinned[key]

    def _reserve(self) -> None:
        """Makes place for all atoms and reasons, by doubling."""
        old, parent = self._size, self._parent
        while self._size < max(self._count, len(self._reasons)):
            self._size *= 2
        if self._size > old:
            self._parent = np.r_[: self._size, -self._size : 0].astype(np.int32)
            self._parent[:old] = parent[:old]  # all others, and every reason, are their own roots

    def pin(self, axis: Axis, reason: str) -> None:
        """Keeps all indices of an axis from being removed."""
        self.unite(axis, self.pinned(len(axis), reason))

    def find(self, axis: Axis) -> Axis:
        """Returns the root of every atom."""
        root = self._parent[axis]
        while not np.array_equal(above := self._parent[root], root):
            root = above
        self._parent[axis] = root
        return root

    def all_roots(self) -> np.ndarray:
        """Returns a table with the root of every atom and reason."""
        return self.find(np.r_[: self._count, -len(self._reasons) : 0])

    def free(self, axis: Axis) -> np.ndarray:
        """Returns which indices are not pinned."""
        return self.find(axis) >= 0

    def reason(self, axis: Axis) -> dict[str, int]:
        """Counts why indices of an axis are pinned, the most frequent reason first."""
        roots = self.find(axis)
        numbers, counts = np.unique(-1 - roots[roots < 0], return_counts=True)
        reasons = list(self._reasons)
        order = np.argsort(-counts, kind="stable")
        return {
            reasons[n]: int(count) for n, count in zip(numbers[order], counts[order], strict=True)
        }

    def unite(self, a: Axis, b: Axis) -> None:
        """Makes index i of one axis and index i of the other be removed together."""
        if a is b:
            return
        a, b = self.find(a), self.find(b)
        while (differ := (a != b) & (np.maximum(a, b) >= 0)).any():
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            a, b = self.find(low), self.find(high)

    def solve(
        self,
        merges: Sequence[Merge],
        choose: Callable[[list[Merge], list[list[int]]], tuple[int, int]],
    ) -> list[Choice]:
        """Decides along which factor every merged axis is cut, and pins the other factors.

        Where at most one factor can be cut, there is nothing to choose. When only merges with
        several are left, ``choose(merges, units)`` returns which one to decide, and its factor,
        from the number of units that could be removed along each factor of each. Returns these.
        """
        choices = []
        for cluster in self._clusters(merges):
            waiting = [merges[i] for i in cluster]
            while waiting:
                counts = [[self._units(m, i) for i in range(len(m.factors))] for m in waiting]
                pairs = zip(waiting, counts, strict=True)
                clear = [(m, int(np.argmax(n))) for m, n in pairs if np.count_nonzero(n) < 2]
                if not clear:
                    which, factor = choose(waiting, counts)
                    choices.append((waiting[which], factor, counts[which]))
                    clear = [(waiting[which], factor)]
                for merge, factor in clear:
                    self._settle(merge, factor)
                    waiting.remove(merge)
        return choices

    def _clusters(self, merges: Sequence[Merge]) -> list[np.ndarray]:
        """Groups merges that share atoms: a decision in one changes nothing in another.

        The merges are nodes of a second forest. All their roots are listed, each with the merge
        that it is of, which is united with the merge in which the root is first::

            roots    7  9  12  7  12  12
            merge    0  1   1  3   3   4
            first    0  1   1  0   1   1      unites 0-3, 1-3, 1-4: one cluster
        """
        roots = [self.find(np.concatenate([m.merged, *m.factors])) for m in merges]
        roots = [np.unique(r[r >= 0]) for r in roots]
        if not roots:
            return []
        number = np.repeat(np.arange(len(roots)), [len(r) for r in roots])
        _, first, root = np.unique(np.concatenate(roots), return_index=True, return_inverse=True)
        forest = Atoms()
        nodes = forest.fresh(len(roots))
        forest.unite(nodes[number], nodes[number[first[root]]])
        clusters = forest.find(nodes)
        return [np.flatnonzero(clusters == c) for c in np.unique(clusters)]

    def _rows(self, merge: Merge, chosen: int) -> np.ndarray:
        """Returns the merged axis as one row per index of a factor: what is removed with it."""
        sizes = [len(factor) for factor in merge.factors]
        return np.moveaxis(merge.merged.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1)

    def _units(self, merge: Merge, chosen: int) -> int:
        """Counts the units that could be removed along one factor.

        Index i of the factor can be removed if all of row i can. Rows that share a root are one
        unit: rows ``a b``, ``b c`` and ``d e`` are two units, ``a b c`` and ``d e``. If a single
        unit were everything, its removal would empty the axis: then there is none.
        """
        factor = merge.factors[chosen]
        free = self.free(factor)
        if not free.any():
            return 0
        rows = self._rows(merge, chosen)
        free &= self.free(rows).all(1)
        roots = np.concatenate([self.find(factor)[:, None], self.find(rows)], 1)[free]
        distinct, number = np.unique(roots, return_inverse=True)
        forest = Atoms()
        nodes = forest.fresh(len(distinct))
        rows = nodes[number.reshape(roots.shape)]
        forest.unite(rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1))
        units = len(np.unique(forest.find(nodes)))
        return 0 if units == 1 and free.all() else units

    def _settle(self, merge: Merge, chosen: int) -> None:
        """Cuts a merged axis along one factor: with index i go all entries of row i.

        For 2 heads of 3 dims, cut along the heads, the merged axis has the atoms ``[h h h i i i]``.
        No head can then lose a single dim, so that the other factor, the dims, is pinned.
        """
        reason = f"the other factor of {merge.where} is cut"
        for i, factor in enumerate(merge.factors):
            if i != chosen:
                self.pin(factor, reason)
        self.cut.append(merge.factors[chosen])
        rows = self._rows(merge, chosen)
        self.unite(rows.reshape(-1), np.repeat(merge.factors[chosen], rows.shape[1]))
