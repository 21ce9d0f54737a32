"""Chains of linear nodes in the place of one: their shapes, attributes and emission."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.target import Convolution
from onnxcomp.model import Array

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

Shape = tuple[int, int, int, int]
Step = tuple[str, dict[str, Any]]  # operator and attributes
_GEMM_WITHOUT_BIAS = 11  # first opset in which the bias of a Gemm is optional


def reason_to_stay(facts: Analysis, linear: Linear) -> str:
    """Return why a node cannot become other nodes, or ""."""
    if linear.groups > 1:
        return "depthwise" if linear.depthwise else f"{linear.groups} groups"
    return facts.shared_weight(linear)


def kernel_shape4(linear: Linear, out_channels: int, in_channels: int) -> Shape:
    """Return the shape (m, c, kh, kw) under which a node's kernel is factorised."""
    return (out_channels, in_channels, *_plane(linear.kernel_shape))


def convolutions(linear: Linear, form: str, shapes: Sequence[Shape]) -> list[Convolution]:
    """Return what a chain of kernels in the place of a node costs.

    Args:
        linear: The node.
        form: The arrangement, a name of `numerics.svd.FORMS`.
        shapes: Shape (out, in, kh, kw) of each kernel.
    """
    x, y = linear.in_extent, linear.out_extent
    steps, extent = [], x
    for index, (m, c, kh, kw) in enumerate(shapes):
        behind = _extent_behind(form, index, len(shapes), x, y)
        op = linear.node.op if kh * kw > 1 or linear.spatial == 1 else "Conv"
        positions = math.prod(behind), math.prod(extent)
        steps.append(Convolution(c, m, kh * kw, *positions, 1, op))
        extent = behind
    return steps


def expressible(linear: Linear, form: str) -> bool:
    """Whether the chain can carry the node's padding."""
    attrs = linear.node.attrs
    implicit = "output_shape" in attrs or attrs.get("auto_pad", "NOTSET") != "NOTSET"
    return not (linear.node.op == "ConvTranspose" and form == "spatial" and implicit)


def to_plane(kernel: Array) -> Array:
    """Return a kernel (m, c, *kernel_shape) as (m, c, kh, kw)."""
    return kernel.reshape(*kernel.shape[:2], *_plane(kernel.shape[2:]))


def from_plane(kernel: Array, kernel_shape: tuple[int, ...]) -> Array:
    """Return a kernel (out, in, kh, kw) of a chain with the node's number of axes."""
    return kernel.reshape(*kernel.shape[:2], *_unplane(kernel.shape[2:], kernel_shape))


def chain_steps(
    draft: Draft, node_id: str, form: str, kernels: Sequence[Array], opset: int
) -> list[Step]:
    """Return operator and attributes of every node of the chain that replaces a node."""
    op, attrs = draft.op(node_id), draft.attributes(node_id)
    steps = []
    for index, kernel in enumerate(kernels):
        step = _step(op, attrs, form, index, kernel.shape[2:])
        if op == "Gemm" and index < len(kernels) - 1 and opset < _GEMM_WITHOUT_BIAS:
            step = "MatMul", {}
        steps.append(step)
    return steps


def write_chain(
    draft: Draft, node_id: str, form: str, steps: Sequence[Step], weights: Sequence[str]
) -> None:
    """Replace a node by a chain; its bias stays with the last one.

    Args:
        draft: The draft.
        node_id: The node.
        form: Name of the form, for the names of new tensors.
        steps: Operator and attributes of the chain's nodes.
        weights: The tensor that each of them reads as its weight.
    """
    inputs = draft.inputs(node_id)
    draft.remove_node(node_id)
    tensor = inputs[0]
    for index, ((op, attrs), weight) in enumerate(zip(steps, weights, strict=True)):
        last = index == len(steps) - 1
        names = [tensor, weight]
        if last:
            names += [name for name in inputs[2:3] if name]
        tensor = draft.add_node(
            op,
            names,
            stem=f"{node_id}_{form}{index}",
            outputs=[node_id] if last else None,
            attrs=attrs,
        )


def _extent_behind(
    form: str, index: int, count: int, x: tuple[int, ...], y: tuple[int, ...]
) -> tuple[int, ...]:
    if form == "spatial":
        return (y[0], x[1]) if index == 0 else y
    first_kernel = {"output_basis": 0, "input_basis": 1, "tucker2": 1}[form]
    return y if index >= min(first_kernel, count - 1) else x


def _plane(spatial: tuple[int, ...]) -> tuple[int, int]:
    """Return kernel extents as two; those of 1-D and 3-D kernels do not separate."""
    if len(spatial) == 2:
        return spatial[0], spatial[1]
    return math.prod(spatial), 1


def _unplane(plane: tuple[int, ...], spatial: tuple[int, ...]) -> tuple[int, ...]:
    if len(spatial) == 2:
        return plane
    return spatial if plane[0] > 1 else (1,) * len(spatial)


def _step(
    op: str, attrs: Mapping[str, Any], form: str, index: int, kernel: tuple[int, ...]
) -> tuple[str, dict[str, Any]]:
    """Return operator and attributes of one node of a chain."""
    if op == "MatMul":
        return op, {}
    if op == "Gemm":
        return op, {key: value for key, value in attrs.items() if key == "transB"}
    if form == "spatial":
        axis = index
    elif all(k == 1 for k in kernel) and not _carries_window(form, index):
        return "Conv", {"kernel_shape": list(kernel)}
    else:
        axis = -1
    kept = {key: value for key, value in attrs.items() if key in ("auto_pad", "output_shape")}
    kept["kernel_shape"] = list(kernel)
    count = len(kernel)
    for key, neutral in (("strides", 1), ("dilations", 1), ("output_padding", 0)):
        if key in attrs:
            kept[key] = [v if axis in (-1, i) else neutral for i, v in enumerate(attrs[key])]
    if "pads" in attrs:
        kept["pads"] = [
            v if axis in (-1, i % count) else 0 for i, v in enumerate(attrs["pads"])
        ]
    return op, kept


def _carries_window(form: str, index: int) -> bool:
    """Whether step `index` carries strides and padding, also where the kernel is 1 x 1."""
    return index == {"output_basis": 0, "input_basis": 1, "tucker2": 1}[form]
