"""How channels pass through operators that compute: one rule per kind of operator.

A rule reads the labels of its node's inputs and writes those of its outputs.  Operators
without a rule pin all their channels.  Those that only move data are in `layout_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from onnxcomp.analysis.atoms import IntArray
from onnxcomp.analysis.channel_flow import ChannelFlow, Count
from onnxcomp.analysis.shape_values import reduced_axes
from onnxcomp.model import Node

Rule = Callable[[ChannelFlow, Node], None]

_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor Cast CastLike Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor
    Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less
    LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or Pow PRelu Reciprocal Relu Round
    Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh
    ThresholdedRelu Where Xor
"""
_POOLING = "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool"
_REDUCING = """
    ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceSumSquare ArgMax ArgMin
"""


def unknown(flow: ChannelFlow, node: Node) -> None:
    """Pin everything that an operator without a rule reads."""
    flow.pin_inputs(node, f"{node.op} '{node.name}' is not understood")


def elementwise(flow: ChannelFlow, node: Node) -> None:
    """Join the inputs along every output axis, broadcasting as NumPy does."""
    if "broadcast" in node.attrs:  # before opset 7, operands were aligned by an attribute
        return unknown(flow, node)
    for axis, ids in _broadcast(flow, node, 0):
        for name in node.outputs:
            flow.put(name, axis, ids)
    return None


def _broadcast(
    flow: ChannelFlow, node: Node, behind: int
) -> Iterator[tuple[int, IntArray | None]]:
    """Yield the joined labels of every output axis but the last `behind`."""
    shape = flow.shape(node.outputs[0])
    for axis, size in enumerate(shape[: len(shape) - behind]):
        sites = []
        for index, name in enumerate(node.inputs):
            own = axis - len(shape) + (len(flow.shape(name)) if name else 0)
            if own < 0:
                continue
            if flow.shape(name)[own] == size:
                sites.append((index, own))
            elif (ids := flow.get(name, own)) is not None:
                flow.atoms.pin(ids, f"{node.op} '{node.name}' repeats it over all channels")
        yield axis, flow.merge(node, sites)


def conv(flow: ChannelFlow, node: Node) -> None:
    """Convolve: weight (out, in / group, ...); grouped ones as `_grouped` says."""
    _convolve(flow, node, out_axis=0, in_axis=1)


def conv_transpose(flow: ChannelFlow, node: Node) -> None:
    """Convolve transposed: weight (in, out / group, ...)."""
    _convolve(flow, node, out_axis=1, in_axis=0)


