"""`FoldBatchnorm`: per-channel affine nodes go into the weights of a linear neighbour.

A BatchNormalization at inference is y = s x + t with s = scale / sqrt(var + epsilon) and
t = bias - s mean (Ioffe and Szegedy 2015, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcomp.analysis.linear import kernel_of, stored_as
from onnxcomp.model import Array, Node
from onnxcomp.passes._affine import Affine, NotAffineError, read_affine
from onnxcomp.passes._graph import GraphView, Names
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_AFFINE = frozenset({"BatchNormalization", "Add", "Sub", "Mul", "Div"})
_FORWARD = "forward"


@dataclass(frozen=True)
class FoldBatchnorm:
    """Folds BatchNormalization and constant per-channel Add, Sub, Mul and Div.

    Whole chains behind a Conv, ConvTranspose, Gemm or MatMul go into its weight and bias.  A
    MatMul keeps one Add behind it as its bias.  A BatchNormalization with no such node before
    it goes forward into the next one, where no padding is in the way.  Only float32 and
    float64 weights that nothing else reads are scaled.
    """

    name: ClassVar[str] = "fold_batchnorm"
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return an option or a refusal for every affine node beside a linear one."""
        plan = _Plan(GraphView(facts.model))
        options = []
        for fold in plan.folds:
            options += [Option(self.name, node.id, _FORWARD) for node in fold.before]
            options += [Option(self.name, node.id) for node in fold.after]
        refusals = (Refusal(where, reason) for where, reason in plan.refusals.items())
        return Proposal(tuple(options), tuple(refusals))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Fold chosen nodes; behind one that was not chosen, the rest of its chain stays."""
        view = GraphView(facts.model)
        names, targets = Names(draft, view), {option.target for option in chosen}
        for fold in _Plan(view).folds:
            before, after = _leading(fold.before, targets), _leading(fold.after, targets)
            if before or after:
                _write(draft, view, names, replace(fold, before=before, after=after))


@dataclass(frozen=True)
class _Fold:
    """A linear node, and the affine nodes that go into it, those nearest to it first."""

    node: Node
    before: tuple[Node, ...] = ()
    after: tuple[Node, ...] = ()


@dataclass(frozen=True)
class _Solution:
    """What a fold writes; no weight means that it stays as it is."""

    weight: Array | None
    bias: Array


class _Plan:
    """All folds of one model, and why other affine nodes stay."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self.refusals: dict[str, str] = {}
        linear = [node for node in view.live if node.op in _LINEAR]
        found = [_Fold(node, after=self._behind(node)) for node in linear]
        self._taken = {node.id for fold in found for node in fold.after}
        found = [self._with_nodes_before(fold) for fold in found]
        self.folds = [fold for fold in found if fold.before or not _is_settled(fold)]
        for node in view.live:
            if node.op == "BatchNormalization" and node.id not in self._taken:
                reason = "there is no linear node with constant weights beside it"
                self.refusals.setdefault(node.id, reason)

    def _behind(self, node: Node) -> tuple[Node, ...]:
        """Return the longest chain behind a linear node that can be folded into it."""
        view, chain, tensor = self._view, list[Node](), node.id
        while True:
            readers = [use for use in view.uses(tensor) if _is_candidate(view, use.node)]
            if view.only_reader(tensor) is None:
                count = len(view.uses(tensor)) + (tensor in view.model.output_names)
                for use in readers:
                    self._refuse(use.node, f"its input '{tensor}' is read in {count} places")
                break
            if not readers:
                break
            follower = readers[0].node
            try:
                read_affine(view, node, follower, tensor)
            except NotAffineError as error:
                self._refuse(follower, str(error))
                break
            chain.append(follower)
            tensor = follower.id
        if _is_settled(_Fold(node, after=tuple(chain))):
            return tuple(chain)
        return self._solvable(chain, lambda nodes: _Fold(node, after=nodes))

    def _with_nodes_before(self, fold: _Fold) -> _Fold:
        """Add the BatchNormalizations in front of a linear node that nothing else takes."""
        view, chain, reader = self._view, list[Node](), fold.node
        while True:
            tensor = reader.input(0)
            maker, use = view.model.producers.get(tensor), view.only_reader(tensor)
            if maker is None or maker.op != "BatchNormalization" or maker.id in self._taken:
                break
            if use is None or use.index != 0:
                break
            try:
                read_affine(view, fold.node, maker, maker.input(0), forward=True)
            except NotAffineError as error:
                self._refuse(maker, str(error))
                break
            chain.append(maker)
            reader = maker
        nodes = self._solvable(chain, lambda nodes: replace(fold, before=nodes))
        for node in nodes:
            self._taken.add(node.id)
            self.refusals.pop(node.id, None)
        return replace(fold, before=nodes)

    def _solvable(
        self, chain: list[Node], fold_of: Callable[[tuple[Node, ...]], _Fold]
    ) -> tuple[Node, ...]:
        while chain:
            try:
                _solve(self._view, fold_of(tuple(chain)))
            except NotAffineError as error:
                self._refuse(chain.pop(), str(error))
            else:
                break
        return tuple(chain)

    def _refuse(self, node: Node, reason: str) -> None:
        self.refusals.setdefault(node.id, reason)


