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
import numpy.typing as npt

from onnxcomp.analysis.cost import is_parameter
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.target import Convolution
from onnxcomp.errors import LimitError
from onnxcomp.numerics.knapsack import Allocation, SolverTimeoutError, Table, allocate
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Option
from onnxcomp.passes.factorize import kernel_shape4
from onnxcomp.search.losses import Losses
from onnxcomp.search.settings import Limits, Row
from onnxcomp.search.space import Plan, Space, header_bytes

_ROUNDS = 3  # times the budget is corrected for nodes that more than two groups touch
_GAP = 5e-3  # of the optimum; losses are measured to a few per cent
_PATIENT = 5.0  # times its limit, where a programme found nothing in time
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


@dataclass(frozen=True)
class _Rows:
    """The rows of one table: states of its variables, measures (n, 5), and options."""

    scope: tuple[int, ...]
    states: npt.NDArray[np.int64]
    measures: Row
    options: list[Option | None]

    def table(self, goal: _Goal) -> Table:
        """Return the table that minimises the goal's column."""
        return Table(self.scope, self.states, self.measures[:, goal.column], self.measures)


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
            time_limit_s: Time limit of one programme.
            patience: Factor of the least loss up to which a plan may be preferred for its
                predicted time; 1 asks for the least loss.
        """
        self._space = space
        self._losses = losses
        self._time_limit_s = time_limit_s
        self._patience = patience
        self._names = [n for n in space.widths if losses.widths.get(n)]

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
        lone = [n for n in self._names if len(self._space.groups[n].readers) == 1]
        names, best = lone, self._attempt(bound, lone, _Goal())
        if best is not None and rough:
            return best
        every = self._promising(np.inf if best is None else best.loss)
        if len(every) > len(lone) or best is None:
            goal = _Goal(loss=np.inf if best is None else best.loss)
            found = self._approach(bound, every, goal, best)
            if best is None or found.loss < best.loss:
                names, best = every, found
        if self._patience > 1.0 and np.isinf(seconds):
            goal = _Goal(_SECONDS, best.loss * self._patience)
            best = self._approach(bound, names, goal, best)
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
        return self._approach(bound, self._promising(loss), goal, nothing if fits else None)

    def _promising(self, loss: float) -> list[str]:
        """Return the groups with a single reader, and those that alone lose less."""
        return [
            name
            for name in self._names
            if len(self._space.groups[name].readers) == 1
            or min(self._losses.widths[name].values()) < loss
        ]

    def _attempt(self, bound: Row, names: Sequence[str], goal: _Goal) -> Plan | None:
        try:
            return self._approach(bound, names, goal, None)
        except LimitError:
            return None

    def _approach(
        self, bound: Row, names: Sequence[str], goal: _Goal, best: Plan | None
    ) -> Plan:
        """Solve until the exact cost of the plan is within the limits, too.

        A node that more than two groups touch is tabulated over two of them; the others are
        assumed at their widths of the round before.

        Args:
            bound: Limits on predicted seconds, MACs, parameters and bytes.
            names: Groups that may change.
            goal: What to minimise.
            best: A plan within the limits to improve on.

        Raises:
            LimitError: There is no plan, and `best` is None.
        """
        assumed: dict[str, int] = {}
        slack = np.zeros(len(bound))
        for _ in range(_ROUNDS):
            try:
                plan, estimate = self._solve(bound + slack, names, assumed, goal)
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
        self, bound: Row, names: Sequence[str], assumed: Mapping[str, int], goal: _Goal
    ) -> tuple[Plan, Row]:
        """Solve one programme; return its plan and what it believes the plan costs."""
        domains = {
            name: (
                *sorted(
                    w for w, lost in self._losses.widths[name].items() if lost <= goal.loss
                ),
                self._space.groups[name].size,
            )
            for name in names
        }
        index = {name: i for i, name in enumerate(names)}
        rows = [
            self._node_rows(linear, domains, index, assumed, goal.loss)
            for linear in self._space.facts.linears.values()
        ]
        rows += [self._group_rows(name, domains[name], index[name]) for name in names]
        rest = self._rest(domains)
        tables = [table.table(goal) for table in [*rows, rest]]
        sizes = [len(domains[n]) for n in names]
        found = self._allocate(sizes, tables, np.array([goal.loss, *bound]))
        widths = {
            name: domains[name][value]
            for name, value in zip(names, found.values, strict=True)
            if domains[name][value] < self._space.groups[name].size
        }
        chosen = (t.options[row] for t, row in zip(rows, found.options, strict=False))
        forms = {
            option.target: option
            for option in chosen
            if option is not None and self._still_fits(option, widths)
        }
        return self._plan(widths, forms, float(found.costs[0])), found.costs[1:]

    def _allocate(
        self, sizes: Sequence[int], tables: Sequence[Table], limits: Row
    ) -> Allocation:
        """Solve, with more time where it ended before anything was found."""
        seconds = self._time_limit_s
        try:
            return allocate(sizes, tables, limits, time_limit_s=seconds, relative_gap=_GAP)
        except SolverTimeoutError:
            seconds *= _PATIENT
            return allocate(sizes, tables, limits, time_limit_s=seconds, relative_gap=_GAP)

    def _rest(self, domains: Mapping[str, tuple[int, ...]]) -> _Rows:
        """Return a table of one row: what no plan changes."""
        index = {name: i for i, name in enumerate(domains)}
        whole = self._measure(self._plan({}, {}, 0.0))
        for linear in self._space.facts.linears.values():
            own = self._space.steps(linear, None, linear.in_channels, linear.out_channels)
            whole -= (self._space.target.chain_seconds(own), *self._step_costs(linear, own))
        for name, domain in domains.items():
            whole -= self._group_rows(name, domain, index[name]).measures[-1, 1:]
        return _Rows((), np.zeros((1, 0), np.int64), np.array([[0.0, *whole]]), [None])

    def _still_fits(self, option: Option, widths: Mapping[str, int]) -> bool:
        """Whether a rank is possible where a third group took another width than assumed."""
        linear = self._space.facts.linears[option.target]
        inputs, outputs = self._space.input_side(linear), self._space.output_side(linear)
        return _fits(linear, option, outputs.width(widths), inputs.width(widths))

    def _node_rows(
        self,
        linear: Linear,
        domains: Mapping[str, tuple[int, ...]],
        index: Mapping[str, int],
        assumed: Mapping[str, int],
        ceiling: float,
    ) -> _Rows:
        """Return a node's options at all widths of the two groups that touch it most."""
        space = self._space
        inputs, outputs = space.input_side(linear), space.output_side(linear)
        weight: dict[str, int] = {}
        for name, positions in (*inputs.parts, *outputs.parts):
            if name in domains:
                weight[name] = weight.get(name, 0) + positions.size
        scope = sorted(weight, key=lambda n: (-weight[n], n))[:2]
        candidates = [
            (option, lost)
            for option in space.forms.get(linear.id, ())
            if (lost := self._losses.forms.get(option)) is not None and lost <= ceiling
        ]
        base = {n: w for n, w in assumed.items() if n not in scope}
        states, measures, options = [], [], []
        for state in np.ndindex(*(len(domains[n]) for n in scope)):
            widths = base | {n: domains[n][v] for n, v in zip(scope, state, strict=True)}
            c, m = inputs.width(widths), outputs.width(widths)
            share = (c / linear.in_channels) * (m / linear.out_channels)
            for option, whole in [(None, 0.0), *candidates]:
                if option is not None and not _fits(linear, option, m, c):
                    continue
                steps = space.steps(linear, option, c, m)
                seconds = space.target.chain_seconds(steps)
                states.append(state)
                measures.append((whole * share, seconds, *self._step_costs(linear, steps)))
                options.append(option)
        return _Rows(
            tuple(index[n] for n in scope),
            np.array(states, np.int64).reshape(len(states), len(scope)),
            np.array(measures, np.float64),
            options,
        )

    def _step_costs(
        self, linear: Linear, steps: Sequence[Convolution]
    ) -> tuple[float, float, float]:
        """Return MACs, parameters and file bytes of a node written as `steps`."""
        macs, weights = sum(s.macs for s in steps), sum(s.weights for s in steps)
        size = weights * linear.dtype.itemsize + header_bytes(linear, len(steps))
        return float(macs), float(weights), float(size)

    def _group_rows(self, name: str, domain: tuple[int, ...], position: int) -> _Rows:
        """Return losses of a group's widths and the parameters that only it carries."""
        group = self._space.groups[name]
        weights = self._space.facts.model.weights
        linear_weights = {li.weight for li in self._space.facts.linears.values()}
        per_channel = nbytes = 0
        for part in group.slices:
            array = weights.get(part.tensor)
            if array is None or part.tensor in linear_weights or not is_parameter(array):
                continue
            each = array.size // array.shape[part.axis] * part.index.shape[1]
            per_channel += each
            nbytes += each * array.itemsize
        sizes = np.array(domain, np.float64)
        loss = np.array([self._losses.widths[name].get(w, 0.0) for w in domain])
        none = np.zeros(len(domain))
        seconds = sizes * self._space.element_seconds[name]
        columns = [loss, seconds, none, sizes * per_channel, sizes * nbytes]
        states = np.arange(len(domain))[:, None]
        return _Rows((position,), states, np.stack(columns, axis=1), [None] * len(domain))


def _fits(linear: Linear, option: Option, out_width: int, in_width: int) -> bool:
    shape = kernel_shape4(linear, out_width, in_width)
    return option.size[0] < FORMS[option.form].max_rank(shape)


def _spelled(message: str) -> str:
    """Return a message of the knapsack with its limits by name."""
    for index, name in enumerate(NAMES):
        message = message.replace(f"limit {index}", f"the limit on {name}")

    def named(match: re.Match[str]) -> str:
        names = [NAMES[int(index)] for index in match[1].split(",")]
        return f"under the limits on {' and '.join(names)}"

    return re.sub(r"under limits \[([\d, ]+)\]", named, message)
