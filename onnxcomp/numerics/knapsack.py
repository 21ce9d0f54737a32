"""One option for every unit under several limits, as an exact integer programme.

Options of a unit may depend on variables that units share, such as the width of a residual
trunk or the rank of a shared factor. A table lists a unit's options together with the values
of its shared variables; the programme (the local polytope with integer points) is

    minimise    sum_t sum_i loss[t, i] z[t, i]
    subject to  sum_s x[v, s] = 1                              every variable has one value
                sum_{i: state[t, i] = s} z[t, i] = x[v, s]     tables agree with it
                sum_i z[t, i] = 1                              every table takes one option
                sum_t sum_i costs[t, i, l] z[t, i] <= limits[l]

solved by HiGHS through `scipy.optimize.milp`, with those rows only that `Relaxation` leaves:
of hundreds of thousands a few hundred can be part of a choice that is better than one known.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, vstack

from onnxcomp.errors import LimitError, ParameterError
from onnxcomp.numerics.option_tables import Rows, Table, totals
from onnxcomp.numerics.relaxation import Relaxation

Array: TypeAlias = NDArray[np.float64]

_SCALE = 1e3  # largest loss and every limit as HiGHS sees them; its tolerances are absolute
_COARSE = 1e-3  # an optimum below this share of the largest loss is solved again, rescaled
_ROUNDING = 1e-13  # relative, of summed costs
_EQUAL = 1e-9  # relative, of losses summed in another order
_ATTEMPTS = 8
_TIGHTEN = 1e-9  # first step of tightening a limit, relative
_EXPLAIN_S = 30.0  # seconds for each question of why nothing fits
_INFEASIBLE = 2  # scipy's status


@dataclass(frozen=True)
class Allocation:
    """A choice within the limits.

    Attributes:
        values: the value of every shared variable.
        options: the chosen row of every table.
        loss: sum of the chosen losses.
        costs: sum of the chosen costs, shape (L,).
        gap: proven bound of (loss - optimum) / loss, with losses counted from the sum of the
            tables' smallest ones.
    """

    values: tuple[int, ...]
    options: tuple[int, ...]
    loss: float
    costs: Array
    gap: float


class SolverTimeoutError(LimitError):
    """The time ended before any choice was found; there may be one."""


def allocate(
    domains: Sequence[int],
    tables: Sequence[Table],
    limits: Array,
    *,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-3,
    most: float = np.inf,
) -> Allocation:
    """Choose one option per table and one value per variable with the least total loss.

    Args:
        domains: number of values of every shared variable.
        tables: the units.
        limits: upper bounds of the summed costs, shape (L,); inf for none.
        time_limit_s: wall-clock seconds, after which the best choice so far is returned.
        relative_gap: distance from the optimum at which the search may stop.
        most: loss above which a choice is of no use.

    Raises:
        ParameterError: a table does not fit the domains or the limits, or the tables agree on
            no values at all.
        LimitError: the limits cannot be met; the message names the first that fails and the
            smallest cost within reach. Or no choice within them that loses at most `most` was
            found, which a gap hides if it is hardly less.
        SolverTimeoutError: the time ended before any choice was found.
    """
    limits = np.asarray(limits, np.float64)
    if not tables:
        raise ParameterError.of("allocate", "tables", "at least one table", len(tables))
    for index, table in enumerate(tables):
        table.check(f"allocate: table {index}", domains, len(limits))
    if min(domains, default=1) < 1:
        raise ParameterError.of("allocate", "domains", "all positive", list(domains))
    deadline = time.monotonic() + time_limit_s
    losses = [np.asarray(table.loss - table.loss.min(), np.float64) for table in tables]
    best, rows = _relaxed(domains, tables, losses, limits, most, time_limit_s / 2)
    if best is None or best.gap > relative_gap:
        programme_of = partial(_Programme, domains, tables, most)
        best = _exact(programme_of, losses, limits, rows, best, deadline, relative_gap)
    if best is None:
        raise SolverTimeoutError(
            f"no choice within the limits was found in {time_limit_s:g} s; allow more time"
        )
    if best.loss - most > _EQUAL * abs(most):
        raise _useless(most)
    return best


def _exact(
    programme_of: Callable[[list[Rows]], "_Programme"],
    losses: Sequence[Array],
    limits: Array,
    rows: list[Rows],
    best: Allocation | None,
    deadline: float,
    relative_gap: float,
) -> Allocation | None:
    """Return the best choice of some rows, or a known one that is no worse, if any."""
    while True:
        programme = programme_of(rows)
        scale = max(float(x[r].max()) for x, r in zip(losses, rows, strict=True))
        try:
            found = _solve(programme, losses, scale or 1.0, limits, deadline, relative_gap)
        except LimitError:
            if best is None:
                raise
            found = None  # no other meets them beyond rounding
        if found is None:
            return best
        best = found if best is None or found.loss <= best.loss else best
        excess = _excess(losses, best.options)
        # HiGHS's tolerances hide differences far below the largest loss, and no option that
        # alone loses more than a known choice can be part of a better one
        if excess >= _COARSE * scale:
            return best
        rows = [r[x[r] <= excess] for x, r in zip(losses, rows, strict=True)]


def _relaxed(
    domains: Sequence[int],
    tables: Sequence[Table],
    losses: Sequence[Array],
    limits: Array,
    most: float,
    seconds: float,
) -> tuple[Allocation | None, list[Rows]]:
    """Return the best choice that Lagrange multipliers give, and rows that can better it."""
    limited = np.isfinite(limits)
    rows = [table.undominated(domains, limited) for table in tables]
    relaxation = Relaxation(domains, tables, rows, limits, most)
    relaxation.maximise(time.monotonic() + seconds)
    options, rows = relaxation.options, relaxation.rows()
    if options is None:
        if not all(map(len, rows)):
            raise _useless(most)
        return None, rows
    gap = _gap(losses, options, relaxation.bound)
    return Allocation(relaxation.values, options, *totals(tables, options), gap), rows


def _useless(most: float) -> LimitError:
    return LimitError(f"no choice within the limits that loses at most {most:g} was found")


def _excess(losses: Sequence[Array], options: Sequence[int]) -> float:
    """Return the summed loss of one row per table, from the tables' smallest ones."""
    return sum(float(loss[i]) for loss, i in zip(losses, options, strict=True))


