"""Atoms: a union-find whose classes are channels, with the reasons that pin them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Atoms:
    """Numbers that are joined into classes; a class may carry reasons why it must stay."""

    def __init__(self) -> None:
        self._parent: IntArray = np.zeros(0, np.int64)
        self._pins: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int, reason: str | None = None) -> IntArray:
        """Return `count` new atoms, pinned where a reason is given."""
        ids = np.arange(len(self._parent), len(self._parent) + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, ids])
        if reason is not None:
            self.pin(ids, reason)
        return ids

    def roots(self, ids: IntArray) -> IntArray:
        """Return the representative of each atom's class: its smallest atom."""
        found = self._parent[ids]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def join(self, left: IntArray, right: IntArray) -> None:
        """Make the atoms of `left` and `right` (broadcast) the same, position by position."""
        low, high = np.broadcast_arrays(self.roots(left), self.roots(right))
        pairs = np.stack([low[low != high], high[low != high]], axis=1)
        for one, other in np.unique(pairs, axis=0).tolist():
            first, second = sorted((self._root(one), self._root(other)))
            self._parent[second] = first

    def pin(self, ids: IntArray, reason: str) -> None:
        """Say why these atoms must stay."""
        self._pins += [(root, reason) for root in np.unique(self.roots(ids)).tolist()]

    def reasons(self) -> dict[int, tuple[str, ...]]:
        """Return the reasons of each pinned class, by its root, in the order of discovery."""
        found: dict[int, dict[str, None]] = {}
        for atom, reason in self._pins:
            found.setdefault(self._root(atom), {})[reason] = None
        return {root: tuple(reasons) for root, reasons in found.items()}

    def _root(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = int(parent[atom])
        return atom
