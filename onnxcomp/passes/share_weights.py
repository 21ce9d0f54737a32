"""ShareWeights: the weights of linear nodes take few values; shapes stay as they are.

The quantizers are those of Marino et al. 2021 (arXiv:2108.12704): cws, pws, uq, ecsq.  Few
values make a packed file smaller, nothing else.  Under a limit on such a file the search
chooses a uniform grid per node itself (`search.storage`), with error compensation; these
options are the published methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array
from onnxcomp.numerics.quantizers import QUANTIZERS, channel_scales, share
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

SCOPES = ("node", "channel", "unified")
LEVELS = (2, 16, 32, 64, 128, 256)
CONVOLUTIONS, DENSE = "all convolutions", "all dense nodes"


@dataclass(frozen=True)
class ShareWeights:
    """Weight sharing; an option's size is the number of values besides zero.

    Attributes:
        quantizers: Names of `numerics.quantizers.QUANTIZERS`.
        levels: Numbers of values; by default the paper's.
        scope: "node": a codebook per node.  "channel": the same after every output channel
            was divided by its deviation; a packed file holds the products, as many values as
            channels times levels, so that this is for comparisons of error.
            "unified": one codebook for all convolutions and one for all dense nodes.
        seed: Of the probabilistic quantizer.
    """

    name: ClassVar[str] = "share_weights"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    quantizers: tuple[str, ...] = tuple(QUANTIZERS)
    levels: tuple[int, ...] = LEVELS
    scope: str = "node"
    seed: int = 0

    def __post_init__(self) -> None:
        for quantizer in self.quantizers:
            if quantizer not in QUANTIZERS:
                owner = "ShareWeights"
                raise ParameterError.choice(owner, "quantizers", QUANTIZERS, quantizer)
        for level in self.levels:
            if level < 2:
                raise ParameterError.of("ShareWeights", "levels", "at least 2", level)
        if self.scope not in SCOPES:
            raise ParameterError.choice("ShareWeights", "scope", SCOPES, self.scope)

    def members(self, facts: Analysis) -> Mapping[str, list[Linear]]:
        """Return the nodes behind every target: one each, or all of a kind."""
        own = [x for x in facts.linears.values() if len(facts.model.readers[x.weight]) == 1]
        if self.scope != "unified":
            return {linear.id: [linear] for linear in own}
        found: dict[str, list[Linear]] = {}
        for linear in own:
            found.setdefault(CONVOLUTIONS if linear.kernel_shape else DENSE, []).append(linear)
        return found

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return the quantizers and levels of every target, and refusals for other nodes."""
        refusals = [Refusal(node, reason) for node, reason in facts.not_linear.items()]
        for linear in facts.linears.values():
            if reason := facts.shared_weight(linear):
                refusals.append(Refusal(linear.id, reason))
        options = [
            Option(self.name, target, quantizer, (levels,))
            for target in self.members(facts)
            for quantizer in self.quantizers
            for levels in self.levels
        ]
        return Proposal(tuple(options), tuple(refusals))

    def fit(self, option: Option, kernels: Mapping[str, Array], /) -> Arrays:
        """Return the kernels of an option's nodes with few values, by node; zeros stay zero.

        Args:
            option: Quantizer and number of values.
            kernels: Kernels (m, c / groups, *kernel_shape) of `members`, float64, by node.
        """
        ones = {node: np.ones(1) for node in kernels}
        scales = (
            ones
            if self.scope != "channel"
            else {node: channel_scales(kernel) for node, kernel in kernels.items()}
        )
        scaled = [kernel / scales[node] for node, kernel in kernels.items()]
        shared = share(scaled, option.form, option.size[0], seed=self.seed)
        return {n: s.dense * scales[n] for n, s in zip(kernels, shared, strict=True)}

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Write the kernels that the arrays hold, by node."""
        for arrays in chosen.values():
            for node, kernel in arrays.items():
                linear = facts.linears[node]
                draft.set_weight(linear.weight, linear.stored(kernel))
