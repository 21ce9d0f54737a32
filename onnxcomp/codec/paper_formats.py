"""The storage formats of Marino et al. 2020 and 2021, as a reference to compare with.

    im        index map: a codebook and an index of ceil(log2 k) bits per weight
    csc       non-zeros, their rows, and where each column starts; words of 32 bits
    ham       Huffman address map: one Huffman code over all values, column after column
    sham      the same over the non-zeros, with their rows and the columns' counts uncoded
    sham_gap  the same with Huffman-coded gaps between non-zeros instead (not in the paper)

(arXiv:2007.07967 and 2108.12704.)  A matrix W is (n, m): inputs times outputs, float32; a
kernel (m, c, ...) is its transpose.  Values are told apart by their bits.  `.onnxc` files use
other coders, which are smaller and decode faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.huffman import Huffman, Stream

Float32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

WORD = 32  # bits of a float and of an uncoded number of the paper
_ESCAPE = 255  # gap symbol that skips so many zeros
_DOT_COLUMNS = 256  # columns of which the weights are decoded at a time


class Stored(Protocol):
    """A matrix in one of the formats."""

    @property
    def bits(self) -> int:
        """Bits of everything that is stored, tables included, the shape not."""

    def decode(self) -> Float32:
        """Return the matrix, shape (n, m)."""

    def dot(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return ``x W`` of shape (rows, m) for x of shape (rows, n), without W as a whole."""


@dataclass(frozen=True)
class IndexMap:
    """Codebook and indices.

    Attributes:
        values: float32, shape (k,).
        indices: shape (n, m).
    """

    values: Float32
    indices: Integers

    @classmethod
    def encode(cls, W: Float32) -> IndexMap:
        """Store a matrix."""
        return cls(*_distinct(W))

    @property
    def bits(self) -> int:
        """Bits of codebook and indices."""
        width = max(len(self.values) - 1, 0).bit_length()
        return WORD * len(self.values) + width * self.indices.size

    def decode(self) -> Float32:
        """Return the matrix."""
        return self.values[self.indices]

    def dot(self, x: Float32) -> npt.NDArray[np.float64]:
        """Return ``x W``."""
        return _by_columns(x, self.indices.shape[1], lambda c: self.values[self.indices[:, c]])


@dataclass(frozen=True)
class Csc:
    """Compressed sparse columns; all arrays 0-based.

    Attributes:
        values: Non-zeros column after column, float32, shape (q,).
        rows: Their rows, shape (q,).
        starts: Where each column starts in them, and their number, shape (m + 1,).
        n: Rows of the matrix.
    """

    values: Float32
    rows: Integers
    starts: Integers
    n: int

    @classmethod
    def encode(cls, W: Float32) -> Csc:
        """Store a matrix."""
        columns, rows = np.nonzero(_bits(W).T)  # -0.0 is no zero
        counts = np.bincount(columns, minlength=W.shape[1])
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(W[rows, columns], rows.astype(np.int64), starts, W.shape[0])

    @property
    def bits(self) -> int:
        """Bits with a word for every number, as the paper counts."""
        return WORD * (2 * len(self.values) + len(self.starts))

    def decode(self) -> Float32:
        """Return the matrix."""
        W = np.zeros((self.n, len(self.starts) - 1), np.float32)
        W[self.rows, np.repeat(np.arange(W.shape[1]), np.diff(self.starts))] = self.values
        return W

    def dot(self, x: Float32) -> npt.NDArray[np.float64]:
        """Return ``x W``, from the non-zeros only."""
        m = len(self.starts) - 1
        result = np.zeros((len(x), m))
        for first in range(0, m, _DOT_COLUMNS):
            starts = self.starts[first : first + _DOT_COLUMNS + 1]
            part = slice(starts[0], starts[-1])
            products = x[:, self.rows[part]].astype(np.float64) * self.values[part]
            sums = np.concatenate([np.zeros((len(x), 1)), np.cumsum(products, axis=1)], axis=1)
            result[:, first : first + len(starts) - 1] = np.diff(sums[:, starts - starts[0]])
        return result


@dataclass(frozen=True)
class Ham:
    """All values in one Huffman code.

    Attributes:
        values: float32, shape (k,).
        code: Their code.
        stream: Codewords column after column.
        shape: (n, m).
    """

    values: Float32
    code: Huffman
    stream: Stream
    shape: tuple[int, int]

    @classmethod
    def encode(cls, W: Float32) -> Ham:
        """Store a matrix."""
        values, indices = _distinct(W)
        symbols = indices.T.reshape(-1)
        code = Huffman.of(np.bincount(symbols, minlength=len(values)))
        return cls(values, code, code.encode(symbols), (W.shape[0], W.shape[1]))

    @property
    def bits(self) -> int:
        """Bits of stream, code and codebook."""
        return self.stream.bits + self.code.bits + WORD * len(self.values)

    def decode(self) -> Float32:
        """Return the matrix."""
        n, m = self.shape
        symbols = self.code.decode(self.stream, n * m)
        return np.ascontiguousarray(self.values[symbols].reshape(m, n).T)

    def dot(self, x: Float32) -> npt.NDArray[np.float64]:
        """Return ``x W``, from the whole columns of one piece of the stream at a time."""
        n, m = self.shape
        result, column = np.zeros((len(x), m)), 0
        rest = np.empty(0, np.int64)
        for part in self.code.parts(self.stream, n * m):
            rest = np.concatenate([rest, part])
            whole = len(rest) // n
            W = self.values[rest[: whole * n].reshape(whole, n).T]
            result[:, column : column + whole] = x.astype(np.float64) @ W
            rest, column = rest[whole * n :], column + whole
        return result


