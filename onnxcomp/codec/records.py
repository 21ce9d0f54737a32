"""What the head of a packed file says about each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.coders import CODERS, CoderId
from onnxcomp.codec.contexts import ContextModel, read_model
from onnxcomp.codec.fields import FieldReader, FieldWriter
from onnxcomp.codec.mixing import MOST_INPUTS, Layout
from onnxcomp.codec.symbols import MAX_VALUES, Geometry, values_of
from onnxcomp.codec.transforms import ESCAPE, NARROW
from onnxcomp.errors import InvalidModelError

Array = npt.NDArray[Any]


_MAX_TENSORS = 2**32


class Kind(IntEnum):
    """How a tensor is taken apart."""

    PLANES = 0
    RANKS = 1
    RUNS = 2
    WHOLE = 3
    COPY = 4


@dataclass(frozen=True)
class Part:
    """One sequence of bytes of a tensor.

    Attributes:
        coder: What holds it.
        count: Its symbols.
        table: The number of its frequency table, context model or layout; the symbol itself
            where the coder is CONSTANT.
    """

    coder: CoderId
    count: int
    table: int = 0


@dataclass(frozen=True)
class Record:
    """One tensor.

    Attributes:
        kind: How it is taken apart.
        parts: Its sequences: planes, or symbols of ranks (then low and high bytes of escaped
            ranks, where the codebook is long), or runs and levels, or all bytes as they lie.
        codebook: The number of its codebook, for RANKS and RUNS.
        detail: First rank of the window of a long codebook; the common symbol of RUNS; the
            number of the tensor that a COPY has the bytes of.
    """

    kind: Kind
    parts: tuple[Part, ...]
    codebook: int = 0
    detail: int = 0

    @property
    def has_codebook(self) -> bool:
        """Whether it names a codebook."""
        return self.kind in (Kind.RANKS, Kind.RUNS)


def write_record(
    record: Record,
    codebooks: Sequence[Array],
    models: Sequence[ContextModel],
    fields: FieldWriter,
) -> None:
    """Write a record; counts that follow from the tensor are left out."""
    fields.number(record.kind)
    if record.kind == Kind.COPY:
        fields.number(record.detail)
    free: Sequence[Part] = ()
    if record.has_codebook:
        fields.number(record.codebook)
        if record.kind == Kind.RUNS:
            fields.number(record.detail)
            free = record.parts
        elif codebooks[record.codebook].size > NARROW:
            fields.number(record.detail)
            free = record.parts[1:2]
    for part in free:
        fields.number(part.count)
    for part in record.parts:
        fields.number(part.coder)
        if part.coder == CoderId.CONTEXTS:
            models[part.table].write(fields)
        elif part.coder == CoderId.CONSTANT or CODERS[part.coder].uses_tables:
            fields.number(part.table)


def read_record(
    fields: FieldReader,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    codebooks: Sequence[Array],
    tables: int,
    models: list[ContextModel],
    layouts: list[Layout],
) -> Record:
    """Read the record of a tensor.

    Args:
        fields: The head.
        dtype: Dtype of the tensor.
        shape: Its shape, checked.
        codebooks: All codebooks.
        tables: The number of tables.
        models: Receives the context model of the tensor, if it has one.
        layouts: Receives its layout, if context mixing holds it.

    Raises:
        InvalidModelError: It is damaged.
    """
    kind = Kind(fields.number(max(Kind)))
    if kind == Kind.COPY:
        return Record(kind, (), detail=fields.number(_MAX_TENSORS))
    size, codebook, detail = math.prod(shape), 0, 0
    if kind == Kind.PLANES:
        counts = [size] * dtype.itemsize
    elif kind == Kind.WHOLE:
        counts = [size * dtype.itemsize]
    else:
        if not codebooks:
            raise InvalidModelError("a tensor has no codebook")
        codebook = fields.number(len(codebooks) - 1)
        if codebooks[codebook].dtype != dtype:
            raise InvalidModelError(f"a tensor of {dtype} has a codebook of another dtype")
        detail, counts = _read_counts(fields, kind, codebooks[codebook].size, size)
    parts = tuple(_read_part(fields, count, tables) for count in counts)
    if {part.coder for part in parts} & {CoderId.CONTEXTS, CoderId.MIXING}:
        if kind != Kind.RANKS or len(parts) > 1:
            raise InvalidModelError("only ranks of a short codebook have neighbours")
        if parts[0].coder == CoderId.MIXING:
            parts = (replace(parts[0], table=len(layouts)),)
            layouts.append(layout_of(shape, codebooks[codebook]))
            if layouts[-1].weights_per_output > MOST_INPUTS:
                raise InvalidModelError("an output of a tensor is too large for its coder")
        else:
            parts = (replace(parts[0], table=len(models)),)
            models.append(read_model(fields, shape, tables))
    return Record(kind, parts, codebook, detail)


def _read_counts(
    fields: FieldReader, kind: Kind, values: int, size: int
) -> tuple[int, list[int]]:
    """Return the detail of a tensor with so many values, and the symbols of its parts."""
    if kind == Kind.RUNS:
        if values > NARROW:
            raise InvalidModelError("runs have a codebook of more than 256 values")
        detail = fields.number(NARROW - 1)
        return detail, [fields.number(size), fields.number(size)]
    if values > NARROW:
        detail, escaped = fields.number(MAX_VALUES - ESCAPE), fields.number(size)
        return detail, [size, escaped, escaped]
    return 0, [size]


def layout_of(shape: tuple[int, ...], codebook: Array) -> Layout:
    """Return what context mixing knows of a tensor beforehand."""
    geometry = Geometry.of(shape)
    return Layout(geometry.shape, values_of(codebook), geometry.row)


def _read_part(fields: FieldReader, count: int, tables: int) -> Part:
    number = fields.number(max(CoderId))
    if number not in (CoderId.CONSTANT, *CODERS):
        raise InvalidModelError(f"coder {number} is not known")
    coder = CoderId(number)
    if coder == CoderId.CONSTANT:
        return Part(coder, count, fields.number(NARROW - 1))
    if not CODERS[coder].uses_tables:
        return Part(coder, count)
    if not tables:
        raise InvalidModelError("a tensor has no frequency table")
    return Part(coder, count, fields.number(tables - 1))
