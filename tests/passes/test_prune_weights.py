"""Which weights stay, that nothing else changes, and that every node is answered for."""

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.moments import collect_moments
from onnxcomp.errors import ParameterError
from onnxcomp.passes.prune_weights import PruneWeights
from onnxcomp.runtime import Session, capture_tensors
from tests.graphs import sane_feeds
from tests.passes.test_contract import GRAPHS


def facts_of(name: str) -> Analysis:
    model = GRAPHS[name]()
    return Analysis(model, sane_feeds(model, 64))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_node_is_an_option_or_a_refusal(name):
    facts = facts_of(name)
    proposal = PruneWeights().propose(facts)
    named = {o.target for o in proposal.options} | {r.where for r in proposal.refusals}
    assert {*facts.linears, *facts.not_linear} <= named


@pytest.mark.parametrize("name", ["residual", "depthwise", "dense", "transposed"])
@pytest.mark.parametrize("form", ["magnitude", "second_order"])
def test_zeros_are_exact_and_as_many_as_promised(name, form):
    facts = facts_of(name)
    pass_ = PruneWeights((form,), (60.0,))
    chosen = {}
    for option in pass_.propose(facts).options:
        linear = facts.linears[option.target]
        kernel = linear.kernel(facts.model.weights[linear.weight])
        x, y = (capture(facts, n) for n in (linear.x, linear.y))
        metrics = collect_moments(linear, [x], [y], np.random.default_rng(0))
        chosen[option], dense = pass_.fit(option, kernel, metrics)
        assert 0.9 * option.size[0] - 1 <= np.count_nonzero(dense) <= option.size[0]
    draft = facts.model.edit()
    pass_.apply(draft, facts, chosen)
    pruned = draft.seal(by="test")
    kept = {facts.linears[o.target].weight: o.size[0] for o in chosen}
    assert kept
    for name, array in pruned.weights.items():
        if name in kept:
            assert np.count_nonzero(array) <= kept[name]
        else:
            assert array is facts.model.weights[name]


def capture(facts: Analysis, name: str) -> np.ndarray:
    model = facts.model
    feed = next(facts.samples.batches(model.signature.inputs, 64)).feed
    if name in feed:
        return feed[name]
    assert name in capture_tensors(model, feed)
    draft_outputs = Session(extracted(facts, name))
    return draft_outputs.run({n: feed[n] for n in draft_outputs.input_names})[name]


def extracted(facts: Analysis, name: str):
    from onnxcomp.model import extract

    return extract(facts.model, (), (name,))


def test_second_order_keeps_the_outputs_nearer():
    facts = facts_of("dense")
    linear = facts.linears[next(iter(facts.linears))]
    node = max(facts.linears.values(), key=lambda one: one.in_channels)
    kernel = node.kernel(facts.model.weights[node.weight])
    x, y = capture(facts, node.x), capture(facts, node.y)
    metrics = collect_moments(node, [x], [y], np.random.default_rng(0))
    errors = {}
    for form in ("magnitude", "second_order"):
        pass_ = PruneWeights((form,), (50.0,))
        option = next(o for o in pass_.propose(facts).options if o.target == node.id)
        _, dense = pass_.fit(option, kernel, metrics)
        errors[form] = metrics[0].error(dense.reshape(len(dense), -1))
    assert linear.id in facts.linears
    assert errors["second_order"] < errors["magnitude"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"forms": ("random",)}, "forms"), ({"percentiles": (100.0,)}, "percentiles")],
)
def test_wrong_parameters_are_named(fields, named):
    with pytest.raises(ParameterError, match=named):
        PruneWeights(**fields)
