"""How little the choices with a given option can lose within limits, by Lagrange multipliers.

With multipliers u >= 0 of the limits b,

    L(u) = min over choices of sum_t (loss[t] + u . costs[t]) - u . b

is no more than the least loss within the limits, and the same minimum with one option fixed is
none of any choice within them that has it.  The minimum is exact, by `MinSum`.  L is concave:
every multiplier in turn goes to where the lines of two choices meet, one within its limit and
one beyond, and the choices that are within all limits are candidates on the way.

H. Everett, Generalized Lagrange multiplier method, Operations Research 11 (1963).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.min_sum import MinSum
from onnxcomp.numerics.option_tables import Rows, Table, totals

Array: TypeAlias = NDArray[np.float64]
Options: TypeAlias = tuple[int, ...]

_LARGEST = 2**24  # values of all cliques together up to which variables are eliminated
_SWEEPS, _STEPS = 3, 40  # over the multipliers, and of one
_GENTLE, _STEEP = 1e-3, 1e6  # multipliers in losses per cost, both relative to their sums
_RAISES, _RAISE = 30, 1.3  # of multipliers, where no choice within all limits was met
_FLAT = 1e-6  # relative gain of L that ends the steps


class Relaxation:
    """Multipliers, bounds and the best choice met, for some rows of every table.

    Attributes:
        bound: Loss that every choice within the limits has at least, from the sum of the
            tables' smallest ones. -inf before `maximise`, where variables are too entangled
            and where the tables agree on no values; any number where no choice is within.
        options: The choice of least loss within the limits and `most` that was met, a row per
            table; None where there was none.
        values: Those of the variables under `options`.
    """

    def __init__(
        self,
        domains: Sequence[int],
        tables: Sequence[Table],
        rows: Sequence[Rows],
        limits: Array,
        most: float,
    ) -> None:
        """Prepare.

        Args:
            domains: Number of values of every shared variable.
            tables: The units.
            rows: Those of their options that take part.
            limits: Upper bounds of the summed costs; inf for none.
            most: Loss above which a choice is of no use.
        """
        self._tables, self._limits = tables, limits
        self._tree = MinSum(domains, [table.scope for table in tables])
        finite = np.flatnonzero(np.isfinite(limits))
        self._units = [
            _Unit(table, r, domains, finite) for table, r in zip(tables, rows, strict=True)
        ]
        self._losses = sum(float(unit.loss.max()) for unit in self._units) or 1.0
        scale = np.sum([np.abs(unit.costs).max(axis=0) for unit in self._units], axis=0)
        scale[scale == 0] = 1.0
        for unit in self._units:
            unit.costs /= scale
        self._bound = limits[finite] / scale
        self._multipliers = np.zeros(len(finite))
        self._least = most - sum(float(table.loss.min()) for table in tables)
        self.bound = -np.inf
        self.options: Options | None = None
        self.values: tuple[int, ...] = ()

    def maximise(self, deadline: float) -> None:
        """Raise the bound until there is nothing to gain, or `time.monotonic` is so late."""
        if self._tree.size > _LARGEST or time.monotonic() >= deadline:
            return
        u = np.zeros(len(self._bound))
        if not np.isfinite(self._tree.minimum(self._functions(u))[0]):
            return  # the tables agree on no values
        self._choose(u)
        for _ in range(_SWEEPS):
            before = self.bound
            for index in range(len(u)):
                if time.monotonic() >= deadline:
                    return
                self._climb(u, index, deadline)
            if self.bound - before <= _FLAT * abs(self.bound) or len(u) == 1:
                break
        u = self._multipliers
        for _ in range(_RAISES):
            if self.options is not None or time.monotonic() >= deadline:
                return
            _, over = self._choose(u)
            u = np.where(over > 0, _RAISE * np.maximum(u, _GENTLE * self._losses), u)

    def rows(self) -> list[Rows]:
        """Return all rows that choices no worse than `options`, and of use, may have."""
        if not np.isfinite(self._least + self.bound):
            return [np.sort(unit.rows) for unit in self._units]
        u = self._multipliers
        functions = self._functions(u)
        marginals = self._tree.marginals(functions)
        most = self._least + float(u @ self._bound) + 2 * self._noise(u)
        kept = []
        for unit, function, marginal in zip(self._units, functions, marginals, strict=True):
            more = unit.loss + unit.costs @ u - function.reshape(-1)[unit.keys]
            within = marginal.reshape(-1)[unit.keys] + more <= most
            kept.append(np.sort(unit.rows[within]))
        return kept

    def _climb(self, u: Array, index: int, deadline: float) -> None:
        """Move one multiplier to where L is largest, the others as they are."""

        def line(multiplier: float) -> tuple[float, float]:
            """Return L of the best choice there: at multiplier 0, and its slope."""
            u[index] = multiplier
            loss, over = self._choose(u)
            return loss + float(u @ over - u[index] * over[index]), float(over[index])

        left = line(0.0)
        if left[1] <= 0:
            return
        right = line(_STEEP * self._losses)
        if right[1] > 0:  # beyond this limit at any price
            u[index] = 0.0
            return
        for _ in range(_STEPS):
            meet = max((right[0] - left[0]) / (left[1] - right[1]), 0.0)
            here = line(meet)
            known, found = (value + meet * slope for value, slope in (left, here))
            if known - found <= _FLAT * abs(known) or time.monotonic() >= deadline:
                return
            left, right = (here, right) if here[1] > 0 else (left, here)

    def _functions(self, u: Array) -> list[Array]:
        return [unit.function(u) for unit in self._units]

    def _choose(self, u: Array) -> tuple[float, Array]:
        """Return the loss of the least choice under u, and its excess of each limit."""
        _, values = self._tree.minimum(self._functions(u))
        places = [unit.place(values, u) for unit in self._units]
        chosen = list(zip(self._units, places, strict=True))
        loss = sum(float(unit.loss[place]) for unit, place in chosen)
        over = np.sum([unit.costs[place] for unit, place in chosen], axis=0) - self._bound
        bound = loss + float(u @ over) - self._noise(u)
        if bound > self.bound:
            self.bound, self._multipliers = bound, u.copy()
        options = tuple(int(unit.rows[place]) for unit, place in chosen)
        if loss < self._least and (totals(self._tables, options)[1] <= self._limits).all():
            self._least, self.options, self.values = loss, options, values
        return loss, over

    def _noise(self, u: Array) -> float:
        """Return how much the sums over all tables may be off, as costs are scaled to 1."""
        largest = self._losses + float(u @ (1 + np.abs(self._bound)))
        return 4 * len(self._units) * float(np.finfo(np.float64).eps) * largest


class _Unit:
    """Some rows of a table in the order of their states.

    Attributes:
        rows: Indices into the table, shape (n,).
        keys: States as numbers, ascending.
        loss: Losses from the table's smallest upwards.
        costs: One column per finite limit.
    """

    def __init__(self, table: Table, rows: Rows, domains: Sequence[int], finite: Rows) -> None:
        keys = table.keys(domains)[rows]
        order = np.argsort(keys, kind="stable")
        self.rows, self.keys = rows[order], keys[order]
        self.loss = np.asarray(table.loss[self.rows] - table.loss.min(), np.float64)
        self.costs = np.array(table.costs[self.rows][:, finite], np.float64)
        self._scope = table.scope
        self._shape = [domains[v] for v in table.scope]
        self._states, self._starts = np.unique(self.keys, return_index=True)

    def function(self, u: Array) -> Array:
        """Return the least of loss plus priced costs at every state, inf without rows."""
        found = np.full(prod(self._shape), np.inf)
        found[self._states] = np.minimum.reduceat(self.loss + self.costs @ u, self._starts)
        return found.reshape(self._shape)

    def place(self, values: Sequence[int], u: Array) -> int:
        """Return the row of the state with these values that is least under u."""
        key = 0
        for variable, size in zip(self._scope, self._shape, strict=True):
            key = key * size + values[variable]
        first, last = np.searchsorted(self.keys, [key, key + 1])
        return int(first + np.argmin(self.loss[first:last] + self.costs[first:last] @ u))
