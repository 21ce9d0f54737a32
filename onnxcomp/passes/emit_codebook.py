"""EmitCodebook: float weights of few values become a codebook and at most a byte per weight.

    Gather(codebook, Cast(indices))  in place of the initializer

Of at most 16 values a byte holds the indices of two weights: ``first + 16 * second``, where
the weight's first half comes first.  This is plain ONNX; runtimes fold it back to the float
weight when they load it, so the file is small and nothing else changes.  DequantizeLinear
would say the same for uniform grids, but onnxruntime computes it anew in every run; and uint4
would need opset 21.
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

_VALUES, _HALF = 256, 16  # that a byte and half of it can tell apart
_OVERHEAD, _HALF_OVERHEAD = 400, 1100  # bytes of the nodes and their names, about
_INT32 = {"to": onnx.TensorProto.INT32}
_OPSET, _HALF_OPSET = 6, 10  # from which Cast takes its type as a number, and there is Mod


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
            halves = _in_halves(facts.model, array, len(codebook))
            read = _add_halves if halves else _add_bytes
            dense = draft.add_node(
                "Gather", [values, read(draft, name, indices)], stem=f"{name}_values"
            )
            draft.rewire(name, dense)


def _add_bytes(draft: Draft, name: str, indices: Array) -> str:
    """Add indices of a byte each; return them as integers in the weight's shape."""
    stored = draft.add_weight(f"{name}_indices", indices)
    return draft.add_node("Cast", [stored], stem=f"{name}_cast", attrs=_INT32)


def _add_halves(draft: Draft, name: str, indices: Array) -> str:
    """Add indices of half a byte each; return them as integers in the weight's shape."""
    first, second = np.split(indices.ravel(), 2)
    stored = draft.add_weight(f"{name}_indices", first + _HALF * second)
    base = draft.add_weight(f"{name}_base", np.array(_HALF, np.int32))
    shape = draft.add_weight(f"{name}_shape", np.array(indices.shape, np.int64))
    cast = draft.add_node("Cast", [stored], stem=f"{name}_cast", attrs=_INT32)
    parts = [draft.add_node(op, [cast, base], stem=f"{name}_{op}") for op in ("Mod", "Div")]
    joined = draft.add_node("Concat", parts, stem=f"{name}_joined", attrs={"axis": 0})
    return draft.add_node("Reshape", [joined, shape], stem=f"{name}_shaped")


def _in_halves(model: Model, array: Array, values: int) -> bool:
    """Whether half a byte per weight is possible, and smaller than a byte."""
    saved = array.size // 2 > _HALF_OVERHEAD - _OVERHEAD
    return values <= _HALF and array.size % 2 == 0 and saved and model.opset >= _HALF_OPSET


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
