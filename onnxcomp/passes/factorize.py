"""Factorize: one linear node becomes a chain of two or three of lower rank.

    output_basis   k x k to r channels, then 1 x 1   (plain SVD of 1 x 1, Gemm and MatMul)
    input_basis    1 x 1 to r channels, then k x k
    spatial        kh x 1 to r channels, then 1 x kw
    tucker2        1 x 1 to q, k x k to p, 1 x 1

The factors come from `numerics.svd`, from the weights alone or in the metric of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from onnxcomp.analysis.linear import Linear, stored_as
from onnxcomp.analysis.target import TARGETS, Convolution, Target
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array
from onnxcomp.numerics.factorization import PatchMetric
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

Shape = tuple[int, int, int, int]
_PAYS = 1.05  # an option must be predicted at least so much faster than what it replaces
_GEMM_WITHOUT_BIAS = 11  # first opset in which the bias of a Gemm is optional


@dataclass(frozen=True)
class Factorize:
    """Low-rank factorisation of single linear nodes.

    Attributes:
        forms: Which forms to propose, names of `numerics.svd.FORMS`.
        target: Profile whose grid the ranks follow and whose latency model judges options.
        step: Multiples of this instead of the grid, without the judgement; 1 frees all ranks.
    """

    name: ClassVar[str] = "factorize"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    forms: tuple[str, ...] = tuple(FORMS)
    target: Target = TARGETS["x86-avx512"]
    step: int | None = None

    def __post_init__(self) -> None:
        for form in self.forms:
            if form not in FORMS:
                raise ParameterError.choice("Factorize", "forms", FORMS, form)
        if self.step is not None and self.step < 1:
            raise ParameterError.of("Factorize", "step", "None or at least 1", self.step)

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return every form and rank that saves parameters, and refusals for other nodes."""
        options: list[Option] = []
        refusals = [Refusal(node, reason) for node, reason in facts.not_linear.items()]
        for linear in facts.linears.values():
            found, reason = self._options(facts, linear)
            options += found
            if reason:
                refusals.append(Refusal(linear.id, reason))
        return Proposal(tuple(options), tuple(refusals))

    def _options(self, facts: Analysis, linear: Linear) -> tuple[list[Option], str]:
        if linear.groups > 1:
            return [], "depthwise" if linear.depthwise else f"{linear.groups} groups"
        readers = len(facts.model.readers[linear.weight])
        if readers > 1:
            return [], f"its weight '{linear.weight}' is shared by {readers} readers"
        shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
        saving = slow = 0
        options = []
        dense = self.target.seconds(linear.convolution)
        for form in self.forms:
            if not FORMS[form].applies(shape) or not _expressible(linear, form):
                continue
            for rank in self.target.sizes(FORMS[form].max_rank(shape), step=self.step):
                steps = chain(linear, form, rank, linear.out_channels, linear.in_channels)
                if sum(s.weights for s in steps) >= linear.convolution.weights:
                    continue
                if sum(s.macs for s in steps) >= linear.convolution.macs:
                    continue
                saving += 1
                if self.step is None and self.target.chain_seconds(steps) * _PAYS > dense:
                    slow += 1
                    continue
                options.append(Option(self.name, linear.id, form, (rank,)))
        if options:
            return options, ""
        if slow:
            return (
                [],
                f"none of {saving} smaller forms is predicted faster on {self.target.name}",
            )
        return [], f"no rank on the grid makes {shape[0]}x{shape[1]} channels smaller"

    def fit(
        self, option: Option, kernel: Array, metric: PatchMetric | None, /
    ) -> tuple[Arrays, Array]:
        """Solve one option's factors in closed form.

        Args:
            option: Form and rank.
            kernel: Refitted dense kernel (m, c, *kernel_shape), float64.
            metric: Second moments of the node's input patches; None for the weights alone.

        Returns:
            The factors' kernels by name ("0", "1", ...), shape (out, in, *kernel_shape) each,
            and the dense kernel that equals their chain.
        """
        spatial = kernel.shape[2:]
        flat = kernel.reshape(*kernel.shape[:2], *_plane(spatial))
        found = FORMS[option.form].build(flat, metric, option.size[0])
        arrays = {
            str(index): factor.reshape(*factor.shape[:2], *_unplane(factor.shape[2:], spatial))
            for index, factor in enumerate(found.kernels)
        }
        return arrays, found.dense().reshape(kernel.shape)

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Replace the nodes of `chosen` by their chains."""
        for option, arrays in chosen.items():
            kernels = [arrays[str(index)] for index in range(len(arrays))]
            _replace(draft, option, kernels, facts.model.opset)


def kernel_shape4(linear: Linear, out_channels: int, in_channels: int) -> Shape:
    """Return the shape (m, c, kh, kw) under which a node's kernel is factorised."""
    return (out_channels, in_channels, *_plane(linear.kernel_shape))


