"""Emitted layers are what their definition says, and producers follow them."""

import importlib.util
from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="gradients need PyTorch")

from onnxcomp.analysis import Analysis
from onnxcomp.errors import DataError, LimitError, ParameterError
from onnxcomp.model import Array, Model
from onnxcomp.numerics.collaborative import Kept
from onnxcomp.passes.base import Arrays, Option
from onnxcomp.passes.compress_collaboratively import (
    CompressCollaboratively,
    original_factors,
)
from onnxcomp.samples import Samples
from tests.analysis.channel_graphs import Graph
from tests.graphs import SHARED
from tests.passes.exact_checks import drift
from tests.search.searching import inputs

TOLERANCE = 1e-6  # relative L2: float32 products in another order
HALF = CompressCollaboratively()
MOST = CompressCollaboratively(rate=0.7)


def residual() -> Model:
    """Blocks on a trunk that several layers read, with BatchNorm kept."""
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 3, 16), 16))
    for _ in range(2):
        h = g.op("Relu", g.bn(g.conv(t, 16, 12), 12))
        t = g.op("Relu", g.op("Add", g.bn(g.conv(h, 12, 16), 16), t))
    return g.model(g.op("Gemm", g.op("Flatten", g.mean(t)), g.w(16, 5), g.w(5)))


def mixed() -> Model:
    """1 x 1, depthwise, transposed, strided with pads, and dense layers."""
    g = Graph(3, 9, 9)
    t = g.op("Relu", g.conv("x", 3, 12))
    t = g.op("Clip", g.conv(t, 12, 16, kernel=1), g.constant(np.float32(0)))
    t = g.op("Relu", g.conv(t, 16, 16, group=16))
    t = g.op("Relu", g.op("Conv", t, g.w(20, 16, 3, 3), strides=[2, 2], pads=[0, 1, 2, 1]))
    t = g.op("Relu", g.op("ConvTranspose", t, g.w(20, 12, 2, 2), g.w(12), strides=[2, 2]))
    t = g.op("Relu", g.op("Gemm", g.op("Flatten", g.mean(t)), g.w(12, 24), g.w(24)))
    return g.model(g.op("Gemm", t, g.w(24, 6), g.w(6)))


MODELS = {"residual": residual, "mixed": mixed}


@cache
def facts_of(name: str) -> Analysis:
    if name in MODELS:
        model = MODELS[name]()
        samples = Samples(inputs(model, 8), np.arange(8) % 5)
    else:
        path = SHARED / "models" / f"{name}.onnx"
        if not path.exists():
            pytest.skip("../shared is absent")
        model = Model.from_proto(onnx.load(path))
        samples = Samples(inputs(model, 4), np.arange(4))
    return Analysis(model, samples)


def feed_of(facts: Analysis) -> Mapping[str, Array]:
    return next(facts.samples.batches(facts.model.signature.inputs, 2)).feed


def applied(facts: Analysis, chosen: Mapping[Option, Arrays]) -> Model:
    draft = facts.model.edit()
    HALF.apply(draft, facts, chosen)
    return draft.seal(by="test")


def by_definition(facts: Analysis, kept: Mapping[str, Kept]) -> Model:
    """The dense model with the selected channels zeroed and the truncated SVD applied."""
    weights = dict(facts.model.weights)
    for node, each in kept.items():
        linear = facts.linears[node]
        kernel = linear.kernel(weights[linear.weight])
        kernel[:, list(each.dropped)] = 0
        if each.rank is not None:
            u, s, vt = np.linalg.svd(kernel.reshape(len(kernel), -1), full_matrices=False)
            r = each.rank
            kernel = ((u[:, :r] * s[:r]) @ vt[:r]).reshape(kernel.shape)
        weights[linear.weight] = linear.stored(kernel)
    return Model(facts.model.skeleton, weights)


RATES = (0.2, 0.5, 0.7)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", [*MODELS, "mlperftiny_cifar10_resnet8"])
def test_emitted_layers_equal_their_definition(name, rate):
    """Producers that lost channels with their readers, and index selections, included."""
    facts = facts_of(name)
    pass_ = CompressCollaboratively(rate=rate)
    kept = pass_.layers(facts).at(rate)
    small, feed = applied(facts, pass_.solve(facts)), feed_of(facts)
    assert small.signature == facts.model.signature
    assert drift(by_definition(facts, kept), small, feed) <= TOLERANCE
    assert drift(facts.model, small, feed) > 1e3 * TOLERANCE
    after, before = Analysis(small, facts.samples).cost, facts.cost
    assert after.macs <= (1 - rate) * before.macs
    assert after.params < before.params


def test_the_comparison_sees_one_channel_and_one_singular_value():
    facts = facts_of("residual")
    kept = MOST.layers(facts).at(0.7)
    small, feed = applied(facts, MOST.solve(facts)), feed_of(facts)
    node, each = next((n, k) for n, k in kept.items() if k.dropped and k.rank)
    for wrong in (Kept(each.dropped[1:], each.rank), Kept(each.dropped, each.rank + 1)):
        wanted = by_definition(facts, {**kept, node: wrong})
        assert drift(wanted, small, feed) > 1e2 * TOLERANCE


