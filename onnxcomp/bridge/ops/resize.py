"""Resize, Upsample and GridSample.

Resizing goes axis by axis: along each, every output is a weighted sum of inputs.  The weights
follow the formulas of the ONNX operator; where torch has the same filter, torch's is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import (
    Handler,
    Kernel,
    UnsupportedNodeError,
    axis_of,
    handler,
    integers,
)
from onnxcomp.model import Node

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

_TORCH_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
_COORDINATES = (
    "align_corners",
    "asymmetric",
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "tf_crop_and_resize",
    "tf_half_pixel_for_nn",
)


@dataclass(frozen=True)
class _Filter:
    """What the attributes of a Resize node say of every axis."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False
    outside: float = 0.0  # value of what lies outside the crop of tf_crop_and_resize


@dataclass(frozen=True)
class _Axis:
    """Sizes of one axis before and after, its scale, and the crop's begin and end."""

    size: int
    out: int
    scale: float
    crop: tuple[float, float] = (0.0, 1.0)


def _filter_of(node: Node, opset: int) -> _Filter:
    attrs = node.attrs
    mode = attrs.get("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise UnsupportedNodeError(f"mode '{mode}' is unknown")
    if opset < 11:
        return _Filter(mode, "asymmetric", "simple")
    coordinates = attrs.get("coordinate_transformation_mode", "half_pixel")
    if coordinates not in _COORDINATES:
        raise UnsupportedNodeError(f"coordinates '{coordinates}' are unknown")
    return _Filter(
        mode,
        coordinates,
        attrs.get("nearest_mode", "round_prefer_floor"),
        attrs.get("cubic_coeff_a", -0.75),
        bool(attrs.get("antialias", 0)),
        bool(attrs.get("exclude_outside", 0)),
        attrs.get("extrapolation_value", 0.0),
    )


def _upsample(node: Node, opset: int) -> Kernel:
    how, fixed = _filter_of(node, opset), node.attrs.get("scales", ())

    def upsample(x: Tensor, scales: Tensor | None = None) -> Tensor:
        factors = fixed if scales is None else scales.tolist()
        axes = [_scaled(x, axis, scale) for axis, scale in enumerate(factors)]
        return _resized(x, dict(enumerate(axes)), how)

    return upsample


def _resize(node: Node, opset: int) -> Kernel:
    if opset < 11:
        upsample = _upsample(node, opset)
        return lambda *inputs, batch: upsample(*inputs)
    how = _filter_of(node, opset)
    chosen = node.attrs.get("axes")
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")

    def resize(
        x: Tensor,
        roi: Tensor | None = None,
        scales: Tensor | None = None,
        sizes: Tensor | None = None,
        *,
        batch: int | None,
    ) -> Tensor:
        axes = [axis_of(a, x.dim()) for a in chosen or range(x.dim())]
        if sizes is not None and sizes.numel():
            wanted = integers(sizes)
            if batch is not None and axes[0] == 0 and wanted[0] == 1:
                wanted[0] = x.shape[0]
            found = _sized(x, axes, wanted, policy)
        else:
            factors = [] if scales is None else scales.tolist()
            found = {a: _scaled(x, a, s) for a, s in zip(axes, factors, strict=True)}
        if how.coordinates == "tf_crop_and_resize" and roi is not None:
            found = _cropped(found, roi.tolist(), how)
        return _resized(x, found, how)

    return resize


def _scaled(x: Tensor, axis: int, scale: float) -> _Axis:
    size = x.shape[axis]
    return _Axis(size, math.floor(_product(size, scale)), scale)


def _product(size: int, scale: float) -> float:
    """Return a scaled size in single precision, as onnxruntime does.

    3 * float32(5 / 3) is 5 there, and below 5 in double precision.
    """
    return float(np.float32(size) * np.float32(scale))


def _sized(
    x: Tensor, axes: Sequence[int], sizes: Sequence[int], policy: str
) -> dict[int, _Axis]:
    """Return axes of given sizes; a policy other than "stretch" takes one scale for all."""
    wanted = dict(zip(axes, sizes, strict=True))
    scales = {axis: size / x.shape[axis] for axis, size in wanted.items()}
    if policy == "stretch":
        return {a: _Axis(x.shape[a], size, scales[a]) for a, size in wanted.items()}
    pick = min if policy == "not_larger" else max
    scale = pick(scales.values())
    rounded = {a: math.floor(_product(x.shape[a], scale) + 0.5) for a in wanted}
    return {a: _Axis(x.shape[a], out, scale) for a, out in rounded.items()}


def _cropped(
    axes: Mapping[int, _Axis], roi: Sequence[float], how: _Filter
) -> dict[int, _Axis]:
    half = len(axes)
    return {
        axis: _Axis(a.size, a.out, a.scale, (roi[i], roi[i + half]))
        for i, (axis, a) in enumerate(axes.items())
    }


def _resized(x: Tensor, axes: Mapping[int, _Axis], how: _Filter) -> Tensor:
    """Resize along all axes that change."""
    crops = how.coordinates == "tf_crop_and_resize"
    changed = {a: s for a, s in axes.items() if s.scale != 1 or s.size != s.out or crops}
    if not changed:
        return x
    spatial = min(changed) > 1 and x.dim() in _TORCH_LINEAR
    if spatial and (found := _torch_filter(x, changed, how)) is not None:
        return found
    outside: Tensor | None = None
    for axis, a in changed.items():
        if how.mode == "nearest":
            x = x.index_select(axis, torch.from_numpy(_nearest(a, how)).to(x.device))
        else:
            weights = torch.from_numpy(_weights(a, how)).to(x)
            x = torch.movedim(torch.movedim(x, axis, -1) @ weights.t(), -1, axis)
        if crops:
            beyond = torch.from_numpy(_beyond(a, how)).to(x.device)
            beyond = beyond.reshape(-1, *[1] * (x.dim() - 1 - axis))
            outside = beyond if outside is None else outside | beyond
    return x if outside is None else torch.where(outside, how.outside, x)


def _torch_filter(x: Tensor, axes: Mapping[int, _Axis], how: _Filter) -> Tensor | None:
    """Resize spatial axes by torch's own filter, where it is the same."""
    size = [axes[a].out if a in axes else x.shape[a] for a in range(2, x.dim())]
    if how.mode == "nearest":
        if all(_repeats(a, how) for a in axes.values()):
            return functional.interpolate(x, size, mode="nearest")
        return None
    exact = all(a.scale == a.out / a.size for a in axes.values())
    aligned = how.coordinates == "align_corners"
    centred = how.coordinates == "half_pixel" or (
        how.coordinates == "pytorch_half_pixel" and all(a.out > 1 for a in axes.values())
    )
    if not exact or not (aligned or centred) or how.antialias or how.exclude_outside:
        return None
    if how.mode == "linear":
        mode = _TORCH_LINEAR[x.dim()]
    elif x.dim() == 4 and how.cubic == -0.75:
        mode = "bicubic"
    else:
        return None
    return functional.interpolate(x, size, mode=mode, align_corners=aligned)


@lru_cache(maxsize=256)
def _repeats(axis: _Axis, how: _Filter) -> bool:
    """Whether every input is repeated equally often, as by torch's nearest filter."""
    times, rest = divmod(axis.out, axis.size)
    return not rest and bool(np.all(_nearest(axis, how) == np.arange(axis.out) // times))


def _positions(axis: _Axis, how: _Filter) -> Singles:
    """Return where every output lies in the input, by `coordinate_transformation_mode`.

    In single precision, as in onnxruntime: it decides where ties fall.
    """
    i = np.arange(axis.out, dtype=np.float32)
    half, scale = np.float32(0.5), np.float32(axis.scale)
    size, out, mode = axis.size, axis.out, how.coordinates
    if mode == "align_corners":
        return i * np.float32((size - 1) / (out - 1) if out > 1 else 0)
    if mode == "asymmetric":
        return i / scale
    if mode == "tf_half_pixel_for_nn":
        return (i + half) / scale
    if mode == "tf_crop_and_resize":
        first, last = (np.float32(edge) * (size - 1) for edge in axis.crop)
        if out > 1:
            return first + i * ((last - first) / (out - 1))
        return np.array([half * (first + last)], np.float32)
    if mode == "pytorch_half_pixel" and out == 1:
        return i * 0
    positions: Singles = (i + half) / scale - half
    if mode == "half_pixel_symmetric":
        positions += np.float32(size / 2 * (1 - out / (axis.scale * size)))
    return positions


def _beyond(axis: _Axis, how: _Filter) -> npt.NDArray[np.bool_]:
    positions = _positions(axis, how)
    return (positions < 0) | (positions > axis.size - 1)


def _nearest(axis: _Axis, how: _Filter) -> npt.NDArray[np.int64]:
    at = _positions(axis, how)
    if how.nearest == "round_prefer_floor":
        at = np.ceil(at - np.float32(0.5))
    elif how.nearest == "round_prefer_ceil":
        at = np.floor(at + np.float32(0.5))
    elif how.nearest == "ceil" or (how.nearest == "simple" and axis.scale < 1):
        at = np.ceil(at)
    else:
        at = np.floor(at)
    return np.clip(at.astype(np.int64), 0, axis.size - 1)


@lru_cache(maxsize=256)
def _weights(axis: _Axis, how: _Filter) -> Doubles:
    """Return the weight of every input in every output, (out, in)."""
    at = _positions(axis, how).astype(np.float64)
    reach = 2 if how.mode == "cubic" else 1
    stretch = max(1.0, 1 / axis.scale) if how.antialias else 1.0
    count = math.ceil(reach * stretch)
    taps = np.floor(at)[:, None] + np.arange(1 - count, count + 1)
    distance = (taps - at[:, None]) / stretch
    values = _cubic(distance, how.cubic) if how.mode == "cubic" else _triangle(distance)
    if how.exclude_outside:
        values = np.where((taps < 0) | (taps > axis.size - 1), 0.0, values)
    values /= values.sum(axis=1, keepdims=True)
    weights = np.zeros((axis.out, axis.size))
    places = np.clip(taps, 0, axis.size - 1).astype(np.int64)
    np.add.at(weights, (np.arange(axis.out)[:, None], places), values)
    return weights


def _triangle(distance: Doubles) -> Doubles:
    values: Doubles = np.maximum(0.0, 1 - np.abs(distance))
    return values


def _cubic(distance: Doubles, a: float) -> Doubles:
    """Keys' cubic convolution kernel."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    values: Doubles = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return values


def _grid_sample(node: Node, opset: int) -> Kernel:
    mode = node.attrs.get("mode", "bilinear" if opset < 20 else "linear")
    names = {"linear": "bilinear", "cubic": "bicubic"}
    mode = names.get(mode, mode)
    padding = node.attrs.get("padding_mode", "zeros")
    aligned = bool(node.attrs.get("align_corners", 0))
    return lambda x, grid: functional.grid_sample(x, grid, mode, padding, aligned)


HANDLERS: Mapping[str, Handler] = {
    "GridSample": handler(_grid_sample),
    "Resize": handler(_resize, 1, 2, 3, wants="batch"),
    "Upsample": handler(_upsample, 1),
}
