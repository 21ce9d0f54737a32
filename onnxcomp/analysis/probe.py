"""Inputs on which a model can be run: the user's first sample, or random ones that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeGuard

from onnxcomp.errors import ExecutionError, UnsupportedModelError
from onnxcomp.model import Array, Model, Value
from onnxcomp.runtime import capture_tensors
from onnxcomp.samples import Samples, random_samples

# Sizes tried for symbolic axes behind the batch, most usual first.
_SIZES = (224, 320, 64, 256, 128, 32, 640, 512, 96, 16, 1, 576)


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
        return random_samples(inputs, count, seed, shapes)
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


def _known(dim: int | str | None) -> TypeGuard[int]:
    return isinstance(dim, int) and dim > 0
