"""The encoder's choices: how each tensor is taken apart, and what holds each part.

Everything is decided by size: exact entropies of the parts, with the bits of tables, models
and codebooks on top; LZMA by trying it where a quick look promises something.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.coders import CODERS, CoderId, compress, segments
from onnxcomp.codec.contexts import (
    CLASSES,
    ContextModel,
    classes_of,
    edges_of,
    geometry_of,
    tables_of,
)
from onnxcomp.codec.head import pieces_of
from onnxcomp.codec.mixing import MOST_INPUTS, Layout
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.records import Kind, Part, Record, layout_of
from onnxcomp.codec.splits import Split, lzma_promises, splits_of
from onnxcomp.codec.symbols import values_of
from onnxcomp.codec.tables import SYMBOLS, Codes, Counts, cluster, codes_of, cost
from onnxcomp.codec.transforms import shift_of, to_bytes
from onnxcomp.errors import ParameterError

Array = npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]

_CLASSES = "classes"  # the group of histograms that are given neighbours
_MODEL_BITS = 200.0  # of a context model, about
_FEWEST = 256  # symbols for which contexts can pay
_NEARLY = 1.05  # of the bits of other ways, that ranks may take in front of context mixing


class Profile(StrEnum):
    """What an encoder may choose from, the fastest to decode first."""

    FAST = "fast"
    BALANCED = "balanced"
    MAX = "max"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ParameterError.choice("pack", "profile", cls, value)


@dataclass
class Plan:
    """What a file will hold.

    Attributes:
        records: One for each tensor.
        codebooks: Those the records name.
        codes: The frequency tables that they name.
        models: Their context models.
        layouts: Of the tensors that context mixing holds.
        streams: The sequences of each coder, in the order of the records.
    """

    records: list[Record] = field(default_factory=list)
    codebooks: list[Array] = field(default_factory=list)
    codes: list[Codes] = field(default_factory=list)
    models: list[ContextModel] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    streams: dict[CoderId, list[Uint8]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Contexts:
    """The symbols of a tensor by their neighbours.

    Attributes:
        split: Its ranks.
        model: Its model, tables not yet chosen.
        counts: How often each symbol occurs in each class, (36, 256).
    """

    split: Split
    model: ContextModel
    counts: Counts


@dataclass(frozen=True)
class _Chosen:
    """Tables for some tensors.

    Attributes:
        plain: The table of each part of each tensor; -1 for constant and for raw parts.
        classes: The tables of each tensor's classes, by the tensor's number.
        codes: The tables.
    """

    plain: list[list[int]]
    classes: dict[int, tuple[int, ...]]
    codes: list[Codes]


@dataclass(frozen=True)
class Tensors:
    """Tensors, of which those of the same bytes are stored once.

    Attributes:
        firsts: For every tensor the number of the first one of its bytes.
        shapes: Of those that are stored.
        ways: The ways to take each of these apart, the best one first.
    """

    firsts: list[int]
    shapes: list[tuple[int, ...]]
    ways: list[list[Split]]

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Tensors:
        """Return tensors, none of them empty."""
        firsts = _firsts(arrays)
        stored = [arrays[i] for i in dict.fromkeys(firsts)]
        return cls(firsts, [a.shape for a in stored], [splits_of(a) for a in stored])


def plan_tensors(tensors: Tensors, profile: Profile) -> Plan:
    """Decide how tensors are stored, with what a profile may choose from."""
    plan = _planned(tensors, profile)
    own = iter(plan.records)
    plan.records = [
        next(own) if first == i else Record(Kind.COPY, (), detail=first)
        for i, first in enumerate(tensors.firsts)
    ]
    return plan


def _firsts(arrays: Sequence[Array]) -> list[int]:
    """Return for every tensor the number of the first one of its dtype, size and bytes."""
    kinds = [(array.dtype, array.size) for array in arrays]
    often, known = Counter(kinds), dict[Hashable, int]()
    found = []
    for i, (array, kind) in enumerate(zip(arrays, kinds, strict=True)):
        data = to_bytes(array) if often[kind] > 1 else np.empty(0, np.uint8)
        key = (*kind, hashlib.sha256(data.data).digest())
        found.append(known.setdefault(key, i))
    return found


def _planned(tensors: Tensors, profile: Profile) -> Plan:
    splits, shapes = [ways[0] for ways in tensors.ways], tensors.shapes
    ranks = {
        i: way
        for i, ways in enumerate(tensors.ways)
        for way in ways
        if way.has_contexts and math.prod(shapes[i]) >= _FEWEST
    }
    mixed = set[int]()
    if profile == Profile.MAX:
        near = {i for i, way in ranks.items() if way.bits < _NEARLY * splits[i].bits}
        mixed = {i for i in near if _can_be_mixed(ranks[i], shapes[i])}
    contexts: dict[int, _Contexts] = {}
    if profile != Profile.FAST:
        found = {i: _contexts(w, shapes[i]) for i, w in ranks.items() if i not in mixed}
        chosen = _choose_tables(splits, found, without=mixed)
        contexts = {i: c for i, c in found.items() if _context_pays(i, splits, c, chosen)}
    for i in mixed | contexts.keys():
        splits[i] = ranks[i]
    chosen = _choose_tables(splits, contexts, without=mixed | contexts.keys())
    builder = _Builder(chosen)
    for i, (split, shape) in enumerate(zip(splits, shapes, strict=True)):
        if i in mixed:
            builder.add(split, [builder.mixed(split, shape)])
        elif i in contexts:
            builder.add(split, [builder.with_contexts(i, contexts[i])])
        else:
            builder.add(split, builder.plain(i, split))
    return builder.finish()


def _can_be_mixed(split: Split, shape: tuple[int, ...]) -> bool:
    assert split.codebook is not None  # ranks have one
    layout = layout_of(shape, split.codebook)
    return layout.values.size > 1 and layout.weights_per_output <= MOST_INPUTS


def _contexts(split: Split, shape: tuple[int, ...]) -> _Contexts:
    assert split.codebook is not None  # ranks have one
    values, symbols = values_of(split.codebook), split.sequences[0]
    shift = shift_of(values)
    counts = split.counts[0][shift : shift + values.size]
    edges = edges_of(values.astype(np.float64), counts, shift)
    model = ContextModel(edges, (0,) * CLASSES, *geometry_of(shape))
    table = np.zeros(CLASSES * SYMBOLS, np.int64)
    length = CODERS[CoderId.CONTEXTS].segment
    whole = Pieces(np.array([symbols.size]), np.array([0]))
    for begin in range(0, symbols.size, length):
        part = symbols[begin : begin + length]
        classes, _ = classes_of(part, whole.between(begin, begin + part.size), [model])
        keys = classes.astype(np.int64) * SYMBOLS + part
        table += np.bincount(keys, minlength=table.size)
    return _Contexts(split, model, table.reshape(CLASSES, SYMBOLS))


def _choose_tables(
    splits: Sequence[Split], contexts: Mapping[int, _Contexts], *, without: Set[int]
) -> _Chosen:
    """Choose tables for all parts.

    Args:
        splits: The tensors.
        contexts: Those with contexts, by the tensor's number.
        without: Tensors whose parts need no tables but those of contexts.
    """
    histograms, groups = list[Counts](), list[Hashable]()
    places = list[tuple[int, int]]()
    for i, split in enumerate(splits):
        for j, counts in enumerate(split.counts):
            if np.count_nonzero(counts) > 1 and i not in without:
                histograms.append(counts)
                groups.append((split.kind, len(split.counts), j))
                places.append((i, j))
    for i, found in contexts.items():
        occurring = [j for j in range(CLASSES) if found.counts[j].any()]
        histograms += [found.counts[j] for j in occurring]
        groups += [_CLASSES] * len(occurring)
        places += [(i, len(splits[i].counts) + j) for j in occurring]
    plain = [[-1] * len(split.counts) for split in splits]
    if not histograms:
        return _Chosen(plain, {}, [])
    classes = {i: [-1] * CLASSES for i in contexts}
    tabled = [group == _CLASSES for group in groups]
    numbers, codes = cluster(histograms, groups, tabled)
    for (i, j), number in zip(places, numbers, strict=True):
        parts = len(plain[i])
        if j < parts:
            plain[i][j] = number
        else:
            classes[i][j - parts] = number
    # classes that do not occur take any table
    filled = {i: tuple(max(row) if t < 0 else t for t in row) for i, row in classes.items()}
    return _Chosen(plain, filled, codes)


def _context_pays(
    i: int, splits: Sequence[Split], contexts: _Contexts, chosen: _Chosen
) -> bool:
    """Return whether a tensor is smaller with contexts than without."""
    with_contexts = _context_bits(contexts, chosen.classes[i], chosen.codes)
    parts = zip(splits[i].counts, chosen.plain[i], strict=True)
    without = sum(
        _bits(counts, table, chosen.codes)
        for counts, table in parts
        if np.count_nonzero(counts) > 1
    )
    return with_contexts + contexts.split.codebook_bits < without + splits[i].codebook_bits


def _context_bits(
    contexts: _Contexts, tables: tuple[int, ...], codes: Sequence[Codes]
) -> float:
    pairs = zip(contexts.counts, tables, strict=True)
    used = (_bits(counts, table, codes) for counts, table in pairs if counts.any())
    return _MODEL_BITS + sum(used)


def _bits(counts: Counts, table: int, codes: Sequence[Codes]) -> float:
    """Return what symbols take with a table, or raw."""
    return cost(counts, codes[table]) if table >= 0 else 8.0 * int(counts.sum())


class _Builder:
    """Writes a plan tensor by tensor, numbering the codebooks and tables that are used."""

    def __init__(self, chosen: _Chosen) -> None:
        self.plan = Plan()
        self._chosen = chosen
        self._codebooks: dict[bytes, int] = {}
        self._tables: dict[int, int] = {}
        self._counts: list[Counts] = []

    def add(self, split: Split, parts: Sequence[Part]) -> None:
        """Add the next tensor."""
        codebook = 0 if split.codebook is None else self._codebook(split.codebook)
        self.plan.records.append(Record(split.kind, tuple(parts), codebook, split.detail))

    def finish(self) -> Plan:
        """Make the tables of what they really code, and return the plan.

        Neighbours depend on where lanes begin, and that on all tensors of the stream.
        """
        counts = np.array(self._counts).reshape(-1, SYMBOLS)
        coder, pieces = CoderId.CONTEXTS, pieces_of(self.plan.records, CoderId.CONTEXTS)
        stream = np.concatenate(self.plan.streams.get(coder, [np.empty(0, np.uint8)]))
        for begin, end in segments(pieces, CODERS[coder]):
            part = stream[begin:end]
            tables = tables_of(part, pieces.between(begin, end), self.plan.models)
            np.add.at(counts, (tables, part), 1)
        for number, total in enumerate(counts):
            if total.any():
                self.plan.codes[number] = codes_of(total)
        return self.plan

    def plain(self, i: int, split: Split) -> list[Part]:
        """Return the parts of a tensor that are coded without a look at neighbours."""
        triples = zip(split.sequences, split.counts, self._chosen.plain[i], strict=True)
        return [self._part(*triple) for triple in triples]

    def mixed(self, split: Split, shape: tuple[int, ...]) -> Part:
        """Return the part of a tensor that context mixing holds."""
        assert split.codebook is not None  # ranks have one
        self.plan.layouts.append(layout_of(shape, split.codebook))
        return self._held(split.sequences[0], CoderId.MIXING, len(self.plan.layouts) - 1)

    def _part(self, sequence: Uint8, counts: Counts, table: int) -> Part:
        if np.count_nonzero(counts) < 2:
            symbol = int(sequence[0]) if sequence.size else 0
            return Part(CoderId.CONSTANT, sequence.size, symbol)
        bits = _bits(counts, table, self._chosen.codes)
        coder = CoderId.RANS if table >= 0 else CoderId.RAW
        coder = self._smallest(sequence, coder, bits)
        number = self._table(table) if coder == CoderId.RANS else 0
        if coder == CoderId.RANS:
            self._counts[number] = self._counts[number] + counts
        return self._held(sequence, coder, number)

    def with_contexts(self, i: int, contexts: _Contexts) -> Part:
        """Return the part of a tensor that is coded by its neighbours."""
        (sequence,), tables = contexts.split.sequences, self._chosen.classes[i]
        bits = _context_bits(contexts, tables, self._chosen.codes)
        coder, number = self._smallest(sequence, CoderId.CONTEXTS, bits), 0
        if coder == CoderId.CONTEXTS:
            number = len(self.plan.models)
            numbered = tuple(self._table(table) for table in tables)
            self.plan.models.append(replace(contexts.model, tables=numbered))
        return self._held(sequence, coder, number)

    def _smallest(self, sequence: Uint8, coder: CoderId, bits: float) -> CoderId:
        """Return a coder that takes so many bits for a sequence, or one that takes less."""
        if lzma_promises(sequence, bits) and 8 * len(compress(sequence.tobytes())) < bits:
            return CoderId.LZMA
        return coder

    def _held(self, sequence: Uint8, coder: CoderId, number: int) -> Part:
        self.plan.streams.setdefault(coder, []).append(sequence)
        return Part(coder, sequence.size, number)

    def _table(self, table: int) -> int:
        number = self._tables.setdefault(table, len(self._tables))
        if number == len(self.plan.codes):
            self.plan.codes.append(self._chosen.codes[table])
            self._counts.append(np.zeros(SYMBOLS, np.int64))
        return number

    def _codebook(self, codebook: Array) -> int:
        key = codebook.dtype.str.encode() + codebook.tobytes()
        number = self._codebooks.setdefault(key, len(self._codebooks))
        if number == len(self.plan.codebooks):
            self.plan.codebooks.append(codebook)
        return number
