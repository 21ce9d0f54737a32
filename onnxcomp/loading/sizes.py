"""Tensor sizes that follow from the file alone, so that none explodes at run time.

Shapes are propagated through elementwise operators, concatenation and the operators that
make large tensors from small ones. This is no shape inference: where an operator is not in
the table, or a dimension is not known, nothing is claimed (`sandbox.py` bounds the rest).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor, isfinite, prod

import onnx

from onnxcomp.errors import InvalidModelError
from onnxcomp.loading.constants import Constants
from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.structure import DEFAULT_DOMAINS, Body, describe

Shape = tuple[int | None, ...]

_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Cast Ceil Celu Clip Cos Cosh "
    "Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Hardmax Identity "
    "InstanceNormalization LRN LeakyRelu Log LogSoftmax LpNormalization Mish Neg Not "
    "PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt "
    "Swish Tan Tanh ThresholdedRelu"
)
_BROADCAST = (
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less "
    "LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Where Xor"
)


@dataclass(frozen=True, slots=True)
class _Node:
    """One node with what is known of its inputs."""

    proto: onnx.NodeProto
    shapes: Mapping[str, Shape]
    constants: Constants

    def name(self, index: int) -> str:
        return self.proto.input[index] if index < len(self.proto.input) else ""

    def shape(self, index: int) -> Shape | None:
        name = self.name(index)
        known = self.shapes.get(name)
        return known if known is not None else self.constants.shape(name)

    def integers(self, index: int) -> list[int] | None:
        return self.constants.integers(self.name(index)) if self.name(index) else None

    def attribute(self, name: str) -> onnx.AttributeProto | None:
        return next((a for a in self.proto.attribute if a.name == name), None)


def check_sizes(body: Body, constants: Constants, limits: LoadLimits) -> None:
    """Refuse a graph in which a tensor is known to have more elements than allowed.

    Args:
        body: A graph or function with its nodes in order.
        constants: The constants it can read.
        limits: The bound on elements; dimensions that are not known count as 1.

    Raises:
        InvalidModelError: A tensor is too large, or its size is not a number.
    """
    shapes: dict[str, Shape] = {}
    if isinstance(body.proto, onnx.GraphProto):
        for value in body.proto.input:
            if (declared := _declared(value)) is not None:
                _check(declared, f"input '{value.name}'", limits)
                shapes[value.name] = declared
    for proto in body.proto.node:
        rule = _RULES.get(proto.op_type) if proto.domain in DEFAULT_DOMAINS else None
        shape = rule(_Node(proto, shapes, constants)) if rule is not None else None
        if shape is not None:
            _check(shape, f"the result of {describe(proto)}", limits)
            shapes[proto.output[0]] = shape


def _declared(value: onnx.ValueInfoProto) -> Shape | None:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    # Old exporters write -1 for a dimension that is not known.
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None
        for dim in kind.shape.dim
    )


def _check(shape: Shape, where: str, limits: LoadLimits) -> None:
    if len(shape) > limits.rank and where.startswith("input"):
        raise InvalidModelError(
            f"{where} has {len(shape)} dimensions, more than {limits.rank}"
        )
    if prod(1 if dim is None else dim for dim in shape) > limits.elements:
        raise InvalidModelError(
            f"{where} has shape {list(shape)}, more than {limits.elements} elements"
        )


def _same(node: _Node) -> Shape | None:
    return node.shape(0)


def _broadcast(node: _Node) -> Shape | None:
    known = [node.shape(i) for i in range(len(node.proto.input))]
    shapes = [shape for shape in known if shape is not None]
    if not shapes or len(shapes) < len(known):
        return None
    return _broadcast_shapes(shapes)


def _broadcast_shapes(shapes: list[Shape]) -> Shape:
    rank = max(map(len, shapes))
    result: list[int | None] = []
    for axis in range(-rank, 0):
        dims = [shape[axis] for shape in shapes if len(shape) >= -axis]
        larger = {dim for dim in dims if dim is not None and dim != 1}
        result.append(max(larger) if larger else None if None in dims else 1)
    return tuple(result)


def _concat(node: _Node) -> Shape | None:
    known = [node.shape(i) for i in range(len(node.proto.input))]
    shapes = [shape for shape in known if shape is not None]
    axis = node.attribute("axis")
    if not shapes or len(shapes) < len(known) or axis is None:
        return None
    rank = len(shapes[0])
    if any(len(shape) != rank for shape in shapes) or not -rank <= axis.i < rank:
        return None
    joined = [shape[axis.i] for shape in shapes]
    result = list(shapes[0])
    sizes = [dim for dim in joined if dim is not None]
    result[axis.i] = sum(sizes) if len(sizes) == len(joined) else None
    return tuple(result)


def _constant_of_shape(node: _Node) -> Shape | None:
    dims = node.integers(0)
    return None if dims is None else tuple(max(0, dim) for dim in dims)


def _expand(node: _Node) -> Shape | None:
    shape, target = node.shape(0), node.integers(1)
    if target is None:
        return None
    return _broadcast_shapes([shape or (1,), tuple(target)])


def _tile(node: _Node) -> Shape | None:
    shape, repeats = node.shape(0), node.integers(1)
    if shape is None or repeats is None or len(shape) != len(repeats):
        return None
    return tuple(
        None if dim is None else dim * max(0, n) for dim, n in zip(shape, repeats, strict=True)
    )


def _pad(node: _Node) -> Shape | None:
    old = node.attribute("pads")
    pads = list(old.ints) if old is not None else node.integers(1)
    shape = node.shape(0)
    if shape is None or pads is None or len(pads) != 2 * len(shape):
        return None
    return tuple(
        None if dim is None else max(0, dim + pads[i] + pads[i + len(shape)])
        for i, dim in enumerate(shape)
    )


def _resize(node: _Node) -> Shape | None:
    shape, sizes = node.shape(0), node.integers(3)
    if shape is None:
        return None
    if sizes is not None and len(sizes) == len(shape):
        return tuple(max(0, size) for size in sizes)
    old = node.attribute("scales")
    # Upsample, and Resize up to opset 10, have the scales where the region is now.
    index = 2 if len(node.proto.input) > 2 else 1
    scales = list(old.floats) if old is not None else node.constants.numbers(node.name(index))
    if scales is None or len(scales) != len(shape):
        return None
    if not all(isfinite(scale) and scale > 0 for scale in scales):
        raise InvalidModelError(f"{describe(node.proto)} has scales {scales[:8]}")
    return tuple(
        None if dim is None else floor(dim * scale)
        for dim, scale in zip(shape, scales, strict=True)
    )


def _random(node: _Node) -> Shape | None:
    shape = node.attribute("shape")
    return None if shape is None else tuple(max(0, dim) for dim in shape.ints)


def _range(node: _Node) -> Shape | None:
    ends = [node.constants.numbers(node.name(i)) for i in range(3)]
    if not all(end is not None and len(end) == 1 and isfinite(end[0]) for end in ends):
        return None
    start, limit, delta = (end[0] for end in ends if end)
    if delta == 0:
        raise InvalidModelError(f"{describe(node.proto)} has step 0")
    count = (limit - start) / delta
    if not isfinite(count):
        raise InvalidModelError(f"{describe(node.proto)} has no finite number of elements")
    return (max(0, floor(count)),)


_RULES: Mapping[str, Callable[[_Node], Shape | None]] = {
    **dict.fromkeys(_UNARY.split(), _same),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Pad": _pad,
    "RandomNormal": _random,
    "RandomUniform": _random,
    "Range": _range,
    "Resize": _resize,
    "Tile": _tile,
    "Upsample": _resize,
}
