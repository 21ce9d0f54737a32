"""EmitCodebook: float weights of few values become a codebook and one byte per weight.

    Gather(codebook, Cast(indices))  in place of the initializer

This is plain ONNX of any version; runtimes fold it back to the float weight when they load it,
so the file is small and nothing else changes.  DequantizeLinear would say the same for uniform
grids, but onnxruntime computes it anew in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx

from onnxcomp.codec.symbols import distinct, ranks
from onnxcomp.model import Array, Model
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

_VALUES = 256  # that a byte can tell apart
_OVERHEAD = 400  # bytes of two nodes and their names, about
_OPSET = 6  # from which Cast takes its type as a number


@dataclass(frozen=True)
class EmitCodebook:
    """Weights as indices into codebooks, where that makes the file smaller."""

    name: ClassVar[str] = "emit_codebook"
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return the weights of few values, and why other large ones stay."""
        options, refusals = [], []
        for name, array, uses in facts.model.weight_readers():
            if array.dtype.kind != "f" or not uses or not _saves(array, 1):
                continue
            reason = _reason(facts.model, name, array)
            if reason:
                refusals.append(Refusal(name, reason))
            else:
                options.append(Option(self.name, name))
        return Proposal(tuple(options), tuple(refusals))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Let the readers of every weight read its codebook instead."""
        for option in chosen:
            name = option.target
            array = facts.model.weights[name]
            codebook = distinct(array, _VALUES)
            if codebook is None:
                raise AssertionError("only weights of few values are proposed")
            indices = ranks(array, codebook).astype(np.uint8).reshape(array.shape)
            values = draft.add_weight(f"{name}_codebook", codebook)
            bytes_ = draft.add_weight(f"{name}_indices", indices)
            cast = draft.add_node(
                "Cast", [bytes_], stem=f"{name}_cast", attrs={"to": onnx.TensorProto.INT32}
            )
            dense = draft.add_node("Gather", [values, cast], stem=f"{name}_values")
            draft.rewire(name, dense)


def _reason(model: Model, name: str, array: Array) -> str:
    """Return why a weight stays as it is, or ""."""
    if model.opset < _OPSET:
        return f"opset {model.opset} has no Cast by number"
    if name in model.output_names:
        return "it is an output"
    if any(use.index < 0 for use in model.readers[name]):
        return "a subgraph reads it"
    codebook = distinct(array, _VALUES)
    if codebook is None:
        return f"it has more than {_VALUES} values"
    if not _saves(array, len(codebook)):
        return f"its {len(codebook)} values and indices are not smaller than it is"
    return ""


def _saves(array: Array, values: int) -> bool:
    """Whether indices and a codebook of so many values are smaller than a weight."""
    return array.size + values * array.itemsize + _OVERHEAD < array.nbytes
