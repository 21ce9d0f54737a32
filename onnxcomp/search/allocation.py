"""From measured losses to one plan: a multiple-choice knapsack over widths and forms.

Widths of channel groups are shared variables; every linear node is a table over the widths on
its two sides and its own form, with its exact MACs, parameters and bytes there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.analysis.cost import is_parameter
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.target import Convolution
from onnxcomp.errors import LimitError
from onnxcomp.numerics.knapsack import Table, allocate
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Option
from onnxcomp.passes.factorize import kernel_shape4
from onnxcomp.search.losses import Losses
from onnxcomp.search.settings import Limits, Row
from onnxcomp.search.space import NODE_BYTES, Plan, Space

_ROUNDS = 3  # times the budget is corrected for nodes that more than two groups touch
_GAP = 5e-3  # of the optimum; losses are measured to a few per cent
_TIE = 1e-4  # weight of predicted time among options of equal loss


NAMES = ("MACs", "parameters", "file bytes")


class Allocator:
    """Chooses plans within limits from one set of measured losses."""

    def __init__(self, space: Space, losses: Losses, *, time_limit_s: float = 60.0) -> None:
        self._space = space
        self._losses = losses
        self._time_limit_s = time_limit_s
        self._names = [n for n in space.widths if losses.widths.get(n)]
        self._seconds = sum(
            space.target.seconds(linear.convolution) for linear in space.facts.linears.values()
        )
        self._scale = max([*losses.forms.values(), 1e-12], default=1e-12)

    def choose(self, limits: Limits, *, fast: bool = False) -> Plan:
        """Return the plan of least predicted loss within absolute limits.

        Groups with one reader decouple the nodes and are solved first.  The loss found bounds
        the second programme, in which shared groups (residual trunks) take part with those of
        their widths that do not lose more by themselves.

        Args:
            limits: Absolute limits.
            fast: Leave out the second programme where the first has a solution.

        Raises:
            LimitError: No plan is within them; names the smallest that is.
        """
        if (self._measure({}, {}) <= limits.row).all():
            return Plan({}, {}, 0.0, self._space.facts.cost)
        lone = [n for n in self._names if len(self._space.groups[n].readers) == 1]
        try:
            first: Plan | None = self._approach(limits, lone, np.inf)
        except LimitError:
            first = None
        ceiling = np.inf if first is None else first.loss
        every = [
            name
            for name in self._names
            if name in lone or min(self._losses.widths[name].values()) < ceiling
        ]
        if first is not None and (fast or len(every) == len(lone)):
            return first
        try:
            second = self._approach(limits, every, ceiling)
        except LimitError:
            if first is None:
                raise
            return first
        return second if first is None or second.loss < first.loss else first

    def _approach(self, limits: Limits, names: Sequence[str], ceiling: float) -> Plan:
        """Solve until the exact cost of the plan is within the limits, too.

        A node that more than two groups touch is tabulated over two of them; the others are
        assumed at their widths of the round before.
        """
        bound = limits.row
        assumed: dict[str, int] = {}
        best: Plan | None = None
        slack = np.zeros(3)
        for _ in range(_ROUNDS):
            try:
                plan, estimate = self._solve(bound + slack, names, assumed, ceiling)
            except LimitError as error:
                if best is not None:
                    return best
                raise LimitError(_spelled(str(error))) from error
            actual = self._measure(plan.widths, plan.forms)
            if (actual <= bound).all() and (best is None or plan.loss < best.loss):
                best = plan
            if best is not None and np.allclose(estimate, actual, rtol=1e-3):
                return best
            slack = np.where(np.isfinite(bound), estimate - actual, 0.0)
            assumed = dict(plan.widths)
        if best is None:
            raise LimitError("no plan within the limits was found; relax them a little")
        return best

    def smallest(self, limits: Limits) -> Plan:
        """Return the plan nearest to absolute limits that cannot be met.

        The limits are raised together, by a common factor, until a plan is within them.
        """
        bound, whole = limits.row, self._measure({}, {})
        low, high = 0.0, 1.0  # share of the way from the limits to the original
        best = Plan({}, {}, 0.0, self._space.facts.cost)
        for _ in range(6):
            share = (low + high) / 2
            raised = [
                limit + share * (size - limit) if np.isfinite(limit) else None
                for limit, size in zip(bound.tolist(), whole.tolist(), strict=True)
            ]
            try:
                best = self.choose(Limits(*raised))
                high = share
            except LimitError:
                low = share
        return best

    def _measure(self, widths: Mapping[str, int], forms: Mapping[str, Option]) -> Row:
        cost = self._space.cost(widths, forms)
        return np.array(
            [cost.macs, cost.params, self._space.file_bytes(cost, forms)], np.float64
        )

    def _solve(
        self,
        bound: Row,
        names: Sequence[str],
        assumed: Mapping[str, int],
        ceiling: float,
    ) -> tuple[Plan, Row]:
        """Solve one programme; return its plan and what it believes the plan costs."""
        domains = {
            name: (
                *sorted(w for w, lost in self._losses.widths[name].items() if lost <= ceiling),
                self._space.groups[name].size,
            )
            for name in names
        }
        index = {name: i for i, name in enumerate(names)}
        tables: list[Table] = []
        rows: list[list[Option | None]] = []
        touched = np.zeros(3)
        for linear in self._space.facts.linears.values():
            table, options, whole = self._node_table(linear, domains, index, assumed, ceiling)
            tables.append(table)
            rows.append(options)
            touched += whole
        for name in names:
            table, whole = self._group_table(name, domains[name], index[name])
            tables.append(table)
            touched += whole
        fixed = self._measure({}, {}) - touched
        tables.append(Table((), np.zeros((1, 0), np.int64), np.zeros(1), fixed[None]))
        found = allocate(
            [len(domains[n]) for n in names],
            tables,
            bound,
            time_limit_s=self._time_limit_s,
            relative_gap=_GAP,
        )
        widths = {
            name: domains[name][value]
            for name, value in zip(names, found.values, strict=True)
            if domains[name][value] < self._space.groups[name].size
        }
        chosen = (options[row] for options, row in zip(rows, found.options, strict=False))
        forms = {
            option.target: option
            for option in chosen
            if option is not None and self._still_fits(option, widths)
        }
        cost = self._space.cost(widths, forms)
        return Plan(widths, forms, found.loss, cost), found.costs

    def _still_fits(self, option: Option, widths: Mapping[str, int]) -> bool:
        """Whether a rank is possible where a third group took another width than assumed."""
        linear = self._space.facts.linears[option.target]
        inputs, outputs = self._space.input_side(linear), self._space.output_side(linear)
        return _fits(linear, option, outputs.width(widths), inputs.width(widths))

    def _node_table(
        self,
        linear: Linear,
        domains: Mapping[str, tuple[int, ...]],
        index: Mapping[str, int],
        assumed: Mapping[str, int],
        ceiling: float,
    ) -> tuple[Table, list[Option | None], Row]:
        """Return a node's table, the option of each row, and its cost as it is."""
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
        states, loss, costs, chosen = [], [], [], []
        for state in np.ndindex(*(len(domains[n]) for n in scope)):
            widths = base | {n: domains[n][v] for n, v in zip(scope, state, strict=True)}
            c, m = inputs.width(widths), outputs.width(widths)
            share = (c / linear.in_channels) * (m / linear.out_channels)
            for option, whole in [(None, 0.0), *candidates]:
                if option is not None and not _fits(linear, option, m, c):
                    continue
                steps = space.steps(linear, option, c, m)
                slow = space.seconds(linear, steps) / self._seconds
                states.append(state)
                loss.append(whole * share + _TIE * self._scale * slow)
                costs.append(self._step_costs(linear, steps))
                chosen.append(option)
        table = Table(
            tuple(index[n] for n in scope),
            np.array(states, np.int64).reshape(len(loss), len(scope)),
            np.array(loss),
            np.array(costs, np.float64),
        )
        own = space.steps(linear, None, linear.in_channels, linear.out_channels)
        return table, chosen, np.array(self._step_costs(linear, own))

    def _step_costs(
        self, linear: Linear, steps: Sequence[Convolution]
    ) -> tuple[float, float, float]:
        """Return MACs, parameters and file bytes of a node written as `steps`."""
        macs, weights = sum(s.macs for s in steps), sum(s.weights for s in steps)
        headers = NODE_BYTES * (len(steps) - 1)
        return float(macs), float(weights), float(weights * linear.dtype.itemsize + headers)

    def _group_table(
        self, name: str, domain: tuple[int, ...], position: int
    ) -> tuple[Table, Row]:
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
        costs = np.stack([0 * sizes, sizes * per_channel, sizes * nbytes], axis=1)
        loss = np.array([self._losses.widths[name].get(w, 0.0) for w in domain])
        table = Table((position,), np.arange(len(domain))[:, None], loss, costs)
        return table, costs[-1]


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
