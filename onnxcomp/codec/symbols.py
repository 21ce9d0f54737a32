"""Tensors of few distinct values as ranks into a codebook, and back bit for bit.

Values are told apart by their bit patterns, so that -0.0, 0.0 and every NaN come back as they
were. A codebook is sorted ascending, floats by IEEE 754's total order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

MAX_VALUES = 2**12  # of a codebook; with more, its entries cost more than they save
_SAMPLE = 2**16
_HASH_BITS = 20
_HASHED_VALUES = 1024
# Odd multipliers of Fibonacci hashing; one of them nearly always tells all values apart.
_MULTIPLIERS = tuple((0x9E3779B97F4A7C15 * (2 * i + 1)) % 2**64 for i in range(32))


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in front of a coder.

    Attributes:
        outputs: First axis: filters, or rows of a matrix.
        inputs: Second axis: input channels of one filter (of its group), or columns.
        taps: Positions of a kernel, contiguous.
        row: Positions in one row of a kernel.
    """

    outputs: int
    inputs: int
    taps: int
    row: int = 1

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Geometry:
        """Return the geometry of an ONNX weight of any rank; a vector has outputs only."""
        outputs, inputs, *kernel = (*shape, 1, 1)[: max(2, len(shape))]
        return cls(outputs, inputs, math.prod(kernel), kernel[-1] if kernel else 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(outputs, inputs, taps)."""
        return self.outputs, self.inputs, self.taps


@dataclass(frozen=True)
class Symbols:
    """A tensor as ranks into its codebook.

    Attributes:
        indices: int32 (outputs, inputs, taps), C order.
        values: float32 (n,), finite and ascending: what the ranks mean to contexts. Exact
            values are a matter of the codebook, of which this is a rounding.
        row: Taps in one row of a kernel; the tap above is `row` positions before.
    """

    indices: Int32
    values: Float32
    row: int = 1


def ranked(array: Array, limit: int = MAX_VALUES) -> tuple[Array, Array] | None:
    """Return the codebook of a tensor and its ranks, or None if it has too many values.

    Args:
        array: A tensor.
        limit: Values at most.

    Returns:
        The distinct bit patterns, ascending, dtype of `array`, and the flat ranks, uint8 or
        uint16.
    """
    bits = _bits(array)
    found = np.unique(bits[:_SAMPLE])
    while found.size <= limit:
        position = _ranks(bits, found)
        missing = bits[found[position] != bits] if found.size else bits
        if not missing.size:
            order = np.argsort(_order(found, array.dtype))
            rank = np.empty(found.size, np.uint8 if found.size <= 256 else np.uint16)
            rank[order] = np.arange(found.size)
            return found[order].view(array.dtype), rank[position]
        found = np.union1d(found, missing[: 4 * _SAMPLE])
    return None


def distinct(array: Array, limit: int = MAX_VALUES) -> Array | None:
    """Return the distinct bit patterns of a tensor, ascending, or None if above `limit`."""
    found = ranked(array, limit)
    return None if found is None else found[0]


def ranks(array: Array, codebook: Array) -> Array:
    """Return the ranks of all values in a codebook that has them: flat, uint8 or uint16."""
    bits, sorted_bits = _bits(array), np.sort(_bits(codebook))
    dtype = np.uint8 if codebook.size <= 256 else np.uint16
    by_value: Array = np.empty(codebook.size, dtype)
    by_value[np.searchsorted(sorted_bits, _bits(codebook))] = np.arange(codebook.size)
    result: Array = by_value[_ranks(bits, sorted_bits)]
    return result


def values_of(codebook: Array) -> Float32:
    """Return a codebook as float32: NaN and what is too large become the largest floats."""
    largest = float(np.finfo(np.float32).max)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = codebook.astype(np.float64)
    ends = np.where(np.signbit(values), -largest, largest)
    values = np.where(np.isnan(values), ends, values)
    return np.clip(values, -largest, largest).astype(np.float32)


def _bits(array: Array) -> Array:
    """Return the bit patterns of a tensor as flat unsigned integers."""
    flat: Array = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{array.dtype.itemsize}")


def _order(bits: Array, dtype: np.dtype[Any]) -> Array:
    """Return keys that sort bit patterns by value."""
    if dtype.kind in "bu":
        return bits
    sign = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    keys: Array = (
        bits ^ sign if dtype.kind == "i" else np.where(bits & sign, ~bits, bits | sign)
    )
    return keys


def _ranks(bits: Array, found: Array) -> Array:
    """Return where each pattern lies in sorted patterns, or anything where it does not."""
    if not found.size:
        return np.zeros(bits.size, np.intp)
    if found.size <= _HASHED_VALUES:
        shift = np.uint64(64 - _HASH_BITS)
        for multiplier in _MULTIPLIERS:
            keys = (found.astype(np.uint64) * np.uint64(multiplier)) >> shift
            if np.unique(keys).size == found.size:
                table = np.zeros(1 << _HASH_BITS, np.uint16)
                table[keys] = np.arange(found.size)
                return _hashed(bits, table, np.uint64(multiplier), shift)
    return np.minimum(np.searchsorted(found, bits), found.size - 1)


def _hashed(bits: Array, table: Array, multiplier: np.uint64, shift: np.uint64) -> Array:
    """Look patterns up in a table without collisions, in pieces that stay in the cache."""
    result = np.empty(bits.size, table.dtype)
    for begin in range(0, bits.size, _SAMPLE):
        keys = bits[begin : begin + _SAMPLE].astype(np.uint64)
        keys *= multiplier
        keys >>= shift
        result[begin : begin + _SAMPLE] = table[keys]
    return result
