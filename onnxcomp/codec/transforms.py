"""Tensors as sequences of bytes that the coders can hold, and back bit for bit.

Four ways: the bytes of all elements plane by plane; ranks into a codebook; ranks as runs of
the most frequent one and the levels between them; all bytes as they lie, for what repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import InvalidModelError

Array = npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]

NARROW = 256  # the longest codebook whose ranks are single bytes
LONG_RUN = 255  # a run that goes on: 255 elements, and no level behind them
ESCAPE = 255  # a rank outside the window of a long codebook
_CHUNK = 2**16  # elements of which more than what is asked for is in memory


def to_planes(array: Array) -> list[Uint8]:
    """Return byte 0, byte 1, ... of all elements, little-endian.

    Floats are rotated by one bit, so that the exponent leads and the sign comes last.
    """
    bits = _unsigned(array)
    if array.dtype.kind in "fV":
        bits = bits << 1 | bits >> (8 * array.itemsize - 1)
    planes = bits.astype(bits.dtype.newbyteorder("<")).view(np.uint8)
    planes = planes.reshape(-1, array.itemsize)
    return [np.ascontiguousarray(planes[:, i]) for i in range(array.itemsize)]


def from_planes(planes: Sequence[Uint8], dtype: np.dtype[Any]) -> Array:
    """Return the flat array of which `to_planes` made these planes."""
    bits: Array = np.empty(planes[0].size, f"<u{len(planes)}")
    for begin in range(0, bits.size, _CHUNK):
        part = bits[begin : begin + _CHUNK]
        for i, plane in enumerate(planes):
            part.view(np.uint8).reshape(-1, len(planes))[:, i] = plane[begin : begin + _CHUNK]
        if dtype.kind in "fV":
            part[:] = part >> 1 | part << (8 * dtype.itemsize - 1)
    return _native(bits).view(dtype)


def to_bytes(array: Array) -> Uint8:
    """Return the bytes of all elements as they lie, little-endian."""
    bits = _unsigned(array)
    return bits.astype(bits.dtype.newbyteorder("<")).view(np.uint8)


def from_bytes(data: Uint8, dtype: np.dtype[Any]) -> Array:
    """Return the flat array of which `to_bytes` made these."""
    return _native(data.view(f"<u{dtype.itemsize}")).view(dtype)


def shift_of(codebook_values: Array) -> int:
    """Return what is added to the ranks of a short codebook.

    It puts 0 on symbol 128, so that tensors of other ranges can share a table.
    """
    zero = int(np.searchsorted(codebook_values, 0.0))
    return min(max(128 - zero, 0), NARROW - codebook_values.size)


def to_runs(symbols: Uint8, common: int) -> tuple[Uint8, Uint8]:
    """Return the lengths of the runs of a symbol, and the other symbols between them."""
    places = np.flatnonzero(symbols != common)
    gaps = np.diff(places, prepend=-1) - 1
    longs = gaps // LONG_RUN
    runs = np.full(places.size + int(longs.sum()), LONG_RUN, np.uint8)
    runs[np.cumsum(longs + 1) - 1] = gaps % LONG_RUN
    return runs, symbols[places]


def from_runs(runs: Uint8, levels: Uint8, common: int, size: int) -> Uint8:
    """Return the symbols of which `to_runs` made these.

    Raises:
        InvalidModelError: They do not fit one another or the size.
    """
    symbols = np.full(size, common, np.uint8)
    end = done = 0
    for begin in range(0, runs.size, _CHUNK):
        part = runs[begin : begin + _CHUNK]
        ends = end + np.cumsum(part + np.not_equal(part, LONG_RUN).astype(np.int64))
        places = ends[part != LONG_RUN] - 1
        end = int(ends[-1])
        if end > size or done + places.size > levels.size:
            raise InvalidModelError("runs and levels of a tensor do not fit")
        symbols[places] = levels[done : done + places.size]
        done += places.size
    if done != levels.size:
        raise InvalidModelError("runs and levels of a tensor do not fit")
    return symbols


def window_of(ranks: Array, values: int) -> int:
    """Return where the 255 neighbouring ranks begin that occur most."""
    total = np.cumsum(np.bincount(ranks, minlength=values))
    inside = total[ESCAPE - 1 :] - np.append(0, total[:-ESCAPE])
    return int(inside.argmax())


def to_escapes(ranks: Array, first: int) -> tuple[Uint8, Uint8, Uint8]:
    """Return ranks of a long codebook as symbols, and low and high bytes of the escaped."""
    inside = (ranks >= first) & (ranks < first + ESCAPE)
    symbols = np.where(inside, ranks - first, ESCAPE).astype(np.uint8)
    escaped = ranks[~inside]
    return symbols, (escaped & 0xFF).astype(np.uint8), (escaped >> 8).astype(np.uint8)


def from_escapes(symbols: Uint8, low: Uint8, high: Uint8, first: int) -> Array:
    """Return the ranks of which `to_escapes` made these.

    Raises:
        InvalidModelError: They do not fit one another.
    """
    ranks = np.empty(symbols.size, np.uint16)
    done = end = 0
    for begin in range(0, symbols.size, _CHUNK):
        part = symbols[begin : begin + _CHUNK]
        ranks[begin : begin + _CHUNK] = part + np.uint16(first)
        escaped = begin + np.flatnonzero(part == ESCAPE)
        end = done + escaped.size
        if end > low.size:
            break
        ranks[escaped] = low[done:end] | high[done:end].astype(np.uint16) << 8
        done = end
    if end != low.size:
        raise InvalidModelError("ranks of a tensor and their escapes do not fit")
    return ranks


def _native(bits: Array) -> Array:
    """Return little-endian integers in the byte order of this machine."""
    return bits.astype(bits.dtype.newbyteorder("="), copy=False)


def _unsigned(array: Array) -> Array:
    flat: Array = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{array.itemsize}")
