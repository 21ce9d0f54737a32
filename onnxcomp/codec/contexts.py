"""Static range-ANS whose table depends on the symbols to the left of and above each one.

Neighbouring weights of a kernel are alike in sign and size. The two neighbours fall into five
bins by value each (or lie outside), and a model names the table of every pair of bins. So that
a decoder knows the neighbours, each lane owns a run of neighbouring symbols; lane by lane the
runs are as long as if symbols were dealt out one by one, the longer ones first, and what lies
in front of a lane's run counts as outside. All else is as in `rans`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec import rans
from onnxcomp.codec.fields import FieldReader, FieldWriter
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.symbols import Geometry
from onnxcomp.codec.tables import SYMBOLS, TOTAL, Counts, Tables
from onnxcomp.errors import InvalidModelError

Array = npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]

EDGES = 4
OUTSIDE = EDGES + 1  # the bin of a neighbour that does not exist
CLASSES = (OUTSIDE + 1) ** 2
_STEPS = 16  # of which the neighbours are in memory, where there is no numba
_SHARES = (-1.2, -0.4, 0.4, 1.2)  # edges of the bins, in mean magnitudes


@dataclass(frozen=True)
class ContextModel:
    """How the symbols of one tensor get their tables.

    Attributes:
        edges: The first symbols of bins 1 to 4, ascending, (4,).
        tables: The table of each class, (36,): bin of the left neighbour times 6, plus that
            of the upper one.
        period: Symbols between two kernels; the inputs of a filter where kernels are 1 x 1.
        row: Symbols of one row of a kernel, or the period.
        lag: How far back the upper neighbour lies; in 1 x 1 kernels, the second to the left.
    """

    edges: tuple[int, ...]
    tables: tuple[int, ...]
    period: int
    row: int
    lag: int

    @property
    def bins(self) -> Uint8:
        """The bin of every symbol, (256,)."""
        return np.searchsorted(self.edges, np.arange(SYMBOLS), side="right").astype(np.uint8)

    def write(self, fields: FieldWriter) -> None:
        """Write what does not follow from the tensor's shape."""
        for number in (*self.edges, *self.tables):
            fields.number(number)


