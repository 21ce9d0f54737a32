"""The ends and the parts of a pursuit: time limits, weighty options, varied losses."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from onnxcomp.deadline import Deadline, TimeLimitReached
from onnxcomp.search.judge import Look
from onnxcomp.search.losses import Losses
from onnxcomp.search.pursuit import (
    _PATIENCE,
    Outcome,
    Pursuit,
    _steepness,
)
from onnxcomp.search.search import Candidate, Search
from onnxcomp.search.settings import Limits
from onnxcomp.search.space import Plan
from onnxcomp.search.variations import shaken, swapped, weighty
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
    monkeypatch.setattr("onnxcomp.search.pursuit._PATIENCE", 1000)
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


class Table:
    """Losses of the plans of `Shelf`, by their names."""

    def __init__(self, **losses: float) -> None:
        self.losses = losses

    def of(self, plan: Plan) -> dict[str, float]:
        return {name: self.losses[name] for name in plan.widths}


class Shelf:
    """A search among a few plans: name, predicted seconds, squared drift on the hold-out."""

    shares = False

    def __init__(self, plans: dict[str, tuple[float, float]], *tables: Table) -> None:
        self.plans, (self.losses, self.again) = plans, tables
        self.nothing = replace(maps().search.nothing)
        self.deadline = Deadline(1e6)
        self.solved: list[str] = []

    def fastest(self, losses: Table, bound: float, limits: Limits) -> Plan:
        plan = self.nothing.plan
        for name, (seconds, _) in self.plans.items():
            if losses.losses[name] <= bound and seconds < plan.seconds:
                plan = replace(
                    self.nothing.plan,
                    widths={name: 1},
                    loss=losses.losses[name],
                    seconds=seconds,
                )
        return plan

    def choose(self, losses: Table, limits: Limits, *, seconds: float) -> tuple[Plan, str]:
        for name in sorted(self.plans, key=lambda name: losses.losses[name]):
            if self.plans[name][0] <= seconds:
                return self.fastest(losses, losses.losses[name], limits), ""
        return self.nothing.plan, "nothing is so fast"

    def solve(self, plan: Plan, losses: Table) -> Candidate:
        if plan.empty:
            return self.nothing
        (name,) = plan.widths
        self.solved.append(name)
        return Candidate(plan, SimpleNamespace(digest=name), {}, 0.0)

    def look(self, model: SimpleNamespace, error: float) -> Look:
        squared = self.plans[model.digest][1] if model.digest in self.plans else 0.0
        return Look(error, 0.1 * math.sqrt(squared), None, None)

    def measure_again(self, candidate: Candidate, names: list[str]) -> Table:
        assert candidate.model.digest in names
        return self.again

    def pursue(self, box: bool) -> Outcome:
        self.timed = lambda _, work: work()
        self.within = lambda *_: True
        self.refusals = lambda _: ()
        return Pursuit(
            self, Limits(drift=0.1), None, judge=self, clock=lambda _: 1.0,
            keep=lambda _: None, box=box, seed=0, notes=[],
        ).run()  # fmt: skip


@pytest.mark.parametrize(
    ("squared", "best"), [(0.5, "fast"), (0.9, "fast"), (0.95, "slow"), (1.5, "slow")]
)
def test_what_the_table_overrated_is_found_by_losses_measured_again(
    monkeypatch, squared, best
):
    """If it leaves more of the limit than the first had to: 0.93 of it may be used."""
    for name in ("shaken", "swapped"):
        monkeypatch.setattr(f"onnxcomp.search.pursuit.{name}", lambda losses, *_: losses)
    whole = maps().search.nothing.plan.seconds
    plans = {"slow": (0.8 * whole, 0.99), "fast": (0.3 * whole, squared)}
    shelf = Shelf(plans, Table(slow=0.004, fast=9.0), Table(slow=0.004, fast=0.003))
    assert shelf.pursue(box=False).candidate.model.digest == "slow"
    assert shelf.pursue(box=True).candidate.model.digest == best


def test_a_search_ends_after_many_plans_that_are_no_better(monkeypatch):
    """Though its time limit is far; every plan that is better gives it as many tries again."""
    draws = []

    def varied(losses: Table, *_: object) -> Table:
        draws.append(losses)
        return shelf.again if len(draws) == 5 else losses

    for name in ("shaken", "swapped"):
        monkeypatch.setattr(f"onnxcomp.search.pursuit.{name}", varied)
    whole = maps().search.nothing.plan.seconds
    plans = {
        "slow": (0.8 * whole, 0.9),
        "wild": (0.4 * whole, 2.0),
        "fast": (0.3 * whole, 0.5),
    }
    table = Table(slow=0.004, wild=0.5, fast=9.0)
    shelf = Shelf(plans, table, Table(slow=0.004, wild=0.5, fast=0.003))
    shelf.measure_again = lambda *_: shelf.losses
    assert shelf.pursue(box=True).candidate.model.digest == "fast"
    assert len(draws) == 5 + _PATIENCE


def test_swaps_out_of_reach_leave_no_word(monkeypatch):
    """Where a limit needs nearly all that can go, what a swap forbids may be needed."""
    monkeypatch.setattr("onnxcomp.search.pursuit._PATIENCE", 4)
    missed = []
    choose = Search.choose

    def noted(self: Search, *args: object, **options: object) -> tuple[Plan, str]:
        plan, reason = choose(self, *args, **options)
        missed.append(reason)
        return plan, reason

    monkeypatch.setattr(Search, "choose", noted)
    tried = maps().pursue(Limits(macs=0.05), box=True)
    assert tried.outcome.met
    assert any(missed)
    assert not any("within reach" in note for note in tried.notes)


def test_under_a_time_limit_drift_is_held_with_more_to_spare(monkeypatch):
    monkeypatch.setattr("onnxcomp.search.variations._SPREAD", 1.0)
    searching = maps()
    plain = searching.pursue(Limits(drift=0.1))
    boxed = searching.pursue(Limits(drift=0.1), box=True)
    assert boxed.outcome.met
    assert ends_with_the_best(boxed)
    found, first = boxed.outcome.candidate, plain.outcome.candidate
    assert found.plan.seconds <= first.plan.seconds
    if found.plan.seconds < first.plan.seconds:
        look = searching.judge().look(found.model, found.error)
        assert look.drift <= math.sqrt(0.93) * 0.1


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
    found = shaken(losses, np.random.default_rng(0))
    factors = {}
    for name, widths in losses.widths.items():
        ratios = [found.widths[name][width] / lost for width, lost in widths.items()]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-12)
        factors[name] = ratios[0]
    assert len(set(factors.values())) == len(factors) > 1
    assert all(0.3 < factor < 3 for factor in factors.values())
    again = shaken(losses, np.random.default_rng(0))
    assert again.widths == found.widths


def test_a_swap_takes_one_option_away():
    """The more an option of the plan loses, the likelier; the next plan does without it."""
    search, limits = maps().search, maps().absolute(Limits(macs=0.4))
    losses = search.losses
    plan, _ = search.choose(losses, limits)
    parts = losses.of(plan)
    assert len(parts) > 1
    gone = []
    for seed in range(60):
        fewer = swapped(losses, plan, np.random.default_rng(seed))
        (part,) = parts.keys() - fewer.of(plan).keys()
        assert sum(map(len, losses.widths.values())) + len(losses.forms) == 1 + (
            sum(map(len, fewer.widths.values())) + len(fewer.forms)
        )
        gone.append(part)
    heaviest = max(parts, key=parts.__getitem__)
    share = parts[heaviest] / sum(parts.values())
    assert gone.count(heaviest) / len(gone) == pytest.approx(share, abs=0.25)
    other, missed = search.choose(fewer, limits)
    assert not missed
    if isinstance(part, str):
        assert other.widths.get(part) != plan.widths[part]
    else:
        assert part not in other.forms.values()


def test_a_plan_without_options_of_its_own_is_shaken():
    search = maps().search
    nothing, losses = search.nothing.plan, search.losses
    found = swapped(losses, nothing, np.random.default_rng(0))
    assert found.widths == shaken(losses, np.random.default_rng(0)).widths != losses.widths


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

    assert bound(Limits(drift=0.1)) == pytest.approx((0.1 / 1.75) ** 2)  # for new sources
    assert bound(Limits(drop=0.01, drift=0.1)) == pytest.approx((0.1 / 1.75) ** 2)
    assert bound(Limits(drop=0.001, drift=0.1)) == pytest.approx(0.002)


def test_the_front_has_every_cost():
    search = Searching.of(wide(), QUICK).search
    assert search.front() == ()  # nothing was measured
    assert search.losses.widths
    points = search.front()
    assert len(points) >= 5
    assert all(point.error is None for point in points)
    shares = [point.macs for point in points]
    assert shares == sorted(shares, reverse=True)
    assert [p.loss for p in points] == sorted(p.loss for p in points)
    for point in points:
        assert 0 < point.params < 1
        assert 0 < point.file_bytes < 1
        assert 0 < point.seconds <= 1
