"""What training must not change in weights that were pruned or share their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ZEROS = 0.01  # share of exact zeros above which a weight was pruned
_MOST_VALUES = 256  # of a codebook
_LEAST_READERS = 2  # elements per value of a codebook, in the mean; nearly 1 where dense


@dataclass(frozen=True)
class _Codebook:
    """A tensor of few values: which of them each element has, how often, and where first."""

    group: Tensor
    population: Tensor
    first: Tensor


class Structure:
    """The zeros and codebooks of some weights, found in the values they have now.

    Exact zeros of a kernel or matrix stay where they are more than 1 % of it.  Where it has
    2 to 256 values besides zero, each for 2 elements or more in the mean, each is trained as
    one number: elements that are equal stay equal.  Of vectors only a lone zero stays, which
    a codebook that indices read has for what was pruned; the zeros of biases are many, and
    none of them was pruned.

    Args:
        weights: The weights, on the device where they are trained.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._kept: dict[int, Tensor] = {}
        self._codebooks: dict[int, _Codebook] = {}
        for index, weight in enumerate(weights):
            value = weight.detach()
            zero = value == 0
            if value.dim() < 2:
                if torch.count_nonzero(zero) == 1 < value.numel():
                    self._kept[index] = ~zero
                continue
            codebook = _codebook(value)
            if codebook is not None:
                self._codebooks[index] = codebook
            if codebook is not None or zero.float().mean() > _ZEROS:
                self._kept[index] = ~zero

    def restrict(self, weights: Sequence[nn.Parameter]) -> None:
        """Give zeros no gradient, and equal elements the mean of theirs."""
        for index, kept in self._kept.items():
            gradient = weights[index].grad
            if gradient is None:
                continue
            if index in self._codebooks:
                book = self._codebooks[index]
                sums = torch.zeros_like(book.population)
                sums.index_add_(0, book.group, gradient.flatten())
                gradient.copy_((sums / book.population)[book.group].view_as(gradient))
            gradient.mul_(kept)

    def settle(self, values: Sequence[Tensor]) -> None:
        """Make equal elements equal again to the last bit, which vector units miss."""
        for index, book in self._codebooks.items():
            flat = values[index].flatten()
            values[index].copy_(flat[book.first][book.group].view_as(values[index]))


def _codebook(value: Tensor) -> _Codebook | None:
    """Return the codebook of a tensor; None where it has too many values, or only one."""
    values, group, population = torch.unique(value, return_inverse=True, return_counts=True)
    readers = population[values != 0]
    few = 2 <= len(readers) <= _MOST_VALUES
    if not few or readers.sum() < _LEAST_READERS * len(readers):
        return None
    group = group.flatten()
    place = torch.arange(group.numel(), device=group.device)
    first = torch.full((len(values),), group.numel(), device=group.device)
    first.scatter_reduce_(0, group, place, "amin")
    return _Codebook(group, population.to(value.dtype), first)
