"""What moves the gates: the change of the outputs against the cost."""

from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

from onnxcomp.analysis.probe import random_inputs
from onnxcomp.bridge import selection
from onnxcomp.bridge.selection import Selected, Selection, search
from onnxcomp.model import Model
from onnxcomp.passes.substitute_operators import SubstituteOperators
from tests.analysis.channel_graphs import Graph
from tests.bridge.test_selection import GATES, network

HOW = Selection(warm_up=0, tuning=0, batch=8, learning_rate=1e-4)


@pytest.fixture(params=GATES)
def gate(request):
    return request.param


@pytest.fixture
def starts(monkeypatch) -> Callable[[float, float], None]:
    """Leaves the original and the smallest operator, and sets what their gates start from."""
    find = selection.find_branches

    def start(original: float, smallest: float) -> None:
        def found(*arguments):
            return {
                node: [
                    replace(b, error=-original if b.option is None else -smallest)
                    for b in branches
                    if b.option is None or b.option.size == (1,)
                ]
                for node, branches in find(*arguments).items()
            }

        monkeypatch.setattr(selection, "find_branches", found)

    return start


@pytest.fixture
def scaled(monkeypatch) -> Callable[[float], None]:
    """Multiplies what the change of the outputs says to the gates."""
    backward = selection._Training._backward

    def scale(factor: float) -> None:
        def changed(self, chosen):
            loss = backward(self, chosen)
            for alpha in self._net.alphas:
                if alpha.grad is not None:
                    alpha.grad *= factor
            return loss

        monkeypatch.setattr(selection._Training, "_backward", changed)

    return scale


def unequal() -> tuple[Model, str, str]:
    """Two convolutions side by side: one that matters, and one of small weights."""
    g = Graph(8, 8, 8)
    t = g.op("Relu", "x")
    large, small = g.conv(t, 8, 8), g.conv(t, 8, 8)
    for name in list(g.weights)[-2:]:
        g.weights[name] *= 0.01
    t = g.op("Concat", g.op("Relu", large), g.op("Relu", small), axis=1)
    return g.model(g.op("Gemm", g.op("Flatten", t), g.w(1024, 5))), large, small


def searched(model: Model, form: str, how: Selection) -> Selected:
    operators = [SubstituteOperators((form,), step=1)]
    return search(model, random_inputs(model, 64, seed=1), how, operators=operators)


def test_originals_come_back_where_cost_is_no_matter(gate, starts):
    starts(-2e-4, 0.0)
    found = searched(network(), "separable", replace(HOW, factor=0, gate=gate, epochs=5))
    first, *_, last = [loss for loss, _ in found.history]
    assert not found.plan.options
    assert found.loss < last < 0.01 * first


@pytest.mark.parametrize("factor", [0, -1])
def test_they_do_not_without_the_gradient_of_the_outputs(factor, gate, starts, scaled):
    starts(-2e-4, 0.0)
    scaled(factor)
    found = searched(network(), "separable", replace(HOW, factor=0, gate=gate, epochs=5))
    first, *_, last = [loss for loss, _ in found.history]
    assert len(found.plan.options) > 1
    assert last > 0.4 * first  # weights learn all the same


@pytest.mark.parametrize("pull", [1, 0])
def test_what_matters_stays_and_what_does_not_goes(pull, gate, starts, scaled):
    model, large, small = unequal()
    starts(0.0, -0.01)
    scaled(pull)
    found = searched(model, "pointwise", replace(HOW, factor=0.01, gate=gate, epochs=8))
    assert small in found.plan.options
    assert (large in found.plan.options) == (not pull)
