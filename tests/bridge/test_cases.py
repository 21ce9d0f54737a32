"""The small cases of the specification that break converters, and models of half precision."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch

from onnxcomp.bridge import check_equal, from_torch, to_torch
from onnxcomp.errors import ExecutionError, UnsupportedModelError, ValidationError
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from tests.analysis.channel_graphs import Graph, feeds
from tests.bridge.checks import (
    backward,
    changed,
    converted,
    feed_of,
    relative,
    without_gradient,
)
from tests.bridge.op_graphs import floats
from tests.graphs import sane_feeds
from tests.passes.exact_checks import graph

HALF = 2e-3  # relative L2 of a chain of three layers in float16 against float32
BRAIN = 2e-2  # the same in bfloat16


def _weight_node(*nodes: str, weights: dict[str, np.ndarray] | None = None) -> Model:
    """A Conv whose weight is made by nodes, and another with an initializer."""
    body = "\n".join([*nodes, "h = Conv <pads = [1, 1, 1, 1]> (x, w)", "y = Conv (h, v)"])
    given = {"v": floats(2, 4, 1, 1)} | (weights or {})
    return graph("float[N,3,5,5] x", "float[N,2,5,5] y", body, given)


def _attribute(array: np.ndarray) -> onnx.AttributeProto:
    return helper.make_attribute("value", numpy_helper.from_array(array))


def in_a_constant_node() -> Model:
    model = _weight_node("w = Identity (u)", weights={"u": floats(4, 3, 3, 3)})
    proto = model.to_proto()
    node = onnx.NodeProto(op_type="Constant", output=["w"])
    node.attribute.append(_attribute(floats(4, 3, 3, 3)))
    proto.graph.node[0].CopyFrom(node)
    kept = [t for t in proto.graph.initializer if t.name != "u"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return Model.from_proto(proto)


def through_identity() -> Model:
    return _weight_node("w = Identity (u)", weights={"u": floats(4, 3, 3, 3)})


def through_dequantize() -> Model:
    levels = np.random.default_rng(0).integers(-127, 127, (4, 3, 3, 3)).astype(np.int8)
    scale = np.float32([0.01, 0.02, 0.01, 0.005])
    weights = {"u": levels, "scale": scale, "zero": np.zeros(4, np.int8)}
    line = "w = DequantizeLinear <axis = 0> (u, scale, zero)"
    return _weight_node(line, weights=weights)


def through_constant_of_shape() -> Model:
    line = "w = ConstantOfShape <value = float[1] {0.2}> (u)"
    return _weight_node(line, weights={"u": np.array([4, 3, 3, 3])})


def through_moves() -> Model:
    """What moves values and keeps their gradients."""
    weights = {
        "a": floats(3, 2, 3, 3),
        "b": floats(3, 18, seed=2),
        "s": np.array([3, 2, 3, 3]),
    }
    lines = (
        "c = Reshape (b, s)",
        "d = Concat <axis = 1> (a, c)",
        "w = Transpose <perm = [1, 0, 2, 3]> (d)",
    )
    return _weight_node(*lines, weights=weights)


def from_a_codebook() -> Model:
    places = np.random.default_rng(0).integers(0, 16, (4, 3, 3, 3))
    weights = {"book": floats(16), "places": places}
    return _weight_node("w = Gather (book, places)", weights=weights)


def sequences() -> Model:
    body = """
        h = Conv (x, w)
        parts = SplitToSequence <axis = 1> (h, two)
        p = SequenceAt (parts, one)
        z = SplitToSequence <axis = 2, keepdims = 0> (p)
        q = SequenceAt (z, one)
        y = Concat <axis = 1> (q, q)
    """
    weights = {"w": floats(4, 3, 1, 1), "one": np.array(1), "two": np.array(2)}
    return graph("float[N,3,5,5] x", "float[N,M,5] y", body, weights)


FOLDED = "which `onnxcomp compress --force` without limits folds"
# Whose weight trains, beside the second convolution's, and why not where it does not.
CASES: dict[str, tuple[Callable[[], Model], set[str], dict[str, str]]] = {
    "constant node": (
        in_a_constant_node,
        set(),
        {"w": f"a Constant node makes it, {FOLDED}"},
    ),
    "identity": (through_identity, {"u"}, {}),
    "dequantize": (
        through_dequantize,
        set(),
        {"w": f"a DequantizeLinear node makes it, {FOLDED}"},
    ),
    "constant of shape": (
        through_constant_of_shape,
        set(),
        {"w": f"a ConstantOfShape node makes it, {FOLDED}"},
    ),
    "moves": (through_moves, {"a", "b"}, {}),
    "codebook": (from_a_codebook, {"book"}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_that_nodes_make(name: str) -> None:
    make, trained, untrained = CASES[name]
    model = make()
    module = converted(model)
    assert set(module.trained) == trained | {"v"}
    assert module.untrained == untrained
    backward(module, feed_of(model, sane_feeds(model)))
    assert without_gradient(module) == []


def test_sequences() -> None:
    assert set(converted(sequences()).trained) == {"w"}


def test_local_functions_are_inlined() -> None:
    proto = _weight_node("w = Identity (u)", weights={"u": floats(4, 3, 3, 3)}).to_proto()
    inner = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    opsets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("own", "f", ["a"], ["c"], inner, opsets))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    proto.graph.node[-1].input[0] = "g"
    proto.graph.node.insert(2, helper.make_node("f", ["h"], ["g"], domain="own"))
    model = Model.from_proto(proto)
    assert set(converted(model).trained) == {"u", "v"}


def _half(dtype: np.dtype, kind: int) -> tuple[Model, Model]:
    """A network in half precision, and the same with its weights in float32."""
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 3, 8), 8))
    t = g.op("Add", g.op("Conv", t, g.w(4, 8, 1, 1)), g.w(4, 1, 1))
    full = g.model(g.op("Softmax", t, axis=1))
    proto = full.to_proto()
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = kind
    del proto.graph.value_info[:]
    half = Model.from_proto(proto)
    rounded = {n: a.astype(np.float32) for n, a in half.weights.items()}
    return half, Model(full.skeleton, rounded)


def test_float16_trains_in_float32() -> None:
    half, full = _half(np.dtype(np.float16), onnx.TensorProto.FLOAT16)
    module = to_torch(half)
    assert {w.dtype for w in module.weights.values()} == {torch.float32}
    check_equal(module, full)
    check_equal(module, half, tolerance=HALF)
    with pytest.raises(ValidationError, match="relative L2"):
        check_equal(module, half)  # onnxruntime rounds to float16 in between
    assert from_torch(module, half).digest == half.digest


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_weights_take_steps(name: str) -> None:
    kinds = {"float16": (np.dtype(np.float16), 10), "bfloat16": (ml_dtypes.bfloat16, 16)}
    half, full = _half(*kinds[name])
    module = to_torch(half)
    feed = {"x": torch.from_numpy(feeds(full, 2)[0]["x"])}
    backward(module, feed)
    with torch.no_grad():
        for weight in module.trained.values():
            weight -= 0.1 * weight.abs().mean() * weight.grad.sign()
    trained = from_torch(module, half)
    assert changed(half, trained) == set(module.trained)
    assert {n: a.dtype for n, a in trained.weights.items()} == {
        n: a.dtype for n, a in half.weights.items()
    }
    (wanted,), (rounded,) = (m(feed).values() for m in (module, to_torch(trained)))
    assert 0 < relative(rounded, wanted) < {"float16": HALF, "bfloat16": BRAIN}[name]


def test_weights_that_overflow_are_refused() -> None:
    half, _ = _half(np.dtype(np.float16), onnx.TensorProto.FLOAT16)
    module = to_torch(half)
    name, weight = next(iter(module.trained.items()))
    with torch.no_grad():
        weight.view(-1)[0] = 1e6
    with pytest.raises(ValidationError, match=f"'{name}': 1 of .* infinite as float16"):
        from_torch(module, half)


def test_all_that_is_not_supported_is_listed_at_once() -> None:
    body = """
        a = NonMaxSuppression (x, x)
        b = Gelu <approximate = "none"> (x)
        c = StringNormalizer (x)
        y = Add (b, x)
    """
    head = '<ir_version: 8, opset_import: ["" : 20]> g (float[1] x) => (float[1] y, a, c)'
    proto = onnx.parser.parse_model(f"{head} {{{body}}}")
    with pytest.raises(UnsupportedModelError) as caught:
        to_torch(Model.from_proto(proto))
    assert "2 nodes" in str(caught.value)
    assert "NonMaxSuppression 'a'" in str(caught.value)
    assert "StringNormalizer 'c'" in str(caught.value)
    assert "Gelu" not in str(caught.value)


REFUSED = {
    "y = BatchNormalization <training_mode = 1> (x, v, v, v, v)": "training_mode is 1",
    "y, i = MaxPool <kernel_shape = [2, 2]> (x)": "its further outputs are not made",
    'y = Resize <mode = "cosine"> (x, , s)': "mode 'cosine' is unknown",
    "y = Cast <to = 8> (x)": "type STRING has no arithmetic in torch",
    'y = ScatterND <reduction = "mul"> (x, p, x)': "reduction 'mul' is not made",
}


@pytest.mark.parametrize("line", REFUSED)
def test_attributes_that_cannot_be_expressed_are_refused(line: str) -> None:
    head = '<ir_version: 8, opset_import: ["" : 17]> g'
    outputs = "y, i" if line.startswith("y, i") else "y"
    proto = onnx.parser.parse_model(f"{head} (float[1,4,4,4] x) => ({outputs}) {{{line}}}")
    for name, array in {"v": floats(4), "s": floats(4), "p": np.zeros((1, 1), int)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    with pytest.raises(UnsupportedModelError, match=f"a node of the model: .*{REFUSED[line]}"):
        to_torch(Model.from_proto(proto))


def test_old_operator_sets_are_refused() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 6]> g (float[1] x) => (float[1] y) {y = Relu (x)}'
    )
    with pytest.raises(UnsupportedModelError, match="operator set 6, before 7"):
        to_torch(Model.from_proto(proto))


def test_tiny_outputs_of_sigmoid_may_be_rounded_by_onnxruntime() -> None:
    body = "h = Add (x, low)\n s = Sigmoid (h)\n y = Flatten (s)"
    model = graph("float[N,4,4] x", "float[N,16] y", body, {"low": np.float32(-17)})
    samples = Samples({"x": floats(3, 4, 4)})
    found = check_equal(to_torch(model), model, samples)
    assert found["y"] > 1e-3
    other = graph("float[N,4,4] x", "float[N,16] y", body, {"low": np.float32(-10)})
    with pytest.raises(ValidationError, match="output 'y'"):
        check_equal(to_torch(other), model, samples)


def test_a_graph_that_onnxruntime_refuses_cannot_be_compared() -> None:
    half, _ = _half(ml_dtypes.bfloat16, onnx.TensorProto.BFLOAT16)
    with pytest.raises(ExecutionError):
        check_equal(to_torch(half), half, Samples({"x": floats(1, 3, 8, 8).astype("f2")}))
