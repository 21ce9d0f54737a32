"""Lighter operators compete with ranks and widths, and the walk writes what was predicted."""

from functools import cache

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.moments import why_rows
from onnxcomp.model import Model
from onnxcomp.numerics.moments import RowMoments
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.substitute_operators import BYPASS, SubstituteOperators
from onnxcomp.search.actions import describe
from onnxcomp.search.bypass import BypassMeter
from onnxcomp.search.losses import Losses
from onnxcomp.search.settings import Settings
from onnxcomp.search.store import Store
from tests.analysis.channel_graphs import Graph
from tests.search.cases import CASES
from tests.search.lab import Lab, distance, measured_cost

TOLERANCE = 1e-5  # relative L2: float32 products in another order
KINDS = (RemoveChannels, Factorize, SubstituteOperators)
METHOD = SubstituteOperators.name


def blocks() -> Model:
    g = Graph(8, 8, 8)
    t = g.op("Relu", g.conv("x", 8, 8))
    for _ in range(2):
        h = g.op("Relu", g.conv(t, 8, 8))
        t = g.op("Relu", g.op("Add", g.conv(h, 8, 8), t))
    return g.model(g.conv(t, 8, 4, strides=[2, 2]))


def bypassed(losses: Losses) -> list:
    return [option for option in losses.forms if option.form == "bypass"]


@cache
def known(name: str) -> tuple[Lab, Losses]:
    model = blocks() if name == "blocks" else CASES[name]()
    lab = Lab.of(model, step=4, kinds=KINDS)
    return lab, lab.losses()


def substitutes(options) -> list:
    return [option for option in options if option.method == METHOD]


@pytest.mark.parametrize("name", ["residual", "concat_of_three", "channels_last"])
def test_plans_are_written_as_predicted(name):
    lab, losses = known(name)
    assert substitutes(losses.forms)
    rng, seen = np.random.default_rng(0), 0
    for _ in range(2):
        plan = lab.plan(losses, rng)
        seen += len(substitutes(plan.forms.values()))
        walked = lab.walk(plan, losses).run()
        assert measured_cost(walked.model, lab) == plan.cost
        dense = Model(lab.model.skeleton, {**lab.model.weights, **walked.weights})
        found, wanted = lab.outputs(walked.model), lab.outputs(dense)
        assert distance(found, wanted) <= TOLERANCE
        assert distance(found, lab.outputs(lab.model)) > 10 * TOLERANCE
    assert seen


@pytest.mark.parametrize(("pads", "found"), [([1, 1], 1), ([2, 0], 0), ([0, 2], 0)])
def test_a_kernel_that_looks_back_is_not_left_out(pads, found):
    """Its middle is not at the output's own position, which is what is passed on."""
    g = Graph(8, 12)
    t = g.op("Conv", "x", g.w(8, 8, 3), pads=pads)
    model = g.model(g.op("Conv", t, g.w(8, 8, 3), pads=[1, 1]))
    options = SubstituteOperators(step=1).propose(Analysis(model)).options
    assert len([option for option in options if option.form == "bypass"]) == found


def test_a_convolution_is_left_out_where_the_next_can_do_its_work():
    """The first of each block: its loss is that of the network that the walk writes."""
    lab, losses = known("blocks")
    every = list(lab.space.facts.linears)
    places = [every.index(option.target) for option in bypassed(losses)]
    assert places == [1, 3]  # the others feed the shortcut, or a narrower node
    for option in bypassed(losses):
        plan = lab.lone_plan({}, {option.target: option})
        walked = lab.walk(plan, losses).run()
        assert measured_cost(walked.model, lab) == plan.cost
        assert len(Analysis(walked.model).linears) == len(every) - 1
        dense = Model(lab.model.skeleton, {**lab.model.weights, **walked.weights})
        found, wanted = lab.outputs(walked.model), lab.outputs(dense)
        assert distance(found, wanted) <= TOLERANCE
        refitted = lab.error(walked.weights)
        assert 0.4 < refitted / losses.forms[option] < 1.5  # the walk refits the others, too
        linear = lab.space.facts.linears[option.target]
        own = {n: walked.weights[n] for n in (linear.weight, linear.bias)}
        assert lab.error(own) > 1.5 * losses.forms[option]  # without the refit of the next


def test_what_was_lost_elsewhere_is_not_the_loss_of_leaving_out():
    """In place of a network that lost much, an option costs what it adds to that."""
    lab, losses = known("blocks")
    last = list(lab.space.facts.linears.values())[-1]
    weights = {last.weight: (0.7 * lab.model.weights[last.weight]).astype(np.float32)}
    lost = lab.error(weights)
    for option in bypassed(losses):
        found = lab.meter().run(weights, [option.target]).forms[option]
        assert lost > 1.5 * losses.forms[option]
        assert 0.2 < found / losses.forms[option] < 1.0  # seven tenths reach the outputs


