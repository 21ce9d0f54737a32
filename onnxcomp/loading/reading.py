"""Reading a model file that nobody vouches for.

The order matters: path, bounded read, wire format, parse, structure, attributes, tensors;
then, unless the model is only stored, what running takes: operators, sizes, values. No library
but the protobuf parser has touched the model when all of it has passed; the checker and
onnxruntime then see it first in a bounded child process (`sandbox.py`).
"""

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # has no stubs
from onnx import numpy_helper

from onnxcomp.errors import InvalidModelError, OnnxcompError
from onnxcomp.loading.constants import Constants, all_constants
from onnxcomp.loading.expansion import check_expansion
from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.operators import check_attributes, check_nodes
from onnxcomp.loading.sizes import check_sizes
from onnxcomp.loading.structure import DEFAULT_DOMAINS, Structure, describe, walk
from onnxcomp.loading.tensors import (
    FLOAT_TYPES,
    Demand,
    ExternalData,
    check_tensor,
    is_external,
    pieces_of,
)
from onnxcomp.loading.wire import check_wire_format

PACKED_MAGIC = b"\x93ONXC\r\n\x01"
# Operators whose constant inputs are weights; elsewhere -inf is an ordinary mask.
_WEIGHTED = frozenset(
    {"BatchNormalization", "Conv", "ConvTranspose", "DeformConv", "GRU", "Gemm"}
    | {"GroupNormalization", "InstanceNormalization", "LSTM", "LayerNormalization"}
    | {"MatMul", "PRelu", "RNN"}
)


@dataclass(frozen=True)
class LoadedModel:
    """A model file that passed every check which needs no runtime.

    Attributes:
        proto: The model, its nodes in topological order. Initializers with an array in
            `external` keep name, dtype and dims, and have no payload.
        external: Read-only memory-mapped arrays of the initializers whose data lie outside
            the model file, by name.
        path: The file that was read, links resolved.
        files: That file and its external data files, none of which may be overwritten.
        file_bytes: Size of all of them.
        foreign_ops: Operators outside the ONNX domain, as "domain::operator", sorted.
        reordered: The nodes in the file were not in topological order.
        warnings: What was put right, one sentence each.
        packed: The file is a packed one, which other libraries do not read.
    """

    proto: onnx.ModelProto
    external: Mapping[str, npt.NDArray[Any]]
    path: Path
    files: tuple[Path, ...]
    file_bytes: int
    foreign_ops: tuple[str, ...]
    reordered: bool
    warnings: tuple[str, ...]
    packed: bool = False


