"""Normalisations and softmax."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import (
    Handler,
    Kernel,
    UnsupportedNodeError,
    axis_of,
    handler,
    only_first_output,
)
from onnxcomp.model import Node


def _batch_normalization(node: Node, opset: int) -> Kernel:
    only_first_output(node)
    if node.attrs.get("training_mode", 0):
        raise UnsupportedNodeError("training_mode is 1 (export the model for inference)")
    if not node.attrs.get("spatial", 1):
        raise UnsupportedNodeError("spatial is 0: it normalises every position apart")
    eps = node.attrs.get("epsilon", 1e-5)
    momentum = 1 - node.attrs.get("momentum", 0.9)  # torch weighs the new, ONNX the old

    def batch_normalization(
        x: Tensor,
        scale: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        *,
        batchnorm: bool,
    ) -> Tensor:
        return functional.batch_norm(x, mean, variance, scale, bias, batchnorm, momentum, eps)

    return batch_normalization


def _instance_normalization(node: Node, opset: int) -> Kernel:
    eps = node.attrs.get("epsilon", 1e-5)

    def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return functional.instance_norm(x, weight=scale, bias=bias, eps=eps)

    return instance_normalization


def _layer_normalization(node: Node, opset: int) -> Kernel:
    only_first_output(node)
    axis, eps = node.attrs.get("axis", -1), node.attrs.get("epsilon", 1e-5)

    def layer_normalization(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis_of(axis, x.dim()) :]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return functional.layer_norm(x, shape, scale, bias, eps)
        y = functional.layer_norm(x, shape, eps=eps) * scale
        return y if bias is None else y + bias

    return layer_normalization


def _rms_normalization(node: Node, opset: int) -> Kernel:
    axis, eps = node.attrs.get("axis", -1), node.attrs.get("epsilon", 1e-5)

    def rms_normalization(x: Tensor, scale: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[axis_of(axis, x.dim()) :], eps=eps) * scale

    return rms_normalization


def _group_normalization(node: Node, opset: int) -> Kernel:
    groups, eps = node.attrs["num_groups"], node.attrs.get("epsilon", 1e-5)

    def group_normalization(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if opset < 21:  # one scale and bias per group
            repeats = x.shape[1] // groups
            scale, bias = (v.repeat_interleave(repeats) for v in (scale, bias))
        return functional.group_norm(x, groups, scale, bias, eps)

    return group_normalization


def _lrn(node: Node, opset: int) -> Kernel:
    size, bias = node.attrs["size"], node.attrs.get("bias", 1.0)
    alpha, beta = node.attrs.get("alpha", 1e-4), node.attrs.get("beta", 0.75)

    def lrn(x: Tensor) -> Tensor:
        count, channels = x.shape[:2]
        square = x.square().reshape(count, 1, channels, -1)
        square = functional.pad(square, (0, 0, (size - 1) // 2, size // 2))
        mean = functional.avg_pool2d(square, (size, 1), stride=1).reshape(x.shape)
        return x / torch.pow(bias + alpha * mean, beta)

    return lrn


def _lp_normalization(node: Node, opset: int) -> Kernel:
    axis, p = node.attrs.get("axis", -1), node.attrs.get("p", 2)

    def lp_normalization(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, 0.0, x / norm)

    return lp_normalization


def _mean_variance_normalization(node: Node, opset: int) -> Kernel:
    axes = node.attrs.get("axes", (0, 2, 3))

    def mean_variance_normalization(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        deviation = centred.square().mean(axes, keepdim=True).sqrt()
        return centred / (deviation + 1e-9)

    return mean_variance_normalization


def _softmax(node: Node, opset: int) -> Kernel:
    return _along_axis(node, opset, functional.softmax)


def _log_softmax(node: Node, opset: int) -> Kernel:
    return _along_axis(node, opset, functional.log_softmax)


def _hardmax(node: Node, opset: int) -> Kernel:
    def hardmax(x: Tensor, axis: int) -> Tensor:
        hot = functional.one_hot(x.argmax(axis), x.shape[axis]).to(x.dtype)
        return hot.movedim(-1, axis)

    return _along_axis(node, opset, hardmax)


def _along_axis(node: Node, opset: int, function: Kernel) -> Kernel:
    """Apply along one axis; before opset 13 along all axes from there on, as one."""
    axis = node.attrs.get("axis", -1 if opset >= 13 else 1)

    def flattened(x: Tensor) -> Tensor:
        first = axis_of(axis, x.dim())
        y: Tensor = function(x.flatten(first), first)
        return y.reshape(x.shape)

    return (lambda x: function(x, axis)) if opset >= 13 else flattened


HANDLERS: Mapping[str, Handler] = {
    "BatchNormalization": handler(_batch_normalization, wants="batchnorm"),
    "GroupNormalization": handler(_group_normalization),
    "Hardmax": handler(_hardmax),
    "InstanceNormalization": handler(_instance_normalization),
    "LRN": handler(_lrn),
    "LayerNormalization": handler(_layer_normalization),
    "LogSoftmax": handler(_log_softmax),
    "LpNormalization": handler(_lp_normalization),
    "MeanVarianceNormalization": handler(_mean_variance_normalization),
    "RMSNormalization": handler(_rms_normalization),
    "Softmax": handler(_softmax),
}
