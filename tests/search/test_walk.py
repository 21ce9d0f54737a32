"""The walk writes what it solved, at the predicted cost, and its refits pay."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.model import Array, Model
from onnxcomp.passes.working import prepare, working_model
from onnxcomp.search.adaptation import Adapted
from onnxcomp.search.space import Plan
from onnxcomp.search.walk import Walk
from tests.analysis.channel_graphs import Graph
from tests.search.cases import CASES, residual
from tests.search.lab import Lab, distance, known, measured_cost

TOLERANCE = 1e-5  # relative L2 between the dense network of the walk and the written one


def dense(model: Model, weights: Mapping[str, Array]) -> Model:
    """The working model with the weights that a walk says compute the same."""
    return Model(model.skeleton, {**model.weights, **weights})


@pytest.mark.parametrize("name", CASES)
def test_written_models_are_what_was_solved(name):
    """Random plans over all groups and nodes; predicted costs are exact."""
    lab, losses = known(name)
    rng = np.random.default_rng(1)
    original = lab.outputs(lab.model)
    changed = 0.0
    for _ in range(3):
        plan = lab.plan(losses, rng)
        walked = lab.walk(plan, losses).run()
        small = walked.model
        assert small.signature == lab.model.signature
        assert walked.weights.keys() <= lab.model.weights.keys()
        found = {n: a for n, a in lab.outputs(small).items() if a.dtype.kind == "f"}
        wanted = lab.outputs(dense(lab.model, walked.weights))
        assert distance(found, {n: wanted[n] for n in found}) <= TOLERANCE
        changed = max(changed, distance(found, {n: original[n] for n in found}))
        assert measured_cost(small, lab) == plan.cost
    assert changed > 100 * TOLERANCE  # the plans did something


def error(lab: Lab, model) -> float:
    return distance(lab.outputs(model), lab.outputs(lab.model))


def test_refitting_pays():
    """The walk beats the same structure from the weights alone."""
    lab = Lab.of(residual(), count=48)
    losses = lab.losses()
    widths = {n: max(lab.space.groups[n].size // 2, 1) for n in losses.orders}
    widths = {n: w for n, w in widths.items() if w in lab.space.widths[n]}
    assert widths
    plan = lab.lone_plan(widths)
    refitted = error(lab, lab.walk(plan, losses).run().model)
    blind = error(lab, lab.walk(plan, losses, data_aware=False).run().model)
    assert refitted < 0.8 * blind


def test_the_shortcut_correction_pays(monkeypatch):
    """The last node in front of an Add takes over what the other branch lost."""
    lab = Lab.of(residual(), count=48, step=4)
    losses = lab.losses()
    stem = next(n for n in lab.space.forms if n == lab.model.nodes[0].id)
    option = min(lab.space.forms[stem], key=lambda o: (o.form != "output_basis", o.size))
    plan = lab.lone_plan({}, {stem: option})
    with_it = error(lab, lab.walk(plan, losses).run().model)
    monkeypatch.setattr("onnxcomp.search.twins.Twins._shortcut", lambda *_: "")
    without = error(lab, lab.walk(plan, losses).run().model)
    assert with_it < without


def test_shared_weights_stay_as_they_are():
    lab, losses = known("weight_in_three_places")
    small = lab.walk(lab.plan(losses, np.random.default_rng(3)), losses).run().model
    shared = next(n for n, uses in lab.model.readers.items() if len(uses) == 3)
    assert np.array_equal(small.weights[shared], lab.model.weights[shared])


def test_an_empty_plan_changes_nothing():
    lab, losses = known("residual")
    small = lab.walk(lab.lone_plan({}), losses).run().model
    assert small.digest == lab.model.edit().seal(by="test").digest


def test_excluded_nodes_keep_their_weights():
    model = residual()
    last = model.nodes[-1].id
    lab = Lab.of(model, exclude=f"^{last}$")
    losses = lab.losses()
    assert lab.space.excluded == {last}
    plan = lab.plan(losses, np.random.default_rng(1))
    assert plan.widths or plan.forms
    small = lab.walk(plan, losses).run().model
    for name in lab.model.producers[last].inputs[1:]:
        assert np.array_equal(small.weights[name], lab.model.weights[name])
    other = Lab.of(model)
    moved = other.walk(plan, losses).run().model.weights
    assert any(
        not np.array_equal(moved[name], other.model.weights[name])
        for name in other.model.producers[last].inputs[1:]
    )


def test_biases_of_others_are_not_touched():
    """A Conv's bias that a BatchNorm reads, too, becomes private before it is refitted."""
    lab, losses = known("bias_that_others_read")
    small = lab.walk(lab.plan(losses, np.random.default_rng(1)), losses).run().model
    norms = [node for node in small.nodes if node.op == "BatchNormalization"]
    assert norms
    for node in norms:
        assert not small.weights[node.input(2)].any()


