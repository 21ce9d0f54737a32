"""How channels pass through operators that move, cut, join or resample data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxcomp.analysis.atoms import IntArray
from onnxcomp.analysis.channel_flow import ChannelFlow, Count, Remap
from onnxcomp.analysis.channel_rules import Rule, unknown
from onnxcomp.analysis.shape_values import slice_ranges
from onnxcomp.model import Node


def transpose(flow: ChannelFlow, node: Node) -> None:
    """Permute axes."""
    rank = len(flow.shape(node.input(0)))
    order = node.attrs.get("perm", tuple(reversed(range(rank))))
    flow.carry(node, {int(a): position for position, a in enumerate(order)}, "")


def reshape(flow: ChannelFlow, node: Node) -> None:
    """Read the elements, in C order, into another shape; Flatten, Squeeze and Unsqueeze too.

    Axes are matched in minimal groups of equal size.  Within a group the labels are spread
    over all elements and gathered along that output axis which keeps most channels apart.
    """
    source, target = node.input(0), node.outputs[0]
    shapes = flow.shape(source), flow.shape(target)
    if 0 in shapes[0]:
        return flow.pin_tensor(source, f"{node.op} '{node.name}' reads an empty tensor")
    for before, after in _segments(*shapes):
        carried = [a for a in before if flow.get(source, a) is not None]
        if len(carried) > 1:
            for axis in carried:
                reason = f"{node.op} '{node.name}' merges two channel axes"
                flow.atoms.pin(flow.labels[source, axis], reason)
        elif carried:
            _spread(flow, node, before, after, carried[0])
    if node.op == "Reshape":
        _reshape_target(flow, node)
    return None


def _segments(
    before: Sequence[int], after: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of input and output axes that hold the same elements."""
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        sizes = [before[i], after[j]]
        i, j = i + 1, j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0] *= before[i]
                left.append(i)
                i += 1
            else:
                sizes[1] *= after[j]
                right.append(j)
                j += 1
        if math.prod(before[i:]) == 1 and math.prod(after[j:]) == 1:
            left += range(i, len(before))
            right += range(j, len(after))
            i, j = len(before), len(after)
        yield left, right


def _spread(
    flow: ChannelFlow, node: Node, before: list[int], after: list[int], axis: int
) -> None:
    """Carry the labels of one input axis over to the best of some output axes."""
    source, target = node.input(0), node.outputs[0]
    sizes = [flow.shape(source)[a] for a in before]
    ids = flow.atoms.roots(flow.labels[source, axis])
    place = [1] * len(before)
    place[before.index(axis)] = len(ids)
    spread = np.broadcast_to(ids.reshape(place), sizes)
    spread = spread.reshape([flow.shape(target)[a] for a in after])
    best, rows, kept = -1, spread, 0
    for position, candidate in enumerate(after):
        lanes = np.moveaxis(spread, position, 0).reshape(spread.shape[position], -1)
        distinct = _distinct(lanes)
        if distinct >= max(kept, 1):
            best, rows, kept = candidate, lanes, distinct
    if kept <= 1:
        flow.atoms.pin(ids, f"{node.op} '{node.name}' merges the channels")
        return
    flow.atoms.join(rows[:, :1], rows)
    flow.put(target, best, np.ascontiguousarray(rows[:, 0]))


def _distinct(lanes: IntArray) -> int:
    """Return how many classes remain when all labels of each row are joined."""
    labels, inverse = np.unique(lanes, return_inverse=True)
    if lanes.shape[1] == 1:
        return len(labels)
    row = np.repeat(np.arange(len(lanes)), lanes.shape[1])
    size = len(lanes) + len(labels)
    edges = (np.ones(lanes.size, np.int8), (row, len(lanes) + inverse.reshape(-1)))
    return int(connected_components(coo_array(edges, shape=(size, size)), directed=False)[0])


