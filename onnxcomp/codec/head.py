"""The head of a packed file: the graph, and where and how its tensors lie behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.helper import np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype

from onnxcomp.codec.codebooks import read_codebook, write_codebook
from onnxcomp.codec.coders import CODERS, CoderId, segments
from onnxcomp.codec.contexts import ContextModel
from onnxcomp.codec.fields import FieldReader, FieldWriter
from onnxcomp.codec.mixing import Layout
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.records import Kind, Record, read_record, write_record
from onnxcomp.codec.tables import MAX_TABLES, Tables, read_codes, write_codes
from onnxcomp.errors import InvalidModelError
from onnxcomp.loading import LoadLimits, parse_model
from onnxcomp.loading.tensors import PAYLOADS, check_dims, check_tensor, is_external
from onnxcomp.model import ARRAY_TYPES, subgraphs

Array = npt.NDArray[Any]

_MAX_SEGMENT_BYTES = 2**30


@dataclass(frozen=True)
class Segment:
    """One segment of a stream.

    Attributes:
        length: Its bytes in the file.
        crc: Their CRC-32.
    """

    length: int
    crc: int


@dataclass(frozen=True)
class Head:
    """What a packed file says before its payload.

    Attributes:
        skeleton: The model; the tensors that are coded have no payload.
        tables: Frequency tables.
        codebooks: Exact values.
        records: One for each coded tensor, in the order of the skeleton.
        segments: Of all streams, in the order of `CODERS`; they follow the head in this order.
    """

    skeleton: onnx.ModelProto
    tables: Tables
    codebooks: Sequence[Array]
    records: Sequence[Record]
    segments: Sequence[Segment]

    def pieces(self, coder: CoderId) -> Pieces:
        """Return the sequences that a coder holds."""
        return pieces_of(self.records, coder)

    def stubs(self) -> list[onnx.TensorProto]:
        """Return the initializers that are coded."""
        return [t for t in self.skeleton.graph.initializer if _is_stub(t)]

    def to_bytes(self) -> bytes:
        """Return the head as bytes."""
        fields = FieldWriter()
        skeleton = self.skeleton.SerializeToString(deterministic=True)
        fields.number(len(skeleton))
        fields.raw(skeleton)
        fields.number(len(self.tables.codes))
        for codes in self.tables.codes:
            write_codes(codes, fields)
        fields.number(len(self.codebooks))
        for codebook in self.codebooks:
            fields.number(np_dtype_to_tensor_dtype(codebook.dtype))
            write_codebook(codebook, fields)
        for record in self.records:
            write_record(record, self.codebooks, self.tables.models, fields)
        for segment in self.segments:
            fields.number(segment.length)
        for segment in self.segments:
            fields.raw(segment.crc.to_bytes(4, "little"))
        return bytes(fields.data)

    @classmethod
    def from_bytes(cls, data: bytes, limits: LoadLimits, decoded_bytes: int) -> Head:
        """Read a head that nobody vouches for.

        Args:
            data: Its bytes.
            limits: What the model may ask for.
            decoded_bytes: The bytes that its tensors must have when decoded.

        Raises:
            InvalidModelError: It is damaged, or breaks a limit.
            UnsupportedModelError: A tensor is a segment of another.
        """
        fields = FieldReader(data)
        skeleton = parse_model(fields.raw(fields.number(len(data))), limits)
        _check_skeleton(skeleton, limits)
        stubs = [t for t in skeleton.graph.initializer if _is_stub(t)]
        shapes = [_shape_of(stub, limits) for stub in stubs]
        dtypes = [_dtype_of(stub.data_type) for stub in stubs]
        sizes = (math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
        if sum(sizes) != decoded_bytes:
            raise InvalidModelError("its tensors have not the size that it declares")
        codes = [read_codes(fields) for _ in range(fields.number(MAX_TABLES))]
        codebooks, room = list[Array](), decoded_bytes  # each has fewer bytes than its tensor
        for _ in range(fields.number(len(stubs))):
            codebooks.append(_read_codebook(fields, room))
            room -= codebooks[-1].nbytes
        models, layouts = list[ContextModel](), list[Layout]()
        records = [
            read_record(fields, dtype, shape, codebooks, len(codes), models, layouts)
            for dtype, shape in zip(dtypes, shapes, strict=True)
        ]
        _check_references(records, dtypes, shapes, len(codebooks))
        found = _read_segments(fields, records)
        fields.end()
        return cls(skeleton, Tables(codes, models, layouts), codebooks, records, found)


def pieces_of(records: Sequence[Record], coder: CoderId) -> Pieces:
    """Return the sequences that a coder holds."""
    parts = (part for record in records for part in record.parts)
    held = [part for part in parts if part.coder == coder and part.count]
    counts = np.array([part.count for part in held], np.int64)
    return Pieces(np.cumsum(counts), np.array([part.table for part in held], np.int64))


def type_of(stub: onnx.TensorProto) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return dtype and shape of a coded initializer."""
    return _dtype_of(stub.data_type), tuple(stub.dims)


