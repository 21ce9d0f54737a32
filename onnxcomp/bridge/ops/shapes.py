"""Shapes and layout: what moves values without changing them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import (
    Handler,
    Kernel,
    UnsupportedNodeError,
    axes_kernel,
    axis_of,
    dtype_of,
    handler,
    integers,
    number,
    plain,
)
from onnxcomp.model import Node

_PAD_MODES = ("constant", "edge", "reflect", "wrap")


def _shape(node: Node, opset: int) -> Kernel:
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _reshape(node: Node, opset: int) -> Kernel:
    keeps_zero = bool(node.attrs.get("allowzero", 0))

    def reshape(x: Tensor, shape: Tensor, *, batch: int | None) -> Tensor:
        target = integers(shape)
        if not keeps_zero:
            target = [x.shape[i] if size == 0 else size for i, size in enumerate(target)]
        return x.reshape(_for_batch(x, target, batch))

    return reshape


def _for_batch(x: Tensor, target: list[int], batch: int | None) -> list[int]:
    """Put the number of samples where the graph's batch of one was written into a shape."""
    if batch is None or target[:1] != [1]:
        return target
    known = math.prod(size for size in target if size > 0)
    fits = x.numel() % (batch * known) == 0 if -1 in target else x.numel() == batch * known
    return [batch, *target[1:]] if fits else target