def _gap(losses: Sequence[Array], options: Sequence[int], bound: float) -> float:
    excess = _excess(losses, options)
    return min(max((excess - bound) / excess, 0.0), 1.0) if excess > 0 else 0.0


def _solve(
    programme: "_Programme",
    losses: Sequence[Array],
    scale: float,
    limits: Array,
    deadline: float,
    relative_gap: float,
) -> Allocation | None:
    """Return the best choice that truly meets the limits, or None where the time ended.

    HiGHS keeps a limit within its tolerance only; where that shows in the exact sums, the
    limit is tightened by at least the excess and the search repeated.
    """
    objective = programme.spread([loss * (_SCALE / scale) for loss in losses])
    allowed = limits.copy()
    for attempt in range(_ATTEMPTS):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return None
        result = programme.minimise(objective, allowed, seconds, relative_gap)
        if result.x is None and result.status != _INFEASIBLE:
            return None
        if result.x is None:
            if np.array_equal(allowed, limits):
                raise programme.explain(limits)
            break
        values, options = programme.read(result.x)
        loss, costs = totals(programme.tables, options)
        over = costs - limits
        if not (over > _ROUNDING * np.abs(limits)).any():
            bound = float(result.mip_dual_bound or 0.0) * scale / _SCALE
            return Allocation(values, options, loss, costs, _gap(losses, options, bound))
        step = np.maximum(2 * over, _TIGHTEN * 4**attempt * np.abs(limits))
        allowed -= np.where(over > 0, step, 0.0)
    raise LimitError(
        f"limits {limits.tolist()} are met only up to rounding; relax them a little"
    )


