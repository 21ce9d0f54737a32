"""Packed files (`.onnxc`), written and read; `FORMAT.md` describes them byte by byte."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.codec.coders import (
    CODERS,
    CoderId,
    StreamReader,
    compress,
    decompress,
    segments,
)
from onnxcomp.codec.head import Head, Segment, pieces_of, type_of
from onnxcomp.codec.planning import Plan, Profile, Tensors, plan_tensors
from onnxcomp.codec.records import Kind, Part, Record
from onnxcomp.codec.symbols import values_of
from onnxcomp.codec.tables import Tables
from onnxcomp.codec.transforms import (
    NARROW,
    from_bytes,
    from_escapes,
    from_planes,
    from_runs,
    shift_of,
)
from onnxcomp.errors import InvalidModelError, UnsupportedModelError
from onnxcomp.loading import PACKED_MAGIC, LoadLimits
from onnxcomp.model import Model, fill

Array = npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]

_PREFIX = struct.Struct("<8sIIQQ")  # magic, head packed, head raw, file, decoded bytes
_DIGEST_BYTES = 32
_HEAD_BEGIN = _PREFIX.size + _DIGEST_BYTES
_MAX_HEAD_BYTES = 64 * 2**20
_EXPANSION = 4096  # decoded bytes of one byte in the file, so that constants cannot bomb
_FREE_EXPANSION = 16 * 2**20
_CHUNK = 2**16  # symbols that are looked up at a time
_INLINE_BYTES = 64  # smaller tensors stay in the skeleton


def packed(model: Model, profile: Profile) -> list[bytes]:
    """Return the bytes of a packed file, in pieces; never more than faster profiles need.

    Raises:
        ParameterError: The profile is MAX and numba is not installed.
        UnsupportedModelError: The graph is too large for the format.
    """
    skeleton = model.to_proto(external=True)
    arrays: list[Array] = []
    for tensor in skeleton.graph.initializer:
        array = model.weights.get(tensor.name)
        if array is None:
            continue
        if array.nbytes <= _INLINE_BYTES:
            fill(tensor, array)
        else:
            arrays.append(array)
    decoded, tensors = sum(array.nbytes for array in arrays), Tensors.of(arrays)
    profiles = list(Profile)
    faster = profiles[: profiles.index(profile) + 1]
    files = [_packed(skeleton, plan_tensors(tensors, each), decoded) for each in faster]
    return min(files, key=lambda file: sum(map(len, file)))


def _packed(skeleton: onnx.ModelProto, plan: Plan, decoded: int) -> list[bytes]:
    tables = Tables(plan.codes, plan.models, plan.layouts)
    payload = coded(plan, tables)
    found = [Segment(len(part), zlib.crc32(part)) for part in payload]
    head = Head(skeleton, tables, plan.codebooks, plan.records, found).to_bytes()
    if len(head) > _MAX_HEAD_BYTES:
        raise UnsupportedModelError(
            f"the graph, with its constants and its text and narrow initializers, has "
            f"{len(head)} bytes; a packed file holds at most {_MAX_HEAD_BYTES} (make "
            "initializers of large Constant nodes)"
        )
    small = compress(head)
    total = _HEAD_BEGIN + len(small) + sum(map(len, payload))
    prefix = _PREFIX.pack(PACKED_MAGIC, len(small), len(head), total, decoded)
    return [prefix, hashlib.sha256(prefix + small).digest(), small, *payload]


def check_readable(pieces: Sequence[bytes]) -> None:
    """Check that a packed file is within the limits that hold when it is read.

    Args:
        pieces: What `packed` returns.

    Raises:
        UnsupportedModelError: It is not.
    """
    _, _, raw, total, decoded = _PREFIX.unpack(pieces[0])
    most = min(LoadLimits().total_bytes, _most_decoded(total))
    for what, size in (("weights", decoded), ("graph", raw)):
        if size > most:
            raise UnsupportedModelError(
                f"{size} bytes of {what} are packed into {total}; what decodes to more than "
                f"{most} is refused when a file of that size is read; keep the ONNX file"
            )


def coded(plan: Plan, tables: Tables) -> list[bytes]:
    """Return the segments of all streams."""
    coded: list[bytes] = []
    for coder_id, coder in CODERS.items():
        if coder_id not in plan.streams:
            continue
        pieces = pieces_of(plan.records, coder_id)
        stream = np.concatenate(plan.streams[coder_id])
        spans = segments(pieces, coder)
        parts = [stream[begin:end] for begin, end in spans]
        coded += coder.encode(parts, [pieces.between(*span) for span in spans], tables)
    return coded


class PackedFile:
    """A packed file, opened, with its head checked; a context manager.

    Args:
        path: The file; links to it are followed.
        limits: What it may ask for.

    Raises:
        InvalidModelError: It cannot be read, is damaged, or breaks a limit.
    """

    head: Head

    def __init__(self, path: str | os.PathLike[str], limits: LoadLimits | None = None) -> None:
        self.path = Path(os.path.realpath(path))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self.path, flags)
        except OSError as error:
            raise InvalidModelError(f"it cannot be read: {error.strerror}") from error
        try:
            self.size = _size_of(self._descriptor)
            self.head, end = self._read_head(limits or LoadLimits())
            self._begins = list(
                accumulate((s.length for s in self.head.segments), initial=end)
            )
            if self._begins[-1] != self.size:
                raise InvalidModelError("the segments do not end where the file ends")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Decode the coded tensors one by one, in the order of the skeleton.

        Yields:
            The name of an initializer and its array.

        Raises:
            InvalidModelError: A segment is damaged.
        """
        streams, records = self._streams(), self.head.records
        copies = {r.detail: i for i, r in enumerate(records) if r.kind == Kind.COPY}
        held = dict[int, Array]()  # until their last copy
        for number, (stub, record) in enumerate(zip(self.head.stubs(), records, strict=True)):
            dtype, shape = type_of(stub)
            if record.kind == Kind.COPY:
                first = record.detail
                array = held[first] if number < copies[first] else held.pop(first)
            else:
                array = self._decode(record, dtype, math.prod(shape), streams)
                if number in copies:
                    held[number] = array
            yield stub.name, array.reshape(shape)

    def _read_head(self, limits: LoadLimits) -> tuple[Head, int]:
        """Return the head, and where it ends."""
        prefix = self._read(0, _HEAD_BEGIN)
        magic, small, raw, size, decoded = _PREFIX.unpack(prefix[: _PREFIX.size])
        if magic != PACKED_MAGIC:
            raise InvalidModelError("not a packed model, or one of another version")
        if size != self.size or small > size - _HEAD_BEGIN:
            raise InvalidModelError(f"it has {self.size} bytes, and was written with {size}")
        expanded = _most_decoded(size)
        for what, length, most in (
            ("its head has", raw, min(_MAX_HEAD_BYTES, expanded)),
            ("it decodes to", decoded, min(limits.total_bytes, expanded)),
        ):
            if length > most:
                raise InvalidModelError(f"{what} {length} bytes; at most {most} are allowed")
        packed_head = self._read(_HEAD_BEGIN, small)
        digest = hashlib.sha256(prefix[: _PREFIX.size] + packed_head).digest()
        if digest != prefix[_PREFIX.size :]:
            raise InvalidModelError("its head is damaged: the SHA-256 differs")
        head = Head.from_bytes(decompress(packed_head, raw), limits, decoded)
        return head, _HEAD_BEGIN + small

    def _read(self, begin: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, begin)
        if len(data) != length:
            raise InvalidModelError("the file ends early")
        return data

    def _streams(self) -> dict[CoderId, StreamReader]:
        """Return readers of all streams, each at its beginning."""
        streams, first = dict[CoderId, StreamReader](), 0
        for coder_id, coder in CODERS.items():
            pieces = self.head.pieces(coder_id)
            reader = StreamReader(coder, pieces, self.head.tables, self._segment_reader(first))
            streams[coder_id] = reader
            first += reader.segments
        return streams

    def _segment_reader(self, first: int) -> Callable[[int], bytes]:
        """Return what reads and checks the segments of the stream that begins at `first`."""

        def read(index: int) -> bytes:
            segment = self.head.segments[first + index]
            data = self._read(self._begins[first + index], segment.length)
            if zlib.crc32(data) != segment.crc:
                raise InvalidModelError("a segment is damaged: its CRC-32 differs")
            return data

        return read

    def _decode(
        self,
        record: Record,
        dtype: np.dtype[Any],
        size: int,
        streams: Mapping[CoderId, StreamReader],
    ) -> Array:
        """Return one tensor, flat."""
        first, *rest = (_take(part, streams) for part in record.parts)
        if record.kind == Kind.PLANES:
            return from_planes([first, *rest], dtype)
        if record.kind == Kind.WHOLE:
            return from_bytes(first, dtype)
        codebook = self.head.codebooks[record.codebook]
        if codebook.size > NARROW:
            low, high = rest
            first = from_escapes(first, low, high, record.detail)
            return _look_up(codebook, first, 0)
        if record.kind == Kind.RUNS:
            first = from_runs(first, rest[0], record.detail, size)
        return _look_up(codebook, first, shift_of(values_of(codebook)))


def _size_of(descriptor: int) -> int:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModelError("not an ordinary file")
    if status.st_size < _HEAD_BEGIN:
        raise InvalidModelError("not a packed model: it is too short")
    return status.st_size


def _most_decoded(size: int) -> int:
    """Return the bytes to which a file of so many bytes may decode."""
    return max(_EXPANSION * size, _FREE_EXPANSION)


def _take(part: Part, streams: Mapping[CoderId, StreamReader]) -> Uint8:
    if part.coder == CoderId.CONSTANT:
        return np.full(part.count, part.table, np.uint8)
    return streams[part.coder].take(part.count)


def _look_up(codebook: Array, symbols: Array, shift: int) -> Array:
    """Return the values of symbols, refusing those without one."""
    if symbols.size and not shift <= symbols.min() <= symbols.max() < shift + codebook.size:
        raise InvalidModelError("a symbol of a tensor is not in its codebook")
    values = np.empty(shift + codebook.size, codebook.dtype)
    values[shift:] = codebook
    found = np.empty(symbols.size, codebook.dtype)
    for begin in range(0, symbols.size, _CHUNK):  # whose indices stay in the cache
        part = slice(begin, begin + _CHUNK)
        np.take(values, symbols[part], out=found[part], mode="clip")
    return found
