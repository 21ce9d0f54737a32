"""Common factors in the search: chosen exactly, solved well, and written as solved."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import numpy as np
import pytest

from onnxcomp.errors import LimitError
from onnxcomp.model import Model
from onnxcomp.numerics.selection import Elimination
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.working import finish
from onnxcomp.search.allocation import Allocator
from onnxcomp.search.choices import find_choices
from onnxcomp.search.losses import Losses
from onnxcomp.search.outputs import OutputMeter
from onnxcomp.search.settings import Limits
from onnxcomp.search.sharing import JointLosses
from onnxcomp.search.space import Plan, fits
from tests.analysis.channel_graphs import Graph
from tests.passes.joint_cases import NAME, common_readers
from tests.search.joint_lab import DIGITS, JOINT, digits, members_of, mixed, plan_of, readers
from tests.search.lab import Lab, distance, measured_cost

TOLERANCE = 1e-5  # relative L2 between the dense network of the walk and the written one
GAP = 0.01  # relative, of the optimum; programmes are solved to half of that
SEEDS = range(4)


# The knapsack


@cache
def tiny() -> Lab:
    """Two equal convolutions in front of another one, and the groups between them."""
    g = Graph(24, 8, 8)
    t = "x"
    for _ in range(2):
        t = g.op("Relu", g.conv(t, 24, 24))
    forms = ("spatial_first", "input_basis_last", "output_basis_both")
    kinds = (RemoveChannels, Factorize, partial(JOINT, forms))
    return Lab.of(g.model(g.conv(t, 24, 16)), count=2, size=2, step=8, kinds=kinds)


@cache
def drawn(seed: int) -> Losses:
    """Random losses of all widths and joint options, and of two forms of each node."""
    space, rng = tiny().space, np.random.default_rng(seed)
    widths = {
        name: dict(
            zip(sorted(each), sorted(rng.lognormal(-5, 1, len(each)))[::-1], strict=True)
        )
        for name, each in space.widths.items()
    }
    forms = {
        options[i]: float(rng.lognormal(-4, 1))
        for options in space.forms.values()
        for i in rng.permutation(len(options))[:2]
    }
    joint = {
        (node, option): float(rng.lognormal(-4 + 2 * (seed % 2), 1)) / sum(option.size)
        for options in space.joint.values()
        for option in options
        for node in members_of(tiny(), option)
    }
    orders = {n: Elimination(np.arange(space.groups[n].size), np.zeros(1)) for n in widths}
    return Losses(forms, widths, orders, (), JointLosses(joint))


def possible(lab: Lab, plan: Plan) -> bool:
    """Whether ranks fit, and common factors see the same channels at all their layers."""
    space = lab.space
    for node, option in plan.forms.items():
        linear = space.facts.linears[node]
        c = space.input_side(linear).width(plan.widths)
        m = space.output_side(linear).width(plan.widths)
        same_inputs, same_outputs = space.common_sides(option)
        free = (
            same_inputs or c == linear.in_channels,
            same_outputs or m == linear.out_channels,
        )
        if not all(free) or not fits(linear, option, m, c):
            return False
    return True


@cache
def every_plan(seed: int) -> list[Plan]:
    """All plans, with a form's loss in proportion to the channels that it acts on."""
    losses, space, found = drawn(seed), tiny().space, []
    linears = list(space.facts.linears.values())
    names = list(losses.widths)
    domains = [(*losses.widths[n], space.groups[n].size) for n in names]
    (choices,) = find_choices(space, losses.joint.losses).values()
    own = [[None, *(o for o in losses.forms if o.target == li.id)] for li in linears]
    alone = [{o.target: o for o in each if o} for each in product(*own)]
    shared = [{**each, **choice} for choice in choices[1:] for each in alone
              if each.keys().isdisjoint(choice)]  # fmt: skip
    for sizes in product(*domains):
        chosen = dict(zip(names, sizes, strict=True))
        widths = {n: w for n, w in chosen.items() if w < space.groups[n].size}
        shares = {
            li.id: space.input_side(li).width(widths)
            / li.in_channels
            * space.output_side(li).width(widths)
            / li.out_channels
            for li in linears
        }
        for forms in [*alone, *shared]:
            loss = sum(losses.widths[n][w] for n, w in widths.items())
            for node, option in forms.items():
                both = losses.forms | losses.joint.losses
                loss += shares[node] * both.get(option, both.get((node, option), 0.0))
            plan = replace(tiny().lone_plan(widths, forms), loss=loss)
            if possible(tiny(), plan):
                found.append(plan)
    return found