def test_producers_follow_the_only_reader_and_others_stay():
    """Inside of a block filters go; in front of a reader of the trunk a Gather stays."""
    facts = facts_of("residual")
    layers = HALF.layers(facts)
    kept = layers.at(0.5)
    removed = layers.cut(kept)
    places = layers.places(kept, removed)
    chosen = HALF.solve(facts)
    small = applied(facts, chosen)
    gathered = {n for n, p in places.items() if len(p["kept"]) < len(p["read"])}
    inner = {n for n, p in places.items() if len(p["read"]) < facts.linears[n].in_channels}
    assert gathered
    assert inner
    assert gathered.isdisjoint(inner)
    assert sum(node.op == "Gather" for node in small.nodes) == len(gathered)
    # The same with a Gather everywhere, as each layer by itself would have it.
    whole = {
        option: {
            "read": np.arange(facts.linears[option.target].in_channels),
            "kept": arrays["kept"],
            **original_factors(facts, option.target, kept[option.target], {}),
        }
        for option, arrays in chosen.items()
    }
    everywhere = applied(facts, whole)
    assert sum(node.op == "Gather" for node in everywhere.nodes) > len(gathered)
    assert drift(everywhere, small, feed_of(facts)) <= TOLERANCE
    assert Analysis(small).cost.macs < Analysis(everywhere).cost.macs


def test_the_square_root_of_the_singular_values_is_in_both_parts():
    facts = facts_of("residual")
    chosen = MOST.solve(facts)
    option, arrays = next((o, a) for o, a in chosen.items() if o.form == "pruned_decomposed")
    assert option.size == (len(arrays["kept"]), len(arrays["0"]))
    rows = arrays["0"].reshape(len(arrays["0"]), -1)
    linear = facts.linears[option.target]
    kernel = linear.kernel(facts.model.weights[linear.weight])[:, arrays["kept"]]
    s = np.linalg.svd(kernel.reshape(len(kernel), -1), compute_uv=False)[: len(rows)]
    assert rows @ rows.T == pytest.approx(np.diag(s), abs=1e-9 * s[0])


def test_every_node_is_in_an_option_or_refused():
    for name in MODELS:
        facts = facts_of(name)
        proposal = HALF.propose(facts)
        where = {o.target for o in proposal.options} | {r.where for r in proposal.refusals}
        assert where == facts.linears.keys() | facts.not_linear.keys()
        assert proposal.options
        reasons = {r.where: r.reason for r in proposal.refusals}
        first, *_, last = facts.linears
        assert "first or a last" in reasons[first]
        assert "first or a last" in reasons[last]
    assert "depthwise" in reasons.values()


def test_excluded_nodes_stay_byte_for_byte():
    facts = facts_of("residual")
    free = HALF.layers(facts)
    some = next(iter(free.at(0.3)))
    layers = HALF.layers(facts, frozenset({some}))
    kept = layers.at(0.3)
    assert some in free.at(0.3)
    assert some not in kept
    linear = facts.linears[some]
    for name in layers.cut(kept):
        group = facts.channels.group(name)
        assert some not in (*group.producers, *(reader.node for reader in group.readers))
    assert {r.where: r.reason for r in layers.refusals(kept)}[linear.id] == "excluded"


def test_more_at_a_higher_rate_and_sizes_on_the_grid():
    facts = facts_of("mixed")
    costs = []
    for rate in (0.1, 0.3, 0.5, 0.7):
        small = applied(facts, CompressCollaboratively(rate=rate).solve(facts))
        costs.append(Analysis(small, facts.samples).cost.macs)
    assert costs == sorted(costs, reverse=True)
    eights = CompressCollaboratively(rate=0.5, step=4)
    for node, kept in eights.layers(facts).at(0.5).items():
        count = facts.linears[node].in_channels
        assert (count - len(kept.dropped)) % 4 == 0 or not kept.dropped
        assert kept.rank is None or kept.rank % 4 == 0 or kept.rank >= count


def test_seconds_ask_for_other_rates_than_macs():
    facts = facts_of("mixed")
    macs, seconds = (
        CompressCollaboratively(cost=cost).layers(facts) for cost in ("macs", "seconds")
    )
    assert macs.at(0.3) != seconds.at(0.3)
    assert seconds.most <= 0.95


def test_without_waste_two_parts_are_always_cheaper():
    """With refits, a layer that keeps few outputs is one part again; it loses less, too."""
    facts = facts_of("residual")
    plain, lean = (
        CompressCollaboratively(rate=0.7, reconstruct=each).layers(facts).at(0.7)
        for each in (False, True)
    )
    assert plain.keys() == lean.keys()
    changed = [node for node in plain if plain[node] != lean[node]]
    assert changed
    for node in changed:
        assert lean[node] == Kept(plain[node].dropped)


def test_what_is_missing_is_said(monkeypatch):
    facts = facts_of("residual")
    with pytest.raises(DataError, match="gradients need samples"):
        HALF.propose(Analysis(facts.model))
    with pytest.raises(ParameterError, match="collaborate"):
        CompressCollaboratively(reconstruct=True).solve(facts)
    with pytest.raises(LimitError, match="can remove"):
        CompressCollaboratively(rate=0.99).solve(facts)
    refused = CompressCollaboratively(rate=0.99).propose(facts)
    assert not refused.options
    assert all("can remove" in refusal.reason for refusal in refused.refusals)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=r"pip install 'onnxcomp\[torch\]'"):
        HALF.propose(facts)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rate", 0.0), ("rate", 1.0), ("gamma", -1.0), ("cost", "bytes"), ("step", 0)],
)
def test_parameters_are_checked(field, value):
    with pytest.raises(ParameterError, match=f"'{field}' must be"):
        CompressCollaboratively(**{field: value})
