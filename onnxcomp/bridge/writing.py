"""Trained weights back into the graph that they came from."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from onnxcomp.bridge.module import GraphModule
from onnxcomp.errors import ParameterError, ValidationError
from onnxcomp.model import Array, Model


def from_torch(module: GraphModule, like: Model) -> Model:
    """Return a model with the weights and statistics of a module.

    Only the values of initializers that differ change: names, order, dtypes and everything
    else stay, and an untrained module gives the model that it was made from.

    Args:
        module: What `to_torch` made of `like`, trained or not.
        like: The model to write the weights into; it stays as it is.

    Raises:
        ParameterError: The module was made from another graph.
        ValidationError: A weight became NaN or infinite.
    """
    changed: dict[str, Array] = {}
    weights = {n: w for n, w in module.weights.items() if w.is_floating_point()}
    for name in module.trained.keys() - like.weights.keys():
        raise ParameterError(f"from_torch: the model has no initializer '{name}'")
    for name, tensor in weights.items():
        if name not in like.weights:
            continue  # what follows from initializers is not stored
        array = _as_array(name, tensor, like.weights[name])
        if array.tobytes() != like.weights[name].tobytes():
            changed[name] = array
    return Model(like.skeleton, {**like.weights, **changed}, foreign_ops=like.foreign_ops)


def _as_array(name: str, tensor: Tensor, old: Array) -> Array:
    """Return a tensor as an array of the old one's dtype."""
    if tuple(tensor.shape) != old.shape:
        raise ParameterError(
            f"from_torch: '{name}' has shape {tuple(tensor.shape)}, the model's {old.shape}"
        )
    value = tensor.detach().cpu().numpy()
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(value.astype(old.dtype)).reshape(old.shape)
    broken = np.count_nonzero(~np.isfinite(array.astype(np.float64)))
    if broken and np.all(np.isfinite(old.astype(np.float64))):
        raise ValidationError(
            f"'{name}': {broken} of {array.size} trained values are NaN or infinite as "
            f"{old.dtype}; train with a smaller learning rate"
        )
    array.setflags(write=False)
    return array
