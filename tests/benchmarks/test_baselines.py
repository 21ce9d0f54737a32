"""Baselines: plans keep what they say, statistics and norms are those of the data."""

import numpy as np
import pytest

from benchmarks import baselines, data
from benchmarks.common import DIGITS, model_path
from onnxcomp import load
from onnxcomp.analysis import Analysis
from onnxcomp.errors import ParameterError
from onnxcomp.model import extract
from onnxcomp.passes.working import prepare, working_model
from onnxcomp.runtime import Session
from onnxcomp.samples import as_samples


@pytest.fixture(scope="module")
def model():
    return load(model_path(DIGITS))


@pytest.fixture(scope="module")
def samples(model):
    found = data.samples(DIGITS, "fit", limit=48)
    return as_samples(dict(found), model.signature.inputs)


@pytest.fixture(scope="module")
def space(model, samples):
    facts = Analysis(working_model(prepare(model)[0], samples, seed=0), samples)
    return baselines.whole_space(facts)


@pytest.mark.parametrize("kind", ["widths", "output_basis", "input_basis", "spatial"])
def test_widest_plan_is_within_the_share_and_one_step_more_is_not(space, kind):
    def make(share):
        return baselines.uniform_plan(space, kind, share)

    kept, plan = baselines.widest(make, 0.7)
    whole = space.facts.cost.macs
    assert plan.cost.macs <= 0.7 * whole
    assert make(kept + 1 / 400).cost.macs > 0.7 * whole
    assert (plan.widths, plan.forms) != ({}, {})


def test_share_out_of_reach_is_refused(space):
    with pytest.raises(ParameterError, match="within reach"):
        baselines.widest(lambda share: baselines.uniform_plan(space, "widths", share), 1e-6)


def test_uniform_widths_keep_trunks_unless_asked(space):
    inner = baselines.uniform_plan(space, "widths", 0.5)
    every = baselines.uniform_plan(space, "widths", 0.5, trunks=True)
    assert all(len(space.groups[name].readers) == 1 for name in inner.widths)
    assert set(inner.widths) < set(every.widths)
    assert all(w == round(space.groups[n].size / 2) for n, w in every.widths.items())


@pytest.mark.parametrize(
    ("kind", "share"), [("widths", 0.5), ("output_basis", 0.5), ("spatial", 0.25)]
)
def test_written_model_costs_what_the_plan_says(space, samples, kind, share):
    plan = baselines.uniform_plan(space, kind, share, step=4)
    made = baselines.written(space, plan)
    assert Analysis(made, samples).cost.macs == plan.cost.macs
    assert plan.cost.macs < space.facts.cost.macs


def test_magnitude_drops_the_smallest_filters(space):
    name = next(n for n in space.widths if len(space.groups[n].readers) == 1)
    (producer,) = space.groups[name].producers
    linear = space.facts.linears[producer]
    kernel = linear.kernel(space.facts.model.weights[linear.weight])
    wanted = np.abs(kernel.reshape(len(kernel), -1)).sum(axis=1)
    assert baselines._norms(space, name) == pytest.approx(wanted, rel=1e-6)


def test_measured_statistics_normalise_what_they_see(model, samples):
    prepared, _ = prepare(model)
    measured = baselines.with_measured_statistics(prepared, samples)
    norms = [node for node in prepared.nodes if node.op == "BatchNormalization"]
    feed = next(samples.batches(model.signature.inputs, samples.count)).feed

    def farthest(candidate):
        """Return the largest distance of a normalised mean from the shift it should have."""
        found = Session(extract(candidate, (), [node.id for node in norms])).run(feed)
        return max(
            float(
                np.abs(found[n.id].mean(axis=(0, 2, 3)) - candidate.weights[n.inputs[2]]).max()
            )
            for n in norms
        )

    assert farthest(measured) < 1e-4  # float32 sums of a few thousand values
    assert farthest(prepared) > 1e-2  # the file has those of all training images
