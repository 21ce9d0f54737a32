"""What `inspect` tells about one model, as data, and which layers a compression changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.cost import Cost, node_costs, total_cost
from onnxcomp.model import Model, Node, Value
from onnxcomp.passes import PASSES
from onnxcomp.passes.base import Need
from onnxcomp.report import SCHEMA_VERSION

if TYPE_CHECKING:
    from onnxcomp.analysis.blocks import Block, Repetition
    from onnxcomp.passes.base import Refusal
    from onnxcomp.runtime import TensorFact

_OTHER = "(other)"


@dataclass(frozen=True)
class Port:
    """An input or output of the model.

    Attributes:
        name: Its name.
        dtype: Its dtype, such as "float32".
        shape: Declared shape, open dimensions as their symbol or "?"; None = unknown rank.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None

    @classmethod
    def of(cls, value: Value) -> Port:
        """Return the port that a declaration describes."""
        shape = None if value.shape is None else tuple(d or "?" for d in value.shape)
        return cls(value.name, value.dtype.name, shape)


@dataclass(frozen=True)
class Layer:
    """One node that has parameters or does multiply-accumulates.

    Attributes:
        id: Its first output, by which it is identified.
        name: Its own name, or the id where it has none.
        op: Its operator.
        in_shape: Shape of its first input in one run at batch 1; None where it is unknown.
        out_shape: Shape of its first output, likewise.
        params: Parameters; a shared tensor counts at its first reader.
        macs: Multiply-accumulates per sample.
        share: Share of the model's MACs.
    """

    id: str
    name: str
    op: str
    in_shape: tuple[int, ...] | None
    out_shape: tuple[int, ...] | None
    params: int
    macs: int
    share: float


