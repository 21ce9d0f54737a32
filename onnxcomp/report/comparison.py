"""What `compare` found, as data: two models side by side, and the gates of a deployment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcomp.errors import LimitError

if TYPE_CHECKING:
    from onnxcomp.bench import Benchmark
    from onnxcomp.evaluate import Evaluation
    from onnxcomp.report import Figures


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


def judge(
    evaluation: Evaluation,
    benchmark: Benchmark,
    *,
    max_drop: float | None = None,
    max_drift: float | None = None,
    min_speedup: float | None = None,
) -> tuple[Gate, ...]:
    """Return the gates that were asked for.

    Args:
        evaluation: Drift and metric of the candidate.
        benchmark: Latency of original and candidate.
        max_drop: Most points of the metric that may be lost (1 % = 0.01).
        max_drift: Largest relative L2 of any output.
        min_speedup: Least ratio of the original's time to the candidate's.

    Raises:
        ValueError: A drop is asked for, but no metric was evaluated.
    """
    gates = []
    if max_drop is not None:
        if evaluation.drop is None:
            raise ValueError("judge: 'max_drop' needs an evaluation with a metric")
        gates.append(
            Gate("--max-drop", max_drop, evaluation.drop, evaluation.drop <= max_drop)
        )
    if max_drift is not None:
        drift = evaluation.relative_l2
        gates.append(Gate("--max-drift", max_drift, drift, drift <= max_drift))
    if min_speedup is not None:
        ratio = benchmark.models[1].ratio.value
        gates.append(Gate("--min-speedup", min_speedup, ratio, ratio >= min_speedup))
    return tuple(gates)
