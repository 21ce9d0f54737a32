import numpy as np
import onnx

from onnxcomp.analysis import Analysis
from onnxcomp.model import Model
from onnxcomp.passes.remove_dead import RemoveDead
from tests.passes.exact_checks import drift, graph, normal, ops, run

DEAD = RemoveDead()


def dead_model() -> Model:
    body = "h = Add(x, used) a = Mul(h, spare) b = Relu(a) y = Neg(h)"
    weights = {"used": np.ones(2, np.float32), "spare": normal(2), "lost": normal(2)}
    proto = graph("float[2] x, float[2] unread", "float[2] y", body, weights).to_proto()
    for name in ("h", "b", "gone"):
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2])
        proto.graph.value_info.append(info)
    return Model.from_proto(proto)


def test_everything_that_no_output_needs_goes_and_is_counted():
    model = dead_model()
    after, proposal = run(DEAD, model)
    assert [(option.form, option.target) for option in proposal.options] == [
        ("node", "a"),
        ("node", "b"),
        ("initializer", "spare"),
        ("initializer", "lost"),
        ("value_info", "b"),
        ("value_info", "gone"),
    ]
    assert ops(after) == ["Add", "Neg"]
    assert set(after.weights) == {"used"}
    assert [info.name for info in after.skeleton.graph.value_info] == ["h"]
    assert [value.name for value in after.signature.inputs] == ["x", "unread"]
    feeds = {"x": normal(2), "unread": normal(2)}
    assert drift(model, after, feeds) == 0


def test_a_model_without_dead_parts_is_left():
    model = graph("float[2] x", "float[2] y", "y = Relu(x)")
    assert run(DEAD, model)[0] is model


def test_what_a_subgraph_captures_is_alive():
    body = """
        h = Neg(x)
        y = If (flag) <
            then_branch = t () => (float[2] u) { u = Add(h, w) },
            else_branch = e () => (float[2] v) { v = Identity(x) }
        >
    """
    model = graph("float[2] x, bool flag", "float[2] y", body, {"w": normal(2)})
    assert DEAD.propose(Analysis(model)).options == ()


def test_a_long_dead_chain_goes_at_once():
    chain = " ".join(f"d{i + 1} = Relu(d{i})" for i in range(50))
    model = graph("float[2] x", "float[2] y", f"d0 = Neg(x) {chain} y = Abs(x)")
    after, proposal = run(DEAD, model)
    assert ops(after) == ["Abs"]
    assert len(proposal.options) == 51
