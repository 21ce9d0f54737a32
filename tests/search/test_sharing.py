"""Losses of common factors: what they say, when they are kept, and what they cannot be."""

from copy import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from onnxcomp.deadline import Deadline
from onnxcomp.errors import DataError
from onnxcomp.numerics.joint_svd import JOINT_FORMS, Member, errors
from onnxcomp.passes.base import Option
from onnxcomp.passes.chains import kernel_shape4
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.search import sharing as module
from onnxcomp.search.sharing import JointLosses, Sharing
from onnxcomp.search.store import Store
from tests.passes.joint_cases import CASES as NETWORKS
from tests.search.joint_lab import (
    JOINT,
    NO_END,
    digits,
    lone_error,
    measured,
    members_of,
    mixed,
    plan_of,
    predicted,
    repeated,
    sharing,
)
from tests.search.lab import Lab

CASES = ("residual", "residual bn", "transposed", "one dimension", "uneven")
WITHIN = 3.0  # factor of the true error, for three of four options of a trained network
WORST = 5.0  # factor for all of them: what is measured is one layer at a time
SLACK = 0.05  # by which a loss may fall as the rank does: factors are solved roughly here


def by_rank(lab: Lab) -> dict[tuple[str, str], list[Option]]:
    """Options of each group and form, by falling rank."""
    found: dict[tuple[str, str], list[Option]] = {}
    for name, options in lab.space.joint.items():
        for option in sorted(options, key=lambda o: -sum(o.size)):
            found.setdefault((name, option.form), []).append(option)
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_are_finite_and_grow_as_ranks_fall(case):
    lab, losses = repeated(case)
    joint = losses.joint
    assert joint.losses
    assert all(np.isfinite(lost) and lost >= 0 for lost in joint.losses.values())
    forms = {option.form for _, option in joint.losses}
    assert forms == {o.form for options in lab.space.joint.values() for o in options}
    ratios = []
    for options in by_rank(lab).values():
        sums = [predicted(lab, joint, option) for option in options]
        known = [lost for lost in sums if lost is not None]
        assert sums[: len(known)] == known  # only those of low rank lose too much
        ratios += [low / high for high, low in pairwise(known)]
    assert min(ratios) >= 1 - SLACK
    assert np.median(ratios) > 1.3


def test_weights_say_what_an_error_costs():
    """They are known for all layers with losses; those near the input of digits weigh most."""
    lab, joint = digits()
    assert joint.weights.keys() == {node for node, _ in joint.losses}
    assert all(weight > 0 for weight in joint.weights.values())
    for name in lab.space.joint:
        first, *_, last = (joint.weights[n] for n in lab.space.joint_groups[name].members)
        assert first > 2 * last


def test_losses_predict_the_error_of_all_members_at_once():
    """Over two decades of errors; the losses of two ranks below would not."""
    lab, joint = digits()
    ratios, wrong = [], []
    for (group, _), options in by_rank(lab).items():
        known = [o for o in options if predicted(lab, joint, o) is not None]
        for index, option in enumerate(known[:3] if "conv0" in group else ()):
            true = lone_error(lab, joint, option)
            ratios.append(predicted(lab, joint, option) / true)
            wrong += [predicted(lab, joint, o) / true for o in known[index + 2 : index + 3]]
    assert len(ratios) >= 10
    logs = np.abs(np.log(ratios))
    assert np.quantile(logs, 0.75) <= np.log(WITHIN)
    assert logs.max() <= np.log(WORST)
    assert np.median(wrong) > WORST


def test_common_factors_mind_what_errors_cost():
    """With the weights, the weighted sum of errors is less than with equal ones."""
    lab, joint = digits()
    gains = []
    for form in ("output_basis_last", "spatial_first"):
        option = next(o for _, o in joint.losses if (o.form, o.size) == (form, (32,)))
        (_, sites), *_ = sharing(lab)._sites([option.target], {}, lambda *_: None)
        members = [site.member(1.0) for site in sites]
        own = [joint.weights[node] for node in members_of(lab, option)]
        found = []
        for weights in (joint.weights, dict.fromkeys(joint.weights, 1.0)):
            solved = sharing(lab).solve(plan_of(lab, option), weights, {})[option]
            found.append(float(np.dot(own, errors(solved, members))))
        gains.append(found[0] / found[1])
    assert max(gains) < 0.95


@pytest.mark.parametrize("case", ["residual", "gemm"])
def test_from_the_weights_alone(case):
    lab, aware = repeated(case)
    joint = measured(lab, data_aware=False)
    assert joint != aware.joint
    assert all(np.isfinite(lost) and lost >= 0 for lost in joint.losses.values())
    option = next(o for _, o in joint.losses if JOINT_FORMS[o.form].shares == "both")
    solved = sharing(lab, data_aware=False).solve(plan_of(lab, option), joint.weights, {})
    linears = [lab.space.facts.linears[node] for node in members_of(lab, option)]
    members = [
        Member(
            linear.kernel(lab.model.weights[linear.weight]).reshape(
                kernel_shape4(linear, linear.out_channels, linear.in_channels)
            ),
            weight=joint.weights[linear.id],
        )
        for linear in linears
    ]
    wanted = FactorizeJointly().fit(option, members)
    found = solved[option]
    for index in range(len(members)):
        np.testing.assert_allclose(found.dense(index), wanted.dense(index), atol=1e-12)


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    lab, losses = repeated("gemm")
    store = Store(tmp_path).scoped("gemm")
    first = sharing(lab).measure(len(lab.batches), store, NO_END)
    assert first == losses.joint
    monkeypatch.setattr(Sharing, "_measure", None)
    again = sharing(lab).measure(len(lab.batches), Store(tmp_path).scoped("gemm"), NO_END)
    assert again == first
    with pytest.raises(TypeError):  # another run's is not taken over
        sharing(lab).measure(len(lab.batches), Store(tmp_path).scoped("other"), NO_END)


