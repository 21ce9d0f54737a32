"""The few choices of a repetition: what they hold, and that nothing better is left out."""

from collections.abc import Mapping

import numpy as np
import pytest

from onnxcomp.analysis.cost import Cost
from onnxcomp.passes.base import Option
from onnxcomp.search.choices import Choice, find_choices
from onnxcomp.search.space import Space
from tests.search.joint_lab import members_of, repeated

CASES = ("residual", "residual bn", "gemm", "transposed", "uneven")
Losses = Mapping[tuple[str, Option], float]
MOST = 12


def drawn(space: Space, seed: int) -> dict[tuple[str, Option], float]:
    """Losses that fall with the rank, by a random factor for every node and form."""
    rng = np.random.default_rng(seed)
    return {
        (node, option): float(rng.lognormal(0, 1) / sum(option.size) ** 2)
        for name, options in space.joint.items()
        for option in options
        for node in space.joint_groups[name].members
    }


def all_choices(space: Space, repetition: str) -> list[Choice]:
    """An option for all layers, for a half, or the same form and ranks for both halves."""
    found: list[Choice] = []
    halves: dict[tuple[str, tuple[int, ...]], list[Choice]] = {}
    for name, options in space.joint.items():
        group = space.joint_groups[name]
        for option in options if group.repetition == repetition else ():
            found.append(dict.fromkeys(group.members, option))
            if name != repetition:
                halves.setdefault((option.form, option.size), []).append(found[-1])
    return [*found, *({**a, **b} for a, b in (h for h in halves.values() if len(h) == 2))]


def measures(space: Space, losses: Losses, choice: Choice) -> tuple[float, int, float]:
    """Loss, parameters and predicted seconds of the whole model."""
    cost: Cost = space.cost({}, choice)
    lost = sum(losses[node, option] for node, option in choice.items())
    return lost, cost.params, space.seconds({}, choice)


def dominated(one: tuple[float, ...], others: list[tuple[float, ...]]) -> bool:
    return any(
        all(a <= b * (1 + 1e-9) for a, b in zip(other, one, strict=True))
        and any(a < b * (1 - 1e-9) for a, b in zip(other, one, strict=True))
        for other in others
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_choices_are_few_and_none_beats_another(case, seed):
    space = repeated(case)[0].space
    losses = drawn(space, seed)
    found = find_choices(space, losses)
    assert found.keys() == {space.joint_groups[name].repetition for name in space.joint}
    for name, (first, *others) in found.items():
        assert first == {}
        assert 1 <= len(others) <= MOST
        every = [measures(space, losses, choice) for choice in all_choices(space, name)]
        for choice in others:
            assert choice in all_choices(space, name)
            assert not dominated(measures(space, losses, choice), every)
    assert find_choices(space, losses) == found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_out_unless_it_is_beaten_or_there_are_too_many(case, seed):
    space = repeated(case)[0].space
    losses = drawn(space, seed)
    for name, (_, *others) in find_choices(space, losses).items():
        candidates = all_choices(space, name)
        every = [measures(space, losses, choice) for choice in candidates]
        best = [c for c, m in zip(candidates, every, strict=True) if not dominated(m, every)]
        if len(best) <= MOST:
            assert [c for c in best if c not in others] == []
            assert len(others) == len(best)
            continue
        sizes = [space.cost({}, choice).params for choice in best]
        kept = [space.cost({}, choice).params for choice in others]
        assert (min(kept), max(kept)) == (min(sizes), max(sizes))
        assert len(others) > MOST // 2


def test_halves_have_factors_of_their_own():
    """Where it pays: a group of four whose halves lose nothing, or all of whose layers do."""
    space = repeated("residual")[0].space
    name = "stage0.conv1.12x12x3x3"
    for cheap in ("halves", "whole"):
        losses = {
            (node, o): 1e-6 if ("-" in o.target) is (cheap == "halves") else 1.0
            for (node, o) in drawn(space, 0)
        }
        _, *others = find_choices(space, losses)[name]
        cheapest = min(others, key=lambda c: sum(losses[n, o] for n, o in c.items()))
        assert all(losses[n, o] == 1e-6 for n, o in cheapest.items())
        targets = {len(set(choice.values())) for choice in others if len(choice) == 4}
        assert targets == ({1, 2} if cheap == "halves" else {1})
        lone = [choice for choice in others if len(choice) == 2]
        assert bool(lone) is (cheap == "halves")


def test_options_without_losses_are_no_choices():
    lab, _ = repeated("residual")
    space, losses = lab.space, drawn(lab.space, 0)
    spoilt = space.joint_groups["stage0.conv0.12x12x3x3"].members[-1]
    known = {key: lost for key, lost in losses.items() if key[0] != spoilt}
    found = find_choices(space, known)
    assert list(found) == ["stage0.conv1.12x12x3x3"]
    one = next(o for _, o in losses if members_of(lab, o)[-1] == spoilt)
    known = {key: lost for key, lost in losses.items() if key != (spoilt, one)}
    for choices in find_choices(space, known).values():
        assert not any(one in choice.values() for choice in choices)
    assert find_choices(space, {}) == {}


@pytest.mark.parametrize("case", CASES)
def test_measured_losses_give_choices(case):
    lab, losses = repeated(case)
    for choices in find_choices(lab.space, losses.joint.losses).values():
        assert len(choices) > 1
        for choice in choices[1:]:
            assert lab.space.cost({}, choice).params < lab.space.facts.cost.params
