"""Shape arithmetic: where each number of a small shape tensor comes from.

Exported models compute targets of Reshape, Expand, Resize and Slice from the shapes of other
tensors.  For every number it is known whether it is constant, whether it is exactly the size
of one axis, and else on which axes it depends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.analysis.constants import Constants
from onnxcomp.model import Array, Node
from onnxcomp.runtime import TensorFact

Axis = tuple[str, int]
_MAX_ELEMENTS = 256


@dataclass(frozen=True)
class Element:
    """One number of a shape tensor.

    Attributes:
        constant: It does not depend on any graph input.
        dim: The (tensor, axis) whose size it is, or None.
        depends: All (tensor, axis) whose sizes it depends on.
    """

    constant: bool = False
    dim: Axis | None = None
    depends: frozenset[Axis] = frozenset()


Elements = NDArray[np.object_]
CONSTANT = Element(constant=True)
UNKNOWN = Element()


class ShapeValues:
    """The numbers of all small tensors that come from shapes and constants.

    Args:
        constants: The model's constants.
        tensors: Facts of one run.
    """

    def __init__(self, constants: Constants, tensors: Mapping[str, TensorFact]) -> None:
        self._constants = constants
        self._tensors = tensors
        self._found: dict[str, Elements] = {}

    def tracked(self, name: str) -> bool:
        """Tell whether a tensor is shape arithmetic on the shapes of activations."""
        return name in self._found

    def elements(self, name: str) -> Elements | None:
        """Return where the numbers of a tensor come from; None where nothing is known."""
        if name not in self._found and name in self._constants.names:
            fact = self._tensors.get(name)
            if fact is not None and math.prod(fact.shape) <= _MAX_ELEMENTS:
                return _filled(fact.shape, CONSTANT)
        return self._found.get(name)

    def value(self, name: str) -> Array | None:
        """Return the numbers themselves, as in the run; None where they are unknown."""
        origin = self._constants.origin(name)
        if origin is not None:
            return self._constants.array(origin)
        fact = self._tensors.get(name)
        return None if fact is None else fact.value

    def fixed(self, name: str) -> Array | None:
        """Return the value of a constant tensor; None where it varies or is unknown."""
        return self.value(name) if name in self._constants.names else None

    def follow(self, node: Node) -> bool:
        """Take a node in; False where it is no shape arithmetic."""
        names = [name for name in node.inputs if name]
        shapes = [self._tensors[n].shape for n in node.outputs if n in self._tensors]
        if not names or len(shapes) != len(node.outputs):
            return False
        if node.op in ("Shape", "Size"):
            self._found[node.id] = _sizes(node, names[0], self._tensors[names[0]].shape)
            return True
        rule = _FOLLOWED.get(node.op)
        parts = [self.elements(name) for name in names]
        known = [part for part in parts if part is not None]
        if (
            rule is None
            or not any(name in self._found for name in names)
            or len(known) < len(parts)
            or any(math.prod(shape) > _MAX_ELEMENTS for shape in shapes)
        ):
            return False
        for name, shape, part in zip(
            node.outputs, shapes, rule(self, node, known), strict=True
        ):
            whole = part.size == math.prod(shape)
            self._found[name] = part.reshape(shape) if whole else np.broadcast_to(part, shape)
        return True


def combine(elements: Iterable[Element]) -> Element:
    """Return the origin of a number that is computed from others."""
    found = list(elements)
    if all(element.constant for element in found):
        return CONSTANT
    return Element(depends=frozenset().union(*(element.depends for element in found)))


def slice_ranges(
    node: Node, value: Callable[[str], Array | None], shape: Sequence[int]
) -> list[tuple[int, int, int, int]] | None:
    """Return (axis, start, end, step) as written for every axis that a Slice cuts.

    Args:
        node: The Slice node; before opset 10 the ranges are attributes.
        value: Returns the value of an input.
        shape: Shape of the input that is cut.

    Returns:
        The ranges in the order of the node's vectors; None where they are unknown.
    """
    if "starts" in node.attrs:
        vectors = [node.attrs.get(key) for key in ("starts", "ends", "axes", "steps")]
    else:
        names = [node.input(index) for index in range(1, 5)]
        arrays = [value(name) if name else None for name in names]
        if any(name and a is None for name, a in zip(names, arrays, strict=True)):
            return None
        vectors = [None if array is None else array.tolist() for array in arrays]
    starts, ends, axes, steps = vectors
    if starts is None or ends is None:
        return None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return [
        (int(axis) % len(shape), int(start), int(end), int(step))
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    ]


def reduced_axes(
    node: Node, value: Callable[[str], Array | None], rank: int
) -> tuple[int, ...] | None:
    """Return the axes that a Reduce node reduces; None where they are unknown."""
    axes = node.attrs.get("axes")
    if axes is None and node.input(1):
        array = value(node.input(1))
        if array is None:
            return None
        axes = tuple(array.reshape(-1).tolist())
    if not axes:
        return () if node.attrs.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(int(axis) % rank for axis in axes)


def _filled(shape: tuple[int, ...], element: Element) -> Elements:
    found = np.empty(shape, dtype=object)
    found[...] = element
    return found


def _sizes(node: Node, name: str, shape: tuple[int, ...]) -> Elements:
    dims = [(name, axis) for axis in range(len(shape))]
    if node.op == "Size":
        return _filled((), Element(depends=frozenset(dims)))
    dims = dims[node.attrs.get("start", 0) : node.attrs.get("end", len(dims))]
    found = np.empty(len(dims), dtype=object)
    found[:] = [Element(dim=dim, depends=frozenset([dim])) for dim in dims]
    return found


_Rule = Callable[[ShapeValues, Node, list[Elements]], list[Elements]]


def _same(values: ShapeValues, node: Node, parts: list[Elements]) -> list[Elements]:
    return [parts[0]]


def _mixed(values: ShapeValues, node: Node, parts: list[Elements]) -> list[Elements]:
    """All numbers of the result may depend on all numbers of the inputs."""
    return [
        _filled((), combine(e for part in parts for e in part.reshape(-1).tolist()))
    ] * len(node.outputs)


def _elementwise(values: ShapeValues, node: Node, parts: list[Elements]) -> list[Elements]:
    arrays = np.broadcast_arrays(*parts)
    found = np.empty(arrays[0].shape, dtype=object)
    columns = zip(*(array.reshape(-1).tolist() for array in arrays), strict=True)
    found.reshape(-1)[:] = [combine(column) for column in columns]
    return [found]


def _concat(values: ShapeValues, node: Node, parts: list[Elements]) -> list[Elements]:
    return [np.concatenate(parts, axis=node.attrs["axis"])]


def _gather(values: ShapeValues, node: Node, parts: list[Elements]) -> list[Elements]:
    index = values.fixed(node.input(1))
    if index is None:
        return _mixed(values, node, parts)
    taken = np.take(parts[0], index, axis=node.attrs.get("axis", 0))
    return [taken if isinstance(taken, np.ndarray) else _filled((), taken)]


def _slice(values: ShapeValues, node: Node, parts: list[Elements]) -> list[Elements]:
    ranges = slice_ranges(node, values.fixed, parts[0].shape)
    if ranges is None or any(step < 0 for *_, step in ranges):
        return _mixed(values, node, parts)
    cut = [slice(None)] * parts[0].ndim
    for axis, start, end, step in ranges:
        cut[axis] = slice(start, end, step)
    return [parts[0][tuple(cut)]]


_SAME = "Identity Cast Squeeze Unsqueeze Reshape Flatten"
_ELEMENTWISE = """
    Add Sub Mul Div Mod Min Max Floor Ceil Round Neg Abs Sqrt Pow Reciprocal Where Equal
    Greater Less GreaterOrEqual LessOrEqual And Or Not Clip
"""
_MIXED = "Split ReduceProd ReduceSum ReduceMax ReduceMin ReduceMean"
_FOLLOWED: dict[str, _Rule] = {
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_MIXED.split(), _mixed),
}
