"""What a node should give and what it gets, in two networks that are walked together."""

import numpy as np
import pytest

from onnxcomp.model import Model
from onnxcomp.runtime import Session, with_outputs
from onnxcomp.search.twins import Twins
from tests.analysis.channel_graphs import Graph
from tests.search.cases import residual
from tests.search.lab import Lab

TOLERANCE = 1e-5  # relative L2; fused kernels add in another order


def tensors(model: Model, lab: Lab, *names: str) -> list[np.ndarray]:
    session = Session(with_outputs(model, names), optimize=False)
    runs = [session.run(feed) for feed in lab.batches]
    return [np.concatenate([run[n] for run in runs]) for n in names]


def spoilt(lab: Lab, node: str) -> tuple[dict[str, np.ndarray], Model]:
    """Other weights for one node, and the model that has them."""
    name = lab.space.facts.linears[node].weight
    weights = {name: (lab.model.weights[name] * 0.7).astype(np.float32)}
    return weights, Model(lab.model.skeleton, {**lab.model.weights, **weights})


def near(found, wanted: np.ndarray) -> bool:
    found = np.concatenate(found) if isinstance(found, list) else found
    return float(np.linalg.norm(found - wanted)) <= TOLERANCE * float(np.linalg.norm(wanted))


def at(lab: Lab, weights, node: str) -> Twins:
    twins = Twins(lab.space.facts, lab.batches, weights=weights, threads=1)
    twins.advance(lab.space.facts.linears[node])
    return twins


def test_without_weights_both_are_one():
    lab = Lab.of(residual())
    linear = lab.space.facts.linears["conv4_0"]
    twins = at(lab, None, linear.id)
    assert twins.current is twins.original
    x, y = tensors(lab.model, lab, linear.x, linear.y)
    assert near(twins.inputs(linear), x)
    assert near(twins.targets(linear), y)


def test_inputs_are_the_compressed_networks_and_targets_the_originals():
    lab = Lab.of(residual())
    weights, changed = spoilt(lab, "conv2_0")
    linear = lab.space.facts.linears["conv12_0"]  # no shortcut joins its output
    twins = at(lab, weights, linear.id)
    (x,), (other,) = tensors(changed, lab, linear.x), tensors(lab.model, lab, linear.x)
    (y,) = tensors(lab.model, lab, linear.y)
    assert near(twins.inputs(linear), x)
    assert not near(twins.inputs(linear), other)
    assert near(twins.targets(linear), y)


def test_targets_take_over_what_the_shortcut_lost():
    lab = Lab.of(residual())
    weights, changed = spoilt(lab, "conv0_0")
    linear = lab.space.facts.linears["conv4_0"]
    (add,) = (use.node for use in lab.model.readers[linear.y])
    shortcut = next(n for n in add.inputs if n != linear.y)
    twins = at(lab, weights, linear.id)
    y, a = tensors(lab.model, lab, linear.y, shortcut)
    (b,) = tensors(changed, lab, shortcut)
    assert near(twins.targets(linear), y + (a - b))
    assert not near(twins.targets(linear), y)
    assert near(twins.offsets(linear), b)


def ends(shown: str) -> Model:
    """A convolution and a residual one in front of a Relu; one inner tensor may be shown."""
    g = Graph(8, 8, 8)
    first = g.conv("x", 8, 8)
    t = g.op("Relu", first)
    second = g.conv(t, 8, 8)
    total = g.op("Add", second, t)
    y = g.conv(g.op("Relu", total), 8, 4)
    inner = {"": (), "first": (first,), "second": (second,), "sum": (total,)}[shown]
    return g.model(y, *inner)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        ("", [True, True, False]),
        ("first", [False, True, False]),
        ("second", [True, False, False]),
        ("sum", [True, False, False]),
    ],
)
def test_what_is_shown_is_not_only_read_by_a_relu(shown, wanted):
    """Where the model shows a tensor, its negative part counts as well."""
    lab = Lab.of(ends(shown))
    found = []
    for linear in lab.space.facts.linears.values():
        found.append(at(lab, {}, linear.id).rectified(linear))
    assert found == wanted


def test_an_output_is_not_bent_to_correct_a_shortcut():
    for shown, corrected in (("", True), ("second", False)):
        lab = Lab.of(ends(shown))
        first, linear, _ = lab.space.facts.linears.values()
        twins = at(lab, spoilt(lab, first.id)[0], linear.id)
        (y,) = tensors(lab.model, lab, linear.y)
        assert near(twins.targets(linear), y) is not corrected
        assert (twins.offsets(linear) is None) is not corrected
