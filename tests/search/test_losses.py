"""Measured losses are those of the models in which only that option was applied."""

import threading
import time

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.moments import collect_moments
from onnxcomp.analysis.outputs import raw_outputs
from onnxcomp.deadline import Deadline
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.passes.base import Option
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.substitute_operators import SubstituteOperators
from onnxcomp.runtime import Session, with_outputs
from onnxcomp.search import loss_meter as module
from onnxcomp.search.losses import LATE
from onnxcomp.search.outputs import OutputError
from onnxcomp.search.refits import like_bias, solve_dense
from tests.analysis.channel_graphs import Graph
from tests.graphs import sane_feeds
from tests.passes.exact_checks import graph
from tests.search.cases import CASES, fully_connected, twins, two_heads
from tests.search.lab import SEED, Lab, known

TOLERANCE = 1e-4  # relative, of a loss
KINDS = (RemoveChannels, Factorize, SubstituteOperators)
FLOOR = 1e-3  # of the largest measured loss of a node or group; less counts as so much


def loss_of(lab: Lab, small: Model) -> float:
    names = raw_outputs(lab.model, lab.space.facts.tensors)
    sessions = [Session(with_outputs(m, names), optimize=False) for m in (lab.model, small)]
    reference, found = [[s.run(feed) for feed in lab.batches] for s in sessions]
    return OutputError(reference).of(found)


def moments(lab: Lab, node: str):
    facts = lab.space.facts
    linear, position = facts.linears[node], list(facts.linears).index(node)
    inner = [n for n in (linear.x, linear.y) if n not in lab.batches[0]]
    session = Session(with_outputs(lab.model, inner), optimize=False)
    runs = [feed | session.run(feed) for feed in lab.batches]
    rng = np.random.default_rng([SEED, position])
    xs, ys = [r[linear.x] for r in runs], [r[linear.y] for r in runs]
    return linear, collect_moments(linear, xs, ys, rng)


def factorised(lab: Lab, option: Option) -> Model:
    linear, (metric,) = moments(lab, option.target)
    kernel = linear.kernel(lab.model.weights[linear.weight])
    arrays, dense = Factorize().fit(option, kernel, metric)
    bias = metric.bias(dense.reshape(len(dense), -1))
    draft = lab.model.edit()
    draft.set_weight(linear.bias, like_bias(bias, lab.model.weights[linear.bias]))
    Factorize().apply(draft, lab.space.facts, {option: arrays})
    return draft.seal(by="test")


def narrowed(lab: Lab, losses, name: str, width: int) -> Model:
    facts, group = lab.space.facts, lab.space.groups[name]
    removed = {name: losses.orders[name].order[: group.size - width].astype(np.int64)}
    draft = lab.model.edit()
    for reader in group.readers:
        linear, metrics = moments(lab, reader.node)
        if len(lab.model.readers[linear.weight]) > 1:
            continue
        kernel = linear.kernel(lab.model.weights[linear.weight])
        kept = lab.space.input_side(linear).kept(removed)
        kernel, bias = solve_dense(linear, kernel, metrics, kept)
        draft.set_weight(linear.weight, linear.stored(kernel))
        draft.set_weight(linear.bias, like_bias(bias, lab.model.weights[linear.bias]))
    option = Option("remove_channels", name, "", (width,))
    RemoveChannels().apply(draft, facts, {option: {"removed": removed[name]}})
    return draft.seal(by="test")


def test_losses_are_those_on_samples_that_nothing_was_solved_on():
    """Twelve samples: solved and measured on them all, channels seem to cost nothing."""
    lab = Lab.of(fully_connected(), count=12, size=4)
    fresh = Lab(lab.space, [sane_feeds(lab.model, 48, seed=1).arrays])
    honest, flattered = lab.meter(measured=1).run(), lab.meter(measured=3).run()
    name, width = "conv0_0", 8  # half of its channels
    small = narrowed(lab, honest, name, width)
    found = loss_of(fresh, small)
    assert found / 4 < honest.widths[name][width] < 4 * found
    assert flattered.widths[name][width] < found / 100


BRUTE = ("residual", "concat_of_three", "depthwise", "transposed", "fully_connected",
         "a_channel_of_every_group_goes", "twins", "two_heads", "channels_last")  # fmt: skip


