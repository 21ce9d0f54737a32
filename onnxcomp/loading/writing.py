"""Writing files so that either all of a file appears under its name, or nothing does.

Weights are streamed: a protobuf message is its fields in any order, so the graph without
its initializers is serialized as usual, and each initializer is appended behind it, its
array written from where it lies.
"""

import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from onnxcomp.errors import ParameterError
from onnxcomp.loading.tensors import PAYLOADS, is_external

Array = npt.NDArray[Any]
_Initializer = tuple[onnx.TensorProto, Array | None]

MODEL_BYTES = 1_900_000_000  # protobuf ends at 2 GiB
_ALIGNMENT = 4096
_LENGTH_TYPE = 2
_NUMBERS = {
    "graph": onnx.ModelProto.GRAPH_FIELD_NUMBER,
    "initializer": onnx.GraphProto.INITIALIZER_FIELD_NUMBER,
    "raw_data": onnx.TensorProto.RAW_DATA_FIELD_NUMBER,
}


def write_model(
    proto: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    external: Mapping[str, Array] | None = None,
    external_threshold: int = MODEL_BYTES,
) -> int:
    """Write a model atomically, with its weights inside or in one file beside it.

    Args:
        proto: The model; it is not changed.
        path: The file to write; one that exists is replaced.
        inputs: Files that must not be overwritten.
        external: Arrays of those initializers that have no payload in `proto`, by name.
        external_threshold: Size in bytes above which weights go to `<path>.data`; 0 asks
            for that file at any size.

    Returns:
        The bytes written to all files.

    Raises:
        ParameterError: The target is one of `inputs` or no ordinary file, it cannot be
            written, or `external` does not fit `proto`.
    """
    target = Path(path)
    arrays = _arrays(proto, external or {})
    size = proto.ByteSize() + sum(array.nbytes for array in arrays.values())
    data = [target.with_name(target.name + ".data")]
    targets = [*(data if size > min(external_threshold, MODEL_BYTES) else []), target]
    for file in targets:
        _check_target(file, inputs)
    try:
        with _replacing(targets) as streams:
            initializers = [(t, arrays.get(t.name)) for t in proto.graph.initializer]
            if len(targets) > 1:
                initializers = _write_data(initializers, streams[0], targets[0].name)
            _write_proto(proto, initializers, streams[-1])
            return sum(stream.tell() for stream in streams)
    except OSError as error:
        raise ParameterError(f"'{target}' cannot be written: {error.strerror}") from error


