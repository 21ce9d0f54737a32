"""What a compressed model costs: predictions, drift of its outputs, and a metric."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.drift import Drift, DriftMeter, drift
from onnxcomp.errors import ExecutionError, UnsupportedModelError, ValidationError
from onnxcomp.metrics import Metric
from onnxcomp.model import Array, Model
from onnxcomp.runtime import Session
from onnxcomp.sample_rules import InputSpec
from onnxcomp.samples import Batch, Samples

_PROBE_TOLERANCE = 1e-4
_log = logging.getLogger(__name__)


def predict(
    model: Model,
    samples: Samples,
    *,
    threads: int = 1,
    batch: int = 32,
    optimize: bool = True,
) -> dict[str, Array]:
    """Run a model on all samples.

    Where the model leaves the batch size open, a probe decides: outputs of the first two
    samples together must equal those of two single runs, else samples are run one at a time.

    Args:
        model: The model.
        samples: Samples for all its inputs.
        threads: Intra-op threads.
        batch: Samples per run where the model allows it.
        optimize: Run as deployed, or as written.

    Returns:
        Outputs by name, of shape (samples, ...).  An output without a batch axis of the right
        length is stacked: (runs, *shape).

    Raises:
        UnsupportedModelError: An output is no tensor, or its shape depends on the data.
        ExecutionError: Onnxruntime cannot load or run the model.
        DataError: The samples do not fit the inputs.
    """
    sessions = [Session(model, optimize=optimize, threads=threads)]
    return join_outputs(
        [run[0] for run in paired_outputs(sessions, model.signature.inputs, samples, batch)]
    )


def paired_outputs(
    sessions: Sequence[Session], inputs: Sequence[InputSpec], samples: Samples, batch: int
) -> Iterator[tuple[dict[str, Array], ...]]:
    """Yield the outputs of all sessions on the same feeds, sample axis first."""
    size = usable_batch(sessions, inputs, samples, batch)
    for part in samples.batches(inputs, size):
        yield tuple(_samples_first(session.run(part.feed), part) for session in sessions)


def usable_batch(
    sessions: Sequence[Session], inputs: Sequence[InputSpec], samples: Samples, batch: int
) -> int:
    """Return the batch size to run samples with: `batch`, or 1 where samples would mix.

    Where the model leaves the batch size open, outputs of the first two samples together must
    equal those of two single runs in all `sessions`.
    """
    two = samples.take([0, min(1, samples.count - 1)])
    pair, single = next(two.batches(inputs, 2)), next(two.batches(inputs, 1))
    if batch == 1 or pair.rows != 2 or single.rows != 1:
        return batch
    for session in sessions:
        alone = [session.run(part.feed) for part in two.batches(inputs, 1)]
        try:
            together = session.run(pair.feed)
        except ExecutionError as error:
            _log.info("samples are run one at a time: %s", error)
            return 1
        for name, array in together.items():
            if not _equal(array, [run[name] for run in alone]):
                _log.info("samples are run one at a time: '%s' mixes them", name)
                return 1
    return batch


def _equal(together: Array, alone: Sequence[Array]) -> bool:
    if together.ndim == 0 or any(array.shape != together[:1].shape for array in alone):
        return False
    joined = np.concatenate(alone)
    if joined.shape != together.shape:
        return False
    try:
        return drift({"": joined}, {"": together})[""].relative_l2 <= _PROBE_TOLERANCE
    except ValidationError:
        return False


def _samples_first(outputs: Mapping[str, Array], part: Batch) -> dict[str, Array]:
    rows = (part.rows or 1,)
    for name, array in outputs.items():
        if not isinstance(array, np.ndarray):
            raise UnsupportedModelError(f"output '{name}' is no tensor")
    return {n: part.trim(a) if a.shape[:1] == rows else a[None] for n, a in outputs.items()}


def join_outputs(runs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the outputs of all samples, from those of every run, samples first.

    Raises:
        UnsupportedModelError: The shape of an output depends on the data.
    """
    joined = {}
    for name in runs[0]:
        column = [run[name] for run in runs]
        shapes = sorted({array.shape[1:] for array in column})
        if len(shapes) > 1:
            raise UnsupportedModelError(
                f"output '{name}': its shape depends on the data, such as {shapes[:2]}"
            )
        joined[name] = np.concatenate(column)
    return joined


@dataclass(frozen=True)
class Evaluation:
    """What a candidate lost against the reference.

    Attributes:
        drift: Drift by output.
        relative_l2: That of the worst output.
        metric: Name of the metric, or None.
        metric_reference: Metric of the reference.
        metric_candidate: Metric of the candidate.
        drop: Their difference, in absolute points (1 % = 0.01); negative = better.
        samples: Number of samples.
        origin: "user", "random" or "inverted".
    """

    drift: Mapping[str, Drift]
    relative_l2: float
    metric: str | None
    metric_reference: float | None
    metric_candidate: float | None
    drop: float | None
    samples: int
    origin: str


def evaluate(
    reference: Model,
    candidate: Model,
    samples: Samples,
    *,
    metric: Metric | None = None,
    threads: int = 1,
    batch: int = 32,
) -> Evaluation:
    """Compare two models on the same samples, both optimised by onnxruntime as deployed.

    Raises:
        ValidationError: Shapes differ, or the candidate is NaN or infinite where the reference
            is finite.
        ExecutionError: Onnxruntime cannot load or run one of them.
        DataError: Samples or labels do not fit.
    """
    sessions = [Session(model, threads=threads) for model in (reference, candidate)]
    return compare_sessions(sessions, reference.signature.inputs, samples, metric, batch)


def compare_sessions(
    sessions: Sequence[Session],
    inputs: Sequence[InputSpec],
    samples: Samples,
    metric: Metric | None,
    batch: int,
) -> Evaluation:
    """Do what `evaluate` does, on sessions that are open: the reference, the candidate."""
    meter, runs = DriftMeter(), []
    for run in paired_outputs(sessions, inputs, samples, batch):
        meter.update(*run)
        if metric is not None:
            runs.append(run)
    found = meter.result()
    worst = max(drift.relative_l2 for drift in found.values())
    count, origin = samples.count, samples.origin
    if metric is None:
        return Evaluation(found, worst, None, None, None, None, count, origin)
    original, changed = (join_outputs(column) for column in zip(*runs, strict=True))
    before = metric.score(original, samples, original)
    after = metric.score(changed, samples, original)
    drop = before - after
    return Evaluation(found, worst, metric.name, before, after, drop, count, origin)
