"""One binary decision of the context-mixing coder: predicted, coded, learned from.

Experts give log odds; three sets of weights, each chosen by a context of its own, add them up;
the mean of the three is refined by a curve that is learned too. All in integers.

References:
    M. Mahoney, Adaptive weighing of context models for lossless data compression (2005):
    counters, logistic mixing, refinement and the carry-less range coder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.mixing_tables import (
    MAX_VISITS,
    PROBABILITY_BITS,
    RATES,
    TRUST,
    UNIT,
    compiled,
    squash,
    stretch,
)

Integers = npt.NDArray[Any]

COUNTERS = 5
CURVES = 2
INPUTS = COUNTERS + CURVES + 1
MIXERS = 3
SLOT_BITS = 16
MIXER_SETS = 128
REFINED_SETS = 2048
_KNOTS = 33
_KNOT_BITS = 7
_VISIT_BITS = 10
_COUNTED_BITS = 21
_LARGEST_WEIGHT = 1 << 22
_LEAST = 24  # a decision costs at most 11.4 bits
_WORD = 0xFFFFFFFF
# Rates of learning weights, in 2^-22, per 256 decisions: four times as large at first.
_WEIGHT_RATES = (48 + 144 * 12 // (12 + np.arange(256))).astype(np.int32)


class Bits(NamedTuple):
    """What one stream of decisions has learned, and its range coder.

    Attributes:
        counters: (COUNTERS, 2^16): a probability in 2^-21, and below it 10 bits of visits.
        weights: (MIXERS, MIXER_SETS, INPUTS), in 2^-16.
        refined: (REFINED_SETS, 33): probabilities in 2^-16 over log odds of -8 ... 8.
        inputs: (INPUTS,): log odds in 1 / 256 by counters, curves and a constant.
        slots: (COUNTERS,): the counters that the next decision uses.
        sets: (MIXERS,): the weights that it uses.
        coder: (5,): low and high end of the interval, the code word when decoding, bytes done
            + 4, decisions done.
        data: uint8, what is read or written.
    """

    counters: Integers
    weights: Integers
    refined: Integers
    inputs: Integers
    slots: Integers
    sets: Integers
    coder: Integers
    data: Integers


def new_bits(data: Integers, dtype: type[np.signedinteger[Any]]) -> Bits:
    """Return the state before the first decision.

    Args:
        data: uint8, what is to be decoded, or room for what is encoded.
        dtype: Of what is learned: int32, or int64 for a reference that cannot wrap.
    """
    knots = np.arange(_KNOTS) - _KNOTS // 2
    first = np.array([squash(int(knot) << _KNOT_BITS) for knot in knots], dtype)
    coder = np.array([0, _WORD, 0, 4, 0], np.int64)
    for byte in range(4):
        coder[2] = coder[2] << 8 | (int(data[byte]) if byte < data.size else 0)
    return Bits(
        np.full((COUNTERS, 1 << SLOT_BITS), 1 << (_COUNTED_BITS + _VISIT_BITS - 1), dtype),
        np.full((MIXERS, MIXER_SETS, INPUTS), (1 << 16) // 6, dtype),
        np.tile(first, (REFINED_SETS, 1)),
        np.full(INPUTS, UNIT, dtype),
        np.zeros(COUNTERS, np.int64),
        np.zeros(MIXERS, np.int64),
        coder,
        data,
    )


@compiled
def code(state: Bits, bit: int, refined_set: int, decoding: bool) -> int:
    """Code one decision by the slots, sets and curves that are set, and learn from it.

    Args:
        state: What was learned so far; its `inputs` hold the log odds of the curves.
        bit: The decision; when decoding, anything.
        refined_set: Curve that refines the mixed probability.
        decoding: Read the decision in place of writing it.

    Returns:
        The decision.
    """
    inputs, weights = state.inputs, state.weights
    for j in range(COUNTERS):
        counter = state.counters[j, state.slots[j]]
        trust = TRUST[counter & ((1 << _VISIT_BITS) - 1)]
        inputs[j] = (stretch(counter >> (_VISIT_BITS + 5)) * trust) >> 8
    first, second, third = state.sets[0], state.sets[1], state.sets[2]
    one, two, three = 0, 0, 0
    for j in range(INPUTS):
        one += inputs[j] * weights[0, first, j]
        two += inputs[j] * weights[1, second, j]
        three += inputs[j] * weights[2, third, j]
    one, two, three = one >> 16, two >> 16, three >> 16
    mixed = ((one + two + three) * 21845) >> 16
    at = min(max(mixed, -2047), 2047) + 2048
    knot, part = at >> _KNOT_BITS, at & 127
    low, high = state.refined[refined_set, knot], state.refined[refined_set, knot + 1]
    probability = (squash(mixed) + ((low * (128 - part) + high * part) >> _KNOT_BITS)) >> 1
    probability = min(max(probability, _LEAST), (1 << PROBABILITY_BITS) - _LEAST)
    bit = _code(state.coder, state.data, bit, probability, decoding)

    state.coder[4] += 1
    rate = _WEIGHT_RATES[min(state.coder[4] >> 8, 255)]
    target = bit << PROBABILITY_BITS
    one, two, three = target - squash(one), target - squash(two), target - squash(three)
    _learn_weights(weights[0, first], inputs, one * rate)
    _learn_weights(weights[1, second], inputs, two * rate)
    _learn_weights(weights[2, third], inputs, three * rate)
    _learn_counters(state, bit, probability)
    knot += part >> (_KNOT_BITS - 1)
    state.refined[refined_set, knot] += (target - bit - state.refined[refined_set, knot]) >> 6
    return bit


@compiled
def _learn_weights(weights: Integers, inputs: Integers, step: int) -> None:
    for j in range(INPUTS):
        learned = weights[j] + ((inputs[j] * step + (1 << 21)) >> 22)
        weights[j] = min(max(learned, -_LARGEST_WEIGHT), _LARGEST_WEIGHT)


@compiled
def _learn_counters(state: Bits, bit: int, probability: int) -> None:
    """Move the used counters towards a decision; new ones begin at what was predicted."""
    target = bit * ((1 << _COUNTED_BITS) - 1)
    for j in range(COUNTERS):
        slot = state.slots[j]
        counter = state.counters[j, slot]
        visits = counter & ((1 << _VISIT_BITS) - 1)
        counted = counter >> _VISIT_BITS if visits else probability << 5
        counted += ((target - counted) * RATES[visits]) >> 16
        state.counters[j, slot] = counted << _VISIT_BITS | min(visits + 1, MAX_VISITS)


@compiled
def forget_visits(state: Bits, counters: int, most: int) -> None:
    """Let one kind of counters learn fast again."""
    for slot in range(1 << SLOT_BITS):
        counter = state.counters[counters, slot]
        visits = counter & ((1 << _VISIT_BITS) - 1)
        state.counters[counters, slot] += min(visits, most) - visits


@compiled
def _code(coder: Integers, data: Integers, bit: int, probability: int, decoding: bool) -> int:
    """Code a decision that is 1 with a probability in 2^-16."""
    low, high, position = coder[0], coder[1], coder[3]
    span = high - low
    middle = low + (span >> 16) * probability + (((span & 0xFFFF) * probability) >> 16)
    if decoding:
        bit = 1 if coder[2] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) < 1 << 24:
        if decoding:
            following = data[position] if position < data.size else 0
            coder[2] = (coder[2] << 8) & _WORD | following
        else:
            data[position - 4] = high >> 24
        position += 1
        low, high = (low << 8) & _WORD, (high << 8) & _WORD | 255
    coder[0], coder[1], coder[3] = low, high, position
    return bit


def last_bytes(state: Bits) -> bytes:
    """Return the fewest bytes that, with zeros behind them, lie in the last interval."""
    low, high = int(state.coder[0]), int(state.coder[1])
    for length in range(4):
        free = 32 - 8 * length
        value = -(-low >> free) << free
        if value <= high:
            return value.to_bytes(4, "big")[:length] if length else b""
    return low.to_bytes(4, "big")


def bytes_done(state: Bits) -> int:
    """Return the bytes in front of `last_bytes`."""
    return int(state.coder[3]) - 4