@dataclass(frozen=True)
class Sham:
    """Non-zeros in a Huffman code, with their places.

    Attributes:
        ham: The non-zeros, as a matrix of one column.
        places: `UncodedPlaces` or `GapPlaces`.
        shape: (n, m).
    """

    ham: Ham
    places: UncodedPlaces | GapPlaces
    shape: tuple[int, int]

    @classmethod
    def encode(cls, W: Float32) -> Sham:
        """Store a matrix as the paper does."""
        csc = Csc.encode(W)
        places = UncodedPlaces(csc.rows, np.diff(csc.starts), index_bits(W.shape[0]))
        return cls(Ham.encode(csc.values[:, None]), places, (W.shape[0], W.shape[1]))

    @classmethod
    def encode_gaps(cls, W: Float32) -> Sham:
        """Store a matrix with Huffman-coded gaps between its non-zeros."""
        csc, n = Csc.encode(W), W.shape[0]
        columns = np.repeat(np.arange(W.shape[1]), np.diff(csc.starts))
        places = GapPlaces.encode(columns * n + csc.rows)
        return cls(Ham.encode(csc.values[:, None]), places, (n, W.shape[1]))

    @property
    def bits(self) -> int:
        """Bits of the non-zeros and of their places."""
        return self.ham.bits + self.places.bits

    def decode(self) -> Float32:
        """Return the matrix."""
        return self._csc().decode()

    def dot(self, x: Float32) -> npt.NDArray[np.float64]:
        """Return ``x W``, from the non-zeros only."""
        return self._csc().dot(x)

    def _csc(self) -> Csc:
        n, m = self.shape
        flat = self.places.flat(n)
        counts = np.bincount(flat // n, minlength=m)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Csc(self.ham.decode()[:, 0], flat % n, starts, n)


@dataclass(frozen=True)
class UncodedPlaces:
    """Rows of the non-zeros and their number in each column, `width` bits each."""

    rows: Integers
    counts: Integers
    width: int

    @property
    def bits(self) -> int:
        """Bits of rows and counts."""
        return self.width * (len(self.rows) + len(self.counts))

    def flat(self, n: int) -> Integers:
        """Return the places in a column-major matrix of n rows."""
        return np.repeat(np.arange(len(self.counts)), self.counts) * n + self.rows


@dataclass(frozen=True)
class GapPlaces:
    """Zeros in front of each non-zero in column-major order, Huffman-coded; 255 skips on."""

    code: Huffman
    stream: Stream
    count: int

    @classmethod
    def encode(cls, flat: Integers) -> GapPlaces:
        """Store ascending places."""
        gaps = np.diff(flat, prepend=-1) - 1
        symbols = np.full(len(gaps) + int((gaps // _ESCAPE).sum()), _ESCAPE, np.int64)
        symbols[np.cumsum(gaps // _ESCAPE + 1) - 1] = gaps % _ESCAPE
        code = Huffman.of(np.bincount(symbols, minlength=_ESCAPE + 1))
        return cls(code, code.encode(symbols), len(symbols))

    @property
    def bits(self) -> int:
        """Bits of stream and code."""
        return self.stream.bits + self.code.bits

    def flat(self, _: int) -> Integers:
        """Return the places in the column-major matrix."""
        symbols = self.code.decode(self.stream, self.count)
        ends = symbols != _ESCAPE
        return np.asarray(np.cumsum(symbols + ends)[ends] - 1)


FORMATS: Mapping[str, Callable[[Float32], Stored]] = MappingProxyType(
    {
        "csc": Csc.encode,
        "ham": Ham.encode,
        "im": IndexMap.encode,
        "sham": Sham.encode,
        "sham_gap": Sham.encode_gaps,
    }
)
"""The encoders by name."""


def index_bits(n: int) -> int:
    """Return the bits of a row index or count: the first of 8, 16 and 32 that holds n."""
    return next(bits for bits in (8, 16, 32) if n < 2**bits)


def ham_bound(n: int, m: int, k: int) -> float:
    """Return the bound of the paper on HAM's share of the dense matrix's bits."""
    return (1 + math.log2(k)) / WORD + 6 * k / (n * m)


def sham_bound(n: int, m: int, k: int, s: float) -> float:
    """Return the bound on sHAM's share, for a share s of non-zeros.

    The paper prints (n + m + 1) / (n m) for the places, but there are s n m rows.
    """
    places = index_bits(n) * (s + (m + 1) / (n * m)) / WORD
    return s * (1 + math.log2(k)) / WORD + places + 6 * k / (n * m)


def csc_share(n: int, m: int, q: int) -> float:
    """Return CSC's share for q non-zeros."""
    return (2 * q + m + 1) / (n * m)


def index_map_share(n: int, m: int, k: int) -> float:
    """Return the index map's share."""
    return (WORD * k + n * m * math.ceil(math.log2(k))) / (WORD * n * m)


def _by_columns(
    x: Float32, m: int, block: Callable[[slice], Float32]
) -> npt.NDArray[np.float64]:
    result = np.zeros((len(x), m))
    for first in range(0, m, _DOT_COLUMNS):
        columns = slice(first, min(first + _DOT_COLUMNS, m))
        result[:, columns] = x.astype(np.float64) @ block(columns)
    return result


def _bits(W: Float32) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(W, np.float32).view(np.uint32)


def _distinct(W: Float32) -> tuple[Float32, Integers]:
    """Return the distinct values of a matrix, and which one each weight is."""
    found, indices = np.unique(_bits(W), return_inverse=True)
    return found.view(np.float32), indices.reshape(W.shape).astype(np.int64)