def _read_segments(fields: FieldReader, records: Sequence[Record]) -> list[Segment]:
    total = 0
    for coder_id, coder in CODERS.items():
        total += len(segments(pieces_of(records, coder_id), coder))
    lengths = [fields.number(_MAX_SEGMENT_BYTES) for _ in range(total)]
    crcs = [int.from_bytes(fields.raw(4), "little") for _ in range(total)]
    return [Segment(length, crc) for length, crc in zip(lengths, crcs, strict=True)]


def _read_codebook(fields: FieldReader, most: int) -> Array:
    return read_codebook(fields, _dtype_of(fields.number(2**8)), most)


def _check_references(
    records: Sequence[Record],
    dtypes: Sequence[np.dtype[Any]],
    shapes: Sequence[tuple[int, ...]],
    codebooks: int,
) -> None:
    """Refuse copies of what is no earlier tensor like them, and codebooks without a tensor."""
    for number, record in enumerate(records):
        if record.kind != Kind.COPY:
            continue
        first = record.detail
        if not first < number or records[first].kind == Kind.COPY:
            raise InvalidModelError("a copy of a tensor is of none before it")
        sizes = [math.prod(shapes[i]) for i in (first, number)]
        if dtypes[first] != dtypes[number] or sizes[0] != sizes[1]:
            raise InvalidModelError("a copy of a tensor is of one of another size")
    if {r.codebook for r in records if r.has_codebook} != set(range(codebooks)):
        raise InvalidModelError("a codebook belongs to no tensor")


def _is_stub(tensor: onnx.TensorProto) -> bool:
    """Return whether an initializer has elements, but no payload."""
    return 0 not in tensor.dims and not any(len(getattr(tensor, name)) for name in PAYLOADS)


def _shape_of(stub: onnx.TensorProto, limits: LoadLimits) -> tuple[int, ...]:
    dims = tuple(stub.dims)
    check_dims(dims, f"initializer '{stub.name}'", limits)
    return dims


def _dtype_of(number: int) -> np.dtype[Any]:
    if number not in ARRAY_TYPES:
        raise InvalidModelError(f"tensors of data type {number} cannot be coded")
    return np.dtype(tensor_dtype_to_np_dtype(number))


def _check_skeleton(skeleton: onnx.ModelProto, limits: LoadLimits) -> None:
    """Refuse external data and contradictions anywhere, and initializers of the same name."""
    names = [tensor.name for tensor in skeleton.graph.initializer]
    if len(set(names)) < len(names):
        raise InvalidModelError("two initializers have the same name")
    for tensor in _tensors(skeleton):
        if is_external(tensor) or tensor.external_data:
            raise InvalidModelError(f"tensor '{tensor.name}' refers to another file")
    for number, tensor in enumerate(_tensors(skeleton)):
        if number >= len(names) or not _is_stub(tensor):
            check_tensor(tensor, f"tensor '{tensor.name}'", limits)


def _tensors(skeleton: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield all tensors of a model, first its initializers.

    The wire format's check has bounded its depth.
    """
    graphs = [skeleton.graph]
    nodes = [node for function in skeleton.functions for node in function.node]
    while graphs or nodes:
        for graph in graphs:
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        graphs = [graph for node in nodes for graph in subgraphs(node)]
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            single = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for sparse in (*single, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
        nodes = []
