"""Local functions of a model: calls become the nodes that they stand for."""

from __future__ import annotations

from onnx import inliner

from onnxcomp.model import Model


def inlined(model: Model) -> Model:
    """Return a model with its calls of local functions inlined; without any, the same object.

    Calls of a function of another operator set than the model's stay: what onnx makes of it
    for the model's own is not always the same.
    """
    if not model.skeleton.functions:
        return model
    skeleton = inliner.inline_local_functions(model.skeleton)
    return Model(skeleton, model.weights, files=model.files, foreign_ops=model.foreign_ops)
