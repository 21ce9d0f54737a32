"""Checks of every tensor in a model file, and its external data.

A payload must have exactly the length that dtype and dimensions ask for. External data must
be an ordinary file inside the model's folder, reached without links; it is memory-mapped.
"""

import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from onnxcomp.errors import InvalidModelError, UnsupportedModelError
from onnxcomp.loading.limits import LoadLimits

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

_T = onnx.TensorProto
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Storage:
    """How the elements of one dtype are stored.

    Attributes:
        bits: Bits of an element in raw data.
        field: The field for elements that are not raw.
        per_entry: Elements of one entry of that field; 0.5 for complex numbers.
    """

    bits: int
    field: str
    per_entry: float = 1

    def entries(self, elements: int) -> int:
        """Return the entries of `field` that hold so many elements."""
        return math.ceil(elements / self.per_entry)


_STORAGE: Mapping[int, _Storage] = {
    _T.FLOAT: _Storage(32, "float_data"),
    _T.DOUBLE: _Storage(64, "double_data"),
    _T.COMPLEX64: _Storage(64, "float_data", 0.5),
    _T.COMPLEX128: _Storage(128, "double_data", 0.5),
    _T.INT64: _Storage(64, "int64_data"),
    _T.UINT32: _Storage(32, "uint64_data"),
    _T.UINT64: _Storage(64, "uint64_data"),
    _T.STRING: _Storage(0, "string_data"),
    **dict.fromkeys((_T.INT32,), _Storage(32, "int32_data")),
    **dict.fromkeys(
        (_T.INT16, _T.UINT16, _T.FLOAT16, _T.BFLOAT16), _Storage(16, "int32_data")
    ),
    **dict.fromkeys((_T.INT8, _T.UINT8, _T.BOOL), _Storage(8, "int32_data")),
    **{
        getattr(_T, name): _Storage(bits, "int32_data", per_entry)
        for name, bits, per_entry in (
            ("FLOAT8E4M3FN", 8, 1),
            ("FLOAT8E4M3FNUZ", 8, 1),
            ("FLOAT8E5M2", 8, 1),
            ("FLOAT8E5M2FNUZ", 8, 1),
            ("FLOAT8E8M0", 8, 1),
            ("FLOAT6E2M3", 6, 1),
            ("FLOAT6E3M2", 6, 1),
            ("UINT4", 4, 2),
            ("INT4", 4, 2),
            ("FLOAT4E2M1", 4, 2),
            ("UINT2", 2, 4),
            ("INT2", 2, 4),
        )
        # The newest dtypes are unknown to the oldest onnx that is allowed.
        if hasattr(_T, name)
    },
}
PAYLOADS = ("raw_data", *sorted({s.field for s in _STORAGE.values()}))
# What NumPy holds without packing; external data of other dtypes is read into the model.
_MAPPABLE = frozenset(
    {_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.BFLOAT16, _T.BOOL, _T.INT8, _T.INT16, _T.INT32}
    | {_T.INT64, _T.UINT8, _T.UINT16, _T.UINT32, _T.UINT64}
)
FLOAT_TYPES = frozenset({_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.BFLOAT16})


