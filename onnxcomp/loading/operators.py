"""Checks of single nodes: attributes, arity, and the numbers that kernels trust."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import onnx
from onnx import defs

from onnxcomp.errors import InvalidModelError, UnsupportedModelError
from onnxcomp.loading.constants import Constants
from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.structure import DEFAULT_DOMAINS, Body, Structure, describe, function_key

_VALUE_FIELDS: Mapping[int, str] = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
    onnx.AttributeProto.STRINGS: "strings",
    onnx.AttributeProto.TENSORS: "tensors",
    onnx.AttributeProto.GRAPHS: "graphs",
    onnx.AttributeProto.TYPE_PROTOS: "type_protos",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.SPARSE_TENSORS: "sparse_tensors",
}
_ATTRIBUTE_TYPES = {
    kind: number
    for name, number in onnx.AttributeProto.AttributeType.items()
    if (kind := getattr(defs.OpSchema.AttrType, name, None)) is not None
}
_SINGLE_MESSAGES = ("t", "g", "tp")
_SPARSE = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)

# Operators that slide a window, and where the weight among their inputs is.
_WINDOWS: Mapping[str, int | None] = {
    "Conv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "DeformConv": 1,
    "QLinearConv": 3,
    "AveragePool": None,
    "LpPool": None,
    "MaxPool": None,
    "MaxUnpool": None,
}
_AUTO_PADS = frozenset({b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID"})
_LARGEST_STEP = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Signature:
    """What an operator set says of an operator."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    attributes: Mapping[str, int]
    required: frozenset[str]


@lru_cache(maxsize=1024)
def _signature(operator: str, opset: int) -> _Signature | None:
    try:
        schema = defs.get_schema(operator, max_inclusive_version=opset, domain="")
    except defs.SchemaError:
        return None
    attributes = schema.attributes
    return _Signature(
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        {name: _ATTRIBUTE_TYPES[a.type] for name, a in attributes.items()},
        frozenset(name for name, a in attributes.items() if a.required),
    )


def check_nodes(
    body: Body, structure: Structure, constants: Constants, limits: LoadLimits
) -> None:
    """Check the nodes of one body against their operator set and constant weights.

    Nothing is known of operators of other domains, which must be imported.

    Args:
        body: A graph or function whose nodes passed `check_attributes`.
        structure: The model's local functions.
        constants: The constants it can read.
        limits: Bounds on padding and elements.

    Raises:
        InvalidModelError: A node contradicts its operator's definition or its weights.
        UnsupportedModelError: The operator set is unknown, or an operator is not part of it.
    """
    opset, newest = body.opsets.get("", 1), defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise UnsupportedModelError(
            f"{body.where} uses opset {opset}; 1 to {newest} are known here (export the model "
            "for one of them, or install a newer onnx)"
        )
    for node in body.proto.node:
        _check_node(node, body, structure, constants, limits)


def _check_node(
    node: onnx.NodeProto,
    body: Body,
    structure: Structure,
    constants: Constants,
    limits: LoadLimits,
) -> None:
    if (function := structure.functions.get(function_key(node))) is not None:
        _check_arity(node, (0, len(function.inputs)), (0, len(function.outputs)))
        return
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    if domain not in body.opsets:
        raise InvalidModelError(
            f"{describe(node)} is of domain '{domain}', which {body.where} does not import"
        )
    if domain:
        return
    signature = _signature(node.op_type, body.opsets[""])
    if signature is None:
        raise UnsupportedModelError(
            f"{describe(node)}: opset {body.opsets['']} has no operator '{node.op_type}'"
        )
    _check_arity(node, signature.inputs, signature.outputs)
    # What refers to an attribute of the function around it has a value only when called.
    attributes = {a.name: a for a in node.attribute if not a.ref_attr_name}
    _check_attribute_types(node, attributes, signature)
    facts = _Facts(node, attributes, constants)
    if node.op_type in _WINDOWS:
        _check_window(facts, limits)
    elif node.op_type == "BatchNormalization":
        _check_batch_norm(facts)
    elif node.op_type in ("Gemm", "MatMul"):
        _check_matrices(facts)


def check_attributes(node: onnx.NodeProto, body: Body, limits: LoadLimits) -> None:
    """Check that each attribute of a node has a name and one value of its type.

    Args:
        node: The node.
        body: The graph or function it is in.
        limits: The bound on attributes.

    Raises:
        InvalidModelError: An attribute is malformed, or there are too many.
        UnsupportedModelError: An attribute is a sparse tensor.
    """
    if len(node.attribute) > limits.attributes:
        raise InvalidModelError(
            f"{describe(node)} has {len(node.attribute)} attributes; "
            f"at most {limits.attributes} are allowed"
        )
    root = body
    while root.parent is not None:
        root = root.parent
    names: set[str] = set()
    for attribute in node.attribute:
        where = f"attribute '{attribute.name}' of {describe(node)}"
        if not attribute.name or attribute.name in names:
            raise InvalidModelError(f"{where} has no name or is given twice")
        names.add(attribute.name)
        if attribute.type in _SPARSE:
            raise UnsupportedModelError(f"{where} is a sparse tensor; make it dense")
        expected = _VALUE_FIELDS.get(attribute.type)
        present = {f.name for f, _ in attribute.ListFields()} & set(_VALUE_FIELDS.values())
        if attribute.ref_attr_name:
            if isinstance(root.proto, onnx.GraphProto) or present:
                raise InvalidModelError(f"{where} refers to a function's attribute")
            continue
        missing = expected in _SINGLE_MESSAGES and not present
        if expected is None or present - {expected} or missing:
            raise InvalidModelError(
                f"{where} of type {attribute.type} holds {sorted(present)}"
            )


