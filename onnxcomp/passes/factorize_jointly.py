"""FactorizeJointly: layers at the same place of repeated blocks take common factors.

Each node becomes a chain as under `factorize`, of which one initializer, or a part of one, is
stored once for the whole group (LJSVD, RJSVD and Bi-JSVD of Chen et al. 2023,
arXiv:2107.04386, and their counterparts in the metric of the inputs).  That saves parameters
and bytes; MACs and time are those of the chain.

    *_first        the first convolution is common ("spatial_first" is LJSVD)
    *_last         the last one is common ("spatial_last" is RJSVD)
    *_both         a part of each is common, joined by Concat ("spatial_both" is Bi-JSVD)
    tucker2_outer  the outer two of three are common
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcomp.analysis.linear import Linear, out_axis, stored_as
from onnxcomp.analysis.target import TARGETS, Convolution, Target
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array
from onnxcomp.numerics.interpolation import log_spaced
from onnxcomp.numerics.joint_svd import JOINT_FORMS, Joint, Member
from onnxcomp.numerics.svd import tucker_ranks
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal
from onnxcomp.passes.chains import (
    Shape,
    Step,
    chain_steps,
    convolutions,
    expressible,
    from_plane,
    kernel_shape4,
    reason_to_stay,
    write_chain,
)
from onnxcomp.passes.joint_groups import (
    Group,
    PaperRule,
    by_name,
    repeated_groups,
)

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

_RANKS = 6  # of every form and group, evenly spaced on a logarithmic scale


@dataclass(frozen=True)
class FactorizeJointly:
    """Factorisation of repeated layers with common factors.

    Attributes:
        forms: Which forms to propose, names of `numerics.joint_svd.JOINT_FORMS`.
        target: Profile whose grid the ranks follow and whose latency model judges options.
        step: Multiples of this instead of the grid, without the judgement; 1 frees all ranks.
        slower: Propose also what is predicted to be slower than the layers now.
        paper: Groups, forms and ranks of the paper instead of all there are.
        materialize: Write every node's whole kernels instead of joining their common and
            private parts at run time, for runtimes that want constant weights.
    """

    name: ClassVar[str] = "factorize_jointly"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    forms: tuple[str, ...] = tuple(JOINT_FORMS)
    target: Target = TARGETS["x86-avx512"]
    step: int | None = None
    slower: bool = False
    paper: PaperRule | None = None
    materialize: bool = False

    def __post_init__(self) -> None:
        for form in self.forms:
            if form not in JOINT_FORMS:
                raise ParameterError.choice("FactorizeJointly", "forms", JOINT_FORMS, form)
        if self.step is not None and self.step < 1:
            raise ParameterError.of(
                "FactorizeJointly", "step", "None or at least 1", self.step
            )

    def groups(self, facts: Analysis) -> Mapping[str, Group]:
        """Return the groups by the names that options use."""
        found = repeated_groups(facts) if self.paper is None else self.paper.groups(facts)
        return by_name(found)

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return the forms and ranks of every group, and refusals for all other nodes."""
        options: list[Option] = []
        refusals = [Refusal(node, reason) for node, reason in facts.not_linear.items()]
        grouped: set[str] = set()
        for group in self.groups(facts).values():
            linears = [facts.linears[node] for node in group.members]
            found = self._paper_options(group, linears) or self._options(group, linears)
            options += found
            grouped.update(group.members if found else ())
        for linear in facts.linears.values():
            if linear.id not in grouped:
                reason = reason_to_stay(facts, linear) or self._reason(facts, linear)
                refusals.append(Refusal(linear.id, reason))
        return Proposal(tuple(options), tuple(refusals))

    def _reason(self, facts: Analysis, linear: Linear) -> str:
        if self.paper is not None:
            return "the paper leaves it dense"
        if any(linear.id in repetition.members for repetition in facts.repetitions):
            return "no form with common factors makes its group smaller and not slower"
        return "no other layer of its shape is at the same place of a repeated block"

    def _paper_options(self, group: Group, linears: Sequence[Linear]) -> list[Option]:
        if self.paper is None:
            return []
        form, ranks = self.paper.choice([_shape(linear) for linear in linears])
        return [Option(self.name, group.name, form, ranks)]

    def _options(self, group: Group, linears: Sequence[Linear]) -> list[Option]:
        shape, found = _shape(linears[0]), []
        dense = sum(linear.convolution.weights for linear in linears)
        macs = sum(linear.convolution.macs for linear in linears)
        seconds = self.target.chain_seconds([linear.convolution for linear in linears])
        for form in self.forms:
            kind = JOINT_FORMS[form]
            if not kind.applies(shape) or not all(expressible(n, kind.base) for n in linears):
                continue
            for ranks in self._ranks(form, shape):
                option = Option(self.name, group.name, form, ranks)
                weights = shared_weights(option, shape)
                weights += len(linears) * private_weights(option, shape)
                steps = [s for n in linears for s in chain(n, option, *shape[:2])]
                if weights >= dense or sum(s.macs for s in steps) >= macs:
                    continue
                slow = self.target.chain_seconds(steps) > seconds
                if not slow or self.slower or self.step is not None:
                    found.append(option)
        return found

    def _ranks(self, form: str, shape: Shape) -> list[tuple[int, ...]]:
        """Return the ranks to propose, few and evenly spaced."""
        kind = JOINT_FORMS[form]
        sizes = self.target.sizes(kind.max_rank(shape), step=self.step)
        sizes = tuple(sizes[i] for i in log_spaced(sizes, _RANKS))
        if kind.shares == "outer":
            return [tucker_ranks(size, shape[1], shape[0]) for size in sizes]
        if kind.shares == "both":
            return [(size - size // 2, size // 2) for size in sizes if size > 1]
        return [(size,) for size in sizes]

    def fit(
        self, option: Option, members: Sequence[Member], /, *, rounds: int | None = None
    ) -> Joint:
        """Solve one option's factors, common and private ones.

        Args:
            option: Form and ranks.
            members: Kernel (m, c, kh, kw) and metric of every node of the group, in order.
            rounds: Of alternation; None for the default of the form.
        """
        split = "even" if self.paper is None else "first"
        return JOINT_FORMS[option.form].build(members, option.size, rounds=rounds, split=split)

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Replace the nodes of the chosen groups by chains with common initializers."""
        groups = self.groups(facts)
        for option, arrays in chosen.items():
            writer = _Writer(draft, option, arrays, self.materialize, facts.model.opset)
            for node in groups[option.target].members:
                writer.write(facts.linears[node])


def arrays_of(joint: Joint, members: Sequence[str]) -> Arrays:
    """Return factors by name: "1" is common, "1 of NODE" belongs to a node."""
    found = {str(i): part for i, part in enumerate(joint.shared) if part is not None}
    for node, parts in zip(members, joint.private, strict=True):
        for i, part in enumerate(parts):
            if part is not None:
                found[f"{i} of {node}"] = part
    return found


class _Writer:
    """Writes the chains of one group; common initializers are made with the first."""

    def __init__(
        self, draft: Draft, option: Option, arrays: Arrays, materialize: bool, opset: int
    ) -> None:
        self._draft = draft
        self._option = option
        self._arrays = arrays
        self._materialize = materialize
        self._opset = opset
        self._common: dict[int, str] = {}

    def write(self, linear: Linear) -> None:
        """Replace one node."""
        draft, form = self._draft, self._option.form
        count = len(JOINT_FORMS[form].private_shapes(_shape(linear), self._option.size))
        parts = [self._parts(linear, index) for index in range(count)]
        kernels = [
            np.concatenate(part, axis=0 if index == 0 else 1)
            for index, part in enumerate(parts)
        ]
        steps = chain_steps(draft, linear.id, JOINT_FORMS[form].base, kernels, self._opset)
        names = [
            self._weight(linear, index, step, kernel)
            for index, (step, kernel) in enumerate(zip(steps, kernels, strict=True))
        ]
        write_chain(draft, linear.id, form, steps, names)

    def _parts(self, linear: Linear, index: int) -> list[Array]:
        """Return the parts of a kernel in the order in which the chain joins them."""
        common, own = self._pair(linear, index)
        ordered = (own, common) if index == 0 else (common, own)
        return [from_plane(p, linear.kernel_shape) for p in ordered if p is not None]

    def _pair(self, linear: Linear, index: int) -> tuple[Array | None, Array | None]:
        return self._arrays.get(str(index)), self._arrays.get(f"{index} of {linear.id}")

    def _weight(self, linear: Linear, index: int, step: Step, kernel: Array) -> str:
        """Return the tensor that a node of the chain reads as its weight."""
        draft, form = self._draft, self._option.form
        weight = draft.inputs(linear.id)[1]
        stem = f"{weight}_{form}{index}"
        common, own = self._pair(linear, index)
        if common is None or (own is not None and self._materialize):
            return draft.add_weight(stem, stored_as(*step, kernel).astype(linear.dtype))
        if index not in self._common:
            whole = from_plane(common, linear.kernel_shape)
            stored = stored_as(*step, whole).astype(linear.dtype)
            self._common[index] = draft.add_weight(f"{stem}_common", stored)
        if own is None:
            return self._common[index]
        private = from_plane(own, linear.kernel_shape)
        mine = draft.add_weight(stem, stored_as(*step, private).astype(linear.dtype))
        first = index == 0
        names = [mine, self._common[index]] if first else [self._common[index], mine]
        axis = out_axis(*step) if first else 1 - out_axis(*step)
        return draft.add_node("Concat", names, stem=f"{stem}_joined", attrs={"axis": axis})


def chain(
    linear: Linear, option: Option, out_channels: int, in_channels: int
) -> list[Convolution]:
    """Return the shapes of the chain that replaces a member at given widths."""
    kind = JOINT_FORMS[option.form]
    shape = kernel_shape4(linear, out_channels, in_channels)
    shapes = []
    pairs = zip(
        kind.shared_shapes(shape, option.size),
        kind.private_shapes(shape, option.size),
        strict=True,
    )
    for index, (common, own) in enumerate(pairs):
        m, c, kh, kw = next(s for s in (own, common) if s is not None)
        if common is not None and own is not None:
            m, c = (m + common[0], c) if index == 0 else (m, c + common[1])
        shapes.append((m, c, kh, kw))
    return convolutions(linear, kind.base, shapes)


def possible(option: Option, shape: Shape) -> bool:
    """Whether a member of this shape can take an option's ranks, and be smaller for it."""
    kind = JOINT_FORMS[option.form]
    if kind.shares == "outer":
        q, p = option.size
        return q <= shape[1] and p <= shape[0]
    return sum(option.size) < kind.max_rank(shape)


def shared_weights(option: Option, shape: Shape) -> int:
    """Return the weights that a group stores once."""
    return _count(JOINT_FORMS[option.form].shared_shapes(shape, option.size))


def private_weights(option: Option, shape: Shape) -> int:
    """Return the weights that every member of a group stores."""
    return _count(JOINT_FORMS[option.form].private_shapes(shape, option.size))


def _count(shapes: Sequence[Shape | None]) -> int:
    return sum(int(np.prod(s, dtype=np.int64)) for s in shapes if s is not None)


def _shape(linear: Linear) -> Shape:
    return kernel_shape4(linear, linear.out_channels, linear.in_channels)
