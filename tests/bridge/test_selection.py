"""The choice of operators: gates, extremes of the factor, and replay in the graph."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.analysis.target import TARGETS
from onnxcomp.bridge import selection
from onnxcomp.bridge.branches import find_branches, written
from onnxcomp.bridge.selection import Choice, Selection, Supernet, one_hot, search
from onnxcomp.errors import ParameterError, UnsupportedModelError, ValidationError
from onnxcomp.loading import load
from onnxcomp.model import Model
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.operator_plan import replay, working_graph
from onnxcomp.passes.substitute_operators import BYPASS, FITTED, TRAINED, SubstituteOperators
from onnxcomp.runtime import Session
from tests.analysis.channel_graphs import Graph
from tests.passes.exact_checks import relative_l2

TOLERANCE = 1e-5  # relative L2 between torch and onnxruntime
TARGET = TARGETS["x86-avx512"]
FEW = (SubstituteOperators(("separable", "pointwise", "skip"), step=1),)
GATES = ("identity", "softmax")


def network() -> Model:
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 3, 8), 8))
    h = g.op("Relu", g.bn(g.conv(t, 8, 8), 8))
    t = g.op("Relu", g.op("Add", g.bn(g.conv(h, 8, 8), 8), t))
    t = g.op("Relu", g.conv(t, 8, 16, strides=[2, 2]))
    return g.model(g.op("Gemm", g.mean(t), g.w(16, 5), g.w(5)))


@pytest.fixture(scope="module")
def samples():
    return random_inputs(network(), 64, seed=1)


@pytest.fixture(scope="module")
def prepared(samples):
    """The working graph and all branches of its convolutions."""
    facts = Analysis(working_graph(network()), samples)
    return facts, find_branches(facts, samples, (), TARGET)


def supernet(prepared, gate="identity", cost="macs") -> Supernet:
    facts, found = prepared
    choices = {node: Choice(branches, cost, gate) for node, branches in found.items()}
    return Supernet(facts.model, choices)


def outputs(net: Supernet, samples) -> np.ndarray:
    with torch.no_grad():
        (y,) = net({"x": torch.from_numpy(samples.arrays["x"][:16].copy())}).values()
    return y.numpy()


def test_convolutions_that_share_a_bias_have_operators():
    """Each has a bias of its own in the working graph."""
    g = Graph(8, 8, 8)
    bias, t = g.w(8), "x"
    for _ in range(3):
        t = g.op("Relu", g.op("Conv", t, g.w(8, 8, 3, 3), bias, pads=[1] * 4))
    model = g.model(t)
    assert len(model.readers[bias]) == 3
    few = random_inputs(model, 16, seed=1)
    how = Selection(factor=1e6, epochs=2, gate_rate=5.0, batch=8, tuning=1, warm_up=0)
    found = search(model, few, how, operators=FEW)
    assert len(found.plan.options) == 3
    again = replay(model, found.plan)
    (one,), (other,) = (
        Session(each).run({"x": few.arrays["x"]}).values() for each in (again, found.model)
    )
    assert relative_l2(one, other) <= TOLERANCE


# ----------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_one_hot_and_have_the_derivative_asked_for(gate):
    alpha = torch.tensor([0.3, -1.0, 0.7, 0.2], dtype=torch.float64)
    assert one_hot(alpha, gate).tolist() == [0, 0, 1, 0]
    found = torch.autograd.functional.jacobian(lambda a: one_hot(a, gate), alpha)
    p = alpha.softmax(0)
    wanted = torch.eye(4, dtype=torch.float64)
    if gate == "softmax":
        wanted = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_the_first_of_equal_entries_is_open():
    assert one_hot(torch.zeros(3), "identity").tolist() == [1, 0, 0]


@pytest.mark.parametrize("gate", GATES)
def test_the_derivative_of_the_cost(gate, prepared):
    """Against finite differences of the cost that soft gates would have."""
    net = supernet(prepared, gate)
    choice = next(iter(net.choices.values()))
    choice.cost().backward()
    costs, alpha = choice.costs.double(), choice.alpha.detach().double()

    def soft(a):
        return float(((a if gate == "identity" else a.softmax(0)) * costs).sum())

    for index in range(len(alpha)):
        step = torch.zeros(len(alpha), dtype=torch.float64)
        step[index] = 1e-4
        slope = (soft(alpha + step) - soft(alpha - step)) / 2e-4
        assert float(choice.alpha.grad[index]) == pytest.approx(slope, abs=1e-6)


def test_closed_gates_learn_what_they_would_change(prepared, samples):
    """The gradient of a gate is that of its operator's output; only the open one trains."""
    net = supernet(prepared)
    choice = next(iter(net.choices.values()))
    x = torch.from_numpy(samples.arrays["x"][:4].copy())
    wanted = torch.randn(choice(x).shape)
    (choice(x) * wanted).sum().backward()
    for index, branch in enumerate(choice.branches):
        (y,) = branch.module({branch.module.input_names[0]: x}).values()
        slope = (y * wanted).sum().item()
        assert float(choice.alpha.grad[index]) == pytest.approx(slope, rel=1e-4, abs=1e-3)
        grads = [p.grad for p in branch.module.parameters()]
        moved = any(g is not None and bool(g.any()) for g in grads)
        assert moved == (index == choice.active)


