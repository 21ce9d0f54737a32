"""Frequency tables of the static coders: 256 symbols, counts that sum to 4096.

A table is stored as one small number per symbol, its logarithmic frequency in eighths of an
octave (0 where the symbol is absent): neighbours differ little, so their differences pack
well, and the rounding costs less than 0.001 bits a symbol. Integers alone make the
frequencies from them, so that every machine has the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.fields import FieldReader, FieldWriter
from onnxcomp.errors import InvalidModelError

if TYPE_CHECKING:
    from onnxcomp.codec.contexts import ContextModel
    from onnxcomp.codec.mixing import Layout

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Uint32 = npt.NDArray[np.uint32]
Float64 = npt.NDArray[np.float64]

SYMBOLS = 256
PRECISION = 12
TOTAL = 1 << PRECISION
_STEPS = 8  # codes of one octave
_MAX_CODE = 1 + _STEPS * PRECISION
# floor(2 ** (28 + i / 8)), by exact square roots
_EIGHTHS = tuple(isqrt(isqrt(isqrt(1 << (28 * _STEPS + i)))) for i in range(_STEPS))
_WEIGHTS = np.array(
    [0, *(_EIGHTHS[i % _STEPS] << (i // _STEPS) for i in range(_MAX_CODE))], np.int64
)
# Estimated cost of a table: bits of one symbol that occurs, and of the rest.
_SYMBOL_BITS, _TABLE_BITS = 4.5, 24.0
MAX_TABLES = 1024
_ROUNDS = 3


def codes_of(counts: Counts) -> Codes:
    """Return the codes of the table that fits these counts, (256,).

    A table has two symbols at least, so that no frequency is 4096.
    """
    share = np.maximum(counts, 1) / counts.sum()
    codes = np.rint(_STEPS * (PRECISION + np.log2(share))).astype(np.int64)
    codes = np.where(counts > 0, 1 + np.clip(codes, 0, _MAX_CODE - 1), 0)
    if np.count_nonzero(codes) == 1:
        codes[(int(codes.argmax()) + 1) % SYMBOLS] = 1
    return codes.astype(np.uint8)


def write_codes(codes: Codes, fields: FieldWriter) -> None:
    """Write the codes of a table: the range of its symbols, and steps between neighbours."""
    present = np.flatnonzero(codes)
    first, last = int(present[0]), int(present[-1])
    fields.number(first)
    fields.number(last)
    for step in np.diff(codes[first : last + 1].astype(np.int64), prepend=0):
        fields.signed(int(step))


def read_codes(fields: FieldReader) -> Codes:
    """Read the codes of a table.

    Raises:
        InvalidModelError: They are damaged.
    """
    first, last = fields.number(SYMBOLS - 1), fields.number(SYMBOLS - 1)
    steps = [fields.signed(_MAX_CODE) for _ in range(first, last + 1)]
    codes = np.zeros(SYMBOLS, np.int64)
    codes[first : last + 1] = np.cumsum(steps)
    if np.count_nonzero(codes) < 2 or codes.min() < 0 or codes.max() > _MAX_CODE:
        raise InvalidModelError("a frequency table is damaged")
    return codes.astype(np.uint8)


def frequencies(codes: Codes) -> Uint32:
    """Return the frequencies, (256,), that codes stand for: each at least 1, sum 4096."""
    weights = _WEIGHTS[codes] * TOTAL
    whole, rest = np.divmod(weights, _WEIGHTS[codes].sum())
    result = np.where(codes > 0, np.maximum(whole, 1), 0)
    missing = TOTAL - int(result.sum())
    if missing > 0:
        result[np.argsort(-rest, kind="stable")[:missing]] += 1
    while missing < 0:
        largest = int(result.argmax())
        taken = min(-missing, -(-int(result[largest]) // 2))
        result[largest] -= taken
        missing += taken
    return result.astype(np.uint32)


def starts(frequency: Uint32) -> Uint32:
    """Return where the slots of each symbol begin, (256,)."""
    return (np.cumsum(frequency, dtype=np.uint32) - frequency).astype(np.uint32)


def slots(frequency: Uint32) -> Uint32:
    """Return the decoder's table, (4096,): symbol, frequency << 8, offset << 20."""
    symbols = np.repeat(np.arange(SYMBOLS, dtype=np.uint32), frequency)
    offsets = np.arange(TOTAL, dtype=np.uint32) - starts(frequency)[symbols]
    return (symbols | frequency[symbols] << 8 | offsets << 20).astype(np.uint32)


