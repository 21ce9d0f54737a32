"""Weights as decisions of the context-mixing coder, one after the other.

A weight is coded as decisions: is it the value nearest zero, its sign, the class of its
distance in ranks (1, 2-3, 4-7, ...), then halves of the class. Every decision compares the
weight with an edge between two values of the codebook, so that a logistic curve around the
predicted mean, with the predicted scale, gives each a probability, whatever the codebook.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.mixing_bits import (
    COUNTERS,
    SLOT_BITS,
    Bits,
    bytes_done,
    code,
    forget_visits,
    last_bytes,
    new_bits,
)
from onnxcomp.codec.mixing_context import (
    SLOPE_BITS,
    Context,
    Predictor,
    Tensor,
    begin_row,
    expect,
    learn,
    look_around,
    new_predictor,
    new_tensor,
    remember,
)
from onnxcomp.codec.mixing_tables import (
    CERTAIN,
    CURVE_BITS,
    PROBABILITY_BITS,
    compiled,
    curve,
    stretch,
)

Integers = npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]
Float64 = npt.NDArray[np.float64]

_TENSOR_COUNTERS = 0  # those that learn fast again in every tensor
_FAST_VISITS = 4
_CLASS_NODES = 2  # behind those of zero and of the sign; one for each class of distance
_HALF_NODES = 20  # three for each class: the first half, and the second behind either
_LAST_NODES = 84  # one for each class: all later halves


def most_bytes(values: int) -> int:
    """Return how many bytes a weight can take, from a codebook of so many values."""
    return 2 * (2 + 2 * values.bit_length())


def code_stream(
    parts: Sequence[tuple[tuple[int, int, int], int, Float64, Integers]],
    data: Uint8,
    *,
    decoding: bool,
    dtype: type[np.signedinteger[Any]] = np.int32,
) -> tuple[int, bytes]:
    """Code one stream.

    Args:
        parts: Of each tensor its shape (outputs, inputs, taps), the taps in a row of a kernel,
            its codebook with a mean magnitude near `UNIT`, and its flat ranks, which are read
            or written.
        data: The stream, or room for it.
        decoding: Read the stream in place of writing it.
        dtype: Of what is learned; int64 cannot wrap where this module runs uncompiled.

    Returns:
        How many bytes were written or are taken, and those that end the stream.
    """
    bits, predictor = new_bits(data, dtype), new_predictor(dtype)
    for shape, row, values, ranks in parts:
        code_tensor(bits, predictor, new_tensor(shape, row, values, ranks, dtype), decoding)
    return bytes_done(bits), last_bytes(bits)


@compiled
def _code_tensor(bits: Bits, predictor: Predictor, tensor: Tensor, decoding: bool) -> None:
    """Code all weights of a tensor, and learn from them.

    Args:
        bits: What was learned about decisions from the tensors before.
        predictor: What was learned about means and scales.
        tensor: The tensor, new.
        decoding: Write its ranks in place of reading them.
    """
    inputs, taps, kernels = tensor.inputs, tensor.taps, tensor.kernels
    for at in range(0, tensor.ranks.size, taps):
        channel = at // taps % inputs
        if channel == 0:
            begin_row(tensor)
        total = 0
        for tap in range(taps):
            look_around(predictor, tensor, at + tap, channel, tap, total)
            context = expect(predictor, tensor, tap)
            rank = _code_rank(bits, tensor, context, int(tensor.ranks[at + tap]), decoding)
            tensor.ranks[at + tap] = rank
            value = tensor.values[rank]
            learn(predictor, tensor, context, tap, value)
            total += remember(tensor, channel, tap, value)
        size = total // taps
        kernels[inputs] = (kernels[inputs] + size) >> 1
        kernels[channel] = (kernels[channel] + size) >> 1
    forget_visits(bits, _TENSOR_COUNTERS, _FAST_VISITS)


def _cached(sources: int) -> Callable[..., None]:
    """Return `_code_tensor`, kept on disk for sources of this checksum.

    numba's cache looks at the file that a function is in, not at those of the functions it
    calls, but it does look at its closure.
    """

    def code_tensor(bits: Bits, predictor: Predictor, tensor: Tensor, decoding: bool) -> None:
        if sources >= 0:
            _code_tensor(bits, predictor, tensor, decoding)

    return compiled(code_tensor, cache=True)


def _checksum() -> int:
    folder = Path(__file__).parent
    return zlib.crc32(
        b"".join(path.read_bytes() for path in sorted(folder.glob("mixing_*.py")))
    )


code_tensor = _cached(_checksum())


@compiled
def _code_rank(bits: Bits, tensor: Tensor, context: Context, rank: int, decoding: bool) -> int:
    """Code the rank of a weight in the codebook by decisions; return it."""
    edges, pivot, count = tensor.edges, tensor.pivot, tensor.values.size
    if count == 1:
        return 0
    low_one, low_two = _tails(context, edges[pivot], 1)
    high_one, high_two = _tails(context, edges[pivot + 1], 1)
    whole = 1 << CURVE_BITS
    _set_odds(bits, 0, high_one + whole - low_one, whole)
    _set_odds(bits, 1, high_two + whole - low_two, whole)
    if not _decide(bits, context, 0, 1, int(rank != pivot), decoding):
        return pivot
    sign = 1 if pivot == 0 else -1
    if 0 < pivot < count - 1:
        _set_odds(bits, 0, high_one, high_one + whole - low_one)
        _set_odds(bits, 1, high_two, high_two + whole - low_two)
        sign = 2 * _decide(bits, context, 1, 1, int(rank > pivot), decoding) - 1
    tails = (high_one, high_two) if sign > 0 else (whole - low_one, whole - low_two)
    high = count - pivot if sign > 0 else pivot + 1
    distance = (rank - pivot) * sign
    return pivot + sign * _code_distance(
        bits, tensor, context, tails, sign, high, distance, decoding
    )


@compiled
def _code_distance(
    bits: Bits,
    tensor: Tensor,
    context: Context,
    tails: tuple[int, int],
    sign: int,
    high: int,
    distance: int,
    decoding: bool,
) -> int:
    """Code how many ranks, at least 1 and less than `high`, a weight is from the pivot."""
    edges, pivot = tensor.edges, tensor.pivot
    low, (low_one, low_two), (high_one, high_two) = 1, tails, (0, 0)
    growing, octave, depth, bit = True, 0, 0, 0
    while high - low > 1:
        growing = growing and 2 * low < high
        middle = 2 * low if growing else (low + high) >> 1
        if growing:
            node = _CLASS_NODES + octave
        elif depth < 2:
            node = _HALF_NODES + 4 * octave + depth * (1 + bit)
        else:
            node = _LAST_NODES + octave
        edge = edges[pivot + middle] if sign > 0 else -edges[pivot - middle + 1]
        one, two = _tails(context, edge, sign)
        _set_odds(bits, 0, one - high_one, low_one - high_one)
        _set_odds(bits, 1, two - high_two, low_two - high_two)
        bit = _decide(bits, context, node, sign, int(distance >= middle), decoding)
        depth += not growing
        if bit:
            low, low_one, low_two = middle, one, two
            octave += growing
        else:
            high, high_one, high_two = middle, one, two
            growing = False
    return low


@compiled
def _tails(context: Context, edge: int, sign: int) -> tuple[int, int]:
    """Return the probabilities, in 2^-30, that a weight times its sign is above an edge."""
    distance = context.mean * sign - edge
    steep, plain = distance * context.slope, distance * context.plain_slope
    return curve(steep >> (SLOPE_BITS - 8)), curve(plain >> (SLOPE_BITS - 8))


@compiled
def _set_odds(bits: Bits, which: int, part: int, whole: int) -> None:
    """Set the log odds that one of the two curves gives."""
    probability = (max(part, 0) << PROBABILITY_BITS) // (max(whole, 0) + 1)
    least = 2 * CERTAIN
    bits.inputs[COUNTERS + which] = stretch(
        min(max(probability, least), (1 << PROBABILITY_BITS) - least)
    )


@compiled
def _decide(
    bits: Bits, context: Context, node: int, sign: int, bit: int, decoding: bool
) -> int:
    """Code one decision at a node, in the contexts of a weight; mirrored if it is negative."""
    first = node << (SLOT_BITS - 7)
    offset, slots, sets = context.offset * sign + 7, bits.slots, bits.sets
    left = context.left * sign + 3
    odds = min(max((bits.inputs[COUNTERS] + 2048) >> 6, 0), 63)
    slots[0] = first
    slots[1] = first + (left * 7 + context.above * sign + 3) * 3 + context.corner
    slots[2] = first + odds * 7 + left
    slots[3] = (
        first + (offset * 5 + context.channel * sign + 2) * 5 + context.filter * sign + 2
    )
    slots[4] = first + context.rough
    kind = min(node, 3)
    sets[0], sets[1], sets[2] = node, kind * 12 + context.scale, kind * 16 + context.tap
    return code(bits, bit, node * 16 + offset, decoding)