def read_model(
    path: str | os.PathLike[str], *, limits: LoadLimits | None = None, to_store: bool = False
) -> LoadedModel:
    """Read and check a model file with its external data.

    Args:
        path: An ONNX file or a packed one (`.onnxc`); links to it are followed, links in its
            external data are not.
        limits: What the file may ask for; the defaults of `LoadLimits` if None.
        to_store: The model is copied and not run: its operators and values, and what they
            would cost, are not looked at.

    Returns:
        The parsed model.

    Raises:
        InvalidModelError: The file cannot be read, is broken, or breaks a limit.
        UnsupportedModelError: The file is sound, but has what onnxcomp does not read.
    """
    limits = limits or LoadLimits()
    try:
        resolved = Path(os.path.realpath(path))
        with _opened(resolved) as stream:
            if stream.peek(len(PACKED_MAGIC)).startswith(PACKED_MAGIC):
                return _read_packed(stream, resolved, limits, to_store)
            return _read_plain(stream, resolved, limits, to_store)
    except OnnxcompError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error
    except (OSError, ValueError) as error:
        raise InvalidModelError(f"{os.fspath(path)!r} cannot be read: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open an ordinary file, looked at only after it was opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelError("not an ordinary file")
        if status.st_size == 0:
            raise InvalidModelError("the file is empty")
        yield stream


def _size_of(stream: BufferedReader, most: int) -> int:
    """Return the size of a file, or refuse it."""
    size = os.fstat(stream.fileno()).st_size
    if size > most:
        raise InvalidModelError(f"the file has {size} bytes; at most {most} are allowed")
    return size


def _read_plain(
    stream: BufferedReader, path: Path, limits: LoadLimits, to_store: bool
) -> LoadedModel:
    size = _size_of(stream, limits.model_bytes)
    data = stream.read(size + 1)
    if len(data) != size:
        raise InvalidModelError("the file changed while it was read")
    proto = parse_model(data, limits)
    del data
    return _check(proto, path, size, limits, to_store)


def _read_packed(
    stream: BufferedReader, path: Path, limits: LoadLimits, to_store: bool
) -> LoadedModel:
    """Unpack a file into a private folder and read it there; its arrays stay mapped."""
    from onnxcomp.codec import unpack_to

    # The limit of protobuf is for what is parsed; here the weights lie outside of that.
    size = _size_of(stream, limits.total_bytes)
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        plain = unpack_to(path, Path(folder), limits=limits)
        with _opened(plain) as unpacked:
            loaded = _read_plain(unpacked, plain, limits, to_store)
    return replace(loaded, path=path, files=(path,), file_bytes=size, packed=True)


def parse_model(data: bytes, limits: LoadLimits) -> onnx.ModelProto:
    """Parse the bytes of a model after a look at their wire format.

    Raises:
        InvalidModelError: They are no model, or break a limit.
    """
    check_wire_format(data, limits)
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
        return proto
    except DecodeError as error:
        raise InvalidModelError(f"not a readable ONNX file ({error})") from error


def _check(
    proto: onnx.ModelProto, path: Path, size: int, limits: LoadLimits, to_store: bool
) -> LoadedModel:
    structure = walk(proto, limits)
    with ExternalData(path.parent, size, limits) as external:
        _check_tensors(structure, external, limits)
        if not to_store:
            _check_running(structure, external, limits)
        return LoadedModel(
            proto=proto,
            external=MappingProxyType(external.arrays),
            path=path,
            files=(path, *external.files),
            file_bytes=external.total_bytes,
            foreign_ops=structure.foreign_ops(),
            reordered=bool(structure.warnings),
            warnings=structure.warnings,
        )


def _check_running(structure: Structure, external: ExternalData, limits: LoadLimits) -> None:
    """Check what the model does and costs when it runs."""
    constants = all_constants(structure, external.arrays)
    check_expansion(structure, constants, limits)
    for body, known in zip(structure.bodies, constants, strict=True):
        check_nodes(body, structure, known, limits)
        check_sizes(body, known, limits)
    _check_values(structure, constants, external)


def _check_tensors(structure: Structure, external: ExternalData, limits: LoadLimits) -> None:
    """Check all tensors of a model and take the references to external data out of it."""
    main = structure.bodies[0]
    for body in structure.bodies:
        tensors = [(f"initializer '{t.name}'", t, body is main) for t in body.initializers]
        for node in body.proto.node:
            check_attributes(node, body, limits)
            for attribute in node.attribute:
                where = f"tensor '{attribute.name}' of {describe(node)}"
                held = [attribute.t] if attribute.HasField("t") else []
                tensors += [(where, tensor, False) for tensor in (*held, *attribute.tensors)]
        for where, tensor, top in tensors:
            size = check_tensor(tensor, where, limits)
            if is_external(tensor):
                external.resolve(tensor, size, where, top=top)
    external.check_overlaps()


def _check_values(
    structure: Structure, constants: Sequence[Constants], external: ExternalData
) -> None:
    """Refuse NaN in any constant, infinity in weights and negative variances."""
    nodes = [
        node
        for body in structure.bodies
        for node in body.proto.node
        if node.op_type in _WEIGHTED and node.domain in DEFAULT_DOMAINS
    ]
    weights = {name for node in nodes for name in node.input}
    variances = {node.input[4] for node in nodes if node.op_type == "BatchNormalization"}

    def demand(name: str) -> Demand:
        return Demand(finite=name in weights, positive=name in variances)

    for name in external.arrays:
        external.check_values(name, demand(name))
    for known in constants:
        for name, tensor in known.own():
            if tensor.data_type in FLOAT_TYPES:
                array = numpy_helper.to_array(tensor)
                demand(name).check(pieces_of(array), f"tensor '{name}'")
