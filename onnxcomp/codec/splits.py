"""The ways to take one tensor apart that an encoder chooses from."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.codebooks import write_codebook
from onnxcomp.codec.coders import compress
from onnxcomp.codec.fields import FieldWriter
from onnxcomp.codec.records import Kind
from onnxcomp.codec.symbols import MAX_VALUES, ranked, values_of
from onnxcomp.codec.tables import SYMBOLS, Counts, entropy_bits, table_bits
from onnxcomp.codec.transforms import (
    NARROW,
    shift_of,
    to_bytes,
    to_escapes,
    to_planes,
    to_runs,
    window_of,
)

Array = npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]

_SAMPLE = 2**15
_PROMISING = 0.98  # of the size without LZMA, on a sample
_LARGE = 64  # weights for each value of a codebook, from which on it costs next to nothing


@dataclass(frozen=True)
class Split:
    """One way to take a tensor apart.

    Attributes:
        kind: The way.
        sequences: Its parts.
        detail: As in `Record`.
        codebook: Exact values, for RANKS and RUNS.
    """

    kind: Kind
    sequences: tuple[Uint8, ...]
    detail: int = 0
    codebook: Array | None = None

    @cached_property
    def counts(self) -> tuple[Counts, ...]:
        """How often each symbol occurs in each part, (256,) each."""
        return tuple(np.bincount(part, minlength=SYMBOLS) for part in self.sequences)

    @cached_property
    def bits(self) -> float:
        """About what it takes with tables of its own, WHOLE compressed by LZMA."""
        if self.kind == Kind.WHOLE:
            return 8.0 * len(compress(self.sequences[0].tobytes()))
        return sum(map(_own_bits, self.counts)) + self.codebook_bits

    @cached_property
    def codebook_bits(self) -> int:
        """About what its codebook takes."""
        if self.codebook is None:
            return 0
        fields = FieldWriter()
        write_codebook(self.codebook, fields)
        return 8 * min(len(fields.data), len(compress(bytes(fields.data))))

    @property
    def has_contexts(self) -> bool:
        """Whether its only part is the ranks of neighbouring weights."""
        return self.kind == Kind.RANKS and len(self.sequences) == 1


def splits_of(array: Array) -> list[Split]:
    """Return the ways to take a tensor apart that may be the smallest, the best one first."""
    splits = _numeric_splits(array)
    best = min(split.bits for split in splits)
    data = to_bytes(array)
    if array.itemsize > 1 and lzma_promises(data, best):
        splits.append(Split(Kind.WHOLE, (data,)))
    return sorted(splits, key=lambda split: split.bits)


def lzma_promises(data: Uint8, bits: float) -> bool:
    """Return whether zlib on a sample comes near the bits that data take otherwise."""
    begin = max(0, (data.size - _SAMPLE) // 2)
    sample = data[begin : begin + _SAMPLE]
    share = bits * sample.size / data.size
    return 8 * len(zlib.compress(sample.tobytes(), 6)) < share / _PROMISING


def _numeric_splits(array: Array) -> list[Split]:
    found = ranked(array, min(MAX_VALUES, array.size // 2))
    if found is None:
        return [Split(Kind.PLANES, tuple(to_planes(array)))]
    codebook, rank = found
    splits: list[Split] = []
    if codebook.size > NARROW:
        first = window_of(rank, codebook.size)
        splits.append(Split(Kind.RANKS, to_escapes(rank, first), first, codebook))
    else:
        symbols = rank + np.uint8(shift_of(values_of(codebook)))
        splits.append(Split(Kind.RANKS, (symbols,), 0, codebook))
        common = int(splits[0].counts[0].argmax())
        if 2 * int(splits[0].counts[0][common]) > symbols.size:
            runs = to_runs(symbols, common)
            splits.append(Split(Kind.RUNS, runs, common, codebook))
    # planes one by one have no less entropy than ranks; they save the codebook
    if array.itemsize == 1 or array.size < _LARGE * codebook.size:
        splits.append(Split(Kind.PLANES, tuple(to_planes(array))))
    return splits


def _own_bits(counts: Counts) -> float:
    """Return what symbols take with a table of their own, or raw."""
    if np.count_nonzero(counts) < 2:
        return 0.0
    return min(float(entropy_bits(counts) + table_bits(counts)), 8.0 * int(counts.sum()))
