"""Linear nodes: Conv, ConvTranspose, Gemm and MatMul seen as y = W x + b on patches.

Every such node is one linear map from input patches of in_channels x kernel positions to
output channels, per group.  `Linear` translates between the file's weight layout and the
kernel (out_channels, in_channels / groups, *kernel_shape), and cuts sampled patches out of
tensors.  A ConvTranspose is the convolution of its zero-stuffed input with the flipped kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.quantised import is_quantised
from onnxcomp.analysis.target import Convolution
from onnxcomp.model import Array, Model, Node
from onnxcomp.runtime import TensorFact

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Linear:
    """One linear node.

    Attributes:
        node: The weighted node.
        x: Its data input.
        y: Its output, behind the Add that carries the bias of a MatMul.
        weight: Name of its weight.
        bias: Name of its bias, or "".
        in_channels: Channels of x.
        out_channels: Channels of y.
        groups: Groups of a convolution, else 1.
        kernel_shape: Kernel extents; () for Gemm and MatMul.
        strides: Step between patches, on the zero-stuffed input for ConvTranspose.
        dilations: Step within a patch.
        stuffing: Zeros stuffed between inputs plus one (strides of a ConvTranspose), else 1s.
        pads: Zeros before and after each axis of the (stuffed) input: begins, then ends.
        in_extent: Positions of x along each kernel axis in the probe run (Gemm and MatMul:
            all their rows per sample as one axis).
        out_extent: Positions of y likewise.
        x_axis: Channel axis of x.
        y_axis: Channel axis of y.
        dtype: Dtype of the weight.
    """

    node: Node
    x: str
    y: str
    weight: str
    bias: str
    in_channels: int
    out_channels: int
    groups: int
    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    stuffing: tuple[int, ...]
    pads: tuple[int, ...]
    in_extent: tuple[int, ...]
    out_extent: tuple[int, ...]
    x_axis: int
    y_axis: int
    dtype: np.dtype[Any]

    @property
    def id(self) -> str:
        """First output of the node."""
        return self.node.id

    @property
    def depthwise(self) -> bool:
        """Whether each group sees a single input channel of several."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def spatial(self) -> int:
        """Number of kernel positions."""
        return math.prod(self.kernel_shape)

    @property
    def convolution(self) -> Convolution:
        """Shape of the node for the latency model and for counting MACs."""
        return Convolution(
            self.in_channels,
            self.out_channels,
            self.spatial,
            math.prod(self.out_extent),
            math.prod(self.in_extent),
            self.groups,
            self.node.op,
        )

    def kernel(self, weight: Array) -> npt.NDArray[np.float64]:
        """Return a weight as kernel (out_channels, in_channels / groups, *kernel_shape)."""
        return kernel_of(self.node.op, self.node.attrs, np.asarray(weight, np.float64))

    def stored(self, kernel: Array) -> Array:
        """Return a kernel as weight in the file's layout and dtype."""
        return stored_as(self.node.op, self.node.attrs, kernel).astype(self.dtype)

    def patches(
        self, x: Array, y: Array, rows: int, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Sample input patches and the outputs at the same positions.

        Args:
            x: Input values, shape of the data input with any batch size.
            y: Values at the output's positions, shape of the output.
            rows: Patches wanted; all are taken where there are not more.
            rng: Draws images and positions uniformly.

        Returns:
            Patches of shape (n, channels of x, kernel positions) and targets (n, channels
            of y).
        """
        x = np.moveaxis(x, self.x_axis, 1) if x.ndim > 1 else x[None]
        y = np.moveaxis(y, self.y_axis, -1) if y.ndim > 1 else y[None]
        if not self.kernel_shape:
            x = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
            y = y.reshape(-1, y.shape[-1])
            pick = _sample(len(x), rows, rng)
            return _f32(x[pick])[:, :, None], _f32(y[pick])
        windows = self._windows(_f32(x))
        extent = y.shape[:-1]
        flat = _sample(int(np.prod(extent, dtype=np.int64)), rows, rng)
        image, *position = np.unravel_index(flat, extent)
        index: Any = (image, slice(None), *position)
        patch = windows[index]
        return patch.reshape(len(flat), x.shape[1], -1), _f32(y[image, *position])

    def _windows(self, x: Array) -> Array:
        """Return views of all patches, shape (n, c, *positions, *kernel_shape)."""
        if any(s != 1 for s in self.stuffing):
            steps = [slice(None, None, s) for s in self.stuffing]
            sizes = zip(x.shape[2:], self.stuffing, strict=True)
            stuffed = np.zeros((*x.shape[:2], *((d - 1) * s + 1 for d, s in sizes)), x.dtype)
            stuffed[:, :, *steps] = x
            x = stuffed
        count = len(self.kernel_shape)
        pads = zip(self.pads[:count], self.pads[count:], strict=True)
        x = np.pad(x, [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in pads)])
        cut = zip(self.pads[:count], self.pads[count:], strict=True)
        x = x[:, :, *(slice(max(-a, 0), -max(-b, 0) or None) for a, b in cut)]
        spans = [
            d * (k - 1) + 1 for k, d in zip(self.kernel_shape, self.dilations, strict=True)
        ]
        axes = tuple(range(2, 2 + count))
        views = np.lib.stride_tricks.sliding_window_view(x, spans, axis=axes)
        steps = [slice(None, None, s) for s in self.strides]
        inner = [slice(None, None, d) for d in self.dilations]
        return views[:, :, *steps, *inner]


def kernel_of(op: str, attrs: Mapping[str, Any], weight: Array) -> Array:
    """Return a weight of a linear operator as kernel (out, in / groups, *kernel_shape)."""
    if op != "ConvTranspose":
        return weight if _rows_out(op, attrs) else weight.T
    groups = int(attrs.get("group", 1))
    inputs, outputs = weight.shape[:2]
    array = weight.reshape(groups, inputs // groups, *weight.shape[1:]).swapaxes(1, 2)
    array = array.reshape(groups * outputs, inputs // groups, *weight.shape[2:])
    return np.flip(array, axis=tuple(range(2, array.ndim)))


def stored_as(op: str, attrs: Mapping[str, Any], kernel: Array) -> Array:
    """Return a kernel (out, in / groups, *kernel_shape) in the layout that the file keeps."""
    if op != "ConvTranspose":
        return np.ascontiguousarray(kernel if _rows_out(op, attrs) else kernel.T)
    groups = int(attrs.get("group", 1))
    outputs, inputs = kernel.shape[:2]
    array = np.flip(kernel, axis=tuple(range(2, kernel.ndim)))
    array = array.reshape(groups, outputs // groups, *array.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(
        array.reshape(groups * inputs, outputs // groups, *kernel.shape[2:])
    )


def out_axis(op: str, attrs: Mapping[str, Any]) -> int:
    """Return the axis of the output channels in a stored weight, 0 or 1."""
    return 0 if op != "ConvTranspose" and _rows_out(op, attrs) else 1


def _rows_out(op: str, attrs: Mapping[str, Any]) -> bool:
    """Whether the stored weight has output channels first."""
    return bool(attrs.get("transB", 0)) if op == "Gemm" else op != "MatMul"


def find_linears(
    model: Model, tensors: Mapping[str, TensorFact]
) -> tuple[tuple[Linear, ...], dict[str, str]]:
    """Return all linear nodes in file order, and the reasons why others are none.

    Args:
        model: The model.
        tensors: Shapes of its tensors from one run.

    Returns:
        The linear nodes, and by node id why a Conv, ConvTranspose, Gemm or MatMul is not
        treated as one, nor the call of a local function.
    """
    found: list[Linear] = []
    refused: dict[str, str] = {}
    functions = {f"{f.domain}::{f.name}" for f in model.skeleton.functions}
    for node in model.nodes:
        if node.op in functions:
            refused[node.id] = "its function has another operator set and was not inlined"
        if node.op not in LINEAR_OPS:
            continue
        reason = _refusal(model, tensors, node)
        if reason:
            refused[node.id] = reason
        elif node.op in ("Gemm", "MatMul"):
            found.append(_dense(model, tensors, node))
        else:
            found.append(_convolution(model, tensors, node))
    return tuple(found), refused


def _refusal(model: Model, tensors: Mapping[str, TensorFact], node: Node) -> str:
    weight = node.input(1)
    array = model.weights.get(weight)
    if array is None and is_quantised(model, node):
        return "it is quantised"
    if array is None:
        return "its weight is not an initializer"
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return f"its weight is {array.dtype}"
    if node.input(0) not in tensors or node.id not in tensors:
        return "its input or output is no plain tensor"
    if node.op == "MatMul" and (array.ndim != 2 or len(tensors[node.input(0)].shape) < 2):
        return f"its weight has rank {array.ndim}"
    if node.op == "Gemm":
        if node.attrs.get("transA", 0):
            return "it transposes its data input"
        if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
            return "it scales its product (alpha, beta)"
    if node.input(2) and node.input(2) not in model.weights:
        return "its bias is not an initializer"
    if node.op == "Gemm" and node.input(2):
        outputs = array.shape[0 if node.attrs.get("transB", 0) else 1]
        if not _per_channel(model.weights[node.input(2)], outputs):
            return "its bias is not one value per output channel"
    return ""


def _dense(model: Model, tensors: Mapping[str, TensorFact], node: Node) -> Linear:
    y, bias = node.id, node.input(2)
    weight = model.weights[node.inputs[1]]
    rows_out = bool(node.attrs.get("transB", 0))
    outputs, inputs = weight.shape if rows_out else weight.shape[::-1]
    if node.op == "MatMul":
        y, bias = _trailing_bias(model, node, outputs)
    rank = len(tensors[node.inputs[0]].shape)
    rows = int(np.prod(tensors[node.id].shape[1:-1], dtype=np.int64))
    return Linear(
        node=node, x=node.inputs[0], y=y, weight=node.inputs[1], bias=bias,
        in_channels=inputs, out_channels=outputs, groups=1, kernel_shape=(), strides=(),
        dilations=(), stuffing=(), pads=(), in_extent=(rows,), out_extent=(rows,),
        x_axis=rank - 1, y_axis=len(tensors[y].shape) - 1, dtype=weight.dtype,
    )  # fmt: skip


def _trailing_bias(model: Model, node: Node, outputs: int) -> tuple[str, str]:
    """Return output and bias of a MatMul whose only reader adds a constant per channel."""
    uses = model.readers.get(node.id, ())
    if len(uses) == 1 and uses[0].node.op == "Add" and node.id not in model.output_names:
        add = uses[0].node
        other = add.inputs[1 - uses[0].index]
        array = model.weights.get(other)
        if array is not None and _per_channel(array, outputs):
            return add.id, other
    return node.id, ""


def _per_channel(bias: Array, channels: int) -> bool:
    """Whether a bias has one value per channel, along its last axis."""
    return bias.ndim > 0 and bias.size == channels == bias.shape[-1]


def _convolution(model: Model, tensors: Mapping[str, TensorFact], node: Node) -> Linear:
    weight = model.weights[node.inputs[1]]
    transposed = node.op == "ConvTranspose"
    groups = int(node.attrs.get("group", 1))
    kernel = tuple(int(k) for k in weight.shape[2:])
    count = len(kernel)
    strides = tuple(node.attrs.get("strides", (1,) * count))
    dilations = tuple(node.attrs.get("dilations", (1,) * count))
    x, y = tensors[node.inputs[0]].shape[2:], tensors[node.id].shape[2:]
    begins = _begins(node, x, y, kernel, strides, dilations)
    if transposed:
        begins = [d * (k - 1) - b for b, k, d in zip(begins, kernel, dilations, strict=True)]
        extents = [(i - 1) * s + 1 for i, s in zip(x, strides, strict=True)]
        steps = (1,) * count
    else:
        extents, steps = list(x), strides
    ends = [
        (o - 1) * s + d * (k - 1) + 1 - i - b
        for o, s, d, k, i, b in zip(y, steps, dilations, kernel, extents, begins, strict=True)
    ]
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    return Linear(
        node=node, x=node.inputs[0], y=node.id, weight=node.inputs[1], bias=node.input(2),
        in_channels=inputs, out_channels=outputs, groups=groups, kernel_shape=kernel,
        strides=steps, dilations=dilations, stuffing=strides if transposed else (1,) * count,
        pads=(*begins, *ends), in_extent=x, out_extent=y, x_axis=1, y_axis=1,
        dtype=weight.dtype,
    )  # fmt: skip


def _begins(
    node: Node,
    x: Sequence[int],
    y: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """Return the padding in front of each axis, as `pads`, `auto_pad` or shapes give it."""
    auto = node.attrs.get("auto_pad", "NOTSET")
    count = len(kernel)
    if auto == "VALID":
        return [0] * count
    if auto == "NOTSET" and "output_shape" not in node.attrs:
        return list(node.attrs.get("pads", (0,) * 2 * count))[:count]
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if node.op == "ConvTranspose":
        extra = node.attrs.get("output_padding", (0,) * count)
        total = [
            s * (i - 1) + e + span - o
            for s, i, e, span, o in zip(strides, x, extra, spans, y, strict=True)
        ]
    else:
        total = [
            max((o - 1) * s + span - i, 0)
            for o, s, span, i in zip(y, strides, spans, x, strict=True)
        ]
    return [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]


def _sample(count: int, rows: int, rng: np.random.Generator) -> Index:
    if rows >= count:
        return np.arange(count)
    return np.sort(rng.choice(count, rows, replace=False, shuffle=False)).astype(np.int64)


def _f32(array: Array) -> npt.NDArray[np.float32]:
    return np.asarray(array, np.float32)
