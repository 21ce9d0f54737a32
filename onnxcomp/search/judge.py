"""What a candidate lost on held-out samples, and what may be promised for new ones.

A network may have memorised its training images: a compressed ResNet-56 gets all of thousands
right while it loses points on new ones.  How far the raw outputs move does not depend on that,
so a promise on a metric counts it as well: points lost grow with the squared relative change e
of the outputs, and disagreement with its root.  Compressed ResNets on CIFAR-10 lost 0.1 to
0.43 e for e from 1 to 14 %, so 0.45 e is counted.  Disagreement is taken as 0.35 of the root:
it is the density of margins near zero, about a third for ResNet-20 on new images.

New pictures and recordings move the outputs further than samples held out of a few: of 16
networks compressed to a drift, 12 had up to 1.36 times that drift on new ones, 14 up to 1.73.
A promise is to hold nine times of ten, so that one on drift counts three quarters more than
the bound that was found; half more held 15 times of 18.

Outputs far from zero drift little even where they no longer answer to the input: a search
under a limit on drift also keeps three quarters of how they vary over the samples, in the mean
over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxcomp.evaluate import join_outputs, paired_outputs
from onnxcomp.metrics import Metric
from onnxcomp.model import Array, Model
from onnxcomp.runtime import Session
from onnxcomp.sample_rules import is_float
from onnxcomp.samples import Samples
from onnxcomp.search.settings import Limits

_POINTS_PER_CHANGE = 0.45
_DISAGREEMENT_PER_CHANGE = 0.35  # of its root
NEW_SOURCES = 1.75  # drift on samples from other sources, to that of those held out
_UNEXPLAINED = 0.25  # of the outputs' variance over samples, under a limit on drift
_CONSTANT = 1e-9  # share of an output's square; one that varies less does not vary
_GROUPS = 20  # of the delete-a-group jackknife
_MEMORISED = 0.995  # score of the original from which on hold-out samples look memorised
_BATCH = 32


@dataclass(frozen=True)
class Look:
    """What a candidate lost on the hold-out samples.

    Attributes:
        error: Squared change of the raw outputs relative to their variance.
        drift: Relative L2 of the worst output that new samples may show: three quarters more
            than the bound of one standard error.
        drop: Points of the metric that may be lost on new samples; None without a metric.
        score: Score of the original by the labels; None where there are none.
        unexplained: Squared change relative to the variance over samples, element by element;
            the mean over outputs, each at most 1.
    """

    error: float
    drift: float
    drop: float | None
    score: float | None
    unexplained: float = 0.0

    def within(self, limits: Limits) -> bool:
        """Whether the limits on drop and drift hold."""
        return self.strain(limits) <= 1.0

    def strain(self, limits: Limits) -> float:
        """Return the largest share of a limit that is used up, in terms of squared change."""
        shares = [0.0]
        if limits.drop is not None and self.drop is not None:
            shares.append(self.drop / limits.drop)
        if limits.drift is not None:
            shares += [(self.drift / limits.drift) ** 2, self.unexplained / _UNEXPLAINED]
        return max(shares)

    def drifts_little(self, limits: Limits) -> bool:
        """Whether the drift is within its limit, though too little of the variance is left."""
        drifts = limits.drift is not None and self.drift <= limits.drift
        return drifts and self.unexplained > _UNEXPLAINED


class Judge:
    """Compares candidates with the original on the hold-out samples.

    Args:
        original: The vendor's model.
        samples: Hold-out samples.
        metric: Figure of merit; needed for a limit on the drop.
        threads: Threads of every session.
    """

    def __init__(
        self, original: Model, samples: Samples, metric: Metric | None, *, threads: int
    ) -> None:
        self._original = original
        self._samples = samples
        self._metric = metric
        self._threads = threads

    def look(self, candidate: Model, error: float) -> Look:
        """Judge a candidate whose raw outputs moved by `error`."""
        models = (self._original, candidate)
        sessions = [Session(model, threads=self._threads) for model in models]
        inputs = self._original.signature.inputs
        compared: dict[str, _Compared] = {}
        runs = []
        for run in paired_outputs(sessions, inputs, self._samples, _BATCH):
            for name, reference in run[0].items():
                compared.setdefault(name, _Compared()).add(reference, run[1][name])
            if self._metric is not None:
                runs.append(run)
        drift = NEW_SOURCES * max(output.drift() for output in compared.values())
        shares = [each.unexplained() for each in compared.values() if not each.exact]
        look = Look(error, drift, None, None, float(np.mean(shares or [0.0])))
        if self._metric is None:
            return look
        original, changed = (join_outputs(column) for column in zip(*runs, strict=True))
        return self._scored(self._metric, look, original, changed)

    def _scored(
        self,
        metric: Metric,
        look: Look,
        original: Mapping[str, Array],
        changed: Mapping[str, Array],
    ) -> Look:
        samples = self._samples

        def scores(index: npt.NDArray[np.int64]) -> tuple[float, float]:
            before = {n: a[index] for n, a in original.items()}
            after = {n: a[index] for n, a in changed.items()}
            part = samples.take(index)
            return metric.score(before, part, before), metric.score(after, part, before)

        def drop(index: npt.NDArray[np.int64]) -> float:
            before, after = scores(index)
            return before - after

        every = np.arange(samples.count)
        spread = _jackknife(drop, samples.count)
        likely = 0.0
        if metric.against_original:
            likely = _DISAGREEMENT_PER_CHANGE * math.sqrt(look.error)
        elif metric.classes:
            likely = _POINTS_PER_CHANGE * look.error
        score = None if metric.against_original else scores(every)[0]
        return replace(look, drop=max(drop(every) + spread, likely), score=score)


def looks_memorised(look: Look) -> bool:
    """Whether the original is right on all but a few of the hold-out samples."""
    return look.score is not None and look.score >= _MEMORISED


class _Compared:
    """One output of the original and a candidate, batch by batch.

    Attributes:
        exact: Whether its type is no floating-point type, so that elements are equal or not.
    """

    def __init__(self) -> None:
        self.exact = False
        self._rows: list[Array] = []  # noise and signal per sample, each of shape (n, 2)
        self._sums: list[Array] = []  # over the samples of a batch

    def add(self, reference: Array, candidate: Array) -> None:
        """Take in a batch, sample axis first."""
        a, b = (x.reshape(len(x), -1) for x in (reference, candidate))
        self.exact = not is_float(a.dtype)
        if self.exact:
            noise, signal = np.count_nonzero(a != b, axis=1), np.full(len(a), a.shape[1])
        else:
            finite = np.isfinite(a)
            a = np.where(finite, a, 0).astype(np.float64)
            b = np.where(finite, b, 0).astype(np.float64)
            noise, signal = np.sum((a - b) ** 2, axis=1), np.sum(a**2, axis=1)
            self._sums.append(a.sum(axis=0))
        self._rows.append(np.stack([noise, signal], axis=1))

    def drift(self) -> float:
        """Return the drift, plus one standard error over the samples."""
        rows = np.concatenate(self._rows)

        def ratio(index: npt.NDArray[np.int64]) -> float:
            noise, signal = rows[index].sum(axis=0)
            if not noise:
                return 0.0
            return float(noise / signal) if signal else math.inf

        total = ratio(np.arange(len(rows)))
        if not math.isfinite(total):
            return math.inf
        bound = total + _jackknife(ratio, len(rows))
        return bound if self.exact else math.sqrt(bound)

    def unexplained(self) -> float:
        """Return the noise relative to the variance over samples, at most 1."""
        if len({part.shape for part in self._sums}) > 1:  # there is no mean of it
            return 0.0
        rows = np.concatenate(self._rows)
        noise, signal = rows.sum(axis=0)
        variance = signal - float(np.sum(np.sum(self._sums, axis=0) ** 2)) / len(rows)
        return min(float(noise / variance), 1.0) if variance > _CONSTANT * signal else 0.0


def _jackknife(statistic: Callable[[npt.NDArray[np.int64]], float], count: int) -> float:
    """Return the standard error of a statistic of samples, by deleting groups of them.

    One sample alone tells nothing of it, so that it is infinite then.
    """
    groups = min(count, _GROUPS)
    if groups < 2:
        return math.inf
    label = np.arange(count) % groups
    values = [statistic(np.flatnonzero(label != g)) for g in range(groups)]
    return _standard_error(values)


def _standard_error(values: Sequence[float]) -> float:
    spread = np.asarray(values) - np.mean(values)
    error = math.sqrt((len(values) - 1) / len(values) * float(spread @ spread))
    return error if math.isfinite(error) else math.inf
