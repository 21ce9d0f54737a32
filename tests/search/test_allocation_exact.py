"""Plans against all plans there are, on spaces so small that these can be counted."""

from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from onnxcomp.errors import LimitError
from onnxcomp.numerics.knapsack import Allocation, SolverTimeoutError, allocate
from onnxcomp.numerics.selection import Elimination
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.search.allocation import Allocator
from onnxcomp.search.losses import Losses
from onnxcomp.search.settings import Limits
from onnxcomp.search.space import Plan, fits
from tests.analysis.channel_graphs import Graph
from tests.search.lab import Lab

GAP = 0.01  # relative, of the optimum; programmes are solved to half of that
SEEDS = range(5)


@cache
def tiny() -> Lab:
    """Three convolutions and the two groups between them."""
    g = Graph(8, 8, 8)
    t = g.op("Relu", g.conv("x", 8, 32))
    t = g.op("Relu", g.conv(t, 32, 24))
    return Lab.of(g.model(g.conv(t, 24, 16)), count=2, size=2, step=8)


@cache
def drawn(seed: int) -> Losses:
    """Random losses of all widths and of three forms of each node."""
    space, rng = tiny().space, np.random.default_rng(seed)
    widths = {
        name: dict(
            zip(sorted(each), sorted(rng.lognormal(-5, 1, len(each)))[::-1], strict=True)
        )
        for name, each in space.widths.items()
    }
    forms = {
        options[i]: float(rng.lognormal(-5, 1))
        for options in space.forms.values()
        for i in rng.permutation(len(options))[:3]
    }
    orders = {n: Elimination(np.arange(space.groups[n].size), np.zeros(1)) for n in widths}
    return Losses(forms, widths, orders)


@cache
def every_plan(seed: int) -> list[Plan]:
    """All plans, with a form's loss in proportion to the channels that it acts on."""
    losses, space, found = drawn(seed), tiny().space, []
    linears = list(space.facts.linears.values())
    names = list(losses.widths)
    domains = [(*losses.widths[n], space.groups[n].size) for n in names]
    options = [[None, *(o for o in losses.forms if o.target == li.id)] for li in linears]
    for choice in product(*domains):
        chosen = dict(zip(names, choice, strict=True))
        widths = {n: w for n, w in chosen.items() if w < space.groups[n].size}
        lost = sum(losses.widths[n][w] for n, w in widths.items())
        sides = [
            (space.input_side(li).width(widths), space.output_side(li).width(widths))
            for li in linears
        ]
        shares = [
            c / li.in_channels * m / li.out_channels
            for li, (c, m) in zip(linears, sides, strict=True)
        ]
        for forms in product(*options):
            sites = list(zip(linears, sides, shares, forms, strict=True))
            if all(o is None or fits(li, o, m, c) for li, (c, m), _, o in sites):
                loss = lost + sum(losses.forms[o] * s for _, _, s, o in sites if o)
                named = {o.target: o for o in forms if o}
                cost, seconds = space.cost(widths, named), space.seconds(widths, named)
                found.append(Plan(widths, named, loss, cost, seconds))
    return found


def within(plan: Plan, limits: Limits, seconds: float = np.inf) -> bool:
    fits = (
        plan.cost.macs <= (limits.macs or np.inf),
        plan.cost.params <= (limits.params or np.inf),
    )
    return all(fits) and plan.seconds <= seconds


def known(plan: Plan, seed: int) -> bool:
    """Whether a plan says what it costs and loses."""
    twin = next(
        p for p in every_plan(seed) if (p.widths, p.forms) == (plan.widths, plan.forms)
    )
    same = twin.cost == plan.cost and twin.seconds == pytest.approx(plan.seconds, rel=1e-9)
    return same and twin.loss == pytest.approx(plan.loss, rel=1e-6)


def shares(macs: float | None = None, params: float | None = None) -> Limits:
    cost = tiny().space.facts.cost
    return Limits(
        macs and macs * cost.macs,
        params and params * cost.params,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("costs", "time"),
    [({}, 0.7), ({}, 0.6), ({"macs": 0.5}, 0.7), ({"params": 0.4}, np.inf)],
    ids=str,
)
def test_choices_lose_least_within_costs_and_time(seed, costs, time):
    limits, seconds = shares(**costs), time * tiny().space.seconds({}, {})
    plan = Allocator(tiny().space, drawn(seed)).choose(limits, seconds=seconds)
    assert within(plan, limits, seconds)
    assert known(plan, seed)
    plans = every_plan(seed)
    best = min(p.loss for p in plans if within(p, limits, seconds))
    assert plan.loss <= best * (1 + GAP)
    assert sum(p.loss <= best * (1 + GAP) for p in plans) < 0.5 * len(plans)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("costs", [{}, {"macs": 0.6}, {"params": 0.7}], ids=str)
@pytest.mark.parametrize("loss", [0.003, 0.02])
def test_the_fastest_within_a_loss(seed, costs, loss):
    """Of forms that would not lose more than that at the full width."""
    losses, limits = drawn(seed), shares(**costs)
    plans = [
        plan
        for plan in every_plan(seed)
        if plan.loss <= loss
        and within(plan, limits)
        and all(losses.forms[option] <= loss for option in plan.forms.values())
    ]
    allocator = Allocator(tiny().space, losses)
    if not plans:
        with pytest.raises(LimitError):
            allocator.fastest(loss, limits)
        return
    plan = allocator.fastest(loss, limits)
    assert within(plan, limits)
    assert plan.loss <= loss * (1 + 1e-9)
    assert known(plan, seed)
    assert plan.seconds <= min(p.seconds for p in plans) * (1 + GAP)


