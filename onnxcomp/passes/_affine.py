"""Nodes that scale and shift each channel by constants, read as y = scale x + shift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.linear import kernel_of
from onnxcomp.model import Array, Node
from onnxcomp.passes._graph import GraphView

Vector = npt.NDArray[np.float64]


class NotAffineError(Exception):
    """A node does not scale and shift channels by constants; the message says why."""


@dataclass(frozen=True)
class Affine:
    """The map y = scale x + shift on the channels of a tensor, in float64.

    Attributes:
        scale: One factor per channel, shape (channels,).
        shift: One summand per channel, shape (channels,).
    """

    scale: Vector
    shift: Vector

    @classmethod
    def identity(cls, channels: int) -> Affine:
        """Return the map that changes nothing."""
        return cls(np.ones(channels), np.zeros(channels))

    def then(self, other: Affine) -> Affine:
        """Return this map followed by another one."""
        return Affine(other.scale * self.scale, other.scale * self.shift + other.shift)


def read_affine(
    view: GraphView, linear: Node, node: Node, tensor: str, *, forward: bool = False
) -> Affine:
    """Read a node beside a linear one as an affine map on their common channels.

    Args:
        view: The model.
        linear: Conv, ConvTranspose, Gemm or MatMul, whose weight tells the channels.
        node: BatchNormalization, or Add, Sub, Mul or Div with a constant.
        tensor: The input of `node` that is mapped.
        forward: The node lies before the linear one, not behind it.

    Raises:
        NotAffineError: It is none, or not on the channels.
    """
    if view.model.opset < 7:
        raise NotAffineError("operators before opset 7 broadcast in their own way")
    weight = view.constant(linear.input(1))
    if weight is None:
        raise NotAffineError(f"the weight of '{linear.id}' is computed")
    if linear.op == "MatMul" and weight.ndim != 2:
        raise NotAffineError(f"the weight of '{linear.id}' has {weight.ndim} axes, not 2")
    kernel = kernel_of(linear.op, linear.attrs, weight)
    channels = kernel.shape[1] * linear.attrs.get("group", 1) if forward else kernel.shape[0]
    shape = view.shape(tensor)
    rank = weight.ndim if linear.op != "MatMul" else None if shape is None else len(shape)
    if node.op == "BatchNormalization":
        if rank is None or (rank != 2 and linear.op == "MatMul"):
            raise NotAffineError(
                f"the channels of '{linear.id}' are not known to be on axis 1"
            )
        return _read_batchnorm(view, node, tensor, channels)
    place = node.inputs.index(tensor)
    constant = view.constant(node.input(1 - place))
    if constant is None:
        raise NotAffineError("it combines computed tensors")
    behind = weight.ndim - 2
    value = _per_channel(constant, channels, behind, 1 if rank is None else rank)
    return _read_arithmetic(node, place, value)


def _read_batchnorm(view: GraphView, node: Node, tensor: str, channels: int) -> Affine:
    if node.input(0) != tensor:
        raise NotAffineError(f"it reads '{tensor}' as a parameter")
    if node.attrs.get("training_mode", 0):
        raise NotAffineError("it is in training mode")
    extra = next((name for name in node.outputs[1:] if name), None)
    if extra is not None:
        raise NotAffineError(f"it has a second output, '{extra}', as in training")
    if not node.attrs.get("spatial", 1):
        raise NotAffineError("it normalises each position by itself (spatial=0)")
    found = [view.constant(name) for name in node.inputs[1:5]]
    arrays = [np.asarray(array, np.float64) for array in found if array is not None]
    if len(arrays) != 4:
        raise NotAffineError("its parameters are computed")
    if any(array.shape != (channels,) for array in arrays):
        raise NotAffineError(f"its parameters do not have {channels} elements")
    scale, bias, mean, var = arrays
    if np.any(var < 0):
        raise NotAffineError("its variance is negative")
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(var + node.attrs.get("epsilon", 1e-5))
        return _finite(Affine(factor, bias - factor * mean))


def _per_channel(constant: Array, channels: int, behind: int, rank: int) -> Vector:
    """Return the value per channel of a constant that varies only along the channel axis.

    Args:
        constant: The constant, broadcast against a tensor.
        channels: Channels of the tensor.
        behind: Axes of the tensor behind its channel axis.
        rank: Axes that the tensor has at least.
    """
    if constant.ndim > rank:
        raise NotAffineError(f"its constant has {constant.ndim} axes, which may add some")
    axis = constant.ndim - 1 - behind
    for place, extent in enumerate(constant.shape):
        if extent != 1 and (place != axis or extent != channels):
            raise NotAffineError(
                f"its constant of shape {list(constant.shape)} varies along more than the "
                f"{channels} channels"
            )
    flat = np.asarray(constant, np.float64).ravel()
    return np.broadcast_to(flat, (channels,)).copy()


def _read_arithmetic(node: Node, place: int, value: Vector) -> Affine:
    ones, zeros = np.ones_like(value), np.zeros_like(value)
    if node.op == "Add":
        return _finite(Affine(ones, value))
    if node.op == "Mul":
        return _finite(Affine(value, zeros))
    if node.op == "Sub":
        return _finite(Affine(ones, -value) if place == 0 else Affine(-ones, value))
    if place == 1:
        raise NotAffineError("it divides by its input")
    with np.errstate(all="ignore"):
        return _finite(Affine(1.0 / value, zeros))


def _finite(affine: Affine) -> Affine:
    if not (np.all(np.isfinite(affine.scale)) and np.all(np.isfinite(affine.shift))):
        raise NotAffineError("its scale or shift is not finite")
    return affine
