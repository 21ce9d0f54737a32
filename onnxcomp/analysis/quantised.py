"""Which nodes are quantised: DequantizeLinear feeds them integers as numbers of a float."""

from __future__ import annotations

from onnxcomp.model import Model, Node

_LAYOUT = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def is_quantised(model: Model, node: Node) -> bool:
    """Whether data and weight of a node both come from a DequantizeLinear.

    Where only weights do, they are stored in few bits and the node computes with floats.
    """
    return all(dequantised(model, node.input(index)) for index in (0, 1))


def dequantised(model: Model, name: str) -> tuple[Node, ...]:
    """Return the nodes from a tensor up to the DequantizeLinear that it comes from.

    Changes of layout may lie between them; there are none where it comes from elsewhere.
    """
    found: list[Node] = []
    while (node := model.producers.get(name)) is not None:
        found.append(node)
        if node.op == "DequantizeLinear":
            return tuple(found)
        if node.op not in _LAYOUT:
            break
        name = node.input(0)
    return ()
