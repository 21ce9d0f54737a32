"""Inputs on which a model can be run: the user's first sample, or random ones that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeGuard

import numpy as np

from onnxcomp.analysis.constants import Constants
from onnxcomp.errors import ExecutionError, UnsupportedModelError
from onnxcomp.model import Array, Model, Value
from onnxcomp.runtime import capture_tensors
from onnxcomp.samples import Samples, random_samples

# Sizes tried for symbolic axes behind the batch, most usual first.
_SIZES = (224, 320, 64, 256, 128, 32, 640, 512, 96, 16, 1, 576)
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_LAYOUT = ("Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze")


def probe_feeds(
    model: Model, samples: Samples | None = None, *, seed: int = 0
) -> Mapping[str, Array]:
    """Return one feed on which the model runs.

    Args:
        model: The model.
        samples: The user's samples; random ones are tried where it is None.
        seed: Seed of the random values.

    Raises:
        UnsupportedModelError: No random input of a usual size runs; give samples.
    """
    found = samples or random_inputs(model, 1, seed=seed)
    return next(iter(found.batches(model.signature.inputs, 1))).feed


def random_inputs(model: Model, count: int, *, seed: int = 0) -> Samples:
    """Return random samples on which the model runs, with its symbolic axes filled in.

    Pictures lie in the range that a normalisation at the model's beginning tells.

    Raises:
        UnsupportedModelError: No random input of a usual size runs; give samples.
    """
    inputs = model.signature.inputs
    reason = "its inputs have unknown rank"
    for shapes in usual_shapes(inputs):
        samples = random_samples(inputs, 1, seed, shapes)
        try:
            capture_tensors(model, next(iter(samples.batches(inputs, 1))).feed)
        except ExecutionError as error:
            reason = str(error)
            continue
        return random_samples(inputs, count, seed, shapes, pixel_ranges(model))
    raise UnsupportedModelError(
        f"the model does not run on random inputs ({reason}); give samples with --data"
    )


def usual_shapes(inputs: tuple[Value, ...]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield full input shapes, by name, in which open axes have usual sizes."""
    if any(value.shape is None for value in inputs):
        return
    declared = {value.name: value.shape or () for value in inputs}
    # A name that recurs within one input, such as "?", names nothing.
    batch = {dims[0] for dims in declared.values() if dims and dims.count(dims[0]) == 1}
    open_dims = {dim for dims in declared.values() for dim in dims if not _known(dim)}
    for size in _SIZES if open_dims - batch else _SIZES[:1]:
        yield {
            name: tuple(
                dim if _known(dim) else (1 if axis == 0 or (dim and dim in batch) else size)
                for axis, dim in enumerate(dims)
            )
            for name, dims in declared.items()
        }


def pixel_ranges(model: Model) -> dict[str, tuple[float, float]]:
    """Return the range of pixel values, by input, that the first nodes of a model expect.

    They tell it where they normalise by constants, as (x - centre) / unit: pixels of 0 to 255
    become small by a unit such as 255, or lose a centre such as 104 to 128; pixels of 0 to 1
    lose one such as 0.45 or 0.5.  Constants per channel count with their mean.
    """
    constants = Constants(model)
    found = {}
    for value in model.signature.inputs:
        centre, unit = _normalisation(model, constants, value.name)
        if 90 <= centre <= 140 or (unit >= 30 and 0 <= centre < 90):
            found[value.name] = (0.0, 255.0)
        elif 0.1 <= centre <= 0.6 and unit <= 1:
            found[value.name] = (0.0, 1.0)
    return found


def _normalisation(model: Model, constants: Constants, name: str) -> tuple[float, float]:
    """Return the value that becomes 0 and the step that becomes 1; 0 and 1 if none does."""
    scale, shift = 1.0, 0.0
    while len(uses := model.readers.get(name, ())) == 1:
        node, place = uses[0].node, uses[0].index
        if node.op in _ARITHMETIC:
            origin = constants.origin(node.input(1 - place))
            if origin is None or (node.op == "Div" and place == 1):
                break
            number = float(np.mean(constants.array(origin), dtype=np.float64))
            if node.op in ("Mul", "Div"):
                factor = number if node.op == "Mul" else 1 / number if number else 0.0
                scale, shift = scale * factor, shift * factor
            elif node.op == "Sub" and place == 1:
                scale, shift = -scale, number - shift
            else:
                shift += number if node.op == "Add" else -number
        elif node.op not in _LAYOUT or place != 0:
            break
        name = node.id
    return (-shift / scale, 1 / abs(scale)) if scale else (0.0, 1.0)


def _known(dim: int | str | None) -> TypeGuard[int]:
    return isinstance(dim, int) and dim > 0
