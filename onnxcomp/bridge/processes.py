"""Several processes that train together, as `torchrun` starts them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is; alone, every sum is what it was.

    Each takes its share of every batch.  Gradients of a mean over the whole batch are summed,
    so that all processes take the step that one process with the whole batch takes.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of all.
        interrupts: Signals of Ctrl-C that wait for the next `check`.
    """

    rank: int = 0
    count: int = 1
    interrupts: list[int] = field(default_factory=list, kw_only=True)

    def check(self) -> None:
        """Raise KeyboardInterrupt in all processes at once if Ctrl-C came to one of them."""
        if self.total(len(self.interrupts)):
            raise KeyboardInterrupt

    def share(self, size: int) -> range:
        """Return the positions of a batch that are this process's."""
        return range(self.rank, size, self.count)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.count == 1 or not tensors:
            return
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(joined)
        start = 0
        for tensor in tensors:
            tensor.copy_(joined[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        if self.count == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(found)
        return float(found)

    def from_first(self, value: Any) -> Any:
        """Return what the first process has."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Processes()


def leads() -> bool:
    """Say whether this process writes: it is alone, or the first that `torchrun` started."""
    return not _started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # clusters set the others for their own ends


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that `torchrun` started, on the CPU; one is alone without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if not _started_by_torchrun() or count == 1:
        yield ALONE
        return
    distributed.init_process_group("gloo")
    processes = Processes(distributed.get_rank(), count)
    try:
        with _deferred(processes.interrupts):
            yield processes
    finally:
        distributed.destroy_process_group()


@contextmanager
def _deferred(interrupts: list[int]) -> Iterator[None]:
    """Let Ctrl-C wait: a process that ends between two sums leaves the others in the next."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
