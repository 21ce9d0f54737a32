"""Light copies of images, where there are too few samples to fit second moments on.

Copies are shifted by up to 1/8 of their extent, mirrored where they have three channels, and
a little brighter or darker, within the values that the samples have.  What comes in at the
border is reflected: repeated edge pixels would be streaks without any variance across them,
which no real patch has, while mirrored content has the moments of the patches beside it.
Pictures of one channel, such as digits and spectrograms, are not mirrored: that would change
what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError
from onnxcomp.sample_rules import InputSpec, channel_axis, is_float, is_whole, show
from onnxcomp.samples import Samples

_SHIFT = 8  # the largest shift is the extent divided by this
_CONTRAST = 0.1  # largest change of the contrast, as a share
_BRIGHTNESS = 0.05  # largest change of the brightness, as a share of the range of values
_CHUNK = 2**22  # pixels of copies made at a time
_MIRRORED = 3  # channels of the images that may be mirrored
Array = NDArray[Any]
Index = NDArray[np.int64]


class Augmented(NamedTuple):
    """What `augmented` returns.

    Attributes:
        samples: The originals, then their copies; the samples given where none were made.
        note: What was made, or why nothing was; "" where there were samples enough.
    """

    samples: Samples
    note: str


def augmented(
    samples: Samples, inputs: Sequence[InputSpec], count: int, *, seed: int
) -> Augmented:
    """Fill samples up to `count` with light copies, where they are images.

    Images are samples of a single input of rank 4 with 1, 3 or 4 channels, first or last, and
    at least 16 pixels along both sides, of floats or bytes.  Each is copied equally often.

    Args:
        samples: The samples; they are unchanged and come first.
        inputs: The model's declared inputs.
        count: Samples wanted, >= 1.
        seed: Seed of all changes.

    Returns:
        The samples, without labels where copies were made, and a note.
    """
    if count < 1:
        raise ParameterError.of("augmented", "count", ">= 1", count)
    if samples.count >= count:
        return Augmented(samples, "")
    reason = _obstacle(samples, inputs)
    if reason:
        return Augmented(samples, f"no copies of the {samples.count} samples: {reason}")
    name = inputs[0].name
    found = {name: _filled(samples.arrays[name], count, np.random.default_rng(seed))}
    note = f"{samples.count} samples and {count - samples.count} light copies of them"
    return Augmented(Samples(found, origin=samples.origin), note)


def _obstacle(samples: Samples, inputs: Sequence[InputSpec]) -> str:
    """Return why samples cannot be copied with changes, or ""."""
    if len(inputs) != 1:
        return f"what {len(inputs)} inputs get belongs together"
    value = inputs[0]
    array = samples.arrays[value.name]
    if is_whole(value, array):
        return f"input '{value.name}' is fed as a whole"
    if channel_axis(array.shape[1:]) is None:
        return f"input '{value.name}' of shape {show(array.shape[1:])} is no image"
    if not (is_float(array.dtype) or array.dtype == np.uint8):
        return f"input '{value.name}' is {array.dtype}, not floats or bytes"
    return ""


def _filled(array: Array, count: int, rng: np.random.Generator) -> Array:
    """Return `count` images of which the first are those of `array`."""
    axis, known = channel_axis(array.shape[1:]), len(array)
    assert axis is not None
    filled = np.empty((count, *array.shape[1:]), array.dtype)
    filled[:known] = array
    images, copies = np.moveaxis(array, axis, -1), np.moveaxis(filled, axis, -1)
    span = images.min(axis=(0, 1, 2)), images.max(axis=(0, 1, 2))
    step = max(_CHUNK // math.prod(array.shape[1:]), 1)
    for start in range(known, count, step):
        picked = np.arange(start, min(start + step, count)) % known
        copies[start : start + step] = _toned(_moved(images, picked, rng), span, rng)
    return filled


def _moved(images: Array, picked: Index, rng: np.random.Generator) -> Array:
    """Return shifted and mirrored images, shape (len(picked), height, width, channels)."""
    _, height, width, channels = images.shape
    rows = _shifted(height, len(picked), rng)
    columns = _shifted(width, len(picked), rng)
    if channels == _MIRRORED:
        turned = rng.random((len(picked), 1)) < 0.5
        columns = np.where(turned, columns[:, ::-1], columns)
    found = images[picked[:, None, None], rows[:, :, None], columns[:, None, :]]
    return np.asarray(found)


def _shifted(extent: int, count: int, rng: np.random.Generator) -> Index:
    """Return positions along an axis after a shift, reflected at its ends."""
    reach = extent // _SHIFT
    index = np.arange(extent) + rng.integers(-reach, reach, (count, 1), endpoint=True)
    return np.asarray(extent - 1 - np.abs(extent - 1 - np.abs(index)))


def _toned(images: Array, span: tuple[Array, Array], rng: np.random.Generator) -> Array:
    """Change brightness and contrast within the span of each channel; the dtype stays."""
    dtype = images.dtype
    work: np.dtype[np.floating[Any]] = np.dtype("f8" if dtype == np.float64 else "f4")
    low, high = (bound.astype(work) for bound in span)
    contrast, brightness = rng.uniform(-1, 1, (2, len(images), 1, 1, 1)).astype(work)
    values = images.astype(work)
    centre = values.mean(axis=(1, 2), keepdims=True)
    values += _CONTRAST * contrast * (values - centre)
    values += _BRIGHTNESS * brightness * (high - low)
    if dtype == np.uint8:
        np.rint(values, out=values)
    return np.clip(values, low, high, out=values).astype(dtype)
