"""PruneWeights: single weights of linear nodes become zero; shapes stay as they are.

    magnitude      the smallest go (Marino et al. 2021, arXiv:2108.12704)
    second_order   those go whose loss the others take over best, which are adjusted

Zeros make a packed file smaller, nothing else: no runtime here is faster for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxcomp.errors import ParameterError
from onnxcomp.model import Array
from onnxcomp.numerics.moments import Moments, RowMoments
from onnxcomp.numerics.pruning import kept_above, prune_compensated, prune_smallest
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

FORMS = ("magnitude", "second_order")
PERCENTILES = (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 96.0, 97.0, 98.0, 99.0)


@dataclass(frozen=True)
class PruneWeights:
    """Unstructured pruning; an option's size is the number of weights that stay.

    Attributes:
        forms: "magnitude", "second_order" or both.
        percentiles: Shares of every weight that go, in percent; by default the paper's.
    """

    name: ClassVar[str] = "prune_weights"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    forms: tuple[str, ...] = FORMS
    percentiles: tuple[float, ...] = PERCENTILES

    def __post_init__(self) -> None:
        for form in self.forms:
            if form not in FORMS:
                raise ParameterError.choice("PruneWeights", "forms", FORMS, form)
        for percentile in self.percentiles:
            if not 0 < percentile < 100:
                owner, allowed = "PruneWeights", "numbers between 0 and 100"
                raise ParameterError.of(owner, "percentiles", allowed, percentile)

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return how many weights of every node may stay, and refusals for other nodes."""
        options: dict[Option, None] = {}
        refusals = [Refusal(node, reason) for node, reason in facts.not_linear.items()]
        for linear in facts.linears.values():
            if reason := facts.shared_weight(linear):
                refusals.append(Refusal(linear.id, reason))
                continue
            kernel = linear.kernel(facts.model.weights[linear.weight])
            kept = kept_above(kernel, self.percentiles)
            options |= {
                Option(self.name, linear.id, form, (count,)): None
                for form in self.forms
                for count in kept
            }
        return Proposal(tuple(options), tuple(refusals))

    def fit(
        self, option: Option, kernel: Array, metrics: Sequence[Moments | RowMoments], /
    ) -> tuple[Arrays, Array]:
        """Return the pruned kernel, as the array to apply and as it is.

        Args:
            option: Form and number of weights that stay.
            kernel: Kernel (m, c / groups, *kernel_shape), float64.
            metrics: Moments of each group's inputs; not used by "magnitude".
        """
        if option.form == "magnitude":
            found = prune_smallest(kernel, option.size[0])
        else:
            grouped = kernel.reshape(len(metrics), len(kernel) // len(metrics), -1)
            found = prune_compensated(grouped, metrics, option.size[0]).reshape(kernel.shape)
        return {"kernel": found}, found

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Write the arrays' "kernel" of every node."""
        for option, arrays in chosen.items():
            linear = facts.linears[option.target]
            draft.set_weight(linear.weight, linear.stored(arrays["kernel"]))
