"""Padding of what slides windows over an input, after `auto_pad` and asymmetric pads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import UnsupportedNodeError
from onnxcomp.model import Node

Pads = tuple[tuple[int, int], ...]
"""Begin and end of every spatial axis."""


@dataclass(frozen=True)
class Window:
    """A window's attributes, for as many spatial axes as the input turns out to have."""

    kernel: tuple[int, ...] | None
    strides: tuple[int, ...] | None
    dilations: tuple[int, ...] | None
    pads: tuple[int, ...] | None
    auto_pad: str
    ceil: bool

    @classmethod
    def of(cls, node: Node) -> Window:
        """Read the attributes of a node.

        Raises:
            UnsupportedNodeError: Of an unknown way of padding.
        """
        attrs = node.attrs
        auto_pad = attrs.get("auto_pad", "NOTSET")
        if auto_pad not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise UnsupportedNodeError(f"auto_pad '{auto_pad}' is unknown")
        return cls(
            attrs.get("kernel_shape"),
            attrs.get("strides"),
            attrs.get("dilations"),
            attrs.get("pads"),
            auto_pad,
            bool(attrs.get("ceil_mode", 0)),
        )

    def steps(self, rank: int) -> tuple[int, ...]:
        """Return the stride of every spatial axis."""
        return self.strides or (1,) * rank

    def spreads(self, rank: int) -> tuple[int, ...]:
        """Return the dilation of every spatial axis."""
        return self.dilations or (1,) * rank

    def padding(self, extent: Sequence[int], kernel: Sequence[int]) -> Pads:
        """Return the padding of an input of this extent, without rounding up."""
        rank = len(extent)
        if self.auto_pad in ("NOTSET", "VALID"):
            flat = (self.auto_pad == "NOTSET" and self.pads) or (0,) * (2 * rank)
            return tuple(zip(flat[:rank], flat[rank:], strict=True))
        found = []
        for size, step, length in zip(
            extent, self.steps(rank), self._lengths(kernel), strict=True
        ):
            total = max((-(-size // step) - 1) * step + length - size, 0)
            half = total // 2
            upper = self.auto_pad == "SAME_UPPER"
            found.append((half, total - half) if upper else (total - half, half))
        return tuple(found)

    def rounded(self, extent: Sequence[int], kernel: Sequence[int], pads: Pads) -> Pads:
        """Return the padding with what the last windows reach beyond it under `ceil_mode`.

        A window that would begin in the padding behind the input is dropped, as in
        onnxruntime and torch.
        """
        if not self.ceil or self.auto_pad != "NOTSET":
            return pads
        rank, found = len(extent), []
        for size, (before, after), step, length in zip(
            extent, pads, self.steps(rank), self._lengths(kernel), strict=True
        ):
            last = -(-(size + before + after - length) // step)
            if last * step >= size + before:
                last -= 1
            end = last * step + length - size - before
            found.append((before, max(end, after)))
        return tuple(found)

    def _lengths(self, kernel: Sequence[int]) -> list[int]:
        spreads = self.spreads(len(kernel))
        return [(k - 1) * d + 1 for k, d in zip(kernel, spreads, strict=True)]


def symmetric(pads: Pads) -> bool:
    """Whether every axis is padded alike on both sides."""
    return all(before == after for before, after in pads)


def pad(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """Pad the spatial axes by a constant; negative padding cuts."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x
