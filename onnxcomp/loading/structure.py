"""The walk over all graphs and functions of a parsed model, before any library sees them.

Graphs are collected parents first, without recursion. Read backwards, every sub-graph yields
the names it takes from outside, which count as inputs of the node that owns it; so one rule
covers scopes, dangling names, cycles and the order of nodes at every depth.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx

from onnxcomp.errors import InvalidModelError, UnsupportedModelError
from onnxcomp.loading.limits import LoadLimits

DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})
FunctionKey = tuple[str, str, str]


@dataclass(eq=False, slots=True)
class Body:
    """A graph, a sub-graph or the body of a local function.

    Attributes:
        where: How to name it in errors.
        proto: The message that holds the nodes.
        opsets: Version of each imported domain; the default domain is "".
        parent: The body around a sub-graph.
        owner: The node that has the sub-graph as an attribute.
        branch: The attribute that holds it.
        depth: 0 for the main graph and for functions.
        captured: Names taken from outside, with the node that reads each.
    """

    where: str
    proto: onnx.GraphProto | onnx.FunctionProto
    opsets: Mapping[str, int]
    parent: "Body | None" = None
    owner: onnx.NodeProto | None = None
    branch: str = ""
    depth: int = 0
    captured: dict[str, str] = field(default_factory=dict)

    @property
    def initializers(self) -> Sequence[onnx.TensorProto]:
        """Initializers; a function has none."""
        return self.proto.initializer if isinstance(self.proto, onnx.GraphProto) else ()

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        if isinstance(self.proto, onnx.GraphProto):
            return [value.name for value in self.proto.input]
        return list(self.proto.input)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        if isinstance(self.proto, onnx.GraphProto):
            return [value.name for value in self.proto.output]
        return list(self.proto.output)


@dataclass(frozen=True, slots=True)
class Structure:
    """All graphs and functions of a model.

    Attributes:
        bodies: Parents before their sub-graphs, the main graph first.
        functions: The bodies of the local functions.
        warnings: What was put right.
    """

    bodies: tuple[Body, ...]
    functions: Mapping[FunctionKey, Body]
    warnings: tuple[str, ...] = ()

    def foreign_ops(self) -> tuple[str, ...]:
        """Return operators outside the ONNX domain that no local function defines."""
        nodes = (node for body in self.bodies for node in body.proto.node)
        return tuple(
            sorted(
                {
                    f"{node.domain}::{node.op_type}"
                    for node in nodes
                    if node.domain not in DEFAULT_DOMAINS
                    and function_key(node) not in self.functions
                }
            )
        )


def describe(node: onnx.NodeProto) -> str:
    """Return how errors name a node: by its name or its first output, and its operator."""
    name = node.name or next((output for output in node.output if output), "")
    return f"node '{name}' ({node.op_type})"


def function_key(node: onnx.NodeProto) -> FunctionKey:
    """Return what a node's operator is found under in `Structure.functions`."""
    return (node.domain, node.op_type, node.overload)


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield attribute name and graph of every sub-graph of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def walk(model: onnx.ModelProto, limits: LoadLimits) -> Structure:
    """Collect and check all graphs and functions, and sort their nodes where they are not.

    Args:
        model: A parsed model; only the order of its nodes may change.
        limits: Bounds on nodes and nesting.

    Returns:
        The bodies, with the names that each sub-graph captures.

    Raises:
        InvalidModelError: Names clash or dangle, nodes form a cycle, or a limit is broken.
        UnsupportedModelError: The IR version is unknown, or the model holds training steps or
            sparse initializers.
    """
    structure = _collect(model, limits)
    for body in structure.bodies:
        _check_names(body)
    children: dict[int, list[Body]] = {}
    warnings: list[str] = []
    for body in reversed(structure.bodies):
        if not _order(body, children.pop(id(body), [])):
            warnings.append(f"the nodes of {body.where} were not in order and were sorted")
        if body.parent is not None:
            children.setdefault(id(body.parent), []).append(body)
        elif body.captured:
            name, reader = next(iter(body.captured.items()))
            raise InvalidModelError(
                f"{reader} reads '{name}', which nothing in {body.where} makes"
            )
    return replace(structure, warnings=tuple(reversed(warnings)))


def _collect(model: onnx.ModelProto, limits: LoadLimits) -> Structure:
    main = Body("the graph", _main_graph(model), _opsets(model.opset_import, "the model"))
    functions: dict[FunctionKey, Body] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        where = f"function '{function.domain}::{function.name}'"
        if key in functions:
            raise InvalidModelError(f"{where} is defined twice")
        functions[key] = Body(where, function, _opsets(function.opset_import, where))
    bodies, pending, nodes = [], [main, *functions.values()], 0
    while pending:
        body = pending.pop(0)
        bodies.append(body)
        nodes += len(body.proto.node)
        if max(nodes, len(bodies)) > limits.nodes:
            raise InvalidModelError(f"more than {limits.nodes} nodes or sub-graphs")
        for node in body.proto.node:
            for branch, graph in subgraphs(node):
                where = f"'{branch}' of {describe(node)}"
                child = Body(where, graph, body.opsets, body, node, branch, body.depth + 1)
                if child.depth > limits.graph_depth:
                    raise InvalidModelError(
                        f"sub-graphs are nested more than {limits.graph_depth} deep at {where}"
                    )
                pending.append(child)
    return Structure(tuple(bodies), functions)


