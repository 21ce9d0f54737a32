"""A plan in words, for the report."""

from __future__ import annotations

from onnxcomp.passes.base import Option
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.substitute_operators import SubstituteOperators
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
        what = _words(option)
        if option.method == FactorizeJointly.name:
            lost = losses.joint.losses[node, option]
            group = space.joint_groups[option.target]
            before, after = (_microseconds(space, plan, node, o) for o in (None, option))
            what += (
                f", in common with {len(group.members) - 1} others of {group.name}; "
                f"predicted {before:.0f} -> {after:.0f} us"
            )
        else:
            lost = losses.forms[option]
        macs = linears[node].convolution.macs
        actions.append(Action(option.method, node, what, lost, macs))
    return tuple(actions), sum(linears[node].convolution.macs for node in changed)


def _words(option: Option) -> str:
    """Return the form of a node in words."""
    sizes = " + ".join(str(size) for size in option.size)
    if option.method == SubstituteOperators.name:
        return f"{option.form} {sizes}".rstrip().replace("_", " ")
    return f"{option.form} of rank {sizes}"


def _microseconds(space: Space, plan: Plan, node: str, option: Option | None) -> float:
    """Return the predicted time of a node at a plan's widths, whole or factorised."""
    linear = space.facts.linears[node]
    c = space.input_side(linear).width(plan.widths)
    m = space.output_side(linear).width(plan.widths)
    return 1e6 * space.target.chain_seconds(space.steps(linear, option, c, m))
