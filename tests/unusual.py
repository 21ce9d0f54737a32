"""Models with local functions, and quantised ones."""

import numpy as np
from onnx import numpy_helper, parser

from onnxcomp.model import Array, Model
from tests.passes.exact_checks import graph, normal

CALLING = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[N,CHANNELS,8,8] x) => (float[N,5] y) {
  a = local.Block<pads = [1, 1, 1, 1]>(x, w0, b0)
  b = local.Block<pads = [0, 0, 0, 0]>(a, w1, b1)
  p = GlobalAveragePool(b)
  f = Flatten(p)
  y = Gemm(f, v, z)
}
<opset_import: ["" : OPSET], domain: "local">
Half (X) => (Y) { c = Constant<value_float = 0.5>() Y = Mul(X, c) }
<opset_import: ["" : 17, "local" : 1], domain: "local">
Block <pads> (X, W, B) => (Y) {
  t = Conv<pads: ints = @pads>(X, W, B)
  u = local.Half(t)
  Y = Relu(u)
}
"""


def calling(*, opset: int = 17, channels: str = "3") -> Model:
    """Two calls of a function with a convolution and a call in it.

    Args:
        opset: Operator set of the inner function.
        channels: Declared channels of the input.
    """
    text = CALLING.replace("OPSET", str(opset)).replace("CHANNELS", channels)
    proto = parser.parse_model(text)
    weights = {
        "w0": 0.2 * normal(24, 3, 3, 3),
        "b0": normal(24),
        "w1": 0.1 * normal(32, 24, 3, 3, seed=1),
        "b1": normal(32),
        "v": 0.2 * normal(32, 5),
        "z": normal(5),
    }
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def integers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def quantised(*, dense: bool = True) -> Model:
    """Convolutions, then a Gemm whose weight is transposed, all of integers.

    Args:
        dense: Whether data are quantised as well, not weights alone.
    """
    pair = "{0}_q = QuantizeLinear({0}, s, z) {0}_d = DequantizeLinear({0}_q, s, z)"
    data = [pair.format(name) if dense else f"{name}_d = Identity({name})" for name in "xabf"]
    body = f"""
        {data[0]}
        w0 = DequantizeLinear(q0, s, z)
        c0 = DequantizeLinear(b0, ss)
        a = Conv<pads = [1, 1, 1, 1]>(x_d, w0, c0)
        {data[1]}
        w1 = DequantizeLinear<axis = 0>(q1, s1, z1)
        b = Conv<pads = [1, 1, 1, 1]>(a_d, w1)
        {data[2]}
        p = GlobalAveragePool(b_d)
        f = Flatten(p)
        {data[3]}
        v = DequantizeLinear(q2, s, z)
        t = Transpose<perm = [1, 0]>(v)
        y = Gemm(f_d, t)
    """
    weights = {
        "q0": integers(32, 3, 3, 3),
        "b0": np.arange(32, dtype=np.int32),
        "q1": integers(48, 32, 3, 3),
        "q2": integers(40, 48),
        "s": np.float32(0.05),
        "ss": np.float32(0.0025),
        "s1": np.full(48, 0.001, np.float32),
        "z": np.int8(0),
        "z1": np.zeros(48, np.int8),
    }
    return graph("float[N,3,8,8] x", "float[N,40] y", body, weights)