def _reshape_target(flow: ChannelFlow, node: Node) -> None:
    """Keep the numbers of a Reshape's target in step with the channels."""
    source, target, name = node.input(0), node.outputs[0], node.input(1)
    where: int | str = 1 if name else "shape"
    value = flow.shapes.value(name) if name else np.array(node.attrs["shape"])
    reason = f"Reshape '{node.name}' has a fixed target"
    for axis, size in enumerate(flow.shape(target)):
        ids = flow.get(target, axis)
        written = size if value is None else int(value[axis])
        if written == -1:
            continue
        if written == 0 and not node.attrs.get("allowzero", 0):
            same = flow.get(source, axis)
            if _same_channels(flow, ids, same):
                continue
            for found in (ids, same):
                if found is not None:
                    flow.atoms.pin(found, reason)
        elif ids is not None:
            flow.number(node, where, axis, Count(node.id, where, axis, target, axis, 0, size))
        elif name:
            flow.pin_sizes(flow.element(name, axis), reason)


def _same_channels(flow: ChannelFlow, left: IntArray | None, right: IntArray | None) -> bool:
    if left is None or right is None:
        return left is right
    one, other = np.sort(flow.atoms.roots(left)), np.sort(flow.atoms.roots(right))
    return bool(np.array_equal(one, other))


def concat(flow: ChannelFlow, node: Node) -> None:
    """Join inputs along one axis; along the others they must agree."""
    target = node.outputs[0]
    rank = len(flow.shape(target))
    along = int(node.attrs.get("axis", 1)) % rank
    inputs = list(enumerate(node.inputs))
    for axis in range(rank):
        if axis != along:
            flow.put(target, axis, flow.merge(node, [(index, axis) for index, _ in inputs]))
    if all(flow.get(name, along) is None for name in node.inputs):
        return
    parts = []
    for index, name in inputs:
        ids = flow.get(name, along)
        if ids is None and flow.constants.origin(name) is not None:
            ids = flow.atoms.fresh(flow.shape(name)[along])
            flow.use(node, index, along, ids)
        elif ids is None:
            reason = f"Concat '{node.name}' takes it from untracked '{name}'"
            ids = flow.atoms.fresh(flow.shape(name)[along], reason)
        parts.append(ids)
    flow.put(target, along, np.concatenate(parts))


def split(flow: ChannelFlow, node: Node) -> None:
    """Cut one axis into pieces; equal pieces get written out as sizes."""
    source = node.input(0)
    rank = len(flow.shape(source))
    along = int(node.attrs.get("axis", 0)) % rank
    ids = flow.get(source, along)
    sizes = [flow.shape(name)[along] for name in node.outputs]
    ends = np.cumsum(sizes).tolist()
    for axis, kept in flow.carried(source).items():
        for name, size, end in zip(node.outputs, sizes, ends, strict=True):
            flow.put(name, axis, kept[end - size : end] if axis == along else kept)
    where: int | str = "split" if flow.model.opset < 13 else 1
    if ids is not None:
        for element, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            count = Count(node.id, where, element, source, along, end - size, end)
            flow.number(node, where, element, count)


def cut(flow: ChannelFlow, node: Node) -> None:
    """Slice: any steps along other axes, step 1 along channels."""
    source = node.input(0)
    shape = flow.shape(source)
    ranges = slice_ranges(node, flow.shapes.value, shape)
    axes_fixed = not node.input(3) or flow.shapes.fixed(node.input(3)) is not None
    if ranges is None or not axes_fixed:
        return unknown(flow, node)
    reason = f"Slice '{node.name}' takes every n-th channel"
    carried = flow.carried(source)
    wheres: tuple[int | str, int | str] = (
        ("starts", "ends") if "starts" in node.attrs else (1, 2)
    )
    for element, (axis, start, end, step) in enumerate(ranges):
        ids = carried.get(axis)
        if ids is None:
            for where in wheres:
                _free(flow, node, where, element)
            continue
        if step != 1:
            flow.atoms.pin(ids, reason)
            del carried[axis]
            continue
        low, high, _ = slice(start, end).indices(shape[axis])
        high = max(low, high)
        carried[axis] = ids[low:high]
        if start != 0 or not _fixed(flow, node, wheres[0], element):
            count = Count(node.id, wheres[0], element, source, axis, 0, low)
            flow.number(node, wheres[0], element, count)
        if end < shape[axis] or not _fixed(flow, node, wheres[1], element):
            count = Count(node.id, wheres[1], element, source, axis, 0, high)
            flow.number(node, wheres[1], element, count)
    for axis, kept in carried.items():
        flow.put(node.outputs[0], axis, kept)
    return None


