"""What losses are measured on: the raw outputs of a model, and how far they move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Array, Model, extract
from onnxcomp.runtime import Session, TensorFact

_SHAPE_OPS = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_SQUASHING_OPS = ("Softmax", "LogSoftmax", "Sigmoid")
_FEWEST_CLASSES = 2
_VARYING_OPS = ("NonMaxSuppression", "NonZero", "Compress", "Unique")


def raw_outputs(model: Model, tensors: Mapping[str, TensorFact]) -> tuple[str, ...]:
    """Return the float tensors that the outputs show, in front of a final Softmax or Sigmoid.

    Outputs of other types (classes, indices) and outputs whose shape depends on values stand
    for the nearest float tensors of fixed shape that they are made of.
    """
    found: dict[str, None] = {}
    varying = _varying(model)
    wanted, seen = [value.name for value in reversed(model.signature.outputs)], set[str]()
    while wanted:
        name = wanted.pop()
        node = model.producers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if name not in tensors or tensors[name].dtype.kind != "f" or name in varying:
            if node.op not in ("Shape", "Size"):
                wanted += reversed([*node.inputs, *sorted(node.captured)])
            continue
        while node is not None and node.op in _SHAPE_OPS:
            node = model.producers.get(node.inputs[0])
        squashed = node is not None and node.op in _SQUASHING_OPS
        found[node.inputs[0] if squashed and node is not None else name] = None
    if not found:
        raise UnsupportedModelError("no output depends on computed floats; nothing to measure")
    return tuple(found)


def class_scores(model: Model, tensors: Mapping[str, TensorFact]) -> str | None:
    """Return the first raw output of shape (N, K), K >= 2, or with axes of length 1 as well.

    These mostly are scores of K classes.  None where there is no such output.
    """
    for name in raw_outputs(model, tensors):
        shape = tensors[name].shape[1:]
        if shape and max(shape) == math.prod(shape) >= _FEWEST_CLASSES:
            return name
    return None


def _varying(model: Model) -> set[str]:
    """Return the tensors whose shape may depend on values."""
    found: set[str] = set()
    for node in model.nodes:
        if node.op in _VARYING_OPS or not found.isdisjoint({*node.inputs, *node.captured}):
            found.update(node.outputs)
    return found - {""}


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
        return self.of(
            session.run({n: feed[n] for n in session.input_names}) for feed in feeds
        )


class OutputMeter:
    """The raw outputs of a working model on some batches, and how far other weights move them.

    Args:
        model: The working model.
        tensors: Its tensors.
        batches: Samples, one feed per batch.
        threads: Threads of every session.
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
        session = Session(Model(self._part.skeleton, own), threads=self._threads)
        for feed in self._batches:
            yield session.run({n: feed[n] for n in session.input_names})
