"""Which initializers are trained, and why the others that layers read are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from onnxcomp.model import Array, Model, Node

_WEIGHTED: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": (0, 1, 2, 3),
    "Gemm": (0, 1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
}
_BY_CHANNEL = ("Add", "Mul")
STATISTICS: Mapping[str, tuple[int, ...]] = {"BatchNormalization": (3, 4)}
# What moves values without changing them, and where the moved tensors are.
_MOVES: Mapping[str, slice] = {
    "Concat": slice(None),
    **dict.fromkeys(
        (
            *("Cast", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice"),
            *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
        ),
        slice(0, 1),
    ),
}
# Operators behind which a channel stays on its axis, counted from the last.
_KEEPS_AXES = frozenset(
    {
        *("Add", "AveragePool", "BatchNormalization", "Clip", "Div", "Dropout", "Elu", "Erf"),
        *("Gelu", "GlobalAveragePool", "GlobalMaxPool", "GroupNormalization", "HardSigmoid"),
        *("HardSwish", "Identity", "InstanceNormalization", "LRN", "LayerNormalization"),
        *("LeakyRelu", "MaxPool", "Mish", "Mul", "PRelu", "Pow", "Relu", "Selu", "Sigmoid"),
        *("Softplus", "Sqrt", "Sub", "Swish", "Tanh", "Upsample", "Resize", "Pad"),
    }
)


@dataclass(frozen=True)
class Roles:
    """What the float initializers of a model are to its layers.

    Attributes:
        trained: Names of those that become Parameters, in the order of the file.
        untrained: Why a layer's weight is none, by its name.
        statistics: Means and variances of BatchNormalization that are initializers.
    """

    trained: tuple[str, ...]
    untrained: Mapping[str, str]
    statistics: frozenset[str]


def find_roles(
    model: Model, nodes: Sequence[Node], shapes: Mapping[str, tuple[int, ...]]
) -> Roles:
    """Return the roles of a model's initializers.

    An initializer is trained where it reaches a weighted input of a layer, directly or through
    nodes that only move values; as an operand of Add and Mul where it has one entry for every
    channel of the layer in front.  Everything else keeps its value: constants of
    preprocessing and of decoding look like weights, but are none.

    Args:
        model: The model.
        nodes: Those of its nodes that count.
        shapes: Shapes of all tensors that depend on no graph input.
    """
    finding = _Finding(model, shapes, _channel_axes(nodes, shapes))
    statistics: set[str] = set()
    for node in nodes:
        for index in finding.weighted_inputs(node):
            finding.trace(node.input(index))
        statistics.update(origin(model, node.input(i)) for i in STATISTICS.get(node.op, ()))
    for name in finding.reached & statistics:
        finding.untrained[name] = "it is a statistic of BatchNormalization too"
    trained = finding.reached - statistics
    return Roles(
        tuple(name for name in model.weights if name in trained),
        finding.untrained,
        frozenset(statistics & model.weights.keys()),
    )


def origin(model: Model, name: str) -> str:
    """Return the tensor that a name stands for, seen through Identity."""
    node = model.producers.get(name)
    while node is not None and node.op == "Identity":
        name = node.input(0)
        node = model.producers.get(name)
    return name


@dataclass
class _Finding:
    model: Model
    shapes: Mapping[str, tuple[int, ...]]
    channel_axes: Mapping[str, int]
    reached: set[str] = field(default_factory=set)
    untrained: dict[str, str] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def weighted_inputs(self, node: Node) -> Iterable[int]:
        """Yield the positions of a node's inputs that are weights."""
        for index in _WEIGHTED.get(node.op, ()):
            if node.input(index) in self.shapes:
                yield index
        if node.op in _BY_CHANNEL:
            for index in (0, 1):
                shape = self.shapes.get(node.input(index))
                axis = self.channel_axes.get(node.input(1 - index))
                if shape is not None and axis is not None and _by_channel(shape, axis):
                    yield index

    def trace(self, name: str) -> None:
        """Follow a weight back to the initializers that it is made of."""
        if not name or name in self._seen:
            return
        self._seen.add(name)
        if name in self.model.weights:
            if _is_trainable(self.model.weights[name]):
                self.reached.add(name)
            else:
                dtype = self.model.weights[name].dtype
                self.untrained[name] = f"its type is {dtype}"
            return
        node = self.model.producers.get(name)
        if node is None:
            self.untrained[name] = "its values are not readable"
        elif node.op in _MOVES:
            for source in node.inputs[_MOVES[node.op]]:
                self.trace(source)
        else:
            self.untrained[name] = (
                f"a {node.op} node makes it, which `onnxcomp compress --force` without limits "
                "folds"
            )


def _is_trainable(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _by_channel(shape: tuple[int, ...], axis: int) -> bool:
    """Whether a constant has several entries, all along one axis counted from the last."""
    return -axis <= len(shape) and shape[axis] > 1 and math.prod(shape) == shape[axis]


def _channel_axes(
    nodes: Sequence[Node], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return the axis of the channels, counted from the last, of what follows a layer."""
    axes: dict[str, int] = {}
    for node in nodes:
        found = _axis_behind(node, shapes, axes)
        if found is not None:
            axes[node.id] = found
    return axes


def _axis_behind(
    node: Node, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]
) -> int | None:
    if node.op in ("Conv", "ConvTranspose") and node.input(1) in shapes:
        return 1 - len(shapes[node.input(1)])
    if node.op in ("Gemm", "MatMul") and node.input(1) in shapes:
        return -1
    before = next((axes[name] for name in node.inputs if name in axes), None)
    if before is None or node.op in _KEEPS_AXES:
        return before
    if node.op == "Transpose" and len(node.attrs.get("perm", ())) >= -before:
        perm: tuple[int, ...] = node.attrs["perm"]
        return perm.index(len(perm) + before) - len(perm)
    return None