class _Programme:
    """The constraints of the tables' remaining rows; variables are x, then z."""

    def __init__(
        self,
        domains: Sequence[int],
        tables: Sequence[Table],
        most: float,
        rows: Sequence[Rows],
    ) -> None:
        self._most = most
        self.tables, self._rows = tables, rows
        self._x = list(accumulate(domains, initial=0))
        self._z = list(accumulate((len(r) for r in rows), initial=self._x[-1]))
        equations: list[tuple[list[int], list[int], int]] = [  # plus, minus, right-hand side
            (list(range(a, b)), [], 1) for a, b in zip(self._x, self._x[1:], strict=False)
        ]
        for table, kept, start in zip(tables, rows, self._z, strict=False):
            if not table.scope:
                equations.append((list(range(start, start + len(kept))), [], 1))
            for place, variable in enumerate(table.scope):
                column = table.states[kept, place]
                for value in range(domains[variable]):
                    plus = (start + np.flatnonzero(column == value)).tolist()
                    equations.append((plus, [self._x[variable] + value], 0))
        entries = [
            (row, column, sign)
            for row, (plus, minus, _) in enumerate(equations)
            for columns, sign in ((plus, 1.0), (minus, -1.0))
            for column in columns
        ]
        index = np.array([e[:2] for e in entries], np.intp).reshape(-1, 2)
        signs = np.array([e[2] for e in entries])
        shape = (len(equations), self._z[-1])
        self._equal = csr_array((signs, (index[:, 0], index[:, 1])), shape=shape)
        self._sides = np.array([e[2] for e in equations], np.float64)

    def spread(self, columns: Sequence[Array]) -> Array:
        """Return values per table row as values per variable of the programme."""
        values = [column[r] for column, r in zip(columns, self._rows, strict=True)]
        return np.concatenate([np.zeros(self._x[-1]), *values])

    def minimise(
        self, objective: Array, limits: Array, seconds: float, gap: float
    ) -> OptimizeResult:
        """Return scipy's result for an objective under the finite ones of the limits."""
        matrix, upper = [self._equal], [self._sides]
        lower = [self._sides]
        for index in np.flatnonzero(np.isfinite(limits)):
            costs = self.spread([table.costs[:, index] for table in self.tables])
            size = max(abs(limits[index]), float(np.abs(costs).max(initial=0))) or 1.0
            matrix.append(csr_array(costs[None] * (_SCALE / size)))
            upper.append(np.array([limits[index] * (_SCALE / size)]))
            lower.append(np.array([-np.inf]))
        return milp(
            objective,
            integrality=np.ones(len(objective), np.intp),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(
                vstack(matrix, format="csr"), np.concatenate(lower), np.concatenate(upper)
            ),
            # presolve compares columns pairwise, for longer than the programme takes without,
            # and does not look at the clock
            options={"time_limit": seconds, "mip_rel_gap": gap, "presolve": False},
        )

    def read(self, solution: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the values of the variables and the chosen rows of the tables."""
        values = [
            int(np.argmax(solution[a:b])) for a, b in zip(self._x, self._x[1:], strict=False)
        ]
        options = [
            int(kept[np.argmax(solution[start : start + len(kept)])])
            for kept, start in zip(self._rows, self._z, strict=False)
        ]
        return tuple(values), tuple(options)

    def explain(self, limits: Array) -> LimitError | ParameterError:
        """Return why nothing meets the limits: the first that fails alone or after others."""
        if np.isfinite(self._most):  # what fails may have lost its rows to that
            return _useless(self._most)
        finite: list[int] = np.flatnonzero(np.isfinite(limits)).tolist()
        free = np.full(len(limits), np.inf)
        if self.minimise(np.zeros(self._z[-1]), free, _EXPLAIN_S, 0.0).x is None:
            return ParameterError("allocate: the tables agree on no values of the variables")
        after = [(finite[:place], index) for place, index in enumerate(finite)]
        for held, index in [([], index) for index in finite] + after:
            under = free.copy()
            under[held] = limits[held]
            costs = self.spread([table.costs[:, index] for table in self.tables])
            size = float(np.abs(costs).max(initial=0)) or 1.0
            result = self.minimise(costs * (_SCALE / size), under, _EXPLAIN_S, 0.0)
            if result.x is None:
                break
            smallest = float(totals(self.tables, self.read(result.x)[1])[1][index])
            if smallest > limits[index]:
                besides = f" under limits {held}" if held else ""
                return LimitError(
                    f"limit {index} is {limits[index]:g}, but the smallest cost within reach"
                    f"{besides} is {smallest:g}; raise this limit or allow more options"
                )
        return LimitError(f"the limits {limits.tolist()} cannot be met together; raise some")
