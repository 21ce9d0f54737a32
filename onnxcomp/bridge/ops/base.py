"""What the tables of operators are made of: handlers, kernels, and helpers for both.

A handler is called once per node, at conversion.  It reads attributes, by the node's operator
set, refuses what it cannot express, and returns a kernel: a function from the node's inputs
(tensors, `None` for an absent one) to its output, or to a tuple of outputs.

Shapes, axes, bounds and other small parameters reach a kernel as tensors on the CPU, so that
reading them never waits for a GPU; `Handler.host` names their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import torch
from torch import Tensor

from onnxcomp.model import Node

Kernel = Callable[..., Any]
Wish = Literal["batch", "batchnorm", "dropout"]
Make = Callable[[Node, int], Kernel]


class UnsupportedNodeError(Exception):
    """A node cannot be expressed; the message says why."""


@dataclass(frozen=True)
class Handler:
    """How an operator is converted.

    Attributes:
        make: Called with a node and the version of the default operator set.
        host: Positions of inputs that a kernel wants on the CPU.
        wants: What its kernels take by this keyword: `batch`, the number of samples where the
            graph was written for one, else None; `batchnorm` or `dropout`, whether that
            behaves as in training.
    """

    make: Make
    host: frozenset[int] = frozenset()
    wants: Wish | None = None


def handler(make: Make, *host: int, wants: Wish | None = None) -> Handler:
    """Return a handler whose kernels want inputs at these positions on the CPU."""
    return Handler(make, frozenset(host), wants)


def plain(function: Kernel, *host: int) -> Handler:
    """Return a handler for an operator without attributes."""
    return Handler(lambda node, opset: function, frozenset(host))


def integers(value: Tensor) -> list[int]:
    """Return a small tensor of integers as a flat list."""
    return [int(number) for number in value.reshape(-1).tolist()]


def number(value: Tensor) -> Any:
    """Return the one element of a tensor as a Python number."""
    return value.reshape(-1)[0].item() if value.dim() else value.item()


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + rank if axis < 0 else axis


def axes_kernel(
    node: Node, position: int, function: Callable[[Tensor, Sequence[int] | None], Any]
) -> Kernel:
    """Return a kernel for an operator whose axes are an attribute or, later, an input."""
    fixed = node.attrs.get("axes")
    if node.input(position):

        def given(*inputs: Tensor) -> Any:
            return function(inputs[0], integers(inputs[position]))

        return given
    return lambda x, *_: function(x, fixed)


_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT)
_DTYPES: dict[int, torch.dtype] = {
    **dict.fromkeys(_FLOATS, torch.float32),
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
}


def dtype_of(kind: int) -> torch.dtype:
    """Return the dtype for a `TensorProto.DataType`; half precision is computed in float32.

    Raises:
        UnsupportedNodeError: Torch cannot compute in it.
    """
    if kind not in _DTYPES:
        name = onnx.TensorProto.DataType.Name(kind)
        raise UnsupportedNodeError(f"type {name} has no arithmetic in torch")
    return _DTYPES[kind]


def only_first_output(node: Node) -> None:
    """Refuse a node of which more than the first output is declared."""
    if any(node.outputs[1:]):
        raise UnsupportedNodeError("its further outputs are not made")
