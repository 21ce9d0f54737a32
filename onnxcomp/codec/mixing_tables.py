"""Integer functions of the context-mixing coder: logarithms, the logistic curve, rates.

Tables are rounded once from formulas whose values stay so far from the middle between two
integers that every mathematical library gives the same table; a test measures that distance.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.jit import inner_loop

Int32 = npt.NDArray[np.int32]
Float64 = npt.NDArray[np.float64]

compiled = partial(inner_loop, cache=False, allocates=False)

UNIT = 256
"""One in the logistic domain and one octave in logarithms."""
REACH = 16 * UNIT
"""The logistic curve is tabulated up to this distance from zero."""
CURVE_BITS = 30
_LOGARITHMS = 2048
PROBABILITY_BITS = 16
CERTAIN = 16
"""Probabilities that are mixed stay this far, in 2^-16, from 0 and 1."""
MAX_VISITS = 250


def logistic_curve() -> Float64:
    """Return 2^30 / (1 + exp(-x / 256)) for x = -4096 ... 4096."""
    x = np.arange(-REACH, REACH + 1) / UNIT
    curve: Float64 = 2.0**CURVE_BITS / (1 + np.exp(-x))
    return curve


def octaves() -> Float64:
    """Return 256 log2(i) for i = 1 ... 2047, with 0 in front."""
    values: Float64 = UNIT * np.log2(np.maximum(np.arange(_LOGARITHMS), 1))
    return values


def powers() -> Float64:
    """Return 2^(12 + i / 256) for i = 0 ... 255."""
    values: Float64 = 2.0**12 * np.exp2(np.arange(UNIT) / UNIT)
    return values


def _rounded(values: Float64) -> Int32:
    return np.rint(values).astype(np.int32)


def _inverse_curve() -> Int32:
    middles = (2 * np.arange(4096, dtype=np.int64) + 1) << (CURVE_BITS - 13)
    return (np.searchsorted(_CURVE, middles) - REACH).astype(np.int32)


_CURVE = _rounded(logistic_curve())
_LOG2 = _rounded(octaves())
_EXP2 = _rounded(powers())
_STRETCH = _inverse_curve()
_COUNT = np.arange(MAX_VISITS + 8, dtype=np.int64)
RATES = (65536 // (_COUNT + 2)).astype(np.int32)
"""Steps of a running mean after n values, in 2^-16."""
TRUST = (2 * UNIT * _COUNT // (2 * _COUNT + 3)).astype(np.int32)
"""How far a counter is believed after n visits, n / (n + 1.5), in 2^-8."""


@compiled
def curve(x: int) -> int:
    """Return the logistic function of x / 256 in 2^-30."""
    return int(_CURVE[min(max(x, -REACH), REACH) + REACH])


@compiled
def squash(x: int) -> int:
    """Return the probability, in 2^-16, whose log odds are x / 256."""
    return min(max(curve(x) >> 14, CERTAIN), (1 << PROBABILITY_BITS) - CERTAIN)


@compiled
def stretch(probability: int) -> int:
    """Return the log odds, in 1 / 256, of a probability in 2^-16."""
    return int(_STRETCH[probability >> 4])


@compiled
def log2(x: int) -> int:
    """Return 256 times the binary logarithm of an integer of at least 1."""
    shift = 0
    while x >= _LOGARITHMS:
        x >>= 4
        shift += 4 * UNIT
    return int(_LOG2[x]) + shift


@compiled
def exp2(x: int) -> int:
    """Return 2^(x / 256), rounded down, for 0 <= x < 32 * 256."""
    return (int(_EXP2[x & (UNIT - 1)]) << (x >> 8)) >> 12
