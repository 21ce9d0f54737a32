"""`Model`, a read-only ONNX graph with its weights, and the views that analysis reads.

A `Model` is a skeleton (the ModelProto without the payload of its weights) plus a mapping
from initializer names to read-only arrays, which copies share.  It never changes: `edit()`
gives a private `Draft` (`draft.py`), whose `seal()` gives a new `Model`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    from onnxcomp.draft import Draft

Array = npt.NDArray[Any]

_PAYLOADS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "external_data",
    "data_location",
)
ARRAY_TYPES = frozenset(
    onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))
    for name in (
        *("float16", "float32", "float64", "bool", ml_dtypes.bfloat16),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
)
DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Value:
    """A graph input or output: its name, dtype and declared shape (`None` = unknown rank)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Node:
    """One operator of the main graph, identified by the name of its first output."""

    proto: onnx.NodeProto = field(repr=False, compare=False)
    id: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The node's own name, or its first output where it has none."""
        return self.proto.name or self.id

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes as Python values; tensors as read-only arrays, graphs as protos."""
        return MappingProxyType({a.name: _attribute(a) for a in self.proto.attribute})

    def input(self, index: int) -> str:
        """Return the name of input `index`, or "" where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class Use:
    """One place where a tensor is read: input `index` of `node`, or -1 inside a subgraph."""

    node: Node
    index: int