@dataclass(frozen=True)
class SharedTensor:
    """An initializer with several readers."""

    name: str
    shape: tuple[int, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class GroupView:
    """A channel group; `pinned` says why none of its channels can be removed, or is None."""

    name: str
    size: int
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    pinned: str | None


@dataclass(frozen=True)
class PassView:
    """What one pass could do with the model, and what it will not do.

    Attributes:
        name: Name of the pass.
        exact: Whether it keeps the outputs.
        options: Number of things it could do.
        refusals: Places it leaves alone, and why.
    """

    name: str
    exact: bool
    options: int
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` tells.

    Attributes:
        schema_version: Version of this layout in JSON.
        path: The file.
        file_bytes: Its size with its external data.
        opset: Version of the default operator set.
        ir_version: Version of the file format.
        producer: Name and version of what wrote the file.
        inputs: Inputs that are not initializers.
        outputs: Outputs.
        operators: Number of nodes by operator, most frequent first.
        foreign_ops: Operators outside the ONNX domain.
        cost: Parameters, MACs and bytes of weights in all.
        layers: Nodes with parameters or MACs, in file order.
        shared: Initializers with several readers.
        blocks: Residual blocks.
        repetitions: Layers of equal shape at the same place of repeated blocks.
        groups: Channel groups.
        passes: What every pass could do.
        notes: What the reader must know first.
    """

    schema_version: int
    path: str
    file_bytes: int
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: Mapping[str, int]
    foreign_ops: tuple[str, ...]
    cost: Cost
    layers: tuple[Layer, ...]
    shared: tuple[SharedTensor, ...]
    blocks: tuple[Block, ...]
    repetitions: tuple[Repetition, ...]
    groups: tuple[GroupView, ...]
    passes: tuple[PassView, ...]
    notes: tuple[str, ...]


def inspect_model(
    model: Model, facts: Analysis | None, *, notes: Sequence[str] = ()
) -> Inspection:
    """Gather what is to be told about a model.

    Args:
        model: The model.
        facts: Its analysis, whose local functions are inlined; None for a model that cannot
            be run, of which only the parts that need no shapes are told.
        notes: What the reader must know first.
    """
    graph = model if facts is None else facts.model
    costs = node_costs(graph, {}, {}) if facts is None else facts.costs
    total = total_cost(costs)
    tensors = {} if facts is None else facts.tensors
    return Inspection(
        schema_version=SCHEMA_VERSION,
        path=str(model.files[0]) if model.files else "",
        file_bytes=model.file_bytes,
        opset=model.opset,
        ir_version=model.skeleton.ir_version,
        producer=_producer(model),
        inputs=tuple(Port.of(value) for value in model.signature.inputs),
        outputs=tuple(Port.of(value) for value in model.signature.outputs),
        operators=_operators(graph),
        foreign_ops=model.foreign_ops,
        cost=total,
        layers=tuple(
            _layer(node, costs[node.id], total, tensors)
            for node in graph.nodes
            if costs[node.id].params or costs[node.id].macs
        ),
        shared=_shared(graph),
        blocks=() if facts is None else facts.blocks,
        repetitions=() if facts is None else facts.repetitions,
        groups=() if facts is None else _groups(facts),
        passes=() if facts is None else _passes(facts),
        notes=tuple(notes),
    )


def _producer(model: Model) -> str:
    names = (model.skeleton.producer_name, model.skeleton.producer_version)
    return " ".join(name for name in names if name)


def _operators(model: Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.nodes:
        counts[node.op] = counts.get(node.op, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _layer(node: Node, cost: Cost, total: Cost, tensors: Mapping[str, TensorFact]) -> Layer:
    in_shape, out_shape = (
        tensors[name].shape if name in tensors else None for name in (node.input(0), node.id)
    )
    share = cost.macs / total.macs if total.macs else 0.0
    params, macs = cost.params, cost.macs
    return Layer(node.id, node.name, node.op, in_shape, out_shape, params, macs, share)


def _shared(model: Model) -> tuple[SharedTensor, ...]:
    return tuple(
        SharedTensor(name, array.shape, tuple(use.node.id for use in uses))
        for name, array, uses in model.weight_readers()
        if len(uses) > 1
    )


def _groups(facts: Analysis) -> tuple[GroupView, ...]:
    return tuple(
        GroupView(
            group.name,
            group.size,
            group.producers,
            tuple(dict.fromkeys(reader.node for reader in group.readers)),
            group.pinned,
        )
        for group in facts.channels.groups
    )


def _passes(facts: Analysis) -> tuple[PassView, ...]:
    """Return what passes propose, but for those that compute gradients for it."""
    kinds = [kind for kind in PASSES.values() if Need.TORCH not in kind.needs]
    found = [(kind, kind().propose(facts)) for kind in kinds]
    return tuple(PassView(k.name, k.exact, len(p.options), p.refusals) for k, p in found)


@dataclass(frozen=True)
class LayerChange:
    """MACs of one of the original's layers, and of what stands in its place."""

    name: str
    before: int
    after: int


def layer_changes(original: Analysis, result: Analysis) -> tuple[LayerChange, ...]:
    """Return the MACs of every layer before and after, in the original's order.

    A node of the result belongs to the layer that makes, in the original, the next tensor
    that both models have; so the parts of a factorised layer are added up.
    """
    before = {node: cost.macs for node, cost in original.costs.items() if cost.macs}
    after = dict.fromkeys(before, 0)
    rest = 0
    for node in result.model.nodes:
        macs = result.costs[node.id].macs
        layer = _layer_behind(node, original.model, result.model, before) if macs else None
        if layer is None:
            rest += macs
        else:
            after[layer] += macs
    names = {node.id: node.name for node in original.model.nodes}
    changes = [LayerChange(names[node], before[node], after[node]) for node in before]
    return (*changes, LayerChange(_OTHER, 0, rest)) if rest else tuple(changes)


def _layer_behind(
    node: Node, original: Model, result: Model, layers: Mapping[str, int]
) -> str | None:
    """Return the original's layer in whose place a node of the result stands."""
    tensor = node.id
    while tensor not in original.producers:
        readers = result.readers.get(tensor, ())
        if not readers:
            return None
        tensor = readers[0].node.id
    seen = tensor
    while seen in original.producers and seen not in layers:
        seen = original.producers[seen].input(0)
    return seen if seen in layers else None