def chain(
    linear: Linear, form: str, rank: int, out_channels: int, in_channels: int
) -> list[Convolution]:
    """Return the shapes of the chain that replaces a node at given widths."""
    shapes = FORMS[form].shapes(kernel_shape4(linear, out_channels, in_channels), rank)
    x, y = linear.in_extent, linear.out_extent
    steps, extent = [], x
    for index, (m, c, kh, kw) in enumerate(shapes):
        behind = _extent_behind(form, index, len(shapes), x, y)
        op = linear.node.op if kh * kw > 1 or linear.spatial == 1 else "Conv"
        size, count = (
            int(np.prod(extent, dtype=np.int64)),
            int(np.prod(behind, dtype=np.int64)),
        )
        steps.append(Convolution(c, m, kh * kw, count, size, 1, op))
        extent = behind
    return steps


def _extent_behind(
    form: str, index: int, count: int, x: tuple[int, ...], y: tuple[int, ...]
) -> tuple[int, ...]:
    if form == "spatial":
        return (y[0], x[1]) if index == 0 else y
    first_kernel = {"output_basis": 0, "input_basis": 1, "tucker2": 1}[form]
    return y if index >= min(first_kernel, count - 1) else x


def _plane(spatial: tuple[int, ...]) -> tuple[int, int]:
    """Return kernel extents as two; those of 1-D and 3-D kernels do not separate."""
    if len(spatial) == 2:
        return spatial[0], spatial[1]
    return int(np.prod(spatial, dtype=np.int64)), 1


def _unplane(plane: tuple[int, ...], spatial: tuple[int, ...]) -> tuple[int, ...]:
    if len(spatial) == 2:
        return plane
    return spatial if plane[0] > 1 else (1,) * len(spatial)


def _expressible(linear: Linear, form: str) -> bool:
    """Whether the chain can carry the node's padding."""
    attrs = linear.node.attrs
    implicit = "output_shape" in attrs or attrs.get("auto_pad", "NOTSET") != "NOTSET"
    return not (linear.node.op == "ConvTranspose" and form == "spatial" and implicit)


def _replace(draft: Draft, option: Option, kernels: list[Array], opset: int) -> None:
    node_id = option.target
    op, attrs, inputs = draft.op(node_id), draft.attributes(node_id), draft.inputs(node_id)
    dtype = draft.weights[inputs[1]].dtype
    draft.remove_node(node_id)
    tensor = inputs[0]
    for index, kernel in enumerate(kernels):
        last = index == len(kernels) - 1
        step_op, step_attrs = _step(op, attrs, option.form, index, kernel.shape[2:])
        if op == "Gemm" and not last and opset < _GEMM_WITHOUT_BIAS:
            step_op, step_attrs = "MatMul", {}
        stored = stored_as(step_op, step_attrs, kernel).astype(dtype)
        stem = f"{inputs[1]}_{option.form}{index}"
        names = [tensor, draft.add_weight(stem, stored)]
        if last:
            names += [name for name in inputs[2:3] if name]
        tensor = draft.add_node(
            step_op,
            names,
            stem=f"{node_id}_{option.form}{index}",
            outputs=[node_id] if last else None,
            attrs=step_attrs,
        )


def _step(
    op: str, attrs: Mapping[str, Any], form: str, index: int, kernel: tuple[int, ...]
) -> tuple[str, dict[str, Any]]:
    """Return operator and attributes of one node of a chain."""
    if op == "MatMul":
        return op, {}
    if op == "Gemm":
        return op, {key: value for key, value in attrs.items() if key == "transB"}
    if form == "spatial":
        axis = index
    elif all(k == 1 for k in kernel) and not _carries_window(form, index):
        return "Conv", {"kernel_shape": list(kernel)}
    else:
        axis = -1
    kept = {key: value for key, value in attrs.items() if key in ("auto_pad", "output_shape")}
    kept["kernel_shape"] = list(kernel)
    count = len(kernel)
    for key, neutral in (("strides", 1), ("dilations", 1), ("output_padding", 0)):
        if key in attrs:
            kept[key] = [v if axis in (-1, i) else neutral for i, v in enumerate(attrs[key])]
    if "pads" in attrs:
        kept["pads"] = [
            v if axis in (-1, i % count) else 0 for i, v in enumerate(attrs["pads"])
        ]
    return op, kept


def _carries_window(form: str, index: int) -> bool:
    """Whether step `index` carries strides and padding, also where the kernel is 1 x 1."""
    return index == {"output_basis": 0, "input_basis": 1, "tucker2": 1}[form]