def _fixed(flow: ChannelFlow, node: Node, where: int | str, element: int) -> bool:
    return isinstance(where, str) or flow.element(node.input(where), element).constant


def _free(flow: ChannelFlow, node: Node, where: int | str, element: int) -> None:
    """Pin the channels on which a number depends that does not count them."""
    if not isinstance(where, str) and node.input(where):
        reason = f"{node.op} '{node.name}' depends on their number"
        flow.pin_sizes(flow.element(node.input(where), element), reason)


def gather(flow: ChannelFlow, node: Node) -> None:
    """Select along one axis; along channels with a constant vector of indices only."""
    source = node.input(0)
    rank = len(flow.shape(source))
    along = int(node.attrs.get("axis", 0)) % rank
    width = len(flow.shape(node.input(1)))
    axes = {a: a if a < along else a + width - 1 for a in range(rank) if a != along}
    ids, index = flow.get(source, along), flow.shapes.fixed(node.input(1))
    flow.pin_tensor(node.input(1), f"Gather '{node.name}' uses it as indices")
    if ids is None or index is None or index.ndim != 1:
        return flow.carry(node, axes, "its channels are selected")
    for axis, kept in flow.carried(source).items():
        flow.put(node.outputs[0], axes.get(axis, along), ids[index] if axis == along else kept)
    return flow.fixes.append(Remap(node.id, 1, source, along))


def pad(flow: ChannelFlow, node: Node) -> None:
    """Pad; constant padding along channels makes new ones."""
    source, target = node.input(0), node.outputs[0]
    rank = len(flow.shape(source))
    where: int | str = "pads" if "pads" in node.attrs else 1
    pads = node.attrs["pads"] if where == "pads" else flow.shapes.value(node.input(1))
    axes = flow.shapes.fixed(node.input(3)) if node.input(3) else np.arange(rank)
    if pads is None or axes is None:
        return unknown(flow, node)
    constant = node.attrs.get("mode", "constant") == "constant"
    padded = {int(axis) % rank: position for position, axis in enumerate(axes.tolist())}
    for axis in range(rank):
        ids, position = flow.get(source, axis), padded.get(axis)
        if position is None:
            flow.put(target, axis, ids)
            continue
        elements = position, position + len(axes)
        if ids is None:
            for element in elements:
                _free(flow, node, where, element)
            continue
        begin, end = (int(pads[element]) for element in elements)
        if min(begin, end) < 0 or ((begin or end) and not constant):
            flow.atoms.pin(ids, f"Pad '{node.name}' cuts or mirrors channels")
            continue
        made = flow.atoms.fresh(begin + end)
        ids = np.concatenate([made[:begin], ids, made[begin:]])
        flow.put(target, axis, ids)
        for element, low, high in (
            (elements[0], 0, begin),
            (elements[1], len(ids) - end, len(ids)),
        ):
            if low < high or not _fixed(flow, node, where, element):
                count = Count(node.id, where, element, target, axis, low, high)
                flow.number(node, where, element, count)
    return None


