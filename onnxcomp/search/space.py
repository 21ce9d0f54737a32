"""The search space: widths of channel groups, forms of linear nodes, and what they cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.channel_flow import Count
from onnxcomp.analysis.channels import ChannelGroup
from onnxcomp.analysis.cost import Cost, is_parameter, node_macs
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.target import Convolution, Target
from onnxcomp.model import Node
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes import NODE_PASSES, factorize_jointly
from onnxcomp.passes.base import Option, Proposal, Refusal
from onnxcomp.passes.chains import kernel_shape4
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.joint_groups import Group
from onnxcomp.passes.remove_channels import RemoveChannels

Index = npt.NDArray[np.int64]
Widths = Mapping[str, int]


@dataclass(frozen=True)
class Side:
    """The channels on one side of a linear node, and the removable groups among them.

    Attributes:
        total: Channels in all.
        parts: Group names with their positions, shape (size, positions per channel).
    """

    total: int
    parts: tuple[tuple[str, Index], ...]

    def width(self, widths: Widths) -> int:
        """Return the channels that stay at given group widths."""
        gone = sum(
            (len(index) - widths.get(name, len(index))) * index.shape[1]
            for name, index in self.parts
        )
        return int(self.total - gone)

    def kept(self, removed: Mapping[str, Index]) -> Index:
        """Return the positions that stay when channels are removed from groups, sorted."""
        stay = np.ones(self.total, bool)
        for name, index in self.parts:
            if name in removed:
                stay[index[removed[name]]] = False
        return np.flatnonzero(stay)


@dataclass(frozen=True)
class Plan:
    """What is to be done: a width per changed group, and an option per changed node.

    Attributes:
        widths: Width that remains of each changed group.
        forms: Form by node id, its own or that of a group that it belongs to.
        loss: Predicted loss, the sum of the measured ones.
        cost: Predicted cost of the whole model, exact.
        seconds: Predicted time at batch 1 of all that plans may change.
    """

    widths: Mapping[str, int]
    forms: Mapping[str, Option]
    loss: float
    cost: Cost
    seconds: float

    @property
    def empty(self) -> bool:
        """Whether nothing is to be done."""
        return not self.widths and not self.forms


class Space:
    """All options of a model, gathered from the proposals of the lossy passes.

    Args:
        facts: Analysis of the working model (BatchNorm folded, biases explicit).
        proposals: What the passes proposed.
        target: Profile of the CPU.
        exclude: Regular expression of nodes, by name or output, that stay as they are.
    """

    def __init__(
        self,
        facts: Analysis,
        proposals: Sequence[Proposal],
        target: Target,
        exclude: str | None = None,
    ) -> None:
        self.facts = facts
        self.target = target
        refusals = [refusal for proposal in proposals for refusal in proposal.refusals]
        self.groups: Mapping[str, ChannelGroup] = {
            group.name: group for group in facts.channels.groups if group.pinned is None
        }
        self.excluded: frozenset[str] = frozenset(
            linear.id
            for linear in facts.linears.values()
            if exclude is not None and self._matches((linear.id, linear.y), exclude)
        )
        options = []
        for option in (option for proposal in proposals for option in proposal.options):
            reason = self._refusal(option, exclude)
            if reason:
                refusals.append(Refusal(option.target, reason))
            else:
                options.append(option)
        self.refusals: tuple[Refusal, ...] = tuple(dict.fromkeys(refusals))
        self.widths: dict[str, tuple[int, ...]] = {}
        self.forms: dict[str, tuple[Option, ...]] = {}
        self.joint: dict[str, tuple[Option, ...]] = {}
        for option in options:
            where = option.target
            if option.method == RemoveChannels.name:
                self.widths[where] = (*self.widths.get(where, ()), option.size[0])
            elif option.method in NODE_PASSES:
                self.forms[where] = (*self.forms.get(where, ()), option)
            elif option.method == FactorizeJointly.name:
                self.joint[where] = (*self.joint.get(where, ()), option)

    @cached_property
    def joint_groups(self) -> Mapping[str, Group]:
        """The nodes that take common factors, by the names that joint options use."""
        return FactorizeJointly().groups(self.facts)

    def _refusal(self, option: Option, exclude: str | None) -> str:
        """Return why a node, or one of the nodes that carry a group, must stay, or ""."""
        nodes = [option.target]
        if option.method == FactorizeJointly.name:
            nodes = [*self.joint_groups[option.target].members]
        if option.method == RemoveChannels.name:
            group, constants = self.groups[option.target], self.facts.channels.constants
            readers = [reader.node for reader in group.readers]
            for node in readers:
                if node not in self.facts.linears:
                    why = self.facts.not_linear.get(node, "it is not understood")
                    return f"its reader '{node}' cannot be refitted: {why}"
            sites = [site for part in group.slices for site in constants.sites(part.tensor)]
            nodes = [*group.producers, *readers, *(node for node, _ in sites)]
        if exclude is not None and self._matches(nodes, exclude):
            return f"excluded by '{exclude}'"
        return ""

    def _matches(self, nodes: Sequence[str], pattern: str) -> bool:
        """Whether a pattern names one of the nodes."""
        producers = self.facts.model.producers
        names = [
            n for node in nodes if node in producers for n in (node, producers[node].name)
        ]
        return any(re.search(pattern, name) for name in names)

    @cached_property
    def slices(self) -> Mapping[tuple[str, int], tuple[tuple[str, Index], ...]]:
        """Removable groups on every tensor axis."""
        found: dict[tuple[str, int], list[tuple[str, Index]]] = {}
        for name in self.widths:
            for part in self.groups[name].slices:
                found.setdefault((part.tensor, part.axis), []).append((name, part.index))
        return {key: tuple(parts) for key, parts in found.items()}

    def side(self, tensor: str, axis: int, total: int) -> Side:
        """Return the removable groups on a tensor's axis."""
        return Side(total, self.slices.get((tensor, axis), ()))

    def input_side(self, linear: Linear) -> Side:
        """Return the input channels of a linear node."""
        return self.side(linear.x, linear.x_axis, linear.in_channels)

    def output_side(self, linear: Linear) -> Side:
        """Return the output channels of a linear node."""
        return self.side(linear.y, linear.y_axis, linear.out_channels)

    def steps(
        self, linear: Linear, option: Option | None, in_width: int, out_width: int
    ) -> list[Convolution]:
        """Return the convolutions that a node becomes at given widths."""
        if option is not None:
            return chain_of(linear, option, out_width, in_width)
        whole, groups = linear.convolution, linear.groups
        if linear.id in self._group_counts:
            groups = in_width * groups // linear.in_channels
        return [replace(whole, in_channels=in_width, out_channels=out_width, groups=groups)]

    @cached_property
    def _group_counts(self) -> frozenset[str]:
        """Convolutions that lose whole groups, not the same channels of every group."""
        fixes = self.facts.channels.fixes
        counts = (fix for fix in fixes if isinstance(fix, Count) and fix.where == "group")
        return frozenset(count.node for count in counts)

    @cached_property
    def _products(self) -> tuple[Node, ...]:
        """Nodes other than linear ones whose MACs may change with the widths."""
        axes = {tensor for tensor, _ in self.slices}
        facts = self.facts
        return tuple(
            node
            for node in facts.model.nodes
            if node.id not in facts.linears
            and facts.costs[node.id].macs
            and not axes.isdisjoint((*node.inputs, node.id))
        )

    def _shape(self, tensor: str, widths: Widths) -> tuple[int, ...]:
        """Return the shape of a tensor at given widths."""
        shape = self.facts.tensors[tensor].shape
        return tuple(self.side(tensor, a, size).width(widths) for a, size in enumerate(shape))

    def _product_macs(self, node: Node, widths: Widths) -> int:
        """Return the MACs of a node that is not linear at given widths."""
        facts = self.facts
        shapes = {
            name: replace(facts.tensors[name], shape=self._shape(name, widths))
            for name in (*node.inputs, node.id)
            if name in facts.tensors
        }
        return node_macs(facts.model, shapes, {}, node)

    def cost(self, widths: Widths, forms: Mapping[str, Option]) -> Cost:
        """Return the exact cost of the whole model under a plan."""
        base = self.facts.cost
        macs, factored = base.macs, {}
        for linear in self.facts.linears.values():
            steps = self.steps(
                linear,
                forms.get(linear.id),
                self.input_side(linear).width(widths),
                self.output_side(linear).width(widths),
            )
            own = sum(step.macs for step in steps)
            if linear.node.op == "MatMul":  # channels may lie along its rows, too
                rows = self._shape(linear.node.id, widths)[1:-1]
                own = own * math.prod(rows) // math.prod(linear.out_extent)
            macs += own - linear.convolution.macs
            if linear.id in forms:
                factored[linear.weight] = sum(step.weights for step in steps)
                factored[linear.weight] -= self._common(linear, forms[linear.id], widths)
                if not steps:
                    factored[linear.bias] = 0
        for node in self._products:
            macs += self._product_macs(node, widths) - self.facts.costs[node.id].macs
        params, weight_bytes = base.params, base.weight_bytes
        for option in {o for o in forms.values() if o.method == FactorizeJointly.name}:
            linear = self.facts.linears[self.joint_groups[option.target].members[0]]
            common = self._common(linear, option, widths)
            params += common
            weight_bytes += common * linear.dtype.itemsize
        for name, array in self.facts.model.weights.items():
            if not is_parameter(array):
                continue
            size = factored.get(name)
            if size is None:
                dims = [self.side(name, a, d).width(widths) for a, d in enumerate(array.shape)]
                size = int(np.prod(dims, dtype=np.int64))
            params += size - array.size
            weight_bytes += (size - array.size) * array.itemsize
        return Cost(params, macs, weight_bytes)

    def common_sides(self, option: Option) -> tuple[bool, bool]:
        """Return on which sides channels may go although common factors touch them.

        On the input and on the output side: where the option's common factors do not touch
        it, or all members have the same groups of channels there.
        """
        if option.method != FactorizeJointly.name:
            return True, True
        shares = JOINT_FORMS[option.form].shares
        inputs, outputs = self._same_sides[option.target]
        return shares == "last" or inputs, shares == "first" or outputs

    @cached_property
    def _same_sides(self) -> Mapping[str, tuple[bool, bool]]:
        """By joint group: whether all members have the same input and output channels."""

        def same(sides: Sequence[Side]) -> bool:
            shown = [[(n, i.tolist()) for n, i in side.parts] for side in sides]
            return all(each == shown[0] for each in shown)

        found = {}
        for name in self.joint:
            linears = [self.facts.linears[node] for node in self.joint_groups[name].members]
            inputs = [self.input_side(linear) for linear in linears]
            outputs = [self.output_side(linear) for linear in linears]
            found[name] = same(inputs), same(outputs)
        return found

    def _common(self, linear: Linear, option: Option, widths: Widths) -> int:
        """Return the weights of a node's chain that its group stores once."""
        c, m = self.input_side(linear).width(widths), self.output_side(linear).width(widths)
        return common_weights(linear, option, m, c)

    def file_bytes(self, cost: Cost, forms: Mapping[str, Option]) -> int:
        """Return the predicted size of the file, within about 1 %."""
        saved = self.facts.cost.weight_bytes - cost.weight_bytes
        further = 0
        for node, option in forms.items():
            further += header_bytes(self.facts.linears[node], option)
        return self.facts.model.file_bytes - saved + further

    @cached_property
    def element_seconds(self) -> Mapping[str, float]:
        """Predicted seconds of elementwise operators per channel of every group."""
        found = dict.fromkeys(self.widths, 0.0)
        for node in self.facts.model.nodes:
            for name in node.outputs:
                shape = self.facts.tensors[name].shape if name in self.facts.tensors else ()
                seconds = self.target.element_seconds(node.op, math.prod(shape))
                for axis, size in enumerate(shape if seconds else ()):
                    for group, index in self.slices.get((name, axis), ()):
                        found[group] += seconds * index.shape[1] / size
        return found

    def seconds(self, widths: Widths, forms: Mapping[str, Option]) -> float:
        """Return the predicted seconds of all that a plan may change."""
        total = sum(
            each * widths.get(name, self.groups[name].size)
            for name, each in self.element_seconds.items()
        )
        for linear in self.facts.linears.values():
            c = self.input_side(linear).width(widths)
            m = self.output_side(linear).width(widths)
            steps = self.steps(linear, forms.get(linear.id), c, m)
            total += self.target.chain_seconds(steps)
        return total


