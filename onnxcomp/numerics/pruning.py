"""Single weights become zero: the smallest ones, or those that the others can replace."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError
from onnxcomp.numerics.compensation import Compensation
from onnxcomp.numerics.moments import Moments, RowMoments

Array: TypeAlias = NDArray[np.float64]

_SWEEPS = 12  # of the search for the threshold
_HIGHER = 16.0  # times a threshold that leaves too many


def kept_above(W: Array, percentiles: Sequence[float]) -> list[int]:
    """Return how many weights are larger in magnitude than percentiles of all (strictly).

    Marino et al. 2021 (arXiv:2108.12704): ties at a threshold are removed.

    Raises:
        ParameterError: a percentile is not within 0..100.
    """
    for percentile in percentiles:
        if not 0 <= percentile <= 100:
            raise ParameterError.of("kept_above", "percentiles", "0 to 100", percentile)
    magnitudes = np.sort(np.abs(W), axis=None)  # once: it is what takes the time
    below = np.searchsorted(magnitudes, np.percentile(magnitudes, percentiles), side="right")
    return [int(magnitudes.size - count) for count in below]


def prune_smallest(W: Array, kept: int) -> Array:
    """Return weights of which only the `kept` largest in magnitude stay, fewer with ties.

    Args:
        W: any shape.
        kept: weights that may stay.
    """
    magnitudes = np.abs(W).reshape(-1)
    if kept >= magnitudes.size:
        return W.copy()
    threshold = np.partition(magnitudes, magnitudes.size - kept - 1)[-kept - 1]
    return np.asarray(np.where(np.abs(W) > threshold, W, 0.0))


def prune_compensated(W: Array, metrics: Sequence[Moments | RowMoments], kept: int) -> Array:
    """Return weights of which `kept` stay, adjusted to what became zero.

    Optimal brain surgeon in the order of `compensation`: a weight goes where the error that
    later columns cannot take over, ``R_kk^2 t_k^2``, is below one threshold, found by
    bisection; those that stay take over what those before them lost.

    Args:
        W: shape (groups, m, d).
        metrics: moments of each group's inputs.
        kept: weights that stay, at most.
    """
    if kept >= W.size:
        return W.copy()
    compensation = Compensation(metrics)

    def above(threshold: float) -> Array:
        def choose(target: Array, pivot: Array) -> Array:
            return np.where((pivot * target) ** 2 > threshold, target, 0.0)

        return compensation.change(W, choose)[0]

    low, high = 0.0, float(np.vdot(W, W)) * compensation.scale + 1e-30
    best = above(high)
    while np.count_nonzero(best) > kept:  # inputs of very unequal variance
        high *= _HIGHER
        best = above(high)
    for _ in range(_SWEEPS):
        middle = float(np.sqrt(low * high)) if low else high / W.size
        found = above(middle)
        if np.count_nonzero(found) > kept:
            low = middle
        else:
            high, best = middle, max(best, found, key=np.count_nonzero)
    return best