def write_text(
    path: str | os.PathLike[str], text: str, *, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Write a text file (UTF-8) atomically.

    Args:
        path: The file to write; one that exists is replaced.
        text: Its content.
        inputs: Files that must not be overwritten.

    Raises:
        ParameterError: As for `write_model`.
    """
    with replacing(path, inputs=inputs) as stream:
        stream.write(text.encode())


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[BinaryIO]:
    """Give a stream whose content gets the name `path` if the block succeeds.

    Args:
        path: The file to write; one that exists is replaced.
        inputs: Files that must not be overwritten.

    Raises:
        ParameterError: As for `write_model`.
    """
    target = Path(path)
    _check_target(target, inputs)
    try:
        with _replacing([target]) as (stream,):
            yield stream
    except OSError as error:
        raise ParameterError(f"'{target}' cannot be written: {error.strerror}") from error


def _arrays(proto: onnx.ModelProto, external: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return `external` after checking that each initializer has exactly one payload."""
    for tensor in proto.graph.initializer:
        array = external.get(tensor.name)
        filled = any(len(getattr(tensor, name)) for name in PAYLOADS) or 0 in tensor.dims
        if is_external(tensor) or (array is None and not filled):
            raise ParameterError(f"write_model: initializer '{tensor.name}' has no array")
        if array is None:
            continue
        if filled and array.size:
            raise ParameterError(f"write_model: '{tensor.name}' has a payload and an array")
        expected = tensor_dtype_to_np_dtype(tensor.data_type)
        if (array.dtype, array.shape) != (expected, tuple(tensor.dims)):
            raise ParameterError(
                f"write_model: the array of '{tensor.name}' is {array.dtype}{array.shape}; "
                f"the model declares {expected}{tuple(tensor.dims)}"
            )
    if unknown := set(external) - {tensor.name for tensor in proto.graph.initializer}:
        raise ParameterError(f"write_model: the model has no initializer '{min(unknown)}'")
    return external


def _check_target(target: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise ParameterError(f"'{target}' cannot be written: there is no folder '{folder}'")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ParameterError(f"'{target}' cannot be written: '{folder}' is not writable")
    if os.path.lexists(target):
        mode = target.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise ParameterError(f"'{target}' cannot be written: it is no ordinary file")
    for path in map(Path, inputs):
        same_name = os.path.realpath(path) == os.path.realpath(target)
        if same_name or (path.exists() and target.exists() and path.samefile(target)):
            raise ParameterError(f"'{target}' is an input file, which is never overwritten")


@contextmanager
def _replacing(targets: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open a temporary file for each target; rename all of them if the block succeeds."""
    token = secrets.token_hex(8)
    temporary = [target.with_name(f".{target.name}.{token}.tmp") for target in targets]
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    created: list[Path] = []
    try:
        with ExitStack() as stack:
            streams: list[BinaryIO] = []
            for file in temporary:
                descriptor = os.open(file, flags, 0o666)
                created.append(file)
                streams.append(stack.enter_context(os.fdopen(descriptor, "wb")))
            yield streams
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
        for file, target in zip(temporary, targets, strict=True):
            file.replace(target)
            created.remove(file)
            created.append(target)
        created.clear()
    finally:
        for file in created:
            with suppress(FileNotFoundError):
                file.unlink()
    _sync_folder(targets[0].parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_data(
    initializers: Iterable[_Initializer], stream: BinaryIO, location: str
) -> list[_Initializer]:
    """Write large payloads to the data file; return initializers that refer to it."""
    written: list[_Initializer] = []
    for tensor, array in initializers:
        payload = tensor.raw_data if array is None else _bytes(array)
        if len(payload) < _ALIGNMENT:
            written.append((tensor, array))
            continue
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        reference = onnx.TensorProto()
        reference.CopyFrom(tensor)
        reference.ClearField("raw_data")
        reference.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", location),
            ("offset", str(stream.tell())),
            ("length", str(len(payload))),
        ):
            reference.external_data.add(key=key, value=value)
        stream.write(payload)
        written.append((reference, None))
    return written


def _write_proto(
    proto: onnx.ModelProto, initializers: Sequence[_Initializer], stream: BinaryIO
) -> None:
    """Write the model with these initializers, streaming their arrays."""
    shell = onnx.ModelProto()
    shell.CopyFrom(proto)
    del shell.graph.initializer[:]
    graph = shell.graph.SerializeToString()
    shell.ClearField("graph")
    sizes = [_tensor_size(tensor, array) for tensor, array in initializers]
    lengths = sum(len(_key("initializer", size)) + size for size in sizes)
    stream.write(shell.SerializeToString())
    stream.write(_key("graph", len(graph) + lengths))
    stream.write(graph)
    for (tensor, array), size in zip(initializers, sizes, strict=True):
        stream.write(_key("initializer", size))
        stream.write(tensor.SerializeToString())
        if array is not None:
            stream.write(_key("raw_data", array.nbytes))
            stream.write(_bytes(array))


def _tensor_size(tensor: onnx.TensorProto, array: Array | None) -> int:
    payload = 0 if array is None else len(_key("raw_data", array.nbytes)) + array.nbytes
    return int(tensor.ByteSize()) + payload


def _key(field: str, length: int) -> bytes:
    """Return the bytes that announce a length-delimited field in protobuf's wire format."""
    encoded = bytearray()
    for value in (_NUMBERS[field] << 3 | _LENGTH_TYPE, length):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)


def _bytes(array: Array) -> memoryview:
    """Return the bytes of an array, copied only where it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
