"""What the layers of one repetition can do together: a few choices for the allocator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcomp.numerics.interpolation import log_spaced
from onnxcomp.passes.base import Option
from onnxcomp.search.space import Space, common_weights

Choice: TypeAlias = Mapping[str, Option]
"""The joint option of each layer that takes one; empty where each layer is on its own."""

_SAME = 1e-9  # relative difference that counts as none: sums of times in another order
_MOST = 12  # choices of a repetition, evenly spaced on a logarithmic scale of their weights


def find_choices(
    space: Space, losses: Mapping[tuple[str, Option], float]
) -> dict[str, list[Choice]]:
    """Return the choices of every repetition, the first one empty.

    A choice is a joint option of all its layers, of one half of them, or the same form and
    ranks for both halves with common factors of their own.  Only those are returned that no
    other beats in loss, weights and predicted time at once.

    Args:
        space: The options.
        losses: Loss of each joint option at each of its nodes.
    """
    found: dict[str, dict[tuple[str, tuple[int, ...]], list[Choice]]] = {}
    for name, options in space.joint.items():
        group = space.joint_groups[name]
        for option in options:
            if all((node, option) in losses for node in group.members):
                kinds = found.setdefault(group.repetition, {})
                choice = dict.fromkeys(group.members, option)
                kinds.setdefault((option.form, option.size), []).append(choice)
    return {
        name: [{}, *_efficient(space, losses, [c for k in kinds.values() for c in _merged(k)])]
        for name, kinds in found.items()
    }


def _merged(choices: list[Choice]) -> list[Choice]:
    """Return choices of one form and size, and those that do not overlap also as one."""
    parts = sorted(choices, key=len)[:2]
    if len(parts) == 2 and parts[0].keys().isdisjoint(parts[1].keys()):
        return [*choices, {**parts[0], **parts[1]}]
    return choices


def _efficient(
    space: Space, losses: Mapping[tuple[str, Option], float], choices: list[Choice]
) -> list[Choice]:
    table = np.array([_measures(space, losses, choice) for choice in choices])
    less = table[:, None] < table[None] * (1 - _SAME)
    better = (table[:, None] <= table[None] * (1 + _SAME)).all(axis=2) & less.any(axis=2)
    kept = np.flatnonzero(~better.any(axis=0))
    kept = kept[np.argsort(table[kept, 1])]
    kept = kept[log_spaced(table[kept, 1], _MOST)]
    return [choices[i] for i in sorted(kept)]


def _measures(
    space: Space, losses: Mapping[tuple[str, Option], float], choice: Choice
) -> npt.NDArray[np.float64]:
    """Return loss, weights and predicted seconds of the layers of a repetition."""
    linears = space.facts.linears
    repetition = space.joint_groups[next(iter(choice.values())).target].repetition
    weights = seconds = 0.0
    for node in space.joint_groups[repetition].members:
        linear, option = linears[node], choice.get(node)
        m, c = linear.out_channels, linear.in_channels
        steps = space.steps(linear, option, c, m)
        weights += sum(step.weights for step in steps)
        seconds += space.target.chain_seconds(steps)
        if option is not None:
            weights -= common_weights(linear, option, m, c)
    for option in set(choice.values()):
        linear = linears[space.joint_groups[option.target].members[0]]
        weights += common_weights(linear, option, linear.out_channels, linear.in_channels)
    lost = sum(losses[node, option] for node, option in choice.items())
    return np.array([lost, weights, seconds])
