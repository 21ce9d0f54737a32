"""How far the raw outputs of a model move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from onnxcomp.analysis.outputs import raw_outputs
from onnxcomp.model import Array, Model, extract
from onnxcomp.runtime import Session, TensorFact, capture_tensors


class OutputError:
    """Mean over outputs of the squared change relative to the output's variance."""

    def __init__(self, reference: Sequence[Mapping[str, Array]]) -> None:
        self._reference = reference
        self._scale = {}
        for name in reference[0]:
            values = np.concatenate([np.ravel(batch[name]) for batch in reference])
            self._scale[name] = float(np.var(values, dtype=np.float64)) * values.size

    def of(self, outputs: Iterable[Mapping[str, Array]]) -> float:
        """Return the error of outputs given batch by batch.

        Infinite where one of them is, or has another shape than in the reference.
        """
        sums = dict.fromkeys(self._scale, 0.0)
        for mine, reference in zip(outputs, self._reference, strict=True):
            for name in sums:
                if mine[name].shape != reference[name].shape:
                    return np.inf
                change = np.subtract(mine[name], reference[name], dtype=np.float64)
                sums[name] += float(np.vdot(change, change))
        ratios = [s / self._scale[n] if self._scale[n] else s for n, s in sums.items()]
        error = float(np.mean(ratios))
        return error if np.isfinite(error) else np.inf

    def of_runs(self, session: Session, feeds: Iterable[Mapping[str, Array]]) -> float:
        """Return the error of a session that is run on feeds, which may hold more."""
        return self.of(session.run_each(feeds))


class OutputMeter:
    """The raw outputs of a working model on some batches, and how far other weights move them.

    Args:
        model: The working model.
        tensors: Its tensors.
        batches: Samples, one feed per batch.
        threads: Batches that are run at once.
    """

    def __init__(
        self,
        model: Model,
        tensors: Mapping[str, TensorFact],
        batches: Sequence[Mapping[str, Array]],
        *,
        threads: int,
    ) -> None:
        self._part = extract(model, (), raw_outputs(model, tensors))
        self._batches = batches
        self._threads = threads
        self.error = OutputError(list(self._run({})))

    def of(self, weights: Mapping[str, Array]) -> float:
        """Return the error with some weights of the model replaced by others."""
        return self.error.of(self._run(weights))

    def _run(self, weights: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        own = {name: weights.get(name, array) for name, array in self._part.weights.items()}
        part = Model(self._part.skeleton, own)
        session = Session(part, at_once=self._threads, arena=False)
        return session.run_each(self._batches)


def raw_runs(
    model: Model, batches: Sequence[Mapping[str, Array]], *, threads: int
) -> Iterator[dict[str, Array]]:
    """Yield the raw outputs by their number, as their names may differ between models.

    Args:
        model: The model.
        batches: Samples, one feed per batch.
        threads: Batches that are run at once.
    """
    names = raw_outputs(model, capture_tensors(model, batches[0]))
    session = Session(extract(model, (), names), at_once=threads, arena=False)
    for found in session.run_each(batches):
        yield {str(index): found[name] for index, name in enumerate(names)}