def within(plan: Plan, limits: Limits) -> bool:
    size = tiny().space.file_bytes(plan.cost, plan.forms)
    row = np.array([plan.cost.macs, plan.cost.params, size])
    return bool((row <= limits.row).all())


def is_joint(plan: Plan) -> bool:
    return any(option.method == NAME for option in plan.forms.values())


LIMITS = [{"size": 0.6}, {"params": 0.4}, {"size": 0.7, "macs": 0.6}, {"params": 0.2}]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shares", LIMITS, ids=str)
def test_choices_lose_least(seed, shares):
    space = tiny().space
    whole = space.facts.cost
    limits = Limits(**shares).absolute(whole.macs, whole.params, tiny().model.file_bytes)
    plan = Allocator(space, drawn(seed)).choose(limits)
    assert within(plan, limits)
    plans = every_plan(seed)
    twin = next(p for p in plans if (p.widths, p.forms) == (plan.widths, plan.forms))
    assert (twin.cost, twin.seconds) == (plan.cost, pytest.approx(plan.seconds, rel=1e-9))
    assert twin.loss == pytest.approx(plan.loss, rel=1e-6)
    best = min(p.loss for p in plans if within(p, limits))
    assert plan.loss <= best * (1 + GAP)
    assert sum(p.loss <= best * (1 + GAP) for p in plans) < 0.8 * len(plans)


def test_both_kinds_of_plans_were_seen():
    """Of the cases above, some share factors, some do not, and some remove channels."""
    whole = tiny().space.facts.cost
    plans = [
        Allocator(tiny().space, drawn(seed)).choose(
            Limits(**shares).absolute(whole.macs, whole.params, tiny().model.file_bytes)
        )
        for seed in SEEDS
        for shares in LIMITS
    ]
    assert {is_joint(plan) for plan in plans} == {True, False}
    assert any(is_joint(plan) and plan.widths for plan in plans)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("case", ["residual", "transposed", "one dimension"])
def test_more_choices_never_lose_more(case, share):
    lab, losses = mixed(case)
    limits = Limits(size=share * lab.model.file_bytes)
    try:
        without = Allocator(lab.space, replace(losses, joint=JointLosses())).choose(limits)
    except LimitError:
        assert share < 0.6
        return
    plan = Allocator(lab.space, losses).choose(limits)
    assert plan.loss <= without.loss * (1 + GAP)
    assert lab.space.file_bytes(plan.cost, plan.forms) <= limits.size


@pytest.mark.parametrize("seed", range(12))
def test_common_factors_stay_possible_where_three_groups_meet(seed):
    """Also where the third group, which a node's table does not hold, becomes narrower."""
    lab = joined()
    space, rng = lab.space, np.random.default_rng(seed)
    widths = {
        n: dict(zip(sorted(e), sorted(rng.lognormal(-5, 1, len(e)))[::-1], strict=True))
        for n, e in space.widths.items()
    }
    joint = {
        (node, option): float(rng.lognormal(-6, 1))
        for options in space.joint.values()
        for option in options
        for node in members_of(lab, option)
    }
    orders = {n: Elimination(np.arange(space.groups[n].size), np.zeros(1)) for n in widths}
    weights = dict.fromkeys(space.facts.linears, 1.0)
    losses = Losses({}, widths, orders, (), JointLosses(joint, weights))
    for share in (0.6, 0.4, 0.3):
        plan = Allocator(space, losses).choose(Limits(params=share * space.facts.cost.params))
        assert possible(lab, plan)
    assert measured_cost(lab.walk(plan, losses).run().model, lab) == plan.cost


