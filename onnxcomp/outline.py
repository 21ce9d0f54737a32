"""The outline of a model: its graph with large weights standing in as inputs of their shape.

The ONNX checker and shape inference see every name, type and shape, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnxcomp.model import Array, fill

_INLINE_BYTES = 1024  # smaller weights stay, as their values may be shapes


def outline(skeleton: onnx.ModelProto, weights: Mapping[str, Array]) -> onnx.ModelProto:
    """Return a copy of a skeleton that is complete without the payload of large weights.

    Args:
        skeleton: A model whose weights have no payload.
        weights: Their values.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(skeleton)
    graph = proto.graph
    declared, inline = {value.name for value in graph.input}, []
    for tensor in graph.initializer:
        array = weights.get(tensor.name)
        if array is None or array.nbytes <= _INLINE_BYTES:
            if array is not None:
                fill(tensor, array)
            inline.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
        elif tensor.name not in declared:
            shape, kind = list(array.shape), tensor.data_type
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, kind, shape))
    del graph.initializer[:]
    graph.initializer.extend(inline)
    return proto
