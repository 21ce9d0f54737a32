"""Progress on stderr with the time that is left: a bar on a terminal, lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from onnxcomp.report.text import clean

_LINE_SECONDS = 10.0  # between two lines of one phase
_LEAST_SHARE, _LEAST_SECONDS = 0.03, 2.0  # below them an estimate is a guess
_BAR_WIDTH = 24
Clock = Callable[[], float]


class Pace:
    """Estimates how long a phase still takes, from the shares that it reported.

    The rate is that of the last half of the time since the phase began: steps differ, and
    what an earlier run left to be read again takes no time.  A step that takes longer than
    the one before makes the estimate grow while it lasts.

    Args:
        clock: Returns seconds; it never goes back.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = Lock()  # the bar is drawn by a thread of its own
        self._start = 0.0
        self._marks: list[tuple[float, float]] = []

    def update(self, share: float) -> None:
        """Note the share of the phase that is done; 0, or a smaller one, begins another."""
        with self._lock:
            now = self._clock()
            if share == 0.0 or not self._marks or share < self._marks[-1][1]:
                self._start, self._marks = now, [(now, share)]
            elif share > self._marks[-1][1]:
                self._marks.append((now, share))
                half = (self._start + now) / 2
                while len(self._marks) > 2 and self._marks[1][0] <= half:
                    del self._marks[0]

    def left(self) -> float | None:
        """Return seconds, at least 0; None where it is too early to say."""
        with self._lock:
            if len(self._marks) < 2:
                return None
            now, (last, share) = self._clock(), self._marks[-1]
            known = share >= _LEAST_SHARE and last > self._start
            if not known or now - self._start < _LEAST_SECONDS:
                return None
            expected = self._after(last, share) - (now - last)
            step = min(share - self._marks[-2][1], (1.0 - share) / 2)
            at_least = self._after(now, share + step) if step > 0 else 0.0
            return max(expected, at_least, 0.0)

    def _after(self, now: float, share: float) -> float:
        """Return the seconds that the rest would take if `share` were done now."""
        half = (self._start + now) / 2
        times, shares = zip(*self._marks, (now, share), strict=True)
        gained = share - float(np.interp(half, times, shares))
        return (1.0 - share) * (now - half) / gained


class ProgressView:
    """Shows how far a run is while it lasts; `update` is what the search calls.

    Args:
        console: Where to write; a bar is drawn where it is a terminal.
        quiet: Show nothing.
        time_limit_s: Seconds from now until the time limit; None = there is none.
        clock: Returns seconds; it never goes back.
    """

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        time_limit_s: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._console = console
        self._quiet = quiet
        self._drawn = console.is_terminal and not quiet
        self._clock = clock
        self._end = None if time_limit_s is None else clock() + time_limit_s
        self._pace = Pace(clock)
        self._bar = Progress(
            BarColumn(_BAR_WIDTH),
            TimeElapsedColumn(),
            _Left(self._left),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            transient=True,
            expand=True,
            get_time=clock,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._last = 0.0

    def __enter__(self) -> Self:
        if self._drawn:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._drawn:
            self._bar.stop()

    def update(self, label: str, share: float) -> None:
        """Show that a run has come so far.

        Args:
            label: Phase, or the node that is worked on in it.
            share: Share of the phase that is done, in [0, 1]; 0 where a phase begins.
        """
        if self._quiet:
            return
        label = clean(label)
        self._pace.update(share)
        if self._drawn:
            self._bar.update(self._task, description=label, completed=share)
            return
        now = self._clock()
        begins = share == 0.0
        if not begins and now - self._last < _LINE_SECONDS:
            return
        left = self._left()
        line = label if begins else f"{share:4.0%} {label}"
        self._console.print(f"{line} ({left})" if left else line)
        self._last = now

    def _left(self) -> str:
        """Return the time that the phase takes, and that until the limit, in words."""
        phase = self._pace.left()
        parts = [] if phase is None else [f"{_duration(phase)} left of this phase"]
        if self._end is not None:
            limit = self._end - self._clock()
            parts.append(f"limit in {_duration(limit)}" if limit > 0 else "limit reached")
        return ", ".join(parts)


class _Left(ProgressColumn):
    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(self._words(), style="progress.remaining")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
