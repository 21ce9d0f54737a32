"""Reductions, and what ranks, counts or sums along an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from onnxcomp.bridge.ops.base import (
    Handler,
    Kernel,
    axes_kernel,
    axis_of,
    handler,
    number,
)
from onnxcomp.model import Node

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _reduce(function: Reduction) -> Handler:
    """Return the handler of a reduction; axes are an attribute or, later, an input."""

    def make(node: Node, opset: int) -> Kernel:
        keep = bool(node.attrs.get("keepdims", 1))
        idle = bool(node.attrs.get("noop_with_empty_axes", 0))

        def reduce(x: Tensor, axes: Sequence[int] | None) -> Tensor:
            if not axes and idle:
                return x
            chosen = list(axes) if axes else list(range(x.dim()))
            return function(x, chosen, keep).to(x.dtype)

        return axes_kernel(node, 1, reduce)

    return handler(make, 1)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis_of(axis, x.dim()) for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _norm(p: int) -> Reduction:
    return lambda x, axes, keep: torch.linalg.vector_norm(x, p, axes, keepdim=keep)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep)


def _extreme(largest: bool) -> Handler:
    def make(node: Node, opset: int) -> Kernel:
        axis, keep = node.attrs.get("axis", 0), bool(node.attrs.get("keepdims", 1))
        last = bool(node.attrs.get("select_last_index", 0))
        function = torch.argmax if largest else torch.argmin

        def extreme(x: Tensor) -> Tensor:
            found: Tensor = function(x.flip(axis) if last else x, axis, keep)
            return x.shape[axis] - 1 - found if last else found

        return extreme

    return handler(make)


def _top_k(node: Node, opset: int) -> Kernel:
    axis, fixed = node.attrs.get("axis", -1), node.attrs.get("k", 0)
    largest, ordered = bool(node.attrs.get("largest", 1)), bool(node.attrs.get("sorted", 1))

    def top_k(x: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = torch.topk(
            x, fixed if count is None else number(count), axis, largest, ordered
        )
        return found.values, found.indices

    return top_k


def _cum_sum(node: Node, opset: int) -> Kernel:
    exclusive = bool(node.attrs.get("exclusive", 0))
    backwards = bool(node.attrs.get("reverse", 0))

    def cum_sum(x: Tensor, axis: Tensor) -> Tensor:
        dim = int(number(axis))
        y = x.flip(dim) if backwards else x
        sums = y.cumsum(dim).to(x.dtype)
        sums = sums - y if exclusive else sums
        return sums.flip(dim) if backwards else sums

    return cum_sum


HANDLERS: Mapping[str, Handler] = {
    "ArgMax": _extreme(largest=True),
    "ArgMin": _extreme(largest=False),
    "CumSum": handler(_cum_sum, 1),
    "ReduceL1": _reduce(_norm(1)),
    "ReduceL2": _reduce(_norm(2)),
    "ReduceLogSum": _reduce(lambda x, axes, keep: _sum(x, axes, keep).log()),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(_sum),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: _sum(x.square(), axes, keep)),
    "TopK": handler(_top_k, 1),
}
