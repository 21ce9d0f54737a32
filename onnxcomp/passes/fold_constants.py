"""`FoldConstants`: what does not depend on any input becomes an initializer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxcomp.analysis.quantised import dequantised, is_quantised
from onnxcomp.model import Array, Node
from onnxcomp.passes._evaluate import MAX_ELEMENTS, evaluate
from onnxcomp.passes._graph import GraphView
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

_SMALL_ELEMENTS = 1024
_WEIGHT_INPUTS: dict[str, frozenset[int]] = {
    "Conv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "Gemm": frozenset({1, 2}),
    "MatMul": frozenset({0, 1}),
    "BatchNormalization": frozenset({1, 2, 3, 4}),
    "InstanceNormalization": frozenset({1, 2}),
    "LayerNormalization": frozenset({1, 2}),
    "PRelu": frozenset({1}),
    "RNN": frozenset({1, 2, 3}),
    "GRU": frozenset({1, 2, 3}),
    "LSTM": frozenset({1, 2, 3}),
}


@dataclass(frozen=True)
class FoldConstants:
    """Evaluates nodes whose inputs are all constant, by a fixed list of operators.

    A result is kept where it has at most 1024 elements, takes no more bytes than what goes
    away with it, or is a weight of a linear, recurrent or normalising node.  Of weights that
    are joined from parts, common parts are not copied; those of quantised nodes, which take
    dequantised data as well, stay in integers.
    """

    name: ClassVar[str] = "fold_constants"
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return an option or a refusal for every node whose inputs are all constant."""
        folding = _Folding(GraphView(facts.model))
        options = tuple(
            Option(self.name, node.id)
            for node in folding.candidates
            if node.id not in folding.refusals
        )
        refusals = (Refusal(where, reason) for where, reason in folding.refusals.items())
        return Proposal(options, tuple(refusals))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Put initializers in the place of the outputs of chosen nodes."""
        folding = _Folding(GraphView(facts.model))
        targets = {option.target for option in chosen}
        for node in folding.candidates:
            if node.id not in targets:
                continue
            for name in node.outputs:
                if name:
                    draft.rewire(name, draft.add_weight(name, folding.values[name]))


class _Folding:
    """Which nodes of a model are constant, their values, and which of them stay and why."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self.values: dict[str, Array] = dict(view.model.weights)
        self._room = MAX_ELEMENTS + 2 * sum(v.size for v in self.values.values())
        self.candidates: list[Node] = []
        self.refusals: dict[str, str] = {}
        for node in view.live:
            self._evaluate(node)
        self._folded: set[str] = set()
        self._quantised = _quantised_weights(view)
        self._decide()

    def _evaluate(self, node: Node) -> None:
        names = [name for name in node.inputs if name]
        if not all(name in self.values for name in names) or node.captured:
            return
        self.candidates.append(node)
        inputs = [self.values.get(name) for name in node.inputs]
        try:
            limit = min(self._room, MAX_ELEMENTS)
            outputs = evaluate(node, inputs, self._view.model.opset, limit)
        except ValueError as error:
            self.refusals[node.id] = str(error)
            return
        self._room -= sum(output.size for output in outputs)
        self.values.update(
            (name, value) for name, value in zip(node.outputs, outputs, strict=True) if name
        )

    def _decide(self) -> None:
        """Fold from the outputs backward until nothing changes: folding frees constants."""
        waiting = [n for n in reversed(self.candidates) if n.id not in self.refusals]
        while True:
            reasons = {node.id: self._reason_to_stay(node) for node in waiting}
            left = [node for node in waiting if reasons[node.id] is not None]
            if len(left) == len(waiting):
                break
            waiting = left
        self.refusals.update((key, reason) for key, reason in reasons.items() if reason)

    def _reason_to_stay(self, node: Node) -> str | None:
        view = self._view
        if node.id in self._quantised:
            return "it makes a weight of a quantised node"
        names = [name for name in node.outputs if name]
        for name in names:
            if (reason := view.fixed(name)) is not None:
                return reason
        kept = [n for n in names if any(u.node.id not in self._folded for u in view.uses(n))]
        added = sum(self.values[name].nbytes for name in kept)
        freed = self._freed(node)
        small = sum(self.values[name].size for name in kept) <= _SMALL_ELEMENTS
        stored = node.op == "Constant" or all(self._is_weight(name) for name in kept)
        joined = stored and node.op == "Concat" and self._shares(node)
        if ((small or stored) and not joined) or added <= freed:
            self._folded.add(node.id)
            return None
        return f"as an initializer it would make the file {added - freed} bytes larger"

    def _is_weight(self, name: str) -> bool:
        """Say whether some node that stays reads a tensor as its weight."""
        return any(
            use.index in _WEIGHT_INPUTS.get(use.node.op, ())
            for use in self._view.uses(name)
            if use.node.id not in self._folded
        )

    def _shares(self, node: Node) -> bool:
        """Say whether another node that stays reads an initializer that a node reads."""
        weights = self._view.model.weights
        uses = (use for n in node.inputs if n in weights for use in self._view.uses(n))
        return any(use.node.id not in {node.id, *self._folded} for use in uses)

    def _freed(self, node: Node) -> int:
        """Return the bytes of the constants that go from the file together with a node.

        A small result counts as stored, as it becomes an initializer where it is needed.
        """
        view, total = self._view, 0
        waiting, seen = [(name, node) for name in node.inputs], {""}
        while waiting:
            name, reader = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            others = (u for u in view.uses(name) if u.node.id not in self._folded)
            if view.fixed(name) or any(use.node.id != reader.id for use in others):
                continue
            value, maker = self.values[name], view.model.producers.get(name)
            if maker is None or maker.op == "Constant" or value.size <= _SMALL_ELEMENTS:
                total += value.nbytes
            else:
                waiting += [(i, maker) for i in maker.inputs]
        return total


def _quantised_weights(view: GraphView) -> frozenset[str]:
    """Return the nodes between the integers of a quantised node's weights and that node."""
    model = view.model
    return frozenset(
        maker.id
        for node in view.live
        if node.op in _WEIGHT_INPUTS and is_quantised(model, node)
        for index in _WEIGHT_INPUTS[node.op]
        for maker in dequantised(model, node.input(index))
    )
