import numpy as np
import pytest

from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.passes.remove_identities import RemoveIdentities
from tests.passes.exact_checks import drift, graph, normal, ops, reasons, run

MAKE = MakeBiasesExplicit()

NODES = [
    ("Conv", "y = Conv(x, w)", (1, 3, 5, 5), (4, 3, 3, 3), 4),
    ("Conv", "y = Conv<group = 3>(x, w)", (1, 3, 5, 5), (6, 1, 3, 3), 6),
    ("ConvTranspose", "y = ConvTranspose<group = 3>(x, w)", (1, 3, 5, 5), (3, 2, 3, 3), 6),
    ("Gemm", "y = Gemm(x, w)", (2, 3), (3, 5), 5),
    ("Gemm", "y = Gemm<transB = 1, beta = 0.0>(x, w)", (2, 3), (5, 3), 5),
]


@pytest.mark.parametrize(("op", "body", "x_shape", "w_shape", "channels"), NODES)
def test_a_zero_bias_is_added_and_taken_away_again(op, body, x_shape, w_shape, channels):
    shape = ",".join(map(str, x_shape))
    model = graph(f"float[{shape}] x", "float[?] y", body, {"w": normal(*w_shape)})
    after, _ = run(MAKE, model)
    assert ops(after) == [op]
    bias = after.weights[after.nodes[0].inputs[2]]
    assert (bias.shape, bias.dtype) == ((channels,), np.float32)
    assert after.nodes[0].attrs.get("beta", 1.0) == 1.0
    feeds = {"x": normal(*x_shape)}
    assert drift(model, after, feeds) == 0
    back, _ = run(RemoveIdentities(), after)
    assert set(back.weights) == {"w"}
    assert drift(model, back, feeds) == 0


def test_the_bias_that_was_added_works():
    model = graph(
        "float[2,3] x", "float[2,5] y", "y = Gemm<beta = 0.0>(x, w)", {"w": normal(3, 5)}
    )
    after, _ = run(MAKE, model)
    draft = after.edit()
    draft.set_weight(after.nodes[0].inputs[2], np.ones(5))
    assert drift(model, draft.seal(by="test"), {"x": normal(2, 3)}) > 1e-2


@pytest.mark.parametrize("end", ["m = MatMul(x, w) y = Relu(m)", "y = MatMul(x, w)"])
def test_a_matmul_gets_an_add(end):
    model = graph("float[2,7,3] x", "float[2,7,5] y", end, {"w": normal(3, 5)})
    after, proposal = run(MAKE, model)
    assert ops(after)[:2] == ["MatMul", "Add"]
    assert len(proposal.options) == 1
    assert after.weights[after.producers[after.nodes[1].id].inputs[1]].shape == (5,)
    feeds = {"x": normal(2, 7, 3)}
    assert drift(model, after, feeds) == 0
    back, _ = run(RemoveIdentities(), after)
    assert ops(back) == ops(model)
    assert drift(model, back, feeds) == 0


@pytest.mark.parametrize("operands", ["m, b", "b, m"])
def test_a_matmul_with_an_add_is_left(operands):
    weights = {"w": normal(3, 5), "b": normal(1, 5)}
    body = f"m = MatMul(x, w) y = Add({operands})"
    model = graph("float[2,3] x", "float[2,5] y", body, weights)
    after, proposal = run(MAKE, model)
    assert after is model
    assert proposal.refusals == ()


def test_an_add_that_not_only_the_matmul_feeds_is_no_bias():
    body = "m = MatMul(x, w) y = Add(m, b) z = Neg(m)"
    weights = {"w": normal(3, 5), "b": normal(5)}
    model = graph("float[2,3] x", "float[2,5] y, float[2,5] z", body, weights)
    after, _ = run(MAKE, model)
    assert sorted(ops(after)) == ["Add", "Add", "MatMul", "Neg"]
    assert drift(model, after, {"x": normal(2, 3)}) == 0


def test_computed_weights_and_stacks_of_matrices_are_refused():
    body = "a = MatMul(x, x) b = MatMul(w, a) y = MatMul(b, s)"
    weights = {"w": normal(3, 3), "s": normal(2, 3, 3)}
    model = graph("float[3,3] x", "float[2,3,3] y", body, weights)
    after, proposal = run(MAKE, model)
    assert after is model
    assert reasons(proposal) == {
        "a": "its weight 'x' is computed",
        "b": "its weight 'a' is computed",
        "y": "its weight has 3 axes; only matrices get a bias",
    }
