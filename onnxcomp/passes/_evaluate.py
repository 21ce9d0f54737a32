"""Evaluation of single nodes on constants, by a fixed list of operators.

Data movement goes through the reference evaluator of onnx, arithmetic through NumPy; both
give what onnxruntime gives, bit for bit, except `Pow`, which may differ in the last place.
Nothing is evaluated before the size of its result is known to be bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnxcomp.model import Array, Node
from onnxcomp.passes._graph import constant_value, elements, is_numeric

MAX_ELEMENTS = 2**24

_MOVEMENT = frozenset(
    {
        "Cast",
        "Concat",
        "ConstantOfShape",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Range",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)


def _divide(a: Array, b: Array) -> Array:
    """Divide; integers truncate toward zero, as in C++, where NumPy floors."""
    if a.dtype.kind not in "iu":
        return np.asarray(np.divide(a, b))
    if not np.all(b):
        raise ValueError("integer division by zero")
    quotient, rest = np.divmod(a, b)
    return np.asarray(quotient + ((rest != 0) & ((a < 0) != (b < 0))))


def _dequantize(node: Node, x: Array, scale: Array, zero: Array | None = None) -> Array:
    """Return (x - zero) scale in float32, for any axis and block size."""
    if scale.dtype != np.float32 or node.attrs.get("output_dtype", 0):
        raise ValueError("only float32 is dequantised ahead of time")
    if zero is None:
        zero = np.zeros(scale.shape, np.int64)
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)
    if block:
        pick = np.arange(x.shape[axis]) // block
        scale, zero = np.take(scale, pick, axis), np.take(zero, pick, axis)
    elif scale.ndim == 1:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return np.asarray((x.astype(np.int64) - zero.astype(np.int64)).astype(np.float32) * scale)


def _power(a: Array, b: Array) -> Array:
    if a.dtype.kind != "f" or b.dtype.kind not in "fiu":
        raise ValueError("powers of integers are left to the runtime")
    return np.asarray(np.power(a.astype(np.float64), b.astype(np.float64)))


_ARITHMETIC: Mapping[str, Callable[..., Array]] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Ceil": np.ceil,
    "Div": _divide,
    "Equal": np.equal,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Pow": _power,
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
}


def evaluate(
    node: Node, inputs: Sequence[Array | None], opset: int, limit: int = MAX_ELEMENTS
) -> list[Array]:
    """Return the outputs of a node whose inputs are all constant.

    Args:
        node: The node, of the main graph.
        inputs: Its inputs; None for an absent one.
        opset: Version of the default operator set.
        limit: Largest number of elements of the result.

    Returns:
        One array for each output.

    Raises:
        ValueError: The node cannot be evaluated; the message says why.
    """
    if node.op == "Constant":
        value = constant_value(node)
        if value is None:
            raise ValueError("its value is a string or sparse tensor")
        return [value]
    if node.op not in _MOVEMENT | _ARITHMETIC.keys() | {"DequantizeLinear"}:
        raise ValueError(f"'{node.op}' is not evaluated ahead of time")
    try:
        with np.errstate(all="ignore"):
            size = _result_elements(node, inputs)
            if size > limit:
                raise ValueError(f"its {size} elements are more than the {limit} allowed")
            outputs = _run(node, inputs, opset)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"'{node.op}' fails on its constants: {error}") from error
    if not all(is_numeric(output) for output in outputs):
        raise ValueError("its result is not a tensor of numbers")
    return outputs


def _run(node: Node, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    if node.op in _ARITHMETIC:
        if opset < 7 and len(inputs) > 1:
            raise ValueError("operators before opset 7 broadcast in their own way")
        result = np.asarray(_ARITHMETIC[node.op](*inputs))
        first = inputs[0]
        if first is None or result.dtype == np.bool_:
            return [result]
        return [result.astype(first.dtype)]
    if node.op == "DequantizeLinear":
        return [_dequantize(node, *inputs)]  # type: ignore[arg-type]  # the first two are there
    if node.op == "Cast":
        _check_cast(inputs[0], node.attrs["to"])
    names = [name for name in dict.fromkeys(node.inputs) if name]
    model = onnx.ModelProto(ir_version=8)
    model.opset_import.add(version=opset)
    model.graph.name = "constants"
    model.graph.node.append(node.proto)
    model.graph.input.extend(onnx.ValueInfoProto(name=name) for name in names)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.outputs)
    feeds = dict(zip(node.inputs, inputs, strict=True))
    return list(ReferenceEvaluator(model).run(None, {name: feeds[name] for name in names}))


def _check_cast(value: Array | None, to: int) -> None:
    """Refuse casts whose result depends on the machine."""
    target = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))
    if value is None or value.dtype.kind in "biu" or target.kind not in "iu":
        return
    limits = np.iinfo(target)
    value = np.trunc(value.astype(np.float64))
    # The largest int64 is no float64: the bound itself is out of range already.
    if not np.all((value >= float(limits.min)) & (value < float(limits.max) + 1)):
        raise ValueError(f"it casts numbers to {target} that do not fit")


def _result_elements(node: Node, inputs: Sequence[Array | None]) -> int:
    """Return an upper bound of the elements of each output, before it is computed."""
    arrays = [array for array in inputs if array is not None]
    if node.op == "ConstantOfShape":
        return elements(tuple(arrays[0].tolist()))
    if node.op == "Tile":
        return arrays[0].size * elements(tuple(arrays[1].ravel().tolist()))
    if node.op == "Expand":
        return elements(np.broadcast_shapes(arrays[0].shape, tuple(arrays[1].tolist())))
    if node.op == "Gather":
        axis = node.attrs.get("axis", 0)
        return int(arrays[0].size // max(1, arrays[0].shape[axis]) * arrays[1].size)
    if node.op == "Range":
        start, limit, delta = (array.item() for array in arrays)
        if not all(isinstance(v, int) for v in (start, limit, delta)) or delta == 0:
            raise ValueError("ranges of fractions or without steps are left to the runtime")
        return max(0, -int((start - limit) // delta))
    if node.op in _ARITHMETIC or node.op == "Where":
        return elements(np.broadcast_shapes(*(array.shape for array in arrays)))
    return sum(array.size for array in arrays)
