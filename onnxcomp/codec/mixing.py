"""The `max` coder: context mixing in integers, the smallest and slowest of all.

Tensors are cut, between outputs, into streams of about four million weights, each of which
learns from its first decision on. The bytes are, little-endian: one byte per piece of a tensor
(the power of two that brings its mean magnitude near 2^10), the length of every stream but the
last (uint32), the streams. A stream ends in the fewest bytes that decide it, and one with more
or fewer is refused; other damage gives other ranks and is a matter of the checksum around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.symbols import Symbols
from onnxcomp.errors import InvalidModelError, ParameterError

Array = npt.NDArray[Any]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Uint8 = npt.NDArray[np.uint8]

_STREAM = 1 << 22  # weights
MOST_INPUTS = _STREAM  # weights of one output, which a stream holds several numbers for
_LEAST_POWER = -117
_UNIT_POWER = 10


@dataclass(frozen=True)
class Layout:
    """What is known of a tensor before its ranks are decoded.

    Attributes:
        shape: Outputs, inputs, taps.
        values: float32 (n,), ascending: the codebook.
        row: Taps in one row of a kernel.
    """

    shape: tuple[int, int, int]
    values: Float32
    row: int = 1

    @property
    def weights_per_output(self) -> int:
        """Inputs times taps."""
        return self.shape[1] * self.shape[2]

    @property
    def dtype(self) -> type[np.uint8 | np.uint16]:
        """The narrowest for ranks."""
        return np.uint8 if self.values.size <= 2**8 else np.uint16


@dataclass(frozen=True)
class _Piece:
    """Some outputs of a tensor.

    Attributes:
        tensor: Which one.
        begin: Its first output.
        layout: Layout of the piece.
    """

    tensor: int
    begin: int
    layout: Layout

    @property
    def weights(self) -> int:
        outputs, inputs, taps = self.layout.shape
        return outputs * inputs * taps

    def of(self, tensor: Array) -> Array:
        """Return its part of a tensor in C order, flat, without a copy."""
        return tensor[self.begin : self.begin + self.layout.shape[0]].reshape(-1)


def encode(symbols: Sequence[Symbols]) -> bytes:
    """Encode tensors; needs numba.

    Args:
        symbols: The tensors; later ones gain from what earlier ones taught.

    Returns:
        Their bytes, without codebooks and shapes.

    Raises:
        ParameterError: numba is not installed.
    """
    layouts = []
    for each in symbols:
        outputs, inputs, taps = each.indices.shape
        layouts.append(Layout((outputs, inputs, taps), each.values, each.row))
    powers, streams = bytearray(), []
    for pieces in _streams(layouts):
        ranks = [
            piece.of(symbols[piece.tensor].indices).astype(piece.layout.dtype)
            for piece in pieces
        ]
        own = [_power(piece, rank) for piece, rank in zip(pieces, ranks, strict=True)]
        powers += bytes(own)
        streams.append(_encode_stream(pieces, own, ranks))
    sizes = np.array([len(stream) for stream in streams[:-1]], "<u4").tobytes()
    return bytes(powers) + sizes + b"".join(streams)


def decode(data: bytes, layouts: Sequence[Layout]) -> list[Int32]:
    """Return the ranks of tensors, of the layouts' shapes; otherwise as `decode_into`."""
    found = [np.empty(layout.shape, layout.dtype) for layout in layouts]
    decode_into(data, layouts, found)
    return [ranks.astype(np.int32) for ranks in found]


def decode_into(data: bytes, layouts: Sequence[Layout], found: Sequence[Array]) -> None:
    """Decode tensors; needs numba.

    Args:
        data: What `encode` returned.
        layouts: The tensors' layouts, in the same order.
        found: Receive their ranks; in C order, of the layouts' shapes and dtypes.

    Raises:
        InvalidModelError: The bytes are too few or too many.
        ParameterError: numba is not installed.
    """
    streams = list(_streams(layouts))
    begins = len(list(chain(*streams)))
    head = begins + 4 * (len(streams) - 1) if streams else 0
    if len(data) < head:
        raise InvalidModelError(
            f"max coder: {len(data)} bytes, but {head} in front of streams"
        )
    powers = iter(data[:begins])
    sizes = np.frombuffer(data[begins:head], "<u4").astype(np.int64)
    ends = [*(head + np.cumsum(sizes)).tolist(), len(data)]
    for pieces, begin, end in zip(streams, [head, *ends], ends, strict=False):
        own = [next(powers) for _ in pieces]
        ranks = [piece.of(found[piece.tensor]) for piece in pieces]
        _decode_stream(pieces, own, ranks, np.array(memoryview(data)[begin:end]))
    if not streams and data:
        raise InvalidModelError(f"max coder: {len(data)} bytes for no weights")


@cache
def _kernels() -> ModuleType:
    try:
        return import_module("onnxcomp.codec.mixing_model")
    except ImportError as error:
        raise ParameterError(
            "the profile 'max' needs numba; install onnxcomp[fast] or use another profile"
        ) from error


def _streams(layouts: Sequence[Layout]) -> Iterator[list[_Piece]]:
    """Cut tensors into pieces, and gather these into streams."""
    gathered: list[_Piece] = []
    for tensor, layout in enumerate(layouts):
        outputs, inputs, taps = layout.shape
        step = max(1, _STREAM // max(1, inputs * taps))
        for begin in range(0, outputs if inputs * taps else 0, step):
            shape = (min(step, outputs - begin), inputs, taps)
            gathered.append(_Piece(tensor, begin, Layout(shape, layout.values, layout.row)))
            if sum(piece.weights for piece in gathered) >= _STREAM:
                yield gathered
                gathered = []
    if gathered:
        yield gathered


def _power(piece: _Piece, ranks: Array) -> int:
    """Return the byte for the power of two that brings the mean magnitude near 2^10."""
    values = np.abs(piece.layout.values.astype(np.float64))
    mean = float(np.bincount(ranks, minlength=values.size) @ values) / ranks.size
    power = _UNIT_POWER - round(float(np.log2(mean))) if mean > 0 else 0
    return min(max(power - _LEAST_POWER, 0), 255)


def _encode_stream(
    pieces: Sequence[_Piece], powers: Sequence[int], ranks: Sequence[Array]
) -> bytes:
    kernels = _kernels()
    room = sum(
        piece.weights * kernels.most_bytes(piece.layout.values.size) for piece in pieces
    )
    data = np.empty(room + 8, np.uint8)
    done, last = kernels.code_stream(_parts(pieces, powers, ranks), data, decoding=False)
    return data[:done].tobytes() + bytes(last)


def _decode_stream(
    pieces: Sequence[_Piece], powers: Sequence[int], ranks: Sequence[Array], data: Uint8
) -> None:
    """Decode one stream, which is writable as it is when encoding, into ranks."""
    done, last = _kernels().code_stream(_parts(pieces, powers, ranks), data, decoding=True)
    if data.size != done + len(last) or data[done:].tobytes() != last:
        raise InvalidModelError(f"max coder: a stream of {data.size} bytes ends elsewhere")


def _parts(
    pieces: Sequence[_Piece], powers: Sequence[int], ranks: Sequence[Array]
) -> list[tuple[tuple[int, int, int], int, Float64, Array]]:
    """Return shape, row, scaled values and flat ranks of each piece."""
    scaled = [
        np.ldexp(piece.layout.values.astype(np.float64), power + _LEAST_POWER)
        for piece, power in zip(pieces, powers, strict=True)
    ]
    return [
        (piece.layout.shape, piece.layout.row, values, rank)
        for piece, values, rank in zip(pieces, scaled, ranks, strict=True)
    ]
