"""Inner loops of the coders, compiled by numba.

Bodies are plain Python on typed integers. `rans.py` has the same arithmetic on NumPy arrays
for machines without numba; tests hold the two together bit for bit.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.jit import inner_loop

Int64 = npt.NDArray[np.int64]
Uint8 = npt.NDArray[np.uint8]
Uint16 = npt.NDArray[np.uint16]
Uint32 = npt.NDArray[np.uint32]

_U8, _U12, _U16, _U20 = np.uint32(8), np.uint32(12), np.uint32(16), np.uint32(20)
_BYTE, _SLOT, _WORD, _LOW = (np.uint32(v) for v in (255, 4095, 65535, 65536))
_LANES = 32
_OUTSIDE = 5
compiled = partial(inner_loop, cache=True, allocates=True)


@compiled
def decode(
    words: Uint16, states: Uint32, slots: Uint32, ends: Int64, tables: Int64, symbols: Uint8
) -> int:
    """Decode one segment; see `rans.decode`.

    Args:
        words: The segment's words, padded with `_LANES` zeros at least.
        states: Its lanes, left in their final states; 32 of them take the fast way.
        slots: Decoder tables, (n, 4096).
        ends: Where each piece of the segment ends.
        tables: The table of each piece.
        symbols: Receives the segment.

    Returns:
        The words taken; more than there are where the segment is damaged.
    """
    lanes = states.size
    limit = np.uint64(words.size - _LANES)
    position, taken = 0, np.uint64(0)
    for piece in range(ends.size):
        table, end = slots[tables[piece]], ends[piece]
        while position < end:
            if lanes == _LANES and position % _LANES == 0 and position + _LANES <= end:
                block = symbols[position : position + _LANES]
                for lane in range(_LANES):
                    state = states[lane]
                    entry = table[state & _SLOT]
                    block[lane] = entry & _BYTE
                    state = (entry >> _U8 & _SLOT) * (state >> _U12) + (entry >> _U20)
                    refilled = state << _U16 | np.uint32(words[taken])
                    empty = state < _LOW
                    taken += np.uint64(empty)
                    states[lane] = refilled if empty else state
                position += _LANES
            else:
                lane = position % lanes
                state = states[lane]
                entry = table[state & _SLOT]
                symbols[position] = entry & _BYTE
                state = (entry >> _U8 & _SLOT) * (state >> _U12) + (entry >> _U20)
                if state < _LOW:
                    state = state << _U16 | np.uint32(words[taken])
                    taken += np.uint64(1)
                states[lane] = state
                position += 1
            if taken > limit:
                return int(taken)
    return int(taken)


@compiled
def _lane_begins(
    lanes: int, size: int, ends: Int64, models: Int64, skipped: int, shapes: Int64
) -> tuple[Int64, Int64, Int64]:
    """Return piece, place in the period and place in the row where each lane begins."""
    pieces, places = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    columns = np.zeros(lanes, np.int64)
    for lane in range(lanes):
        begin = lane * (size // lanes) + min(lane, size % lanes)
        piece = 0
        while piece < ends.size - 1 and begin >= ends[piece]:
            piece += 1
        offset = begin - ends[piece - 1] if piece else begin + skipped
        pieces[lane] = piece
        places[lane] = offset % shapes[models[piece], 0]
        columns[lane] = places[lane] % shapes[models[piece], 1]
    return pieces, places, columns


@compiled
def decode_contexts(
    words: Uint16,
    states: Uint32,
    slots: Uint32,
    ends: Int64,
    models: Int64,
    skipped: int,
    shapes: Int64,
    bins: Uint8,
    choices: Int64,
    symbols: Uint8,
) -> int:
    """Decode one segment whose tables depend on neighbours; see `contexts.decode`.

    Args:
        words: As in `decode`.
        states: As in `decode`.
        slots: As in `decode`.
        ends: As in `decode`.
        models: The context model of each piece.
        skipped: Symbols of the first piece in front of the segment.
        shapes: Period, row and lag of each model, (n, 3).
        bins: The bin of each symbol, by model, (n, 256).
        choices: The table of each class, by model, (n, 36).
        symbols: Receives the segment.

    Returns:
        As `decode`.
    """
    lanes, size = states.size, symbols.size
    limit = np.uint64(words.size - _LANES)
    whole, longer = size // lanes, size % lanes
    pieces, places, columns = _lane_begins(lanes, size, ends, models, skipped, shapes)
    taken = np.uint64(0)
    for step in range(whole + (longer > 0)):
        for lane in range(lanes if step < whole else longer):
            position = lane * whole + min(lane, longer) + step
            if position == ends[pieces[lane]]:
                pieces[lane] += 1
                places[lane] = columns[lane] = 0
            model, place, column = models[pieces[lane]], places[lane], columns[lane]
            lag = shapes[model, 2]
            left = above = np.uint8(_OUTSIDE)
            if column > 0 and step > 0:
                left = bins[model, symbols[position - 1]]
            if place >= lag and step >= lag:
                above = bins[model, symbols[position - lag]]
            state = states[lane]
            entry = slots[choices[model, left * (_OUTSIDE + 1) + above], state & _SLOT]
            symbols[position] = entry & _BYTE
            state = (entry >> _U8 & _SLOT) * (state >> _U12) + (entry >> _U20)
            if state < _LOW:
                state = state << _U16 | np.uint32(words[taken])
                taken += np.uint64(1)
            states[lane] = state
            columns[lane] = 0 if column + 1 == shapes[model, 1] else column + 1
            places[lane] = 0 if place + 1 == shapes[model, 0] else place + 1
        if taken > limit:
            return int(taken)
    return int(taken)


@compiled
def encode(
    symbols: Uint8,
    frequency: Uint32,
    start: Uint32,
    ends: Int64,
    tables: Int64,
    states: Uint32,
    words: Uint16,
) -> int:
    """Encode one segment backwards; see `rans.encode`.

    Args:
        symbols: The segment.
        frequency: Frequencies of all tables, (n, 256).
        start: Where the slots of their symbols begin, (n, 256).
        ends: Where each piece of the segment ends.
        tables: The table of each piece.
        states: Lanes, left in the states with which decoding begins.
        words: Receives the words at its end; one longer than the segment.

    Returns:
        Where the words begin.
    """
    lanes = states.size
    free = np.uint64(words.size - 1)
    for piece in range(ends.size - 1, -1, -1):
        counts, first = frequency[tables[piece]], start[tables[piece]]
        begin = ends[piece - 1] if piece else 0
        for position in range(ends[piece] - 1, begin - 1, -1):
            lane = position % lanes
            state, symbol = states[lane], symbols[position]
            count = counts[symbol]
            words[free] = state & _WORD
            full = state >= count << _U20
            free -= np.uint64(full)
            state = state >> _U16 if full else state
            ratio = state // count
            states[lane] = (ratio << _U12) + (state - ratio * count) + first[symbol]
    return int(free) + 1
