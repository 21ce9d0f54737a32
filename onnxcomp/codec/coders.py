"""The coders of byte sequences, one stream each in a file, and how a stream is cut.

All sequences that a coder holds follow one another in its stream. The stream is cut into
segments of equally many symbols, which are what is checked, decoded at once and held in
memory.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec import contexts, mixing, rans
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.symbols import Symbols
from onnxcomp.codec.tables import Tables
from onnxcomp.codec.transforms import shift_of
from onnxcomp.errors import InvalidModelError

Uint8 = npt.NDArray[np.uint8]

_Encode = Callable[[Sequence[Uint8], Sequence[Pieces], Tables], list[bytes]]
_Decode = Callable[[Sequence[bytes], Sequence[Pieces], Tables], list[Uint8]]
_TOGETHER = 24 * 2**20  # bytes for segments decoded in step, where there is no numba


class CoderId(IntEnum):
    """The coders by their number in a file."""

    RAW = 0
    CONSTANT = 1
    LZMA = 2
    RANS = 3
    CONTEXTS = 5
    MIXING = 7


@dataclass(frozen=True)
class Coder:
    """A coder that has a stream.

    Attributes:
        segment: Symbols of a segment.
        whole: Segments hold whole sequences: as few as have `segment` symbols.
        uses_tables: Each of its sequences names a frequency table.
        in_step: Many segments at once take less time than one by one, without numba.
        encode: Encodes segments, given their symbols, their pieces and all tables.
        decode: Decodes them, given their bytes.
    """

    segment: int
    whole: bool
    uses_tables: bool
    in_step: bool
    encode: _Encode
    decode: _Decode


def compress(data: bytes) -> bytes:
    """Return data compressed by LZMA2."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_filters(len(data)))


def decompress(data: bytes, size: int) -> bytes:
    """Return the data of which `compress` made these, refusing any other size.

    Raises:
        InvalidModelError: They are damaged, or are not `size` bytes.
    """
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(size))
    try:
        found = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise InvalidModelError(f"compressed bytes are damaged ({error})") from error
    if len(found) != size or not decoder.eof or decoder.unused_data:
        raise InvalidModelError("compressed bytes are damaged: they have another size")
    return found


def segments(pieces: Pieces, coder: Coder) -> list[tuple[int, int]]:
    """Return where the segments of a stream begin and end."""
    total = int(pieces.ends[-1]) if pieces.ends.size else 0
    edges = [0]
    while edges[-1] < total:
        end = min(edges[-1] + coder.segment, total)
        if coder.whole:
            end = int(pieces.ends[np.searchsorted(pieces.ends, end)])
        edges.append(end)
    return list(pairwise(edges))


class StreamReader:
    """Gives the symbols of one stream in order, holding a few segments at most.

    Args:
        coder: Its coder.
        pieces: Lengths and tables of all its sequences.
        tables: All tables of the file.
        read: Returns the checked bytes of a segment, by its number.
    """

    def __init__(
        self, coder: Coder, pieces: Pieces, tables: Tables, read: Callable[[int], bytes]
    ) -> None:
        self._coder = coder
        self._pieces = pieces
        self._tables = tables
        self._read = read
        self._spans = segments(pieces, coder)
        self.segments = len(self._spans)
        self._next = 0
        self._ready: list[Uint8] = []

    def take(self, count: int) -> Uint8:
        """Return the next symbols, (count,)."""
        if count and not self._ready:
            self._decode_more()  # in front of the room for them: a segment may hold them all
        symbols = np.empty(count, np.uint8)
        done = 0
        while done < count:
            if not self._ready:
                self._decode_more()
            # a call of its own: no name keeps a used segment while more are decoded
            done += self._move(symbols[done:])
        return symbols

    def _move(self, symbols: Uint8) -> int:
        """Fill the front of an array from the first decoded segment; return how much."""
        part = self._ready.pop(0)
        count = min(part.size, symbols.size)
        symbols[:count] = part[:count]
        if count < part.size:
            self._ready.insert(0, part[count:])
        return count

    def _decode_more(self) -> None:
        """Decode the next segment, and without numba as many as pay."""
        room = _TOGETHER if self._coder.in_step and rans.kernels() is None else 0
        data, pieces = list[bytes](), list[Pieces]()
        while not data or (room > 0 and self._next < len(self._spans)):
            data.append(self._read(self._next))
            pieces.append(self._pieces.between(*self._spans[self._next]))
            room -= 2 * len(data[-1]) + int(pieces[-1].ends[-1])  # its words are a copy
            self._next += 1
        self._ready = self._coder.decode(data, pieces, self._tables)


