"""What a model costs: parameters, multiply-accumulates and bytes, per node and in total.

Parameters are the elements of all float initializers and Constant tensors, and of the integers
that a DequantizeLinear turns into floats; a shared tensor is counted once.  MACs are those of
one sample at the probe run's shapes: Conv, ConvTranspose, Gemm, MatMul (also of two
activations) and recurrent nodes; bodies of subgraphs do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.model import Array, Model, Node
from onnxcomp.runtime import TensorFact

_RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-accumulates per sample, and bytes of weights."""

    params: int = 0
    macs: int = 0
    weight_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.weight_bytes + other.weight_bytes,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.params - other.params,
            self.macs - other.macs,
            self.weight_bytes - other.weight_bytes,
        )


def node_costs(
    model: Model, tensors: Mapping[str, TensorFact], linears: Mapping[str, Linear]
) -> dict[str, Cost]:
    """Return the cost of every node by its id; a shared tensor counts at its first reader."""
    costs: dict[str, Cost] = {}
    counted: set[str] = set()
    for node in model.nodes:
        params = weight_bytes = 0
        read = (*node.inputs, *sorted(node.captured))
        arrays = {n: model.weights[n] for n in read if n in model.weights}
        if node.op == "Constant":
            arrays = {f"{node.id}.{k}": np.asarray(v) for k, v in node.attrs.items()}
        for name, array in arrays.items():
            stored = node.op == "DequantizeLinear" and name == node.inputs[0]
            if name not in counted and (stored or is_parameter(array)):
                counted.add(name)
                params += array.size
                weight_bytes += array.nbytes
        costs[node.id] = Cost(params, node_macs(model, tensors, linears, node), weight_bytes)
    return costs


def total_cost(costs: Mapping[str, Cost]) -> Cost:
    """Return the sum over all nodes."""
    return sum(costs.values(), Cost())


def is_parameter(array: Array) -> bool:
    """Whether a constant counts as parameters: floats do, shapes and indices do not."""
    return bool(array.dtype.kind == "f" or array.dtype.name == "bfloat16")


def node_macs(
    model: Model,
    tensors: Mapping[str, TensorFact],
    linears: Mapping[str, Linear],
    node: Node,
) -> int:
    """Return the multiply-accumulates of a node at the shapes of its tensors."""
    if node.id in linears:
        return linears[node.id].convolution.macs
    shapes = [tensors[n].shape if n in tensors else () for n in node.inputs]
    if node.op in ("MatMul", "Gemm") and node.id in tensors and len(shapes[0]) > 1:
        inner = shapes[0][0 if node.attrs.get("transA", 0) else -1]
        return int(np.prod(tensors[node.id].shape, dtype=np.int64)) * inner
    if node.op in ("Conv", "ConvTranspose") and len(shapes) > 1 and node.id in tensors:
        data = shapes[0] if node.op == "ConvTranspose" else tensors[node.id].shape
        weight = np.prod(shapes[1], dtype=np.int64)
        return int(weight * np.prod(data[2:], dtype=np.int64))
    if node.op in _RECURRENT and shapes[0]:
        return (
            sum(model.weights[n].size for n in node.inputs[1:3] if n in model.weights)
            * (shapes[0][0])
        )
    return 0
