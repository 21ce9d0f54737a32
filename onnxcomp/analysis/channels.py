"""Channels: which positions of which tensors can only vanish together.

The model is walked front to back.  Weighted nodes make channels, a rule per operator says how
they pass (`channel_rules.py`, `layout_rules.py`), and what must stay is pinned with a reason.
Channels that sit in the same tensors form a group, the unit of which any subset can go.

Removing channels equals zeroing them in all weights that read them, in the original model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcomp.analysis.atoms import IntArray
from onnxcomp.analysis.channel_flow import ChannelFlow, ConstantUse, Count, Remap
from onnxcomp.analysis.channel_groups import ChannelGroup, ChannelSlice, Reader, form_groups
from onnxcomp.analysis.channel_rules import COMPUTING_RULES, unknown
from onnxcomp.analysis.constants import Constants
from onnxcomp.analysis.layout_rules import LAYOUT_RULES, SHAPE_INPUTS
from onnxcomp.analysis.shape_values import Axis
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array, Model, Node
from onnxcomp.runtime import TensorFact

__all__ = ["ChannelGroup", "ChannelSlice", "Channels", "Reader", "Removed", "find_channels"]

Removed = Mapping[str, Sequence[int] | NDArray[np.integer[Any]]]
_RULES = COMPUTING_RULES | LAYOUT_RULES


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a model.

    Channels are numbered through: those of a group follow one another, group by group.

    Attributes:
        model: The model.
        groups: All groups, pinned ones included, in file order.
        uses: The constants that carry channels, per reader.
        fixes: Numbers and indices in the graph that follow the channels.
        constants: The model's constants.
        values: Present values of the shape tensors that hold those numbers, by name.
        labels: Channel at every position of each activation's axis that carries channels.
    """

    model: Model
    groups: tuple[ChannelGroup, ...]
    uses: tuple[ConstantUse, ...] = field(repr=False)
    fixes: tuple[Count | Remap, ...] = field(repr=False)
    constants: Constants = field(repr=False)
    values: Mapping[str, Array] = field(repr=False)
    labels: Mapping[Axis, IntArray] = field(repr=False)

    @cached_property
    def _starts(self) -> dict[str, int]:
        ends = np.cumsum([group.size for group in self.groups]).tolist()
        return {g.name: end - g.size for g, end in zip(self.groups, ends, strict=True)}

    @cached_property
    def _by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    def group(self, name: str) -> ChannelGroup:
        """Return a group by its name.

        Raises:
            ParameterError: There is no such group.
        """
        if name not in self._by_name:
            raise ParameterError(f"Channels: there is no channel group '{name}'")
        return self._by_name[name]

    def axis_ids(self, tensor: str, axis: int) -> IntArray | None:
        """Return the channel at every position of an activation's axis; None without any."""
        return self.labels.get((tensor, axis))

    def members(self, tensor: str, axis: int) -> tuple[ChannelGroup, ...]:
        """Return the groups whose channels lie on an activation's axis."""
        ids = self.axis_ids(tensor, axis)
        if ids is None:
            return ()
        firsts = np.array(list(self._starts.values()))
        found = np.unique(np.searchsorted(firsts, np.unique(ids), side="right") - 1)
        return tuple(self.groups[index] for index in found)

    def keeping(self, removed: Removed) -> NDArray[np.bool_]:
        """Return which channels stay, by number, when some of each group are removed.

        Args:
            removed: Channels of each group, by its name.

        Raises:
            ParameterError: A group is unknown, pinned or would be emptied, or a channel is
                named twice or does not exist.
        """
        keep = np.ones(sum(group.size for group in self.groups), bool)
        for name, indices in removed.items():
            group = self.group(name)
            index = np.asarray(indices, np.int64).reshape(-1)
            if index.size and group.pinned is not None:
                raise ParameterError(f"channel group '{name}' must stay: {group.pinned}")
            if len(np.unique(index)) < index.size or (
                index.size and (index.min() < 0 or index.max() >= group.size)
            ):
                raise ParameterError(
                    f"channel group '{name}' has channels 0 to {group.size - 1}; each can be "
                    f"removed once; got {index.tolist()}"
                )
            if index.size >= group.size:
                raise ParameterError(
                    f"channel group '{name}' has {group.size} channels; one must be left"
                )
            keep[self._starts[name] + index] = False
        return keep

    def width(self, tensor: str, axis: int, keep: NDArray[np.bool_]) -> int | None:
        """Return how many positions of an axis stay; None where it carries no channels."""
        ids = self.axis_ids(tensor, axis)
        return None if ids is None else int(keep[ids].sum())


def find_channels(model: Model, tensors: Mapping[str, TensorFact]) -> Channels:
    """Find all channel groups of a model.

    Args:
        model: The model.
        tensors: Shapes of all its tensors from one run.

    Returns:
        The channels; every output channel of every weighted node is in a group.
    """
    flow = ChannelFlow(model, tensors)
    for node in model.nodes:
        outputs = [name for name in node.outputs if name]
        if all(name in flow.constants.names for name in outputs) or flow.shapes.follow(node):
            continue
        _pin_leaks(flow, node)
        rule = _RULES.get(node.op, unknown) if flow.known(node) else unknown
        rule(flow, node)
    for name in sorted(model.output_names):
        flow.pin_tensor(name, f"it is the graph output '{name}'")
        _pin_sizes(flow, name, f"their number is in the graph output '{name}'")
    return _result(flow)


def _pin_leaks(flow: ChannelFlow, node: Node) -> None:
    """Pin channels whose number flows into something else than shapes."""
    rated = SHAPE_INPUTS.get(node.op, ())
    names = [name for index, name in enumerate(node.inputs) if index not in rated]
    for name in (*names, *sorted(node.captured)):
        _pin_sizes(flow, name, f"{node.op} '{node.name}' depends on their number")


def _pin_sizes(flow: ChannelFlow, name: str, reason: str) -> None:
    elements = flow.shapes.elements(name) if flow.shapes.tracked(name) else None
    for origin in [] if elements is None else elements.reshape(-1).tolist():
        flow.pin_sizes(origin, reason)


def _result(flow: ChannelFlow) -> Channels:
    groups, number = form_groups(flow)
    return Channels(
        model=flow.model,
        groups=groups,
        uses=tuple(replace(use, labels=number[use.labels]) for use in flow.uses),
        fixes=tuple(flow.fixes),
        constants=flow.constants,
        values=_values(flow),
        labels={axis: number[ids] for axis, ids in flow.labels.items()},
    )


def _values(flow: ChannelFlow) -> dict[str, Array]:
    """Return the present values of the inputs that the fix-ups rewrite."""
    nodes = {node.id: node for node in flow.model.nodes}
    found: dict[str, Array] = {}
    for fix in flow.fixes:
        where = fix.where if isinstance(fix, Count) else fix.index
        name = "" if isinstance(where, str) else nodes[fix.node].input(where)
        value = flow.shapes.value(name) if name else None
        if value is not None:
            found[name] = value
    return found
