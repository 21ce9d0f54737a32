"""`RemoveDead`: what no output needs goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxcomp.passes._graph import GraphView
from onnxcomp.passes.base import Arrays, Need, Option, Proposal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft
    from onnxcomp.model import Model


@dataclass(frozen=True)
class RemoveDead:
    """Removes nodes and initializers that no output needs, and value infos of lost tensors.

    Inputs and outputs of the graph stay, read or not: they are the model's signature.
    """

    name: ClassVar[str] = "remove_dead"
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return one option for each dead node, initializer and value info."""
        dead = _dead(facts.model)
        return Proposal(
            tuple(
                Option(self.name, name, form) for form, names in dead.items() for name in names
            )
        )

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Take chosen nodes out; initializers and value infos go when the draft is sealed."""
        for option in chosen:
            if option.form == "node":
                draft.remove_node(option.target)


def _dead(model: Model) -> dict[str, list[str]]:
    view, graph = GraphView(model), model.skeleton.graph
    read = {name for node in view.live for name in (*node.inputs, *node.captured)}
    read |= model.output_names
    made = {name for node in view.live for name in node.outputs}
    initializers = [tensor.name for tensor in graph.initializer]
    made.update(name for name in initializers if name in read)
    return {
        "node": [n.id for n in model.nodes if n.id and n.id not in view.live_ids],
        "initializer": [name for name in initializers if name not in read],
        "value_info": [info.name for info in graph.value_info if info.name not in made],
    }