# ---------------------------------------------------------------------------------- search


@pytest.mark.parametrize("gate", GATES)
def test_extremes_and_trend_of_the_factor(gate, samples):
    """Nothing for a factor of 0, the cheapest operator everywhere for a huge one."""
    shares = []
    for factor in (0.0, 0.1, 1.0, 10.0, 1e6):
        how = Selection(factor=factor, gate=gate, epochs=6, batch=16, tuning=1, warm_up=0)
        found = search(network(), samples, how, operators=FEW)
        shares.append(found.share)
        assert len(found.history) == 6
        assert found.table.count("\n") == 3  # a line for each of four convolutions
        cost = Analysis(found.model, samples).cost.macs
        whole = Analysis(network(), samples).cost.macs
        assert cost / whole == pytest.approx(found.share, abs=1e-5)
        if factor == 0:
            assert not found.plan.options
            assert found.loss < 1e-3
    facts = Analysis(working_graph(network()), samples)
    branches = find_branches(facts, samples, FEW, TARGET)
    least = [min(b.costs["macs"] for b in each) for each in branches.values()]
    whole = [each[0].costs["macs"] for each in branches.values()]
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(1 - sum(whole) + sum(least), abs=1e-5)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2]


def test_a_target_is_approached(samples):
    how = Selection(factor=5.0, target=0.5, epochs=8, batch=16, tuning=0, warm_up=0)
    found = search(network(), samples, how, operators=FEW)
    shares = [share for _, share in found.history]
    within = [share for share in shares if share <= 0.505]
    assert found.share == pytest.approx(within[-1] if within else min(shares), abs=1e-6)
    assert 0.3 < found.share < 0.7  # one convolution is up to a third


def test_warm_up_trains_operators_and_leaves_gates_and_originals_alone(samples):
    model = network()
    how = Selection(warm_up=2, epochs=0, tuning=0)
    found = search(model, samples, how, operators=FEW)
    assert not found.plan.options
    assert found.share == 1
    assert found.loss < 1e-8  # what stays as it was is the original
    best = replace(how, factor=1e6, epochs=2, gate_rate=5.0)
    losses = [
        search(model, samples, replace(best, warm_up=n), operators=FEW).history[-1][0]
        for n in (0, 2)
    ]
    assert losses[0] != losses[1]  # it does train them


@pytest.mark.parametrize("form", [*FITTED, *TRAINED, *FORMS])
def test_the_graph_gives_what_the_network_gives(form, prepared, samples):
    """Every operator, wherever it is legal, all at once."""
    facts, _ = prepared
    net = supernet(prepared)
    for choice in net.choices.values():
        choice.only = choice.original
        for index, branch in enumerate(choice.branches):
            if branch.option is not None and branch.option.form == form:
                choice.only = index
        with torch.no_grad():  # as if trained
            for weight in choice.operators[choice.only].parameters():
                weight += 0.05 * torch.randn(weight.shape)
    taken = {node: choice.branches[choice.active] for node, choice in net.choices.items()}
    result = written(facts, net, taken)
    if form == "dilated":  # all kernels are 3 x 3
        assert not result.plan.options
    else:
        assert {option.form for option in result.plan.options.values()} == {form}
    feed = {"x": samples.arrays["x"][:16]}
    (y,) = Session(result.model, optimize=False).run(feed).values()
    assert relative_l2(y, outputs(net, samples)) <= TOLERANCE
    (before,) = Session(network(), optimize=False).run(feed).values()
    assert relative_l2(y, before) > 100 * TOLERANCE
    assert result.model.signature == network().signature


