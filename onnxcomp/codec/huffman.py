"""Canonical Huffman codes, and streams of words as the formats of the papers keep them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import DataError

Integers = npt.NDArray[np.int64]

_WORD = 64
_LONGEST = 56  # bits of a codeword that a window at any bit can hold
_CHUNK = 2**16  # bytes of a stream that are looked up at a time


@dataclass(frozen=True)
class Stream:
    """A string of bits.

    Attributes:
        words: Words of 64 bits, the first bit being the highest of the first word; the last
            word is filled up with zeros at its end.
    """

    words: npt.NDArray[np.uint64]

    @property
    def bits(self) -> int:
        """Bits of all words."""
        return _WORD * len(self.words)


@dataclass(frozen=True)
class Huffman:
    """A code, given by its lengths.

    Attributes:
        lengths: Bits of every symbol, 0 for those that do not occur.
    """

    lengths: Integers

    @classmethod
    def of(cls, counts: Integers) -> Huffman:
        """Return the best code for symbols that occur so often; a lone one gets one bit."""
        lengths = np.zeros(len(counts), np.int64)
        heap = [(int(counts[s]), int(s), [int(s)]) for s in np.flatnonzero(counts)]
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            lengths[a[2] + b[2]] += 1
            heapq.heappush(heap, (a[0] + b[0], min(a[1], b[1]), a[2] + b[2]))
        return cls(lengths)

    @property
    def bits(self) -> int:
        """Bits of the lengths, one byte each, from which the codewords follow."""
        return 8 * len(self.lengths)

    def encode(self, symbols: Integers) -> Stream:
        """Return the codewords of symbols, one behind the other."""
        order, codes = self._canonical()
        by_symbol = np.zeros(len(self.lengths), np.uint64)
        by_symbol[order] = codes
        lengths, words = self.lengths[symbols], by_symbol[symbols]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        bits = np.zeros(-(-total // _WORD) * _WORD, np.uint8)
        for place in range(int(lengths.max(initial=0))):
            there = lengths > place
            shift = (lengths[there] - 1 - place).astype(np.uint64)
            bits[(ends - lengths)[there] + place] = (words[there] >> shift) & np.uint64(1)
        return Stream(np.packbits(bits).view(">u8").astype(np.uint64))

    def decode(self, stream: Stream, count: int) -> Integers:
        """Return the first `count` symbols of a stream.

        Raises:
            DataError: The stream is too short, or holds what is no codeword.
        """
        return np.concatenate([np.empty(0, np.int64), *self.parts(stream, count)])

    def parts(self, stream: Stream, count: int) -> Iterator[Integers]:
        """Yield the same piece by piece, each from some 64 KiB of the stream."""
        order, codes = self._canonical()
        lengths = self.lengths[order]
        # Left-justified codewords ascend, so a window belongs to the last one not above it.
        starts = codes << (_WORD - lengths).astype(np.uint64)
        data = np.concatenate(
            [stream.words.astype(">u8").view(np.uint8), np.zeros(8, np.uint8)]
        )
        position, done = 0, 0
        while done < count:
            if position >= stream.bits:
                raise DataError(f"a Huffman stream ends after {done} of {count} symbols")
            ranks = np.searchsorted(starts, _windows(data, position), side="right") - 1
            found, position = _follow(ranks.tolist(), lengths.tolist(), position, count - done)
            done += len(found)
            yield order[found]

    def _canonical(self) -> tuple[Integers, npt.NDArray[np.uint64]]:
        """Return the symbols by length, and their codewords, right-justified."""
        used = np.flatnonzero(self.lengths)
        order = used[np.argsort(self.lengths[used], kind="stable")]
        codes, code, last = np.zeros(len(order), np.uint64), 0, 0
        for index, length in enumerate(self.lengths[order].tolist()):
            if length > _LONGEST:
                raise DataError(f"a codeword of {length} bits; at most {_LONGEST} are decoded")
            code <<= length - last
            codes[index], last = code, length
            code += 1
        return order, codes


def _windows(data: npt.NDArray[np.uint8], position: int) -> npt.NDArray[np.uint64]:
    """Return the bits that follow each bit of a chunk from the byte of `position` on."""
    first = position // 8
    part = data[first : first + _CHUNK + 7]
    views = np.lib.stride_tricks.sliding_window_view(part, 8)
    words = np.ascontiguousarray(views).view(">u8").astype(np.uint64)
    return np.asarray((words << np.arange(8, dtype=np.uint64)).reshape(-1))


def _follow(
    ranks: list[int], lengths: list[int], position: int, count: int
) -> tuple[list[int], int]:
    """Walk from codeword to codeword through a chunk; return their ranks and where it ends."""
    base = position // 8 * 8
    at, found = position - base, list[int]()
    while at < len(ranks) and len(found) < count:
        rank = ranks[at]
        found.append(rank)
        at += lengths[rank]
    return found, base + at
