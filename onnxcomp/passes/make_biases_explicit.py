"""`MakeBiasesExplicit`: every linear node gets a bias that later passes can write to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcomp.passes._graph import GraphView, Names, is_channel_vector
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft
    from onnxcomp.model import Array, Node

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class MakeBiasesExplicit:
    """Adds a zero bias to each Conv, ConvTranspose, Gemm and MatMul that has none.

    The bias of a MatMul is an Add behind it.  `RemoveIdentities` is the inverse.
    """

    name: ClassVar[str] = "make_biases_explicit"
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return an option or a refusal for every linear node without a bias."""
        view = GraphView(facts.model)
        options, refusals = [], []
        for node in view.live:
            if node.op not in _LINEAR or _has_bias(view, node):
                continue
            weight = view.constant(node.input(1))
            if weight is None:
                refusals.append(Refusal(node.id, f"its weight '{node.input(1)}' is computed"))
            elif node.op == "MatMul" and weight.ndim != 2:
                reason = f"its weight has {weight.ndim} axes; only matrices get a bias"
                refusals.append(Refusal(node.id, reason))
            else:
                options.append(Option(self.name, node.id))
        return Proposal(tuple(options), tuple(refusals))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Add zero biases to chosen nodes."""
        view = GraphView(facts.model)
        names = Names(draft, view)
        for option in chosen:
            node = view.model.producers[option.target]
            weight = view.constant(node.input(1))
            assert weight is not None
            zeros = np.zeros(_out_channels(node, weight), weight.dtype)
            bias = draft.add_weight(f"{node.id}_bias", zeros)
            if node.op == "MatMul":
                names.add_bias_behind(node, bias)
                continue
            draft.set_input(node.id, 2, bias)
            if node.op == "Gemm":
                draft.set_attributes(node.id, {"beta": None})


def _has_bias(view: GraphView, node: Node) -> bool:
    if node.op != "MatMul":
        return bool(node.input(2))
    use = view.only_reader(node.id)
    weight = view.constant(node.input(1))
    if use is None or use.node.op != "Add" or weight is None:
        return False
    bias = view.constant(use.node.input(1 - use.index))
    return bias is not None and is_channel_vector(bias, weight.shape[-1])


def _out_channels(node: Node, weight: Array) -> int:
    if node.op == "Conv":
        return int(weight.shape[0])
    if node.op == "ConvTranspose":
        return int(weight.shape[1] * node.attrs.get("group", 1))
    return int(weight.shape[0 if node.attrs.get("transB", 0) else 1])
