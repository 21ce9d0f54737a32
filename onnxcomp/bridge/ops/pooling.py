"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import Handler, Kernel, handler, only_first_output, plain
from onnxcomp.bridge.ops.windows import Pads, Window, pad, symmetric
from onnxcomp.model import Node

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def _max_pool(node: Node, opset: int) -> Kernel:
    only_first_output(node)
    window, kernel = Window.of(node), node.attrs["kernel_shape"]
    rank = len(kernel)

    def max_pool(x: Tensor) -> Tensor:
        extent = x.shape[2:]
        pads = window.rounded(extent, kernel, window.padding(extent, kernel))
        fits = all(2 * before <= k for (before, _), k in zip(pads, kernel, strict=True))
        if not symmetric(pads) or not fits:
            x, pads = pad(x, pads, _lowest(x)), ((0, 0),) * rank
        before = [begin for begin, _ in pads]
        return _MAX[rank](x, kernel, window.steps(rank), before, window.spreads(rank))

    return max_pool


def _lowest(x: Tensor) -> float:
    return -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min


def _average_pool(node: Node, opset: int) -> Kernel:
    window, kernel = Window.of(node), node.attrs["kernel_shape"]
    rank, all_count = len(kernel), bool(node.attrs.get("count_include_pad", 0))

    def average_pool(x: Tensor) -> Tensor:
        extent = x.shape[2:]
        pads = window.padding(extent, kernel)
        wide = window.rounded(extent, kernel, pads)
        half = all(2 * before <= k for (before, _), k in zip(pads, kernel, strict=True))
        plain_ = all(spread == 1 for spread in window.spreads(rank))
        if wide == pads and symmetric(pads) and half and plain_:
            before = [begin for begin, _ in pads]
            steps = window.steps(rank)
            return _AVERAGE[rank](
                x, kernel, steps, before, ceil_mode=False, count_include_pad=all_count
            )
        ones = torch.ones((1, 1, *extent), dtype=x.dtype, device=x.device)
        if all_count:  # what rounding up adds to the padding is never counted
            ones = pad(ones, pads, 1.0)
            beyond = _difference(wide, pads)
        else:
            beyond = wide
        counts = _sums(ones, window, kernel, beyond)
        return _sums(x, window, kernel, wide) / counts

    return average_pool


def _difference(wide: Pads, pads: Pads) -> Pads:
    return tuple((a - c, b - d) for (a, b), (c, d) in zip(wide, pads, strict=True))


def _sums(x: Tensor, window: Window, kernel: Sequence[int], pads: Pads) -> Tensor:
    """Return the sums over windows of x, padded by zeros."""
    rank = len(kernel)
    x = pad(x, pads)
    flat = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    steps, spreads = window.steps(rank), window.spreads(rank)
    sums = _CONV[rank](flat, ones, None, steps, 0, spreads)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _lp_pool(node: Node, opset: int) -> Kernel:
    window, kernel, p = Window.of(node), node.attrs["kernel_shape"], node.attrs.get("p", 2)

    def lp_pool(x: Tensor) -> Tensor:
        extent = x.shape[2:]
        pads = window.rounded(extent, kernel, window.padding(extent, kernel))
        return torch.pow(_sums(x.abs() ** p, window, kernel, pads), 1 / p)

    return lp_pool


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def _global_lp_pool(node: Node, opset: int) -> Kernel:
    p = node.attrs.get("p", 2)
    return lambda x: torch.linalg.vector_norm(x, p, _spatial(x), keepdim=True)


HANDLERS: Mapping[str, Handler] = {
    "AveragePool": handler(_average_pool),
    "GlobalAveragePool": plain(lambda x: x.mean(_spatial(x), keepdim=True)),
    "GlobalLpPool": handler(_global_lp_pool),
    "GlobalMaxPool": plain(lambda x: x.amax(_spatial(x), keepdim=True)),
    "LpPool": handler(_lp_pool),
    "MaxPool": handler(_max_pool),
}
