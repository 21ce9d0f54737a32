"""Several processes that train together, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    """

    rank: int = 0
    count: int = 1

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


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that `torchrun` started, on the CPU; one is alone without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    distributed.init_process_group("gloo")
    try:
        yield Processes(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
