"""What the exact passes ask about a graph: live readers, constants, shapes, fixed names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxcomp.model import Array, Model, Node, Use, fill, subgraphs

if TYPE_CHECKING:
    from onnxcomp.draft import Draft

Shape = tuple[int | str | None, ...]

_INLINE_BYTES = 1024
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_CONSTANT_VALUES: Mapping[str, type[np.generic] | None] = {
    "value": None,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


class GraphView:
    """A model as the exact passes see it: dead nodes do not count as readers.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @cached_property
    def live(self) -> tuple[Node, ...]:
        """The nodes that some output needs, in topological order."""
        wanted, needed = list(self.model.output_names), set[str]()
        while wanted:
            node = self.model.producers.get(wanted.pop())
            if node is not None and node.id not in needed:
                needed.add(node.id)
                wanted += [*node.inputs, *node.captured]
        return tuple(node for node in self.model.nodes if node.id in needed)

    @cached_property
    def live_ids(self) -> frozenset[str]:
        return frozenset(node.id for node in self.live)

    def uses(self, name: str) -> tuple[Use, ...]:
        """All uses of a tensor by live nodes, captures of subgraphs included."""
        found = self.model.readers.get(name, ())
        return tuple(use for use in found if use.node.id in self.live_ids)

    def only_reader(self, name: str) -> Use | None:
        """The one live use of a tensor that is not an output, or None."""
        uses = self.uses(name)
        return uses[0] if len(uses) == 1 and name not in self.model.output_names else None

    def constant(self, name: str) -> Array | None:
        """The value of an initializer or of a Constant node, or None."""
        if name in self.model.weights:
            return self.model.weights[name]
        node = self.model.producers.get(name)
        return constant_value(node) if node is not None and node.op == "Constant" else None

    def fixed(self, name: str) -> str | None:
        """Why no other tensor can take a name's place at its readers, or None."""
        if name in self.model.output_names:
            return f"'{name}' is a graph output"
        for use in self.uses(name):
            if use.index < 0:
                return f"'{name}' is captured by the subgraph of '{use.node.id}'"
            if any(True for _ in subgraphs(use.node.proto)):
                return f"'{name}' is read by '{use.node.id}', which carries a subgraph"
        return None

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor; None where the rank is not known, or for unknown dims."""
        if name in self.model.weights:
            return self.model.weights[name].shape
        kind = self._types.get(name)
        if kind is None or not kind.HasField("shape"):
            return None
        return tuple(
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
            for d in kind.shape.dim
        )

    def dtype(self, name: str) -> int | None:
        """The element type of a tensor as `TensorProto.DataType`, or None."""
        if name in self.model.weights:
            return int(onnx.helper.np_dtype_to_tensor_dtype(self.model.weights[name].dtype))
        kind = self._types.get(name)
        return kind.elem_type or None if kind is not None else None

    @cached_property
    def _types(self) -> Mapping[str, Any]:
        """Tensor types by name, inferred from the graph inputs and the weights alone.

        Value infos and the shapes of the outputs are claims that no runtime enforces, so
        they are not trusted.  Large weights stand in as graph inputs of their shape.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.skeleton)
        graph = proto.graph
        del graph.value_info[:]
        for output in graph.output:
            if output.type.HasField("tensor_type") and output.name not in self.model.weights:
                output.type.tensor_type.ClearField("shape")
        del graph.initializer[:]
        declared = {v.name for v in graph.input}
        for name, array in self.model.weights.items():
            if array.nbytes <= _INLINE_BYTES:
                fill(graph.initializer.add(name=name), array)
            elif name not in declared:
                kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
        try:
            graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
        except onnx.shape_inference.InferenceError:
            del graph.output[:]
        found = [*graph.value_info, *graph.output, *graph.input]
        return {v.name: v.type.tensor_type for v in found if v.type.HasField("tensor_type")}


def constant_value(node: Node) -> Array | None:
    """Return the tensor that a Constant node makes, or None for strings and sparse ones."""
    for name, dtype in _CONSTANT_VALUES.items():
        if name in node.attrs:
            value = np.asarray(node.attrs[name], dtype=dtype)
            return value if is_numeric(value) else None
    return None


def is_numeric(value: object) -> bool:
    """Say whether a value is an array that a `Model` keeps as a weight."""
    if not isinstance(value, np.ndarray):
        return False
    return value.dtype.kind in "biu" or value.dtype.name in _FLOATS


def broadcasts_into(array: Array, shape: Shape | None) -> bool:
    """Say whether `array` combined with a tensor of this shape provably keeps the shape."""
    if array.ndim == 0:
        return True
    if shape is None or array.ndim > len(shape):
        return False
    return all(a in (1, s) for a, s in zip(array.shape[::-1], shape[::-1], strict=False))


def elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape, without overflow."""
    return math.prod(int(d) for d in shape)


class Names:
    """Which name each tensor of the source model goes by while a draft is edited.

    Args:
        draft: The draft.
        view: The model that it was made from.
    """

    def __init__(self, draft: Draft, view: GraphView) -> None:
        self._draft = draft
        self._view = view
        self._now: dict[str, str] = {}

    def now(self, name: str) -> str:
        """Return the present name of a tensor of the source model."""
        return follow(self._now, name)

    def replace(self, old: str, new: str) -> None:
        """Let a tensor be read wherever `old` was, whose producer goes away.

        Where the name `old` must stay, the producer of the other tensor takes it on.

        Args:
            old: A node's first output.
            new: The tensor in its place, by its name in the source model.
        """
        new = self.now(new)
        if self._view.fixed(old) is None:
            self._draft.rewire(old, new)
            self._now[old] = new
        else:
            self._draft.remove_node(old)
            self._draft.produce_as(new, old)
            self._now[new] = old

    def add_bias_behind(self, node: Node, bias: str) -> None:
        """Put an Add behind a MatMul, which keeps its output's name where that is free."""
        draft = self._draft
        if self._view.fixed(node.id) is None:
            total = draft.fresh_name(f"{node.id}_biased")
            draft.rewire(node.id, total)
            draft.add_node("Add", [node.id, bias], stem=total, outputs=[total])
            self._now[node.id] = total
        else:
            inputs = draft.inputs(node.id)
            draft.remove_node(node.id)
            product = draft.add_node("MatMul", inputs, stem=f"{node.id}_product")
            stem = f"{node.id}_biased"
            draft.add_node("Add", [product, bias], stem=stem, outputs=[node.id])


def follow(links: Mapping[str, str], name: str) -> str:
    """Return the end of a chain of links."""
    while name in links:
        name = links[name]
    return name


def is_channel_vector(array: Array, channels: int) -> bool:
    """Say whether an array has `channels` elements, all along its last axis."""
    return array.ndim > 0 and array.size == channels == array.shape[-1]
