"""What is known of a tensor without running the model: initializers and Constant nodes."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnxcomp.loading.structure import DEFAULT_DOMAINS, Body, Structure

Array = npt.NDArray[Any]

_FEW = 64


class Constants:
    """The constant tensors that the nodes of one body can read, by name.

    Args:
        body: A graph or function whose tensors passed `check_tensor`.
        around: The constants of the body around a sub-graph.
        external: Arrays of initializers that have no payload in the model file.
    """

    def __init__(
        self, body: Body, around: "Constants | None", external: Mapping[str, Array]
    ) -> None:
        self._around = around
        self._tensors = {tensor.name: tensor for tensor in body.initializers}
        self._arrays: dict[str, Array] = {}
        if body.parent is None and isinstance(body.proto, onnx.GraphProto):
            self._arrays.update(external)
        self._local = {*body.inputs, *self._tensors}
        for node in body.proto.node:
            self._local.update(node.output)
            if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS:
                self._add_constant(node)

    def _add_constant(self, node: onnx.NodeProto) -> None:
        name = node.output[0]  # "" is never looked up
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.HasField("t"):
                self._tensors[name] = attribute.t
            elif attribute.name in ("value_int", "value_ints") and attribute.type:
                scalar = attribute.name == "value_int"
                self._arrays[name] = np.array(
                    attribute.i if scalar else list(attribute.ints), np.int64
                )
            elif attribute.name in ("value_float", "value_floats") and attribute.type:
                scalar = attribute.name == "value_float"
                self._arrays[name] = np.array(
                    attribute.f if scalar else list(attribute.floats), np.float32
                )

    def _scope(self, name: str) -> "Constants | None":
        """Return the nearest scope that defines a name."""
        scope: Constants | None = self if name else None
        while scope is not None and name not in scope._local:
            scope = scope._around
        return scope

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a constant, or None where the tensor is not constant."""
        scope = self._scope(name)
        if scope is None:
            return None
        if name in scope._arrays:
            return scope._arrays[name].shape
        tensor = scope._tensors.get(name)
        return None if tensor is None else tuple(tensor.dims)

    def numbers(self, name: str) -> list[float] | None:
        """Return a constant of at most 64 elements as a flat list of Python numbers."""
        shape, scope = self.shape(name), self._scope(name)
        if scope is None or shape is None or math.prod(shape) > _FEW:
            return None
        array = scope._arrays.get(name)
        if array is None:
            array = numpy_helper.to_array(scope._tensors[name])
        return [n.item() for n in array.reshape(-1)] if array.dtype.kind in "iuf" else None

    def integers(self, name: str) -> list[int] | None:
        """Return a small integer constant as a flat list."""
        numbers = self.numbers(name)
        if numbers is None or not all(isinstance(number, int) for number in numbers):
            return None
        return [int(number) for number in numbers]

    def own(self) -> Iterator[tuple[str, onnx.TensorProto]]:
        """Yield the constants that this body itself defines with a payload in the file."""
        for name, tensor in self._tensors.items():
            if name not in self._arrays:
                yield name, tensor


def all_constants(structure: Structure, external: Mapping[str, Array]) -> list[Constants]:
    """Return the constants of every body of a model, in the order of the bodies."""
    found: dict[int, Constants] = {}
    for body in structure.bodies:
        around = found[id(body.parent)] if body.parent is not None else None
        found[id(body)] = Constants(body, around, external)
    return list(found.values())
