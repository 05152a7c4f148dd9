"""Atoms: which indices of which axes must leave together.

Every index along every axis of a program has an atom, an integer. Walking the program unites the
atoms of indices that stand and fall together; what is connected in the end is a unit. Low numbers
are reasons: an atom that is united with one of them is pinned, and the number says why.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Axis = np.ndarray  # one atom per index, dtype=int32
_REASONS = 4096


@dataclasses.dataclass(frozen=True)
class Product:
    """An axis that a reshape merged from factors, or split into them, first factor slowest.

    Attributes:
      merged: atoms of the merged axis.
      factors: atoms of the factors.
      where: the equation, for a report.
    """

    merged: Axis
    factors: tuple[Axis, ...]
    where: str


class Atoms:
    """A union-find forest over integers, every operation over whole axes at once.

    The root of a tree is its lowest atom, so a pinned atom's root is the first reason it met.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.cut: list[Axis] = []  # the factors along which merged axes were decided to be cut
        self._parent = np.arange(1 << 16, dtype=np.int32)
        self._count = _REASONS
        self._numbers: dict[str, int] = {}
        self._pinned: dict[tuple[int, int], Axis] = {}

    def fresh(self, size: int) -> Axis:
        """Makes new atoms, united with nothing."""
        start, self._count = self._count, self._count + size
        while self._count > len(self._parent):
            more = np.arange(len(self._parent), 2 * len(self._parent), dtype=np.int32)
            self._parent = np.concatenate([self._parent, more])
        return np.arange(start, self._count, dtype=np.int32)

    def pinned(self, size: int, reason: str) -> Axis:
        """Makes an axis that nothing can leave; the same array for the same size and reason."""
        if reason not in self._numbers:
            if len(self.reasons) == _REASONS:
                reason = self.reasons[-1]
            else:
                self._numbers[reason] = len(self.reasons)
                self.reasons.append(reason)
        key = size, self._numbers[reason]
        if key not in self._pinned:
            self._pinned[key] = np.full(*key, np.int32)
        return self._pinned[key]

    def pin(self, axis: Axis, reason: str) -> None:
        """Keeps all indices of an axis from leaving."""
        self.unite(axis, self.pinned(len(axis), reason))

    def find(self, axis: Axis) -> Axis:
        """Gives the root of every atom."""
        root = self._parent[axis]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self._parent[axis] = root
        return root

    def all_roots(self) -> np.ndarray:
        """Gives the root of every atom there is."""
        return self.find(np.arange(self._count, dtype=np.int32))

    def free(self, axis: Axis) -> np.ndarray:
        """Says which indices are not pinned."""
        return self.find(axis) >= _REASONS

    def reason(self, axis: Axis) -> list[str]:
        """Lists why indices of an axis are pinned, the most frequent reason first."""
        roots = self.find(axis)
        numbers, counts = np.unique(roots[roots < _REASONS], return_counts=True)
        return [self.reasons[n] for n in numbers[np.argsort(-counts, kind="stable")]]

    def unite(self, a: Axis, b: Axis) -> None:
        """Makes index i of one axis leave with index i of the other."""
        if a is b:
            return
        a, b = self.find(a), self.find(b)
        while (differ := (a != b) & (np.maximum(a, b) >= _REASONS)).any():
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            a, b = self.find(low), self.find(high)

    def solve(
        self,
        products: Sequence[Product],
        choose: Callable[[list[Product], list[list[int]]], tuple[int, int]],
    ) -> None:
        """Decides along which factor every merged axis is cut, and pins the other factors.

        Where at most one factor can leave, there is nothing to choose. When only products with
        several are left, ``choose(products, units)`` says which one to decide, and its factor,
        knowing how many units would leave with each factor of each.
        """
        for together in self._clusters(products):
            waiting = [products[i] for i in together]
            while waiting:
                counts = [[self._units(p, i) for i in range(len(p.factors))] for p in waiting]
                several = [sum(map(bool, units)) > 1 for units in counts]
                if all(several):
                    which, factor = choose(waiting, counts)
                    self._settle(waiting.pop(which), factor)
                    continue
                for product, units, ambiguous in zip(waiting, counts, several, strict=True):
                    if not ambiguous:
                        self._settle(product, int(np.argmax(units)))
                waiting = [p for p, ambiguous in zip(waiting, several, strict=True) if ambiguous]

    def _clusters(self, products: Sequence[Product]) -> list[np.ndarray]:
        """Groups products that share atoms: what is decided in one changes nothing in another."""
        roots = [self.find(np.concatenate([p.merged, *p.factors])) for p in products]
        own = [np.unique(r[r >= _REASONS]) for r in roots]
        if not own:
            return []
        owner = np.repeat(np.arange(len(own)), [len(r) for r in own])
        order = np.argsort(every := np.concatenate(own), kind="stable")
        every, owner = every[order], owner[order]
        shared = every[1:] == every[:-1]
        forest = Atoms()
        nodes = forest.fresh(len(own))
        forest.unite(nodes[owner[:-1][shared]], nodes[owner[1:][shared]])
        clusters = forest.find(nodes)
        return [np.flatnonzero(clusters == c) for c in np.unique(clusters)]

    def _rows(self, product: Product, chosen: int) -> np.ndarray:
        sizes = [len(factor) for factor in product.factors]
        return np.moveaxis(product.merged.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1)

    def _units(self, product: Product, chosen: int) -> int:
        """Counts what could leave along one factor; all at once is nothing, it leaves no axis."""
        factor = product.factors[chosen]
        free = self.free(factor)
        if not free.any():
            return 0
        rows = self._rows(product, chosen)
        free &= self.free(rows.reshape(-1)).reshape(rows.shape).all(1)
        if not free.any():
            return 0
        met = np.concatenate([self.find(factor)[:, None], self.find(rows)], 1)[free]
        roots, met = np.unique(met, return_inverse=True)
        met = met.reshape(int(free.sum()), -1)
        labels = np.arange(len(roots))
        while True:  # the lowest label of all that a row unites, until nothing changes
            lowest = labels[met].min(1)
            before = labels.copy()
            np.minimum.at(labels, met, lowest[:, None])
            if np.array_equal(labels, before):
                break
        units = len(np.unique(labels))
        return 0 if units == 1 and free.all() else units

    def _settle(self, product: Product, chosen: int) -> None:
        reason = f"the other factor of {product.where} is cut"
        for i, factor in enumerate(product.factors):
            if i != chosen:
                self.pin(factor, reason)
        self.cut.append(product.factors[chosen])
        rows = self._rows(product, chosen)
        self.unite(rows.reshape(-1), np.repeat(product.factors[chosen], rows.shape[1]))
