"""Factorize: one linear node becomes a chain of two or three of lower rank.

    output_basis   k x k to r channels, then 1 x 1   (plain SVD of 1 x 1, Gemm and MatMul)
    input_basis    1 x 1 to r channels, then k x k
    spatial        kh x 1 to r channels, then 1 x kw
    tucker2        1 x 1 to q, k x k to p, 1 x 1

The factors come from `numerics.svd`, from the weights alone or in the metric of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxcomp.analysis.linear import Linear, stored_as
from onnxcomp.analysis.target import TARGETS, Convolution, Target
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array
from onnxcomp.numerics.factorization import PatchMetric
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, node_proposal
from onnxcomp.passes.chains import (
    chain_steps,
    convolutions,
    expressible,
    from_plane,
    kernel_shape4,
    reason_to_stay,
    to_plane,
    write_chain,
)

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

_PAYS = 1.05  # an option must be predicted at least so much faster than what it replaces


@dataclass(frozen=True)
class Factorize:
    """Low-rank factorisation of single linear nodes.

    Attributes:
        forms: Which forms to propose, names of `numerics.svd.FORMS`.
        target: Profile whose grid the ranks follow and whose latency model judges options.
        step: Multiples of this instead of the grid, without the judgement; 1 frees all ranks.
        shares: Shares of the full rank; only the ranks next to them are proposed, without the
            judgement.  All ranks if there are none.
    """

    name: ClassVar[str] = "factorize"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    forms: tuple[str, ...] = tuple(FORMS)
    target: Target = TARGETS["x86-avx512"]
    step: int | None = None
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for form in self.forms:
            if form not in FORMS:
                raise ParameterError.choice("Factorize", "forms", FORMS, form)
        if self.step is not None and self.step < 1:
            raise ParameterError.of("Factorize", "step", "None or at least 1", self.step)
        for share in self.shares:
            if not 0 < share < 1:
                raise ParameterError.of("Factorize", "shares", "above 0, below 1", share)

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return every form and rank that saves parameters, and refusals for other nodes."""
        return node_proposal(facts, self._options)

    def _options(self, facts: Analysis, linear: Linear) -> tuple[list[Option], str]:
        if reason := reason_to_stay(facts, linear):
            return [], reason
        shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
        saving = slow = 0
        options = []
        dense = self.target.seconds(linear.convolution)
        for form in self.forms:
            for rank in self._ranks(full_rank(linear, form)):
                steps = chain(linear, form, rank, linear.out_channels, linear.in_channels)
                if sum(s.weights for s in steps) >= linear.convolution.weights:
                    continue
                if sum(s.macs for s in steps) >= linear.convolution.macs:
                    continue
                saving += 1
                judged = self.step is None and not self.shares
                if judged and self.target.chain_seconds(steps) * _PAYS > dense:
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

    def _ranks(self, full: int) -> tuple[int, ...]:
        """Return the ranks to propose of those below the full one."""
        ranks = self.target.sizes(full, step=self.step)
        if not (self.shares and ranks):
            return ranks
        near = {min(ranks, key=lambda r: abs(r - share * full)) for share in self.shares}
        return tuple(sorted(near))

    def chain(
        self, option: Option, linear: Linear, out_channels: int, in_channels: int
    ) -> list[Convolution]:
        """Return the shapes of the chain that replaces a node at given widths."""
        return chain(linear, option.form, option.size[0], out_channels, in_channels)

    def possible(
        self, option: Option, linear: Linear, out_channels: int, in_channels: int
    ) -> bool:
        """Whether an option's rank is possible at given widths."""
        shape = kernel_shape4(linear, out_channels, in_channels)
        return option.size[0] < FORMS[option.form].max_rank(shape)

    def errors(
        self, options: Sequence[Option], kernel: Array, metric: PatchMetric | None, /
    ) -> dict[Option, float]:
        """Return the squared error of the node's output under each option, or a bound."""
        found: dict[Option, float] = {}
        for form in dict.fromkeys(option.form for option in options):
            ranks = {option: option.size[0] for option in options if option.form == form}
            curve = FORMS[form].errors(to_plane(kernel), metric, max(ranks.values()))
            found |= {option: float(curve[rank]) for option, rank in ranks.items()}
        return found

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
        found = FORMS[option.form].build(to_plane(kernel), metric, option.size[0])
        arrays = {
            str(index): from_plane(factor, kernel.shape[2:])
            for index, factor in enumerate(found.kernels)
        }
        return arrays, found.dense().reshape(kernel.shape)

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Replace the nodes of `chosen` by their chains."""
        for option, arrays in chosen.items():
            node, form = option.target, option.form
            kernels = [arrays[str(index)] for index in range(len(arrays))]
            weight = draft.inputs(node)[1]
            dtype = draft.weights[weight].dtype
            steps = chain_steps(draft, node, form, kernels, facts.model.opset)
            names = [
                draft.add_weight(
                    f"{weight}_{form}{index}", stored_as(*step, kernel).astype(dtype)
                )
                for index, (step, kernel) in enumerate(zip(steps, kernels, strict=True))
            ]
            write_chain(draft, node, form, steps, names)


def full_rank(linear: Linear, form: str) -> int:
    """Return the rank at which a form is exact; 0 where a node cannot take it."""
    shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
    possible = FORMS[form].applies(shape) and expressible(linear, form)
    return FORMS[form].max_rank(shape) if possible else 0


def chain(
    linear: Linear, form: str, rank: int, out_channels: int, in_channels: int
) -> list[Convolution]:
    """Return the shapes of the chain that replaces a node at given widths."""
    shapes = FORMS[form].shapes(kernel_shape4(linear, out_channels, in_channels), rank)
    return convolutions(linear, form, shapes)
