"""Small graphs, one per way in which channels pass, with the groups that may shrink."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcomp.model import Model
from tests.analysis.channel_graphs import LAST, Graph, head

Case = Callable[[], Model]
CASES: dict[str, tuple[Case, list[int]]] = {}


def case(*sizes: int) -> Callable[[Case], Case]:
    """A graph and the sizes of its groups that may shrink."""

    def add(function: Case) -> Case:
        CASES[function.__name__] = function, sorted(sizes)
        return function

    return add


@case(8)
def chain() -> Model:
    g = Graph(3, 6, 6)
    x = g.op("Relu", g.bn(g.conv("x", 3, 8), 8))
    return head(g, g.op("MaxPool", x, kernel_shape=[2, 2]), 8)


@case(6, 5)
def residual() -> Model:
    g = Graph(3, 6, 6)
    stem = g.op("Relu", g.conv("x", 3, 6))
    inner = g.op("LeakyRelu", g.conv(stem, 6, 5))
    return head(g, g.op("Add", stem, g.conv(inner, 5, 6)), 6)


@case(4, 5)
def concat_with_input_and_constant() -> Model:
    g = Graph(3, 4, 4)
    a, b = g.conv("x", 3, 4), g.conv("x", 3, 5)
    fixed = g.constant(np.ones((1, 2, 4, 4), np.float32))
    rows = g.op("Concat", g.op("Shape", "x", end=1), g.ints(1, 1, 1), axis=0)
    both = g.op("Concat", a, "x", b, g.op("Tile", fixed, rows), a, axis=1)
    return head(g, both, 4 + 3 + 5 + 2 + 4)


@case(4)
def concat_along_space() -> Model:
    g = Graph(3, 4, 4)
    both = g.op("Concat", g.conv("x", 3, 4), g.conv("x", 3, 4), axis=2)
    return head(g, g.op("Concat", both, both, axis=3), 4)


@case(6)
def depthwise() -> Model:
    g = Graph(3, 6, 6)
    x = g.conv(g.conv("x", 3, 6), 6, 6, group=6)
    return head(g, g.conv(g.op("Clip", x), 6, 12, group=6), 12)


@case(4, 6)
def grouped_few() -> Model:
    g = Graph(3, 6, 6)
    return head(g, g.conv(g.conv("x", 3, 8), 8, 12, group=2), 12)


@case(4)
def grouped_many() -> Model:
    g = Graph(3, 6, 6)
    return head(g, g.conv(g.conv("x", 3, 8), 8, 12, group=4), 12)


@case(4)
def grouped_on_the_input() -> Model:
    g = Graph(3, 6, 6)
    return head(g, g.conv("x", 3, 12, group=3), 12)


@case(6, 2, 3)
def transposed_convolutions() -> Model:
    g = Graph(3, 4, 4)
    x = g.op("ConvTranspose", g.conv("x", 3, 6), g.w(6, 4, 2, 2), g.w(4), strides=[2, 2])
    x = g.op("ConvTranspose", g.op("Relu", x), g.w(4, 6, 2, 2), group=2)
    x = g.op("ConvTranspose", g.op("Relu", x), g.w(12, 1, 2, 2), group=12)
    return head(g, g.op("ConvTranspose", x, g.w(12, 2, 2, 2), group=6), 12)


@case(8, 4)
def squeeze_excite() -> Model:
    g = Graph(3, 6, 6)
    x = g.conv("x", 3, 8)
    s = g.op("Relu", g.conv(g.op("GlobalAveragePool", x), 8, 4, kernel=1))
    s = g.op("HardSigmoid", g.conv(s, 4, 8, kernel=1))
    return head(g, g.op("Mul", x, s), 8)


@case(8, 4)
def squeeze_excite_by_matmul() -> Model:
    g = Graph(3, 6, 6)
    x = g.conv("x", 3, 8)
    s = g.op("ReduceMean", x, axes=[2, 3], keepdims=0)
    s = g.op("Add", g.op("MatMul", s, g.w(8, 4)), g.w(4))
    s = g.op("Sigmoid", g.op("MatMul", g.op("Relu", s), g.w(4, 8)))
    s = g.op("Reshape", s, g.ints(-1, 8, 1, 1))
    return head(g, g.op("Mul", x, s), 8)


@case(3, 3)
def shuffle() -> Model:
    g = Graph(3, 4, 4)
    both = g.op("Concat", g.conv("x", 3, 6), g.conv("x", 3, 6), axis=1)
    split = g.op("Reshape", both, g.ints(0, 2, 6, 4, 4))
    turned = g.op("Transpose", split, perm=[0, 2, 1, 3, 4])
    merged = g.op("Reshape", turned, g.ints(0, -1, 4, 4))
    left = g.op("Slice", merged, g.ints(0), g.ints(6), g.ints(1))
    right = g.op("Slice", merged, g.ints(6), g.ints(LAST), g.ints(1))
    return g.model(g.conv(left, 6, 2), g.conv(right, 6, 2))


@case(4, 4)
def padded_shortcut() -> Model:
    g = Graph(3, 8, 8)
    stem = g.op("Relu", g.conv("x", 3, 4))
    steps = g.op("Slice", stem, g.ints(0, 0), g.ints(LAST, LAST), g.ints(2, 3), g.ints(2, 2))
    short = g.op("Pad", steps, g.ints(0, 2, 0, 0, 0, 2, 0, 0))
    long = g.conv(stem, 4, 8, strides=[2, 2])
    return head(g, g.op("Relu", g.op("Add", long, short)), 8)


@case(4, 4)
def padded_shortcut_by_computed_pads() -> Model:
    g = Graph(3, 8, 8)
    stem = g.op("Relu", g.conv("x", 3, 4))
    half = g.op("Constant", value=numpy_helper.from_array(np.array([0, 0, 0, 0, 2, 2, 0, 0])))
    pairs = g.op("Reshape", half, g.ints(-1, 2))
    order = g.op("Slice", pairs, g.ints(-1), g.ints(-LAST), g.ints(0), g.ints(-1))
    flat = g.op("Reshape", g.op("Transpose", order, perm=[1, 0]), g.ints(-1))
    pads = g.op("Cast", flat, to=onnx.TensorProto.INT64)
    short = g.op("Pad", stem, pads, g.constant(np.float32(0)))
    return head(g, g.op("Add", g.conv(stem, 4, 8), short), 8)


@case(3, 3, 2, 2)
def old_attributes() -> Model:
    g = Graph(3, 8, 8, opset=9)
    x = g.op("Pad", g.conv("x", 3, 6), pads=[0, 1, 0, 0, 0, 3, 0, 0])
    x = g.op("Slice", x, axes=[1, 2], starts=[-9, 0], ends=[-1, 9])
    a, b = g.ops("Split", x, outputs=2, axis=1, split=[3, 5])
    up = g.op("Upsample", a, g.constant(np.array([1, 1, 2, 2], np.float32)))
    x = g.op("Concat", g.op("MaxPool", up, kernel_shape=[2, 2], strides=[2, 2]), b, axis=1)
    x = g.op("Unsqueeze", g.op("Reshape", x, g.ints(0, 8, -1)), axes=[3])
    return g.model(g.conv(g.op("Squeeze", g.op("Unsqueeze", x, axes=[1]), axes=[1]), 8, 2))


@case(5, 7)
def flatten_to_gemm() -> Model:
    g = Graph(3, 4, 4)
    x = g.op("Flatten", g.op("Relu", g.conv("x", 3, 5)))
    x = g.op("Relu", g.op("Gemm", x, g.w(7, 80), g.w(7), transB=1))
    return g.model(g.op("Gemm", x, g.w(7, 4), g.w(1, 4)))


@case(5, 6)
def flatten_channels_last() -> Model:
    g = Graph(4, 4, 3)
    x = g.conv(g.op("Transpose", "x", perm=[0, 3, 1, 2]), 3, 5)
    x = g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 3, 1]), g.ints(-1, 80))
    x = g.op("Softplus", g.op("Add", g.op("MatMul", x, g.w(80, 6)), g.w(6)))
    return g.model(g.op("MatMul", x, g.w(6, 4)))


@case(5, 6, 7)
def gemm_with_activations() -> Model:
    g = Graph(3, 4, 4)
    a, b = g.mean(g.conv("x", 3, 5)), g.mean(g.conv("x", 3, 6))
    x = g.op("Gemm", a, g.w(5, 6), b, alpha=0.5, beta=2.0)
    x = g.op("Gemm", g.op("Transpose", x, perm=[1, 0]), g.w(6, 7), transA=1)
    return g.model(g.op("Gemm", x, g.w(7, 4)))


@case(6, 8)
def matmul_from_the_left() -> Model:
    g = Graph(5, 7)
    x = g.op("Relu", g.op("MatMul", g.w(6, 5), "x"))
    x = g.op("Relu", g.op("MatMul", x, g.w(1, 7, 8)))
    x = g.op("MatMul", g.w(4, 6), x)
    return g.model(g.op("MatMul", g.op("Tanh", x), g.w(8, 2)))


@case(7)
def attention() -> Model:
    g = Graph(6, 5)
    q, k, v = (g.op("MatMul", "x", g.w(5, size)) for size in (4, 4, 7))
    scores = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    return g.model(g.op("MatMul", g.op("MatMul", scores, v), g.w(7, 3)))


@case(2, 4)
def splits() -> Model:
    g = Graph(3, 4, 4, opset=18)
    x = g.conv("x", 3, 9)
    a, b, c = g.ops("Split", x, outputs=3, axis=1, num_outputs=3)
    d, e = g.ops("Split", g.op("Relu", x), g.ints(2, 7), outputs=2, axis=1)
    left, right = g.ops("Split", g.conv(d, 2, 4), outputs=2, axis=3, num_outputs=2)
    x = g.op("Mul", g.op("Add", a, b), g.op("Sigmoid", c))
    return g.model(g.conv(x, 3, 2), g.conv(e, 7, 2), g.conv(g.op("Sub", left, right), 4, 2))


@case(4, 4)
def implicit_split() -> Model:
    g = Graph(3, 4, 4, opset=13)
    a, b = g.ops("Split", g.conv("x", 3, 8), outputs=2, axis=1)
    return g.model(g.conv(a, 4, 2), g.conv(b, 4, 3))


@case(4, 4)
def implicit_split_by_attribute() -> Model:
    g = Graph(3, 4, 4, opset=11)
    a, b = g.ops("Split", g.conv("x", 3, 8), outputs=2, axis=1)
    return g.model(g.conv(a, 4, 2), g.conv(b, 4, 3))


@case(5, 3)
def slices() -> Model:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 8)
    end = g.ints(-2)
    a = g.op("Slice", x, g.ints(-7), end, g.ints(-3))
    b = g.op("Slice", x, g.ints(1), end, g.ints(2))
    return g.model(g.conv(a, 5, 2), g.conv(b, 8, 2))


@case(3, 4)
def gather() -> Model:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 8)
    a = g.op("Gather", x, g.ints(7, 0, 3, -2, 3), axis=1)
    rows = g.op("Gather", g.op("Relu", x), g.constant(np.array([[0, 2], [3, 1]])), axis=2)
    rows = g.op("Transpose", rows, perm=[0, 2, 3, 4, 1])
    return g.model(g.conv(a, 5, 2), g.op("MatMul", rows, g.w(8, 2)))


@case(6, 5)
def resizes() -> Model:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 6)
    a = g.op("Resize", x, "", g.constant(np.array([1, 1, 2, 2], np.float32)))
    sizes = g.op("Concat", g.op("Shape", x, end=2), g.ints(8, 8), axis=0)
    b = g.op("Resize", g.conv("x", 3, 6), "", "", sizes)
    fixed = g.op("Concat", g.op("Shape", x, end=1), g.ints(5, 8, 8), axis=0)
    c = g.op("Resize", g.conv("x", 3, 5), "", "", fixed)
    return g.model(g.conv(g.op("Add", a, b), 6, 3), g.conv(c, 5, 2))


@case(6)
def reshape_to_own_shape() -> Model:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 6)
    y = g.op("Reshape", g.conv(x, 6, 6), g.op("Shape", x))
    return head(g, y, 6)


@case(6)
def reshape_to_mixed_target() -> Model:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 6)
    y = g.op("Reshape", x, g.target(x, 0, 6, -1))
    y = g.op("Transpose", y, perm=[0, 2, 1])
    return g.model(g.op("MatMul", y, g.w(6, 3)), g.conv(x, 6, 2))


@case(4)
def group_norm() -> Model:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 8)
    y = g.op("Reshape", x, g.ints(0, 4, -1))
    y = g.op("InstanceNormalization", y, g.w(4), g.w(4))
    y = g.op("Reshape", y, g.op("Shape", x))
    return head(g, g.op("Add", g.op("Mul", y, g.w(8, 1, 1)), g.w(8, 1, 1)), 8)


@case(6)
def reductions() -> Model:
    g = Graph(3, 4, 4, opset=18)
    x = g.conv("x", 3, 6)
    a = g.op("ReduceMax", x, g.ints(-1, 2), keepdims=0)
    b = g.op("ReduceL2", g.op("Exp", x), g.ints(0), keepdims=1)
    return g.model(g.op("Gemm", a, g.w(6, 3)), g.conv(b, 6, 2))


@case(6)
def softmax_over_space() -> Model:
    g = Graph(3, 4, 4)
    return head(g, g.op("Softmax", g.conv("x", 3, 6), axis=2), 6)


@case(3, 3, 5)
def blocks_of_depth() -> Model:
    g = Graph(3, 4, 4)
    a = g.op("DepthToSpace", g.conv("x", 3, 12), blocksize=2)
    b = g.op("DepthToSpace", g.conv("x", 3, 12), blocksize=2, mode="CRD")
    c = g.op("SpaceToDepth", g.conv("x", 3, 5), blocksize=2)
    return g.model(g.conv(a, 3, 2), g.conv(b, 3, 2), g.conv(c, 20, 2))


@case(5)
def expand_and_tile() -> Model:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 5)
    s = g.op("GlobalMaxPool", x)
    a = g.op("Expand", s, g.op("Shape", x))
    b = g.op("Expand", s, g.ints(5, 4, 1))
    c = g.op("Tile", s, g.ints(1, 2, 4, 4))
    return g.model(g.conv(g.op("Add", a, b), 5, 2), g.conv(c, 10, 2))


@case(5)
def elementwise_constants() -> Model:
    g = Graph(3, 4, 4)
    x = g.op("PRelu", g.conv("x", 3, 5), g.w(5, 1, 1))
    x = g.op("Mul", g.op("Sub", g.w(1, 5, 4, 4), x), g.w(1))
    x = g.op("Where", g.op("Greater", x, g.w(5, 1, 1)), x, g.constant(np.float32(0.1)))
    x = g.op("Max", x, g.w(5, 1, 4), g.w(4))
    return head(g, g.op("Dropout", g.op("Identity", x)), 5)


@case(5)
def instance_norm() -> Model:
    g = Graph(3, 4, 4)
    x = g.op("InstanceNormalization", g.conv("x", 3, 5), g.w(5), g.w(5))
    return head(g, g.op("LayerNormalization", x, g.w(4), g.w(4)), 5)


@case(6)
def one_dimensional() -> Model:
    g = Graph(3, 9)
    x = g.op("Conv", "x", g.w(6, 3, 3), g.w(6))
    x = g.op("AveragePool", g.bn(x, 6), kernel_shape=[2])
    return g.model(g.op("Conv", x, g.w(2, 6, 3)))


@case(6, 6)
def shared_in_different_parts() -> Model:
    """One bias and one BatchNorm, read by branches that shrink apart from each other."""
    g = Graph(3, 4, 4)
    bias, params = g.w(6), [g.w(6), g.w(6), g.w(6)]
    variance = g.constant(np.full(6, 0.7, np.float32))
    branches = []
    for _ in range(2):
        x = g.op("Conv", "x", g.w(6, 3, 1, 1), bias)
        x = g.op("BatchNormalization", x, *params, variance)
        branches.append(g.conv(g.op("Relu", x), 6, 3))
    return g.model(g.op("Add", *branches))


@case(4)
def shared_through_identity() -> Model:
    g = Graph(4, 4, 4)
    weight = g.w(4, 4, 3, 3)
    same = g.op("Identity", weight)
    x = g.op("Conv", g.conv("x", 4, 4), weight, pads=[1] * 4)
    x = g.op("Conv", g.op("Relu", x), same, pads=[1] * 4)
    return head(g, x, 4)


@case(5)
def weights_as_constant_nodes() -> Model:
    g = Graph(3, 4, 4)
    weight = g.rng.standard_normal((5, 3, 1, 1)).astype(np.float32)
    x = g.op("Conv", "x", g.op("Constant", value=numpy_helper.from_array(weight)), g.w(5))
    x = g.op("Add", x, g.op("Constant", value=numpy_helper.from_array(weight[:, :1, 0])))
    return head(g, x, 5)


@case(6, 6)
def target_shared_by_two() -> Model:
    g = Graph(3, 4, 4)
    target = g.ints(0, 6, 16)
    a, b = (g.op("Reshape", g.conv("x", 3, 6), target) for _ in range(2))
    ends = (g.op("MatMul", g.op("Transpose", y, perm=[0, 2, 1]), g.w(6, 2)) for y in (a, b))
    return g.model(*ends)
