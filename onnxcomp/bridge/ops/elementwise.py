"""Elementwise operators, comparisons and casts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import (
    Handler,
    Kernel,
    UnsupportedNodeError,
    dtype_of,
    handler,
    number,
    plain,
)
from onnxcomp.model import Node


def _cast(node: Node, opset: int) -> Kernel:
    dtype = dtype_of(node.attrs["to"])
    return lambda x: x.to(dtype)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(node: Node, opset: int) -> Kernel:
    return torch.fmod if node.attrs.get("fmod", 0) else torch.remainder


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    if exponent.numel() == 1 and exponent.device.type == "cpu" and not exponent.requires_grad:
        return torch.pow(base, number(exponent)).to(base.dtype)
    return torch.pow(base, exponent.to(base.device)).to(base.dtype)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Handler:
    return plain(lambda *inputs: reduce(function, inputs))


def _mean(*inputs: Tensor) -> Tensor:
    return reduce(torch.add, inputs) / len(inputs)


def _clip(node: Node, opset: int) -> Kernel:
    if opset < 11:
        low, high = node.attrs.get("min", -math.inf), node.attrs.get("max", math.inf)
        return lambda x: torch.clamp(x, low, high)

    def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        bounds = [None if bound is None else number(bound) for bound in (low, high)]
        return x if bounds == [None, None] else torch.clamp(x, *bounds)

    return clip


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    channels = x.shape[1] if x.dim() > 1 else 1
    by_channel = slope.dim() == x.dim() - 1 and tuple(slope.shape) == (
        channels,
        *[1] * (x.dim() - 2),
    )
    if slope.numel() == 1 or by_channel:
        return functional.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


def _leaky_relu(node: Node, opset: int) -> Kernel:
    alpha = node.attrs.get("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


def _elu(node: Node, opset: int) -> Kernel:
    alpha = node.attrs.get("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


def _selu(node: Node, opset: int) -> Kernel:
    alpha = node.attrs.get("alpha", 1.6732632423543772)
    gamma = node.attrs.get("gamma", 1.0507009873554805)
    return lambda x: gamma * functional.elu(x, alpha)


def _celu(node: Node, opset: int) -> Kernel:
    alpha = node.attrs.get("alpha", 1.0)
    return lambda x: functional.celu(x, alpha)


def _thresholded_relu(node: Node, opset: int) -> Kernel:
    return lambda x: functional.threshold(x, node.attrs.get("alpha", 1.0), 0.0)


def _hard_sigmoid(node: Node, opset: int) -> Kernel:
    alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0, 1)


def _gelu(node: Node, opset: int) -> Kernel:
    approximate = node.attrs.get("approximate", "none")
    return lambda x: functional.gelu(x, approximate=approximate)


def _swish(node: Node, opset: int) -> Kernel:
    alpha = node.attrs.get("alpha", 1.0)
    return lambda x: x * torch.sigmoid(alpha * x)


def _is_inf(node: Node, opset: int) -> Kernel:
    negative, positive = (
        node.attrs.get("detect_negative", 1),
        node.attrs.get("detect_positive", 1),
    )
    return lambda x: torch.isinf(x) & ((x < 0) & bool(negative) | (x > 0) & bool(positive))


def _dropout(node: Node, opset: int) -> Kernel:
    """Return the identity, or in training what drops by the attribute or the input."""
    if any(node.outputs[1:]):
        raise UnsupportedNodeError("its mask is not made")
    fixed = node.attrs.get("ratio", 0.5)

    def drop(x: Tensor, ratio: Tensor | None = None, *_: Tensor, dropout: bool) -> Tensor:
        return functional.dropout(x, fixed if ratio is None else number(ratio), dropout)

    return drop


def _dequantize_linear(node: Node, opset: int) -> Kernel:
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)

    def dequantize_linear(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        values = x.to(scale.dtype)
        if block:
            pick = torch.arange(x.shape[axis], device=x.device) // block
            scale = scale.index_select(axis, pick)
            zero = None if zero is None else zero.index_select(axis, pick)
        elif scale.dim() == 1 and x.dim():
            shape = [1] * x.dim()
            shape[axis] = -1
            scale = scale.reshape(shape)
            zero = None if zero is None else zero.reshape(shape)
        return (values if zero is None else values - zero.to(scale.dtype)) * scale

    return dequantize_linear


HANDLERS: Mapping[str, Handler] = {
    "Abs": plain(torch.abs),
    "Acos": plain(torch.acos),
    "Acosh": plain(torch.acosh),
    "Add": plain(torch.add),
    "And": plain(torch.logical_and),
    "Asin": plain(torch.asin),
    "Asinh": plain(torch.asinh),
    "Atan": plain(torch.atan),
    "Atanh": plain(torch.atanh),
    "Cast": handler(_cast),
    "CastLike": plain(lambda x, like: x.to(like.dtype)),
    "Ceil": plain(torch.ceil),
    "Celu": handler(_celu),
    "Clip": handler(_clip, 1, 2),
    "Cos": plain(torch.cos),
    "Cosh": plain(torch.cosh),
    "DequantizeLinear": handler(_dequantize_linear),
    "Div": plain(_divide),
    "Dropout": handler(_dropout, 1, 2, wants="dropout"),
    "Elu": handler(_elu),
    "Equal": plain(torch.eq),
    "Erf": plain(torch.erf),
    "Exp": plain(torch.exp),
    "Floor": plain(torch.floor),
    "Gelu": handler(_gelu),
    "Greater": plain(torch.gt),
    "GreaterOrEqual": plain(torch.ge),
    "HardSigmoid": handler(_hard_sigmoid),
    "HardSwish": plain(functional.hardswish),
    "Identity": plain(lambda x: x),
    "IsInf": handler(_is_inf),
    "IsNaN": plain(torch.isnan),
    "LeakyRelu": handler(_leaky_relu),
    "Less": plain(torch.lt),
    "LessOrEqual": plain(torch.le),
    "Log": plain(torch.log),
    "Max": _fold(torch.maximum),
    "Mean": plain(_mean),
    "Min": _fold(torch.minimum),
    "Mish": plain(functional.mish),
    "Mod": handler(_mod),
    "Mul": plain(torch.mul),
    "Neg": plain(torch.neg),
    "Not": plain(torch.logical_not),
    "Or": plain(torch.logical_or),
    "PRelu": plain(_prelu),
    "Pow": plain(_power, 1),
    "Reciprocal": plain(torch.reciprocal),
    "Relu": plain(torch.relu),
    "Round": plain(torch.round),
    "Selu": handler(_selu),
    "Sigmoid": plain(torch.sigmoid),
    "Sign": plain(torch.sign),
    "Sin": plain(torch.sin),
    "Sinh": plain(torch.sinh),
    "Softplus": plain(functional.softplus),
    "Softsign": plain(functional.softsign),
    "Sqrt": plain(torch.sqrt),
    "Sub": plain(torch.sub),
    "Sum": _fold(torch.add),
    "Swish": handler(_swish),
    "Tan": plain(torch.tan),
    "Tanh": plain(torch.tanh),
    "ThresholdedRelu": handler(_thresholded_relu),
    "Where": plain(torch.where),
    "Xor": plain(torch.logical_xor),
}
