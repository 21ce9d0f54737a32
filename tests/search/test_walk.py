"""The walk writes what it solved, at the predicted cost, and its refits pay."""

import numpy as np
import pytest

from onnxcomp.search.space import Plan
from tests.analysis.channel_graphs import Graph
from tests.search.cases import CASES, residual, weight_in_three_places
from tests.search.lab import Lab, distance, measured_cost

TOLERANCE = 1e-5  # relative L2 between the dense network of the walk and the written one


def stream_outputs(walk, lab: Lab) -> dict[str, np.ndarray]:
    """Outputs of the network that the walk believes it makes."""
    names = [v.name for v in lab.model.signature.outputs]
    return {n: np.concatenate([np.ravel(b) for b in walk._current.peek(n)]) for n in names}


@pytest.mark.parametrize("make", CASES.values(), ids=list(CASES))
def test_written_models_are_what_was_solved(make):
    """Random plans over all groups and nodes; predicted costs are exact."""
    lab = Lab.of(make())
    losses = lab.losses()
    rng = np.random.default_rng(1)
    original = lab.outputs(lab.model)
    changed = 0.0
    for _ in range(3):
        plan = lab.plan(losses, rng)
        walk = lab.walk(plan, losses)
        small = walk.run()
        assert small.signature == lab.model.signature
        found = {n: a for n, a in lab.outputs(small).items() if a.dtype.kind == "f"}
        wanted = stream_outputs(walk, lab)
        assert distance(found, {n: wanted[n] for n in found}) <= TOLERANCE
        changed = max(changed, distance(found, {n: original[n] for n in found}))
        assert measured_cost(small, lab) == plan.cost
    assert changed > 100 * TOLERANCE  # the plans did something


def lone_plan(lab: Lab, widths: dict[str, int], forms=None) -> Plan:
    forms = forms or {}
    cost = lab.space.cost(widths, forms)
    return Plan(widths, forms, 0.0, cost, lab.space.seconds(widths, forms))


def error(lab: Lab, model) -> float:
    return distance(lab.outputs(model), lab.outputs(lab.model))


def test_refitting_pays():
    """The walk beats the same structure from the weights alone."""
    lab = Lab.of(residual(), count=48)
    losses = lab.losses()
    widths = {n: max(lab.space.groups[n].size // 2, 1) for n in losses.orders}
    widths = {n: w for n, w in widths.items() if w in lab.space.widths[n]}
    assert widths
    plan = lone_plan(lab, widths)
    refitted = error(lab, lab.walk(plan, losses).run())
    walk = lab.walk(plan, losses)
    walk._data_aware = False
    blind = error(lab, walk.run())
    assert refitted < 0.8 * blind


def test_the_shortcut_correction_pays(monkeypatch):
    """The last node in front of an Add takes over what the other branch lost."""
    lab = Lab.of(residual(), count=48)
    losses = lab.losses()
    stem = next(n for n in lab.space.forms if n == lab.model.nodes[0].id)
    option = min(lab.space.forms[stem], key=lambda o: (o.form != "output_basis", o.size))
    plan = lone_plan(lab, {}, {stem: option})
    with_it = error(lab, lab.walk(plan, losses).run())
    monkeypatch.setattr("onnxcomp.search.walk.Walk._shortcut", lambda *_: "")
    without = error(lab, lab.walk(plan, losses).run())
    assert with_it < without


def test_shared_weights_stay_as_they_are():
    lab = Lab.of(weight_in_three_places())
    losses = lab.losses()
    small = lab.walk(lab.plan(losses, np.random.default_rng(3)), losses).run()
    shared = next(n for n, uses in lab.model.readers.items() if len(uses) == 3)
    assert np.array_equal(small.weights[shared], lab.model.weights[shared])


def test_an_empty_plan_changes_nothing():
    lab = Lab.of(residual())
    small = lab.walk(lone_plan(lab, {}), lab.losses()).run()
    assert small.digest == lab.model.edit().seal(by="test").digest


def test_excluded_nodes_keep_their_weights():
    model = residual()
    last = model.nodes[-1].id
    lab = Lab.of(model, exclude=f"^{last}$")
    losses = lab.losses()
    assert lab.space.excluded == {last}
    plan = lab.plan(losses, np.random.default_rng(1))
    assert plan.widths or plan.forms
    small = lab.walk(plan, losses).run()
    for name in lab.model.producers[last].inputs[1:]:
        assert np.array_equal(small.weights[name], lab.model.weights[name])
    other = Lab.of(model)
    moved = other.walk(plan, losses).run().weights
    assert any(
        not np.array_equal(moved[name], other.model.weights[name])
        for name in other.model.producers[last].inputs[1:]
    )


def test_biases_of_others_are_not_touched():
    """A Conv's bias that a BatchNorm reads, too, becomes private before it is refitted."""
    lab = Lab.of(CASES["bias_that_others_read"]())
    losses = lab.losses()
    small = lab.walk(lab.plan(losses, np.random.default_rng(1)), losses).run()
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
    lab = Lab.of(residual())
    losses = lab.losses()
    plan = lab.plan(losses, np.random.default_rng(4))
    assert lab.walk(plan, losses).run().digest == lab.walk(plan, losses).run().digest
