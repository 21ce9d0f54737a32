"""Few measurements of something that grows with a quantity that is known exactly."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_FLOOR = 1e-3  # of the largest measurement; what is less is noise


def interpolated(
    errors: Mapping[T, float], loss: Callable[[T], float], *, count: int
) -> dict[T, float]:
    """Measure the loss of a few options and interpolate log loss over log error.

    Args:
        errors: Closed-form error of every option.
        loss: Measures one option; infinite where it cannot be had.
        count: Options to measure, evenly spaced by their error.

    Returns:
        A loss for every option: as measured, and between those never falling as the error
        grows.  Options of larger error than every one of finite loss are left out.
    """
    ranked = sorted(errors, key=lambda o: errors[o])
    picks = np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))
    measured = {ranked[i]: loss(ranked[i]) for i in picks}
    measured = {option: lost for option, lost in measured.items() if np.isfinite(lost)}
    if not measured:
        return {}
    tiny = max(_FLOOR * max(measured.values()), 1e-30)
    x = np.log([max(errors[option], 1e-30) for option in measured])
    y = np.maximum.accumulate(np.log([max(lost, tiny) for lost in measured.values()]))
    top = max(errors[option] for option in measured)
    ranked = [option for option in ranked if errors[option] <= top]
    at = np.log([max(errors[option], 1e-30) for option in ranked])
    return dict(zip(ranked, np.exp(np.interp(at, x, y)).tolist(), strict=True)) | {
        option: max(lost, tiny) for option, lost in measured.items()
    }
