"""`Draft`: what is not edited survives byte for byte, and invalid edits are refused."""

import gc
import sys
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper, numpy_helper, parser

from onnxcomp.errors import ParameterError, SealError
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from tests.graphs import shared_models
from tests.passes.exact_checks import graph, normal
from tests.test_model import with_branch


def chain() -> Model:
    body = "a = Relu (x)  b = Neg (a)  c = Abs (b)  y = Mul (c, s)"
    return graph("float[N,4] x", "float[N,4] y", body, {"s": np.float32(3)})


def run(model: Model, **feeds):
    return Session(model, optimize=False).run(feeds)


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_untouched_draft_changes_nothing(path):
    source = Model.from_proto(onnx.load(path))
    sealed = source.edit().seal(by="test")
    live = {node.id for node in sealed.nodes}
    kept = [node for node in source.nodes if node.id in live]
    assert len(kept) >= 0.95 * len(source.nodes)  # only what no output needs goes
    assert [n.proto.SerializeToString() for n in sealed.nodes] == [
        n.proto.SerializeToString() for n in kept
    ]
    assert sealed.signature == source.signature
    old, new = source.skeleton, sealed.skeleton
    for field in ("metadata_props", "opset_import", "functions"):
        assert list(getattr(new, field)) == list(getattr(old, field))
    for field in ("doc_string", "producer_name", "producer_version", "domain"):
        assert getattr(new, field) == getattr(old, field)
    assert new.graph.doc_string == old.graph.doc_string
    assert new.graph.name == old.graph.name
    made = {name for node in sealed.nodes for name in node.outputs} | sealed.weights.keys()
    assert [v.SerializeToString() for v in new.graph.value_info] == [
        v.SerializeToString() for v in old.graph.value_info if v.name in made
    ]
    for name, array in sealed.weights.items():
        assert array is source.weights[name]


def lost_interrupts(work: Callable[[], object]) -> list[int]:
    """Interrupt work at each of its calls in turn; return those at which it went on."""
    lost, at = [], 0
    while True:
        at, calls = at + 1, 0

        def trace(*_: object, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        gc.disable()  # an interrupt of what runs with a collection is lost
        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(None)
            gc.enable()
        if calls < at:
            return lost
        lost.append(at)


def test_an_interrupt_always_comes_out():
    model = chain()
    bare = model.to_proto()
    assert lost_interrupts(model.edit) == []
    assert lost_interrupts(lambda: gs.import_onnx(bare))  # why `Draft` does without it


def test_everything_beside_the_nodes_survives_an_edit():
    proto = chain().to_proto()
    helper.set_model_props(proto, {"author": "vendor"})
    proto.doc_string, proto.graph.doc_string = "model", "graph"
    proto.producer_name, proto.domain, proto.model_version = "maker", "org.vendor", 7
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    proto.graph.node[0].doc_string = "first"
    proto.graph.node[1].metadata_props.add(key="k", value="v")
    proto.graph.node[2].doc_string = "third"
    source = Model.from_proto(proto)
    draft = source.edit()
    draft.set_weight("s", np.float32(5))
    draft.set_input("b", 0, "x")  # an edit of the node that carries metadata
    sealed = draft.seal(by="test")
    assert sealed.skeleton.metadata_props == source.skeleton.metadata_props
    assert sealed.skeleton.opset_import == source.skeleton.opset_import
    for field in ("doc_string", "producer_name", "domain", "model_version"):
        assert getattr(sealed.skeleton, field) == getattr(source.skeleton, field)
    assert sealed.producers["b"].proto.metadata_props[0].value == "v"
    assert sealed.producers["c"].proto.doc_string == "third"
    x = normal(2, 4)
    assert np.array_equal(run(sealed, x=x)["y"], 5 * np.abs(x))
    assert not np.array_equal(run(source, x=x)["y"], 5 * np.abs(x))


def test_local_functions_survive():
    source = Model.from_proto(
        parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17, "own" : 1]>'
            "g (float[N] x) => (float[N] y) { a = own.twice (x)  y = Relu (a) }"
            '<domain: "own", opset_import: ["" : 17]> twice (x) => (y) { y = Add (x, x) }'
        )
    )
    draft = source.edit()
    draft.set_attributes("y", {})  # counts as an edit
    sealed = draft.seal(by="test")
    assert list(sealed.skeleton.functions) == list(source.skeleton.functions)
    assert sealed.producers["a"].proto.domain == "own"
    assert run(sealed, x=np.array([2], np.float32))["y"] == [4]


