"""`Draft`: the one place where graphs are changed, and the only user of graphsurgeon.

Graphsurgeon sees a skeleton whose weights are plain named tensors without values, so memory
stays near the size of the file.  It drops metadata, doc strings and value infos, and rewrites
subgraphs; `seal` therefore carries every node that was not edited over from the source, byte
for byte, and restores the rest from the source model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from onnxcomp.errors import ParameterError, SealError
from onnxcomp.model import Array, Model, captured_names, stub, subgraphs
from onnxcomp.outline import outline

_log = logging.getLogger(__name__)


class Draft:
    """A private, editable copy of a model; nodes are named by their first output."""

    def __init__(self, model: Model) -> None:
        self._source = model
        self._weights: dict[str, Array] = dict(model.weights)
        self._graph = _import(model)
        self._tensors: dict[str, gs.Variable] = {}
        # Nodes are unhashable; holding them keeps their ids from being used again.
        self._originals: dict[int, tuple[gs.Node, onnx.NodeProto]] = {}
        self._edited: set[int] = set()
        self._reshaped: set[str] = set()
        for node, proto in zip(self._graph.nodes, model.skeleton.graph.node, strict=True):
            self._originals[id(node)] = (node, proto)
            self._tensors.update({t.name: t for t in [*node.inputs, *node.outputs] if t.name})
        for tensor in [*self._graph.inputs, *self._graph.outputs]:
            self._tensors[tensor.name] = tensor
        self._used = _all_names(model.skeleton.graph)
        self._sealed = False

    @property
    def weights(self) -> Mapping[str, Array]:
        """The weights as they stand now."""
        return self._weights

    def op(self, node_id: str) -> str:
        """Return a node's operator."""
        return str(self._node(node_id).op)

    def attributes(self, node_id: str) -> dict[str, Any]:
        """Return a copy of a node's attributes."""
        return dict(self._node(node_id).attrs)

    def inputs(self, node_id: str) -> tuple[str, ...]:
        """Return the names of a node's inputs."""
        return tuple(tensor.name for tensor in self._node(node_id).inputs)

    def set_weight(self, name: str, value: Array) -> None:
        """Replace a weight for all its readers; the dtype stays, the shape may change."""
        if name not in self._weights:
            raise ParameterError(f"Draft.set_weight: there is no weight '{name}'")
        old = self._weights[name]
        value = np.ascontiguousarray(value, dtype=old.dtype).reshape(np.shape(value)).view()
        if value.shape != old.shape:
            self._reshaped.add(name)
        value.setflags(write=False)
        self._weights[name] = value

    def add_weight(self, stem: str, value: Array) -> str:
        """Add an initializer under a fresh name made from `stem`; return the name."""
        name = self.fresh_name(stem)
        value = np.ascontiguousarray(value).reshape(np.shape(value)).view()
        value.setflags(write=False)
        self._weights[name] = value
        return name

    def add_node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        stem: str,
        outputs: Sequence[str] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a node and return its first output.

        Args:
            op: Operator of the default domain.
            inputs: Tensor names; "" for an absent optional input.
            stem: Fresh names of the node and its output derive from it.
            outputs: Existing tensors that have no producer now; one fresh one if None.
            attrs: Attributes.
        """
        names = [self.fresh_name(stem)] if outputs is None else list(outputs)
        node = gs.Node(
            op=op,
            name=self.fresh_name(stem + "_node"),
            attrs=dict(attrs or {}),
            inputs=[self._tensor(name) for name in inputs],
            outputs=[self._tensor(name) for name in names],
        )
        self._graph.nodes.append(node)
        return names[0]

    def remove_node(self, node_id: str) -> None:
        """Take a node out; its outputs are free for another producer."""
        node = self._node(node_id)
        node.inputs.clear()
        node.outputs.clear()
        self._graph.nodes[:] = [n for n in self._graph.nodes if n is not node]

    def set_input(self, node_id: str, index: int, name: str) -> None:
        """Let input `index` of a node read another tensor, appending where it was absent."""
        node = self._node(node_id)
        while len(node.inputs) <= index:
            node.inputs.append(gs.Variable.empty())
        node.inputs[index] = self._tensor(name)
        self._edited.add(id(node))

    def set_attributes(self, node_id: str, attrs: Mapping[str, Any]) -> None:
        """Set attributes of a node; a value of None removes the attribute."""
        node = self._node(node_id)
        for key, value in attrs.items():
            if value is None:
                node.attrs.pop(key, None)
            else:
                node.attrs[key] = value
        self._edited.add(id(node))

    def rewire(self, old: str, new: str) -> None:
        """Let all readers of `old` read `new`.

        Raises:
            ParameterError: `old` is a graph output, or a subgraph reads it.
        """
        if old in self._source.output_names:
            raise ParameterError(f"Draft.rewire: '{old}' is a graph output and must stay")
        if any(use.index < 0 for use in self._source.readers.get(old, ())):
            raise ParameterError(f"Draft.rewire: '{old}' is read in a subgraph and must stay")
        target = self._tensor(new)
        for node in list(self._tensor(old).outputs):
            for index, tensor in enumerate(node.inputs):
                if tensor.name == old:
                    node.inputs[index] = target
            self._edited.add(id(node))

    def produce_as(self, node_id: str, name: str) -> None:
        """Let a node's first output be `name`, which must have lost its producer.

        Readers of the output's old name read `name` from now on.
        """
        node = self._node(node_id)
        old = node.outputs[0]
        if old.name in self._source.output_names:
            raise ParameterError(f"Draft.produce_as: '{old.name}' is a graph output")
        if self._tensor(name).inputs:
            raise ParameterError(f"Draft.produce_as: '{name}' still has a producer")
        node.outputs[0] = self._tensor(name)
        self._edited.add(id(node))
        self.rewire(old.name, name)

    def fresh_name(self, stem: str) -> str:
        """Return a name that nothing in the model uses, and reserve it."""
        candidates = (stem if n == 0 else f"{stem}_{n}" for n in count())
        name = next(c for c in candidates if c not in self._used)
        self._used.add(name)
        return name

    def seal(self, *, by: str) -> Model:
        """Clean up, sort, check and return the new model.

        Args:
            by: Name of the pass, for the error message.

        Returns:
            The new model.

        Raises:
            SealError: The result breaks the ONNX checker, strict shape inference or order.
        """
        if self._sealed:
            raise SealError(f"{by}: this draft was sealed already")
        self._sealed = True
        self._graph.cleanup(
            remove_unused_node_outputs=False,
            recurse_subgraphs=False,
            remove_unused_graph_inputs=False,
            recurse_functions=False,
        )
        nodes, changed = self._export(by)
        skeleton = self._assemble(_sorted(nodes, by))
        weights = {
            t.name: self._weights[t.name]
            for t in skeleton.graph.initializer
            if t.name in self._weights
        }
        affected = _downstream(skeleton, changed | self._reshaped)
        try:
            inferred = _check(skeleton, weights)
        except _CHECKER_ERRORS as error:
            if _passes(self._source):
                raise SealError(f"{by}: the edited graph is not valid: {error}") from error
            _log.warning("%s: the vendor's graph fails the checker, so does the result", by)
            inferred = {}
        _restore_value_info(skeleton, self._source.skeleton, inferred, affected)
        return Model(skeleton, weights, foreign_ops=self._source.foreign_ops)

    def _export(self, by: str) -> tuple[list[onnx.NodeProto], set[str]]:
        """Return the nodes, untouched ones as in the source, and the outputs of the rest."""
        exported = gs.export_onnx(self._graph, do_type_check=False).graph.node
        nodes: list[onnx.NodeProto] = []
        changed: set[str] = set()
        for node, proto in zip(self._graph.nodes, exported, strict=True):
            original = self._originals.get(id(node), (None, None))[1]
            if original is not None and id(node) not in self._edited:
                proto = original
            else:
                if any(True for _ in subgraphs(proto)):
                    raise SealError(f"{by}: node '{proto.output[0]}' carries a subgraph")
                if original is not None:
                    proto.doc_string = original.doc_string
                    proto.metadata_props.extend(original.metadata_props)
                changed.update(proto.output)
            nodes.append(proto)
        return nodes, changed

    def _assemble(self, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
        """Put nodes and live initializers into a copy of the source's skeleton."""
        source = self._source.skeleton
        skeleton = onnx.ModelProto()
        skeleton.CopyFrom(source)
        graph = skeleton.graph
        del graph.node[:]
        graph.node.extend(nodes)
        live = {name for node in nodes for name in node.input} | self._source.output_names
        for node in nodes:
            for body in subgraphs(node):
                live |= captured_names(body)
        stubs = {t.name: t for t in source.graph.initializer}
        for name, array in self._weights.items():
            if name not in stubs:
                stubs[name] = onnx.TensorProto(name=name)
            if name in live and array is not self._source.weights.get(name):
                changed = onnx.TensorProto()
                changed.CopyFrom(stubs[name])
                stub(changed, array)
                stubs[name] = changed
        del graph.initializer[:]
        graph.initializer.extend(t for name, t in stubs.items() if name in live)
        inputs = [v for v in graph.input if v.name not in self._source.initializer_names]
        if len(inputs) != len(graph.input):
            del graph.input[:]
            graph.input.extend(inputs)
            skeleton.ir_version = max(skeleton.ir_version, 4)
        if len(graph.initializer) > 0:
            skeleton.ir_version = max(skeleton.ir_version, 4)
        return skeleton

    def _tensor(self, name: str) -> gs.Variable:
        if not name:
            return gs.Variable.empty()
        if name not in self._tensors:
            self._tensors[name] = gs.Variable(name)
        return self._tensors[name]

    def _node(self, node_id: str) -> gs.Node:
        tensor = self._tensors.get(node_id)
        if tensor is None or not tensor.inputs:
            raise ParameterError(f"Draft: no node makes '{node_id}'")
        return tensor.inputs[0]


