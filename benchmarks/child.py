"""The other end of `common.run_child`: calls one function and reports its time and memory.

The kernel's `ru_maxrss` starts at what the parent had when it forked; VmHWM starts at zero.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

_PERIOD_S = 0.005
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): VmHWM becomes the present size


class MemoryWatch:
    """Peaks of the memory of this process, and of those that it starts, within a block.

    Attributes:
        resident: Largest resident memory, in bytes, mapped pages of files included; since the
            process began where the kernel does not let it be reset.
        anonymous: The same without pages of files, as sampled every few milliseconds.
        children: Largest resident memory of a process that was started, sampled too.
    """

    def __init__(self) -> None:
        self.resident = 0
        self.anonymous = 0
        self.children = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        if _STATUS.exists():
            with suppress(OSError):
                _CLEAR.write_text(_RESET_PEAK)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.resident = peak_rss()

    def _watch(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self.anonymous = max(self.anonymous, read_status(_STATUS, "RssAnon"))
            for child in _child_processes():
                status = Path(f"/proc/{child}/status")
                self.children = max(self.children, read_status(status, "VmHWM"))


def read_status(path: Path, key: str) -> int:
    """Return a field of a process's status file in bytes; 0 where it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def _child_processes() -> set[int]:
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(int(number) for number in path.read_text().split())
        except OSError:
            continue
    return found


def peak_rss() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return read_status(_STATUS, "VmHWM") or largest * unit


def main(target: str, answer: Path) -> None:
    """Call `target` with the keywords on stdin and write what it returned to `answer`."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    arguments = json.load(sys.stdin)
    with MemoryWatch() as memory:
        start = time.monotonic()
        value = function(**arguments)
        seconds = time.monotonic() - start
    found = {
        "value": value,
        "seconds": seconds,
        "peak_rss": memory.resident,
        "peak_anonymous": memory.anonymous,
        "peak_children": memory.children,
    }
    answer.write_text(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # closing large sessions is not measured