def test_scalars_stay_scalars():
    draft = chain().edit()
    draft.set_weight("s", np.float32(2))
    name = draft.add_weight("t", np.float32(2))
    assert draft.weights["s"].shape == ()
    assert draft.weights[name].shape == ()


def test_set_weight_keeps_the_dtype_and_freezes():
    source = chain()
    draft = source.edit()
    draft.set_weight("s", np.float64(2))
    assert draft.weights["s"].dtype == np.float32
    assert not draft.weights["s"].flags.writeable
    assert source.weights["s"] == 3
    with pytest.raises(ParameterError, match="no weight 'nothing'"):
        draft.set_weight("nothing", np.zeros(1))


def test_nodes_that_replace_others_are_written():
    """A new node may get the memory, hence the id(), of one that was removed."""
    for _ in range(20):
        draft = chain().edit()
        for node_id, op in (("a", "Tanh"), ("b", "Exp"), ("c", "Ceil")):
            inputs = draft.inputs(node_id)
            draft.remove_node(node_id)
            gc.collect()
            draft.add_node(op, inputs, stem=node_id, outputs=[node_id])
        assert [n.op for n in draft.seal(by="test").nodes] == ["Tanh", "Exp", "Ceil", "Mul"]


def test_rewire():
    draft = chain().edit()
    draft.rewire("b", "a")
    sealed = draft.seal(by="test")
    assert [n.op for n in sealed.nodes] == ["Relu", "Abs", "Mul"]
    with pytest.raises(ParameterError, match="graph output"):
        chain().edit().rewire("y", "a")
    for name in ("a", "outer"):
        with pytest.raises(ParameterError, match="subgraph"):
            with_branch().edit().rewire(name, "x")


def test_produce_as_takes_over_an_output_name():
    draft = chain().edit()
    draft.remove_node("y")
    draft.produce_as("c", "y")
    sealed = draft.seal(by="test")
    assert [n.id for n in sealed.nodes] == ["a", "b", "y"]
    x = normal(3, 4)
    assert np.array_equal(run(sealed, x=x)["y"], np.abs(np.maximum(x, 0)))
    with pytest.raises(ParameterError, match="still has a producer"):
        chain().edit().produce_as("b", "y")
    with pytest.raises(ParameterError, match="graph output"):
        chain().edit().produce_as("y", "z")


def test_produce_as_moves_the_other_readers():
    body = "a = Relu (x)  y = Neg (a)  z = Abs (a)"
    draft = graph("float[4] x", "float[4] y, float[4] z", body).edit()
    draft.remove_node("y")
    draft.produce_as("a", "y")
    sealed = draft.seal(by="test")
    assert sealed.producers["z"].inputs == ("y",)


def test_sealing_sorts():
    draft = chain().edit()
    late = draft.add_node("Sigmoid", ["a"], stem="late")
    draft.set_input("b", 0, late)  # the new node is last in the list, its reader before it
    sealed = draft.seal(by="test")
    assert [n.op for n in sealed.nodes] == ["Relu", "Sigmoid", "Neg", "Abs", "Mul"]


def test_sealing_refuses():
    draft = chain().edit()
    draft.set_input("b", 0, "c")
    with pytest.raises(SealError, match="cycle"):
        draft.seal(by="test")
    draft = chain().edit()
    draft.set_input("b", 0, "nowhere")
    with pytest.raises(SealError, match="test: the edited graph is not valid"):
        draft.seal(by="test")
    draft = chain().edit()
    draft.set_weight("s", np.zeros((5, 7), np.float32))
    with pytest.raises(SealError, match="not valid"):
        draft.seal(by="test")
    draft = chain().edit()
    draft.seal(by="test")
    with pytest.raises(SealError, match="sealed already"):
        draft.seal(by="test")
    with pytest.raises(ParameterError, match="no node makes"):
        chain().edit().remove_node("nothing")


