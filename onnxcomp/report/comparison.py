"""What `compare` found, as data: two models side by side, and the gates of a deployment."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import probe_feeds
from onnxcomp.bench import Benchmark, paired_latency
from onnxcomp.errors import LimitError, ParameterError
from onnxcomp.evaluate import Evaluation
from onnxcomp.metrics import Metric
from onnxcomp.model import Model
from onnxcomp.report import SCHEMA_VERSION, Figures
from onnxcomp.samples import Samples
from onnxcomp.validation import validate

_LATENCY_SECONDS = 20.0


@dataclass(frozen=True)
class Gate:
    """One condition on the candidate.

    Attributes:
        flag: The flag that asks for it, such as "--max-drift".
        limit: What was asked for.
        found: What was measured.
        met: Whether it holds.
    """

    flag: str
    limit: float
    found: float
    met: bool


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the original.

    Attributes:
        schema_version: Version of this layout in JSON.
        original: The original in numbers.
        candidate: The candidate in numbers.
        evaluation: Drift and metric on the samples.
        benchmark: Paired latency of the two.
        gates: The conditions that were asked for.
        notes: What the reader must know first.
    """

    schema_version: int
    original: Figures
    candidate: Figures
    evaluation: Evaluation
    benchmark: Benchmark
    gates: tuple[Gate, ...]
    notes: tuple[str, ...]

    def raise_if_failed(self) -> None:
        """Raise `LimitError` naming every gate that is not met."""
        failed = [
            f"{gate.flag} {gate.limit:g}: found {gate.found:.4g}"
            for gate in self.gates
            if not gate.met
        ]
        if failed:
            raise LimitError(f"gate not met: {'; '.join(failed)}")


def compare_models(
    original: Model,
    candidate: Model,
    samples: Samples | None,
    *,
    metric: Metric | None = None,
    max_drop: float | None = None,
    max_drift: float | None = None,
    min_speedup: float | None = None,
) -> Comparison:
    """Compare a candidate with the original and judge it by the gates that are given.

    Args:
        original: The original.
        candidate: The candidate.
        samples: The user's samples; random inputs are used, and noted, where it is None.
        metric: Metric to report; needed for `max_drop`.
        max_drop: Most points of the metric that may be lost (1 % = 0.01).
        max_drift: Largest relative L2 of any output.
        min_speedup: Least ratio of the original's time to the candidate's.

    Raises:
        ParameterError: A drop is limited without a metric.
        ValidationError: The candidate failed the validation ladder.
    """
    if max_drop is not None and metric is None:
        raise ParameterError("compare_models: 'max_drop' needs a metric")
    ladder = validate(original, candidate, samples, metric=metric, allow_larger=True)
    ladder.raise_if_failed()
    evaluation = ladder.evaluation
    assert evaluation is not None  # a ladder that passed has evaluated
    feed = probe_feeds(original, samples)
    benchmark = paired_latency([original, candidate], feed, time_limit_s=_LATENCY_SECONDS)
    speedup = benchmark.models[1].ratio.value
    gates = (
        _at_most("--max-drop", max_drop, evaluation.drop),
        _at_most("--max-drift", max_drift, evaluation.relative_l2),
        None
        if min_speedup is None
        else Gate("--min-speedup", min_speedup, speedup, speedup >= min_speedup),
    )
    return Comparison(
        schema_version=SCHEMA_VERSION,
        original=Figures.of(Analysis(original, samples), benchmark, 0),
        candidate=Figures.of(Analysis(candidate, samples), benchmark, 1),
        evaluation=evaluation,
        benchmark=benchmark,
        gates=tuple(gate for gate in gates if gate is not None),
        notes=(ladder.note, *benchmark.warnings),
    )


def _at_most(flag: str, limit: float | None, found: float | None) -> Gate | None:
    if limit is None or found is None:
        return None
    return Gate(flag, limit, found, found <= limit)
