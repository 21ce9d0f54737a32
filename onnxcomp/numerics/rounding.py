"""Weights of one linear map rounded to a uniform grid, with compensation of each error.

Each level may have a price: of the nearest level, the next towards zero and zero, the one of
least ``R_kk^2 (t_k - q)^2 + lambda bits(q)`` is taken (notation of `compensation`), so that
weights of little effect become zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError
from onnxcomp.numerics.compensation import Compensation
from onnxcomp.numerics.moments import Moments, RowMoments

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int32]

_LEVEL_BITS = 8  # that a level costs in a table or codebook, about
_STEP_BITS = 8  # significant bits of a step, so that multiples of it are exact in float32


@dataclass(frozen=True)
class Rounded:
    """Weights on a uniform grid.

    Attributes:
        indices: multiples of the step, int32, shape (groups, m, d).
        step: distance of two levels.
        error: ``tr((W - Q) S (W - Q)^T)`` summed over the groups, in the damped metric.
        bits: zero-order entropy of all indices together, and a byte for every level.
    """

    indices: Indices
    step: float
    error: float
    bits: float

    @property
    def dense(self) -> Array:
        """The weights, float64, shape (groups, m, d)."""
        return np.asarray(self.indices * self.step)


class Rounder:
    """Rounds weights of the groups of one linear map in the metric of its inputs.

    Args:
        metrics: moments of each group's inputs, all of the same d.
    """

    def __init__(self, metrics: Sequence[Moments | RowMoments]) -> None:
        self._compensation = Compensation(metrics)

    def round(self, W: Array, step: float, price: float = 0.0) -> Rounded:
        """Round weights column after column.

        Args:
            W: shape (groups, m, d).
            step: distance of two levels; it is used with eight significant bits.
            price: lambda relative to ``step^2`` times the geometric mean of ``R_kk^2``; 0
                takes the nearest levels.

        Raises:
            ParameterError: the step is not positive.
        """
        if not step > 0:
            raise ParameterError.of("Rounder.round", "step", "above 0", step)
        step = short(step)
        scaled = np.asarray(W / step)
        costs = price * self._compensation.scale * _bits(np.rint(scaled))

        def choose(target: Array, pivot: Array) -> Array:
            return _cheapest(target, pivot, costs) if price else np.rint(target)

        levels, error = self._compensation.change(scaled, choose)
        bits = _bits(levels)
        total = float(bits[_folded(levels, len(bits))].sum())
        total += _LEVEL_BITS * len(np.unique(levels))
        return Rounded(levels.astype(np.int32), step, error * step**2, total)


def short(step: float) -> float:
    """Return a step with so few significant bits that its multiples are exact in float32."""
    mantissa, exponent = np.frexp(step)
    return float(np.ldexp(np.rint(mantissa * 2**_STEP_BITS), exponent - _STEP_BITS))


def _cheapest(target: Array, pivot: Array, costs: Array) -> Array:
    """Return the best level of the nearest, the next towards zero and zero."""
    nearest = np.rint(target)
    levels = np.stack([nearest, nearest - np.sign(nearest), np.zeros_like(nearest)])
    total = (pivot * (target - levels)) ** 2 + costs[_folded(levels, len(costs))]
    return np.asarray(np.take_along_axis(levels, np.argmin(total, axis=0)[None], axis=0)[0])


def _folded(levels: Array, count: int) -> NDArray[np.int64]:
    """Return levels 0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..., at most `count` - 1."""
    found = (2 * np.abs(levels) - (levels < 0)).astype(np.int64)
    return np.minimum(found, count - 1)


def _bits(levels: Array) -> Array:
    """Return the bits of every level, folded, by how often it was chosen."""
    top = 2 * int(np.abs(levels).max(initial=0.0)) + 2
    counts = np.bincount(_folded(levels, top).reshape(-1), minlength=3) + 0.5
    return np.asarray(np.log2(counts.sum() / counts))
