"""Inputs on which a model can be run: the user's first sample, or random ones that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeGuard

import numpy as np

from onnxcomp.analysis.constants import Constants
from onnxcomp.analysis.functions import inlined
from onnxcomp.errors import ExecutionError, UnsupportedModelError
from onnxcomp.model import Array, Model, Node
from onnxcomp.runtime import capture_tensors
from onnxcomp.samples import Samples, random_samples

# Sizes tried for symbolic axes behind the batch, most usual first.
_SIZES = (224, 320, 64, 256, 128, 32, 640, 512, 96, 16, 1, 576)
_MOST_ELEMENTS = 2**23  # of an input of such sizes
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_LAYOUT = ("Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze")
_SAME = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")  # values of one shape
_KEPT = (*_SAME, *_ARITHMETIC, "Clip", "Pad", "Relu")  # channels stay where they are


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
    model = inlined(model)
    inputs = model.signature.inputs
    reason = "its inputs have unknown rank"
    for shapes in usual_shapes(model):
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


def usual_shapes(model: Model) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield full input shapes, by name, in which open axes have usual sizes.

    An open axis of channels has as many as the first weight that they meet takes.

    Args:
        model: The model; its weights may lack their values.
    """
    inputs = model.signature.inputs
    if any(value.shape is None for value in inputs):
        return
    declared = {value.name: value.shape or () for value in inputs}
    # A name that recurs within one input, such as "?", names nothing.
    batch = {dims[0] for dims in declared.values() if dims and dims.count(dims[0]) == 1}
    for name, dims in declared.items():
        axis, channels = _channels(model, name, len(dims)) or (0, 0)
        if axis and not _known(dims[axis]) and (dims[axis] is None or dims[axis] not in batch):
            declared[name] = (*dims[:axis], channels, *dims[axis + 1 :])
    free = {dim for dims in declared.values() for dim in dims if not _known(dim)} - batch
    for size in _SIZES if free else _SIZES[:1]:
        shapes = {
            name: tuple(
                dim if _known(dim) else (1 if axis == 0 or (dim and dim in batch) else size)
                for axis, dim in enumerate(dims)
            )
            for name, dims in declared.items()
        }
        most = max(map(math.prod, shapes.values()), default=0)
        if most <= _MOST_ELEMENTS or size == 1 or not free:
            yield shapes


def _channels(model: Model, name: str, rank: int) -> tuple[int, int] | None:
    """Return the axis of an input's channels and their number, as the first weight tells."""
    weights = _weight_shapes(model)
    waiting = [(name, tuple(range(rank)))]
    seen = set[str]()
    while waiting:
        name, axes = waiting.pop(0)
        for use in model.readers.get(name, ()):
            node, shape = use.node, weights.get(use.node.input(1), ())
            if use.index == 0 and len(axes) > 1 and (found := _taken(node, shape)):
                return axes[found[0]], found[1]
            if node.id in seen or not (node.op in _KEPT or node.op == "Transpose"):
                continue
            seen.add(node.id)
            order = tuple(range(rank))
            if node.op == "Transpose":
                order = node.attrs.get("perm", order[::-1])
            if sorted(order) == list(range(rank)):  # not so in a broken file
                waiting.append((node.id, tuple(axes[a] for a in order)))
    return None


def _weight_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shapes of initializers and constants, quantised ones as well."""
    shapes = {t.name: tuple(t.dims) for t in model.skeleton.graph.initializer}
    for node in model.nodes:
        if node.op == "Constant":
            found = (tuple(a.t.dims) for a in node.proto.attribute if a.name == "value")
            shapes[node.id] = next(found, ())
        elif node.op in _SAME and node.input(0) in shapes:
            shapes[node.id] = shapes[node.input(0)]
    return shapes


def _taken(node: Node, weight: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the axis of a node's data on which its weight works, and how long it must be."""
    if node.op in ("BatchNormalization", "InstanceNormalization") and len(weight) == 1:
        return 1, weight[0]
    if len(weight) < 2:
        return None
    if node.op == "Conv":
        return 1, weight[1] * node.attrs.get("group", 1)
    if node.op == "ConvTranspose":
        return 1, weight[0]
    if node.op == "Gemm":
        return 1 - node.attrs.get("transA", 0), weight[node.attrs.get("transB", 0)]
    return (-1, weight[-2]) if node.op == "MatMul" else None


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