def _leading(nodes: tuple[Node, ...], targets: set[str]) -> tuple[Node, ...]:
    count = next((i for i, node in enumerate(nodes) if node.id not in targets), len(nodes))
    return nodes[:count]


def _is_candidate(view: GraphView, node: Node) -> bool:
    if node.op == "BatchNormalization":
        return True
    return node.op in _AFFINE and any(view.constant(name) is not None for name in node.inputs)


def _is_settled(fold: _Fold) -> bool:
    """Say whether a MatMul has one Add or Sub behind it already, or nothing to fold at all."""
    if not fold.after:
        return True
    lone = fold.after[0]
    subtracts = lone.op == "Sub" and lone.input(0) == fold.node.id
    return (
        fold.node.op == "MatMul" and len(fold.after) == 1 and (lone.op == "Add" or subtracts)
    )


def _solve(view: GraphView, fold: _Fold) -> _Solution:
    """Return the weight and bias that do what a linear node and its affine nodes do.

    With y = s (K (p x + q) + b) + t per channel, K becomes s K p and b becomes
    s (b + K q) + t, computed in float64.

    Raises:
        NotAffineError: The arrays must not be written, or would not be exact.
    """
    node = fold.node
    weight = view.constant(node.input(1))
    assert weight is not None
    if weight.dtype not in (np.float32, np.float64):
        raise NotAffineError(
            f"the weight of '{node.id}' is {weight.dtype}: rounding would show"
        )
    kernel = kernel_of(node.op, node.attrs, weight)
    groups = node.attrs.get("group", 1)
    outputs, inputs = kernel.shape[0], kernel.shape[1] * groups
    inner, outer = Affine.identity(inputs), Affine.identity(outputs)
    for before in reversed(fold.before):
        inner = inner.then(read_affine(view, node, before, before.input(0), forward=True))
    tensor = node.id
    for after in fold.after:
        outer = outer.then(read_affine(view, node, after, tensor))
        tensor = after.id
    bias = _bias(view, node, outputs)
    if fold.before:
        _check_forward(node, inner)
        share = inner.shift.reshape(groups, -1).repeat(outputs // groups, axis=0)
        taps = kernel.reshape(*kernel.shape[:2], -1).sum(axis=2, dtype=np.float64)
        bias = bias + node.attrs.get("alpha", 1.0) * (taps * share).sum(axis=1)
    return _rounded(view, node, kernel, inner, outer, bias)


def _rounded(
    view: GraphView, node: Node, kernel: Array, inner: Affine, outer: Affine, bias: Array
) -> _Solution:
    """Scale the kernel, shift the bias, and round both once to the weight's dtype."""
    dtype, stored = kernel.dtype, None
    with np.errstate(over="ignore", invalid="ignore"):
        bias = (bias * outer.scale + outer.shift).astype(dtype)
        if np.any(inner.scale != 1) or np.any(outer.scale != 1):
            _check_owner(view, node)
            repeats = len(outer.scale) * kernel.shape[1] // len(inner.scale)
            factor = inner.scale.reshape(-1, kernel.shape[1]).repeat(repeats, axis=0)
            factor = factor * outer.scale[:, None]
            factor = factor.reshape(*kernel.shape[:2], *(1,) * (kernel.ndim - 2))
            stored = stored_as(node.op, node.attrs, (kernel * factor).astype(dtype))
    if not (np.all(np.isfinite(bias)) and (stored is None or np.all(np.isfinite(stored)))):
        raise NotAffineError(f"the weight or bias of '{node.id}' would not be finite")
    return _Solution(stored, bias)


def _bias(view: GraphView, node: Node, channels: int) -> Array:
    """Return the bias inside a node, with the beta of a Gemm, in float64 (channels,)."""
    if node.op == "MatMul" or not node.input(2):
        return np.zeros(channels)
    bias = view.constant(node.input(2))
    if bias is None:
        raise NotAffineError(f"the bias of '{node.id}' is computed")
    if bias.size != 1 and (bias.size != channels or bias.shape[-1] != channels):
        raise NotAffineError(f"the bias of '{node.id}' varies along more than the channels")
    beta = node.attrs.get("beta", 1.0) if node.op == "Gemm" else 1.0
    return np.asarray(np.broadcast_to(bias.astype(np.float64).ravel() * beta, channels))


def _check_forward(node: Node, inner: Affine) -> None:
    """Raise where the input channels of a node cannot take an affine map."""
    if node.attrs.get("transA", 0):
        raise NotAffineError(f"'{node.id}' transposes its input")
    if node.op in ("Gemm", "MatMul") or not np.any(inner.shift):
        return
    auto = node.attrs.get("auto_pad", "NOTSET")
    padded = auto not in ("NOTSET", "VALID") or (auto == "NOTSET" and any(_pads(node)))
    if padded or node.op == "ConvTranspose":
        raise NotAffineError(f"its shift does not reach the borders of '{node.id}'")


def _pads(node: Node) -> tuple[int, ...]:
    return tuple(node.attrs.get("pads", ()))


def _check_owner(view: GraphView, node: Node) -> None:
    """Raise where a weight is read by others too."""
    name = node.input(1)
    readers = len(view.uses(name))
    if readers > 1:
        raise NotAffineError(
            f"weight '{name}' is shared by {readers} readers; folding copies it"
        )
    if name in view.model.output_names:
        raise NotAffineError(f"weight '{name}' is a graph output")


def _write(draft: Draft, view: GraphView, names: Names, fold: _Fold) -> None:
    """Write one fold: arrays first, then the affine nodes go."""
    node, solution = fold.node, _solve(view, fold)
    if fold.before:
        draft.set_input(node.id, 0, names.now(fold.before[-1].input(0)))
    if solution.weight is not None:
        _put(draft, view, node, 1, solution.weight)
    last = fold.after[-1].id if fold.after else None
    if node.op != "MatMul":
        _put_bias(draft, view, node, solution.bias)
    elif np.any(solution.bias):
        bias = draft.add_weight(f"{node.id}_bias", solution.bias)
        if last is None:
            names.add_bias_behind(node, bias)
        else:
            draft.remove_node(last)
            stem = f"{node.id}_biased"
            draft.add_node("Add", [node.id, bias], stem=stem, outputs=[last])
        return
    if last is not None:
        names.replace(last, node.id)


def _put_bias(draft: Draft, view: GraphView, node: Node, bias: Array) -> None:
    optional = node.op != "Gemm" or view.model.opset >= 11
    if np.any(bias) or not optional:
        _put(draft, view, node, 2, bias)
        if node.op == "Gemm":
            draft.set_attributes(node.id, {"beta": None})
    elif node.input(2):
        draft.set_input(node.id, 2, "")


def _put(draft: Draft, view: GraphView, node: Node, index: int, value: Array) -> None:
    """Write an array over the one that a node reads, or beside it where others read it."""
    name = node.input(index)
    if name in view.model.weights and view.only_reader(name) is not None:
        draft.set_weight(name, value)
    else:
        draft.set_input(node.id, index, draft.add_weight(name or f"{node.id}_bias", value))