def _filters(size: int) -> list[dict[str, Any]]:
    """Return LZMA2 with a dictionary for so many bytes, which bounds what a decoder takes."""
    dictionary = min(max(size, 1 << 12), 1 << 23)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary, "lc": 3, "pb": 0}]


def _encode_raw(symbols: Sequence[Uint8], _: object, __: object) -> list[bytes]:
    return [part.tobytes() for part in symbols]


def _decode_raw(data: Sequence[bytes], pieces: Sequence[Pieces], _: object) -> list[Uint8]:
    if any(len(part) != piece.ends[-1] for part, piece in zip(data, pieces, strict=True)):
        raise InvalidModelError("a segment has not the length of its symbols")
    return [np.frombuffer(part, np.uint8) for part in data]


def _encode_lzma(symbols: Sequence[Uint8], _: object, __: object) -> list[bytes]:
    return [compress(part.tobytes()) for part in symbols]


def _decode_lzma(data: Sequence[bytes], pieces: Sequence[Pieces], _: object) -> list[Uint8]:
    sizes = [int(piece.ends[-1]) for piece in pieces]
    found = [decompress(part, size) for part, size in zip(data, sizes, strict=True)]
    return [np.frombuffer(part, np.uint8) for part in found]


def _encode_mixed(
    symbols: Sequence[Uint8], pieces: Sequence[Pieces], tables: Tables
) -> list[bytes]:
    coded: list[bytes] = []
    for part, piece in zip(symbols, pieces, strict=True):
        tensors: list[Symbols] = []
        for ranks, number in zip(np.split(part, piece.ends[:-1]), piece.tables, strict=True):
            layout = tables.layouts[number]
            indices = ranks.astype(np.int32) - shift_of(layout.values)
            tensors.append(Symbols(indices.reshape(layout.shape), layout.values, layout.row))
        coded.append(mixing.encode(tensors))
    return coded


def _decode_mixed(
    data: Sequence[bytes], pieces: Sequence[Pieces], tables: Tables
) -> list[Uint8]:
    symbols: list[Uint8] = []
    for part, piece in zip(data, pieces, strict=True):
        layouts = [tables.layouts[number] for number in piece.tables]
        symbols.append(np.empty(piece.ends[-1], np.uint8))
        flat = np.split(symbols[-1], piece.ends[:-1])
        ranks = [f.reshape(layout.shape) for f, layout in zip(flat, layouts, strict=True)]
        mixing.decode_into(part, layouts, ranks)
        for rank, layout in zip(ranks, layouts, strict=True):
            rank += shift_of(layout.values)
    return symbols


CODERS: dict[CoderId, Coder] = {
    CoderId.RAW: Coder(2**20, False, False, False, _encode_raw, _decode_raw),
    CoderId.LZMA: Coder(2**22, False, False, False, _encode_lzma, _decode_lzma),
    CoderId.RANS: Coder(2**18, False, True, True, rans.encode, rans.decode),
    CoderId.CONTEXTS: Coder(2**18, False, False, True, contexts.encode, contexts.decode),
    CoderId.MIXING: Coder(2**22, True, False, False, _encode_mixed, _decode_mixed),
}
