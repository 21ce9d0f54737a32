"""When a run must end, and how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from onnxcomp.errors import ParameterError

Progress = Callable[[str, float], None]
"""Called with a label and the share of the phase that is done."""


class TimeLimitReached(Exception):  # noqa: N818 - an event that a run handles, no mistake
    """The deadline has passed; `Deadline.check` raises it to end what is under way."""


class Deadline:
    """A moment after which no more work is begun.

    Args:
        seconds: From now until then, >= 0; None = never.
        clock: Returns seconds; it never goes back.

    Raises:
        ParameterError: `seconds` is negative or not a number.
    """

    def __init__(
        self, seconds: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds is not None and not seconds >= 0:
            raise ParameterError.of("Deadline", "seconds", ">= 0 or None", seconds)
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, at least 0; infinite where there is no end."""
        return max(self._end - self._clock(), 0.0)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.left == 0.0

    def check(self) -> None:
        """Raise `TimeLimitReached` if it is over."""
        if self.passed:
            raise TimeLimitReached("the time limit was reached")

    def share(self, fraction: float) -> Deadline:
        """Return an earlier deadline, after a fraction in (0, 1] of the time that is left."""
        if not 0 < fraction <= 1:
            raise ParameterError.of("Deadline.share", "fraction", "in (0, 1]", fraction)
        left = self.left
        return Deadline(None if math.isinf(left) else fraction * left, self._clock)