def resize(flow: ChannelFlow, node: Node) -> None:
    """Resample axes; channels pass where their size stays."""
    source, target = node.input(0), node.outputs[0]
    shape, out = flow.shape(source), flow.shape(target)
    flow.carry(
        node, {a: a for a in range(len(shape)) if shape[a] == out[a]}, "it is resampled"
    )
    for index in (1, 2) if node.op == "Resize" else (1,):
        _leaks(flow, node, index)
    if not node.input(3):
        return
    axes = [int(a) % len(shape) for a in node.attrs.get("axes", range(len(shape)))]
    for element, axis in enumerate(axes):
        if flow.get(target, axis) is None:
            _free(flow, node, 3, element)
        else:
            count = Count(node.id, 3, element, target, axis, 0, out[axis])
            flow.number(node, 3, element, count)


def expand(flow: ChannelFlow, node: Node) -> None:
    """Broadcast to a shape; its numbers on channel axes stay in step."""
    source, target = node.input(0), node.outputs[0]
    shape, out = flow.shape(source), flow.shape(target)
    lead = len(out) - len(shape)
    axes = {a: a + lead for a in range(len(shape)) if shape[a] == out[a + lead]}
    flow.carry(node, axes, "it is repeated over all channels")
    value = flow.shapes.value(node.input(1))
    first = len(out) - flow.shape(node.input(1))[0]
    for axis in range(first, len(out)):
        element = axis - first
        fixed_one = (
            value is not None and value[element] == 1 and _fixed(flow, node, 1, element)
        )
        if flow.get(target, axis) is None:
            _free(flow, node, 1, element)
        elif not fixed_one:
            count = Count(node.id, 1, element, target, axis, 0, out[axis])
            flow.number(node, 1, element, count)


def tile(flow: ChannelFlow, node: Node) -> None:
    """Repeat along axes; repeated channels vanish together."""
    source, target = node.input(0), node.outputs[0]
    for axis, ids in flow.carried(source).items():
        flow.put(target, axis, np.tile(ids, flow.shape(target)[axis] // len(ids)))
    _leaks(flow, node, 1)


def _leaks(flow: ChannelFlow, node: Node, index: int) -> None:
    """Pin all channels on which the numbers of an input depend."""
    elements = flow.shapes.elements(node.input(index)) if node.input(index) else None
    for origin in [] if elements is None else elements.reshape(-1).tolist():
        flow.pin_sizes(origin, f"{node.op} '{node.name}' depends on their number")


def depth_to_space(flow: ChannelFlow, node: Node) -> None:
    """Spread blocks of channels over space; the channels of a block vanish together."""
    flow.carry(node, {0: 0, 1: 1}, "its positions move into channels")
    ids = flow.get(node.input(0), 1)
    if ids is None:
        return
    area = int(node.attrs["blocksize"]) ** 2
    rows = ids.reshape(area, -1).T
    if node.attrs.get("mode", "DCR") == "CRD":
        rows = ids.reshape(-1, area)
    flow.atoms.join(rows[:, :1], rows)
    flow.put(node.outputs[0], 1, np.ascontiguousarray(rows[:, 0]))


def space_to_depth(flow: ChannelFlow, node: Node) -> None:
    """Gather blocks of space into channels: each channel appears once per position."""
    flow.carry(node, {0: 0, 1: 1}, "its positions move into channels")
    ids = flow.get(node.input(0), 1)
    if ids is not None:
        flow.put(node.outputs[0], 1, np.tile(ids, int(node.attrs["blocksize"]) ** 2))


LAYOUT_RULES: dict[str, Rule] = {
    "Transpose": transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Concat": concat,
    "Split": split,
    "Slice": cut,
    "Gather": gather,
    "Pad": pad,
    **dict.fromkeys(("Resize", "Upsample"), resize),
    "Expand": expand,
    "Tile": tile,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}

# Inputs that hold shapes, which the rules above check number by number.
SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Split": (1,),
    "Pad": (1,),
    "Slice": (1, 2),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
}
