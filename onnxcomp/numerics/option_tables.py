"""The options of a unit, together with the values of the variables that it shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError

Array: TypeAlias = NDArray[np.float64]
States: TypeAlias = NDArray[np.integer[Any]]
Rows: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True)
class Table:
    """The options of one unit.

    Attributes:
        scope: distinct indices of shared variables, often none or two.
        states: integer, shape (n, len(scope)): each option's values of these variables.
        loss: shape (n,), finite.
        costs: shape (n, L), finite, one column per limit.
    """

    scope: tuple[int, ...]
    states: States
    loss: Array
    costs: Array

    def keys(self, domains: Sequence[int]) -> Rows:
        """Return one number per row: its place in an array with an axis per variable."""
        key = np.zeros(len(self.loss), np.intp)
        for place, variable in enumerate(self.scope):
            key = key * domains[variable] + self.states[:, place]
        return key

    def undominated(self, domains: Sequence[int], limited: NDArray[np.bool_]) -> Rows:
        """Return the rows that no other of the same state beats in loss and limited costs."""
        key = self.keys(domains)
        measures = np.column_stack([self.loss, self.costs[:, limited]])
        order = np.argsort(key, kind="stable")
        kept = []
        for rows in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            group = measures[rows]
            # [i, j]: i is no worse than j
            no_worse = (group[:, None] <= group[None]).all(axis=2)
            earlier = np.arange(len(rows))[:, None] < np.arange(len(rows))[None]
            beats = no_worse & (~no_worse.T | earlier)
            kept.append(rows[~beats.any(axis=0)])
        return np.sort(np.concatenate(kept))

    def check(self, owner: str, domains: Sequence[int], limits: int) -> None:
        """Raise ParameterError where the table does not fit the domains or the limits."""
        scope, n = self.scope, len(self.loss)
        if len(set(scope)) < len(scope) or not set(scope) <= set(range(len(domains))):
            raise ParameterError.of(
                owner, "scope", f"distinct variables below {len(domains)}", scope
            )
        shapes = self.states.shape, self.costs.shape
        if not n or shapes != ((n, len(scope)), (n, limits)):
            raise ParameterError.of(
                owner,
                "states, costs",
                f"of shapes (n, {len(scope)}) and (n, {limits}) for n > 0 losses",
                (*shapes, n),
            )
        if not (np.isfinite(self.loss).all() and np.isfinite(self.costs).all()):
            raise ParameterError.of(owner, "loss, costs", "finite", "NaN or inf")
        sizes = np.array([domains[variable] for variable in scope], np.intp)
        if (self.states < 0).any() or (self.states >= sizes).any():
            raise ParameterError.of(
                owner,
                "states",
                f"below the domains' sizes {sizes.tolist()}",
                self.states.max(0),
            )


def totals(tables: Sequence[Table], options: Sequence[int]) -> tuple[float, Array]:
    """Return the summed loss and costs of one row per table."""
    chosen = list(zip(tables, options, strict=True))
    loss = sum(float(table.loss[i]) for table, i in chosen)
    return loss, np.sum([table.costs[i] for table, i in chosen], axis=0, dtype=np.float64)
