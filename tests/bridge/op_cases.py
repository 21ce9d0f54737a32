"""One-node graphs: elementwise operators, layers, pooling, normalisation, reductions."""

from collections.abc import Iterator

import numpy as np

from tests.bridge.op_graphs import Case, Fixed, fixed, floats, ints, scalar, uniform

_IMAGE = floats(2, 4, 7, 6)
_UNARY = {
    **dict.fromkeys(("Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity"), _IMAGE),
    **dict.fromkeys(("Neg", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh"), _IMAGE),
    **dict.fromkeys(("Cosh", "Softplus", "Softsign", "Tan", "Tanh", "Asinh"), _IMAGE),
    **dict.fromkeys(("Acos", "Asin", "Atanh"), uniform(3, 5, low=-0.9, high=0.9)),
    **dict.fromkeys(("Log", "Reciprocal", "Sqrt"), uniform(3, 5, low=0.1, high=3)),
    "Acosh": uniform(3, 5, low=1.1, high=4),
}
_BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
_COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_OPSETS = (11, 13, 17, 22)


def elementwise() -> Iterator[Case]:
    for op, x in _UNARY.items():
        yield Case(op, (x,))
    for opset in _OPSETS:
        yield Case("Relu", (_IMAGE,), opset=opset, note="over opsets")
        yield Case("Add", (_IMAGE, fixed(4, 1, 1)), opset=opset, note="over opsets")
        bounds = (scalar(-0.3), scalar(0.7))
        yield Case("Clip", (_IMAGE, *bounds), opset=opset)
    for op in _BINARY:
        yield Case(op, (_IMAGE, floats(4, 1, 6)))
        yield Case(op, (_IMAGE, fixed(1, 4, 1, 1)), note="constant")
    whole = np.array([7, -7, 9, -2], np.int64)
    yield Case("Div", (whole, np.array([2, 2, -4, 3], np.int64)), note="integers")
    for op in _COMPARED:
        yield Case(op, (whole, np.array([7, 2, -4, -2], np.int64)))
    for op in ("And", "Or", "Xor"):
        yield Case(op, (whole > 0, whole > 7))
    yield Case("Not", (whole > 0,))
    yield Case("Where", (_IMAGE > 0, _IMAGE, fixed(1, 1, 1, 1)))
    yield Case("Mod", (whole, np.array([4, 4, -4, 3], np.int64)))
    yield Case("Mod", (_IMAGE, fixed(1)), {"fmod": 1}, note="fmod")
    yield Case("Pow", (uniform(3, 4), scalar(2.5)))
    yield Case("Pow", (_IMAGE, scalar(2.0)), opset=11, note="square")
    yield Case("Pow", (uniform(3, 4), floats(3, 4)), note="of data")
    yield Case("Max", (_IMAGE, floats(4, 1, 6), floats(1, seed=2)), note="of three")
    yield Case("Clip", (_IMAGE,), {"min": -0.5, "max": 0.5}, opset=7)
    yield Case("Clip", (_IMAGE, None, scalar(0.1)), note="above")
    yield Case("Clip", (_IMAGE, scalar(0.1)), note="below")
    yield Case("IsNaN", (_IMAGE,))
    yield Case("IsInf", (np.array([1, np.inf, -np.inf], np.float32),), {"detect_negative": 0})
    yield Case("Cast", (_IMAGE,), {"to": 7}, note="to int64")
    yield Case("Cast", (whole,), {"to": 1}, note="to float")
    yield Case("Cast", (_IMAGE,), {"to": 9}, note="to bool")
    yield Case("CastLike", (whole, fixed(1)))


def activations() -> Iterator[Case]:
    yield Case("LeakyRelu", (_IMAGE,), {"alpha": 0.2})
    yield Case("Elu", (_IMAGE,), {"alpha": 0.7})
    yield Case("Selu", (_IMAGE,), {"alpha": 1.5, "gamma": 1.1})
    yield Case("Celu", (_IMAGE,), {"alpha": 0.5})
    yield Case("ThresholdedRelu", (_IMAGE,), {"alpha": 0.5})
    yield Case("HardSigmoid", (_IMAGE,), {"alpha": 0.3, "beta": 0.4})
    yield Case("HardSwish", (_IMAGE,), opset=14)
    yield Case("HardSwish", (_IMAGE,), opset=22)
    yield Case("Mish", (_IMAGE,), opset=18)
    yield Case("Gelu", (_IMAGE,), opset=20)
    yield Case("Gelu", (_IMAGE,), {"approximate": "tanh"}, opset=20, note="tanh")
    yield Case("Swish", (_IMAGE,), {"alpha": 1.3}, opset=24)
    yield Case("PRelu", (_IMAGE, fixed(4, 1, 1)))
    yield Case("PRelu", (_IMAGE, fixed(1)), note="one slope")
    yield Case("PRelu", (_IMAGE, fixed(1, 4, 7, 1)), note="rows")
    yield Case("PRelu", (floats(2, 4), fixed(4)), note="of rank 2")
    yield Case("Dropout", (_IMAGE,), {"ratio": 0.4}, opset=7)
    yield Case("Dropout", (_IMAGE, scalar(0.4)))
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        for opset in (11, 13):
            yield Case(op, (_IMAGE,), opset=opset)
            yield Case(op, (_IMAGE,), {"axis": 2}, opset=opset, note="axis 2")


def linear() -> Iterator[Case]:
    x, w, b = floats(2, 4, 9, 8), fixed(6, 4, 3, 3), fixed(6)
    for opset in (7, *_OPSETS):
        yield Case("Conv", (x, w, b), {"kernel_shape": [3, 3], "pads": [1] * 4}, opset=opset)
    yield Case("Conv", (x, w), note="without kernel_shape")
    yield Case("Conv", (x, w, b), {"pads": [0, 1, 2, 0]}, note="asymmetric pads")
    strided = {"strides": [2, 3], "dilations": [2, 1]}
    yield Case("Conv", (x, w, b), strided | {"pads": [2, 1, 2, 1]}, note="dilated")
    for way in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        yield Case("Conv", (x, w, b), {"auto_pad": way, "strides": [2, 2]}, note=way)
    yield Case("Conv", (x, fixed(8, 2, 3, 3), fixed(8)), {"group": 2}, note="groups")
    yield Case("Conv", (x, fixed(4, 1, 3, 3), fixed(4)), {"group": 4}, note="depthwise")
    yield Case("Conv", (floats(2, 3, 11), fixed(5, 3, 4), fixed(5)), note="1D")
    yield Case("Conv", (floats(1, 2, 5, 6, 4), fixed(3, 2, 2, 3, 2)), note="3D")
    up, u, v = {"strides": [2, 2]}, fixed(4, 6, 3, 3), fixed(6)
    yield Case("ConvTranspose", (x, u, v), up | {"pads": [1] * 4, "output_padding": [1, 1]})
    yield Case("ConvTranspose", (x, u, v), up | {"pads": [0, 1, 1, 0]}, note="asymmetric")
    yield Case("ConvTranspose", (x, u, v), up | {"output_padding": [1, 0]}, note="no pads")
    yield Case("ConvTranspose", (x, u), up | {"output_shape": [19, 17]}, note="output_shape")
    yield Case("ConvTranspose", (x, u, v), up | {"auto_pad": "SAME_UPPER"}, note="SAME_UPPER")
    yield Case("ConvTranspose", (x, u, v), up | {"auto_pad": "SAME_LOWER"}, note="SAME_LOWER")
    yield Case("ConvTranspose", (x, fixed(4, 3, 2, 2)), up | {"group": 2}, note="groups")
    spread = {"dilations": [2, 2], "pads": [1, 1, 1, 1]}
    yield Case("ConvTranspose", (x, u, v), spread, opset=22, note="dilated")
    yield Case("ConvTranspose", (floats(2, 3, 7), fixed(3, 4, 3)), note="1D")
    rows = floats(3, 5)
    yield Case("Gemm", (rows, fixed(5, 4), fixed(4)))
    yield Case(
        "Gemm", (rows, fixed(4, 5), fixed(1, 4)), {"transB": 1, "alpha": 0.5}, note="rows"
    )
    yield Case("Gemm", (floats(5, 3), fixed(5, 4)), {"transA": 1, "alpha": 2.0}, note="no C")
    yield Case("Gemm", (rows, fixed(5, 4), fixed(3, 1)), {"beta": 0.3}, note="column")
    yield Case("MatMul", (floats(2, 3, 5), fixed(5, 4)))
    yield Case("MatMul", (floats(2, 3, 5), floats(2, 5, 4)), note="of data")
    yield Case("MatMul", (fixed(4, 3), floats(3, 5)), note="constant first")
    yield Case("Einsum", (floats(2, 3, 5), fixed(5, 4)), {"equation": "bij, jk -> bik"})
    yield Case("DequantizeLinear", (np.arange(8, dtype=np.uint8), scalar(0.1)), opset=13)
    by_axis = (Fixed(np.array([0.1, 0.2], np.float32)), Fixed(np.array([3, 1], np.int8)))
    table = np.arange(8, dtype=np.int8).reshape(4, 2)
    yield Case("DequantizeLinear", (table, *by_axis), opset=13, note="by axis")


def pooling() -> Iterator[Case]:
    x, k = floats(2, 3, 10, 9), {"kernel_shape": [3, 3]}
    two = {"kernel_shape": [3, 3], "strides": [2, 2]}
    for op in ("MaxPool", "AveragePool"):
        for opset in (7, 11, 19, 22):
            yield Case(op, (x,), two | {"pads": [1] * 4}, opset=opset)
        yield Case(op, (x,), two | {"pads": [0, 1, 1, 0]}, note="asymmetric")
        yield Case(op, (x,), two | {"pads": [1, 0, 0, 0]}, note="one-sided")
        for opset in (11, 19):
            ceil = two | {"ceil_mode": 1}
            yield Case(op, (x,), ceil, opset=opset, note="ceil")
            yield Case(op, (x,), ceil | {"pads": [1] * 4}, opset=opset, note="ceil, pads")
            late = {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [1] * 4, "ceil_mode": 1}
            yield Case(op, (x,), late, opset=opset, note="ceil, last window outside")
        for way in ("SAME_UPPER", "SAME_LOWER", "VALID"):
            yield Case(op, (x,), two | {"auto_pad": way}, note=way)
        yield Case(op, (floats(2, 3, 9),), {"kernel_shape": [4], "strides": [2]}, note="1D")
        yield Case(op, (floats(1, 2, 5, 6, 4),), {"kernel_shape": [2, 3, 2]}, note="3D")
    yield Case("MaxPool", (x,), k | {"dilations": [2, 3]}, opset=12, note="dilated")
    yield Case("MaxPool", (np.arange(25, dtype=np.int8).reshape(1, 1, 5, 5),), k, note="int8")
    every = {"count_include_pad": 1, "pads": [1] * 4}
    yield Case("AveragePool", (x,), two | every, note="pads count")
    yield Case("AveragePool", (x,), two | every | {"ceil_mode": 1}, opset=19, note="both")
    uneven = {"count_include_pad": 1, "pads": [0, 1, 1, 0]}
    yield Case("AveragePool", (x,), two | uneven, note="asymmetric pads count")
    yield Case("AveragePool", (x,), k | {"dilations": [2, 1]}, opset=19, note="dilated")
    yield Case("LpPool", (x,), two | {"p": 3})
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        yield Case(op, (x,))


def normalisation() -> Iterator[Case]:
    x, four = _IMAGE, (fixed(4), fixed(4, seed=2))
    moments = (fixed(4, seed=3), Fixed(uniform(4, low=0.5, high=2)))
    for opset in (7, 9, 14, 15):
        yield Case("BatchNormalization", (x, *four, *moments), {"epsilon": 1e-2}, opset=opset)
    yield Case("BatchNormalization", (floats(3, 4), *four, *moments), note="rank 2")
    yield Case("InstanceNormalization", (x, *four), {"epsilon": 1e-2})
    yield Case("InstanceNormalization", (floats(2, 4, 9), *four), opset=22, note="1D")
    yield Case("LayerNormalization", (x, fixed(6), fixed(6, seed=2)))
    yield Case(
        "LayerNormalization", (x, fixed(7, 6)), {"axis": 2, "epsilon": 1e-2}, note="two axes"
    )
    yield Case("LayerNormalization", (x, fixed(1), fixed(6)), note="one scale")
    yield Case("RMSNormalization", (x, fixed(6)), opset=23)
    by_group = (fixed(2), fixed(2, seed=2))
    yield Case("GroupNormalization", (x, *by_group), {"num_groups": 2}, opset=18)
    yield Case("GroupNormalization", (x, *four), {"num_groups": 2}, opset=21)
    for size in (3, 5):
        attrs = {"size": size, "alpha": 0.5, "beta": 0.6, "bias": 1.5}
        yield Case("LRN", (floats(2, 7, 3, 3),), attrs, note=f"size {size}")
    yield Case("LpNormalization", (x,), {"axis": 1, "p": 1}, note="L1")
    yield Case("LpNormalization", (x,))
    yield Case("MeanVarianceNormalization", (x,))
    heads = (floats(2, 2, 5, 8), floats(2, 2, 6, 8, seed=1), floats(2, 2, 6, 8, seed=2))
    yield Case("Attention", heads, opset=23)
    yield Case("Attention", (*heads, floats(5, 6)), {"scale": 0.2}, opset=23, note="mask")
    flat = tuple(floats(2, 5, 16, seed=i) for i in range(3))
    three = {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}
    yield Case("Attention", flat, three, opset=23, note="causal")
    yield Case("Attention", (*flat, floats(5, 5)), three, opset=23, note="causal, mask")


def reductions() -> Iterator[Case]:
    x = uniform(2, 3, 4, low=0.2, high=2)
    ops = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    for name in ops:
        op = f"Reduce{name}"
        yield Case(op, (x,), {"axes": [1, -1], "keepdims": 0}, opset=11)
        yield Case(op, (x, ints(0, 2)), opset=18)
        yield Case(op, (x,), opset=18, note="all axes")
        idle = {"noop_with_empty_axes": 1}
        if name in ("Max", "Mean", "Min", "Prod", "Sum"):
            yield Case(op, (x, ints()), idle, opset=18, note="no axes")
    yield Case("ReduceSum", (x, ints(1)), {"keepdims": 0}, opset=13)
    yield Case(
        "ReduceSum", (np.arange(6, dtype=np.int32).reshape(2, 3), ints(1)), note="int32"
    )
    for op in ("ArgMax", "ArgMin"):
        yield Case(op, (x,), {"axis": 1})
        same = np.array([[1, 3, 3], [2, 2, 0]], np.float32)
        last = {"axis": 1, "keepdims": 0, "select_last_index": 1}
        yield Case(op, (same,), last, note="last")
    yield Case("TopK", (x, ints(2)), outputs=2)
    yield Case("TopK", (x, ints(2)), {"axis": 1, "largest": 0}, outputs=2, note="smallest")
    yield Case("CumSum", (x, scalar(1, np.int64)))
    back = {"exclusive": 1, "reverse": 1}
    yield Case("CumSum", (x, scalar(-1, np.int64)), back, note="backwards")


CASES = tuple(
    case
    for family in (elementwise, activations, linear, pooling, normalisation, reductions)
    for case in family()
)
