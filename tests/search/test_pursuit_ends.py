"""The ends and the parts of a pursuit: time limits, weighty options, shaken losses."""

import math

import numpy as np
import pytest

from onnxcomp.search.deadline import Deadline, TimeLimitReached
from onnxcomp.search.losses import Losses
from onnxcomp.search.pursuit import Pursuit, _shaken, _steepness, weighty
from onnxcomp.search.search import Candidate, Search
from onnxcomp.search.settings import Limits
from tests.search.searching import (
    QUICK,
    Clock,
    Searching,
    ends_with_the_best,
    macs,
    maps,
    wide,
)


def test_no_plan_is_solved_after_the_time_limit():
    clock = Clock()
    search = Searching.of(wide(), deadline=Deadline(1e6, clock), ticks=[clock.tick]).search
    plan, _ = search.choose(search.losses, Limits(macs=macs(wide()) // 2))
    assert not plan.empty
    clock.now = 1e6
    with pytest.raises(TimeLimitReached):
        search.solve(plan, search.losses)
    assert clock.now <= 1e6 + 1


@pytest.mark.parametrize("limits", [Limits(macs=0.5), Limits(drift=0.1)], ids=str)
def test_the_time_limit_ends_with_the_best_so_far(limits):
    """Whenever it is: a model of the pursuit, kept, and a note where it was cut short."""
    errors = set()
    for seconds in (6.5, 12.5, 24.5):
        clock = Clock()
        searching = Searching.of(wide(), deadline=Deadline(seconds, clock), ticks=[clock.tick])
        tried = searching.pursue(limits)
        outcome = tried.outcome
        if outcome.candidate.plan.empty:
            assert not tried.kept or ends_with_the_best(tried)
        else:
            assert ends_with_the_best(tried)
        if clock.now < seconds:
            assert not any("time limit" in note for note in tried.notes)
        errors.add(outcome.candidate.error)
    assert len(errors) > 1
    assert math.isfinite(max(errors))


@pytest.mark.parametrize(
    ("limits", "met"), [(Limits(drift=0.1), True), (Limits(macs=0.5, drift=0.1), False)]
)
def test_the_original_is_judged_when_time_is_up(limits, met):
    """It moves no output, so that limits on costs alone decide."""
    clock = Clock()
    searching = Searching.of(wide(), deadline=Deadline(1e6, clock), ticks=[clock.tick])
    assert searching.search.losses.forms or searching.search.losses.widths
    clock.now = 1e6
    tried = searching.pursue(limits)
    assert tried.outcome.candidate is searching.search.nothing
    assert tried.outcome.met is met
    assert any("time limit" in note for note in tried.notes)


def test_until_the_time_limit_further_plans_are_tried(monkeypatch):
    """First by losses measured again in place, then by losses that are shaken."""
    clock, calls = Clock(), []
    searching = Searching.of(wide(), deadline=Deadline(60, clock), ticks=[clock.tick])
    again = Search.measure_again

    def measured(self: Search, candidate: Candidate, names: list[str]) -> Losses:
        calls.append((candidate, names))
        return again(self, candidate, names)

    monkeypatch.setattr(Search, "measure_again", measured)
    plain = maps().pursue(Limits(macs=0.5))
    assert not calls
    boxed = searching.pursue(Limits(macs=0.5), box=True)
    ((first, names),) = calls
    assert first.model.digest == plain.outcome.candidate.model.digest
    assert names == weighty(first.plan, searching.search.losses)
    assert clock.now >= 60
    assert boxed.outcome.met
    assert boxed.error <= plain.error
    assert ends_with_the_best(boxed)


# Parts


def test_weighty_names_carry_most_of_the_loss():
    search = maps().search
    plan, _ = search.choose(search.losses, maps().absolute(Limits(macs=0.4)))
    parts = search.losses.of(plan)
    names = weighty(plan, search.losses)
    assert names == sorted(names, key=lambda name: -parts[name])
    assert sum(parts[name] for name in names) > 0.8 * sum(parts.values())
    assert sum(parts[name] for name in names[:-1]) <= 0.8 * sum(parts.values())


def test_shaken_losses_move_by_one_factor_each():
    losses = maps().search.losses
    shaken = _shaken(losses, np.random.default_rng(0))
    factors = {}
    for name, widths in losses.widths.items():
        ratios = [shaken.widths[name][width] / lost for width, lost in widths.items()]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-12)
        factors[name] = ratios[0]
    assert len(set(factors.values())) == len(factors) > 1
    assert all(0.3 < factor < 3 for factor in factors.values())
    again = _shaken(losses, np.random.default_rng(0))
    assert again.widths == shaken.widths


def test_steepness_is_that_of_the_last_two_points():
    assert _steepness([]) == _steepness([(1e-3, 2.0)]) == 1.0
    root = [(loss, 30 * math.sqrt(loss)) for loss in (1e-2, 1e-3, 1e-4)]
    assert _steepness(root) == pytest.approx(0.5)
    assert _steepness([(7.0, 7.0), (1e-3, 2.0), (1e-4, 0.2)]) == pytest.approx(1.0)
    assert _steepness([(1e-3, 1.0), (1e-4, 1.1)]) == 0.5  # it never falls as the loss grows
    assert _steepness([(1e-3, 1.0), (1.05e-3, 2.0)]) == 1.0


def test_bisection_begins_where_the_limits_are():
    def bound(limits: Limits) -> float:
        pursuit = Pursuit(
            maps().search, limits, None, judge=maps().judge(), clock=lambda _: 1.0,
            keep=lambda _: None, box=False, seed=0, notes=[],
        )  # fmt: skip
        return pursuit.first_bound

    assert bound(Limits(drift=0.1)) == pytest.approx((0.1 / 1.5) ** 2)  # for new sources
    assert bound(Limits(drop=0.01, drift=0.1)) == pytest.approx((0.1 / 1.5) ** 2)
    assert bound(Limits(drop=0.002, drift=0.1)) == pytest.approx(0.004)


def test_the_front_has_every_cost():
    points = maps().search.front()
    assert len(points) >= 5
    shares = [point.macs for point in points]
    assert shares == sorted(shares, reverse=True)
    assert [p.loss for p in points] == sorted(p.loss for p in points)
    for point in points:
        assert 0 < point.params < 1
        assert 0 < point.file_bytes < 1
        assert 0 < point.seconds <= 1
    assert Searching.of(wide(), QUICK).search.front() == ()
