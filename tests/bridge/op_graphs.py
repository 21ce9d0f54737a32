"""Graphs of a single node, for the matrix of operators."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcomp.model import Array, Model
from onnxcomp.samples import Samples


@dataclass(frozen=True, eq=False)
class Fixed:
    """An input that is an initializer."""

    array: Array


@dataclass(frozen=True, eq=False)
class Case:
    """One node: arrays are fed, `Fixed` ones are initializers, None is absent."""

    op: str
    inputs: tuple[Array | Fixed | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.op}-{self.opset}{' ' if self.note else ''}{self.note}"

    def model(self, factor: float = 1.0) -> Model:
        """The graph; with a factor other than 1 its first output is off by that."""
        names, inputs, weights = [], [], []
        for index, value in enumerate(self.inputs):
            names.append("" if value is None else f"x{index}")
            if isinstance(value, Fixed):
                weights.append(numpy_helper.from_array(value.array, f"x{index}"))
            elif value is not None:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                inputs.append(helper.make_tensor_value_info(f"x{index}", kind, value.shape))
        made = [f"y{i}" for i in range(self.outputs)]
        nodes = [helper.make_node(self.op, names, made, **self.attrs)]
        if factor != 1:
            nodes[0].output[0] = "inner"
            weights.append(numpy_helper.from_array(np.float32(factor), "factor"))
            nodes.append(helper.make_node("Mul", ["inner", "factor"], ["y0"]))
        outputs = [onnx.ValueInfoProto(name=name) for name in made]
        graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", self.opset)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        proto = onnx.shape_inference.infer_shapes(proto)
        return Model.from_proto(proto)

    def samples(self) -> Samples:
        """The fed inputs as one sample, with a first axis that counts it."""
        fed = {f"x{i}": v for i, v in enumerate(self.inputs) if isinstance(v, np.ndarray)}
        return Samples({name: array[None] for name, array in fed.items()})

    def but(self, **attrs: Any) -> "Case":
        """The same with other attributes."""
        return replace(self, attrs=self.attrs | attrs)


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, len(shape)]).standard_normal(shape).astype(np.float32)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Array:
    return np.random.default_rng(3).uniform(low, high, shape).astype(np.float32)


def fixed(*shape: int, seed: int = 1) -> Fixed:
    return Fixed(floats(*shape, seed=seed))


def ints(*values: int) -> Fixed:
    return Fixed(np.array(values, np.int64))


def scalar(value: float | int, dtype: Any = np.float32) -> Fixed:
    return Fixed(np.array(value, dtype))
