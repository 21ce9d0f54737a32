"""A plan in words, for the report."""

from __future__ import annotations

from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.report import Action
from onnxcomp.search.losses import Losses
from onnxcomp.search.space import Plan, Space


def describe(
    space: Space, plan: Plan, losses: Losses | None
) -> tuple[tuple[Action, ...], int]:
    """Return what a plan does, in words, and the MACs of all nodes that it changes."""
    if losses is None:
        return (), 0
    actions: list[Action] = []
    changed: set[str] = set()
    linears = space.facts.linears
    for name, width in plan.widths.items():
        touched = {
            linear.id
            for linear in linears.values()
            for side in (space.input_side(linear), space.output_side(linear))
            if name in dict(side.parts)
        }
        changed |= touched
        macs = sum(linears[node].convolution.macs for node in touched)
        size = space.groups[name].size
        what, loss = f"{size} channels become {width}", losses.widths[name][width]
        actions.append(Action(RemoveChannels.name, name, what, loss, macs))
    for node, option in plan.forms.items():
        changed.add(node)
        what = f"{option.form} of rank {option.size[0]}"
        macs = linears[node].convolution.macs
        actions.append(Action(Factorize.name, node, what, losses.forms[option], macs))
    return tuple(actions), sum(linears[node].convolution.macs for node in changed)