def test_sealing_refuses_a_changed_signature():
    body = "y = Conv (x, w)"
    source = graph("float[N,3,4,4] x", "float[N,5,4,4] y", body, {"w": normal(5, 3, 1, 1)})
    draft = source.edit()
    draft.set_weight("w", normal(4, 3, 1, 1))
    with pytest.raises(SealError):
        draft.seal(by="test")


def test_subgraphs_stay_byte_identical():
    source = with_branch()
    draft = source.edit()
    draft.set_weight("outer", normal(3, seed=9))
    draft.set_attributes("a", {})
    sealed = draft.seal(by="test")
    wanted = source.producers["y"].proto.SerializeToString()
    assert sealed.producers["y"].proto.SerializeToString() == wanted
    x = np.abs(normal(2, 3))
    assert np.allclose(run(sealed, x=x)["y"], x + normal(3, seed=9))
    draft = source.edit()
    draft.set_attributes("y", {"else_branch": None})
    with pytest.raises(SealError, match="subgraph"):
        draft.seal(by="test")


def test_weights_of_subgraphs_are_not_dropped():
    draft = with_branch().edit()
    draft.set_attributes("a", {})
    assert "outer" in draft.seal(by="test").weights


def test_fresh_names_clash_with_nothing():
    draft = with_branch().edit()
    taken = {"x", "y", "a", "sum", "flag", "zero", "outer", "then_y", "else_y", "inner"}
    for name in sorted(taken):
        assert draft.fresh_name(name) == f"{name}_1"
    assert draft.fresh_name("new") == "new"
    assert draft.fresh_name("new") == "new_1"


def test_names_of_sparse_weights_are_taken():
    proto = chain().to_proto()
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "sparse_index")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[4])
    proto.graph.sparse_initializer.append(sparse)
    assert Model.from_proto(proto).edit().fresh_name("sparse") == "sparse_1"


def test_inputs_that_are_initializers_move():
    proto = chain().to_proto()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("s", 1, []))
    source = Model.from_proto(proto)
    sealed = source.edit().seal(by="test")
    assert [v.name for v in sealed.skeleton.graph.input] == ["x"]
    assert sealed.skeleton.ir_version == 4
    assert sealed.signature == source.signature
    x = normal(2, 4)
    assert np.array_equal(run(sealed, x=x)["y"], run(source, x=x)["y"])


def test_value_info_behind_an_edit_is_corrected():
    body = "a = Conv (x, w)  r = Relu (a)  y = Conv (r, v)"
    weights = {"w": normal(6, 3, 1, 1), "v": normal(5, 6, 1, 1)}
    proto = graph("float[N,3,4,4] x", "float[N,5,4,4] y", body, weights).to_proto()
    for name in ("a", "r"):
        info = helper.make_tensor_value_info(name, 1, ["N", 6, 4, 4])
        info.doc_string = "vendor"
        proto.graph.value_info.append(info)
    draft = Model.from_proto(proto).edit()
    draft.set_weight("w", weights["w"][:2])
    draft.set_weight("v", weights["v"][:, :2])
    sealed = draft.seal(by="test")
    for info in sealed.skeleton.graph.value_info:
        assert info.type.tensor_type.shape.dim[1].dim_value == 2
    draft = Model.from_proto(proto).edit()
    draft.set_input("y", 1, draft.add_weight("v", weights["v"] * 2))
    upstream = draft.seal(by="test").skeleton.graph.value_info
    assert [v.SerializeToString() for v in upstream] == [
        v.SerializeToString() for v in proto.graph.value_info
    ]


def test_value_info_of_lost_tensors_goes():
    proto = chain().to_proto()
    proto.graph.value_info.append(helper.make_tensor_value_info("b", 1, ["N", 4]))
    draft = Model.from_proto(proto).edit()
    draft.rewire("b", "a")
    assert not draft.seal(by="test").skeleton.graph.value_info


def test_vendor_graphs_that_the_checker_refuses_can_be_edited(caplog):
    proto = chain().to_proto()
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9  # wrong, and in the file
    draft = Model.from_proto(proto).edit()
    draft.rewire("b", "a")
    sealed = draft.seal(by="test")
    assert "vendor's graph" in caplog.text
    assert [n.op for n in sealed.nodes] == ["Relu", "Abs", "Mul"]
