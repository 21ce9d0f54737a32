"""The original and the compressed network, walked side by side, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.stream import Feeds, Stream
from onnxcomp.model import Array, Use


class Twins:
    """Two streams over the same samples: what a node should give, and what it gets.

    Args:
        facts: Analysis of the working model.
        batches: Fitting samples.
        weights: Weights of the compressed network that differ; further ones are set with
            `current.set_weight` as they are solved.  While there are none, both streams are
            one.
        keep: Tensors that the compressed network holds to the end.
        threads: Batches that are worked on at once.
    """

    def __init__(
        self,
        facts: Analysis,
        batches: Sequence[Feeds],
        *,
        weights: Mapping[str, Array] | None,
        keep: Sequence[str] = (),
        threads: int,
    ) -> None:
        self._facts = facts
        self._model = facts.model
        model, tensors = facts.model, facts.tensors
        self.current = Stream(model, batches, tensors, keep=keep, threads=threads)
        self.original = self.current
        if weights is not None:
            self.original = Stream(model, batches, tensors, threads=threads)
            for name, value in weights.items():
                self.current.set_weight(name, value)

    def advance(self, linear: Linear) -> None:
        """Run both networks up to a node's input."""
        self.original.advance([linear.x])
        if self.current is not self.original:
            self.current.advance([linear.x])

    def inputs(self, linear: Linear) -> list[Array]:
        """Return what the node gets in the compressed network, per batch."""
        return self.current.batches(linear.x)

    def targets(self, linear: Linear) -> list[Array]:
        """Return the original outputs, corrected by what the shortcut beside them lost."""
        targets = self.original.peek(linear.y)
        shortcut = self._shortcut(linear)
        if shortcut and self.current is not self.original:
            wanted, found = self.original.peek(shortcut), self.current.peek(shortcut)
            for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
                targets[index] = targets[index] + (a - b)
        return targets

    def rectified(self, linear: Linear) -> bool:
        """Whether nothing but a Relu reads the node, directly or behind a known shortcut."""
        use = self._only_use(linear.y)
        if use is not None and self._shortcut(linear):
            use = self._only_use(use.node.id)
        return use is not None and use.node.op == "Relu"

    def offsets(self, linear: Linear) -> list[Array] | None:
        """Return what the compressed network adds to the node's output in front of a Relu."""
        shortcut = self._shortcut(linear)
        return self.current.peek(shortcut) if shortcut else None

    def _only_use(self, tensor: str) -> Use | None:
        """Return the use of a tensor that has no other and is no output of the model."""
        uses = self._model.readers.get(tensor, ())
        return uses[0] if len(uses) == 1 and tensor not in self._model.output_names else None

    def _shortcut(self, linear: Linear) -> str:
        """Return the other operand of the Add behind a node, if it is known by now."""
        use = self._only_use(linear.y)
        if use is None or use.node.op != "Add":
            return ""
        other = use.node.inputs[1 - use.index]
        tensors = self._facts.tensors
        if other in self._model.weights or other == linear.y or other not in tensors:
            return ""
        if tensors[other].shape != tensors[linear.y].shape:
            return ""
        order = list(self._facts.linears)
        ahead = set(order[order.index(linear.id) :])
        return "" if self.current.depends(other) & ahead else other