def geometry_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return period, row and lag of a tensor of this shape."""
    geometry = Geometry.of(shape)
    if geometry.taps == 1:
        return geometry.inputs, geometry.inputs, 2
    return geometry.taps, geometry.row, geometry.row


def read_model(fields: FieldReader, shape: tuple[int, ...], tables: int) -> ContextModel:
    """Read the model of a tensor.

    Raises:
        InvalidModelError: It is damaged.
    """
    edges = tuple(fields.number(SYMBOLS) for _ in range(EDGES))
    if list(edges) != sorted(edges) or not tables:
        raise InvalidModelError("a context model is damaged")
    chosen = tuple(fields.number(tables - 1) for _ in range(CLASSES))
    return ContextModel(edges, chosen, *geometry_of(shape))


def edges_of(values: Array, counts: Counts, shift: int) -> tuple[int, ...]:
    """Return edges of bins for symbols: shares of the mean magnitude of a tensor.

    Args:
        values: Its codebook, ascending.
        counts: How often each value occurs.
        shift: The symbol of the first value.
    """
    mean = float(np.abs(values) @ counts / counts.sum())
    edges = np.searchsorted(values, np.multiply(_SHARES, mean), side="left") + shift
    return tuple(int(edge) for edge in edges)


def encode(symbols: Sequence[Uint8], pieces: Sequence[Pieces], tables: Tables) -> list[bytes]:
    """Encode segments.

    Args:
        symbols: The symbols of each segment, (n,).
        pieces: Which part of each segment has which of the models.
        tables: All tables and context models.

    Returns:
        The bytes of each segment.
    """
    dealt, chosen = list[Uint8](), list[Pieces]()
    for part, piece in zip(symbols, pieces, strict=True):
        order = _order(part.size)
        table = tables_of(part, piece, tables.models)
        dealt.append(part[order])
        chosen.append(Pieces(np.arange(1, part.size + 1), table[order]))
    return rans.encode(dealt, chosen, tables)


def decode(data: Sequence[bytes], pieces: Sequence[Pieces], tables: Tables) -> list[Uint8]:
    """Decode segments; the arguments are those of `encode`.

    Raises:
        InvalidModelError: A segment is damaged.
    """
    lengths = [int(part.ends[-1]) for part in pieces]
    split = [rans.split(part, n) for part, n in zip(data, lengths, strict=True)]
    models = _Models(tables.models)
    symbols: list[Uint8] = []
    compiled = rans.kernels()
    if compiled is None:
        for group in rans.equal_lengths(lengths):
            symbols += _decode_together(split[group], pieces[group], tables, models)
        return symbols
    for (states, words), part, n in zip(split, pieces, lengths, strict=True):
        padded = np.concatenate([words, np.zeros(rans.FULL_LANES, np.uint16)])
        found = np.empty(n, np.uint8)
        taken = compiled.decode_contexts(
            *(padded, states, tables.slots, part.ends, part.tables, part.skipped),
            *(models.shapes, models.bins, models.choices, found),
        )
        rans.check_end(taken == words.size and bool((states == rans.LOW).all()))
        symbols.append(found)
    return symbols


def tables_of(symbols: Uint8, pieces: Pieces, models: Sequence[ContextModel]) -> Array:
    """Return the table of each symbol of a segment, (n,)."""
    classes, numbers = classes_of(symbols, pieces, models)
    tables: Array = _Models(models).choices[numbers, classes]
    return tables


def classes_of(
    symbols: Uint8, pieces: Pieces, models: Sequence[ContextModel]
) -> tuple[Array, Array]:
    """Return the class of each symbol of a segment and the number of its model, (n,) each."""
    numbers, lags = _neighbours(symbols.size, pieces, models)
    bins = _Models(models).bins
    at = np.arange(symbols.size)
    found = [
        np.where(lag > 0, bins[numbers, symbols[at - lag]], np.uint8(OUTSIDE)) for lag in lags
    ]
    return found[0] * np.uint8(OUTSIDE + 1) + found[1], numbers


class _Models:
    """Context models as arrays, one row each."""

    def __init__(self, models: Sequence[ContextModel]) -> None:
        self.shapes = np.array([(m.period, m.row, m.lag) for m in models], np.int64)
        self.bins = np.stack([m.bins for m in models])
        self.choices = np.array([m.tables for m in models], np.int64)


def _neighbours(
    size: int, pieces: Pieces, models: Sequence[ContextModel]
) -> tuple[Array, Array]:
    """Return the model of each symbol of a segment, and its distances to its neighbours.

    Returns:
        Numbers of models, (n,), and distances to the left and the upper neighbour, (2, n),
        0 where there is none.
    """
    begins = _lane_begins(size)
    step = np.arange(size) - np.repeat(begins, np.diff(begins, append=size))
    lags = np.empty((2, size), np.int64)
    begin, offset = 0, pieces.skipped
    for end, number in zip(pieces.ends, pieces.tables, strict=True):
        model = models[number]
        place = np.arange(end - begin) + offset
        lags[0, begin:end], lags[1, begin:end] = _lags(
            place, step[begin:end], model.period, model.row, model.lag
        )
        begin, offset = int(end), 0
    return pieces.table_of_each(), lags


def _lags(
    place: Array, step: Array, period: Array | int, row: Array | int, lag: Array | int
) -> tuple[Array, Array]:
    """Return the distances of symbols to their left and upper neighbours, 0 for none.

    Args:
        place: Where each lies behind the beginning of its tensor.
        step: Where it lies behind the beginning of its lane's run.
        period: As in its `ContextModel`.
        row: The same.
        lag: The same.
    """
    place = place % period
    left: Array = (place % row > 0) & (step > 0)
    return left, np.where((place >= lag) & (step >= lag), lag, 0)


def _lane_begins(size: int) -> Array:
    """Return where the run of each lane begins in a segment."""
    lanes = np.arange(rans.lanes_of(size))
    return lanes * (size // lanes.size) + np.minimum(lanes, size % lanes.size)


def _order(size: int) -> Array:
    """Return the symbols of a segment in the order in which they are coded."""
    begins = _lane_begins(size)
    steps = np.arange(-(-size // begins.size))
    order: Array = (begins + steps[:, None]).reshape(-1)[:size]
    return order


class _Places:
    """Where the symbols of segments of one length lie in their tensors.

    Args:
        pieces: Which part of each segment has which of the models.
        models: All models.
    """

    def __init__(self, pieces: Sequence[Pieces], models: _Models) -> None:
        starts = int(pieces[0].ends[-1]) * np.arange(len(pieces))
        pairs = list(zip(pieces, starts, strict=True))
        self._ends = np.concatenate([part.ends + start for part, start in pairs])
        begins = [np.append(-part.skipped, part.ends[:-1]) + start for part, start in pairs]
        self._begins = np.concatenate(begins)
        self._numbers = np.concatenate([part.tables for part in pieces])
        self._shapes = models.shapes[self._numbers].T.copy()

    def neighbours(self, at: Array, step: Array) -> tuple[Array, tuple[Array, Array]]:
        """Return the models of symbols, and their distances to their neighbours.

        Args:
            at: The symbols, counted through all segments.
            step: Where each lies behind the beginning of its lane's run.
        """
        piece = np.searchsorted(self._ends, at, side="right")
        shapes = (shape[piece] for shape in self._shapes)
        return self._numbers[piece], _lags(at - self._begins[piece], step, *shapes)


def _decode_together(
    split: Sequence[tuple[Array, Array]],
    pieces: Sequence[Pieces],
    tables: Tables,
    models: _Models,
) -> list[Uint8]:
    """Decode segments of one length in step: the arithmetic of `kernels.decode_contexts`."""
    size = int(pieces[0].ends[-1])
    starts, runs = size * np.arange(len(pieces))[:, None], _lane_begins(size)
    places, stepper = _Places(pieces, models), rans.Stepper(split, tables.slots)
    outside = len(models.bins)  # the number of a model that has all symbols in this bin
    bins = np.append(models.bins, np.full(SYMBOLS, OUTSIDE, np.uint8))
    slots = models.choices.astype(np.uint32) * np.uint32(TOTAL)
    symbols = np.empty(len(pieces) * size, np.uint8)
    steps = -(-size // runs.size)
    for begin in range(0, steps, _STEPS):
        step = np.arange(begin, min(begin + _STEPS, steps))[:, None, None]
        at = np.minimum(runs + step, size - 1) + starts
        numbers, lags = places.neighbours(at, step)
        near = [at - lag for lag in lags]
        known = [np.where(lag > 0, numbers, outside) * SYMBOLS for lag in lags]
        choices = numbers * CLASSES
        for i in range(step.size):
            now = np.s_[i, :, : size - (begin + i) * runs.size]
            left, above = (
                bins.take(model[now] + symbols.take(place[now]))
                for model, place in zip(known, near, strict=True)
            )
            first = slots.take(choices[now] + left * (OUTSIDE + 1) + above)
            symbols[at[now]] = stepper.step(first)
    stepper.finish()
    return list(symbols.reshape(len(pieces), size))
