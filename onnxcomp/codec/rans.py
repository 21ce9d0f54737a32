"""Static range-ANS: symbols in interleaved lanes, tables that change from piece to piece.

A segment is its lanes' states (uint32) and then 16-bit words, all little-endian. Symbol i
belongs to lane i mod lanes. A state x of 32 bits decodes the symbol s in whose slots x mod
4096 lies, becomes frequency(s) * (x >> 12) + (offset in the slots of s), and below 2**16 takes
a word in. States end where the encoder began, at 2**16, and all words are taken: most damage
shows there, and the rest (two symbols of one frequency that change places) in the CRC.

References:
    J. Duda, Asymmetric numeral systems, arXiv 1311.2540; F. Giesen, Interleaved entropy
    coders, arXiv 1402.3392.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.tables import PRECISION, TOTAL, Tables
from onnxcomp.errors import InvalidModelError

Array = npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]

FULL_LANES, _FEW_LANES = 32, 4
_MANY_SYMBOLS = 2**14  # from here on 32 lanes cost less than 0.4 % of what they hold
LOW = 1 << 16
_BLOCK = 2**14  # symbols of a segment whose tables are in memory


@dataclass(frozen=True)
class Pieces:
    """Which table codes which part of some symbols.

    Attributes:
        ends: Where each part ends, int64 (n,), ascending.
        tables: The number of its table, int64 (n,).
        skipped: Symbols of the first part that lie in front of these.
    """

    ends: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int64]
    skipped: int = 0

    def between(self, begin: int, end: int) -> Pieces:
        """Return the parts of the symbols from `begin` to `end`, counted from `begin`."""
        first = int(np.searchsorted(self.ends, begin, side="right"))
        last = int(np.searchsorted(self.ends, end, side="left"))
        ends = np.minimum(self.ends[first : last + 1], end) - begin
        start = int(self.ends[first - 1]) if first else 0
        return Pieces(ends, self.tables[first : last + 1], begin - start)

    def table_of_each(self) -> Array:
        """Return the table of every symbol, uint16."""
        return np.repeat(self.tables.astype(np.uint16), np.diff(self.ends, prepend=0))


@cache
def kernels() -> ModuleType | None:
    """Return the compiled loops, or None where numba, which is an extra, is not installed."""
    try:
        return import_module("onnxcomp.codec.kernels")
    except ImportError:
        return None


def lanes_of(symbols: int) -> int:
    """Return the lanes of a segment of so many symbols."""
    return FULL_LANES if symbols >= _MANY_SYMBOLS else _FEW_LANES


def encode(symbols: Sequence[Uint8], pieces: Sequence[Pieces], tables: Tables) -> list[bytes]:
    """Encode segments.

    Args:
        symbols: The symbols of each segment, (n,); all but the last equally many.
        pieces: The tables of each segment's symbols.
        tables: All tables.

    Returns:
        The bytes of each segment.
    """
    frequency, start = tables.frequencies, tables.starts
    coded: list[bytes] = []
    compiled = kernels()
    if compiled is None:
        for group in equal_lengths([part.size for part in symbols]):
            coded += _encode_together(symbols[group], pieces[group], frequency, start)
        return coded
    for part, piece in zip(symbols, pieces, strict=True):
        words = np.empty(part.size + 1, np.uint16)
        states = np.full(lanes_of(part.size), LOW, np.uint32)
        begin = compiled.encode(
            part, frequency, start, piece.ends, piece.tables, states, words
        )
        coded.append(_join(states, words[begin:]))
    return coded


def decode(data: Sequence[bytes], pieces: Sequence[Pieces], tables: Tables) -> list[Uint8]:
    """Decode segments; the arguments are those of `encode`.

    Raises:
        InvalidModelError: A segment is damaged.
    """
    lengths = [int(part.ends[-1]) for part in pieces]
    parted = [split(part, n) for part, n in zip(data, lengths, strict=True)]
    symbols: list[Uint8] = []
    compiled = kernels()
    if compiled is None:
        for group in equal_lengths(lengths):
            symbols += _decode_together(parted[group], pieces[group], tables.slots)
        return symbols
    for (states, words), part, n in zip(parted, pieces, lengths, strict=True):
        padded = np.concatenate([words, np.zeros(FULL_LANES, np.uint16)])
        found = np.empty(n, np.uint8)
        taken = compiled.decode(padded, states, tables.slots, part.ends, part.tables, found)
        check_end(taken == words.size and bool((states == LOW).all()))
        symbols.append(found)
    return symbols


def equal_lengths(lengths: Sequence[int]) -> list[slice]:
    """Return groups of neighbouring segments of one length."""
    cuts = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    edges = [0, *cuts, len(lengths)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _join(states: Array, words: Array) -> bytes:
    return states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def split(data: bytes, symbols: int) -> tuple[Array, Array]:
    """Return states and words of a segment of so many symbols."""
    lanes = lanes_of(symbols)
    if len(data) < 4 * lanes or len(data) % 2:
        raise InvalidModelError("a segment is too short for its lanes")
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(data, "<u2", offset=4 * lanes)
    return states, words.astype(np.uint16, copy=False)


def check_end(sound: bool) -> None:
    """Refuse a segment that was not decoded to its end."""
    if not sound:
        raise InvalidModelError("a segment is damaged: its lanes do not end where they began")


def _encode_together(
    symbols: Sequence[Uint8], pieces: Sequence[Pieces], frequency: Array, start: Array
) -> list[bytes]:
    """Encode segments of one length in step: the arithmetic of `kernels.encode`."""
    length = symbols[0].size
    lanes = lanes_of(length)
    steps = -(-length // lanes)
    entries: Array = np.zeros((len(symbols), steps * lanes), np.int64)
    for row, part, table in zip(entries, symbols, pieces, strict=True):
        row[:length] = table.table_of_each().astype(np.int64) << 8 | part
    # absent symbols of the last step have every slot: they change nothing
    counts = np.append(frequency, np.uint32(TOTAL)).astype(np.uint64)
    first = np.append(start, np.uint32(0)).astype(np.uint64)
    entries[:, length:] = counts.size - 1
    entries = entries.reshape(len(symbols), steps, lanes)
    states = np.full((len(symbols), lanes), LOW, np.uint64)
    words = np.empty((len(symbols), steps, lanes), np.uint16)
    written = np.empty(words.shape, np.bool_)
    for step in range(steps - 1, -1, -1):
        count = counts[entries[:, step]]
        words[:, step] = states & 0xFFFF
        full = states >= count << np.uint64(20)
        written[:, step] = full
        states = np.where(full, states >> np.uint64(16), states)
        ratio, rest = np.divmod(states, count)
        states = (ratio << np.uint64(PRECISION)) + rest + first[entries[:, step]]
    return [_join(s, w[k]) for s, w, k in zip(states, words, written, strict=True)]


def _decode_together(
    split: Sequence[tuple[Array, Array]], pieces: Sequence[Pieces], slots: Array
) -> list[Uint8]:
    """Decode segments of one length in step: the arithmetic of `kernels.decode`."""
    length = int(pieces[0].ends[-1])
    lanes = lanes_of(length)
    symbols = np.empty((len(split), length), np.uint8)
    stepper = Stepper(split, slots)
    room = np.empty((len(split), _BLOCK), np.uint32)
    for begin in range(0, length, _BLOCK):
        block = symbols[:, begin : begin + _BLOCK]
        first = room[:, : block.shape[1]]
        for row, part in zip(first, pieces, strict=True):
            row[:] = part.between(begin, begin + row.size).table_of_each()
        first *= TOTAL
        for at in range(0, block.shape[1], lanes):
            block[:, at : at + lanes] = stepper.step(first[:, at : at + lanes])
    stepper.finish()
    return list(symbols)


class Stepper:
    """Decodes one symbol of each lane of many segments at a time, in NumPy.

    Args:
        split: States and words of each segment; all have equally many lanes.
        slots: Decoder tables, (n, 4096).
    """

    def __init__(self, split: Sequence[tuple[Array, Array]], slots: Array) -> None:
        self._entries = slots.reshape(-1)
        self._states = np.stack([states for states, _ in split])
        # a segment that takes what lies behind its words is refused in the end
        self._words = np.concatenate([*(words for _, words in split), np.zeros(1, np.uint16)])
        sizes = np.array([words.size for _, words in split])
        self._stops = np.cumsum(sizes)
        self._taken = self._stops - sizes

    def step(self, first: Array) -> Uint8:
        """Return the next symbols of the first lanes, (segments, lanes).

        Args:
            first: Where the slots of their tables begin among those of all, uint32.
        """
        width = first.shape[1]
        old = self._states[:, :width]
        entry = self._entries.take(first + (old & (TOTAL - 1)))
        new = (entry >> 8 & 0xFFF) * (old >> PRECISION) + (entry >> 20)
        empty = new < LOW
        places = empty.reshape(-1).nonzero()[0]  # in the order in which words are taken
        counts = empty.sum(axis=1)
        ahead = self._taken - counts.cumsum() + counts
        words = self._words.take(ahead.repeat(counts) + np.arange(places.size), mode="clip")
        flat = new.reshape(-1)
        flat[places] = flat.take(places) << 16 | words
        self._states[:, :width] = new
        self._taken += counts
        found: Uint8 = entry.astype(np.uint8)  # the lowest byte
        return found

    def finish(self) -> None:
        """Refuse segments whose lanes do not end where they began, or that have words left."""
        check_end(bool((self._taken == self._stops).all() and (self._states == LOW).all()))
