"""What a model is judged by: its raw outputs, and which of them are class scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.runtime import TensorFact

_SHAPE_OPS = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_SQUASHING_OPS = ("Softmax", "LogSoftmax", "Sigmoid")
_FEWEST_CLASSES = 2
_VARYING_OPS = ("NonMaxSuppression", "NonZero", "Compress", "Unique")


def raw_outputs(model: Model, tensors: Mapping[str, TensorFact]) -> tuple[str, ...]:
    """Return the float tensors that the outputs show, in front of a final Softmax or Sigmoid.

    Outputs of other types (classes, indices) and outputs whose shape depends on values stand
    for the nearest float tensors of fixed shape that they are made of.
    """
    found: dict[str, None] = {}
    varying = _varying(model)
    wanted, seen = [value.name for value in reversed(model.signature.outputs)], set[str]()
    while wanted:
        name = wanted.pop()
        node = model.producers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if name not in tensors or tensors[name].dtype.kind != "f" or name in varying:
            if node.op not in ("Shape", "Size"):
                wanted += reversed([*node.inputs, *sorted(node.captured)])
            continue
        while node is not None and node.op in _SHAPE_OPS:
            node = model.producers.get(node.inputs[0])
        squashed = node is not None and node.op in _SQUASHING_OPS
        found[node.inputs[0] if squashed and node is not None else name] = None
    if not found:
        raise UnsupportedModelError("no output depends on computed floats; nothing to measure")
    return tuple(found)


def class_scores(model: Model, tensors: Mapping[str, TensorFact]) -> tuple[str, int] | None:
    """Return name and K of the first raw output of shape (N, K), K >= 2, axes of 1 aside.

    These mostly are scores of K classes.  None where there is no such output.
    """
    for name in raw_outputs(model, tensors):
        shape = tensors[name].shape[1:]
        if shape and max(shape) == math.prod(shape) >= _FEWEST_CLASSES:
            return name, max(shape)
    return None


def _varying(model: Model) -> set[str]:
    """Return the tensors whose shape may depend on values."""
    found: set[str] = set()
    for node in model.nodes:
        if node.op in _VARYING_OPS or not found.isdisjoint({*node.inputs, *node.captured}):
            found.update(node.outputs)
    return found - {""}
