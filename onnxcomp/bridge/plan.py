"""From a graph to steps: what runs where, what is known beforehand, what is trained.

Every tensor of the graph is one of four things.  A *constant* depends on no input and on
nothing that is trained: it is computed once, here.  A *shape* depends on the shapes of inputs
alone: it is computed at every run, on the CPU, as small integers mostly.  A *weight* is
trained, or made of what is trained.  *Data* is the rest.  Weights and data live where the
module does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from onnxcomp.analysis.functions import inlined
from onnxcomp.bridge.ops import HANDLERS
from onnxcomp.bridge.ops.base import Handler, Kernel, UnsupportedNodeError, Wish
from onnxcomp.bridge.roles import STATISTICS, Roles, find_roles, origin
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Array, Model, Node, subgraphs

BatchNorm = Literal["frozen", "trainable"]

_OLDEST = 7  # operator set since which elementwise operators broadcast as they do now
_FEW = 64  # elements: larger constants are kept where the module is
_SMALL = 16  # the same for fractions that take part in computing a shape
_OF_SHAPES = ("Shape", "Size")
_VALUES = ("value", "value_float", "value_floats", "value_int", "value_ints")
KERNEL_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
)
"""What torch raises where it cannot compute something; running out of memory is one."""


class Place(Enum):
    """Where a step finds an input."""

    DEVICE = "where the module is"
    HOST = "on the CPU"
    MOVED = "on the CPU, to be moved to where the module is"


@dataclass(frozen=True)
class Step:
    """One node as it is run.

    Attributes:
        id: The node's first output.
        kernel: What computes it.
        inputs: Name and place of every input; "" for an absent one.
        outputs: Names of its outputs; "" for one that nobody wants.
        host: Whether its outputs stay on the CPU.
        wants: What the kernel takes by keyword; nothing where no data take part.
    """

    id: str
    kernel: Kernel
    inputs: tuple[tuple[str, Place], ...]
    outputs: tuple[str, ...]
    host: bool
    wants: Wish | None


@dataclass(frozen=True)
class Plan:
    """A graph as it is run.

    Attributes:
        steps: In topological order.
        trained: Values of the initializers that become Parameters, in the file's order.
        kept: Constants that live where the module is, initializers and what follows of them.
        host: Constants that are read on the CPU.
        untrained: Why a layer's weight is not trained, by its name.
        inputs: Names of the graph's inputs.
        outputs: Names of its outputs.
        one_sample: Whether all inputs are declared with one sample.
    """

    steps: tuple[Step, ...]
    trained: dict[str, Tensor]
    kept: dict[str, Tensor]
    host: dict[str, Tensor]
    untrained: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    one_sample: bool


def make_plan(model: Model, *, batchnorm: BatchNorm) -> Plan:
    """Return how a model is run.

    Raises:
        UnsupportedModelError: Nodes cannot be expressed; the message lists them all.
    """
    model = inlined(model)
    nodes = [_only_wanted(model, node) for node in _live(model)]
    found = _kernels(model, nodes)
    constants = _fold(model, nodes, found)
    shapes = {n: tuple(t.shape) for n, t in constants.items() if isinstance(t, Tensor)}
    roles = find_roles(model, nodes, shapes)
    if batchnorm == "trainable":
        _check_statistics(model, nodes, roles)
    return _Planner(model, found, constants, roles).plan(nodes)


def _live(model: Model) -> list[Node]:
    """Return the nodes that some output needs."""
    wanted, needed = list(model.output_names), set[str]()
    while wanted:
        node = model.producers.get(wanted.pop())
        if node is not None and node.id not in needed:
            needed.add(node.id)
            wanted += [*node.inputs, *node.captured]
    return [node for node in model.nodes if node.id in needed]


def _kernels(model: Model, nodes: Sequence[Node]) -> dict[str, tuple[Handler, Kernel]]:
    """Return handler and kernel of every node but Constants."""
    found: dict[str, tuple[Handler, Kernel]] = {}
    refused: list[str] = []
    unread = model.initializer_names - model.weights.keys()
    for node in nodes:
        reason = _why_not(model, node, unread)
        if reason is None and node.op != "Constant":
            handler = HANDLERS[node.op]
            try:
                found[node.id] = handler, handler.make(node, model.opset)
            except UnsupportedNodeError as error:
                reason = str(error)
        if reason is not None:
            refused.append(f"{node.op} '{node.id}': {reason}")
    if refused:
        count = f"{len(refused)} nodes" if len(refused) > 1 else "a node"
        raise UnsupportedModelError(
            f"the bridge to torch cannot express {count} of the model: {'; '.join(refused)}"
        )
    return found


def _why_not(model: Model, node: Node, unread: frozenset[str]) -> str | None:
    """Return why a node cannot be expressed, as far as it can be told without its handler."""
    if model.opset < _OLDEST and "::" not in node.op:
        return f"it is of operator set {model.opset}, before {_OLDEST} (convert the model)"
    if any(True for _ in subgraphs(node.proto)):
        return "it carries subgraphs (export the model for fixed inputs)"
    missing = [name for name in node.inputs if name in unread]
    if missing:
        return f"NumPy cannot hold its initializer '{missing[0]}'"
    if node.op == "Constant":
        return None if _value(node) is not None else "its value is a string or sparse"
    return None if node.op in HANDLERS else "there is no such operator in the bridge"


def _only_wanted(model: Model, node: Node) -> Node:
    """Return a node without the names of outputs that nobody reads."""
    outputs = tuple(
        name if name in model.readers or name in model.output_names else ""
        for name in node.outputs
    )
    return replace(node, outputs=outputs)


def _value(node: Node) -> Array | None:
    """Return the tensor that a Constant node makes; None for strings and sparse ones."""
    value = next((node.attrs[key] for key in _VALUES if key in node.attrs), None)
    if value is None:
        return None
    integral = any(key in node.attrs for key in ("value_int", "value_ints"))
    dtype = None if "value" in node.attrs else np.int64 if integral else np.float32
    array = np.asarray(value, dtype)
    return array if array.dtype.kind in "biuf" or array.dtype.name == "bfloat16" else None


def as_tensor(array: Array) -> Tensor:
    """Return a copy of an array as a tensor; half precision becomes float32."""
    if array.dtype.name in ("float16", "bfloat16"):
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(np.array(array))


def _fold(
    model: Model, nodes: Sequence[Node], found: Mapping[str, tuple[Handler, Kernel]]
) -> dict[str, Tensor]:
    """Return the values of all tensors, and sequences of them, that depend on no input."""
    read = {name for node in nodes for name in node.inputs} | model.output_names
    values = {n: as_tensor(array) for n, array in model.weights.items() if n in read}
    for node in nodes:
        if node.op == "Constant":
            value = _value(node)
            if value is not None:
                values[node.id] = as_tensor(value)
        elif all(name in values for name in node.inputs if name):
            handler, kernel = found[node.id]
            inputs = [values[name] if name else None for name in node.inputs]
            try:
                result = kernel(*inputs, **quiet(handler.wants))
            except KERNEL_ERRORS as error:
                raise UnsupportedModelError(
                    f"{node.op} '{node.id}' fails on its constants: {reason_of(error)}"
                ) from error
            values.update(named(node.outputs, result))
    return values


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


def named(names: Sequence[str], result: Any) -> dict[str, Any]:
    """Return a kernel's result by the names of the node's outputs."""
    results = result if isinstance(result, tuple) else (result,)
    return {name: value for name, value in zip(names, results, strict=False) if name}


def quiet(wants: Wish | None) -> dict[str, Any]:
    """Return what a kernel takes by keyword where no data take part."""
    if wants is None:
        return {}
    return {wants: None if wants == "batch" else False}


def _check_statistics(model: Model, nodes: Sequence[Node], roles: Roles) -> None:
    """Refuse statistics that cannot be updated or written back."""
    refused = []
    for node in nodes:
        for index in STATISTICS.get(node.op, ()):
            name = origin(model, node.input(index))
            if name not in roles.statistics:
                refused.append(
                    f"'{node.id}': '{name}' is no initializer (fold constants first)"
                )
            elif others := _other_readers(model, name):
                refused.append(f"'{node.id}': '{name}' is read by '{others[0]}' too")
    if refused:
        raise UnsupportedModelError(
            f"statistics of BatchNormalization cannot be trained: {'; '.join(refused)}"
        )


def _other_readers(model: Model, name: str) -> list[str]:
    """Return the nodes that read a tensor as anything but a statistic."""
    found = []
    for use in model.readers.get(name, ()):
        if use.node.op == "Identity":
            found += _other_readers(model, use.node.id)
        elif use.index not in STATISTICS.get(use.node.op, ()):
            found.append(use.node.id)
    return found


class _Planner:
    """Puts every tensor in its place."""

    def __init__(
        self,
        model: Model,
        kernels: Mapping[str, tuple[Handler, Kernel]],
        constants: Mapping[str, Tensor],
        roles: Roles,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._constants = dict(constants)
        self._roles = roles
        self._weights = set(roles.trained)
        self._shapes: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        self._host: dict[str, Tensor] = {}

    def plan(self, nodes: Sequence[Node]) -> Plan:
        """Return the plan of the nodes, in topological order."""
        trained = {name: self._constants.pop(name) for name in self._roles.trained}
        steps = [step for node in nodes if (step := self._step(node)) is not None]
        signature = self._model.signature
        for name in self._model.output_names & self._constants.keys():
            self._kept[name] = self._constants[name]
        order = {name: index for index, name in enumerate(self._model.weights)}
        kept = dict(
            sorted(self._kept.items(), key=lambda item: order.get(item[0], len(order)))
        )
        shapes = [value.shape for value in signature.inputs]
        return Plan(
            tuple(steps),
            trained,
            kept,
            self._host,
            dict(self._roles.untrained),
            tuple(value.name for value in signature.inputs),
            tuple(value.name for value in signature.outputs),
            bool(shapes) and all(shape is not None and shape[:1] == (1,) for shape in shapes),
        )

    def _step(self, node: Node) -> Step | None:
        """Return the step of a node; None where its value is known."""
        names = [origin(self._model, name) for name in node.inputs]
        fixed = all(self._is_fixed(name) for name in names)
        if fixed and self._needs_no_step(node, names):
            return None
        if fixed:
            self._weights.update(node.outputs)
            for name in node.outputs:
                self._constants.pop(name, None)
        handler, kernel = self._kernels[node.id]
        host = self._is_shape(node, names)
        if host:
            self._shapes.update(node.outputs)
        reads_values = node.op not in _OF_SHAPES
        inputs = tuple(
            (name, self._place(name, host and reads_values, index in handler.host))
            for index, name in enumerate(names)
        )
        wants = handler.wants
        if wants is not None and fixed:
            kernel, wants = _quietly(kernel, wants), None
        return Step(node.id, kernel, inputs, node.outputs, host, wants)

    def _is_fixed(self, name: str) -> bool:
        """Whether a tensor depends on no input."""
        return not name or name in self._constants or name in self._weights

    def _needs_no_step(self, node: Node, names: Sequence[str]) -> bool:
        if node.op == "Identity" and node.id not in self._model.output_names:
            return True
        return node.op in _OF_SHAPES or not self._weights.intersection(names)

    def _is_shape(self, node: Node, names: Iterable[str]) -> bool:
        """Whether a node computes with shapes alone."""
        if node.op in _OF_SHAPES:
            return True
        shapes = False
        for name in filter(None, names):
            if name in self._shapes:
                shapes = True
                continue
            value = self._constants.get(name)
            if value is None or (value.is_floating_point() and value.numel() > _SMALL):
                return False
        return shapes

    def _place(self, name: str, host: bool, wanted: bool) -> Place:
        """Return where an input is, and keep it there where it is constant."""
        if name in self._shapes:
            return Place.HOST if host or wanted else Place.MOVED
        value = self._constants.get(name)
        if value is None:
            return Place.DEVICE
        if host or (wanted and value.numel() <= _FEW):
            self._host[name] = value
            return Place.HOST
        self._kept[name] = value
        return Place.DEVICE


def _quietly(kernel: Kernel, wants: Wish) -> Kernel:
    keywords = quiet(wants)
    return lambda *inputs: kernel(*inputs, **keywords)