def test_groups_with_a_reader_that_cannot_be_refitted_stay():
    g = Graph(8, 8, 8)
    t = g.op("Relu", g.conv("x", 8, 16))
    side = g.op("Gemm", g.mean(t), g.w(16, 8), alpha=0.5)
    lab = Lab.of(g.model(g.conv(t, 16, 8), side))
    assert not lab.space.widths
    assert lab.space.forms  # of the same node whose channels must stay
    assert any("cannot be refitted: it scales" in r.reason for r in lab.space.refusals)


def test_two_walks_are_the_same():
    lab, losses = known("residual")
    plan = lab.plan(losses, np.random.default_rng(4))
    first, second = (lab.walk(plan, losses).run() for _ in range(2))
    assert first.model.digest == second.model.digest
    assert all(np.array_equal(a, second.weights[n]) for n, a in first.weights.items())


def chain() -> Model:
    """Every convolution stands in front of a Relu; the last one's output is what counts."""
    g = Graph(8, 8, 8)
    t, inputs = "x", 8
    for outputs in (16, 16, 12):
        t, inputs = g.op("Relu", g.conv(t, inputs, outputs)), outputs
    return g.model(t)


def half_widths(lab: Lab) -> dict[str, int]:
    return {n: widths[len(widths) // 2] for n, widths in lab.space.widths.items()}


def sparse(*, shortcut: bool) -> Model:
    """A Relu that cuts most of a convolution's output off, alone or behind an Add."""
    g = Graph(8, 8, 8)
    bias = g.constant(np.full(16, -1, np.float32))
    t = g.op("Relu", g.conv("x", 8, 16))
    y = g.op("Conv", t, g.w(16, 16, 3, 3), bias, pads=[1] * 4)
    return g.model(g.op("Relu", g.op("Add", y, t) if shortcut else y))


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_solution_for_the_relu_pays(shortcut, monkeypatch):
    """It loses less behind the Relu than the best in front of it."""
    lab = Lab.of(sparse(shortcut=shortcut), step=8)
    losses = lab.losses()
    _, last = lab.space.facts.linears
    options = [option for option in losses.forms if option.target == last]
    assert options
    for option in options:
        plan = lab.lone_plan({}, {last: option})
        with_it = lab.error(lab.walk(plan, losses).run().weights)
        with monkeypatch.context() as patch:
            patch.setattr("onnxcomp.search.twins.Twins.rectified", lambda *_: False)
            without = lab.error(lab.walk(plan, losses).run().weights)
        assert with_it < 0.98 * without


def test_a_worse_solution_for_the_relu_is_refused(monkeypatch):
    """Whatever it is: the walk then ends as if there were none."""
    lab = Lab.of(chain(), step=4)
    losses = lab.losses()
    plan = lab.lone_plan(half_widths(lab))
    taken = lab.walk(plan, losses).run().model.digest
    solve, calls = Walk._solve, []

    def spoil(self, site, kernel, metrics):
        found = solve(self, site, kernel, metrics)
        calls.append(site.linear.id)
        if calls.count(site.linear.id) == 2:
            found = replace(found, kernel=found.kernel * 1.5)
        return found

    monkeypatch.setattr(Walk, "_solve", spoil)
    refused = lab.walk(plan, losses).run().model.digest
    assert max(calls.count(node) for node in calls) == 2
    monkeypatch.setattr(Walk, "_solve", solve)
    monkeypatch.setattr("onnxcomp.search.twins.Twins.rectified", lambda *_: False)
    assert refused == lab.walk(plan, losses).run().model.digest != taken


def mixed_plan(lab: Lab, losses) -> Plan:
    """Half of the widths, and a form on the last node that has one at them."""
    rng = np.random.default_rng(0)
    plans = (lab.plan(losses, rng) for _ in range(50))
    return next(plan for plan in plans if plan.widths and plan.forms)


def test_a_network_adapted_by_nothing_is_solved_as_it_is():
    lab, losses = known("residual")
    plan = mixed_plan(lab, losses)
    linears = lab.space.facts.linears.values()
    ones = {li.id: (np.ones(li.out_channels), np.zeros(li.out_channels)) for li in linears}
    plain = lab.walk(plan, losses).run()
    adapted = lab.walk(plan, losses, adapted=Adapted(lab.model, lab.model, ones)).run()
    assert adapted.model.digest == plain.model.digest
    assert all(np.array_equal(a, adapted.weights[n]) for n, a in plain.weights.items())


def test_what_was_solved_in_an_adapted_network_is_written_at_the_originals_scale():
    """The written model is the dense one, with every node mapped back."""
    original = working_model(prepare(residual())[0], None, seed=0)
    rng = np.random.default_rng(0)
    scales, draft = {}, original.edit()
    for linear in Analysis(original).linears.values():
        scale, shift = rng.uniform(0.5, 2, linear.out_channels), rng.normal(size=16)
        shift = shift[: linear.out_channels]
        kernel = linear.kernel(original.weights[linear.weight])
        draft.set_weight(linear.weight, linear.stored(kernel * scale[:, None, None, None]))
        bias = original.weights[linear.bias]
        draft.set_weight(linear.bias, (bias * scale + shift).astype(np.float32))
        scales[linear.id] = scale, shift
    lab = Lab.of(draft.seal(by="test"), step=4)
    adapted = Adapted(original, lab.model, scales)
    losses = lab.losses()
    walked = lab.walk(mixed_plan(lab, losses), losses, adapted=adapted).run()
    weights = dict(walked.weights)
    for linear in lab.space.facts.linears.values():
        if linear.weight in weights:
            kernel = linear.kernel(weights[linear.weight])
            every = np.arange(linear.out_channels)
            kernel, bias = adapted.restore(linear.id, kernel, weights[linear.bias], every)
            weights[linear.weight] = linear.stored(kernel)
            weights[linear.bias] = bias.astype(np.float32)
    found = lab.outputs(walked.model)
    assert distance(found, lab.outputs(dense(original, weights))) <= TOLERANCE
    assert distance(found, lab.outputs(dense(original, walked.weights))) > 0.1


def test_channels_that_go_stay_alive_in_the_dense_weights():
    """So that, in place of all others, a group can be measured at every width."""
    lab, losses = known("residual")
    plan = lab.lone_plan(half_widths(lab))
    weights = lab.walk(plan, losses).run().weights
    checked = 0
    for name, width in plan.widths.items():
        gone = losses.orders[name].order[: lab.space.groups[name].size - width]
        for node in lab.space.groups[name].producers:
            linear = lab.space.facts.linears[node]
            if linear.weight in weights:
                kernel = linear.kernel(weights[linear.weight])
                assert np.abs(kernel[gone]).reshape(len(gone), -1).max(axis=1).all()
                checked += 1
    assert checked
