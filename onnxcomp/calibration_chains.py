"""The micro-chains that `calibrate` measures: short networks of one or two layers, repeated.

A chain is written as its input, how often its layers are repeated, and the layers:

    64@56 4x conv1:16 conv3:64      64 channels of 56 x 56; 1 x 1 to 16, 3 x 3 to 64; 4 times
    conv3x1/2%4:64                  3 x 1 kernel, stride 2, 4 groups, 64 output channels
    dw5                             depthwise 5 x 5
    up4/2:64                        ConvTranspose, 4 x 4, stride 2
    gemm:64 matmul:64               matrix products of one row, and of a row per position
    SiLU                            an elementwise operator behind the layer before it

ReLU follows every convolution, where onnxruntime fuses it, and a global pool ends a chain, so
that its output takes no time.  Chains with an elementwise operator are compared with the same
chain without it.  Weights repeat a short tile of noise: latency does not depend on them, and
files with them compress a hundredfold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.analysis.target import Convolution
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array

OPSET = 17
_IR_VERSION = 8
_TILE = 2039  # a prime, so that rows of a weight differ
_LAYER = re.compile(
    r"(conv|dw|up|gemm|matmul)(\d+)?(?:x(\d+))?(?:/(\d+))?(?:%(\d+))?(?::(\d+))?"
)
_CHAIN = re.compile(r"(\d+)@(\d+) (\d+)x (.+)")
ELEMENT_BASE = "32@56 3x conv1:32 conv1:32 conv1:32"
"""Chain with which those of elementwise operators are compared."""

CHAINS: tuple[str, ...] = (
    # dense layers, of ImageNet and of CIFAR size, and widths that fill no block
    *("64@56 4x conv3:64", "128@28 4x conv3:128", "256@14 4x conv3:256", "512@7 4x conv3:512"),
    *("16@32 12x conv3:16", "32@16 12x conv3:32", "64@8 12x conv3:64", "32@56 6x conv3:32"),
    *("80@14 8x conv3:80", "48@16 12x conv3:48", "192@14 6x conv3:192", "96@28 4x conv3:96"),
    *("24@16 8x conv3:24", "56@28 4x conv3:56", "40@28 6x conv3:40", "12@32 8x conv3:12"),
    *("8@32 8x conv3:8", "4@32 8x conv3:4", "13@32 8x conv3:13", "6@32 8x conv1:6"),
    *("64@56 6x conv1:64", "128@28 6x conv1:128", "256@14 8x conv1:256", "512@7 8x conv1:512"),
    *("16@32 16x conv1:16", "32@16 16x conv1:32", "64@8 16x conv1:64", "12@32 8x conv1:12"),
    *("64@56 3x conv1:256 conv1:64", "128@28 3x conv1:512 conv1:128"),
    *("256@14 3x conv1:1024 conv1:256", "512@7 2x conv1:2048 conv1:512"),
    *("24@56 3x conv1:144 conv1:24", "64@14 6x conv1:384 conv1:64"),
    *("16@56 3x conv1:256 conv1:16", "16@208 3x conv1:16", "32@28 6x conv1:512 conv1:32"),
    # low rank
    *("64@56 4x conv3x1:32 conv1x3:64", "256@14 4x conv3x1:64 conv1x3:256"),
    *("512@7 4x conv3x1:128 conv1x3:512", "16@32 8x conv3x1:8 conv1x3:16"),
    *("32@16 8x conv3x1:16 conv1x3:32", "64@8 8x conv3x1:32 conv1x3:64"),
    *("64@56 4x conv1:16 conv3:64", "128@28 4x conv1:32 conv3:128"),
    *("64@8 8x conv1:32 conv3:64", "32@16 8x conv1:8 conv3:32"),
    *("64@56 4x conv3:16 conv1:64", "256@14 4x conv3:64 conv1:256"),
    *("64@8 8x conv3:16 conv1:64", "32@16 8x conv3:4 conv1:32"),
    *("64@56 4x conv1:32 conv3:32 conv1:64", "128@28 6x conv1:32 conv3:32 conv1:128"),
    *("512@7 4x conv1:128 conv3:128 conv1:512", "64@8 8x conv1:16 conv3:16 conv1:64"),
    # less than a block in between
    *("64@8 8x conv1:12 conv1:64", "32@16 8x conv1:12 conv1:32", "32@16 8x conv1:4 conv1:32"),
    *("64@8 8x conv3x1:12 conv1x3:64", "16@32 8x conv3x1:4 conv1x3:16"),
    *("16@32 8x conv1:4 conv3:16", "32@16 8x conv1:4 conv3:4 conv1:32"),
    *("64@28 6x conv1:12 conv1:64", "64@28 4x conv3:8 conv3:64", "64@8 8x conv3:8 conv3:64"),
    # without a blocked kernel
    *("61@28 4x conv3:61", "61@8 8x conv3:61", "30@16 8x conv1:30", "250@14 4x conv1:250"),
    *("64@28 4x conv1:31 conv3:31 conv1:64", "30@28 4x dw3"),
    *("32@16 4x conv3%4:32", "16@32 4x conv3%2:16"),
    # depthwise and grouped
    *("32@112 4x dw3", "64@56 6x dw3", "192@28 6x dw3", "384@14 8x dw3", "960@7 8x dw3"),
    *("16@32 12x dw3", "8@32 12x dw3", "48@104 4x dw3", "96@28 6x dw5", "240@14 8x dw5"),
    *("128@14 8x dw5 conv1:128", "64@56 4x conv3%4:64", "128@28 4x conv3%2:128"),
    # strides, transposed convolutions, matrix products, first layers
    *("64@56 1x conv3/2:128 conv3/2:256 conv3/2:512", "16@32 1x conv3/2:32 conv3/2:64"),
    *("64@56 1x conv1/2:128 conv1/2:256 conv1/2:512", "256@56 1x conv1/2:512 conv1/2:1024"),
    *("64@28 2x conv3/2:64 up4/2:64", "32@16 2x conv3/2:32 up4/2:32"),
    *("256@1 6x gemm:256", "512@1 6x gemm:512", "2048@1 2x gemm:2048"),
    *("192@14 2x matmul:768 matmul:192", "384@7 2x matmul:384"),
    *("3@224 1x conv7/2:64", "3@224 1x conv3/2:32", "3@32 1x conv3:16", "16@8 1x conv1:16"),
    # elementwise operators
    ELEMENT_BASE,
    *(f"{ELEMENT_BASE} {name}" for name in ("Add", "Mul", "SiLU", "Tanh", "HardSwish")),
    *(f"{ELEMENT_BASE} {name}" for name in ("HardSigmoid", "Elu", "Erf", "PRelu", "MaxPool")),
    *(f"{ELEMENT_BASE} {name}" for name in ("AveragePool", "BatchNormalization", "Split")),
    *(f"{ELEMENT_BASE} {name}" for name in ("Slice", "Resize")),
)
"""All chains; the order decides which elementwise operators are known when one is fitted."""


@dataclass(frozen=True)
class Chain:
    """A micro-chain as a model, with what its time is made of.

    Attributes:
        name: How it is written.
        model: The ONNX model; its one input is `x`.
        shape: Shape of the input.
        convolutions: Its convolutions, in order.
        elements: Output elements of its elementwise operators, by operator.
        ends: Elements of the chain's input, and of what its last pool reads.
    """

    name: str
    model: onnx.ModelProto
    shape: tuple[int, ...]
    convolutions: tuple[Convolution, ...]
    elements: Mapping[str, int]
    ends: int


def build_chain(name: str) -> Chain:
    """Build the chain that a name describes.

    Raises:
        ParameterError: The name describes none.
    """
    found = _CHAIN.fullmatch(name)
    if found is None:
        raise ParameterError.of("build_chain", "name", "written as 64@56 4x conv3:64", name)
    channels, extent, repeat = (int(text) for text in found.groups()[:3])
    layers = found[4].split()
    graph = _Builder(layers[0], channels, extent)
    shape, start = graph.input_shape, graph.elements
    for _ in range(repeat):
        for index, layer in enumerate(layers):
            graph.add(layer, relu=layers[index + 1 : index + 2] != ["Add"])
            if index == 0:
                graph.shortcut = graph.x
    return Chain(
        name,
        graph.model(),
        shape,
        tuple(graph.convolutions),
        MappingProxyType(graph.counts),
        start + graph.elements,
    )


class _Builder:
    """Appends layers to a graph; `x` is the tensor at its end."""

    def __init__(self, first: str, channels: int, extent: int) -> None:
        self.x, self.shortcut = "x", "x"
        self.channels, self.height, self.width = channels, extent, extent
        self.input_shape: tuple[int, ...] = (1, channels, extent, extent)
        if first.startswith("gemm"):
            self.input_shape = (1, channels)
        elif first.startswith("matmul"):
            self.input_shape = (1, extent * extent, channels)
        self.convolutions: list[Convolution] = []
        self.counts: dict[str, int] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, Array] = {}

    @property
    def elements(self) -> int:
        """Elements of the tensor at the end."""
        return self.channels * self.height * self.width

    def add(self, layer: str, *, relu: bool) -> None:
        """Append a layer or an elementwise operator."""
        if layer in _ELEMENTS:
            _ELEMENTS[layer](self)
            return
        found = _LAYER.fullmatch(layer)
        if found is None:
            known = f"a layer, or one of {', '.join(_ELEMENTS)}"
            raise ParameterError.of("build_chain", "name", known, layer)
        kind, *texts = found.groups()
        first, second, stride, groups, out = (text and int(text) for text in texts)
        kernel = (first or 1, second or first or 1)
        if kind in ("gemm", "matmul"):
            self._product(kind, out or self.channels)
            return
        wide = out or self.channels
        group = self.channels if kind == "dw" else groups or 1
        self._convolution(kind, kernel, stride or 1, group, wide)
        if relu and kind != "up":
            self.node("Relu", [self.x])

    def node(self, op: str, inputs: list[str], **attrs: Any) -> str:
        """Append an operator of one output, which becomes the end, and count its elements."""
        self.x = self._append(op, inputs, 1, attrs)[0]
        return self.x

    def nodes(self, op: str, inputs: list[str], outputs: int, **attrs: Any) -> list[str]:
        """Append an operator; the end stays where it is."""
        return self._append(op, inputs, outputs, attrs)

    def constant(self, array: Array) -> str:
        """Add an initializer."""
        name = f"w{len(self._weights)}"
        self._weights[name] = array
        return name

    def count(self, op: str, elements: int) -> None:
        """Count output elements of an elementwise operator."""
        self.counts[op] = self.counts.get(op, 0) + elements

    def model(self) -> onnx.ModelProto:
        """Return the model, with a global pool at its end where there are maps."""
        shape = (*self.input_shape[:-1], self.channels)
        if len(self.input_shape) == 4:
            self.node("GlobalAveragePool", [self.x])
            shape = (1, self.channels, 1, 1)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self._nodes,
            "chain",
            [value("x", TensorProto.FLOAT, self.input_shape)],
            [value(self.x, TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(array, name) for name, array in self._weights.items()],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)

    def _append(
        self, op: str, inputs: list[str], outputs: int, attrs: Mapping[str, Any]
    ) -> list[str]:
        names = [f"t{len(self._nodes)}_{index}" for index in range(outputs)]
        self._nodes.append(helper.make_node(op, inputs, names, **attrs))
        return names

    def _convolution(
        self, kind: str, kernel: tuple[int, int], stride: int, groups: int, out: int
    ) -> None:
        before, positions = self.channels, self.height * self.width
        if kind == "up":
            op, pads = "ConvTranspose", [(k - stride) // 2 for k in kernel]
            extents = [stride * n for n in (self.height, self.width)]
            weight = _noise((before, out // groups, *kernel), before * math.prod(kernel))
        else:
            op, pads = "Conv", [(k - 1) // 2 for k in kernel]
            sizes = zip((self.height, self.width), kernel, pads, strict=True)
            extents = [(n + 2 * pad - k) // stride + 1 for n, k, pad in sizes]
            fan_in = before // groups * math.prod(kernel)
            weight = _noise((out, before // groups, *kernel), fan_in)
        inputs = [self.x, self.constant(weight), self.constant(np.zeros(out, np.float32))]
        self.node(
            op,
            inputs,
            kernel_shape=kernel,
            strides=[stride, stride],
            pads=pads * 2,
            group=groups,
        )
        self.channels, (self.height, self.width) = out, extents
        count = math.prod(extents)
        self.convolutions.append(
            Convolution(before, out, math.prod(kernel), count, positions, groups, op)
        )

    def _product(self, kind: str, out: int) -> None:
        op = "Gemm" if kind == "gemm" else "MatMul"
        weight = _noise((self.channels, out), self.channels)
        self.node(op, [self.x, self.constant(weight)])
        rows = self.height * self.width
        self.convolutions.append(Convolution(self.channels, out, 1, rows, rows, 1, op))
        self.channels = out


def _noise(shape: tuple[int, ...], fan_in: int) -> Array:
    """Return repeated noise at which a ReLU network keeps the size of its signals."""
    tile = np.random.default_rng(0).standard_normal(_TILE) * math.sqrt(2 / fan_in)
    return np.resize(tile.astype(np.float32), shape)


def _unary(op: str, **attrs: Any) -> Callable[[_Builder], None]:
    def add(graph: _Builder) -> None:
        graph.node(op, [graph.x], **attrs)
        graph.count(op, graph.elements)

    return add


def _binary(op: str, *, relu: bool = False) -> Callable[[_Builder], None]:
    """With the output of the first of the repeated layers, as shortcuts do."""

    def add(graph: _Builder) -> None:
        graph.node(op, [graph.x, graph.shortcut])
        graph.count(op, graph.elements)
        if relu:
            graph.node("Relu", [graph.x])

    return add


def _silu(graph: _Builder) -> None:
    x = graph.x
    graph.node("Mul", [x, graph.node("Sigmoid", [x])])
    graph.count("Sigmoid", graph.elements)
    graph.count("Mul", graph.elements)


def _slopes(graph: _Builder) -> None:
    slope = graph.constant(np.full((graph.channels, 1, 1), 0.25, np.float32))
    graph.node("PRelu", [graph.x, slope])
    graph.count("PRelu", graph.elements)


def _normalization(graph: _Builder) -> None:
    values = (np.full(graph.channels, value, np.float32) for value in (1.0, 0.1, 0.0, 1.0))
    graph.node("BatchNormalization", [graph.x, *map(graph.constant, values)])
    graph.count("BatchNormalization", graph.elements)


def _split(graph: _Builder) -> None:
    parts = graph.nodes("Split", [graph.x], 2, axis=1)
    graph.node("Concat", parts, axis=1)
    graph.count("Split", graph.elements)
    graph.count("Concat", graph.elements)


def _slice(graph: _Builder) -> None:
    bounds = (0, graph.channels // 2, graph.channels)
    limits = [graph.constant(np.array([bound], np.int64)) for bound in (*bounds, 1)]
    parts = [
        graph.nodes("Slice", [graph.x, limits[i], limits[i + 1], limits[3]], 1)[0]
        for i in range(2)
    ]
    graph.node("Concat", parts, axis=1)
    graph.count("Slice", graph.elements)
    graph.count("Concat", graph.elements)


def _resize(graph: _Builder) -> None:
    scales = graph.constant(np.array([1, 1, 2, 2], np.float32))
    large = graph.nodes(
        "Resize",
        [graph.x, "", scales],
        1,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    graph.node("MaxPool", large, kernel_shape=[2, 2], strides=[2, 2])
    graph.count("Resize", 4 * graph.elements)
    graph.count("MaxPool", graph.elements)


_WINDOW = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
_ELEMENTS: Mapping[str, Callable[[_Builder], None]] = MappingProxyType(
    {
        "Add": _binary("Add", relu=True),
        "Mul": _binary("Mul"),
        "SiLU": _silu,
        **{op: _unary(op) for op in ("Tanh", "HardSwish", "HardSigmoid", "Elu", "Erf")},
        "PRelu": _slopes,
        "MaxPool": _unary("MaxPool", **_WINDOW),
        "AveragePool": _unary("AveragePool", **_WINDOW),
        "BatchNormalization": _normalization,
        "Split": _split,
        "Slice": _slice,
        "Resize": _resize,
    }
)
