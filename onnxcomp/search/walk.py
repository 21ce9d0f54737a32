"""The walk front to back that solves a plan's arrays and writes the compressed model.

Each linear node is refitted, in closed form, on the compressed network's own inputs against
the original network's outputs.  The last node in front of a residual Add also takes over the
error of the other branch.  During the walk nothing changes its shape: removed channels are
zero columns of their readers and a factorised node is its dense product, which is the same
function; the structure is written once, at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import (
    SecondMoments,
    collect_moments,
    grouped,
    identity_moments,
)
from onnxcomp.analysis.stream import Feeds, Stream
from onnxcomp.errors import DataError
from onnxcomp.model import Array, Model
from onnxcomp.passes.base import Arrays, Option
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.search.losses import Losses, Progress, like_bias, without_inputs
from onnxcomp.search.space import Plan, Space

_log = logging.getLogger(__name__)
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Solved:
    """What the walk found for one node.

    Attributes:
        kernel: Dense kernel of the original shape, zero where nothing is left.
        bias: Bias of the original shape, or None where the node keeps its own.
        factors: Kernels of the chain at the widths that remain, for a factorised node.
    """

    kernel: Array
    bias: Array | None
    factors: Arrays | None = None


class Walk:
    """Solves one plan.

    Args:
        space: The search space that the plan was chosen from.
        plan: What to do.
        losses: Measured losses, for the order in which channels go.
        batches: Fitting samples.
        seed: Seed of the sampled positions.
        threads: Threads of every session.
        progress: Called with a label and the share done.
        data_aware: Refit every node in the metric of the samples, or change only the nodes
            of the plan, from their weights alone.
    """

    def __init__(
        self,
        space: Space,
        plan: Plan,
        losses: Losses,
        batches: Sequence[Feeds],
        *,
        seed: int,
        threads: int,
        progress: Progress,
        data_aware: bool = True,
    ) -> None:
        self._space = space
        self._facts: Analysis = space.facts
        self._model: Model = space.facts.model
        self._plan = plan
        self._seed = seed
        self._progress = progress
        self._data_aware = data_aware
        self._removed: dict[str, Index] = {
            name: losses.orders[name].order[: space.groups[name].size - width].astype(np.int64)
            for name, width in plan.widths.items()
        }
        tensors = space.facts.tensors
        self._original = Stream(self._model, batches, tensors, threads=threads)
        self._current = Stream(self._model, batches, tensors, threads=threads)
        self._solved: dict[str, Solved] = {}
        self._changed = False

    def run(self) -> Model:
        """Solve all nodes in order and return the compressed model."""
        linears = list(self._facts.linears.values())
        for position, linear in enumerate(linears):
            self._progress(linear.id, position / len(linears))
            self._visit(linear, position)
        return self._write()

    def _visit(self, linear: Linear, position: int) -> None:
        inputs = self._space.input_side(linear).kept(self._removed)
        outputs = self._space.output_side(linear).kept(self._removed)
        option = self._plan.forms.get(linear.id)
        untouched = option is None and len(inputs) == linear.in_channels
        if untouched and (not self._changed or linear.id in self._space.excluded):
            return
        weight = self._model.weights[linear.weight]
        kernel = linear.kernel(weight)
        if len(self._model.readers[linear.weight]) > 1:
            solved = Solved(without_inputs(linear, kernel, inputs), None)
        else:
            metrics = self._metrics(linear, kernel, inputs, outputs, position)
            solved = self._solve(linear, kernel, inputs, outputs, metrics, option)
        self._solved[linear.id] = solved
        self._current.set_weight(linear.weight, linear.stored(solved.kernel))
        if solved.bias is not None:
            old = self._model.weights[linear.bias]
            self._current.set_weight(linear.bias, like_bias(solved.bias, old))
        self._changed = True

    def _metrics(
        self, linear: Linear, kernel: Array, inputs: Index, outputs: Index, position: int
    ) -> tuple[SecondMoments, ...]:
        """Return the moments of the compressed network's inputs and the wanted outputs."""
        bias = np.asarray(self._model.weights[linear.bias], np.float64).reshape(-1)
        alone = identity_moments(linear, kernel, bias, inputs=inputs, outputs=outputs)
        if not self._data_aware:
            return alone
        self._original.advance([linear.x])
        self._current.advance([linear.x])
        rng = np.random.default_rng([self._seed, position])
        xs, targets = self._current.batches(linear.x), self._targets(linear)
        try:
            return collect_moments(linear, xs, targets, rng, inputs=inputs, outputs=outputs)
        except DataError as error:  # such as a mask of -inf in front of the node
            _log.warning("'%s' is not refitted: %s", linear.id, error)
            return alone

    def _targets(self, linear: Linear) -> list[Array]:
        """Return the original outputs, corrected by what the shortcut beside them lost."""
        targets = self._original.peek(linear.y)
        shortcut = self._shortcut(linear)
        if shortcut:
            wanted, found = self._original.peek(shortcut), self._current.peek(shortcut)
            targets = [y + (a - b) for y, a, b in zip(targets, wanted, found, strict=True)]
        return targets

    def _shortcut(self, linear: Linear) -> str:
        """Return the other operand of the Add behind a node, if it is known by now."""
        uses = self._model.readers.get(linear.y, ())
        if len(uses) != 1 or uses[0].node.op != "Add":
            return ""
        other = uses[0].node.inputs[1 - uses[0].index]
        tensors = self._facts.tensors
        if other in self._model.weights or other == linear.y or other not in tensors:
            return ""
        if tensors[other].shape != tensors[linear.y].shape:
            return ""
        ahead = set(self._facts.linears) - set(self._visited(linear))
        return "" if self._original.depends(other) & ahead else other

    def _visited(self, linear: Linear) -> list[str]:
        order = list(self._facts.linears)
        return order[: order.index(linear.id)]

    def _solve(
        self,
        linear: Linear,
        kernel: Array,
        inputs: Index,
        outputs: Index,
        metrics: Sequence[SecondMoments],
        option: Option | None,
    ) -> Solved:
        full = np.zeros_like(kernel)
        bias = np.asarray(self._model.weights[linear.bias], np.float64).reshape(-1).copy()
        factors: Arrays | None = None
        per_in = linear.in_channels // linear.groups
        for metric, (c, m) in zip(metrics, grouped(linear, inputs, outputs), strict=True):
            block = np.ix_(m, c % per_in)
            prior = kernel[block]
            shape = prior.shape
            solved = metric.solve(prior.reshape(len(m), -1)).reshape(shape)
            if option is not None:
                factors, solved = Factorize().fit(option, solved, metric)
            full[block] = solved
            bias[m] = metric.bias(solved.reshape(len(m), -1))
        return Solved(full, bias, factors)

    def _write(self) -> Model:
        """Write weights and structure into the model."""
        draft = self._model.edit()
        for node_id, solved in self._solved.items():
            linear = self._facts.linears[node_id]
            draft.set_weight(linear.weight, linear.stored(solved.kernel))
            if solved.bias is not None:
                old = self._model.weights[linear.bias]
                draft.set_weight(linear.bias, like_bias(solved.bias, old))
        chosen = {
            Option(RemoveChannels.name, name, "", (self._plan.widths[name],)): {
                "removed": removed
            }
            for name, removed in self._removed.items()
        }
        RemoveChannels().apply(draft, self._facts, chosen)
        narrow = draft.seal(by=RemoveChannels.name)
        forms: Mapping[Option, Arrays] = {
            option: self._solved[node_id].factors or {}
            for node_id, option in self._plan.forms.items()
        }
        if not forms:
            return narrow
        draft = narrow.edit()
        Factorize().apply(draft, self._facts, forms)
        return draft.seal(by=Factorize.name)
