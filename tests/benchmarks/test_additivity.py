"""Additivity: predictions are the allocator's own, random plans are repeatable."""

import numpy as np
import pytest

from benchmarks import additivity, data
from benchmarks.baselines import whole_space
from benchmarks.common import DIGITS, model_path
from onnxcomp import load
from onnxcomp.analysis import Analysis
from onnxcomp.passes.working import prepare, working_model
from onnxcomp.samples import as_samples
from onnxcomp.search.allocation import Allocator
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.settings import Limits

COUNT = 32


@pytest.fixture(scope="module")
def table():
    """Return a space and its losses."""
    model = load(model_path(DIGITS))
    samples = as_samples(
        dict(data.samples(DIGITS, "fit", limit=COUNT)), model.signature.inputs
    )
    facts = Analysis(working_model(prepare(model)[0], samples, seed=0), samples)
    feeds = [batch.feed for batch in samples.batches(model.signature.inputs, COUNT)]
    space = whole_space(facts)
    meter = LossMeter(space, feeds, measured=1, seed=0, threads=1, progress=lambda *_: None)
    return space, meter.run()


def test_prediction_is_what_the_allocator_adds_up(table):
    space, losses = table
    plan = Allocator(space, losses).choose(Limits(macs=0.5 * space.facts.cost.macs))
    assert plan.widths or plan.forms
    predicted = additivity.predicted_loss(space, losses, plan)
    assert predicted == pytest.approx(plan.loss, rel=1e-6)
    other = additivity._disturbed(losses, np.random.default_rng(0))
    assert additivity.predicted_loss(space, other, plan) != pytest.approx(plan.loss, rel=0.01)


def test_disturbed_losses_keep_the_order_within_a_form(table):
    _, losses = table
    other = additivity._disturbed(losses, np.random.default_rng(1))
    assert other.forms.keys() == losses.forms.keys()
    ratios = {}
    for option, lost in losses.forms.items():
        if lost > 0:
            ratios.setdefault((option.target, option.form), []).append(
                other.forms[option] / lost
            )
    assert all(np.ptp(each) <= 1e-9 * max(each) for each in ratios.values())
    assert np.std(np.log([each[0] for each in ratios.values()])) > 0.3


def test_error_of_the_original_is_zero_and_of_another_not(table):
    space, _ = table
    model = space.facts.model
    inputs = model.signature.inputs
    samples = as_samples(dict(data.samples(DIGITS, "new", limit=8)), inputs)
    error = additivity._Error(space.facts, samples)
    assert error.of(model) == 0
    weight = next(iter(space.facts.linears.values())).weight
    draft = model.edit()
    draft.set_weight(weight, 1.1 * model.weights[weight])
    assert error.of(draft.seal(by="test")) > 1e-4
