"""Facts about one model: derived once, cached, never stale, because models do not change."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from onnxcomp.analysis.probe import probe_feeds
from onnxcomp.model import Array, Model
from onnxcomp.runtime import TensorFact, capture_tensors
from onnxcomp.samples import Samples


class Analysis:
    """Everything that passes and search ask about a model.

    Args:
        model: The model.
        samples: Inputs of the user; where there are none, random ones probe the shapes.
        seed: Seed of everything that is drawn at random.
        threads: Threads of every onnxruntime session.
    """

    def __init__(
        self, model: Model, samples: Samples | None = None, *, seed: int = 0, threads: int = 1
    ) -> None:
        self.model = model
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