def test_the_plan_makes_the_result_of_the_original_without_torch(samples, tmp_path):
    """In a process of its own; what was trained outside the operators is needed, too."""
    model = network()
    how = Selection(factor=1.0, epochs=3, batch=16, tuning=2, warm_up=0)
    found = search(model, samples, how, operators=FEW)
    assert 0 < len(found.plan.options) < 4
    model.save(tmp_path / "model.onnx")
    found.plan.save(tmp_path / "plan.npz")
    code = (
        "import sys, onnxcomp\n"
        "from onnxcomp.passes.operator_plan import load_plan, replay\n"
        "model = replay(onnxcomp.load('model.onnx'), load_plan('plan.npz'))\n"
        "model.save('result.onnx')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    feed = {"x": samples.arrays["x"][:16]}
    (wanted,) = Session(found.model, optimize=False).run(feed).values()
    (y,) = Session(load(tmp_path / "result.onnx"), optimize=False).run(feed).values()
    assert relative_l2(y, wanted) <= TOLERANCE
    untrained = replay(model, replace(found.plan, weights={}))
    (y,) = Session(untrained, optimize=False).run(feed).values()
    assert relative_l2(y, wanted) > 100 * TOLERANCE


def test_a_result_that_is_not_what_torch_trained_is_refused(samples, monkeypatch):
    def broken(*arguments):
        result = written(*arguments)
        bias = result.model.nodes[-1].input(2)
        draft = result.model.edit()
        draft.set_weight(bias, result.model.weights[bias] + 0.01)
        return replace(result, model=draft.seal(by="test"))

    quick = Selection(warm_up=0, epochs=1, tuning=0)
    assert search(network(), samples, quick, operators=FEW).model
    monkeypatch.setattr(selection, "written", broken)
    with pytest.raises(ValidationError, match="torch is off onnxruntime"):
        search(network(), samples, quick, operators=FEW)


def test_chains_of_low_rank_are_chosen_from_too(samples):
    """At ranks of the grid next to a quarter and a half of the full one."""
    few = [Factorize(forms=("output_basis",), shares=(0.25, 0.5))]
    quick = Selection(warm_up=1, epochs=4, tuning=1, batch=8, factor=1e4)
    found = search(network(), samples, quick, operators=few)
    assert {option.method for option in found.plan.options.values()} == {"factorize"}
    assert {option.size for option in found.plan.options.values()} <= {(4,), (8,)}
    assert "output_basis 4" in found.table
    assert found.share < 1


def test_nodes_are_not_left_out_by_training(prepared, samples):
    facts, found = prepared
    every = SubstituteOperators(step=1)
    assert any(option.form == BYPASS for option in every.propose(facts).options)
    some = find_branches(facts, samples, [every], TARGET)
    for branches in (found, some):
        forms = {b.option.form for each in branches.values() for b in each if b.option}
        assert BYPASS not in forms
        assert "separable" in forms
    with pytest.raises(ParameterError, match="forms"):
        search(network(), samples, operators=[SubstituteOperators((BYPASS,))])


def test_operators_start_from_their_closed_forms(prepared):
    """The better an operator fits, the larger its gate's entry; the original's is largest."""
    _, found = prepared
    for branches in found.values():
        assert branches[0].option is None
        assert branches[0].error == 0
        separable = [b.error for b in branches if b.option and b.option.form == "separable"]
        assert all(0 < b.error <= 1 for b in branches[1:])
        assert separable == sorted(separable, reverse=True)


def test_costs_are_shares_of_the_whole(prepared, samples):
    net = supernet(prepared, cost="params")
    assert net.saved().item() == 0
    facts, found = prepared
    total = sum(linear.convolution.weights for linear in facts.linears.values())
    for node, branches in found.items():
        own = facts.linears[node].convolution
        assert branches[0].costs["params"] == pytest.approx(own.weights / total)
        assert all(b.costs["macs"] < branches[0].costs["macs"] for b in branches[1:])
        assert all(b.costs["seconds"] >= 0 for b in branches)


def test_what_is_refused(samples):
    for wrong in ({"cost": "flops"}, {"gate": "step"}, {"epochs": -1}, {"target": 1.5}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            Selection(**wrong)
    g = Graph(4, 8)
    dense = g.model(g.op("MatMul", "x", g.w(8, 8)))
    with pytest.raises(UnsupportedModelError, match="no convolution"):
        search(dense, random_inputs(dense, 4))


def test_operators_without_weights_are_chosen_from_too(samples):
    few = [SubstituteOperators(("average_pool", "skip"), step=1)]
    quick = Selection(warm_up=1, epochs=3, tuning=0, batch=8, factor=1e4)
    found = search(network(), samples, quick, operators=few)
    assert {option.form for option in found.plan.options.values()} <= {"average_pool", "skip"}
    assert found.share < 1


def test_outputs_of_integers_stand_for_the_floats_they_are_made_of(samples):
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 3, 8), 8))
    t = g.op("Gemm", g.mean(g.op("Relu", g.conv(t, 8, 8))), g.w(8, 5), g.w(5))
    model = g.model(g.op("ArgMax", t, axis=1))
    quick = Selection(warm_up=0, epochs=1, tuning=0)
    found, named = (
        search(model, samples, quick, operators=FEW, outputs=names) for names in ((), (t,))
    )
    assert found.loss == named.loss


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"learning_rate": 0.0}, {"gate_rate": float("nan")}], ids=str
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        Selection(**wrong)