def _main_graph(model: onnx.ModelProto) -> onnx.GraphProto:
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        raise UnsupportedModelError(
            f"IR version {model.ir_version} is not between 3 and {onnx.IR_VERSION} (export "
            "the model again, or install a newer onnx)"
        )
    if not model.HasField("graph") or not model.graph.output:
        raise InvalidModelError(
            "the file holds no graph with outputs; it is not an ONNX model"
        )
    if len(model.training_info):
        raise UnsupportedModelError("the model holds training steps; export it for inference")
    return model.graph


def _opsets(imports: Sequence[onnx.OperatorSetIdProto], where: str) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain in DEFAULT_DOMAINS else entry.domain
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise InvalidModelError(f"{where} imports two versions of domain '{domain}'")
    if not opsets:
        raise InvalidModelError(f"{where} imports no operator set")
    return opsets


def _check_names(body: Body) -> None:
    """Refuse names that are defined twice, and graph outputs without a name."""
    if isinstance(body.proto, onnx.GraphProto) and len(body.proto.sparse_initializer):
        raise UnsupportedModelError(f"{body.where} has sparse initializers; make them dense")
    inputs, initializers = body.inputs, [t.name for t in body.initializers]
    for node in body.proto.node:
        if not any(node.output):
            raise InvalidModelError(f"{describe(node)} in {body.where} has no output")
    made = [name for node in body.proto.node for name in node.output if name]
    # An initializer may also be an input: then it is that input's default (IR version 3).
    for kind, names in (("input", inputs), ("initializer", initializers), ("output", made)):
        _require_unique(names, kind, body.where)
    if clash := set(made) & {*inputs, *initializers}:
        raise InvalidModelError(f"'{min(clash)}' is made twice in {body.where}")
    _require_unique(body.outputs, "graph output", body.where)
    if "" in {*inputs, *initializers, *body.outputs}:
        raise InvalidModelError(
            f"{body.where} has an input, initializer or output without name"
        )


def _require_unique(names: Sequence[str], kind: str, where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidModelError(f"{kind} '{name}' is defined twice in {where}")
        seen.add(name)


def _order(body: Body, children: Sequence[Body]) -> bool:
    """Put the nodes in topological order and note the names that come from outside.

    Args:
        body: The graph or function.
        children: Its sub-graphs, already ordered.

    Returns:
        Whether the nodes were in order before.
    """
    nodes = list(body.proto.node)
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    given = {*body.inputs, *(tensor.name for tensor in body.initializers)}
    reads = [{name: describe(node) for name in node.input if name} for node in nodes]
    # Outputs identify nodes, for there is at least one and names are unique.
    index = {_identity(node): i for i, node in enumerate(nodes)}
    for child in children:
        assert child.owner is not None
        reads[index[_identity(child.owner)]].update(child.captured)
    waiting: list[int] = []
    for i, names in enumerate(reads):
        for name in names:
            if name not in maker and name not in given:
                body.captured.setdefault(name, names[name])
        waiting.append(len({maker[name] for name in names if name in maker}))
        if any(maker.get(name) == i for name in names):
            raise InvalidModelError(f"{describe(nodes[i])} reads its own output")
    for name in body.outputs:
        if name not in maker and name not in given:
            body.captured.setdefault(name, f"the output of {body.where}")
    order = _topological(reads, maker, waiting)
    if len(order) < len(nodes):
        stuck = sorted(set(range(len(nodes))) - set(order))[:3]
        raise InvalidModelError(
            f"the nodes of {body.where} form a cycle, near "
            + ", ".join(describe(nodes[i]) for i in stuck)
        )
    in_order = order == sorted(order)
    if not in_order:
        rank = {_identity(nodes[i]): position for position, i in enumerate(order)}
        body.proto.node.sort(key=lambda node: rank[_identity(node)])
    return in_order


def _identity(node: onnx.NodeProto) -> str:
    name: str = next(name for name in node.output if name)
    return name


def _topological(
    reads: Sequence[Mapping[str, str]], maker: Mapping[str, int], waiting: list[int]
) -> list[int]:
    """Return node indices in Kahn's order, the earliest in the file first."""
    readers: dict[int, set[int]] = {}
    for i, names in enumerate(reads):
        for name in names:
            if name in maker:
                readers.setdefault(maker[name], set()).add(i)
    ready = [i for i, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers.get(i, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    return order
