"""`compress` by collaborative compression: limits, refits, predicted costs, refusals."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("torch", reason="gradients need PyTorch")

from onnxcomp.analysis import Analysis
from onnxcomp.errors import DataError, ParameterError
from onnxcomp.model import Model
from onnxcomp.passes.compress_collaboratively import CompressCollaboratively
from onnxcomp.passes.working import finish, prepare, working_model
from onnxcomp.samples import Samples
from onnxcomp.search.collaboration import CollaborativeSearch, collaborate, plan_at
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.space import Space
from tests.passes.exact_checks import drift
from tests.passes.test_compress_collaboratively import dense, mixed, residual, seconds_of
from tests.search.searching import inputs

SETTINGS = Settings(
    methods=("compress_collaboratively",), grid="off", latency=False, force=True
)
COUNT = 64


@cache
def samples() -> Samples:
    model = residual()
    return Samples(inputs(model, COUNT), np.arange(COUNT) % 5)


def run(limits: Limits, **options: object) -> Result:
    arguments = {"data": samples(), "limits": limits, "settings": SETTINGS, **options}
    return compress(residual(), **arguments)


def change(model: Model) -> float:
    feed = next(samples().batches(model.signature.inputs, COUNT)).feed
    return drift(residual(), model, feed)


def macs(model: Model) -> int:
    return Analysis(model, samples()).cost.macs


@cache
def half() -> Result:
    return run(Limits(macs=0.5))


def test_a_limit_on_macs_is_met_and_used_up():
    result = half()
    assert result.met
    assert isinstance(result.search, CollaborativeSearch)
    share = macs(result.model) / macs(residual())
    assert 0.42 < share <= 0.5
    assert result.plan.cost.macs == macs(result.model)
    methods = {action.method for action in result.report.actions}
    assert methods == {"compress_collaboratively"}
    assert all(action.loss >= 0 for action in result.report.actions)
    assert any("first or a last" in r.reason for r in result.report.refusals)
    assert result.report.front == ()


def test_refits_bring_the_outputs_nearer():
    plain = run(Limits(macs=0.5), settings=replace(SETTINGS, data_aware=False))
    assert plain.met
    for result in (plain, half()):  # its dense weights are the model
        candidate = result.search.solve(result.plan, result.search.losses)
        change_of = result.search.change
        assert candidate.error == pytest.approx(change_of(candidate.model), rel=1e-4)
        assert candidate.error != pytest.approx(change_of(residual()), rel=1e-1)
    assert change(half().model) < 0.8 * change(plain.model)


@pytest.mark.parametrize("limits", [Limits(params=0.6), Limits(size=0.8)], ids=str)
def test_limits_on_parameters_and_bytes(limits):
    result = run(limits)
    assert result.met
    assert not result.plan.empty


def test_a_limit_on_the_time_plans_by_seconds():
    result = run(Limits(latency=0.7), dry_run=True)
    assert result.plan.seconds <= 0.7 * result.search.nothing.plan.seconds
    small = result.search.solve(result.plan, result.search.losses).model
    assert any(node.op == "Gather" for node in small.nodes)
    assert result.plan.seconds == pytest.approx(seconds_of(small, samples()))


def test_slow_index_selections_are_left_out_under_any_limit_on_the_time():
    """Those of another cost, too; `half` has MACs."""
    search, limits, counts = half().search, Limits(macs=0.8 * macs(residual())), []
    for seconds in (np.inf, 9 * search.nothing.plan.seconds):
        plan, reason = search.choose(search.losses, limits, seconds=seconds)
        assert not reason
        assert plan.cost.macs <= limits.macs
        places = plan.options.values()
        counts.append(sum(len(each["kept"]) < len(each["read"]) for each in places))
    assert counts[0] > counts[1]


def test_files_are_predicted_with_their_index_selections():
    search = half().search
    for share in (0.5, 0.6, 0.7, 0.8):
        limits = Limits(size=share * residual().file_bytes)
        plan, reason = search.choose(search.losses, limits)
        assert not reason
        assert search.file_bytes(plan) <= limits.size
        proto = search.solve(plan, search.losses).model.to_proto()
        nodes = [node for node in proto.graph.node if node.op_type == "Gather"]
        indices = {node.input[1] for node in nodes}
        arrays = [each for each in proto.graph.initializer if each.name in indices]
        further = search.file_bytes(plan) - search.space.file_bytes(plan.cost, plan.forms)
        assert nodes
        assert further == pytest.approx(sum(m.ByteSize() for m in (*nodes, *arrays)), rel=0.1)


@pytest.mark.parametrize("make", [residual, mixed])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_every_node_is_in_an_action_or_refused(make, share):
    model = make()
    data = Samples(inputs(model, COUNT), np.arange(COUNT) % 5)
    result = compress(model, data=data, limits=Limits(macs=share), settings=SETTINGS)
    facts, report = result.search.space.facts, result.report
    changed = {action.where for action in report.actions}
    refused = {refusal.where for refusal in report.refusals}
    assert changed == result.plan.kept.keys()
    assert changed | refused == facts.linears.keys() | facts.not_linear.keys()
    assert changed.isdisjoint(refused)


def test_too_much_gives_the_least_there_is():
    result = run(Limits(macs=0.001))
    assert not result.met
    assert any("more than collaborative" in note for note in result.report.notes)
    assert macs(result.model) < 0.4 * macs(residual())


def test_a_time_box_does_not_look_for_further_plans():
    result = run(Limits(macs=0.5), settings=replace(SETTINGS, time_limit=600.0))
    assert result.model.digest == half().model.digest


def test_without_time_nothing_changes():
    """Gradients and the rounds in which units go end with the limit, too."""
    result = run(Limits(macs=0.5), settings=replace(SETTINGS, time_limit=1e-6))
    assert not result.met
    assert result.plan.empty
    assert any("time limit" in note for note in result.report.notes)
    assert "gradients" in result.search.seconds


def test_a_run_goes_on_where_another_ended(tmp_path):
    first = run(Limits(macs=0.5), resume=tmp_path)
    assert first.model.digest == half().model.digest
    again = run(Limits(macs=0.5), resume=tmp_path)
    assert again.model.digest == first.model.digest
    assert "walk" in first.search.seconds
    assert "walk" not in again.search.seconds


def test_excluded_nodes_stay():
    node = next(action.where for action in half().report.actions)
    result = run(Limits(macs=0.7), settings=replace(SETTINGS, exclude=f"^{node}$"))
    assert node not in {action.where for action in result.report.actions}
    assert any(r.where == node and r.reason == "excluded" for r in result.report.refusals)


@pytest.mark.parametrize("make", [residual, dense, mixed])
@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_predicted_costs_are_those_of_the_model(make, rate):
    """With index selections, ranks above the outputs that are left, and cut producers."""
    model = make()
    data = Samples(inputs(model, 8), np.arange(8) % 5)
    work = working_model(prepare(model)[0], data, seed=0)
    facts = Analysis(work, data)
    for pass_ in (
        CompressCollaboratively(rate=rate),
        CompressCollaboratively(rate=rate, reconstruct=True),
    ):
        space = Space(facts, (), pass_.target)
        plan = plan_at(rate, pass_.layers(facts), space, pass_)
        small = collaborate(model, data, pass_)
        found = Analysis(small, data).cost
        base = Analysis(finish(work), data).cost
        zeros = facts.cost - base  # biases that were made explicit and stayed zero
        assert plan.cost.macs == found.macs
        assert 0 <= (plan.cost - found).params <= zeros.params


def test_the_methods_that_cannot_go_together():
    with pytest.raises(ParameterError, match="compress_collaboratively alone"):
        Settings(methods=("compress_collaboratively", "factorize"))
    with pytest.raises(ParameterError, match="instead of drop or drift"):
        run(Limits(drop=0.01))


def test_samples_are_asked_for_before_images_are_inverted(monkeypatch):
    monkeypatch.setattr("onnxcomp.search.setup._inverted", None)
    for limits in (Limits(macs=0.5), Limits()):
        with pytest.raises(DataError, match="gradients need samples"):
            run(limits, data=None)
