"""ONNX graphs as torch modules: trained there, written back into the same graph.

The only package that imports torch.  `to_torch` interprets a graph node by node, `from_torch`
puts the trained weights back, `check_equal` stands at both ends.
"""

from onnxcomp.bridge.equality import check_equal, takes_batches
from onnxcomp.bridge.module import GraphModule, to_torch
from onnxcomp.bridge.writing import from_torch

__all__ = ["GraphModule", "check_equal", "from_torch", "takes_batches", "to_torch"]