_CHECKER_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    ValueError,
    RuntimeError,
)


def _import(model: Model) -> gs.Graph:
    """Import the graph without its initializers, so that weights are nameless of values."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model.skeleton)
    del bare.graph.initializer[:]
    del bare.graph.sparse_initializer[:]
    del bare.graph.value_info[:]
    del bare.functions[:]
    # Not `gs.import_onnx`: its bare `except:` around the opset swallows Ctrl-C.
    domains = bare.opset_import
    return OnnxImporter.import_graph(bare.graph, opset=model.opset, import_domains=domains)


def _all_names(graph: onnx.GraphProto) -> set[str]:
    names = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    names |= {v.name for v in graph.output} | {v.name for v in graph.value_info}
    names |= {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        names |= {node.name, *node.input, *node.output}
        for body in subgraphs(node):
            names |= _all_names(body)
    return names


def _sorted(nodes: Sequence[onnx.NodeProto], by: str) -> list[onnx.NodeProto]:
    """Return the nodes in topological order, otherwise in the order given."""
    producer = {
        name: index for index, node in enumerate(nodes) for name in node.output if name
    }
    needs = []
    for node in nodes:
        names = [*node.input]
        for body in subgraphs(node):
            names += sorted(captured_names(body))
        needs.append([producer[name] for name in names if name and name in producer])
    order: list[onnx.NodeProto] = []
    state = bytearray(len(nodes))  # 0 new, 1 waiting for its inputs, 2 placed
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            index = stack[-1]
            waiting = [n for n in needs[index] if state[n] == 0]
            if state[index] == 0 and waiting:
                state[index] = 1
                stack += waiting
                continue
            if state[index] != 2 and any(state[n] == 1 for n in needs[index]):
                raise SealError(f"{by}: the graph has a cycle at '{nodes[index].output[0]}'")
            stack.pop()
            if state[index] != 2:
                state[index] = 2
                order.append(nodes[index])
    return order


def _downstream(skeleton: onnx.ModelProto, roots: Iterable[str]) -> set[str]:
    """Return all tensors that depend on `roots`, roots included."""
    found = set(roots)
    for node in skeleton.graph.node:
        names = set(node.input)
        for body in subgraphs(node):
            names |= captured_names(body)
        if names & found:
            found.update(node.output)
    return found


def _check(
    skeleton: onnx.ModelProto, weights: Mapping[str, Array]
) -> dict[str, onnx.ValueInfoProto]:
    """Run the full checker and strict shape inference; return the inferred value infos."""
    proto = outline(skeleton, weights)
    proto.ir_version = max(proto.ir_version, 4)
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto, full_check=True)
    result = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=True
    )
    return {v.name: v for v in result.graph.value_info}


def _passes(model: Model) -> bool:
    try:
        _check(model.skeleton, model.weights)
    except _CHECKER_ERRORS:
        return False
    return True


def _restore_value_info(
    skeleton: onnx.ModelProto,
    source: onnx.ModelProto,
    inferred: Mapping[str, onnx.ValueInfoProto],
    affected: set[str],
) -> None:
    """Keep the vendor's value infos; where an edit is upstream, the inferred ones."""
    made = {name for node in skeleton.graph.node for name in node.output}
    made |= {t.name for t in skeleton.graph.initializer}
    kept: list[onnx.ValueInfoProto] = []
    for info in source.graph.value_info:
        if info.name in made and info.name not in affected:
            kept.append(info)
        elif info.name in made and info.name in inferred:
            kept.append(inferred[info.name])
    del skeleton.graph.value_info[:]
    skeleton.graph.value_info.extend(kept)