@dataclass(frozen=True)
class Signature:
    """What callers of a model see: inputs that are not initializers, and outputs."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


class Model:
    """A read-only ONNX model.

    Args:
        skeleton: ModelProto whose weights carry name, dtype and dims, but no payload.
        weights: Arrays of all initializers that NumPy can hold, by name.
        files: The files it was read from, which `save` never overwrites.
        file_bytes: Their size in bytes.
        foreign_ops: Operators outside the ONNX domain, as "domain::op".
        packed: Whether the file is a packed one, whose size says nothing of an ONNX file.
    """

    def __init__(
        self,
        skeleton: onnx.ModelProto,
        weights: Mapping[str, Array],
        *,
        files: tuple[Path, ...] = (),
        file_bytes: int | None = None,
        foreign_ops: tuple[str, ...] = (),
        packed: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.weights: Mapping[str, Array] = MappingProxyType(dict(weights))
        self.files = files
        self.foreign_ops = foreign_ops
        self.packed = packed
        self._file_bytes = file_bytes

    @classmethod
    def from_proto(
        cls,
        proto: onnx.ModelProto,
        *,
        external: Mapping[str, Array] | None = None,
        consume: bool = False,
        files: tuple[Path, ...] = (),
        file_bytes: int | None = None,
        foreign_ops: tuple[str, ...] = (),
        packed: bool = False,
    ) -> Model:
        """Build a model from a ModelProto.

        Args:
            proto: The model; initializers named in `external` may lack their payload.
            external: Arrays of initializers whose payload lies outside `proto`.
            consume: Take the payloads out of `proto` itself instead of copying it first.
            files: The files it was read from.
            file_bytes: Their size.
            foreign_ops: Operators outside the ONNX domain.
            packed: Whether it was read from a packed file.

        Returns:
            The model.
        """
        if not consume:
            proto = _copy(proto)
        external = external or {}
        weights: dict[str, Array] = {}
        for tensor in proto.graph.initializer:
            if tensor.data_type not in ARRAY_TYPES:
                continue
            array = external.get(tensor.name)
            if array is None:
                array = numpy_helper.to_array(tensor)
            array.setflags(write=False)
            weights[tensor.name] = array
            for payload in _PAYLOADS:
                tensor.ClearField(payload)
        return cls(
            proto,
            weights,
            files=files,
            file_bytes=file_bytes,
            foreign_ops=foreign_ops,
            packed=packed,
        )

    def to_proto(self, *, external: bool = False) -> onnx.ModelProto:
        """Return a complete ModelProto; with `external`, weights stay without payload."""
        proto = _copy(self.skeleton)
        if not external:
            for tensor in proto.graph.initializer:
                if tensor.name in self.weights:
                    fill(tensor, self.weights[tensor.name])
        return proto

    def save(self, path: str | Path) -> None:
        """Write the model atomically; past 1.9 GB the weights go to `<name>.data`."""
        from onnxcomp.loading import write_model

        proto = self.to_proto(external=True)
        write_model(proto, path, inputs=self.files, external=self.weights)

    def edit(self) -> Draft:
        """Return a private draft of this model."""
        from onnxcomp.draft import Draft

        return Draft(self)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the main graph, in the file's (topological) order."""
        return tuple(_node(proto) for proto in self.skeleton.graph.node)

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Use, ...]]:
        """All uses of each tensor, captures of subgraphs included."""
        uses: dict[str, list[Use]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.inputs):
                if name:
                    uses.setdefault(name, []).append(Use(node, index))
            for name in sorted(node.captured):
                uses.setdefault(name, []).append(Use(node, -1))
        return {name: tuple(found) for name, found in uses.items()}

    @cached_property
    def signature(self) -> Signature:
        """Inputs that are not initializers, and outputs."""
        graph = self.skeleton.graph
        initial = self.initializer_names
        return Signature(
            tuple(_value(v) for v in graph.input if v.name not in initial),
            tuple(_value(v) for v in graph.output),
        )

    @cached_property
    def initializer_names(self) -> frozenset[str]:
        """Names of all initializers, also of those that NumPy cannot hold."""
        graph = self.skeleton.graph
        sparse = (t.values.name for t in graph.sparse_initializer)
        return frozenset([t.name for t in graph.initializer]).union(sparse)

    @cached_property
    def output_names(self) -> frozenset[str]:
        """Names of the graph's outputs."""
        return frozenset(v.name for v in self.skeleton.graph.output)

    @property
    def path(self) -> Path | None:
        """The file it was read from, if any."""
        return self.files[0] if self.files else None

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        versions = [
            o.version for o in self.skeleton.opset_import if o.domain in DEFAULT_DOMAINS
        ]
        return max(versions, default=1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the skeleton and all weights."""
        state = hashlib.sha256(self.skeleton.SerializeToString(deterministic=True))
        for name in sorted(self.weights):
            array = self.weights[name]
            state.update(f"{name}{array.dtype}{array.shape}".encode())
            state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return state.hexdigest()

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of the file it was read from, or of the one that `save` would write."""
        if self._file_bytes is not None:
            return self._file_bytes
        total = int(self.skeleton.ByteSize())
        for array in self.weights.values():
            total += array.nbytes + 8
        return total

    def weight_readers(self) -> Iterator[tuple[str, Array, tuple[Use, ...]]]:
        """Yield every weight with its array and all its uses."""
        for name, array in self.weights.items():
            yield name, array, self.readers.get(name, ())


def extract(model: Model, inputs: Sequence[Value], outputs: Sequence[str]) -> Model:
    """Return the part of a model between given tensors as a model of its own.

    Args:
        model: The model to cut from; weights are shared, not copied.
        inputs: New graph inputs: inner tensors, original inputs, or weights to be fed.
        outputs: Names of the tensors that the new model returns.

    Returns:
        A model with the nodes that `outputs` need, cut at `inputs`; original inputs that
        are still needed keep their declaration.
    """
    cut = {value.name for value in inputs}
    wanted, needed, names = list(outputs), set[str](), set[str]()
    while wanted:
        name = wanted.pop()
        if name in names or name in cut or not name:
            continue
        names.add(name)
        node = model.producers.get(name)
        if node is not None and node.id not in needed:
            needed.add(node.id)
            wanted += [*node.inputs, *node.captured]
    source = model.skeleton
    proto = onnx.ModelProto(ir_version=max(source.ir_version, 4))
    proto.opset_import.extend(source.opset_import)
    proto.functions.extend(source.functions)
    proto.graph.name = source.graph.name or "graph"
    proto.graph.node.extend(n.proto for n in model.nodes if n.id in needed)
    stubs = [t for t in source.graph.initializer if t.name in names]
    proto.graph.initializer.extend(stubs)
    initial = {t.name for t in stubs}
    proto.graph.input.extend(_declare(value) for value in inputs)
    proto.graph.input.extend(
        v for v in source.graph.input if v.name in names and v.name not in initial
    )
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    weights = {t.name: model.weights[t.name] for t in stubs if t.name in model.weights}
    return Model(proto, weights)


def fill(tensor: onnx.TensorProto, array: Array) -> None:
    """Put an array into an initializer that carries name and documentation already."""
    del tensor.dims[:]
    tensor.dims.extend(array.shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    little = array.dtype.newbyteorder("<")
    tensor.raw_data = np.ascontiguousarray(array, dtype=little).tobytes()


def stub(tensor: onnx.TensorProto, array: Array) -> None:
    """Give an initializer the dtype and dims of an array, without its payload."""
    del tensor.dims[:]
    tensor.dims.extend(array.shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)


def captured_names(graph: onnx.GraphProto) -> set[str]:
    """Return the outer names that a subgraph reads, at any depth."""
    inside = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    inside |= {name for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in node.input if name}
    read |= {v.name for v in graph.output}
    for node in graph.node:
        for body in subgraphs(node):
            read |= captured_names(body)
    return read - inside


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node carries as attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    return other


def _node(proto: onnx.NodeProto) -> Node:
    domain = "" if proto.domain in DEFAULT_DOMAINS else proto.domain + "::"
    captured: set[str] = set()
    for body in subgraphs(proto):
        captured |= captured_names(body)
    outputs = tuple(proto.output)
    first = next((name for name in outputs if name), "")
    return Node(
        proto, first, domain + proto.op_type, tuple(proto.input), outputs, frozenset(captured)
    )


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, onnx.TensorProto):
        array = numpy_helper.to_array(value)
        array.setflags(write=False)
        return array
    if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
        return tuple(value)
    return value


def _value(info: onnx.ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, ValueError):
        dtype = np.dtype(object)
    if not tensor.HasField("shape"):
        return Value(info.name, dtype, None)
    dims = tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
        for d in tensor.shape.dim
    )
    return Value(info.name, dtype, dims)


def _declare(value: Value) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    shape = None if value.shape is None else list(value.shape)
    return onnx.helper.make_tensor_value_info(value.name, kind, shape)
