"""Facts about one model: derived once, cached, never stale, because models do not change."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from onnxcomp.analysis.blocks import Block, Repetition, find_blocks, find_repetitions
from onnxcomp.analysis.channels import Channels, find_channels
from onnxcomp.analysis.cost import Cost, node_costs, total_cost
from onnxcomp.analysis.functions import inlined
from onnxcomp.analysis.linear import Linear, find_linears
from onnxcomp.analysis.ownership import Owner, find_owners
from onnxcomp.analysis.probe import probe_feeds
from onnxcomp.model import Array, Model
from onnxcomp.runtime import TensorFact, capture_tensors
from onnxcomp.samples import Samples


class Analysis:
    """Everything that passes and search ask about a model, its local functions inlined.

    Args:
        model: The model, which stays as `source`; `model` is the one without functions.
        samples: Inputs of the user; where there are none, random ones probe the shapes.
        seed: Seed of everything that is drawn at random.
        threads: Batches that are worked on at once.
    """

    def __init__(
        self, model: Model, samples: Samples | None = None, *, seed: int = 0, threads: int = 1
    ) -> None:
        self.source = model
        self.model = inlined(model)
        self.samples = samples
        self.seed = seed
        self.threads = threads

    @cached_property
    def feeds(self) -> Mapping[str, Array]:
        """One feed on which the model runs: the first sample, or random values."""
        return probe_feeds(self.model, self.samples, seed=self.seed)

    @cached_property
    def tensors(self) -> Mapping[str, TensorFact]:
        """Dtype and shape of every tensor, from one run on `feeds`."""
        return capture_tensors(self.model, self.feeds)

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """The linear nodes by id, in file order."""
        return {linear.id: linear for linear in self._linears[0]}

    @property
    def not_linear(self) -> Mapping[str, str]:
        """Why a Conv, ConvTranspose, Gemm, MatMul or call is not treated as a linear node."""
        return self._linears[1]

    @cached_property
    def _linears(self) -> tuple[tuple[Linear, ...], dict[str, str]]:
        return find_linears(self.model, self.tensors)

    @cached_property
    def costs(self) -> Mapping[str, Cost]:
        """Parameters, MACs and bytes of every node."""
        return node_costs(self.model, self.tensors, self.linears)

    @cached_property
    def cost(self) -> Cost:
        """Parameters, MACs and bytes of the whole model."""
        return total_cost(self.costs)

    @cached_property
    def channels(self) -> Channels:
        """Which channels vanish together, and which must stay and why."""
        return find_channels(self.model, self.tensors)

    @cached_property
    def owners(self) -> Mapping[str, tuple[Owner, ...]]:
        """Every reader of every initializer."""
        return find_owners(self.model)

    def shared_weight(self, linear: Linear) -> str:
        """Return that a linear node's weight has other readers as well, or ""."""
        readers = len(self.model.readers[linear.weight])
        return f"its weight '{linear.weight}' is shared by {readers} readers" * (readers > 1)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks, with their stages."""
        return find_blocks(self.model, self.linears, self.tensors)

    @cached_property
    def repetitions(self) -> tuple[Repetition, ...]:
        """Layers of equal shape at the same place of repeated blocks."""
        return find_repetitions(self.model, self.linears, self.blocks)
