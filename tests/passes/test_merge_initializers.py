import numpy as np

from onnxcomp.passes.merge_initializers import MergeInitializers
from tests.passes.exact_checks import drift, graph, normal, reasons, run

MERGE = MergeInitializers()
X = {"x": normal(4, 4)}


def test_equal_initializers_become_the_first_of_them():
    w = normal(4, 4, seed=1)
    weights = {"a": w, "b": w.copy(), "c": w + 1, "d": w.copy()}
    body = "p = MatMul(x, a) q = MatMul(p, b) r = MatMul(q, c) y = MatMul(r, d)"
    model = graph("float[4,4] x", "float[4,4] y", body, weights)
    after, proposal = run(MERGE, model)
    assert [option.target for option in proposal.options] == ["b", "d"]
    assert set(after.weights) == {"a", "c"}
    assert [node.inputs[1] for node in after.nodes] == ["a", "a", "c", "a"]
    assert drift(model, after, X) == 0
    assert after.file_bytes < model.file_bytes - 2 * w.nbytes


def test_merging_different_weights_would_be_seen():
    w = normal(4, 4, seed=1)
    body = "p = MatMul(x, a) y = MatMul(p, b)"
    io = ("float[4,4] x", "float[4,4] y", body)
    model = graph(*io, {"a": w, "b": w + 1e-3})
    after, _ = run(MERGE, model)
    assert after is model
    assert drift(model, graph(*io, {"a": w, "b": w}), X) > 1e-5


def test_dtype_shape_and_sign_of_zero_tell_initializers_apart():
    weights = {
        "a": np.zeros(4, np.float32),
        "b": np.zeros((1, 4), np.float32),
        "c": -np.zeros(4, np.float32),
        "d": np.zeros(4, np.int32),
    }
    body = "p = Add(x, a) q = Add(p, b) r = Add(q, c) s = Cast<to = 1>(d) y = Add(r, s)"
    model = graph("float[4,4] x", "float[4,4] y", body, weights)
    assert run(MERGE, model)[0] is model


def test_a_strided_or_scalar_weight_is_hashed_by_its_contents():
    weights = {"a": np.float32(2), "b": np.float32(2)}
    model = graph("float[4,4] x", "float[4,4] y", "p = Mul(x, a) y = Mul(p, b)", weights)
    after, _ = run(MERGE, model)
    assert set(after.weights) == {"a"}
    assert drift(model, after, X) == 0


def test_empty_and_unread_initializers_are_left():
    empty = np.zeros(0, np.float32)
    body = 'p = Resize<mode = "nearest">(x, a, s) y = Resize<mode = "nearest">(p, b, s)'
    weights = {
        "a": empty,
        "b": empty,
        "s": np.ones(4, np.float32),
        "t": np.ones(4, np.float32),
    }
    model = graph("float[1,1,4,4] x", "float[1,1,4,4] y", body, weights, opset=13)
    assert run(MERGE, model)[0] is model


def test_outputs_and_captured_names_stay():
    w = normal(4, 4, seed=1)
    body = """
        p = Add(x, a)
        q = Add(p, b)
        y = If (flag) <
            then_branch = t () => (float[4,4] u) { u = Add(q, c) },
            else_branch = e () => (float[4,4] v) { v = Identity(q) }
        >
    """
    weights = {"a": w, "b": w.copy(), "c": w.copy()}
    model = graph("float[4,4] x, bool flag", "float[4,4] y, float[4,4] b", body, weights)
    after, proposal = run(MERGE, model)
    assert after is model
    assert reasons(proposal) == {
        "b": "equals 'a', but 'b' is a graph output",
        "c": "equals 'a', but 'c' is captured by the subgraph of 'y'",
    }
