"""Emitted layers are what their definition says, and producers follow them."""

import importlib.util
import math
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
from onnxcomp.passes.collaborative_layers import Layers, dropped_by_all
from onnxcomp.passes.compress_collaboratively import (
    CompressCollaboratively,
    original_factors,
)
from onnxcomp.samples import Samples
from tests.analysis.channel_graphs import Graph
from tests.graphs import SHARED
from tests.passes.exact_checks import drift
from tests.search.cases import concat_of_three
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


def dense() -> Model:
    """Layers that read what all layers in front of them made, one of which made little."""
    g = Graph(3, 8, 8)
    t, width = g.op("Relu", g.conv("x", 3, 8)), 8
    for _ in range(3):
        made = g.op("Relu", g.conv(t, width, 6))
        t, width = g.op("Concat", t, made, axis=1), width + 6
    t = g.op("Relu", g.conv(t, width, 12, kernel=1))
    return weak(g.model(g.op("Gemm", g.mean(t), g.w(12, 5), g.w(5))), 1)


def joined() -> Model:
    """Three branches that one layer reads, the last of which makes little."""
    return weak(concat_of_three(), 2)


def weak(model: Model, place: int) -> Model:
    """A model in which one convolution, by its place, makes a hundredth of what it made."""
    conv = [node for node in model.nodes if node.op == "Conv"][place]
    less = {name: model.weights[name] * np.float32(0.01) for name in conv.inputs[1:]}
    return Model(model.skeleton, {**model.weights, **less})


MODELS = {"residual": residual, "dense": dense, "mixed": mixed}
WEAK = {"dense": 0.7, "joined": 0.2}  # models with a weak branch, and rates at which it goes


@cache
def facts_of(name: str) -> Analysis:
    if name in MODELS:
        model = MODELS[name]()
        samples = Samples(inputs(model, 8), np.arange(8) % 5)
    elif name == "joined":
        model = joined()
        samples = Samples(inputs(model, 8))  # what it returns are no classes
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


def written(facts: Analysis, layers: Layers, kept: Mapping[str, Kept]) -> Model:
    """The model of which so much stays."""
    removed = layers.cut(kept)
    places = layers.places(kept, removed)
    chosen = {
        HALF.option(layers, node, each): {
            **places[node],
            **original_factors(facts, node, each, removed),
        }
        for node, each in kept.items()
    }
    return applied(facts, chosen)


def seconds_of(model: Model, samples: Samples) -> float:
    """Predicted seconds of a model's weighted nodes and index selections."""
    facts, target = Analysis(model, samples), HALF.target
    shapes = [facts.tensors[n.outputs[0]].shape for n in model.nodes if n.op == "Gather"]
    selections = sum(target.element_seconds("Slice", math.prod(shape)) for shape in shapes)
    convolutions = [linear.convolution for linear in facts.linears.values()]
    return selections + target.chain_seconds(convolutions)


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


@pytest.mark.parametrize(("name", "rate"), WEAK.items())
def test_one_channel_stays_where_no_reader_keeps_any(name, rate):
    """Its readers select among what is joined."""
    facts, pass_ = facts_of(name), CompressCollaboratively(rate=rate)
    layers = pass_.layers(facts)
    kept = layers.at(rate)
    removed = layers.cut(kept)
    emptied = [
        group
        for group in facts.channels.groups
        if group.name in removed
        and all(set(r.index.flat) <= set(kept[r.node].dropped) for r in group.readers)
    ]
    assert emptied
    small = applied(facts, pass_.solve(facts))
    assert drift(by_definition(facts, kept), small, feed_of(facts)) <= TOLERANCE
    for group in emptied:
        assert len(removed[group.name]) == group.size - 1
        assert Analysis(small, facts.samples).linears[group.producers[0]].out_channels == 1
        for reader in group.readers:
            assert f"{reader.node}_selected" in {node.id for node in small.nodes}


def test_the_channel_that_stays_went_last():
    (group,) = (g for g in facts_of("joined").channels.groups if g.size == 8)
    (reader,) = group.readers
    order = np.random.default_rng(0).permutation(group.size)
    gone = reader.index[order, 0]
    found = dropped_by_all([group], {reader.node: gone})[group.name]
    assert found.tolist() == sorted(order[:-1])
    found = dropped_by_all([group], {reader.node: gone[:3]})[group.name]
    assert found.tolist() == sorted(order[:3])
    assert dropped_by_all([group], {}) == {}


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
    layers = CompressCollaboratively(rate=0.5, step=4).layers(facts)
    for node, kept in layers.at(0.5).items():
        count = facts.linears[node].in_channels
        width, cost = count - len(kept.dropped), layers.members[node].cost
        assert width % 4 == 0 or not kept.dropped
        assert kept.rank is None or kept.rank % 4 == 0
        assert kept.rank is None or cost(width, kept.rank) < cost(width, None)


def test_seconds_ask_for_other_rates_than_macs():
    facts = facts_of("mixed")
    macs, seconds = (
        CompressCollaboratively(cost=cost).layers(facts) for cost in ("macs", "seconds")
    )
    assert macs.at(0.3) != seconds.at(0.3)
    assert seconds.most <= 0.95


@pytest.mark.parametrize(
    ("name", "options", "timely"),
    [
        ("residual", {}, True),
        ("residual", {"cost": "seconds", "step": None}, False),
        ("dense", {}, True),  # in which one selection takes all that it saves
    ],
)
def test_selections_that_save_no_time_are_left_out(name, options, timely, monkeypatch):
    """Where producers lose channels is as before; ranks are, too."""
    facts = facts_of(name)
    layers = CompressCollaboratively(**options).layers(facts)
    lean = layers.at(0.4, timely=timely)
    monkeypatch.setattr(Layers, "_without_slow_selections", lambda _, kept: kept)
    plain = layers.at(0.4, timely=timely)
    removed, other = layers.cut(plain), layers.cut(lean)
    assert {k: v.tolist() for k, v in removed.items()} == {
        k: v.tolist() for k, v in other.items()
    }
    places, pays = layers.places(plain, removed), []
    for node, each in plain.items():
        read = places[node]["read"]
        if len(places[node]["kept"]) == len(read):
            assert lean[node] == each
            continue
        whole = Kept(tuple(c for c in each.dropped if c not in read), each.rank)
        part_seconds, whole_seconds = (
            seconds_of(written(facts, layers, {**plain, node: way}), facts.samples)
            for way in (each, whole)
        )
        pays.append(part_seconds < whole_seconds)
        assert lean.get(node, Kept()) == (each if pays[-1] else whole)
    assert set(pays) == {True, False}


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