class Ticks:
    """A clock that every report of progress moves on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, *_: object) -> None:
        self.now += 1.0


def test_a_deadline_leaves_groups_out_and_nothing_is_kept(tmp_path):
    lab, losses = repeated("residual")
    clock = Ticks()
    store = Store(tmp_path).scoped("residual")
    partly = sharing(lab, progress=clock.tick).measure(
        len(lab.batches), store, Deadline(5.5, clock)
    )
    assert partly.losses
    assert partly.losses.items() < losses.joint.losses.items()
    whole = sharing(lab).measure(len(lab.batches), store, NO_END)
    assert whole == losses.joint
    late = Deadline(1.0, clock)
    clock.tick()
    assert sharing(lab).measure(len(lab.batches), Store(None), late) == JointLosses()


def test_without_options_nothing_is_run(monkeypatch):
    lab, _ = repeated("gemm")
    monkeypatch.setattr(Sharing, "_measure", None)
    space = copy(lab.space)
    space.joint = {}
    assert measured(Lab(space, lab.batches)) == JointLosses()


def test_a_layer_on_which_nothing_can_be_fitted_spoils_its_groups_only(monkeypatch):
    lab, losses = repeated("residual")
    bad = lab.space.joint_groups["stage0.conv0.12x12x3x3"].members[1]
    collect = module.collect_moments

    def refuse(linear, *args: object, **options: object):
        if linear.id == bad:
            raise DataError("a value is not finite")
        return collect(linear, *args, **options)

    monkeypatch.setattr(module, "collect_moments", refuse)
    joint = measured(lab)
    gone = {o.target for _, o in losses.joint.losses} - {o.target for _, o in joint.losses}
    assert gone == {n for n, g in lab.space.joint_groups.items() if bad in g.members}
    assert joint.losses.items() < losses.joint.losses.items()


def test_measuring_twice_is_the_same():
    lab, losses = repeated("residual bn")
    assert measured(lab) == losses.joint


def test_factors_are_solved_at_the_widths_that_are_left():
    """Where only first factors are common, layers may lose outputs of their own."""
    lab, losses = mixed("residual")
    space, checked = lab.space, 0
    for name, options in space.joint.items():
        for option in options:
            if not option.form.endswith("_first"):
                continue
            nodes = members_of(lab, option)
            own = {
                group: width
                for node in nodes
                for group, _ in space.output_side(space.facts.linears[node]).parts
                if len(space.groups[group].readers) == 1
                for width in space.widths[group][-1:]
            }
            removed = {
                group: losses.orders[group].order[: space.groups[group].size - width]
                for group, width in own.items()
            }
            plan = plan_of(lab, option, widths=own)
            solved = sharing(lab).solve(plan, losses.joint.weights, removed)[option]
            for index, node in enumerate(nodes):
                linear = space.facts.linears[node]
                m = space.output_side(linear).width(own)
                assert solved.dense(index).shape[:2] == (m, linear.in_channels)
                checked += m < linear.out_channels
            assert name == option.target
    assert checked


def test_two_solutions_are_the_same():
    lab, losses = repeated("residual")
    for form in ("spatial_both", "tucker2_outer"):
        option = next(o for _, o in losses.joint.losses if o.form == form)
        plan = plan_of(lab, option)
        found = [sharing(lab).solve(plan, losses.joint.weights, {})[option] for _ in range(2)]
        for index in range(len(members_of(lab, option))):
            first, second = (joint.dense(index) for joint in found)
            np.testing.assert_array_equal(first, second)
    other = replace(losses.joint, weights=dict.fromkeys(losses.joint.weights, 1.0))
    third = sharing(lab).solve(plan, other.weights, {})[option]
    assert not np.array_equal(third.dense(0), found[0].dense(0))


def test_losses_are_those_on_samples_that_nothing_was_fitted_on(monkeypatch):
    """Of twelve samples; fitted on all of them, common factors seem to cost less than half."""
    lab = Lab.of(NETWORKS["gemm"](), count=12, size=4, kinds=(JOINT,))
    honest = sharing(lab).measure(1, Store(None), NO_END).losses
    monkeypatch.setattr("onnxcomp.search.sharing.apart", lambda batches, measured: batches)
    flattered = sharing(lab).measure(1, Store(None), NO_END).losses
    both = honest.keys() & flattered.keys()
    assert len(both) > 10
    assert sum(flattered[o] for o in both) < 0.5 * sum(honest[o] for o in both)
