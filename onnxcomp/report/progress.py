"""Progress on stderr: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from onnxcomp.report.text import clean

_LINE_SECONDS = 10.0  # between two lines of one phase


class ProgressView:
    """Shows how far a run is while it lasts; `update` is what the search calls.

    Args:
        console: Where to write; a bar is drawn where it is a terminal.
        quiet: Show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._drawn = console.is_terminal and not quiet
        self._bar = Progress(
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
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
        if self._drawn:
            self._bar.update(self._task, description=label, completed=share)
            return
        now = time.monotonic()
        if share == 0.0:
            self._console.print(label)
        elif now - self._last >= _LINE_SECONDS:
            self._console.print(f"{share:4.0%} {label}")
        else:
            return
        self._last = now
