"""Losses measured with the rest of a compressed network in place, kept ones, and time."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.analysis.moments import collect_moments
from onnxcomp.deadline import Deadline
from onnxcomp.model import Model
from onnxcomp.passes.factorize import Factorize
from onnxcomp.search import loss_meter as module
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.losses import Losses
from onnxcomp.search.refits import like_bias, solve_dense
from onnxcomp.search.space import Plan
from onnxcomp.search.store import Store
from onnxcomp.search.twins import Twins
from tests.graphs import SHARED
from tests.search.lab import SEED, Lab, known

TOLERANCE = 1e-4  # relative, of a loss
FLOOR = 1e-3  # of the largest measured loss of a node or group; less counts as so much


def same(found: Losses, wanted: Losses, *, rel: float = 0.0) -> bool:
    """Whether losses are equal within a relative tolerance, and orders exactly."""

    def flat(losses: Losses) -> dict:
        widths = {
            (n, w): lost for n, each in losses.widths.items() for w, lost in each.items()
        }
        return {**losses.forms, **widths}

    a, b = flat(found), flat(wanted)
    orders = found.orders.keys() == wanted.orders.keys() and all(
        np.array_equal(order.order, wanted.orders[n].order)
        for n, order in found.orders.items()
    )
    return orders and a.keys() == b.keys() and all(abs(a[k] - b[k]) <= rel * b[k] for k in b)


def narrow_plan(lab: Lab, losses: Losses) -> Plan:
    """The middle width of every group, and a form on one node that no group touches most."""
    widths = {n: sorted(each)[len(each) // 2] for n, each in losses.widths.items() if each}
    forms = {}
    for option in losses.forms:
        if option.size[0] <= 4 and not forms:
            forms[option.target] = option
    return lab.lone_plan(widths, forms)


class Brute:
    """Single options tried in whole-network runs."""

    def __init__(self, lab: Lab, weights) -> None:
        self.lab, self.weights = lab, weights

    def moments(self, node: str):
        facts = self.lab.space.facts
        linear, position = facts.linears[node], list(facts.linears).index(node)
        twins = Twins(facts, self.lab.batches, weights=self.weights, threads=1)
        twins.advance(linear)
        rng = np.random.default_rng([SEED, position])
        return linear, collect_moments(
            linear, twins.inputs(linear), twins.targets(linear), rng
        )

    def error(self, changes) -> float:
        return self.lab.error({**self.weights, **changes})

    def form(self, option) -> float:
        linear, (metric,) = self.moments(option.target)
        kernel = linear.kernel(self.lab.model.weights[linear.weight])
        full = metric.solve(kernel.reshape(len(kernel), -1)).reshape(kernel.shape)
        _, dense = Factorize().fit(option, full, metric)
        old = self.lab.model.weights[linear.bias]
        lost = [
            self.error(
                {
                    linear.weight: linear.stored(one),
                    linear.bias: like_bias(metric.bias(one.reshape(len(one), -1)), old),
                }
            )
            for one in (dense, full)
        ]
        return lost[0] - lost[1]

    def width(self, losses: Losses, name: str, width: int) -> float:
        lab, lost = self.lab, []
        size = lab.space.groups[name].size
        for kept in (width, size):
            removed = {name: losses.orders[name].order[: size - kept].astype(np.int64)}
            changes = {}
            for reader in lab.space.groups[name].readers:
                linear, metrics = self.moments(reader.node)
                kernel = linear.kernel(lab.model.weights[linear.weight])
                inputs = lab.space.input_side(linear).kept(removed)
                kernel, bias = solve_dense(linear, kernel, metrics, inputs)
                changes[linear.weight] = linear.stored(kernel)
                changes[linear.bias] = like_bias(bias, lab.model.weights[linear.bias])
            lost.append(self.error(changes))
        return lost[0] - lost[1]


@pytest.mark.parametrize("name", ["residual", "concat_of_three", "fully_connected"])
def test_losses_in_place_are_those_of_whole_networks(name, monkeypatch):
    """E(with the option) - E(without it), everything else as in the compressed network."""
    lab, alone = known(name)
    monkeypatch.setattr(module, "_MEASURED", 10_000)  # measure every option
    weights = lab.walk(narrow_plan(lab, alone), alone).run().weights
    meter, brute = lab.meter(), Brute(lab, weights)
    in_place = meter.run(weights)
    options = list(in_place.forms)[:: max(len(in_place.forms) // 4, 1)]
    widths = [(n, w) for n, each in in_place.widths.items() for w in list(each)[:1]]
    assert options
    assert widths
    differing = 0
    for option in options:
        every = [lost for o, lost in in_place.forms.items() if o.target == option.target]
        wanted = max(brute.form(option), FLOOR * max(every))
        assert in_place.forms[option] == pytest.approx(wanted, rel=TOLERANCE)
        differing += abs(alone.forms.get(option, 0) / wanted - 1) > 0.05
    for group, width in widths:
        floor = FLOOR * max(in_place.widths[group].values())
        wanted = max(brute.width(in_place, group, width), floor)
        assert in_place.widths[group][width] == pytest.approx(wanted, rel=TOLERANCE)
        differing += abs(alone.widths[group].get(width, 0) / wanted - 1) > 0.05
    assert differing  # measured alone, they are others


def test_in_place_of_an_untouched_network_losses_are_those_alone():
    """No tolerance but that of float32: the same networks, held twice."""
    lab, alone = known("residual")
    assert same(lab.meter().run({}), alone, rel=1e-6)
    (linear, *_) = lab.space.facts.linears.values()
    spoilt = {linear.weight: (lab.model.weights[linear.weight] * 0.5).astype(np.float32)}
    assert not same(lab.meter().run(spoilt), alone, rel=1e-3)


def test_a_group_that_was_narrowed_still_loses_in_place():
    """At its own width in the compressed network, compared with all channels there."""
    lab, alone = known("residual")
    plan = narrow_plan(lab, alone)
    in_place = lab.meter().run(lab.walk(plan, alone).run().weights, list(plan.widths))
    assert in_place.widths.keys() == plan.widths.keys()
    for name, width in plan.widths.items():
        assert 0.1 < in_place.widths[name][width] / alone.widths[name][width] < 10


def test_only_what_is_asked_for_is_measured():
    lab, whole = known("residual")
    group, node = "conv2_0", "conv12_0"  # the group is called as the node that makes it
    found = lab.meter().run({}, [group, node])
    assert {option.target for option in found.forms} == {group, node}
    assert found.widths.keys() == {group}
    assert found.widths[group] == pytest.approx(whole.widths[group], rel=1e-6)
    assert found.forms == pytest.approx(
        {o: lost for o, lost in whole.forms.items() if o.target in (group, node)}, rel=1e-6
    )


def test_updated_losses_keep_the_sum_of_the_plan():
    """What was measured again is scaled by one factor; everything else stays."""
    lab, alone = known("residual")
    plan = narrow_plan(lab, alone)
    newer = lab.meter().run(lab.walk(plan, alone).run().weights, ["conv0_0"])
    assert newer.widths.keys() == {"conv0_0"} == plan.forms.keys()
    found = alone.updated(newer, plan)
    before, after = alone.of(plan), found.of(plan)
    assert before.keys() == after.keys() == {*plan.widths, *plan.forms.values()}
    assert sum(after.values()) == pytest.approx(sum(before.values()), rel=1e-12)
    assert after["conv0_0"] != pytest.approx(before["conv0_0"], rel=0.01)
    ratios = [found.forms[option] / lost for option, lost in newer.forms.items()]
    ratios += [
        found.widths["conv0_0"][width] / lost
        for width, lost in newer.widths["conv0_0"].items()
    ]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-12)
    others = [option for option in alone.forms if option.target != "conv0_0"]
    assert others
    assert all(found.forms[option] == alone.forms[option] for option in others)
    assert all(found.widths[n] == alone.widths[n] for n in alone.widths.keys() - {"conv0_0"})
    assert np.array_equal(found.orders["conv0_0"].order, newer.orders["conv0_0"].order)


def fail(*_: object) -> None:
    raise AssertionError("this was measured already")


@pytest.mark.parametrize("name", ["residual", "shuffle", "bias_that_others_read"])
def test_what_is_kept_is_not_measured_again(name, tmp_path, monkeypatch):
    (lab, whole), store = known(name), Store(tmp_path / "state")
    first = lab.meter(store=store).run()
    assert same(first, whole)
    monkeypatch.setattr(LossMeter, "_visit", fail)
    second = lab.meter(store=store).run()
    assert same(second, first)
    assert second.refusals == first.refusals
    with pytest.raises(AssertionError, match="measured already"):
        lab.meter(store=store.scoped("another run")).run()


def ended_and_gone_on(lab: Lab, folder: Path, moment: int) -> Losses:
    """Losses of a run that was interrupted at a node, and then started again."""
    store, calls = Store(folder), []

    def end(label: str, share: float) -> None:
        calls.append(label)
        if len(calls) > moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.meter(store=store, progress=end).run()
    return lab.meter(store=store).run()


@pytest.mark.parametrize("name", ["residual", "squeeze_excite"])
def test_a_run_that_was_ended_anywhere_goes_on_to_the_same(name, tmp_path):
    """Bit for bit: what is skipped does not change how the rest is computed."""
    lab, whole = known(name)
    for moment in range(1, len(lab.space.facts.linears)):
        assert same(ended_and_gone_on(lab, tmp_path / f"{moment}", moment), whole)


def test_a_real_network_goes_on_to_the_same(tmp_path):
    """Its kernels fuse, and round by where a run of them ends."""
    path = SHARED / "models" / "mlperftiny_cifar10_resnet8.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    lab = Lab.of(Model.from_proto(onnx.load(path)), count=4, size=4, step=16)
    whole = lab.losses()
    for moment in (5, 9):
        assert same(ended_and_gone_on(lab, tmp_path / f"{moment}", moment), whole)


def test_what_there_is_no_time_for_is_left_alone():
    lab, whole = known("residual")
    now = [0.0]

    def tick(*_: object) -> None:
        now[0] += 1.0

    deadline = Deadline(3.5, lambda: now[0])
    found = lab.meter(progress=tick, deadline=deadline).run()
    visited = list(lab.space.facts.linears)[:3]
    assert found.forms == {o: lost for o, lost in whole.forms.items() if o.target in visited}
    reasons = {r.where: r.reason for r in found.refusals}
    late = "the time limit was reached before it was measured"
    assert {node for node, why in reasons.items() if why == late} == {
        *list(lab.space.facts.linears)[3:],
        *(set(lab.space.widths) - set(found.widths)),
    }
    assert found.widths
    assert found.widths.keys() < whole.widths.keys()
    assert all(each == whole.widths[n] for n, each in found.widths.items())


def test_what_was_measured_is_not_said_to_be_late(tmp_path, monkeypatch):
    """Forms that were kept stay, even where there is no time for the group."""
    (lab, _), store, put = known("residual"), Store(tmp_path / "state"), Store.put

    def put_forms(self: Store, kind: str, key: object, value: object) -> None:
        if kind == "forms":
            put(self, kind, key, value)

    monkeypatch.setattr(Store, "put", put_forms)
    first = lab.meter(store=store).run()
    found = lab.meter(store=store, deadline=Deadline(0.0)).run()
    assert found.forms == first.forms
    assert not found.widths
    late = {refusal.where for refusal in found.refusals if "time limit" in refusal.reason}
    assert late == set(lab.space.widths)