def check_tensor(tensor: onnx.TensorProto, where: str, limits: LoadLimits) -> int:
    """Check dtype, dimensions and payload of one tensor, external data excepted.

    Returns:
        The bytes of its payload in raw form; 0 for strings.

    Raises:
        InvalidModelError: The tensor contradicts itself or is too large.
        UnsupportedModelError: It is a segment of another tensor.
    """
    storage = _STORAGE.get(tensor.data_type)
    if storage is None:
        raise InvalidModelError(f"{where} has unknown data type {tensor.data_type}")
    if tensor.HasField("segment"):
        raise UnsupportedModelError(f"{where} is a segment; save the model without segments")
    elements = check_dims(tuple(tensor.dims), where, limits)
    size = -(-elements * storage.bits // 8)
    present = {name: n for name in PAYLOADS if (n := len(getattr(tensor, name)))}
    if is_external(tensor):
        if present or tensor.data_type == _T.STRING:
            raise InvalidModelError(f"{where} is external; it cannot hold text or a payload")
        return size
    if len(tensor.external_data):
        raise InvalidModelError(f"{where} names external data but is not marked external")
    raw = "raw_data" in present and tensor.data_type != _T.STRING
    expected = {"raw_data": size} if raw else {storage.field: storage.entries(elements)}
    if present != {name: n for name, n in expected.items() if n}:
        raise InvalidModelError(
            f"{where} with dims {list(tensor.dims)} needs {expected} of payload; "
            f"it has {present or 'none'}"
        )
    _check_strings(tensor, where)
    return size


def check_dims(dims: tuple[int, ...], where: str, limits: LoadLimits) -> int:
    """Return the number of elements of a tensor, or refuse its dimensions."""
    if len(dims) > limits.rank:
        raise InvalidModelError(
            f"{where} has {len(dims)} dimensions; at most {limits.rank} are allowed"
        )
    if min(dims, default=0) < 0:
        raise InvalidModelError(f"{where} has a negative dimension: {list(dims)}")
    elements = math.prod(dims)
    if elements > limits.elements:
        raise InvalidModelError(
            f"{where} has dims {list(dims)}, more than {limits.elements} elements"
        )
    return elements


def _check_strings(tensor: onnx.TensorProto, where: str) -> None:
    for text in tensor.string_data:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise InvalidModelError(f"{where} holds text that is not UTF-8") from error


def is_external(tensor: onnx.TensorProto) -> bool:
    """Return whether the payload of a tensor lies in another file."""
    return tensor.data_location == _T.EXTERNAL


@dataclass(frozen=True, slots=True)
class Demand:
    """What the values of a tensor must be, besides numbers.

    Attributes:
        finite: Infinity is refused: the tensor is a weight.
        positive: Negative values are refused: it is a variance.
    """

    finite: bool = False
    positive: bool = False

    def check(self, pieces: Iterable[Array], where: str) -> None:
        """Check a floating-point tensor that comes in pieces."""
        for piece in pieces:
            wrong = ~np.isfinite(piece) if self.finite else np.isnan(piece)
            if self.positive:
                wrong |= piece < 0
            if wrong.any():
                raise InvalidModelError(
                    f"{where} holds {piece[wrong][0]}; export the model again from sound "
                    "weights"
                )


def pieces_of(array: Array) -> Iterator[Array]:
    """Yield an array in flat pieces, so that tests of it stay small."""
    flat = np.ravel(array)
    for begin in range(0, flat.size, _CHUNK):
        yield flat[begin : begin + _CHUNK]


@dataclass(frozen=True, slots=True)
class _Span:
    """The bytes of one external tensor in its file."""

    begin: int
    end: int
    where: str


@dataclass(slots=True)
class _DataFile:
    """One open external data file."""

    descriptor: int
    size: int
    spans: list[_Span] = field(default_factory=list)
    mapped: Bytes | None = None

    def map(self) -> Bytes:
        if self.mapped is None:
            with os.fdopen(os.dup(self.descriptor), "rb") as stream:
                self.mapped = np.memmap(stream, np.uint8, "r")
        return self.mapped


class ExternalData:
    """The external data files of one model, opened once each and closed on exit.

    Args:
        folder: The folder of the model file, free of links.
        model_bytes: Size of the model file; counts towards the total.
        limits: Bounds on the total size.
    """

    def __init__(self, folder: Path, model_bytes: int, limits: LoadLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._files: dict[tuple[int, int], _DataFile] = {}
        self._by_location: dict[str, _DataFile] = {}
        self._spans: dict[str, tuple[_DataFile, _Span]] = {}
        self.total_bytes = model_bytes
        self.arrays: dict[str, Array] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The external data files, in the order of their first use."""
        return tuple(self._folder / location for location in self._by_location)

    def __enter__(self) -> "ExternalData":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file.descriptor)

    def resolve(self, tensor: onnx.TensorProto, size: int, where: str, *, top: bool) -> None:
        """Take the reference to external data out of `tensor`.

        Args:
            tensor: A checked external tensor.
            size: The bytes it needs.
            where: How to name it in errors.
            top: It is an initializer of the main graph: its array goes to `arrays`,
                memory-mapped. Other payloads are read into the tensor.

        Raises:
            InvalidModelError: The reference is malformed, leaves the model's folder, or does
                not fit its file.
        """
        location, offset, length = _reference(tensor, where)
        if length not in (None, size):
            raise InvalidModelError(
                f"{where} needs {size} bytes; its external data declares {length}"
            )
        file = self._open(location, where)
        if offset > file.size or size > file.size - offset:
            raise InvalidModelError(
                f"{where} needs bytes {offset} to {offset + size} of '{location}', "
                f"which has {file.size}"
            )
        span = _Span(offset, offset + size, where)
        file.spans.append(span)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        if top and tensor.data_type in _MAPPABLE:
            self._spans[tensor.name] = (file, span)
            self.arrays[tensor.name] = _array(tensor, file, span)
        else:
            data = os.pread(file.descriptor, size, offset)
            if len(data) != size:
                raise InvalidModelError(f"{where}: '{location}' changed while it was read")
            tensor.raw_data = data

    def check_overlaps(self) -> None:
        """Refuse tensors that share some, but not all of their bytes."""
        for file in self._files.values():
            filled = (span for span in file.spans if span.end > span.begin)
            spans = sorted(filled, key=lambda span: (span.begin, span.end))
            for one, two in pairwise(spans):
                if two.begin < one.end and (one.begin, one.end) != (two.begin, two.end):
                    raise InvalidModelError(
                        f"{one.where} and {two.where} overlap in their external data"
                    )

    def check_values(self, name: str, demand: Demand) -> None:
        """Check a mapped array, read in pieces so that the map does not become resident."""
        file, span = self._spans[name]
        dtype = self.arrays[name].dtype
        if dtype.kind not in "biu":
            demand.check(_pieces(file.descriptor, span, dtype), span.where)

    def _open(self, location: str, where: str) -> _DataFile:
        if location in self._by_location:
            return self._by_location[location]
        descriptor = _open_inside(self._folder, location, where)
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        if identity in self._files:
            os.close(descriptor)
        else:
            self._files[identity] = _DataFile(descriptor, status.st_size)
            self.total_bytes += status.st_size
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise InvalidModelError(
                f"{where}: external data '{location}' is not an ordinary file with one name"
            )
        if self.total_bytes > self._limits.total_bytes:
            raise InvalidModelError(
                f"model and external data take {self.total_bytes} bytes; "
                f"at most {self._limits.total_bytes} are allowed"
            )
        return self._by_location.setdefault(location, self._files[identity])


def _reference(tensor: onnx.TensorProto, where: str) -> tuple[str, int, int | None]:
    """Return location, offset and length of an external tensor."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    unknown = sorted(set(entries) - _EXTERNAL_KEYS)
    if unknown or len(entries) != len(tensor.external_data):
        raise InvalidModelError(f"{where} has unknown or repeated external keys: {unknown}")
    location = entries.get("location", "")
    if not _is_plain_subpath(location):
        raise InvalidModelError(
            f"{where}: external location {location[:200]!r} is not a plain path inside the "
            "folder of the model"
        )
    numbers: dict[str, int] = {}
    for key in {"offset", "length"} & set(entries):
        text = entries[key]
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InvalidModelError(f"{where} has external {key} {text[:40]!r}")
        numbers[key] = int(text)
    return location, numbers.get("offset", 0), numbers.get("length")


def _is_plain_subpath(location: str) -> bool:
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    return bool(
        posix.parts
        and not posix.is_absolute()
        and not windows.anchor
        and "\0" not in location
        and ".." not in (*posix.parts, *windows.parts)
    )


def _open_inside(folder: Path, location: str, where: str) -> int:
    """Open a file below `folder` following no link, and without waiting for a FIFO."""
    *parents, name = PurePosixPath(location).parts
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    current = -1
    try:
        current = os.open(folder, flags | os.O_DIRECTORY)
        for parent in parents:
            below = os.open(parent, flags | os.O_DIRECTORY, dir_fd=current)
            os.close(current)
            current = below
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=current)
    except OSError as error:
        raise InvalidModelError(
            f"{where}: external data '{location}' cannot be read ({error.strerror}); it must "
            "be an ordinary file in the model's folder, not a link"
        ) from error
    finally:
        if current >= 0:
            os.close(current)


def _array(tensor: onnx.TensorProto, file: _DataFile, span: _Span) -> Array:
    dtype, dims = tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    if span.begin == span.end:
        empty = np.empty(dims, dtype)
        empty.setflags(write=False)
        return empty
    return file.map()[span.begin : span.end].view(dtype).reshape(dims)


def _pieces(descriptor: int, span: _Span, dtype: np.dtype[np.generic]) -> Iterator[Array]:
    for begin in range(span.begin, span.end, _CHUNK):
        data = os.pread(descriptor, min(_CHUNK, span.end - begin), begin)
        yield np.frombuffer(data, dtype, count=len(data) // dtype.itemsize)
