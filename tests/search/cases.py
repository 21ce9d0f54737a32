"""Small graphs, one per way in which channels and nodes hang together."""

from collections.abc import Callable

import numpy as np

from onnxcomp.model import Model
from tests.analysis.channel_graphs import Graph


def _relu_conv(g: Graph, x: str, inputs: int, outputs: int, **options: int) -> str:
    return g.op("Relu", g.conv(x, inputs, outputs, **options))


def residual() -> Model:
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16)
    for _ in range(2):
        h = _relu_conv(g, t, 16, 12)
        t = g.op("Relu", g.op("Add", g.conv(h, 12, 16), t))
    return g.model(g.conv(t, 16, 4))


def concat_of_three() -> Model:
    g = Graph(8, 8, 8)
    parts = [_relu_conv(g, "x", 8, width) for width in (16, 12, 8)]
    joined = g.op("Concat", *parts, axis=1)
    return g.model(g.conv(_relu_conv(g, joined, 36, 48, kernel=1), 48, 4))


def depthwise() -> Model:
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16, kernel=1)
    t = _relu_conv(g, t, 16, 16, group=16)
    t = _relu_conv(g, t, 16, 24, kernel=1)
    return g.model(g.conv(_relu_conv(g, t, 24, 48, group=24), 48, 4))


def whole_groups_go() -> Model:
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16)
    return g.model(g.conv(_relu_conv(g, t, 16, 16, group=8), 16, 4))


def a_channel_of_every_group_goes() -> Model:
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16)
    return g.model(g.conv(_relu_conv(g, t, 16, 24, group=2), 24, 4))


def transposed() -> Model:
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16)
    attrs = {"strides": [2, 2], "pads": [1] * 4}
    t = g.op("Relu", g.op("ConvTranspose", t, g.w(16, 12, 4, 4), g.w(12), **attrs))
    attrs |= {"group": 2, "output_padding": [1, 1]}
    t = g.op("Relu", g.op("ConvTranspose", t, g.w(12, 8, 3, 3), g.w(16), **attrs))
    return g.model(g.conv(t, 16, 4))


def slope_in_two_places() -> Model:
    g = Graph(8, 8, 8)
    slope = g.constant(np.full((16, 1, 1), 0.25, np.float32))
    t = g.op("PRelu", g.conv("x", 8, 16), slope)
    return g.model(g.conv(g.op("PRelu", g.conv(t, 16, 16), slope), 16, 8))


def bias_that_others_read() -> Model:
    """What merging equal initializers makes of zeros: biases of Conv and of BatchNorm."""
    g = Graph(8, 8, 8)
    zeros = g.constant(np.zeros(16, np.float32))
    t, inputs = "x", 8
    for _ in range(2):
        t = g.op("Conv", t, g.w(16, inputs, 3, 3), zeros, pads=[1] * 4)
        scale, mean = g.w(16), g.w(16)
        variance = g.constant(np.ones(16, np.float32))
        t = g.op("BatchNormalization", g.op("Relu", t), scale, zeros, mean, variance)
        t, inputs = g.op("Sigmoid", t), 16
    return g.model(g.conv(_relu_conv(g, t, 16, 16), 16, 8))


def channels_along_rows() -> Model:
    """Products with a constant and with an activation, in which channels are rows."""
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16, kernel=1)
    t = g.op("Relu", g.op("MatMul", t, g.w(8, 8)))
    t = g.op("MatMul", t, g.op("Sigmoid", g.conv("x", 8, 1)))
    return g.model(g.conv(t, 16, 8))


def weight_in_three_places() -> Model:
    g = Graph(16, 8, 8)
    weight, bias, t = g.w(16, 16, 3, 3), g.w(16), "x"
    for _ in range(3):
        t = g.op("Relu", g.op("Conv", t, weight, bias, pads=[1] * 4))
    return g.model(g.conv(_relu_conv(g, t, 16, 24), 24, 4))


