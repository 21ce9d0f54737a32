"""Few measurements of something that grows with a quantity that is known exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")
_FLOOR = 1e-3  # of the largest measurement; what is less is noise
_TINY = 1e-30


@dataclass(frozen=True)
class Curve:
    """Measured losses over closed-form errors, straight lines between logarithms.

    Attributes:
        errors: ascending, shape (n,).
        losses: of the same shape; n may be 0.
    """

    errors: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def top(self) -> float:
        """The largest error that was measured, beyond which nothing is known."""
        return float(self.errors[-1]) if len(self.errors) else -np.inf

    def at(self, error: float) -> float:
        """Return the loss at an error, never falling as it grows; infinite beyond the top.

        Below the smallest error measured, the loss falls in proportion to the error.
        """
        if error > self.top:
            return float("inf")
        x = np.log(np.maximum(self.errors, _TINY))
        y = np.maximum.accumulate(np.log(np.maximum(self.losses, _TINY)))
        at = np.log(max(error, _TINY))
        return float(np.exp(np.interp(at, x, y)) * min(1.0, np.exp(at - x[0])))


def log_spaced(values: ArrayLike, count: int) -> NDArray[np.intp]:
    """Return which ascending positive values to keep, evenly spaced by their logarithms.

    Args:
        values: shape (n,).
        count: Most values to keep; all are kept where there are no more.

    Returns:
        Their indices, ascending.
    """
    each = np.asarray(values, np.float64)
    if len(each) <= count:
        return np.arange(len(each))
    wanted = np.geomspace(each[0], each[-1], count)
    return np.unique(np.abs(np.log(each[:, None] / wanted)).argmin(axis=0))


def spread(errors: Mapping[T, float], count: int) -> list[T]:
    """Return a few options to measure, evenly spaced by their closed-form error, ascending."""
    ranked = sorted(errors, key=lambda o: errors[o])
    picks = np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))
    return [ranked[i] for i in picks]


def interpolated(errors: Mapping[T, float], measured: Mapping[T, float]) -> dict[T, float]:
    """Interpolate log loss over log error.

    Args:
        errors: Closed-form error of every option.
        measured: Loss of some, ascending by their error; infinite where it cannot be had.

    Returns:
        A loss for every option: as measured, and between those never falling as the error
        grows.  Options of larger error than every one of finite loss are left out.
    """
    known = {option: lost for option, lost in measured.items() if np.isfinite(lost)}
    tiny = max(_FLOOR * max(known.values(), default=0.0), _TINY)
    known = {option: max(lost, tiny) for option, lost in known.items()}
    curve = Curve(np.array([errors[o] for o in known]), np.array([*known.values()]))
    ranked = sorted(errors, key=lambda o: errors[o])
    return {o: curve.at(errors[o]) for o in ranked if errors[o] <= curve.top} | known
