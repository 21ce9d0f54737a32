"""Blocks: what repeats in a network, found without module names.

A residual Add joins two activations of equal shape.  The nodes that lead to only one of its
operands are its block: the branch with more linear nodes is the path, the other the shortcut.
A stage is a run of blocks whose Adds have equal shapes; layers at the same position of the
blocks of one stage with equal kernels repeat.  In networks without residual Adds, layers with
equal kernels repeat wherever they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxcomp.analysis.linear import Linear
from onnxcomp.model import Model, Node
from onnxcomp.runtime import TensorFact


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        output: Id of the residual Add.
        stage: Number of its stage, from 0.
        path: Linear nodes of the longer branch, in order.
        shortcut: Linear nodes of the other branch, in order.
    """

    output: str
    stage: int
    path: tuple[str, ...]
    shortcut: tuple[str, ...]


@dataclass(frozen=True)
class Repetition:
    """Linear nodes that have the same kernel shape at the same place of repeated blocks.

    Attributes:
        name: What reports call it, such as "stage1.conv0.32x32x3x3"; no other has it.
        stage: Number of the stage; -1 in networks without residual Adds.
        position: Place along the path of a block, from 0; -1 without residual Adds.
        kernel: Shape (out_channels, in_channels, *kernel_shape).
        members: At least two nodes, in file order.
    """

    name: str
    stage: int
    position: int
    kernel: tuple[int, ...]
    members: tuple[str, ...]


def find_blocks(
    model: Model, linears: Mapping[str, Linear], tensors: Mapping[str, TensorFact]
) -> tuple[Block, ...]:
    """Return the residual blocks in file order."""
    bits, sources = _ancestors(model)
    order = [node.id for node in model.nodes]
    blocks: list[Block] = []
    stage, shape = -1, None
    for node in model.nodes:
        if not _residual(model, tensors, node):
            continue
        first, second = (sources.get(name, 0) for name in node.inputs)
        branches = [
            tuple(n for n in order if n in linears and own & bits[n])
            for own in (first & ~second, second & ~first)
        ]
        path, shortcut = sorted(branches, key=len, reverse=True)
        if not path:
            continue
        if tensors[node.id].shape != shape:
            stage, shape = stage + 1, tensors[node.id].shape
        blocks.append(Block(node.id, stage, path, shortcut))
    return tuple(blocks)


def find_repetitions(
    model: Model, linears: Mapping[str, Linear], blocks: Sequence[Block]
) -> tuple[Repetition, ...]:
    """Return the layers that repeat: dense, with a weight of their own, at least twice."""
    places: dict[str, tuple[int, int]] = {}
    for block in blocks:
        places.update({n: (block.stage, i) for i, n in enumerate(block.path)})
    found: dict[tuple[tuple[int, int], tuple[int, ...], str], list[str]] = {}
    for linear in linears.values():
        own = len(model.readers[linear.weight]) == 1
        if linear.groups > 1 or not own or (blocks and linear.id not in places):
            continue
        kernel = (linear.out_channels, linear.in_channels, *linear.kernel_shape)
        place = places.get(linear.id, (-1, -1))
        layout = linear.node.attrs.get("transB", 0)
        kind = f"{linear.node.op} {layout} {linear.dtype} {linear.dilations}"
        found.setdefault((place, kernel, kind), []).append(linear.id)
    names: dict[str, int] = {}
    repetitions = []
    for (place, kernel, _), members in found.items():
        if len(members) > 1:
            name = name_of_place(*place, kernel)
            names[name] = names.get(name, 0) + 1
            name += f"#{names[name]}" * (names[name] > 1)
            repetitions.append(Repetition(name, *place, kernel, tuple(members)))
    return tuple(repetitions)


def name_of_place(stage: int, position: int, kernel: tuple[int, ...]) -> str:
    """Return what reports call layers of one kernel shape at a place of repeated blocks."""
    where = "repeated" if stage < 0 else f"stage{stage}.conv{position}"
    return f"{where}.{'x'.join(str(extent) for extent in kernel)}"


def _residual(model: Model, tensors: Mapping[str, TensorFact], node: Node) -> bool:
    if node.op != "Add" or any(name in model.weights for name in node.inputs):
        return False
    facts = [tensors.get(name) for name in node.inputs]
    shapes = [fact.shape for fact in facts if fact is not None]
    return len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) > 1


def _ancestors(model: Model) -> tuple[dict[str, int], dict[str, int]]:
    """Return a bit per node, and for every tensor the bits of all nodes that lead to it."""
    bits = {node.id: 1 << index for index, node in enumerate(model.nodes)}
    sources: dict[str, int] = {}
    for node in model.nodes:
        behind = bits[node.id]
        for name in (*node.inputs, *node.captured):
            behind |= sources.get(name, 0)
        sources.update(dict.fromkeys(node.outputs, behind))
    return bits, sources
