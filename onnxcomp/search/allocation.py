"""From measured losses to one plan: a multiple-choice knapsack over widths and forms.

Widths of channel groups are shared variables; every linear node is a table over the widths on
its two sides and its own form, with its exact MACs, parameters and bytes there.  Two
programmes are solved: the first finds the least loss within the limits; the second, where the
target's grid is used, the least predicted time among plans that lose little more than that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.deadline import Deadline
from onnxcomp.errors import LimitError
from onnxcomp.numerics.knapsack import Allocation, SolverTimeoutError, allocate
from onnxcomp.numerics.option_tables import Table
from onnxcomp.passes.base import Option
from onnxcomp.search.losses import Losses
from onnxcomp.search.settings import Limits, Row
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.tables import Rows, Tables

_ROUNDS = 3  # times the budget is corrected for nodes that more than two groups touch
_GAP = 5e-3  # of the optimum; losses are measured to a few per cent
_PATIENT = 5.0  # times its limit, where a programme found nothing in time
# Widths of a group in one programme; a node between two groups is a table over all pairs.
_LONE_WIDTHS, _SHARED_WIDTHS = 64, 32
_LOSS, _SECONDS = 0, 1  # columns of a programme's measures; MACs, parameters, bytes follow
NAMES = ("loss", "predicted time", "MACs", "parameters", "file bytes")


@dataclass(frozen=True)
class _Goal:
    """What a programme minimises, and the loss that it may reach.

    Attributes:
        column: `_LOSS` or `_SECONDS`.
        loss: Bound on the sum of losses, and so on that of every single option.
    """

    column: int = _LOSS
    loss: float = np.inf

    def of(self, plan: Plan) -> float:
        """Return what is minimised."""
        return plan.loss if self.column == _LOSS else plan.seconds


class Allocator:
    """Chooses plans within limits from one set of measured losses."""

    def __init__(
        self,
        space: Space,
        losses: Losses,
        *,
        time_limit_s: float = 60.0,
        patience: float = 1.0,
    ) -> None:
        """Prepare to choose.

        Args:
            space: The options.
            losses: Their losses.
            time_limit_s: Time limit of the first programme, and of all that look for better
                plans together.
            patience: Factor of the least loss up to which a plan may be preferred for its
                predicted time; 1 asks for the least loss.
        """
        self._space = space
        self._losses = losses
        self._time_limit_s = time_limit_s
        self._patience = patience
        self._names = [n for n in space.widths if losses.widths.get(n)]
        self._tables = Tables(space, losses)

    def choose(self, limits: Limits, *, seconds: float = np.inf, rough: bool = False) -> Plan:
        """Return the plan of least loss within absolute limits, or one little worse.

        Groups with one reader decouple the nodes and are solved first.  The loss found bounds
        the next programme, in which shared groups (residual trunks) take part with those of
        their widths that do not lose more by themselves.

        Args:
            limits: Absolute limits on costs.
            seconds: Limit on the predicted time; without it, patience may prefer speed.
            rough: Leave it at the first programme where that has a solution.

        Raises:
            LimitError: No plan is within them; names the smallest that is.
        """
        bound = np.array([seconds, *limits.row])
        nothing = self._plan({}, {}, 0.0)
        if (self._measure(nothing) <= bound).all():
            return nothing
        lone = [name for name in self._names if self._lone(name)]
        names, best = lone, self._attempt(bound, lone, _Goal())
        if best is not None and rough:
            return best
        spare = Deadline(self._time_limit_s)
        every = self._promising(np.inf if best is None else best.loss)
        if len(every) > len(lone) or best is None:
            goal = _Goal(loss=np.inf if best is None else best.loss)
            found = self._approach(bound, every, goal, best, spare.share(0.5))
            if best is None or found.loss < best.loss:
                names, best = every, found
        if self._patience > 1.0 and np.isinf(seconds):
            goal = _Goal(_SECONDS, best.loss * self._patience)
            best = self._approach(bound, names, goal, best, spare)
        return best

    def fastest(self, loss: float, limits: Limits) -> Plan:
        """Return the plan of least predicted time within absolute limits and a loss.

        Raises:
            LimitError: No plan is within them.
        """
        bound = np.array([np.inf, *limits.row])
        nothing = self._plan({}, {}, 0.0)
        fits = (self._measure(nothing) <= bound).all()
        goal = _Goal(_SECONDS, loss)
        names, best = self._promising(loss), nothing if fits else None
        return self._approach(bound, names, goal, best, Deadline(self._time_limit_s))

    def _lone(self, name: str) -> bool:
        """Whether a group has one reader, so that no trunk shares its width."""
        return len(self._space.groups[name].readers) == 1

    def _promising(self, loss: float) -> list[str]:
        """Return the groups with a single reader, and those that alone lose less."""
        return [
            name
            for name in self._names
            if self._lone(name) or min(self._losses.widths[name].values()) < loss
        ]

    def _attempt(self, bound: Row, names: Sequence[str], goal: _Goal) -> Plan | None:
        try:
            return self._approach(bound, names, goal, None, Deadline(self._time_limit_s))
        except LimitError:
            return None

    def _approach(
        self,
        bound: Row,
        names: Sequence[str],
        goal: _Goal,
        best: Plan | None,
        deadline: Deadline,
    ) -> Plan:
        """Solve until the exact cost of the plan is within the limits, too.

        A node that more than two groups touch is tabulated over two of them; the others are
        assumed at their widths of the round before.

        Args:
            bound: Limits on predicted seconds, MACs, parameters and bytes.
            names: Groups that may change.
            goal: What to minimise.
            best: A plan within the limits to improve on.
            deadline: When to leave it at the best plan, once there is one.

        Raises:
            LimitError: There is no plan, and `best` is None.
        """
        assumed: dict[str, int] = {}
        slack = np.zeros(len(bound))
        for _ in range(_ROUNDS):
            if best is not None and deadline.passed:
                return best
            left = None if best is None else deadline.left
            try:
                plan, estimate = self._solve(bound + slack, names, assumed, goal, left)
            except LimitError as error:
                if best is not None:
                    return best
                raise LimitError(_spelled(str(error))) from error
            actual = self._measure(plan)
            if (actual <= bound).all() and (best is None or goal.of(plan) < goal.of(best)):
                best = plan
            if best is not None and np.allclose(estimate, actual, rtol=1e-3):
                return best
            slack = np.where(np.isfinite(bound), estimate - actual, 0.0)
            assumed = dict(plan.widths)
        if best is None:
            raise LimitError("no plan within the limits was found; relax them a little")
        return best

    def smallest(self, limits: Limits, *, seconds: float = np.inf) -> Plan:
        """Return the plan nearest to absolute limits that cannot be met.

        The limits are raised together, by a common factor, until a plan is within them.
        """
        best = self._plan({}, {}, 0.0)
        bound, whole = np.array([seconds, *limits.row]), self._measure(best)
        low, high = 0.0, 1.0  # share of the way from the limits to the original
        for _ in range(6):
            share = (low + high) / 2
            first, *rest = (
                limit + share * (size - limit) if np.isfinite(limit) else None
                for limit, size in zip(bound.tolist(), whole.tolist(), strict=True)
            )
            try:
                best = self.choose(Limits(*rest), seconds=np.inf if first is None else first)
                high = share
            except LimitError:
                low = share
        return best

    def _plan(
        self, widths: Mapping[str, int], forms: Mapping[str, Option], loss: float
    ) -> Plan:
        space = self._space
        return Plan(
            widths, forms, loss, space.cost(widths, forms), space.seconds(widths, forms)
        )

    def _measure(self, plan: Plan) -> Row:
        """Return predicted seconds, MACs, parameters and bytes."""
        size = self._space.file_bytes(plan.cost, plan.forms)
        row = [plan.seconds, plan.cost.macs, plan.cost.params, size]
        return np.array(row, np.float64)

    def _solve(
        self,
        bound: Row,
        names: Sequence[str],
        assumed: Mapping[str, int],
        goal: _Goal,
        seconds: float | None,
    ) -> tuple[Plan, Row]:
        """Solve one programme; return its plan and what it believes the plan costs.

        Args:
            bound: Limits on predicted seconds, MACs, parameters and bytes.
            names: Groups that may change.
            assumed: Widths of groups where a table has no room for them.
            goal: What to minimise.
            seconds: Time limit; None allows as much as it takes to find anything.
        """
        domains = {name: self._domain(name, goal.loss) for name in names}
        index = {name: i for i, name in enumerate([*names, *self._tables.choices])}
        linears = list(self._space.facts.linears.values())
        rows = [
            self._tables.of_node(linear, domains, index, assumed, goal.loss)
            for linear in linears
        ]
        rows += [self._tables.of_group(name, domains[name], index[name]) for name in names]
        rows += [
            self._tables.of_repetition(name, domains, index, assumed)
            for name in self._tables.choices
        ]
        rest = self._rest(domains)
        tables = [table.table(goal.column) for table in [*rows, rest]]
        sizes = [len(domains[n]) for n in names]
        sizes += [len(choices) for choices in self._tables.choices.values()]
        # a bound on what is minimised is no limit beside it
        loss, most = (np.inf, goal.loss) if goal.column == _LOSS else (goal.loss, np.inf)
        found = self._allocate(sizes, tables, np.array([loss, *bound]), most, seconds)
        widths = {
            name: domains[name][value]
            for name, value in zip(names, found.values, strict=False)
            if domains[name][value] < self._space.groups[name].size
        }
        chosen = [t.options[row] for t, row in zip(rows, found.options, strict=False)]
        taken = [(n, o) for n, o in zip(linears, chosen, strict=False) if o is not None]
        unfit = {option for n, option in taken if not self._still_fits(n, option, widths)}
        forms = {linear.id: option for linear, option in taken if option not in unfit}
        return self._plan(widths, forms, float(found.costs[0])), found.costs[1:]

    def _domain(self, name: str, loss: float) -> tuple[int, ...]:
        """Return those of a group's evenly picked widths that lose no more than `loss`."""
        losses = self._losses.widths[name]
        widths = sorted(losses)
        most = _LONE_WIDTHS if self._lone(name) else _SHARED_WIDTHS
        if len(widths) >= most:
            picked = np.linspace(0, len(widths) - 1, most - 1).round().astype(int)
            widths = [widths[i] for i in picked]
        fit = [width for width in widths if losses[width] <= loss]
        return (*fit, self._space.groups[name].size)

    def _allocate(
        self,
        sizes: Sequence[int],
        tables: Sequence[Table],
        limits: Row,
        most: float,
        seconds: float | None,
    ) -> Allocation:
        """Solve in so many seconds; without, in as many as it takes to find anything."""

        def solved(seconds: float) -> Allocation:
            return allocate(
                sizes, tables, limits, time_limit_s=seconds, relative_gap=_GAP, most=most
            )

        if seconds is not None:
            return solved(seconds)
        try:
            return solved(self._time_limit_s)
        except SolverTimeoutError:
            return solved(_PATIENT * self._time_limit_s)

    def _rest(self, domains: Mapping[str, tuple[int, ...]]) -> Rows:
        """Return a table of one row: what no plan changes."""
        index = {name: i for i, name in enumerate(domains)}
        whole = self._measure(self._plan({}, {}, 0.0))
        for linear in self._space.facts.linears.values():
            own = self._space.steps(linear, None, linear.in_channels, linear.out_channels)
            costs = self._tables.step_costs(linear, None, own)
            whole -= (self._space.target.chain_seconds(own), *costs)
        for name, domain in domains.items():
            whole -= self._tables.of_group(name, domain, index[name]).measures[-1, 1:]
        return Rows((), np.zeros((1, 0), np.int64), np.array([[0.0, *whole]]), [None])

    def _still_fits(self, linear: Linear, option: Option, widths: Mapping[str, int]) -> bool:
        """Whether an option is possible where a third group has another width than assumed."""
        inputs, outputs = self._space.input_side(linear), self._space.output_side(linear)
        return self._tables.allowed(
            linear, option, outputs.width(widths), inputs.width(widths)
        )


def _spelled(message: str) -> str:
    """Return a message of the knapsack with its limits by name."""
    for index, name in enumerate(NAMES):
        message = message.replace(f"limit {index}", f"the limit on {name}")

    def named(match: re.Match[str]) -> str:
        names = [NAMES[int(index)] for index in match[1].split(",")]
        return f"under the limits on {' and '.join(names)}"

    return re.sub(r"under limits \[([\d, ]+)\]", named, message)
