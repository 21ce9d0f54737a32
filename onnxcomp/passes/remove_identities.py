"""`RemoveIdentities`: nodes that give back one of their inputs unchanged go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from onnxcomp.model import Node
from onnxcomp.passes._graph import GraphView, Names, broadcasts_into, follow
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

_OPEN_END = 2**31 - 1
_ZERO_BIAS = "zero bias"


@dataclass(frozen=True)
class RemoveIdentities:
    """Removes nodes without effect, and zero biases of Conv, ConvTranspose and Gemm.

    Without effect are Identity, inference Dropout, Cast to the dtype it has, Transposes that
    keep the order or cancel, Reshape and Flatten to the shape it has, Concat, Sum, Mean, Max
    and Min of one input, adding 0 and multiplying by 1, Pad by nothing and Slice of all.
    """

    name: ClassVar[str] = "remove_identities"
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return an option or a refusal for every node and bias that does nothing."""
        scan = _Scan(GraphView(facts.model))
        options = [Option(self.name, step.node.id, step.node.op) for step in scan.steps]
        options += [Option(self.name, node.id, _ZERO_BIAS) for node in scan.zero_biased]
        return Proposal(tuple(options), tuple(scan.refusals))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Take chosen nodes and biases out."""
        scan = _Scan(GraphView(facts.model))
        for node in scan.zero_biased:
            if Option(self.name, node.id, _ZERO_BIAS) in chosen:
                draft.set_input(node.id, 2, "")
        names = Names(draft, scan.view)
        for step in scan.steps:
            if Option(self.name, step.node.id, step.node.op) in chosen:
                names.replace(step.node.id, step.source)


@dataclass(frozen=True)
class _Step:
    """A node without effect, and the input of it that takes its place."""

    node: Node
    source: str


class _Scan:
    """Everything without effect in one model, in topological order."""

    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.steps: list[_Step] = []
        self.refusals: list[Refusal] = []
        self.zero_biased = [node for node in view.live if _has_zero_bias(view, node)]
        self._origins: dict[str, str] = {}
        self._renamed: set[str] = set()
        for node in view.live:
            self._visit(node)

    def origin(self, name: str) -> str:
        """Return the tensor that equals `name` once the steps so far are done."""
        return follow(self._origins, name)

    def _visit(self, node: Node) -> None:
        source = _MATCHERS[node.op](self, node) if node.op in _MATCHERS else None
        if source is None:
            return
        reason = self._reason_to_stay(node, self.origin(source))
        if reason is not None:
            self.refusals.append(Refusal(node.id, reason))
            return
        self.steps.append(_Step(node, source))
        self._origins[node.id] = source

    def _reason_to_stay(self, node: Node, origin: str) -> str | None:
        view = self.view
        for name in node.outputs[1:]:
            if view.uses(name) or name in view.model.output_names:
                return f"its second output '{name}' is read"
        reason = view.fixed(node.id)
        if reason is None:
            return None
        maker = view.model.producers.get(origin)
        if maker is None:
            return f"{reason}, and its input '{origin}' is an input or initializer"
        taken = f"'{origin}' takes another output's name" if origin in self._renamed else None
        blocked = taken or view.fixed(origin)
        if blocked is None and maker.outputs[0] != origin:
            blocked = f"'{origin}' is not the first output of '{maker.id}'"
        if blocked is not None:
            return f"{reason}, and {blocked}"
        self._renamed.add(origin)
        return None


def _has_zero_bias(view: GraphView, node: Node) -> bool:
    optional = node.op in ("Conv", "ConvTranspose") or (
        node.op == "Gemm" and view.model.opset >= 11
    )
    bias = view.constant(node.input(2)) if optional else None
    return bias is not None and not np.any(bias)


def _parameter(view: GraphView, node: Node, name: str, index: int) -> tuple[Any, ...] | None:
    """Return integers that are an attribute in old opsets and a constant input in new ones."""
    if name in node.attrs:
        return tuple(node.attrs[name])
    value = view.constant(node.input(index))
    return tuple(value.ravel().tolist()) if value is not None else None


def _identity(scan: _Scan, node: Node) -> str | None:
    return node.input(0)


def _only_input(scan: _Scan, node: Node) -> str | None:
    return node.input(0) if len(node.inputs) == 1 else None


def _dropout(scan: _Scan, node: Node) -> str | None:
    opset = scan.view.model.opset
    if opset < 7:
        return node.input(0) if node.attrs.get("is_test", 0) else None
    if opset >= 12 and node.input(2):
        training = scan.view.constant(node.input(2))
        if training is None or np.any(training):
            return None
    return node.input(0)


def _cast(scan: _Scan, node: Node) -> str | None:
    return node.input(0) if scan.view.dtype(node.input(0)) == node.attrs["to"] else None


def _transpose(scan: _Scan, node: Node) -> str | None:
    """Match a Transpose that keeps the order, or undoes the one before it."""
    second = node.attrs.get("perm")
    if second is not None and second == tuple(range(len(second))):
        return node.input(0)
    before = scan.view.model.producers.get(scan.origin(node.input(0)))
    if before is None or before.op != "Transpose":
        return None
    first = before.attrs.get("perm")
    given = first or second
    if given is None:
        return before.input(0)
    backward = tuple(reversed(range(len(given))))
    first, second = first or backward, second or backward
    cancels = all(first[axis] == place for place, axis in enumerate(second))
    return before.input(0) if cancels else None


def _reshape(scan: _Scan, node: Node) -> str | None:
    shape = scan.view.shape(node.input(0))
    wanted = _parameter(scan.view, node, "shape", 1)
    if shape is None or wanted is None or len(shape) != len(wanted):
        return None
    copies = not node.attrs.get("allowzero", 0)
    same = [w == s or (w == 0 and copies) for w, s in zip(wanted, shape, strict=True)]
    inferred = [w == -1 for w in wanted]
    fits = all(s or i for s, i in zip(same, inferred, strict=True))
    return node.input(0) if fits and sum(inferred) <= 1 else None


def _flatten(scan: _Scan, node: Node) -> str | None:
    shape = scan.view.shape(node.input(0))
    flat = shape is not None and len(shape) == 2 and node.attrs.get("axis", 1) in (1, -1)
    return node.input(0) if flat else None


def _pad(scan: _Scan, node: Node) -> str | None:
    pads = _parameter(scan.view, node, "pads", 1)
    return node.input(0) if pads is not None and not any(pads) else None


def _slice(scan: _Scan, node: Node) -> str | None:
    starts = _parameter(scan.view, node, "starts", 1)
    ends = _parameter(scan.view, node, "ends", 2)
    steps = _parameter(scan.view, node, "steps", 4) if node.input(4) else ()
    if starts is None or ends is None or steps is None:
        return None
    whole = not any(starts) and all(e >= _OPEN_END for e in ends) and set(steps) <= {1}
    return node.input(0) if whole else None


def _neutral(value: int, places: tuple[int, ...]) -> Callable[[_Scan, Node], str | None]:
    """Match an operation with a constant that is `value` everywhere, at one of `places`."""

    def match(scan: _Scan, node: Node) -> str | None:
        if scan.view.model.opset < 7:
            return None  # broadcasting by an `axis` attribute
        for place in places:
            constant, other = scan.view.constant(node.input(place)), node.input(1 - place)
            if constant is None or not np.all(constant == value):
                continue
            if broadcasts_into(constant, scan.view.shape(other)):
                return other
        return None

    return match


_MATCHERS: Mapping[str, Callable[[_Scan, Node], str | None]] = {
    "Add": _neutral(0, (0, 1)),
    "Cast": _cast,
    "Concat": _only_input,
    "Div": _neutral(1, (1,)),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Identity": _identity,
    "Max": _only_input,
    "Mean": _only_input,
    "Min": _only_input,
    "Mul": _neutral(1, (0, 1)),
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Sub": _neutral(0, (1,)),
    "Sum": _only_input,
    "Transpose": _transpose,
}
