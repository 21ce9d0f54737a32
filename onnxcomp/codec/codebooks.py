"""Codebooks on disk: a uniform grid where that is exact, else the values.

A grid is a scale and integer levels: value = float32(scale * level), the product in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.codec.fields import FieldReader, FieldWriter
from onnxcomp.codec.symbols import MAX_VALUES
from onnxcomp.codec.transforms import from_planes, to_planes
from onnxcomp.errors import InvalidModelError

Array = npt.NDArray[Any]

_LIST, _GRID = 0, 1
_MAX_LEVEL = 2**15
_TRIED_STEPS = 64  # that the least gap may have


def write_codebook(codebook: Array, fields: FieldWriter) -> None:
    """Write a codebook of distinct bit patterns, ascending."""
    with np.errstate(all="ignore"):  # what overflows is no grid
        grid = _grid_of(codebook)
    fields.number(codebook.size)
    fields.number(_LIST if grid is None else _GRID)
    if grid is None:
        for plane in to_planes(codebook):
            fields.raw(plane.tobytes())
        return
    scale, levels = grid
    fields.raw(np.array(scale, "<f8").tobytes())
    fields.signed(int(levels[0]))
    for step in np.diff(levels):
        fields.number(int(step))


def read_codebook(fields: FieldReader, dtype: np.dtype[Any], most: int) -> Array:
    """Read a codebook of a dtype.

    Args:
        fields: The head.
        dtype: Of the values.
        most: Bytes that they may take.

    Raises:
        InvalidModelError: It is damaged or too large.
    """
    size = fields.number(min(MAX_VALUES, most // dtype.itemsize))
    if size == 0:
        raise InvalidModelError("a codebook is empty")
    if fields.number(_GRID) == _LIST:
        planes = [np.frombuffer(fields.raw(size), np.uint8) for _ in range(dtype.itemsize)]
        return from_planes(planes, dtype)
    scale = float(np.frombuffer(fields.raw(8), "<f8")[0])
    steps = [fields.signed(_MAX_LEVEL)]
    steps += [fields.number(_MAX_LEVEL) for _ in range(size - 1)]
    levels = np.cumsum(np.array(steps, np.int64))
    if dtype.kind not in "iuf" or not np.isfinite(scale) or abs(levels).max() > _MAX_LEVEL:
        raise InvalidModelError("a codebook is damaged")
    return _values(scale, levels, dtype)


def _values(scale: float, levels: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):
        return (scale * levels).astype(dtype)


def _grid_of(codebook: Array) -> tuple[float, Array] | None:
    """Return scale and levels that give a codebook bit for bit, if there are some.

    The scale is the middle of the interval in which every product rounds to its value.
    """
    if codebook.dtype.kind not in "iuf":
        return None
    values = codebook.astype(np.float64)
    if not np.isfinite(values).all() or values.size < 3:
        return None
    closest = float(np.diff(values).min())
    for divisor in range(1, _TRIED_STEPS + 1):
        scale = closest / divisor
        if not scale > 0 or abs(values).max() / scale > _MAX_LEVEL:
            return None
        scale = _refined(values, scale)
        levels = np.rint(values / scale).astype(np.int64)
        if not abs(levels).max() <= _MAX_LEVEL // 2:
            return None
        used = levels != 0
        half = np.abs(np.spacing(codebook)) / 2 if codebook.dtype.kind == "f" else 0.0
        bounds = np.stack([values - half, values + half])[:, used] / levels[used]
        low, high = bounds.min(0).max(), bounds.max(0).min()
        middle = float(np.float32((low + high) / 2))
        for candidate in (middle, float((low + high) / 2)):
            found = _values(candidate, levels, codebook.dtype)
            if found.tobytes() == codebook.tobytes():
                return candidate, levels
    return None


def _refined(values: Array, scale: float) -> float:
    """Return the scale that fits the largest values, found from the small ones on."""
    for value in np.sort(np.abs(values[values != 0])):
        scale = float(value) / max(1.0, float(np.rint(value / scale)))
    return scale
