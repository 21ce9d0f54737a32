"""Convolutions and products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import Handler, Kernel, handler, plain
from onnxcomp.bridge.ops.windows import Pads, Window, pad, symmetric
from onnxcomp.model import Node

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


_FEW = 4  # positions for each channel, below which channels last is slower


def _layout(x: Tensor, kernel: Sequence[int], steps: Sequence[int]) -> torch.memory_format:
    """Return the layout in which CPUs train fastest.

    Channels last is up to 1.6 times as fast, but half as fast where many channels have few
    positions.  Pointwise kernels that skip positions keep the other: oneDNN crashes on some
    with channels last (gradients of 8 to 16 channels at 60 x 60, stride 2).
    """
    skipping = max(steps) > 1 and max(kernel) == 1
    few = x.numel() < _FEW * x.shape[1] ** 2
    return torch.contiguous_format if skipping or few else torch.channels_last


def _conv(node: Node, opset: int) -> Kernel:
    window, groups = Window.of(node), node.attrs.get("group", 1)

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.dim() - 2
        pads = window.padding(x.shape[2:], weight.shape[2:])
        if not symmetric(pads):
            x, pads = pad(x, pads), ((0, 0),) * rank
        before = [begin for begin, _ in pads]
        steps, spreads = window.steps(rank), window.spreads(rank)
        if rank == 2 and not x.is_cuda:
            x = x.contiguous(memory_format=_layout(x, weight.shape[2:], steps))
        return _CONV[rank](x, weight, bias, steps, before, spreads, groups)

    return conv


def _conv_transpose(node: Node, opset: int) -> Kernel:
    window, groups = Window.of(node), node.attrs.get("group", 1)
    extra, shape = node.attrs.get("output_padding"), node.attrs.get("output_shape")

    def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.dim() - 2
        steps, spreads = window.steps(rank), window.spreads(rank)
        more = tuple(extra or (0,) * rank)
        whole = [  # the extent without padding
            (size - 1) * s + (k - 1) * d + 1
            for size, s, k, d in zip(
                x.shape[2:], steps, weight.shape[2:], spreads, strict=True
            )
        ]
        pads = _transposed_pads(window, x.shape[2:], whole, more, shape)
        small = all(m < max(s, d) for m, s, d in zip(more, steps, spreads, strict=True))
        if symmetric(pads) and small and all(begin >= 0 for begin, _ in pads):
            before = [begin for begin, _ in pads]
            return _TRANSPOSED[rank](x, weight, bias, steps, before, more, groups, spreads)
        full = _TRANSPOSED[rank](x, weight, None, steps, 0, 0, groups, spreads)
        cut = tuple((-b, m - e) for (b, e), m in zip(pads, more, strict=True))
        full = pad(full, cut)
        return full if bias is None else full + bias.reshape(-1, *[1] * rank)

    return conv_transpose


def _transposed_pads(
    window: Window,
    extent: Sequence[int],
    whole: Sequence[int],
    more: Sequence[int],
    shape: Sequence[int] | None,
) -> Pads:
    """Return what is cut from both sides of a transposed convolution's whole output."""
    rank = len(extent)
    if window.auto_pad == "NOTSET" and shape is None:
        return window.padding(extent, (1,) * rank)
    if shape is None:
        if window.auto_pad == "VALID":
            return ((0, 0),) * rank
        shape = [size * step for size, step in zip(extent, window.steps(rank), strict=True)]
    pads = []
    for size, m, wanted in zip(whole, more, shape[-rank:], strict=True):
        total = size + m - wanted
        half = total // 2
        upper = window.auto_pad == "SAME_UPPER"
        pads.append((half, total - half) if upper else (total - half, half))
    return tuple(pads)


def _gemm(node: Node, opset: int) -> Kernel:
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    left, right = bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if left else a, b.t() if right else b
        if c is None:
            return a @ b if alpha == 1 else alpha * (a @ b)
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return gemm


def _einsum(node: Node, opset: int) -> Kernel:
    equation = node.attrs["equation"].replace(" ", "")
    product: Callable[..., Tensor] = torch.einsum
    return lambda *inputs: product(equation, *inputs)


HANDLERS: Mapping[str, Handler] = {
    "Conv": handler(_conv),
    "ConvTranspose": handler(_conv_transpose),
    "Einsum": handler(_einsum),
    "Gemm": handler(_gemm),
    "MatMul": plain(torch.matmul),
}