def test_leaving_out_never_gains(monkeypatch):
    """What is found below the error without any option is noise, and counts as nothing."""
    lab, losses = known("blocks")
    option, *_ = bypassed(losses)
    monkeypatch.setattr(BypassMeter, "errors", lambda *_: {option: -1.0})
    assert lab.meter().run(only=[option.target]).forms[option] == 0.0


def test_nothing_is_left_out_in_front_of_what_must_stay():
    lab, losses = known("blocks")
    first, reader = [*lab.space.facts.linears][1:3]
    excluded = Lab.of(blocks(), step=4, kinds=KINDS, exclude=f"^{reader}$").losses()
    assert first in [option.target for option in bypassed(losses)]
    assert [option.target for option in bypassed(excluded)] == [
        option.target for option in bypassed(losses) if option.target != first
    ]


def test_blocks_become_one_lighter_operator():
    lab, losses = known("blocks")
    first, second = [*lab.space.facts.linears][1:3]
    forms = {o.target: o for o in losses.forms if o.target == first and o.form == "bypass"}
    forms |= {o.target: o for o in losses.forms if o.target == second and o.size == (1,)}
    plan = lab.lone_plan({}, forms)
    walked = lab.walk(plan, losses).run()
    assert len(plan.forms) == 2
    assert measured_cost(walked.model, lab) == plan.cost
    dense = Model(lab.model.skeleton, {**lab.model.weights, **walked.weights})
    assert distance(lab.outputs(walked.model), lab.outputs(dense)) <= TOLERANCE


def test_they_are_in_words_in_the_report():
    lab, losses = known("residual")
    option = substitutes(losses.forms)[0]
    plan = lab.lone_plan({}, {option.target: option})
    (action,), macs = describe(lab.space, plan, losses)
    assert action.what.startswith(option.form)
    assert action.loss == losses.forms[option]
    assert macs == lab.space.facts.linears[option.target].convolution.macs


def narrowing() -> Model:
    """Four positions of a sample for 576 inputs of the second convolution."""
    g = Graph(16, 4, 4)
    t = g.op("Relu", g.conv("x", 16, 64))
    t = g.op("Relu", g.conv(t, 64, 64, strides=[2, 2]))
    return g.model(g.op("Gemm", g.mean(t), g.w(64, 5), g.w(5)))


@pytest.mark.parametrize("kinds", [KINDS, (SubstituteOperators,)], ids=["all", "alone"])
def test_forms_without_second_moments_are_refused_with_the_true_reason(kinds):
    """Also where other forms can be fitted to the rows."""
    lab = Lab.of(narrowing(), kinds=kinds, step=4)
    losses = lab.losses()
    _, second, _ = lab.space.facts.linears
    assert not [o for o in substitutes(losses.forms) if o.target == second]
    assert bool([o for o in losses.forms if o.target == second]) == (kinds == KINDS)
    (reason,) = [r.reason for r in losses.refusals if r.where == second]
    assert "separable" in reason
    assert "96 rows are few for 576 inputs; more samples help" in reason
    assert "loses half" not in reason
    enough = Lab.of(narrowing(), kinds=kinds, step=4, count=80).losses()
    assert not [r for r in enough.refusals if "rows" in r.reason]


def test_more_samples_are_no_help_for_too_many_inputs():
    rows = RowMoments.of(np.zeros((2, 9000), np.float32), np.zeros((2, 1)))
    assert why_rows(rows) == "it has 9,000 inputs, more than 8,192"


def test_reasons_are_kept_with_the_measurements(tmp_path):
    lab = Lab.of(narrowing(), kinds=KINDS, step=4)
    first = lab.meter(store=Store(tmp_path)).run()
    assert any("rows" in refusal.reason for refusal in first.refusals)
    assert lab.meter(store=Store(tmp_path)).run().refusals == first.refusals


def test_measurements_are_taken_over(tmp_path):
    lab, _ = known("residual")
    first = lab.meter(store=Store(tmp_path)).run()
    assert lab.meter(store=Store(tmp_path)).run().forms == first.forms
    assert substitutes(first.forms)


def test_they_are_among_the_methods():
    assert METHOD in Settings().methods


def test_what_is_left_out_is_measured_on_samples_that_nothing_was_fitted_on(monkeypatch):
    """Of twelve samples; fitted on all of them, the next layer seems to do the work better."""

    def lost() -> float:
        lab = Lab.of(CASES["two_heads"](), count=12, size=4, kinds=(SubstituteOperators,))
        (found,) = (
            loss for o, loss in lab.meter(measured=1).run().forms.items() if o.form == BYPASS
        )
        return found

    honest = lost()
    monkeypatch.setattr("onnxcomp.search.bypass.apart", lambda batches, measured: batches)
    assert lost() < 0.7 * honest