def twins() -> Model:
    """Two branches of the same weights and biases, as siamese networks have them."""
    g = Graph(8, 8, 8)
    first, second, bias = g.w(16, 8, 3, 3), g.w(16, 16, 3, 3), g.w(16)
    ends = []
    for x in ("x", g.op("Neg", "x")):
        t = g.op("Relu", g.op("Conv", x, first, bias, pads=[1] * 4))
        ends.append(g.op("Relu", g.op("Conv", t, second, bias, pads=[1] * 4)))
    return g.model(g.conv(g.op("Sub", *ends), 16, 4))


def fully_connected() -> Model:
    g = Graph(8, 4, 4)
    t = g.op("Flatten", _relu_conv(g, "x", 8, 16))
    t = g.op("Relu", g.op("Gemm", t, g.w(24, 256), g.w(24), transB=1))
    t = g.op("Relu", g.op("Add", g.op("MatMul", t, g.w(24, 20)), g.w(20)))
    return g.model(g.op("Gemm", t, g.w(20, 5)))


def one_dimension() -> Model:
    g = Graph(8, 20)
    t = g.op("Relu", g.op("Conv", "x", g.w(16, 8, 5), g.w(16), strides=[2]))
    return g.model(g.op("Conv", t, g.w(8, 16, 3), g.w(8)))


def three_dimensions() -> Model:
    g = Graph(4, 6, 6, 6)
    t = g.op("Relu", g.op("Conv", "x", g.w(16, 4, 3, 3, 3), g.w(16)))
    return g.model(g.op("Conv", t, g.w(8, 16, 3, 3, 3), g.w(8)))


def shuffle() -> Model:
    g = Graph(8, 8, 8)
    left, right = g.ops("Split", _relu_conv(g, "x", 8, 16), outputs=2, axis=1)
    return g.model(g.conv(g.op("Concat", left, _relu_conv(g, right, 8, 8), axis=1), 16, 4))


def squeeze_excite() -> Model:
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16)
    s = _relu_conv(g, g.op("GlobalAveragePool", t), 16, 8, kernel=1)
    s = g.op("Sigmoid", g.conv(s, 8, 16, kernel=1))
    return g.model(g.conv(g.op("Mul", t, s), 16, 4))


def two_heads() -> Model:
    """An early Softmax head, an integer output, and a last head."""
    g = Graph(8, 8, 8)
    t = _relu_conv(g, "x", 8, 16)
    early = g.op("Softmax", g.op("Gemm", g.mean(t), g.w(16, 5), g.w(5)))
    t = _relu_conv(g, t, 16, 16)
    late = g.conv(t, 16, 4)
    return g.model(early, g.op("ArgMax", late, axis=1), late)


def channels_last() -> Model:
    """What tf2onnx makes: Transpose at both ends, a bias as Add, MatMul as the head."""
    g = Graph(8, 8, 6)
    t = g.op("Transpose", "x", perm=[0, 3, 1, 2])
    t = g.op("Relu", g.op("Conv", t, g.w(16, 6, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]))
    t = g.op("Relu", g.op("Add", g.op("Conv", t, g.w(16, 16, 1, 1)), g.w(1, 16, 1, 1)))
    t = g.op("Transpose", t, perm=[0, 2, 3, 1])
    t = g.op("ReduceMean", t, axes=[1, 2], keepdims=0)
    return g.model(g.op("Add", g.op("MatMul", t, g.w(16, 5)), g.w(5)))


CASES: dict[str, Callable[[], Model]] = {
    make.__name__: make
    for make in (
        residual,
        concat_of_three,
        depthwise,
        whole_groups_go,
        a_channel_of_every_group_goes,
        transposed,
        slope_in_two_places,
        bias_that_others_read,
        channels_along_rows,
        weight_in_three_places,
        twins,
        fully_connected,
        one_dimension,
        three_dimensions,
        shuffle,
        squeeze_excite,
        two_heads,
        channels_last,
    )
}