class Tables:
    """The tables of one file, and what else its coders know beforehand.

    Args:
        codes: The codes of each table.
        models: Context models, which choose among the tables.
        layouts: Layouts of the tensors that context mixing holds.
    """

    def __init__(
        self,
        codes: Sequence[Codes],
        models: Sequence[ContextModel] = (),
        layouts: Sequence[Layout] = (),
    ) -> None:
        self.codes = tuple(codes)
        self.models = tuple(models)
        self.layouts = tuple(layouts)

    @cached_property
    def frequencies(self) -> Uint32:
        """Frequencies, (n, 256)."""
        return np.stack([frequencies(codes) for codes in self.codes])

    @cached_property
    def starts(self) -> Uint32:
        """Where the slots of each symbol begin, (n, 256)."""
        return np.stack([starts(frequency) for frequency in self.frequencies])

    @cached_property
    def slots(self) -> Uint32:
        """The decoder's tables, (n, 4096)."""
        return np.stack([slots(frequency) for frequency in self.frequencies])


def bits_per_symbol(codes: Codes) -> Float64:
    """Return what each symbol costs with a table, (256,); infinite where it is absent."""
    with np.errstate(divide="ignore"):
        return PRECISION - np.log2(frequencies(codes).astype(np.float64))


def cost(counts: Counts, codes: Codes) -> float:
    """Return the bits of symbols with these counts, coded with a table."""
    present = counts > 0
    return float(counts[present] @ bits_per_symbol(codes)[present])


def table_bits(counts: Counts) -> Float64:
    """Return about how many bits tables take, over the last axis."""
    bits: Float64 = _TABLE_BITS + _SYMBOL_BITS * np.count_nonzero(counts, axis=-1)
    return bits


def entropy_bits(counts: Counts) -> Float64:
    """Return total times entropy of histograms, over the last axis, in bits."""
    positive = np.maximum(counts, 1)
    total = np.maximum(counts.sum(-1), 1)
    bits: Float64 = total * np.log2(total) - (counts * np.log2(positive)).sum(-1)
    return bits


def cluster(
    histograms: Sequence[Counts], groups: Sequence[Hashable], tabled: Sequence[bool]
) -> tuple[list[int], list[Codes]]:
    """Choose tables for several sequences, shared where that costs less.

    Every group offers a common table; from the longest on, each sequence takes the table that
    fits it best, or opens its own. Tables that do not pay are then dissolved.

    Args:
        histograms: Counts of the symbols of each sequence, (256,) each.
        groups: What kind of sequence each is; long sequences may share across groups.
        tabled: Whether a sequence must have a table.

    Returns:
        The number of each sequence's table, -1 where eight bits a symbol are less, and the
        tables.
    """
    everything = np.array(histograms, np.int64)
    used = np.flatnonzero(everything.any(0))
    counts = everything[:, used]
    kinds = list(dict.fromkeys(groups))
    members = np.array([kinds.index(group) for group in groups])
    merged = np.stack([counts[members == k].sum(0) for k in range(len(kinds))])
    raw = np.where(tabled, np.inf, 8.0 * counts.sum(1))
    own = entropy_bits(counts) + table_bits(counts)
    for i in np.argsort(-counts.sum(1), kind="stable"):
        if len(merged) < MAX_TABLES and _further_bits(counts[i], merged).min() > own[i]:
            merged = np.vstack([merged, counts[i]])
    numbers: Array = np.empty(0)
    for _ in range(_ROUNDS):
        chosen = _chosen(counts, merged, raw)
        alive = np.unique(chosen[chosen >= 0])
        merged = np.array([counts[chosen == table].sum(0) for table in alive])
        numbers = np.where(chosen >= 0, np.searchsorted(alive, chosen), -1)
        if not alive.size:
            break
    return numbers.tolist(), [codes_of(_spread(total, used)) for total in merged]


def _chosen(counts: Counts, merged: Counts, raw: Float64) -> npt.NDArray[np.intp]:
    """Return each sequence's best table, or -1, after dissolving those that do not pay."""
    fits = np.stack([raw, *(_further_bits(counts, table) for table in merged)], axis=1)
    price = np.append(-np.inf, table_bits(merged))  # to be raw costs no table
    while np.isfinite(fits[0]).sum() > 1:
        best = fits.argmin(1)
        first, second = np.sort(fits, axis=1)[:, :2].T
        saved = np.bincount(best, weights=second - first, minlength=price.size) - price
        saved[~np.isfinite(fits[0])] = np.inf
        if saved.min() >= 0:
            break
        fits[:, saved.argmin()] = np.inf
    chosen: npt.NDArray[np.intp] = fits.argmin(1) - 1
    return chosen


def _spread(counts: Counts, used: npt.NDArray[np.intp]) -> Counts:
    """Return counts of all symbols, given those of some."""
    spread = np.zeros(SYMBOLS, np.int64)
    spread[used] = counts
    return spread


def _further_bits(counts: Counts, merged: Counts) -> Float64:
    """Return what joining tables adds for sequences, new symbols in the tables included."""
    both = merged + counts
    new = np.count_nonzero(both, axis=-1) - np.count_nonzero(merged, axis=-1)
    further: Float64 = entropy_bits(both) - entropy_bits(merged) + _SYMBOL_BITS * new
    return further