def _check_arity(
    node: onnx.NodeProto, inputs: tuple[int, int], outputs: tuple[int, int]
) -> None:
    for kind, got, (least, most) in (
        ("inputs", len(node.input), inputs),
        ("outputs", len(node.output), outputs),
    ):
        if not least <= got <= most:
            raise InvalidModelError(
                f"{describe(node)} has {got} {kind}; its operator takes {least} to {most}"
            )


def _check_attribute_types(
    node: onnx.NodeProto,
    attributes: Mapping[str, onnx.AttributeProto],
    signature: _Signature,
) -> None:
    given = {attribute.name for attribute in node.attribute}
    if missing := signature.required - given:
        raise InvalidModelError(f"{describe(node)} lacks attribute '{min(missing)}'")
    for name, attribute in attributes.items():
        if signature.attributes.get(name, attribute.type) != attribute.type:
            raise InvalidModelError(f"attribute '{name}' of {describe(node)} has a wrong type")


@dataclass(frozen=True, slots=True)
class _Facts:
    """A node's attributes and the shapes of its constant inputs."""

    node: onnx.NodeProto
    attributes: Mapping[str, onnx.AttributeProto]
    constants: Constants

    def integers(self, name: str) -> list[int]:
        return list(self.attributes[name].ints) if name in self.attributes else []

    def integer(self, name: str, default: int) -> int:
        return self.attributes[name].i if name in self.attributes else default

    def shape(self, index: int) -> tuple[int, ...] | None:
        inputs = self.node.input
        return self.constants.shape(inputs[index]) if index < len(inputs) else None

    def refuse(self, what: str) -> InvalidModelError:
        return InvalidModelError(f"{describe(self.node)}: {what}")


def _check_window(facts: _Facts, limits: LoadLimits) -> None:
    kernel = facts.integers("kernel_shape")
    position = _WINDOWS[facts.node.op_type]
    weight = facts.shape(position) if position is not None else None
    if weight is not None:
        _check_conv_weight(facts, weight)
        if kernel and tuple(kernel) != weight[2:]:
            raise facts.refuse(f"kernel_shape {kernel} does not match weight {list(weight)}")
    rank = len(weight) - 2 if weight is not None else len(kernel) or None
    for name, length, least, most in (
        ("kernel_shape", rank, 1, _LARGEST_STEP),
        ("strides", rank, 1, _LARGEST_STEP),
        ("dilations", rank, 1, _LARGEST_STEP),
        ("pads", rank and 2 * rank, 0, limits.padding),
        ("output_padding", rank, 0, limits.padding),
        ("output_shape", None, 0, limits.elements),
    ):
        values = facts.integers(name)
        if not all(least <= value <= most for value in values):
            raise facts.refuse(f"{name} {values[:16]} must be within [{least}, {most}]")
        if values and length is not None and len(values) != length:
            raise facts.refuse(f"{name} {values[:16]} needs {length} entries")
    auto_pad = facts.attributes.get("auto_pad")
    if auto_pad is not None and auto_pad.s not in _AUTO_PADS:
        raise facts.refuse(f"unknown auto_pad {auto_pad.s[:40]!r}")
    for name in ("group", "offset_group"):
        if facts.integer(name, 1) < 1:
            raise facts.refuse(f"{name} must be at least 1; got {facts.integer(name, 1)}")


def _check_conv_weight(facts: _Facts, weight: tuple[int, ...]) -> None:
    if len(weight) < 3 or 0 in weight:
        raise facts.refuse(f"weight {list(weight)} is not [channels, channels, kernel...]")
    group = facts.integer("group", 1)
    if group < 1 or weight[0] % group:
        raise facts.refuse(f"group {group} does not divide the {weight[0]} channels of weight")
    transposed = facts.node.op_type == "ConvTranspose"
    channels = weight[1] * group if transposed else weight[0]
    bias = facts.shape(8 if facts.node.op_type == "QLinearConv" else 2)
    biased = facts.node.op_type in ("Conv", "ConvTranspose", "QLinearConv")
    if biased and bias not in (None, (channels,)):
        raise facts.refuse(f"bias {bias} does not fit {channels} channels")


def _check_batch_norm(facts: _Facts) -> None:
    shapes = {shape for i in range(1, 5) if (shape := facts.shape(i)) is not None}
    # Before opset 9, spatial = 0 asked for statistics per position.
    one_axis = facts.integer("spatial", 1) == 0 or all(len(shape) == 1 for shape in shapes)
    if len(shapes) > 1 or not one_axis:
        raise facts.refuse(f"scale, bias, mean and variance differ: {sorted(shapes)}")
    epsilon = facts.attributes.get("epsilon")
    if epsilon is not None and not (math.isfinite(epsilon.f) and epsilon.f >= 0):
        raise facts.refuse(f"epsilon is {epsilon.f}")


def _check_matrices(facts: _Facts) -> None:
    allowed: Sequence[tuple[int, int]] = ((1, 8), (1, 8))
    if facts.node.op_type == "Gemm":
        allowed = ((2, 2), (2, 2), (0, 2))
    for index, (least, most) in enumerate(allowed):
        shape = facts.shape(index)
        if shape is not None and not least <= len(shape) <= most:
            raise facts.refuse(f"input {index} has shape {list(shape)}")
