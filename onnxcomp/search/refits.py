"""Closed-form refits of one linear node, and which channels of it stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments, grouped
from onnxcomp.model import Array
from onnxcomp.numerics.selection import Reader

Index = npt.NDArray[np.int64]


def solve_dense(
    linear: Linear,
    kernel: Array,
    metrics: Sequence[SecondMoments],
    inputs: Index,
) -> tuple[Array, Array]:
    """Refit a node on the input channels that stay; the weights of the others become zero.

    Args:
        linear: The node.
        kernel: Its kernel now, shape (m, c / groups, *kernel_shape).
        metrics: Moments per group over all input channels and all outputs of the group.
        inputs: Input channels that stay, sorted.

    Returns:
        The kernel, of the same shape, and the bias, shape (m,).
    """
    result = np.zeros_like(kernel)
    bias = np.zeros(len(kernel))
    per_in = linear.in_channels // linear.groups
    positions = np.arange(linear.spatial)
    everything = grouped(linear)
    for metric, (c, m) in zip(metrics, everything, strict=True):
        stay = np.intersect1d(c, inputs) % per_in
        columns = (stay[:, None] * linear.spatial + positions).reshape(-1)
        prior = kernel[m].reshape(len(m), -1)
        part = None if len(columns) == metric.d else columns
        weight = metric.solve(prior, columns=part)
        full = np.zeros_like(prior)
        full[:, columns] = weight
        result[m] = full.reshape(len(m), *kernel.shape[1:])
        bias[m] = metric.bias(weight, columns=part)
    return result, bias


def without_inputs(linear: Linear, kernel: Array, inputs: Index) -> Array:
    """Return a kernel whose weights of all but the given input channels are zero."""
    stay = np.zeros(linear.in_channels, bool)
    stay[inputs] = True
    per_group = stay.reshape(linear.groups, -1)
    mask = np.repeat(per_group, len(kernel) // linear.groups, axis=0)
    return np.asarray(kernel * mask.reshape(*mask.shape, *(1,) * (kernel.ndim - 2)))


def group_readers(
    linear: Linear, kernel: Array, index: Index, metrics: Sequence[SecondMoments]
) -> list[Reader]:
    """Return a reader of a channel group per convolution group of a node that reads it.

    Args:
        linear: The node.
        kernel: Its kernel, shape (m, c / groups, *kernel_shape).
        index: Its input channels that are the group's, shape (size, positions per channel).
        metrics: Moments per convolution group.
    """
    per_in = linear.in_channels // linear.groups
    rows = len(kernel) // linear.groups
    readers = []
    for g, metric in enumerate(metrics):
        part = index if linear.groups == 1 else index[:, index[0] // per_in == g]
        local = part - g * per_in if linear.groups > 1 else part
        offsets = np.arange(linear.spatial)
        columns = (local[:, :, None] * linear.spatial + offsets).reshape(len(index), -1)
        weight = kernel[g * rows : (g + 1) * rows].reshape(rows, -1)
        scale = max(metric.target_energy, 1e-30)
        readers.append(Reader(weight, metric, columns, 1.0 / scale))
    return readers


def like_bias(bias: Array, old: Array) -> Array:
    """Return a bias of shape (m,) in the shape and dtype of the file's."""
    return bias.reshape(old.shape).astype(old.dtype)