@cache
def joined() -> Lab:
    """Equal convolutions that read three groups of channels each."""
    g, t, width = Graph(8, 8, 8), "x", 8
    for _ in range(2):
        parts = [g.op("Relu", g.conv(t, width, size, kernel=1)) for size in (16, 12, 8)]
        t, width = g.op("Relu", g.conv(g.op("Concat", *parts, axis=1), 36, 24)), 24
    forms = ("spatial_first", "input_basis_first", "output_basis_last")
    kinds = (RemoveChannels, partial(JOINT, forms))
    return Lab.of(g.model(g.conv(t, width, 4)), count=4, size=4, step=4, kinds=kinds)


# The walk


def dense(lab: Lab, weights) -> Model:
    return Model(lab.model.skeleton, {**lab.model.weights, **weights})


def random_plan(lab: Lab, losses: Losses, rng: np.random.Generator) -> Plan:
    """Widths and forms at random, a joint option of every group, and what goes with it."""
    plan = lab.plan(losses, rng)
    forms = dict(plan.forms)
    taken: set[str] = set()
    for name, options in lab.space.joint.items():
        nodes = lab.space.joint_groups[name].members
        known = [o for o in options if all((n, o) in losses.joint.losses for n in nodes)]
        if known and taken.isdisjoint(nodes):
            forms |= dict.fromkeys(nodes, known[rng.integers(len(known))])
            taken |= set(nodes)
    widths = dict(plan.widths)
    while not possible(lab, plan := lab.lone_plan(widths, forms)):
        del widths[rng.choice(list(widths))]
    return plan


@pytest.mark.parametrize(
    "case",
    ["residual", "residual bn", "matmul", "gemm transposed", "transposed", "one dimension"],
)
def test_written_models_are_what_was_solved(case):
    """Random plans of all methods; predicted costs are exact, and every group shares."""
    lab, losses = mixed(case)
    rng = np.random.default_rng(1)
    original, forms, narrow = lab.outputs(lab.model), set(), False
    for _ in range(6):
        plan = random_plan(lab, losses, rng)
        walked = lab.walk(plan, losses).run()
        found = lab.outputs(walked.model)
        assert distance(found, lab.outputs(dense(lab, walked.weights))) <= TOLERANCE
        assert distance(found, original) > 100 * TOLERANCE
        assert measured_cost(walked.model, lab) == plan.cost
        assert sorted(common_readers(finish(walked.model)).values()) == readers(lab, plan)
        forms |= {o.form for o in plan.forms.values() if o.method == NAME}
        narrow |= bool(plan.widths)
    assert len(forms) > 1
    assert narrow or "residual" not in case


@pytest.mark.parametrize(
    "form",
    [
        "spatial_first",
        pytest.param("tucker2_outer", marks=pytest.mark.heavy),
        pytest.param("output_basis_last", marks=pytest.mark.heavy),
    ],
)
def test_refitting_private_factors_pays(form, monkeypatch):
    """On other images: against frozen ones, and against factors of the weights alone."""
    lab, joint = digits()
    losses, meter = Losses({}, {}, {}, (), joint), other_images(lab)
    options = [
        next(o for o in each if o.form == form and o.size[0] == 32)
        for each in lab.space.joint.values()
    ]
    plan = plan_of(lab, *options)
    refitted = meter.of(lab.walk(plan, losses).run().weights)
    blind = meter.of(lab.walk(plan, losses, data_aware=False).run().weights)
    monkeypatch.setattr("onnxcomp.search.walk.refit", lambda _, private, *__: private)
    frozen = meter.of(lab.walk(plan, losses).run().weights)
    assert refitted < 0.6 * frozen
    assert frozen < 0.2 * blind


def other_images(lab: Lab) -> OutputMeter:
    with np.load(DIGITS / "samples.npz") as file:
        batches = [{"input": file["input"][128:256]}]
    return OutputMeter(lab.model, lab.space.facts.tensors, batches, threads=1)


def test_two_walks_are_the_same():
    lab, losses = mixed("residual bn")
    plan = random_plan(lab, losses, np.random.default_rng(0))
    assert is_joint(plan)
    first, second = (lab.walk(plan, losses).run().model.digest for _ in range(2))
    assert first == second