def _convolve(flow: ChannelFlow, node: Node, *, out_axis: int, in_axis: int) -> None:
    weight = flow.weight(node, 1)
    if weight is None:
        return _computed_weight(flow, node, 1)
    flow.carry(node, {0: 0, 1: 1}, "a kernel slides over it")
    group = int(node.attrs.get("group", 1))
    ids = flow.get(node.input(0), 1)
    if group == 1:
        flow.read(node, 1, in_axis, ids)
        made = flow.make(node, 1, out_axis)
    else:
        per_group = (weight.shape[0] // group, weight.shape[1])
        widths = (per_group[in_axis], per_group[out_axis])
        made = _grouped(flow, node, (out_axis, in_axis), widths)
    return _output(flow, node, 1, made)


def _grouped(
    flow: ChannelFlow, node: Node, axes: tuple[int, int], sizes: tuple[int, int]
) -> IntArray:
    """Return the output channels of a grouped convolution.

    Either whole groups vanish, which joins all channels of a group (depthwise: each input
    channel with its outputs), or the same channel of every group does.  The way that leaves
    more to choose from is taken.

    Args:
        flow: The state.
        node: The node.
        axes: (output, input) axis of its weight; the first axis holds all groups.
        sizes: (input, output) channels per group.
    """
    data, (inner, outer), (out_axis, in_axis) = node.input(0), sizes, axes
    group = int(node.attrs["group"])
    ids = flow.get(data, 1)
    if ids is not None and group >= max(inner, outer):
        parts = ids.reshape(group, inner)
        flow.atoms.join(parts[:, :1], parts)
        made = np.repeat(parts[:, 0], outer)
        flow.follow(node, 1, 0, made if out_axis == 0 else ids)
        flow.number(node, "group", 0, Count(node.id, "group", 0, data, 1, 0, len(ids), inner))
        return made
    if ids is not None:
        parts = ids.reshape(group, inner)
        flow.atoms.join(parts[:1], parts)
    made = flow.make(node, 1, out_axis)
    if out_axis == 0:
        parts = made.reshape(group, outer)
        flow.atoms.join(parts[:1], parts)
        flow.read(node, 1, in_axis, None if ids is None else ids[:inner])
        return made
    flow.read(node, 1, in_axis, ids)
    return np.tile(made, group)


def gemm(flow: ChannelFlow, node: Node) -> None:
    """Multiply A (M, K), or its transpose, with a constant B."""
    if flow.weight(node, 1) is None:
        return _computed_weight(flow, node, 1)
    inner = 0 if node.attrs.get("transA", 0) else 1
    outer = 0 if node.attrs.get("transB", 0) else 1
    ids = flow.get(node.input(0), inner)
    flow.put(node.id, 0, flow.get(node.input(0), 1 - inner))
    flow.read(node, 1, 1 - outer, ids)
    return _output(flow, node, 1, flow.make(node, 1, outer))


def matmul(flow: ChannelFlow, node: Node) -> None:
    """Multiply with a constant matrix on either side, or two activations."""
    constant = next((i for i in (1, 0) if flow.weight(node, i) is not None), None)
    if constant is None and not flow.constants.names.isdisjoint(node.inputs):
        return _computed_weight(flow, node, len(flow.shape(node.id)) - 1)
    if constant is None:
        return _product(flow, node)
    data, weight = node.input(1 - constant), flow.shape(node.input(constant))
    rank, own = len(flow.shape(node.outputs[0])), len(flow.shape(data))
    if own < 2 or len(weight) < 2 or any(size > 1 for size in weight[:-2]):
        return _pinned_weight(flow, node, rank - 1, "multiplies with more than one matrix")
    inner = own - 2 + constant
    for axis, ids in flow.carried(data).items():
        if axis != inner:
            flow.put(node.outputs[0], axis + rank - own, ids)
    flow.read(node, constant, len(weight) - 1 - constant, flow.get(data, inner))
    made = flow.make(node, constant, len(weight) - 2 + constant)
    return flow.produce(node, rank - 2 + constant, made)


def _product(flow: ChannelFlow, node: Node) -> None:
    """Multiply two activations: the axes that are summed over must stay."""
    if any(len(flow.shape(name)) < 2 for name in node.inputs):
        return flow.pin_inputs(node, f"MatMul '{node.name}' sums over it without weights")
    rank = len(flow.shape(node.id))
    left, right = (len(flow.shape(name)) for name in node.inputs)
    reason = f"MatMul '{node.name}' sums over it without weights"
    for name, axis in ((node.input(0), left - 1), (node.input(1), right - 2)):
        if (ids := flow.get(name, axis)) is not None:
            flow.atoms.pin(ids, reason)
    flow.put(node.id, rank - 2, flow.get(node.input(0), left - 2))
    flow.put(node.id, rank - 1, flow.get(node.input(1), right - 1))
    for axis, ids in _broadcast(flow, node, 2):
        flow.put(node.id, axis, ids)
    return None


def _computed_weight(flow: ChannelFlow, node: Node, axis: int) -> None:
    _pinned_weight(flow, node, axis, "has a weight that is computed, not stored")


def _pinned_weight(flow: ChannelFlow, node: Node, axis: int, what: str) -> None:
    reason = f"{node.op} '{node.name}' {what}"
    flow.pin_inputs(node, reason)
    shape = flow.shape(node.outputs[0])
    if shape:
        flow.produce(node, axis, flow.atoms.fresh(shape[axis], reason))


def _output(flow: ChannelFlow, node: Node, axis: int, made: IntArray) -> None:
    """Label the output of a weighted node and slice its bias, input 2, along."""
    name = node.input(2)
    flow.produce(node, axis, made)
    if not name or flow.shape(name)[-1:] != made.shape:
        return
    own = len(flow.shape(name)) - 1
    if flow.constants.origin(name) is not None:
        flow.use(node, 2, own, made)
    elif (ids := flow.get(name, own)) is not None:
        flow.atoms.join(made, ids)
    else:
        flow.atoms.pin(made, f"{node.op} '{node.name}' has a bias that is computed")


def batch_normalization(flow: ChannelFlow, node: Node) -> None:
    """Scale, bias, mean and variance follow axis 1."""
    shape = flow.shape(node.input(0))
    flow.carry(node, {axis: axis for axis in range(len(shape))}, "")
    _follow_parameters(flow, node, range(1, 5))


def instance_normalization(flow: ChannelFlow, node: Node) -> None:
    """Every channel is normalised by itself; scale and bias follow axis 1."""
    flow.carry(node, {0: 0, 1: 1}, "it is normalised over")
    _follow_parameters(flow, node, (1, 2))


def _follow_parameters(
    flow: ChannelFlow, node: Node, indices: range | tuple[int, ...]
) -> None:
    ids = flow.get(node.input(0), 1)
    if ids is None:
        return
    for index in indices:
        if flow.constants.origin(node.input(index)) is not None:
            flow.use(node, index, 0, ids)
        else:
            flow.atoms.pin(ids, f"{node.op} '{node.name}' has parameters that are computed")


def pooling(flow: ChannelFlow, node: Node) -> None:
    """Pool over all axes behind the second."""
    flow.carry(node, {0: 0, 1: 1}, "it is pooled over")
    if len(node.outputs) > 1 and node.outputs[1]:
        flow.pin_tensor(node.input(0), f"{node.op} '{node.name}' returns indices into it")


def softmax(flow: ChannelFlow, node: Node) -> None:
    """Normalise over one axis; before opset 13 over that axis and all behind it."""
    rank = len(flow.shape(node.input(0)))
    new = flow.model.opset >= 13
    axis = int(node.attrs.get("axis", -1 if new else 1)) % rank
    kept = [a for a in range(rank) if (a != axis if new else a < axis)]
    flow.carry(node, {a: a for a in kept}, "it is normalised over")


def normalization(flow: ChannelFlow, node: Node) -> None:
    """Normalise over all axes from `axis` on."""
    axis = int(node.attrs.get("axis", -1)) % len(flow.shape(node.input(0)))
    flow.carry(node, {a: a for a in range(axis)}, "it is normalised over")


def one_axis(flow: ChannelFlow, node: Node) -> None:
    """Work along one axis given as an attribute, and keep the shape."""
    rank = len(flow.shape(node.input(0)))
    axis = int(node.attrs.get("axis", -1)) % rank
    flow.carry(node, {a: a for a in range(rank) if a != axis}, "it is worked along")


def local_response(flow: ChannelFlow, node: Node) -> None:
    """Normalise over neighbouring channels."""
    rank = len(flow.shape(node.input(0)))
    flow.carry(node, {a: a for a in range(rank) if a != 1}, "neighbouring channels are mixed")


def reduce(flow: ChannelFlow, node: Node) -> None:
    """Reduce over some axes."""
    rank = len(flow.shape(node.input(0)))
    if node.op.startswith("Arg"):
        gone: tuple[int, ...] | None = (int(node.attrs.get("axis", 0)) % rank,)
    else:
        gone = reduced_axes(node, flow.shapes.fixed, rank)
    if gone is None:
        return unknown(flow, node)
    kept = [a for a in range(rank) if a not in gone]
    full = bool(node.attrs.get("keepdims", 1))
    axes = {a: a if full else position for position, a in enumerate(kept)}
    return flow.carry(node, axes, "it is reduced over")


COMPUTING_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "BatchNormalization": batch_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": normalization,
    "RMSNormalization": normalization,
    "LpNormalization": one_axis,
    "LRN": local_response,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), softmax),
    **dict.fromkeys(_POOLING.split(), pooling),
    **dict.fromkeys(_REDUCING.split(), reduce),
}
