"""CompressCollaboratively: input channels and singular values go at one rate for all layers.

Li et al. 2021 (arXiv:2105.11228).  The paper's text was not at hand; units, losses, rates and
rounds follow the authors' code (see `numerics.collaborative`).  Gradients of the loss choose,
weights stay those of the original layer, which ends as one of

    untouched
    pruned               it reads fewer channels
    decomposed           k x k to the rank, then 1 x 1, the singular values' roots in both
    pruned_decomposed    both

Channels that every reader of a tensor drops go where they are made; in front of a layer that
drops others an index selection (Gather) stays.

In the common allocator the same units compete as `remove_channels` and as the output basis of
`factorize`, judged by the outputs on samples.  Gradients nominate nothing there: at the same
MACs and with the same refits the allocator's own choice keeps far more of ResNet-56's accuracy
(`python -m benchmarks collaborative`); a trained network's mean gradient is next to noise.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcomp.analysis.linear import kernel_of, stored_as
from onnxcomp.analysis.target import TARGETS, Target
from onnxcomp.deadline import Progress
from onnxcomp.errors import DataError, LimitError, ParameterError, UnsupportedModelError
from onnxcomp.numerics.collaborative import EXACT_UP_TO, Kept
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal
from onnxcomp.passes.chains import from_plane, to_plane
from onnxcomp.passes.channel_surgery import remove
from onnxcomp.passes.collaborative_layers import FORM, Index, Layers, dropped_by_all
from onnxcomp.passes.factorize import Factorize

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

_COSTS = ("macs", "seconds")


@dataclass(frozen=True)
class CompressCollaboratively:
    """Channel removal and low rank of all layers at one rate.

    Attributes:
        rate: Share of the whole network's cost that the layers lose, in (0, 1); where
            producers lose channels with their readers, more goes.
        gamma: Weight of the look-ahead in the order of the units, at least 0.
        exact_up_to: Rows or columns of a layer's matrix up to which the look-ahead is exact;
            larger ones take components of the round, which is faster.
        cost: "macs", or "seconds" as the target's latency model predicts them.
        per_cost: Layers lose at a common slope per unit of cost (least sum of losses), not at
            the code's common slope of curves.
        squared: Losses by the mean squared gradient instead of the squared mean gradient.
        reconstruct: Refit all layers on the compressed network's own inputs, and decompose
            none whose readers leave it too few outputs for that; what `search.collaboration`
            does, not `solve`.
        target: Profile of the latency model and of the grid.
        step: Channels and ranks are rounded up to multiples of it; None for the target's grid.
    """

    name: ClassVar[str] = "compress_collaboratively"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SAMPLES, Need.TORCH})

    rate: float = 0.5
    gamma: float = 0.9
    exact_up_to: int = EXACT_UP_TO
    cost: str = "macs"
    per_cost: bool = False
    squared: bool = False
    reconstruct: bool = False
    target: Target = TARGETS["x86-avx512"]
    step: int | None = 1

    def __post_init__(self) -> None:
        owner = "CompressCollaboratively"
        if not 0 < self.rate < 1:
            raise ParameterError.of(owner, "rate", "above 0 and below 1", self.rate)
        if not 0 <= self.gamma < math.inf:
            raise ParameterError.of(owner, "gamma", "at least 0", self.gamma)
        if self.cost not in _COSTS:
            raise ParameterError.choice(owner, "cost", _COSTS, self.cost)
        if self.step is not None and self.step < 1:
            raise ParameterError.of(owner, "step", "None or at least 1", self.step)

    def rounded(self, size: int, total: int) -> int:
        """Return the least size on the grid that is not below one, at most `total`."""
        if self.step is not None:
            return min(-(-size // self.step) * self.step, total)
        return min(s for s in (*self.target.sizes(total), total) if s >= size)

    def layers(
        self,
        facts: Analysis,
        excluded: frozenset[str] = frozenset(),
        progress: Progress = lambda *_: None,
    ) -> Layers:
        """Return the layers with gradients on the samples of `facts`, through the bridge.

        Args:
            facts: The model with its samples.
            excluded: Nodes that stay as they are.
            progress: Called with a label and the share done; what it raises ends the work.

        Raises:
            ParameterError: PyTorch is not installed.
            DataError: There are no samples, or their labels are no classes.
            UnsupportedModelError: The bridge cannot express a node.
        """
        if importlib.util.find_spec("torch") is None:
            raise ParameterError(
                f"{self.name}: PyTorch, for the gradients, is not installed; install it with: "
                "pip install 'onnxcomp[torch]'"
            )
        if facts.samples is None:
            raise DataError(
                f"{self.name}: gradients need samples; give some, best with labels"
            )
        from onnxcomp.bridge.gradients import mean_gradients  # of a layer above

        gradients = mean_gradients(
            facts.model,
            facts.samples,
            squared=self.squared,
            seed=facts.seed,
            threads=facts.threads,
            progress=progress,
        )
        return Layers(self, facts, gradients, excluded, progress)

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return what becomes of each layer at the rate, and refusals for all others.

        Raises:
            ParameterError: PyTorch is not installed.
            DataError: There are no samples, or their labels are no classes.
        """
        try:
            layers = self.layers(facts)
            kept = layers.at(self.rate)
        except (UnsupportedModelError, LimitError) as error:
            nodes = [*facts.linears, *facts.not_linear]
            return Proposal((), tuple(Refusal(node, str(error)) for node in nodes))
        options = tuple(self.option(layers, node, each) for node, each in kept.items())
        return Proposal(options, layers.refusals(kept))

    def solve(self, facts: Analysis, /) -> dict[Option, Arrays]:
        """Return all options at the rate with their arrays, from the original weights.

        Raises:
            ParameterError: PyTorch is not installed, or `reconstruct` is set.
            DataError: There are no samples, or their labels are no classes.
            UnsupportedModelError: The bridge cannot express a node.
            LimitError: The layers cannot lose so much.
        """
        if self.reconstruct:
            raise ParameterError(
                f"{self.name}: solve takes the original weights; for refits on samples call "
                "onnxcomp.search.collaboration.collaborate"
            )
        layers = self.layers(facts)
        kept = layers.at(self.rate)
        removed = layers.cut(kept)
        places = layers.places(kept, removed)
        return {
            self.option(layers, node, each): {
                **places[node],
                **original_factors(facts, node, each, removed),
            }
            for node, each in kept.items()
        }

    def option(self, layers: Layers, node: str, kept: Kept) -> Option:
        """Return the option that stands for what stays of a layer."""
        width = layers.members[node].linear.in_channels - len(kept.dropped)
        if kept.rank is None:
            return Option(self.name, node, "pruned", (width,))
        if not kept.dropped:
            return Option(self.name, node, "decomposed", (kept.rank,))
        return Option(self.name, node, "pruned_decomposed", (width, kept.rank))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Write the layers of `chosen`.

        Arrays of each option:

            read    positions of the node's input that stay in the tensor, ascending; the
                    others go where they are made
            kept    those of them that the node reads, ascending
            0, 1    kernels of the chain of a decomposed layer, at the channels that stay
        """
        gone = {
            option.target: np.delete(
                np.arange(facts.linears[option.target].in_channels), arrays["read"]
            )
            for option, arrays in chosen.items()
        }
        removed = dropped_by_all(facts.channels.groups, gone)
        if removed:
            remove(draft, facts.channels, removed)
        for option, arrays in chosen.items():
            self._write(draft, facts, option, arrays)

    def _write(self, draft: Draft, facts: Analysis, option: Option, arrays: Arrays) -> None:
        linear = facts.linears[option.target]
        op, attrs, node = linear.node.op, linear.node.attrs, option.target
        index = np.searchsorted(arrays["read"], arrays["kept"])
        if len(index) < len(arrays["read"]):
            stem = f"{node}_selected"
            places = draft.add_weight(f"{stem}_index", index.astype(np.int64))
            data = draft.inputs(node)[0]
            axis = {"axis": linear.x_axis}
            selected = draft.add_node("Gather", [data, places], stem=stem, attrs=axis)
            draft.set_input(node, 0, selected)
        if "0" in arrays:
            chain = Option(Factorize.name, node, FORM, (len(arrays["0"]),))
            kernels = {name: arrays[name] for name in ("0", "1")}
            Factorize().apply(draft, facts, {chain: kernels})
        elif len(index) < len(arrays["read"]):
            weight = draft.inputs(node)[1]
            kernel = kernel_of(op, attrs, draft.weights[weight])
            draft.set_weight(weight, stored_as(op, attrs, kernel[:, index]))


def original_factors(
    facts: Analysis, node: str, kept: Kept, removed: Mapping[str, Index]
) -> Arrays:
    """Return the chain of a decomposed layer from its own weights; nothing for others.

    Args:
        facts: The model.
        node: The layer.
        kept: What stays of it.
        removed: Channels of each group that go where they are made.
    """
    if kept.rank is None:
        return {}
    linear = facts.linears[node]
    kernel = linear.kernel(facts.model.weights[linear.weight])
    kernel = np.delete(kernel, kept.dropped, axis=1)
    first, last = FORMS[FORM].build(to_plane(kernel), None, kept.rank).kernels
    ids = facts.channels.axis_ids(linear.y, linear.y_axis)
    rows = slice(None) if ids is None else facts.channels.keeping(removed)[ids]
    plane = kernel.shape[2:]
    return {"0": from_plane(first, plane), "1": from_plane(last[rows], plane)}
