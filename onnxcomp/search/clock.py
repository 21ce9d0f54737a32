"""What a candidate takes of the original's time, measured here or predicted for elsewhere."""

from __future__ import annotations

from functools import cached_property

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import ARCHITECTURES, Target
from onnxcomp.bench import Benchmark, describe_machine, paired_latency
from onnxcomp.deadline import Deadline
from onnxcomp.model import Model
from onnxcomp.samples import Samples

_SECONDS = 8.0  # of a measurement that a limit on the time asks for
_LEAST_SECONDS = 0.5  # however little time is left


class Clock:
    """The time of candidates as a share of the original's.

    Where the target is another machine than this one, its latency model predicts the share
    from convolutions and matrix products; what is measured here says nothing of it.

    Args:
        original: The vendor's model.
        samples: The first of them is what sessions run on.
        target: Whose time counts.
        threads: Intra-op threads.
        deadline: Measurements that are asked for by limits are cut short towards it.
    """

    def __init__(
        self,
        original: Model,
        samples: Samples,
        target: Target,
        *,
        threads: int,
        deadline: Deadline,
    ) -> None:
        self._original = original
        self._samples = samples
        self._target = target
        self._threads = threads
        self._deadline = deadline

    @cached_property
    def elsewhere(self) -> str:
        """The target and this machine, where they are known to differ, else ""."""
        here, known = describe_machine(), self._target.calibration
        if known is not None:
            same, there = known.cpu == here.cpu, f"{known.cpu} ({known.architecture})"
        else:
            there = self._target.name
            same = ARCHITECTURES.get(there, here.architecture) == here.architecture
        return "" if same else f"{there}, and this is {here.cpu} ({here.architecture})"

    def __call__(self, model: Model) -> float:
        """Return a model's share of the original's time."""
        if self.elsewhere:
            return self._predicted(model) / max(self._whole, 1e-30)
        found = self.measured(self._original, model, seconds=self._seconds)
        return 1.0 / found.models[1].ratio.value

    def share(self, limit: float | None) -> float | None:
        """Return a limit, microseconds where above 1, as a share of the original's time."""
        if limit is None or limit <= 1:
            return limit
        if self.elsewhere:
            return limit / max(1e6 * self._whole, 1e-30)
        alone = self.measured(self._original, seconds=self._seconds)
        return limit / (1e3 * alone.models[0].median_ms)

    def measured(self, *models: Model, seconds: float) -> Benchmark:
        """Measure models side by side, against the first of them, for some seconds."""
        batches = self._samples.batches(self._original.signature.inputs, 1)
        return paired_latency(
            models, next(iter(batches)).feed, threads=self._threads, time_limit_s=seconds
        )

    @property
    def _seconds(self) -> float:
        return min(_SECONDS, max(self._deadline.left, _LEAST_SECONDS))

    def _predicted(self, model: Model) -> float:
        linears = Analysis(model, self._samples).linears.values()
        return self._target.chain_seconds([linear.convolution for linear in linears])

    @cached_property
    def _whole(self) -> float:
        return self._predicted(self._original)