def test_both_outcomes_of_a_loss_were_seen():
    """Of the cases above, some have plans and some have none."""
    outcomes = set()
    for seed, loss in product(SEEDS, (0.003, 0.02)):
        try:
            Allocator(tiny().space, drawn(seed)).fastest(loss, shares(macs=0.6))
            outcomes.add("plan")
        except LimitError:
            outcomes.add("none")
    assert outcomes == {"plan", "none"}


def test_more_loss_is_never_slower():
    allocator = Allocator(tiny().space, drawn(0))
    times = [
        allocator.fastest(loss, Limits()).seconds for loss in (1e-9, 3e-3, 0.01, 0.1, 1.0)
    ]
    assert times[0] == tiny().space.seconds({}, {})
    assert all(later <= earlier * (1 + GAP) for earlier, later in pairwise(times))
    assert times[-1] < 0.6 * times[0]


@pytest.mark.parametrize(
    ("limits", "time", "words"),
    [
        (Limits(), 1e-6, "the limit on predicted time"),
        (Limits(macs=2), np.inf, "the limit on MACs"),
        (Limits(params=2), 0.9, "the limit on parameters"),
        (Limits(size=2), np.inf, "the limit on file bytes"),
    ],
    ids=str,
)
def test_what_is_out_of_reach_is_named(limits, time, words):
    allocator = Allocator(tiny().space, drawn(0))
    seconds = time * tiny().space.seconds({}, {})
    with pytest.raises(LimitError, match=words):
        allocator.choose(limits, seconds=seconds)
    nearest = allocator.smallest(limits, seconds=seconds)
    assert nearest.cost.macs < 0.5 * tiny().space.facts.cost.macs


def test_limits_beyond_a_loss_are_out_of_reach():
    with pytest.raises(LimitError, match="the limit"):
        Allocator(tiny().space, drawn(0)).fastest(1e-9, shares(macs=0.5))


def test_a_programme_that_found_nothing_in_time_gets_more(monkeypatch):
    seconds = []

    def slow(*args: object, time_limit_s: float, **options: object) -> Allocation:
        seconds.append(time_limit_s)
        if len(seconds) == 1:
            raise SolverTimeoutError("too slow")
        return allocate(*args, time_limit_s=time_limit_s, **options)

    limits = shares(macs=0.6)
    wanted = Allocator(tiny().space, drawn(0), time_limit_s=7.0).choose(limits)
    monkeypatch.setattr("onnxcomp.search.allocation.allocate", slow)
    assert Allocator(tiny().space, drawn(0), time_limit_s=7.0).choose(limits) == wanted
    assert seconds[:2] == [7.0, 35.0]
    assert all(each <= 7.0 for each in seconds[2:])


def test_a_better_plan_that_is_not_found_in_time_gets_no_more(monkeypatch):
    seconds = []

    def slow(*args: object, time_limit_s: float, **options: object) -> Allocation:
        seconds.append(time_limit_s)
        raise SolverTimeoutError("too slow")

    monkeypatch.setattr("onnxcomp.search.allocation.allocate", slow)
    allocator = Allocator(tiny().space, drawn(0), time_limit_s=7.0)
    assert allocator.fastest(np.inf, Limits()).empty  # within the limits from the start
    assert seconds == [pytest.approx(7.0, abs=1.0)]


@cache
def wide() -> tuple[Lab, Losses]:
    """A trunk of 512 channels and a group of 1,280, at multiples of 8, with smooth losses."""
    g = Graph(8, 2, 2)
    t = g.op("Relu", g.conv("x", 8, 512, kernel=1))
    h = g.op("Relu", g.conv(t, 512, 1280, kernel=1))
    t = g.op("Relu", g.op("Add", g.conv(h, 1280, 512, kernel=1), t))
    model = g.model(g.conv(t, 512, 8, kernel=1))
    lab = Lab.of(model, count=2, size=2, step=None, kinds=(RemoveChannels,))
    sizes = {name: lab.space.groups[name].size for name in lab.space.widths}
    widths = {
        name: {w: (1 - w / sizes[name]) ** 2 for w in each}
        for name, each in lab.space.widths.items()
    }
    orders = {n: Elimination(np.arange(size), np.zeros(1)) for n, size in sizes.items()}
    return lab, Losses({}, widths, orders)


@pytest.mark.parametrize("share", [0.35, 0.6, 0.85])
def test_few_of_many_widths_lose_little_more(monkeypatch, share):
    lab, losses = wide()
    sizes: list[list[int]] = []

    def noted(domains: list[int], *args: object, **options: object) -> Allocation:
        sizes.append(sorted(domains))
        return allocate(domains, *args, **options)

    def chosen() -> Plan:
        limits = Limits(macs=share * lab.space.facts.cost.macs)
        return Allocator(lab.space, losses).choose(limits)

    monkeypatch.setattr("onnxcomp.search.allocation.allocate", noted)
    few = chosen()
    assert max(max(each) for each in sizes) == 64
    assert max(min(each) for each in sizes if len(each) == 2) <= 32
    sizes.clear()
    monkeypatch.setattr("onnxcomp.search.allocation._LONE_WIDTHS", 1000)
    monkeypatch.setattr("onnxcomp.search.allocation._SHARED_WIDTHS", 1000)
    every = chosen()
    assert max(max(each) for each in sizes) == 83
    assert few.loss <= 1.1 * every.loss