def chain_of(
    linear: Linear, option: Option, out_width: int, in_width: int
) -> list[Convolution]:
    """Return what a form, its own or a joint one, makes of a node at given widths."""
    if option.method == FactorizeJointly.name:
        return factorize_jointly.chain(linear, option, out_width, in_width)
    return NODE_PASSES[option.method].chain(option, linear, out_width, in_width)


def common_weights(linear: Linear, option: Option, out_width: int, in_width: int) -> int:
    """Return the weights of a node's chain that its group stores once."""
    if option.method != FactorizeJointly.name:
        return 0
    shape = kernel_shape4(linear, out_width, in_width)
    return factorize_jointly.shared_weights(option, shape)


def fits(linear: Linear, option: Option, out_width: int, in_width: int) -> bool:
    """Whether a form is possible at given widths."""
    if option.method == FactorizeJointly.name:
        shape = kernel_shape4(linear, out_width, in_width)
        return factorize_jointly.possible(option, shape)
    return NODE_PASSES[option.method].possible(option, linear, out_width, in_width)


def header_bytes(linear: Linear, option: Option | None) -> int:
    """Return about what further nodes take in the file beside their weights.

    Names of new nodes, tensors and weights derive from the old ones and occur several times;
    the coefficients were fitted to files of torch and tf2onnx.
    """
    if option is None:
        return 0
    node, weight = len(linear.id), len(linear.weight)
    nodes = len(chain_of(linear, option, linear.out_channels, linear.in_channels)) - 1
    if option.method != FactorizeJointly.name:
        return round(nodes * (155 + 3.5 * node + 2 * weight))
    concats = 2 * (JOINT_FORMS[option.form].shares == "both")
    return 155 + 80 * nodes + nodes * (3 * node + weight) + concats * (135 + 5 * weight)
