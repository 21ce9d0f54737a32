"""Local functions are inlined for analysis, and their outputs stay the same."""

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.functions import inlined
from onnxcomp.runtime import Session
from tests.passes.exact_checks import drift, graph, normal
from tests.unusual import calling

MACS = 64 * 24 * 3 * 9 + 36 * 32 * 24 * 9 + 32 * 5


def test_calls_become_nodes_of_the_same_outputs():
    model = calling()
    found = inlined(model)
    assert {node.op for node in model.nodes} >= {"local::Block"}
    assert {"Conv", "Mul", "Relu"} <= {node.op for node in found.nodes}
    assert not found.skeleton.functions
    assert found.signature == model.signature
    assert found.weights == model.weights
    feeds = {"x": normal(3, 3, 8, 8)}
    wanted, got = (Session(m, optimize=False).run(feeds)["y"] for m in (model, found))
    assert np.array_equal(wanted, got)


def test_without_functions_it_is_the_same_model():
    model = graph("float[2] x", "float[2] y", "y = Relu (x)")
    assert inlined(model) is model
    assert Analysis(model).model is model


def test_an_analysis_sees_what_functions_do():
    model = calling()
    facts = Analysis(model)
    assert facts.source is model
    assert facts.cost.macs == MACS
    assert len(facts.linears) == 3


@pytest.mark.parametrize("opset", [13, 18])
def test_calls_of_another_operator_set_stay_and_say_so(opset):
    model = calling(opset=opset)
    facts = Analysis(model)
    left = [node.id for node in facts.model.nodes if node.op == "local::Half"]
    assert len(left) == 2
    assert [r for n, r in facts.not_linear.items() if n in left] == [
        "its function has another operator set and was not inlined"
    ] * 2
    assert facts.cost.macs == MACS
    assert drift(model, facts.model, {"x": normal(2, 3, 8, 8)}) == 0
