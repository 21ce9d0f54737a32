"""Plans are within their limits, at costs that the written models have exactly."""

from functools import partial

import numpy as np
import onnx
import pytest

from onnxcomp.deadline import Deadline
from onnxcomp.errors import LimitError
from onnxcomp.model import Model
from onnxcomp.numerics.knapsack import Allocation, allocate
from onnxcomp.passes.working import finish
from onnxcomp.search.allocation import Allocator
from onnxcomp.search.settings import Limits
from tests.graphs import SHARED
from tests.search.cases import concat_of_three
from tests.search.lab import Lab, known, measured_cost

GRAPHS = ("concat_of_three", "depthwise", "residual", "channels_last", "transposed", "shuffle",
          "whole_groups_go", "channels_along_rows", "slope_in_two_places")  # fmt: skip


def whole(lab: Lab) -> Limits:
    cost = lab.space.facts.cost
    return Limits(cost.macs, cost.params, lab.model.file_bytes)


def shares(lab: Lab, **wanted: float) -> Limits:
    everything = whole(lab)
    return Limits(
        **{name: share * getattr(everything, name) for name, share in wanted.items()}
    )


@pytest.mark.parametrize(
    "wanted", [{"macs": 0.6}, {"params": 0.6}, {"macs": 0.8, "params": 0.5}]
)
@pytest.mark.parametrize("name", GRAPHS)
def test_plans_hold_their_limits_exactly(name, wanted):
    lab, losses = known(name)
    limits = shares(lab, **wanted)
    plan = Allocator(lab.space, losses).choose(limits)
    assert not plan.empty
    assert plan.cost == lab.space.cost(plan.widths, plan.forms)
    assert plan.cost.macs <= (limits.macs or np.inf)
    assert plan.cost.params <= (limits.params or np.inf)
    assert measured_cost(lab.walk(plan, losses).run().model, lab) == plan.cost


@pytest.mark.parametrize(
    "name", ["mlperftiny_cifar10_resnet8", "oarriaga_emotion_mini_XCEPTION"]
)
def test_real_models(name):
    """NHWC models of tf2onnx with residual trunks and separable convolutions."""
    path = SHARED / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    lab = Lab.of(Model.from_proto(onnx.load(path)), count=4, size=2, step=16)
    losses = lab.losses()
    plan = Allocator(lab.space, losses).choose(shares(lab, macs=0.6))
    small = lab.walk(plan, losses).run().model
    assert measured_cost(small, lab) == plan.cost
    predicted = lab.space.file_bytes(plan.cost, plan.forms)
    written = finish(small).file_bytes
    assert abs(predicted - written) <= 0.01 * written + 100 * len(plan.forms)  # long names


def test_size_limits():
    lab, losses = known("residual")
    limits = shares(lab, size=0.7)
    plan = Allocator(lab.space, losses).choose(limits)
    assert lab.space.file_bytes(plan.cost, plan.forms) <= limits.size


def test_tighter_limits_lose_more():
    lab, losses = known("residual")
    allocator = Allocator(lab.space, losses)
    found = [allocator.choose(shares(lab, macs=share)).loss for share in (0.9, 0.7, 0.5)]
    assert found == sorted(found)
    assert found[0] < found[2]


def test_limits_that_hold_already_give_an_empty_plan():
    lab, losses = known("residual")
    plan = Allocator(lab.space, losses).choose(whole(lab))
    assert plan.empty
    assert plan.loss == 0
    assert plan.cost == lab.space.facts.cost


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"macs": 1e-4}, "the limit on MACs"),
        ({"params": 1e-4}, "the limit on parameters"),
        ({"size": 1e-4}, "the limit on file bytes"),
        ({"macs": 0.9, "params": 1e-4}, "the limit on parameters"),
    ],
)
def test_limits_out_of_reach(wanted, words):
    lab, losses = known("residual")
    allocator = Allocator(lab.space, losses)
    limits = shares(lab, **wanted)
    with pytest.raises(LimitError, match=words) as caught:
        allocator.choose(limits)
    text = str(caught.value)
    assert "limit 0" not in text
    assert "limits [" not in text
    number = limits.params or limits.macs or limits.size
    assert f"{number:g}" in text  # as the user gave it, not what is left of it
    smallest = allocator.smallest(limits)
    assert not smallest.empty
    reached = lab.space.cost(smallest.widths, smallest.forms)
    assert reached.macs < lab.space.facts.cost.macs


def test_smallest_comes_near_the_limit():
    lab, losses = known("residual")
    allocator = Allocator(lab.space, losses)
    with pytest.raises(LimitError) as caught:
        allocator.choose(Limits(macs=10))
    reach = float(str(caught.value).split("within reach is ")[1].split(";")[0])
    step = lab.space.facts.cost.macs / 64
    assert allocator.smallest(Limits(macs=10)).cost.macs <= reach + step


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_possible_where_three_groups_meet(seed):
    """A rank fits a node also where the third group takes another width than assumed."""
    lab, losses = known("concat_of_three")
    rng = np.random.default_rng(seed)
    share = float(rng.uniform(0.1, 0.6))
    try:
        plan = Allocator(lab.space, losses).choose(shares(lab, params=share))
    except LimitError:
        plan = Allocator(lab.space, losses).smallest(shares(lab, params=share))
    small = lab.walk(plan, losses).run().model
    assert measured_cost(small, lab) == plan.cost


def test_plans_are_deterministic():
    plans = []
    for _ in range(2):
        lab = Lab.of(concat_of_three(), step=4)
        plans.append(Allocator(lab.space, lab.losses()).choose(shares(lab, macs=0.5)))
    assert plans[0] == plans[1]


def test_better_plans_share_one_time_limit(monkeypatch):
    now, asked = [0.0], []

    def slow(*args: object, time_limit_s: float, **options: object) -> Allocation:
        asked.append(time_limit_s)
        now[0] += time_limit_s
        return allocate(*args, **options)

    monkeypatch.setattr("onnxcomp.search.allocation.allocate", slow)
    clocked = partial(Deadline, clock=lambda: now[0])
    monkeypatch.setattr("onnxcomp.search.allocation.Deadline", clocked)
    lab, losses = known("residual")
    allocator = Allocator(lab.space, losses, time_limit_s=8.0, patience=1.5)
    assert not allocator.choose(shares(lab, macs=0.7)).empty
    assert asked[0] == 8.0
    assert len(asked) > 1
    assert sum(asked[1:]) <= 8.0
