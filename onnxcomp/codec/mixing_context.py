"""What the context-mixing coder expects of a weight, from the weights before it.

The mean is a linear prediction from neighbours and running means (normalised LMS), the scale a
product of powers of their magnitudes (stochastic gradient of a Laplacian's likelihood). Values
count in units of about 2^-10 of the tensor's mean magnitude.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.mixing_tables import MAX_VISITS, RATES, compiled, exp2, log2

Integers = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

UNIT = 1024
LARGEST = 1 << 22
"""Of a value of the codebook, in those units."""
SLOPE_BITS = 24
_LAGS = 8
_PLACES = 5
_SIGNED = _LAGS + 2 + _PLACES
_SIZES = _PLACES + 6
_KERNELS = 50
_FURTHEST = 8 * UNIT
_HEAVIEST = 16 * UNIT
_LARGEST_WEIGHT = 1 << 20
_LEAST_POWER, _LARGEST_POWER = -(1 << 13), 1 << 16  # few non-zeros would drive them far off
_SMALLEST_SCALE, _LARGEST_SCALE = 2 * 256, 18 * 256


class Predictor(NamedTuple):
    """What one stream has learned about means and scales.

    Attributes:
        mean_weights: (kernel positions, _SIGNED), in 2^-16.
        size_weights: (_SIZES,): powers, in 2^-16.
        signed: (_SIGNED,): neighbours and running means, of which the mean is predicted.
        sizes: (_SIZES,): log2 of magnitudes over the tensor's, of which the scale is.
    """

    mean_weights: Integers
    size_weights: Integers
    signed: Integers
    sizes: Integers


class Tensor(NamedTuple):
    """One tensor while it is coded.

    Attributes:
        inputs: Channels of a filter.
        taps: Positions of a kernel.
        row: Positions in one row of a kernel.
        pivot: Rank of the value nearest to zero.
        values: (n,): the codebook in units, ascending.
        edges: (n + 1,): between neighbouring values, and beyond all of them.
        ranks: (outputs * inputs * taps,): ranks in the codebook, read or written.
        magnitudes: Running means of |value| by row; column; tap; row and tap; column and tap.
        means: The same of the values.
        visits: Of how many.
        kernels: (inputs + 2,): running means of the magnitude of a column's kernels; of the
            kernels before in this row; of the tensor.
    """

    inputs: int
    taps: int
    row: int
    pivot: int
    values: Integers
    edges: Integers
    ranks: Integers
    magnitudes: Integers
    means: Integers
    visits: Integers
    kernels: Integers


class Context(NamedTuple):
    """What is known of a weight before it is coded: predictions, and small classes.

    Attributes:
        mean: Predicted value.
        slope: 2^24 over the predicted magnitude of value - mean.
        plain_slope: The same for the mean of `Predictor.sizes`, which nothing is learned for.
        offset: mean / scale, -7 ... 7.
        left: Value of the tap before, -3 ... 3.
        above: Of the tap in the row above, -3 ... 3.
        corner: Size of the tap left of that, 0 ... 2.
        channel: Value of the same tap in the channel before, -2 ... 2.
        filter: Of the same tap in the filter before, -2 ... 2.
        rough: Magnitudes of kernel so far, row and column, 0 ... 499.
        scale: Class of the scale, 0 ... 11.
        tap: Position in the kernel, 0 ... 15.
    """

    mean: int
    slope: int
    plain_slope: int
    offset: int
    left: int
    above: int
    corner: int
    channel: int
    filter: int
    rough: int
    scale: int
    tap: int


def new_predictor(dtype: type[np.signedinteger[Any]]) -> Predictor:
    """Return the state before the first tensor of a stream."""
    return Predictor(
        np.zeros((_KERNELS, _SIGNED), dtype),
        np.full(_SIZES, (1 << 16) // _SIZES, dtype),
        np.zeros(_SIGNED, dtype),
        np.zeros(_SIZES, dtype),
    )


def new_tensor(
    shape: tuple[int, int, int],
    row: int,
    values: Float64,
    ranks: Integers,
    dtype: type[np.signedinteger[Any]],
) -> Tensor:
    """Return a tensor (outputs, inputs, taps) before its first weight."""
    _, inputs, taps = shape
    units = np.rint(np.clip(values, -LARGEST, LARGEST)).astype(np.int64)
    between = (units[1:] + units[:-1]) >> 1
    edges = np.concatenate([[-4 * LARGEST], between, [4 * LARGEST]])
    places = 1 + inputs + 2 * taps + inputs * taps
    return Tensor(
        inputs,
        taps,
        row,
        int(np.abs(units).argmin()),
        units.astype(dtype),
        edges.astype(dtype),
        ranks,
        np.full(places, UNIT, dtype),
        np.zeros(places, dtype),
        np.zeros(places, dtype),
        np.full(inputs + 2, UNIT, dtype),
    )


@compiled
def begin_row(tensor: Tensor) -> None:
    """Forget what was about the last row only."""
    columns, taps, whole = 1 + tensor.inputs, tensor.taps, tensor.kernels[-1]
    tensor.kernels[-2] = whole
    tensor.magnitudes[0], tensor.means[0], tensor.visits[0] = whole, 0, 0
    for tap in range(columns + taps, columns + 2 * taps):
        tensor.magnitudes[tap] = tensor.magnitudes[tap - taps]
        tensor.means[tap], tensor.visits[tap] = 0, 0


@compiled
def look_around(
    predictor: Predictor, tensor: Tensor, at: int, channel: int, tap: int, total: int
) -> None:
    """Collect what the mean and the scale of the weight `at` are predicted from."""
    taps, inputs, values, ranks = tensor.taps, tensor.inputs, tensor.values, tensor.ranks
    signed, sizes = predictor.signed, predictor.sizes
    reach = tap if taps > 1 else channel
    for lag in range(_LAGS):
        signed[lag] = values[ranks[at - 1 - lag]] if reach > lag else 0
    signed[_LAGS] = values[ranks[at - taps]] if channel > 0 else 0
    size = taps * inputs
    signed[_LAGS + 1] = values[ranks[at - size]] if at >= size else 0
    whole = tensor.kernels[-1]
    unit = log2(whole + 16)
    for kind in range(_PLACES):
        place = _place(tensor, kind, channel, tap)
        signed[_LAGS + 2 + kind] = tensor.means[place]
        sizes[kind] = log2(tensor.magnitudes[place] + 16) - unit
    left, above, corner = signed[0], _above(predictor, tensor, 0), _above(predictor, tensor, 1)
    near = 2 * abs(left) + 2 * abs(above) + abs(corner)
    sizes[_PLACES] = log2((near + whole) // 3 + 16) - unit
    sizes[_PLACES + 1] = log2((abs(signed[_LAGS]) + whole) // 2 + 16) - unit
    sizes[_PLACES + 2] = log2((abs(signed[_LAGS + 1]) + whole) // 2 + 16) - unit
    sizes[_PLACES + 3] = log2(tensor.kernels[-2] + 16) - unit
    sizes[_PLACES + 4] = log2(tensor.kernels[channel] + 16) - unit
    sizes[_PLACES + 5] = log2((total + whole) // (tap + 1) + 16) - unit
    for j in range(_SIGNED):
        signed[j] = min(max(signed[j], -_FURTHEST), _FURTHEST)


@compiled
def expect(predictor: Predictor, tensor: Tensor, tap: int) -> Context:
    """Predict mean and scale of a weight, and put its neighbours in classes."""
    signed, sizes = predictor.signed, predictor.sizes
    mean_weights = predictor.mean_weights[_kernel_position(tensor, tap)]
    mean, learned, plain = 0, 0, 0
    for j in range(_SIGNED):
        mean += signed[j] * mean_weights[j]
    for j in range(_SIZES):
        learned += sizes[j] * predictor.size_weights[j]
        plain += sizes[j]
    mean = min(max(mean >> 16, -_FURTHEST), _FURTHEST)
    unit = log2(tensor.kernels[-1] + 16)
    log_scale = min(max((learned >> 16) + unit, _SMALLEST_SCALE), _LARGEST_SCALE)
    plain = min(max(plain // _SIZES + unit, _SMALLEST_SCALE), _LARGEST_SCALE)
    slope = exp2(SLOPE_BITS * 256 - log_scale)
    return Context(
        mean,
        slope,
        exp2(SLOPE_BITS * 256 - plain),
        min(max((4 * mean * slope) >> SLOPE_BITS, -7), 7),
        _class(signed[0]),
        _class(_above(predictor, tensor, 0)),
        min(abs(_class(_above(predictor, tensor, 1))), 2),
        min(max(_class(signed[_LAGS]), -2), 2),
        min(max(_class(signed[_LAGS + 1]), -2), 2),
        (_size_class(sizes[_PLACES + 5]) * 10 + _size_class(sizes[0])) * 5
        + _size_class(sizes[1]) // 2,
        min(max((log_scale - 6 * 256) >> 8, 0), 11),
        min(tap, 15),
    )


@compiled
def learn(
    predictor: Predictor, tensor: Tensor, context: Context, tap: int, value: int
) -> None:
    """Move what predicts mean and scale towards a weight that is known now."""
    weights, signed = predictor.mean_weights[_kernel_position(tensor, tap)], predictor.signed
    power = 1 << 20
    for j in range(_SIGNED):
        power += signed[j] * signed[j]
    error = min(max(value, -_FURTHEST), _FURTHEST) - context.mean
    step = (error << 16) // power
    for j in range(_SIGNED):
        learned = weights[j] + ((step * signed[j]) >> 5)
        weights[j] = min(max(learned, -_LARGEST_WEIGHT), _LARGEST_WEIGHT)
    step = (abs(value - context.mean) * context.slope) >> (SLOPE_BITS - 8)
    step = min(step, 10 * 256) - 256
    for j in range(_SIZES):
        learned = predictor.size_weights[j] + ((step * predictor.sizes[j]) >> 10)
        predictor.size_weights[j] = min(max(learned, _LEAST_POWER), _LARGEST_POWER)


@compiled
def remember(tensor: Tensor, channel: int, tap: int, value: int) -> int:
    """Move all running means towards a weight; return its magnitude."""
    size = min(abs(value), _HEAVIEST)
    bounded = min(max(value, -_FURTHEST), _FURTHEST)
    for kind in range(_PLACES):
        place = _place(tensor, kind, channel, tap)
        visits = tensor.visits[place]
        rate = RATES[min(visits + 2, 198)]
        tensor.magnitudes[place] += ((size - tensor.magnitudes[place]) * rate) >> 16
        tensor.means[place] += ((bounded - tensor.means[place]) * rate) >> 16
        tensor.visits[place] = min(visits + 1, MAX_VISITS)
    tensor.kernels[-1] += ((size - tensor.kernels[-1]) * RATES[MAX_VISITS]) >> 16
    return size


@compiled
def _place(tensor: Tensor, kind: int, channel: int, tap: int) -> int:
    """Return where running means of a kind are; see `Tensor.magnitudes`."""
    columns, taps = 1 + tensor.inputs, tensor.taps
    if kind == 0:
        return 0
    if kind == 1:
        return 1 + channel
    if kind == 2:
        return columns + tap
    if kind == 3:
        return columns + taps + tap
    return columns + 2 * taps + channel * taps + tap


@compiled
def _kernel_position(tensor: Tensor, tap: int) -> int:
    """Return which weights predict the mean: those of matrices, or of a tap."""
    return 0 if tensor.taps == 1 else 1 + tap % (_KERNELS - 1)


@compiled
def _above(predictor: Predictor, tensor: Tensor, further: int) -> int:
    """Return the value one row before in the kernel, or `further` to the left of it."""
    if tensor.taps == 1:
        return predictor.signed[_LAGS + 1] if further == 0 else 0
    lag = tensor.row - 1 + further
    return predictor.signed[lag] if 0 < lag < _LAGS else 0


@compiled
def _class(value: int) -> int:
    """Return the class of a value, -3 ... 3."""
    size = abs(value)
    found = int(size > 0) + int(size > 700) + int(size > 1800)
    return found if value > 0 else -found


@compiled
def _size_class(size: int) -> int:
    """Return the class of a log2 of magnitudes, 0 ... 9, in halves of an octave."""
    return min(max((size + 640) >> 7, 0), 9)