def _flatten(node: Node, opset: int) -> Kernel:
    axis = node.attrs.get("axis", 1)

    def flatten(x: Tensor) -> Tensor:
        rows = math.prod(x.shape[: axis_of(axis, x.dim())])
        return x.reshape(rows, x.numel() // rows if rows else -1)

    return flatten


def _transpose(node: Node, opset: int) -> Kernel:
    perm = node.attrs.get("perm")
    return lambda x: x.permute(perm or tuple(reversed(range(x.dim()))))


def _squeeze(node: Node, opset: int) -> Kernel:
    def squeeze(x: Tensor, axes: Sequence[int] | None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(axes))

    return axes_kernel(node, 1, squeeze)


def _unsqueeze(node: Node, opset: int) -> Kernel:
    def unsqueeze(x: Tensor, axes: Sequence[int] | None) -> Tensor:
        rank = x.dim() + len(axes or ())
        for axis in sorted(axis_of(axis, rank) for axis in axes or ()):
            x = x.unsqueeze(axis)
        return x

    return axes_kernel(node, 1, unsqueeze)


def _concat(node: Node, opset: int) -> Kernel:
    axis = node.attrs["axis"]

    def concat(*inputs: Tensor, batch: int | None) -> Tensor:
        if batch is not None and axis_of(axis, inputs[0].dim()):
            rows = max(len(x) for x in inputs)
            inputs = tuple(x.expand(rows, *x.shape[1:]) if len(x) == 1 else x for x in inputs)
        return torch.cat(inputs, axis)

    return concat


def _split(node: Node, opset: int) -> Kernel:
    axis, sizes = node.attrs.get("axis", 0), node.attrs.get("split")
    parts = node.attrs.get("num_outputs", len(node.outputs))

    def split(x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
        if given is not None:
            return torch.split(x, integers(given), axis)
        return torch.split(x, list(sizes) if sizes else -(-x.shape[axis] // parts), axis)

    return split


def _slice(node: Node, opset: int) -> Kernel:
    if opset < 10:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes = node.attrs.get("axes", range(len(starts)))
        return lambda x: _sliced(x, starts, ends, axes, [1] * len(starts))

    def slice_(
        x: Tensor,
        starts: Tensor,
        ends: Tensor,
        axes: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        first = integers(starts)
        along = range(len(first)) if axes is None else integers(axes)
        stride = [1] * len(first) if steps is None else integers(steps)
        return _sliced(x, first, integers(ends), along, stride)

    return slice_


def _sliced(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int],
    steps: Sequence[int],
) -> Tensor:
    index = [slice(None)] * x.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        taken = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            index[axis] = slice(taken.start, taken.stop, step)
        else:
            places = torch.tensor(taken, dtype=torch.int64, device=x.device)
            x = x.index_select(axis, places)
    return x[tuple(index)]


def _gather(node: Node, opset: int) -> Kernel:
    axis = node.attrs.get("axis", 0)

    def gather(x: Tensor, index: Tensor) -> Tensor:
        if index.device.type == "cpu" and index.dim() == 0:
            return x.select(axis, int(index))
        index = _counted(index.to(x.device), x.shape[axis])
        dim = axis_of(axis, x.dim())
        found = x.index_select(dim, index.reshape(-1))
        return found.reshape(*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])

    return gather


def _counted(index: Tensor, size: int) -> Tensor:
    """Return indices counted from the front, as int64."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


def _gather_elements(node: Node, opset: int) -> Kernel:
    axis = node.attrs.get("axis", 0)
    return lambda x, index: x.gather(axis, _counted(index, x.shape[axis]))


def _gather_nd(node: Node, opset: int) -> Kernel:
    shared = node.attrs.get("batch_dims", 0)

    def gather_nd(x: Tensor, index: Tensor) -> Tensor:
        inner = index.dim() - 1 - shared
        rows = [
            torch.arange(x.shape[axis], device=x.device).reshape(
                *[-1 if a == axis else 1 for a in range(shared)], *[1] * inner
            )
            for axis in range(shared)
        ]
        return x[(*rows, *index.long().unbind(-1))]

    return gather_nd


def _scatter_nd(node: Node, opset: int) -> Kernel:
    adds = _adds(node)

    def scatter_nd(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        return x.index_put(index.long().unbind(-1), updates, accumulate=adds)

    return scatter_nd


def _scatter_elements(node: Node, opset: int) -> Kernel:
    axis, adds = node.attrs.get("axis", 0), _adds(node)

    def scatter_elements(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        index = _counted(index, x.shape[axis])
        function = x.scatter_add if adds else x.scatter
        return function(axis, index, updates)

    return scatter_elements


def _adds(node: Node) -> bool:
    reduction = node.attrs.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise UnsupportedNodeError(f"reduction '{reduction}' is not made")
    return bool(reduction == "add")


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    target = integers(shape)
    front = [1] * (len(target) - x.dim())
    back = [1] * (x.dim() - len(target))
    pairs = zip([*front, *x.shape], [*back, *target], strict=True)
    return x.expand([own if wanted == 1 else wanted for own, wanted in pairs])


def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(integers(repeats))


def _constant_of_shape(node: Node, opset: int) -> Kernel:
    value = node.attrs.get("value")
    filling = 0.0 if value is None else value.reshape(-1)[0].item()
    kind = 1 if value is None else node.proto.attribute[0].t.data_type
    dtype = dtype_of(kind)
    return lambda shape: torch.full(integers(shape), filling, dtype=dtype)


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    values = (number(v) for v in (start, limit, delta))
    return torch.arange(*values, dtype=start.dtype)


def _pad(node: Node, opset: int) -> Kernel:
    mode = node.attrs.get("mode", "constant")
    if mode not in _PAD_MODES:
        raise UnsupportedNodeError(f"mode '{mode}' is unknown")
    fixed, value = node.attrs.get("pads", ()), node.attrs.get("value", 0.0)
    if opset < 11:
        return lambda x: _padded(x, fixed, range(x.dim()), mode, value)

    def pad(
        x: Tensor, pads: Tensor, filling: Tensor | None = None, axes: Tensor | None = None
    ) -> Tensor:
        along = range(x.dim()) if axes is None else integers(axes)
        content = 0 if filling is None else number(filling)
        return _padded(x, integers(pads), along, mode, content)

    return pad


def _padded(
    x: Tensor, pads: Sequence[int], axes: Sequence[int], mode: str, value: float
) -> Tensor:
    half = len(pads) // 2
    pairs = {
        axis_of(axis, x.dim()): (before, after)
        for axis, before, after in zip(axes, pads[:half], pads[half:], strict=True)
        if before or after
    }
    if mode == "constant":
        flat = [n for axis in reversed(range(x.dim())) for n in pairs.get(axis, (0, 0))]
        return functional.pad(x, flat, value=value) if pairs else x
    for axis, (before, after) in pairs.items():
        size = x.shape[axis]
        index = torch.arange(-before, size + after, device=x.device)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:
            period = max(2 * (size - 1), 1)
            index = index % period
            index = torch.where(index < size, index, period - index)
        x = x.index_select(axis, index)
    return x


def _depth_to_space(node: Node, opset: int) -> Kernel:
    block, mode = node.attrs["blocksize"], node.attrs.get("mode", "DCR")

    def depth_to_space(x: Tensor) -> Tensor:
        if mode == "CRD":
            return functional.pixel_shuffle(x, block)
        count, channels, height, width = x.shape
        y = x.reshape(count, block, block, channels // block**2, height, width)
        y = y.permute(0, 3, 4, 1, 5, 2)
        return y.reshape(count, channels // block**2, height * block, width * block)

    return depth_to_space


def _space_to_depth(node: Node, opset: int) -> Kernel:
    block = node.attrs["blocksize"]

    def space_to_depth(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        y = x.reshape(count, channels, height // block, block, width // block, block)
        y = y.permute(0, 3, 5, 1, 2, 4)
        return y.reshape(count, channels * block**2, height // block, width // block)

    return space_to_depth


def _one_hot(node: Node, opset: int) -> Kernel:
    axis = node.attrs.get("axis", -1)

    def one_hot(index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        size = int(number(depth))
        places = torch.arange(size, device=index.device)
        hot = (_counted(index, size).unsqueeze(-1) == places).movedim(-1, axis)
        return torch.where(hot, values[1], values[0])

    return one_hot


def _trilu(node: Node, opset: int) -> Kernel:
    function = torch.triu if node.attrs.get("upper", 1) else torch.tril

    def trilu(x: Tensor, diagonal: Tensor | None = None) -> Tensor:
        return function(x, 0 if diagonal is None else int(number(diagonal)))

    return trilu


def _sequence_at(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    return parts[int(number(index))]


def _split_to_sequence(node: Node, opset: int) -> Kernel:
    axis, keep = node.attrs.get("axis", 0), bool(node.attrs.get("keepdims", 1))

    def split_to_sequence(x: Tensor, sizes: Tensor | None = None) -> tuple[Sequence[Tensor]]:
        if sizes is None:
            parts = torch.split(x, 1, axis)
            return (parts if keep else [part.squeeze(axis) for part in parts],)
        wanted = integers(sizes)
        return (torch.split(x, wanted if sizes.dim() else wanted[0], axis),)

    return split_to_sequence


HANDLERS: Mapping[str, Handler] = {
    "Concat": handler(_concat, wants="batch"),
    "ConstantOfShape": handler(_constant_of_shape, 0),
    "DepthToSpace": handler(_depth_to_space),
    "Expand": plain(_expand, 1),
    "Flatten": handler(_flatten),
    "Gather": handler(_gather, 1),
    "GatherElements": handler(_gather_elements),
    "GatherND": handler(_gather_nd),
    "NonZero": plain(lambda x: x.nonzero().t()),
    "OneHot": handler(_one_hot, 1),
    "Pad": handler(_pad, 1, 2, 3),
    "Range": plain(_range, 0, 1, 2),
    "Reshape": handler(_reshape, 1, wants="batch"),
    "Scatter": handler(_scatter_elements),
    "ScatterElements": handler(_scatter_elements),
    "ScatterND": handler(_scatter_nd),
    "SequenceAt": plain(_sequence_at, 1),
    "Shape": handler(_shape),
    "Size": plain(_size),
    "Slice": handler(_slice, 1, 2, 3, 4),
    "SpaceToDepth": handler(_space_to_depth),
    "Split": handler(_split, 1),
    "SplitToSequence": handler(_split_to_sequence, 1),
    "Squeeze": handler(_squeeze, 1),
    "Tile": plain(_tile, 1),
    "Transpose": handler(_transpose),
    "Trilu": handler(_trilu, 1),
    "Unsqueeze": handler(_unsqueeze, 1),
}