@pytest.mark.parametrize("name", BRUTE)
def test_losses_are_those_of_the_written_models(name, monkeypatch):
    monkeypatch.setattr(module, "_MEASURED", 10_000)  # measure every option
    lab = Lab.of(CASES[name](), step=4)
    losses = lab.losses()
    options = list(losses.forms)[:: max(len(losses.forms) // 4, 1)]
    widths = [(n, w) for n, found in losses.widths.items() for w in list(found)[:2]][:5]
    assert options or widths
    pairs = [(losses.forms[o], factorised(lab, o)) for o in options]
    pairs += [(losses.widths[n][w], narrowed(lab, losses, n, w)) for n, w in widths]
    floors = [FLOOR * max(lost for other, lost in losses.forms.items()
                          if other.target == o.target) for o in options]  # fmt: skip
    floors += [FLOOR * max(losses.widths[n].values()) for n, _ in widths]
    found = [loss_of(lab, small) for _, small in pairs]
    for (measured, _), lost, floor in zip(pairs, found, floors, strict=True):
        assert measured == pytest.approx(max(lost, floor), rel=TOLERANCE)
    counted = [lost for lost, floor in zip(found, floors, strict=True) if lost > floor]
    assert len(set(np.round(np.log(counted), 3))) > 1  # a mixed-up pair would show


def test_orders_are_nested_and_errors_grow():
    lab, losses = known("residual")
    assert losses.orders
    for name, order in losses.orders.items():
        size = lab.space.groups[name].size
        assert sorted(order.order.tolist()) == list(range(size))
        assert (np.diff(order.losses) >= 0).all()
        for width in lab.space.widths[name]:
            assert set(order.kept(width)) <= set(order.kept(size))
        assert set(losses.widths[name]) <= set(lab.space.widths[name])


def test_everything_is_answered_for():
    for name in ("residual", "depthwise", "twins", "weight_in_three_places"):
        lab, losses = known(name)
        refused = {r.where for r in losses.refusals}
        assert set(lab.space.widths) == set(losses.widths) | (refused & set(lab.space.widths))
        targets = {option.target for option in losses.forms}
        assert set(lab.space.forms) <= targets | refused


def test_output_error():
    rng = np.random.default_rng(0)
    reference = [{"y": rng.standard_normal((4, 5)).astype(np.float32)} for _ in range(3)]
    error = OutputError(reference)
    assert error.of(reference) == 0
    doubled = [{"y": 2 * batch["y"]} for batch in reference]
    every = np.concatenate([batch["y"] for batch in reference]).astype(np.float64)
    assert error.of(doubled) == pytest.approx(np.square(every).mean() / every.var())
    broken = [{"y": batch["y"] * np.float32(np.nan)} for batch in reference]
    assert error.of(broken) == np.inf
    assert error.of([{"y": batch["y"][:2]} for batch in reference]) == np.inf
    with pytest.raises(ValueError, match="zip"):
        error.of(reference[:2])


def test_raw_outputs():
    lab = Lab.of(two_heads())
    names = raw_outputs(lab.model, lab.space.facts.tensors)
    assert [lab.model.producers[n].op for n in names] == ["Gemm", "Conv"]
    g = Graph(4)
    mask = g.op("Greater", "x", g.constant(np.float32(0)))
    picked = g.op("Compress", g.op("Neg", "x"), g.op("Reshape", mask, g.ints(-1)))
    model = g.model(picked)
    lab = Lab.of(model, count=2, size=1)
    negated = next(node.id for node in model.nodes if node.op == "Neg")
    assert raw_outputs(model, lab.space.facts.tensors) == (negated,)


def test_models_without_floats_are_refused():
    model = graph("float[N,3] x", "int64[2] y", "y = Shape (x)")
    with pytest.raises(UnsupportedModelError, match="no output depends"):
        raw_outputs(model, Analysis(model).tensors)


def test_shared_weights_with_shared_biases_are_measured():
    lab = Lab.of(twins())
    assert lab.losses().widths


@pytest.mark.parametrize("name", ["residual", "fully_connected", "channels_last", "two_heads"])
def test_losses_do_not_depend_on_the_number_of_threads(name):
    lab = Lab.of(CASES[name](), kinds=KINDS, step=4)
    one, several = lab.meter(threads=1).run(), lab.meter(threads=3).run()
    assert several.forms == one.forms
    assert several.widths == one.widths
    assert several.refusals == one.refusals
    orders = {group: found.order.tolist() for group, found in one.orders.items()}
    assert {group: found.order.tolist() for group, found in several.orders.items()} == orders


def test_large_nodes_are_solved_one_option_at_a_time(monkeypatch):
    """So that no more than one dense solution is held; the losses are the same."""
    lab = Lab.of(CASES["residual"](), kinds=KINDS, step=4)
    running, most, lock = 0, 0, threading.Lock()

    def counted(self, *args):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        found = fit(self, *args)
        with lock:
            running -= 1
        return found

    fit = Factorize.fit
    monkeypatch.setattr(Factorize, "fit", counted)
    want = lab.meter(threads=2).run()
    assert most == 2
    most = 0
    monkeypatch.setattr(module, "_LARGE", 0)
    found = lab.meter(threads=2).run()
    assert most == 1
    assert (found.forms, found.widths) == (want.forms, want.widths)


def test_a_node_and_its_group_of_the_same_name_are_both_refused():
    lab = Lab.of(CASES["residual"](), step=4)
    assert set(lab.space.forms) & set(lab.space.widths)
    refusals = lab.meter(deadline=Deadline(0)).run().refusals
    assert len(refusals) == len(lab.space.forms) + len(lab.space.widths)
    assert {refusal.reason for refusal in refusals} == {LATE}
