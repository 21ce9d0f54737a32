"""The state that channel rules work on: labels of tensor axes, uses of weights, fix-ups.

A label is an atom (`atoms.py`) per position of an axis.  Rules (`channel_rules.py`,
`layout_rules.py`) read the labels of a node's inputs and write those of its outputs; they
join atoms that can only vanish together and pin those that must stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnxcomp.analysis.atoms import Atoms, IntArray
from onnxcomp.analysis.constants import Constants
from onnxcomp.analysis.shape_values import CONSTANT, UNKNOWN, Axis, Element, ShapeValues
from onnxcomp.model import Array, Model, Node
from onnxcomp.runtime import TensorFact


@dataclass(frozen=True, eq=False)
class ConstantUse:
    """An axis of a constant, as one reader sees it.

    Attributes:
        node: The reading node.
        index: Its input that reads the constant.
        tensor: The initializer or `Constant`.
        axis: The axis that carries channels.
        labels: One label per position of that axis.
        reads: Whether the node takes its incoming channels along this axis of its weight.
    """

    node: str
    index: int
    tensor: str
    axis: int
    labels: IntArray
    reads: bool = False


@dataclass(frozen=True)
class Count:
    """A number in the graph that counts channels.

    It is the number of positions that are left among [low, high) of (tensor, axis), divided
    by `per`.

    Attributes:
        node: The node that reads the number.
        where: The input or the attribute that holds it.
        element: Which number of that vector; 0 for a scalar.
        tensor: Tensor whose positions are counted.
        axis: Axis of that tensor.
        low: First position that counts.
        high: One behind the last position that counts.
        per: Positions per counted unit.
    """

    node: str
    where: int | str
    element: int
    tensor: str
    axis: int
    low: int
    high: int
    per: int = 1


@dataclass(frozen=True)
class Remap:
    """Indices of a Gather that select positions of (tensor, axis)."""

    node: str
    index: int
    tensor: str
    axis: int


class ChannelFlow:
    """Labels of a model while it is walked front to back.

    Args:
        model: The model.
        tensors: Facts of one run.
    """

    def __init__(self, model: Model, tensors: Mapping[str, TensorFact]) -> None:
        self.model = model
        self.constants = Constants(model)
        self.shapes = ShapeValues(self.constants, tensors)
        self.atoms = Atoms()
        self.labels: dict[Axis, IntArray] = {}
        self.uses: list[ConstantUse] = []
        self.producers: dict[str, Axis] = {}
        self.fixes: list[Count | Remap] = []
        self._tensors = tensors
        self._tied: dict[Axis, IntArray] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in the run."""
        return self._tensors[name].shape

    def known(self, node: Node) -> bool:
        """Tell whether the run showed all tensors around a node."""
        return all(name in self._tensors for name in (*node.inputs, *node.outputs) if name)

    def get(self, name: str, axis: int) -> IntArray | None:
        """Return the labels of an axis, or None where it carries no channels."""
        return self.labels.get((name, axis))

    def carried(self, name: str) -> dict[int, IntArray]:
        """Return the labels of all axes of a tensor that carry channels."""
        rank = len(self._tensors[name].shape) if name in self._tensors else 0
        found = ((axis, self.get(name, axis)) for axis in range(rank))
        return {axis: ids for axis, ids in found if ids is not None}

    def put(self, name: str, axis: int, ids: IntArray | None) -> None:
        """Label an axis of a node's output."""
        if ids is not None and name:
            self.labels[name, axis] = ids

    def pin_tensor(self, name: str, reason: str) -> None:
        """Keep all channels of a tensor, for the given reason."""
        for ids in self.carried(name).values():
            self.atoms.pin(ids, reason)

    def pin_inputs(self, node: Node, reason: str) -> None:
        """Keep all channels that a node reads."""
        for name in (*node.inputs, *sorted(node.captured)):
            self.pin_tensor(name, reason)

    def carry(
        self,
        node: Node,
        axes: Mapping[int, int],
        reason: str,
        *,
        outputs: Sequence[str] | None = None,
    ) -> None:
        """Hand labels of a node's first input to its outputs.

        Args:
            node: The node.
            axes: Output axis of each input axis that keeps its channels.
            reason: Why other axes that carry channels are pinned.
            outputs: The outputs that receive them; the first if None.
        """
        for axis, ids in self.carried(node.input(0)).items():
            if axis not in axes:
                self.atoms.pin(ids, f"{reason} at {node.op} '{node.name}'")
                continue
            for name in node.outputs[:1] if outputs is None else outputs:
                self.put(name, axes[axis], ids)

    def merge(self, node: Node, sites: Iterable[tuple[int, int]]) -> IntArray | None:
        """Join the channels of several inputs, position by position.

        Constants are sliced along; channels that meet a tensor without any are pinned.

        Args:
            node: The node.
            sites: (input, axis) that lie on one output axis, all of its size.

        Returns:
            The labels of the output axis; None where no input carries any.
        """
        labelled = [(i, a, self.get(node.input(i), a)) for i, a in sites]
        ids = next((found for *_, found in labelled if found is not None), None)
        if ids is None:
            return None
        for index, axis, found in labelled:
            if found is not None:
                self.atoms.join(ids, found)
            elif self.constants.origin(node.input(index)) is not None:
                self.use(node, index, axis, ids)
            else:
                reason = (
                    f"{node.op} '{node.name}' joins it with untracked '{node.input(index)}'"
                )
                self.atoms.pin(ids, reason)
        return ids

    def weight(self, node: Node, index: int) -> Array | None:
        """Return a constant operand, or None where it is computed at run time."""
        origin = self.constants.origin(node.input(index))
        return None if origin is None else self.constants.array(origin)

    def use(
        self, node: Node, index: int, axis: int, ids: IntArray, *, reads: bool = False
    ) -> None:
        """Say which labels a reader sees along one axis of a constant."""
        origin = self._origin(node, index)
        reason = self.constants.exposed(origin)
        if reason is not None:
            self.atoms.pin(ids, reason)
        self.uses.append(ConstantUse(node.id, index, origin, axis, ids, reads))

    def read(self, node: Node, index: int, axis: int, ids: IntArray | None) -> None:
        """Let a weighted node read channels along one axis of its weight.

        All readers of a weight act together: their channels are joined.
        """
        origin = self._origin(node, index)
        if ids is None:
            if len(self.constants.sites(origin)) == 1:
                return
            size = self.constants.array(origin).shape[axis]
            data = node.input(0 if index else 1)
            reason = f"{node.op} '{node.name}' reads it from untracked '{data}'"
            ids = self.atoms.fresh(size, reason)
        self._tie((origin, axis), ids)
        self.use(node, index, axis, ids, reads=True)

    def make(self, node: Node, index: int, axis: int) -> IntArray:
        """Return the channels that a weighted node makes along one axis of its weight."""
        origin = self._origin(node, index)
        if (origin, axis) not in self._tied:
            self._tied[origin, axis] = self.atoms.fresh(
                self.constants.array(origin).shape[axis]
            )
        ids = self._tied[origin, axis]
        self.use(node, index, axis, ids)
        return ids

    def follow(self, node: Node, index: int, axis: int, ids: IntArray) -> None:
        """Let one axis of a weight follow channels that pass through its node."""
        origin = self._origin(node, index)
        self._tie((origin, axis), ids)
        self.use(node, index, axis, ids)

    def produce(self, node: Node, axis: int, ids: IntArray) -> None:
        """Label the output axis whose channels a weighted node makes."""
        self.put(node.id, axis, ids)
        self.producers[node.id] = (node.id, axis)

    def number(self, node: Node, where: int | str, element: int, counted: Count) -> None:
        """Keep a number in step with the channels that it counts, or pin them.

        A constant is recorded to be rewritten.  The size of another axis follows by itself
        once its channels are joined with the counted ones.
        """
        ids = self.labels[counted.tensor, counted.axis][counted.low : counted.high]
        origin = CONSTANT
        if not isinstance(where, str) and node.input(where):
            origin = self.element(node.input(where), element)
        other = None if origin.dim is None else self.labels.get(origin.dim)
        if origin.constant:
            self.fixes.append(counted)
        elif other is not None and len(other) == len(ids) and counted.per == 1:
            self.atoms.join(other, ids)
        else:
            reason = f"{node.op} '{node.name}' computes their number"
            self.atoms.pin(ids, reason)
            self.pin_sizes(origin, reason)

    def element(self, name: str, element: int) -> Element:
        """Return where one number of a shape tensor comes from."""
        found = self.shapes.elements(name)
        return UNKNOWN if found is None else found.reshape(-1)[element]

    def pin_sizes(self, origin: Element, reason: str) -> None:
        """Keep the channels on whose count a number depends."""
        for axis in origin.depends:
            ids = self.labels.get(axis)
            if ids is not None:
                self.atoms.pin(ids, reason)

    def _origin(self, node: Node, index: int) -> str:
        origin = self.constants.origin(node.input(index))
        assert origin is not None, "rules ask for constants only where they are"
        return origin

    def _tie(self, axis: Axis, ids: IntArray) -> None:
        if axis in self._tied:
            self.atoms.join(self._tied[axis], ids)
        else:
            self._tied[axis] = ids
