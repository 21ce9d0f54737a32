"""The layers of collaborative compression: their costs, curves, and what stays of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.channels import ChannelGroup, Reader
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.target import Convolution, Target
from onnxcomp.deadline import Progress
from onnxcomp.model import Array
from onnxcomp.numerics.collaborative import (
    MOST,
    Curve,
    Kept,
    Removal,
    sensitivity,
    solve_rates,
)
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Refusal
from onnxcomp.passes.chains import convolutions, kernel_shape4, reason_to_stay

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.passes.compress_collaboratively import CompressCollaboratively

FORM = "output_basis"  # k x k to the rank, then 1 x 1
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """A layer with its units.

    Attributes:
        linear: The node.
        cost: Its cost with so many input channels, at a rank or (None) as one node.
        curve: Its sensitivity; None where the gradient says nothing.
        removal: Which of its units go.
    """

    linear: Linear
    cost: Callable[[int, int | None], float]
    curve: Curve | None
    removal: Removal

    @property
    def whole(self) -> float:
        """Its cost as it is."""
        return self.cost(self.linear.in_channels, None)

    def loss(self, kept: Kept) -> float:
        """Return the loss on its curve, a share of that of losing all of it."""
        count = self.linear.in_channels - len(kept.dropped)
        rate = 1.0 - self.cost(count, kept.rank) / self.whole
        return 0.0 if self.curve is None else self.curve.loss(rate)


class Layers:
    """All layers of a model that lose units, with what gradients say of them.

    Layers are the convolutions and matrix products of one group but for those that nothing
    weighted is in front of or behind.

    Args:
        settings: The pass.
        facts: The model.
        gradients: Mean or mean squared gradient of each weight, by its name.
        excluded: Nodes that stay as they are.
        progress: Called with a layer's name and the share done, here and in `at`.
    """

    def __init__(
        self,
        settings: CompressCollaboratively,
        facts: Analysis,
        gradients: Mapping[str, Array],
        excluded: Collection[str] = (),
        progress: Progress = lambda *_: None,
    ) -> None:
        self._settings = settings
        self._progress = progress
        self._facts = facts
        self._excluded = excluded
        self._whys = dict(facts.not_linear)
        self.members: dict[str, Layer] = {}
        inner = _inner(facts)
        for position, linear in enumerate(facts.linears.values()):
            progress(linear.id, position / len(facts.linears))
            reason = "excluded" * (linear.id in excluded) or _reason(facts, linear, inner)
            gradient = gradients.get(linear.weight)
            if not reason and gradient is None:
                reason = "its weight has no gradient"
            if reason or gradient is None:
                self._whys[linear.id] = reason
                continue
            self.members[linear.id] = layer = self._layer(linear, gradient)
            if layer.curve is None:
                self._whys[linear.id] = "its loss does not grow with the share that goes"

    @property
    def whole(self) -> float:
        """Cost of the whole network, in the unit of the Lagrangian."""
        settings, facts = self._settings, self._facts
        if settings.cost == "macs":
            return float(facts.cost.macs)
        convs = [linear.convolution for linear in facts.linears.values()]
        return settings.target.chain_seconds(convs)

    @property
    def most(self) -> float:
        """The largest share of the network's cost that can go."""
        known = [layer.whole for layer in self.members.values() if layer.curve is not None]
        return (1 - 1e-9) * MOST * sum(known) / max(self.whole, 1e-30)

    def at(self, rate: float, *, timely: bool = False) -> dict[str, Kept]:
        """Return what stays of every layer that changes.

        With `reconstruct`, a layer stays in one part where its readers leave it so few outputs
        that two parts would not be cheaper; the reference keeps them.

        Args:
            rate: Share of the whole network's cost that goes.
            timely: A layer reads all that is left of its input where selecting channels is not
                predicted to save time, as with costs in seconds in any case.

        Raises:
            LimitError: The layers cannot lose so much.
        """
        layers = list(self.members.values())
        shares = solve_rates(
            [layer.curve for layer in layers],
            [layer.whole for layer in layers],
            rate * self.whole,
            per_cost=self._settings.per_cost,
        )
        found = {}
        for position, (layer, share) in enumerate(zip(layers, shares, strict=True)):
            self._progress(layer.linear.id, position / len(layers))
            found[layer.linear.id] = self._on_grid(layer, share)
        if self._settings.reconstruct:
            found = self._without_waste(found)
        if timely or self._settings.cost == "seconds":
            found = self._without_slow_selections(found)
        return {node: kept for node, kept in found.items() if kept != Kept()}

    def cut(self, kept: Mapping[str, Kept]) -> dict[str, Index]:
        """Return the channels of each group that all its readers drop, and producers can."""
        groups = [g for g in self._facts.channels.groups if not self._stays(g)]
        return dropped_by_all(groups, {node: each.dropped for node, each in kept.items()})

    def places(
        self, kept: Mapping[str, Kept], removed: Mapping[str, Index]
    ) -> dict[str, dict[str, Index]]:
        """Return which positions of every changed layer's input stay, and which it reads.

        Args:
            kept: What stays of the layers.
            removed: Channels that go where they are made.
        """
        channels = self._facts.channels
        stays, found = channels.keeping(removed), {}
        for node, each in kept.items():
            linear = self.members[node].linear
            ids = channels.axis_ids(linear.x, linear.x_axis)
            count = linear.in_channels
            read = np.arange(count) if ids is None else np.flatnonzero(stays[ids])
            found[node] = {"read": read, "kept": np.delete(np.arange(count), each.dropped)}
        return found

    def refusals(self, changed: Collection[str]) -> tuple[Refusal, ...]:
        """Return why all other nodes stay as they are."""
        why = "no unit of it goes at the common slope of all curves, or none that pays"
        whys = dict.fromkeys(self.members.keys() - set(changed), why) | self._whys
        return tuple(Refusal(node, whys[node]) for node in sorted(whys))

    def _stays(self, group: ChannelGroup) -> bool:
        """Whether no channel of a group can go where it is made."""
        constants = self._facts.channels.constants
        sites = [node for part in group.slices for node, _ in constants.sites(part.tensor)]
        touched = [*group.producers, *(r.node for r in group.readers), *sites]
        return group.pinned is not None or not set(self._excluded).isdisjoint(touched)

    def _layer(self, linear: Linear, gradient: Array) -> Layer:
        weight = _units(linear, self._facts.model.weights[linear.weight])
        found = _units(linear, gradient)
        importance = found if self._settings.squared else np.square(found)
        cost = cache(partial(self._layer_cost, linear, self._own_input(linear)))
        curve = sensitivity(weight, importance, cost)
        settings = self._settings
        removal = Removal(weight, importance, settings.gamma, settings.exact_up_to)
        return Layer(linear, cost, curve, removal)

    def _layer_cost(self, linear: Linear, own: bool, channels: int, rank: int | None) -> float:
        """Return what a layer costs, in seconds with its index selection."""
        if not channels or rank == 0:
            return 0.0
        cost = self._cost(linear, linear.out_channels, channels, rank)
        if self._settings.cost == "seconds" and channels < linear.in_channels and not own:
            cost += selection_seconds(self._settings.target, linear, channels)
        return cost

    def _cost(self, linear: Linear, outputs: int, channels: int, rank: int | None) -> float:
        steps = _steps(linear, outputs, channels, rank)
        if self._settings.cost == "macs":
            return float(sum(step.macs for step in steps))
        return self._settings.target.chain_seconds(steps)

    def _without_waste(self, kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """Return what stays, in one part where two are not cheaper at the outputs left."""
        removed, found = self.cut(kept), {}
        for node, each in kept.items():
            linear = self.members[node].linear
            outputs = self._outputs(linear, removed)
            width = linear.in_channels - len(each.dropped)
            two, one = (self._cost(linear, outputs, width, r) for r in (each.rank, None))
            found[node] = each if two < one else Kept(each.dropped)
        return found

    def _without_slow_selections(self, kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """Return what stays, all that is left of an input where selecting saves no time."""
        target, removed, found = self._settings.target, self.cut(kept), {}
        for node, places in self.places(kept, removed).items():
            linear, each = self.members[node].linear, kept[node]
            outputs = self._outputs(linear, removed)
            widths = len(places["kept"]), len(places["read"])
            part, whole = (
                target.chain_seconds(_steps(linear, outputs, width, each.rank))
                for width in widths
            )
            if whole <= part + selection_seconds(target, linear, widths[0]):
                read = set(places["read"].tolist())
                each = Kept(tuple(c for c in each.dropped if c not in read), each.rank)
            found[node] = each
        return found

    def _outputs(self, linear: Linear, removed: Mapping[str, Index]) -> int:
        """Return the output channels of a node that are left."""
        channels = self._facts.channels
        width = channels.width(linear.y, linear.y_axis, channels.keeping(removed))
        return linear.out_channels if width is None else width

    def _own_input(self, linear: Linear) -> bool:
        """Whether nothing else reads the layer's input, so that producers follow it."""
        groups = self._facts.channels.members(linear.x, linear.x_axis)
        return bool(groups) and all(
            len(group.readers) == 1 and not self._stays(group) for group in groups
        )

    def _on_grid(self, layer: Layer, share: float) -> Kept:
        """Return what stays of a layer of which a share goes, sizes rounded up."""
        linear, count = layer.linear, layer.linear.in_channels
        found = layer.removal.until(layer.cost, (1 - share) * layer.whole)
        width = self._settings.rounded(count - len(found.dropped), count)
        dropped = found.dropped[: count - width]
        if found.rank is None:
            return Kept(dropped)
        top = FORMS[FORM].max_rank(kernel_shape4(linear, linear.out_channels, width))
        rank = self._settings.rounded(found.rank, top)
        if rank > found.rank and layer.cost(width, rank) >= layer.cost(width, None):
            return Kept(dropped)
        return Kept(dropped, rank)


def dropped_by_all(
    groups: Iterable[ChannelGroup], dropped: Mapping[str, Sequence[int] | Index]
) -> dict[str, Index]:
    """Return the channels of each group that none of its readers keeps.

    One channel of a group has to stay; where none is kept, the one that went last of all.

    Args:
        groups: Channel groups.
        dropped: Positions of a node's input that it does not read, by node, as they went.
    """
    found = {}
    for group in groups:
        readers = group.readers
        if group.pinned is None and readers and all(r.node in dropped for r in readers):
            when = np.sum([_when(reader, dropped[reader.node]) for reader in readers], axis=0)
            gone = np.isfinite(when)
            if gone.all():
                gone[np.argmax(when)] = False
            if gone.any():
                found[group.name] = np.flatnonzero(gone)
    return found


def _when(reader: Reader, dropped: Sequence[int] | Index) -> npt.NDArray[np.float64]:
    """Return at which place all of each channel was gone from a reader; never is infinity."""
    places = np.full(1 + max([reader.index.max(), *dropped]), np.inf)
    places[np.asarray(dropped, np.int64)] = np.arange(len(dropped))
    return np.asarray(places[reader.index].max(axis=1))


def selection_seconds(target: Target, linear: Linear, channels: int) -> float:
    """Return the predicted seconds of an index selection in front of a node, like a Slice's.

    Args:
        target: Profile of the latency model.
        linear: The node.
        channels: Channels that it reads.
    """
    return target.element_seconds("Slice", channels * linear.convolution.in_positions)


def _steps(linear: Linear, outputs: int, channels: int, rank: int | None) -> list[Convolution]:
    """Return what a layer becomes, in two parts of a rank or (None) one."""
    shape = kernel_shape4(linear, outputs, channels)
    shapes = (shape,) if rank is None else FORMS[FORM].shapes(shape, rank)
    return convolutions(linear, FORM, shapes)


def _units(linear: Linear, array: Array) -> Array:
    """Return a weight as (outputs, input channels, kernel positions)."""
    kernel = linear.kernel(array)
    return kernel.reshape(*kernel.shape[:2], -1)


def _reason(facts: Analysis, linear: Linear, inner: Collection[str]) -> str:
    """Return why a node is no layer of the method, or ""."""
    outer = "it is a first or a last layer, which the method leaves as they are"
    return reason_to_stay(facts, linear) or outer * (linear.id not in inner)


def _inner(facts: Analysis) -> set[str]:
    """Return the linear nodes that others are in front of and behind."""
    linears, nodes = facts.linears, facts.model.nodes
    made: set[str] = set()  # tensors behind a linear node
    behind: set[str] = set()
    for node in nodes:
        follows = not made.isdisjoint((*node.inputs, *node.captured))
        if follows:
            behind.add(node.id)
        if follows or node.id in linears:
            made.update(node.outputs)
    read: set[str] = set()  # tensors in front of one
    front: set[str] = set()
    for node in reversed(nodes):
        leads = not read.isdisjoint(node.outputs)
        if leads:
            front.add(node.id)
        if leads or node.id in linears:
            read.update((*node.inputs, *node.captured))
    return {node for node in linears if node in behind and node in front}
