"""`Model`: read-only, and the same after a round trip through a ModelProto."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.model import Model, Value, extract
from onnxcomp.runtime import Session
from tests.graphs import shared_models
from tests.passes.exact_checks import graph, normal


def small() -> Model:
    body = "a = Conv (x, w, b)  y = Relu (a)"
    weights = {"w": normal(4, 3, 3, 3), "b": normal(4)}
    return graph("float[N,3,8,8] x", "float[N,4,6,6] y", body, weights)


def with_branch() -> Model:
    """An If whose branches read outer tensors, one of them a weight."""
    then = helper.make_graph(
        [helper.make_node("Add", ["a", "outer"], ["then_y"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("then_y", 1, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["else_y"])],
        "else",
        [],
        [helper.make_tensor_value_info("else_y", 1, None)],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["flag"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    main = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [2, 3])],
        [helper.make_tensor_value_info("y", 1, [2, 3])],
        [
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(normal(3), "outer"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    return Model.from_proto(helper.make_model(main, opset_imports=opset, ir_version=8))


def test_weights_are_read_only():
    model = small()
    for array in model.weights.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(TypeError):
        model.weights["w"] = np.zeros(1)  # type: ignore[index]
    node = graph("float[2] x", "float[2] y", "c = Constant <value = float[2] {1, 2}> ()"
                 " y = Add (x, c)").nodes[0]  # fmt: skip
    with pytest.raises(ValueError, match="read-only"):
        node.attrs["value"][0] = 5
    with pytest.raises(TypeError):
        node.attrs["value"] = 5  # type: ignore[index]


def test_from_proto_leaves_its_argument_alone():
    proto = small().to_proto()
    before = proto.SerializeToString()
    Model.from_proto(proto)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_round_trip(path):
    proto = onnx.load(path)
    model = Model.from_proto(proto)
    again = Model.from_proto(model.to_proto())
    assert again.digest == model.digest
    for tensor in proto.graph.initializer:
        wanted = numpy_helper.to_array(tensor)
        assert again.weights[tensor.name].dtype == wanted.dtype
        assert np.array_equal(again.weights[tensor.name], wanted)
    size = len(model.to_proto().SerializeToString())
    assert abs(model.file_bytes - size) <= 0.01 * size


def test_digest_sees_every_change():
    model = small()
    changed = {"w": model.weights["w"] + np.float32(1e-6)}
    assert Model(model.skeleton, {**model.weights, **changed}).digest != model.digest
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    skeleton.doc_string = "other"
    assert Model(skeleton, model.weights).digest != model.digest


def test_views():
    model = with_branch()
    assert [node.id for node in model.nodes] == ["a", "sum", "flag", "y"]
    assert model.producers["y"].captured == {"a", "outer"}
    assert [(u.node.id, u.index) for u in model.readers["outer"]] == [("y", -1)]
    assert [(u.node.id, u.index) for u in model.readers["x"]] == [("a", 0), ("sum", 0)]
    assert model.nodes[0].name == "a"  # unnamed: its first output
    assert model.nodes[0].input(3) == ""
    assert model.opset == 17
    assert model.output_names == {"y"}


def test_signature_leaves_out_initializers_that_are_inputs():
    proto = small().to_proto()
    proto.graph.input.append(helper.make_tensor_value_info("w", 1, [4, 3, 3, 3]))
    model = Model.from_proto(proto)
    assert [v.name for v in model.signature.inputs] == ["x"]
    assert model.signature.inputs[0].shape == ("N", 3, 8, 8)
    assert model.signature.outputs[0].shape == ("N", 4, 6, 6)


def test_arrays_that_numpy_cannot_hold_stay():
    proto = small().to_proto()
    text = TensorProto(name="text", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])
    proto.graph.initializer.append(text)
    model = Model.from_proto(proto)
    assert "text" in model.initializer_names
    assert "text" not in model.weights
    assert model.to_proto().graph.initializer[-1].string_data == [b"a"]


def test_extract_keeps_captured_tensors():
    model = with_branch()
    part = extract(model, [Value("a", np.dtype(np.float32), (None, None))], ["y"])
    assert {v.name for v in part.signature.inputs} == {"a", "x"}  # x feeds the condition
    feeds = {"x": normal(2, 3), "a": normal(2, 3, seed=1)}
    wanted = feeds["a"] + model.weights["outer"] if feeds["x"].sum() > 0 else -feeds["a"]
    assert np.array_equal(Session(part).run(feeds)["y"], wanted)
    assert part.weights["outer"] is model.weights["outer"]
