"""The tables of the knapsack: what every node, group and repetition can do, and its costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.cost import is_parameter
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.target import Convolution
from onnxcomp.numerics.option_tables import Table
from onnxcomp.passes.base import Option
from onnxcomp.search.choices import Choice, find_choices
from onnxcomp.search.losses import Losses
from onnxcomp.search.settings import Row
from onnxcomp.search.space import Space, common_weights, fits, header_bytes

Domains = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rows:
    """The rows of one table: states of its variables, measures (n, 5), and options."""

    scope: tuple[int, ...]
    states: npt.NDArray[np.int64]
    measures: Row
    options: list[Option | None]

    def table(self, column: int) -> Table:
        """Return the table that minimises one of the measures."""
        return Table(self.scope, self.states, self.measures[:, column], self.measures)


class Tables:
    """Makes the tables of one search space from measured losses.

    Attributes:
        choices: What each repetition can do with common factors; the first choice is nothing.

    Args:
        space: The options.
        losses: Their losses.
    """

    def __init__(self, space: Space, losses: Losses) -> None:
        self._space = space
        self._losses = losses
        self._headers: dict[tuple[str, Option | None], int] = {}
        self._predicted = cache(space.target.seconds)  # of few shapes there are many rows
        self.choices = find_choices(space, losses.joint.losses)
        self._repetition = {
            node: name
            for name, choices in self.choices.items()
            for choice in choices
            for node in choice
        }

    def of_node(
        self,
        linear: Linear,
        domains: Domains,
        index: Mapping[str, int],
        assumed: Mapping[str, int],
        ceiling: float,
    ) -> Rows:
        """Return a node's options at all widths of the two groups that touch it most."""
        space = self._space
        inputs, outputs = space.input_side(linear), space.output_side(linear)
        weight: dict[str, int] = {}
        for name, positions in (*inputs.parts, *outputs.parts):
            if name in domains:
                weight[name] = weight.get(name, 0) + positions.size
        scope = sorted(weight, key=lambda n: (-weight[n], n))[:2]
        candidates = self._candidates(linear, ceiling)
        repetition = self._repetition.get(linear.id)
        base = {n: w for n, w in assumed.items() if n not in scope}
        states, measures, options = [], [], []
        for state in np.ndindex(*(len(domains[n]) for n in scope)):
            widths = base | {n: domains[n][v] for n, v in zip(scope, state, strict=True)}
            c, m = inputs.width(widths), outputs.width(widths)
            share = (c / linear.in_channels) * (m / linear.out_channels)
            for value, option, whole in candidates:
                if option is not None and not self.allowed(linear, option, m, c):
                    continue
                steps = space.steps(linear, option, c, m)
                seconds = sum(map(self._predicted, steps))
                states.append((*state, value)[: len(state) + (repetition is not None)])
                costs = self.step_costs(linear, option, steps)
                measures.append((whole * share, seconds, *costs))
                options.append(option)
        variables = [*scope, *([] if repetition is None else [repetition])]
        return Rows(
            tuple(index[n] for n in variables),
            np.array(states, np.int64).reshape(len(states), len(variables)),
            np.array(measures, np.float64),
            options,
        )

    def _candidates(
        self, linear: Linear, ceiling: float
    ) -> list[tuple[int, Option | None, float]]:
        """Return a node's options and losses, each with the value of its repetition."""
        forms, joint = self._losses.forms, self._losses.joint.losses
        own = [(o, forms[o]) for o in self._space.forms.get(linear.id, ()) if o in forms]
        found: list[tuple[int, Option | None, float]] = []
        choices: Sequence[Choice] = ({},)
        if linear.id in self._repetition:
            choices = self.choices[self._repetition[linear.id]]
        for value, choice in enumerate(choices):
            option = choice.get(linear.id)
            if option is not None:
                found.append((value, option, joint[linear.id, option]))
            else:
                found += [(value, None, 0.0), *((value, o, lost) for o, lost in own)]
        return [row for row in found if row[2] <= ceiling]

    def allowed(self, linear: Linear, option: Option, m: int, c: int) -> bool:
        """Return whether a factorisation is possible where `m` outputs and `c` inputs stay.

        The sides that common factors touch must keep the same channels at all members.
        """
        if not fits(linear, option, m, c):
            return False
        inputs, outputs = self._space.common_sides(option)
        return (inputs or c == linear.in_channels) and (outputs or m == linear.out_channels)

    def step_costs(
        self, linear: Linear, option: Option | None, steps: Sequence[Convolution]
    ) -> tuple[float, float, float]:
        """Return MACs, and parameters and file bytes of its own, of a node as `steps`."""
        macs, weights = sum(s.macs for s in steps), sum(s.weights for s in steps)
        if option is not None and steps:
            m, c = steps[-1].out_channels, steps[0].in_channels
            weights -= common_weights(linear, option, m, c)
        elif not steps:  # the bias goes, too
            weights -= linear.out_channels
        size = weights * linear.dtype.itemsize + self._header(linear, option)
        return float(macs), float(weights), float(size)

    def _header(self, linear: Linear, option: Option | None) -> int:
        key = linear.id, option
        if key not in self._headers:
            self._headers[key] = header_bytes(linear, option)
        return self._headers[key]

    def of_repetition(
        self,
        name: str,
        domains: Domains,
        index: Mapping[str, int],
        assumed: Mapping[str, int],
    ) -> Rows:
        """Return what each choice of a repetition stores once, at the widths beside it."""
        space, choices = self._space, self.choices[name]
        linear = space.facts.linears[next(node for choice in choices for node in choice)]
        inputs, outputs = space.input_side(linear), space.output_side(linear)
        names = dict.fromkeys(n for n, _ in (*inputs.parts, *outputs.parts) if n in domains)
        scope = list(names)[:2]
        base = {n: w for n, w in assumed.items() if n not in scope}
        states, measures = [], []
        for state in np.ndindex(*(len(domains[n]) for n in scope)):
            widths = base | {n: domains[n][v] for n, v in zip(scope, state, strict=True)}
            m, c = outputs.width(widths), inputs.width(widths)
            for value, choice in enumerate(choices):
                common = sum(
                    common_weights(linear, option, m, c) for option in set(choice.values())
                )
                states.append((*state, value))
                measures.append((0, 0, 0, common, common * linear.dtype.itemsize))
        variables = tuple(index[n] for n in (*scope, name))
        table = np.array(measures, np.float64)
        return Rows(variables, np.array(states, np.int64), table, [None] * len(table))

    def of_group(self, name: str, domain: tuple[int, ...], position: int) -> Rows:
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
        return Rows((position,), states, np.stack(columns, axis=1), [None] * len(domain))
