"""The validation ladder: what is checked before a model is shipped, rung by rung."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx

from onnxcomp.analysis.probe import random_inputs
from onnxcomp.drift import drift
from onnxcomp.errors import ExecutionError, ValidationError
from onnxcomp.evaluate import Evaluation, compare_sessions
from onnxcomp.metrics import Metric
from onnxcomp.model import Array, Model
from onnxcomp.outline import outline
from onnxcomp.runtime import Session
from onnxcomp.sample_rules import dims, show
from onnxcomp.samples import Batch, Samples

_RANDOM_COUNT = 8
_BATCHES = (1, 2, 3)
_SCALES = ((2.0, 2.0), (0.5, 0.5), (1.0, 2.0))  # of the open axes: all but the last, the last
_CHECKER_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    ValueError,
    RuntimeError,
)


@dataclass(frozen=True)
class Rung:
    """One check of the ladder: what it found, or why it failed."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Ladder:
    """Result of `validate`.

    Attributes:
        note: What to say first: whether the inputs were the user's.
        rungs: The checks in order, up to the first that failed.
        evaluation: Drift and metric; None where a rung before them failed.
    """

    note: str
    rungs: tuple[Rung, ...]
    evaluation: Evaluation | None

    @property
    def passed(self) -> bool:
        """Whether no rung failed."""
        return all(rung.passed for rung in self.rungs)

    def raise_if_failed(self) -> None:
        """Raise `ValidationError` with the rung that failed and its reason."""
        for rung in self.rungs:
            if not rung.passed:
                raise ValidationError(f"validation failed at '{rung.name}': {rung.detail}")


def validate(
    original: Model,
    candidate: Model,
    samples: Samples | None,
    *,
    path: Path | None = None,
    metric: Metric | None = None,
    threads: int = 1,
    batch: int = 32,
    allow_larger: bool = False,
    seed: int = 0,
) -> Ladder:
    """Check a candidate rung by rung and stop at the first that fails.

    Args:
        original: The vendor's model.
        candidate: The model to ship; for a written file, as it was read back.
        samples: The user's samples; random ones are made, and noted, where there are none.
        path: The written file, whose size counts with its external data; without it, the
            size that `candidate` would have.
        metric: Metric to report.
        threads: Intra-op threads.
        batch: Samples per run where the models allow it.
        allow_larger: Let a candidate pass that is larger than the original's file.
        seed: Seed of the random inputs.

    Raises:
        ExecutionError: Onnxruntime cannot load or run the original.
        DataError: The samples do not fit.
        UnsupportedModelError: No random input suits the original.
    """
    climb = _Climb(original, candidate, samples, threads, seed)
    steps: Sequence[tuple[str, Callable[[], str]]] = (
        ("structure", lambda: climb.sound(onnx.checker.check_model)),
        ("strict shapes", lambda: climb.sound(_infer_strictly)),
        ("signature", climb.signature),
        ("load", climb.load),
        ("execution", climb.execution),
        ("finite outputs", lambda: climb.finite_outputs(metric, batch)),
        ("drift", climb.drift),
        ("size", lambda: climb.size(path, allow_larger)),
    )
    rungs: list[Rung] = []
    for name, step in steps:
        try:
            rungs.append(Rung(name, True, step()))
        except (ValidationError, ExecutionError) as error:
            rungs.append(Rung(name, False, str(error)))
            break
    return Ladder(climb.note, tuple(rungs), climb.evaluation)


class _Climb:
    """The rungs: each method returns what it found, or raises why the candidate failed."""

    evaluation: Evaluation | None = None
    _loaded: Session

    def __init__(
        self,
        original: Model,
        candidate: Model,
        samples: Samples | None,
        threads: int,
        seed: int,
    ) -> None:
        self._original, self._candidate, self._threads = original, candidate, threads
        self._inputs = original.signature.inputs
        self._session = Session(original, threads=threads)
        if samples is None:
            samples = random_inputs(original, _RANDOM_COUNT, seed=seed)
        self._samples = samples
        # An original that cannot run is no fault of the candidate: this raises.
        self._session.run(self._part(1).feed)
        self._runs: list[tuple[str, dict[str, Array], dict[str, Array]]] = []
        self.note = f"judged on {self._samples.count} samples"
        if self._samples.origin == "random":
            self.note = (
                f"judged on {self._samples.count} random inputs, which say little about real "
                "data; give samples"
            )

    def sound(self, examine: Callable[[onnx.ModelProto], object]) -> str:
        reason = _failure(examine, self._candidate)
        if reason is None:
            return "sound"
        if _failure(examine, self._original) is None:
            raise ValidationError(reason)
        return f"fails, as the original does: {reason}"

    def signature(self) -> str:
        before, after = self._original.signature, self._candidate.signature
        for side in ("inputs", "outputs"):
            for old, new in zip_longest(getattr(before, side), getattr(after, side)):
                if old != new:
                    raise ValidationError(f"{side}: found {new}, the original has {old}")
        return f"{len(before.inputs)} inputs, {len(before.outputs)} outputs as in the original"

    def load(self) -> str:
        self._loaded = Session(self._candidate, threads=self._threads)
        return "onnxruntime loads it, optimised"

    def execution(self) -> str:
        skipped = []
        for feed in self._feeds():
            shapes = ", ".join(f"{name} {show(array.shape)}" for name, array in feed.items())
            try:
                before = self._session.run(feed)
            except ExecutionError:
                skipped.append(shapes)
                continue
            try:
                after = self._loaded.run(feed)
            except ExecutionError as error:
                raise ValidationError(
                    f"on {shapes}, where the original runs: {error}"
                ) from error
            for name, array in before.items():
                if np.shape(after[name]) != np.shape(array):
                    raise ValidationError(
                        f"on {shapes}: output '{name}' has shape {np.shape(after[name])}, the "
                        f"original's {np.shape(array)}"
                    )
            self._runs.append((shapes, before, after))
        left_out = f"; the original itself cannot run {'; '.join(skipped)}" if skipped else ""
        return f"same shapes on {'; '.join(run[0] for run in self._runs)}{left_out}"

    def finite_outputs(self, metric: Metric | None, batch: int) -> str:
        for shapes, before, after in self._runs:
            try:
                drift(before, after)
            except ValidationError as error:
                raise ValidationError(f"on {shapes}: {error}") from error
        sessions = (self._session, self._loaded)
        self.evaluation = compare_sessions(
            sessions, self._inputs, self._samples, metric, batch
        )
        return f"all outputs of {self._samples.count} samples"

    def drift(self) -> str:
        assert self.evaluation is not None  # the rung before this one made it
        found = self.evaluation.drift
        worst = max(found, key=lambda name: found[name].relative_l2)
        return f"relative L2 {found[worst].relative_l2:.3g} (worst output: '{worst}')"

    def size(self, path: Path | None, allow_larger: bool) -> str:
        before = self._original.file_bytes
        after = self._candidate.file_bytes if path is None else _bytes_on_disk(path)
        detail = f"{after:,} bytes, the original has {before:,}"
        if after > before and not allow_larger:
            raise ValidationError(f"larger than the input: {detail}")
        return detail

    def _part(self, size: int) -> Batch:
        chosen = self._samples.take(np.arange(size) % self._samples.count)
        return next(chosen.batches(self._inputs, size))

    def _feeds(self) -> Iterator[dict[str, Array]]:
        """Yield feeds of several batch sizes and, where axes are open, other lengths."""
        parts = {size: self._part(size) for size in _BATCHES}
        yield from (p.feed for size, p in parts.items() if size == 1 or p.rows == size)
        first = parts[1].feed
        for scale in _SCALES:
            feed = {v.name: _scaled(first[v.name], dims(v), scale) for v in self._inputs}
            if any(feed[name].shape != array.shape for name, array in first.items()):
                yield feed


def _scaled(
    array: Array, declared: tuple[int | str | None, ...], scale: tuple[float, float]
) -> Array:
    """Repeat or cut an array along its open axes behind the first."""
    axes = [n for n in range(1, array.ndim) if not isinstance(declared[n], int)]
    for axis in axes:
        length = array.shape[axis]
        wanted = math.ceil(length * scale[axis == axes[-1]])
        array = np.take(array, np.arange(wanted) % max(length, 1), axis=axis)
    return array


def _failure(examine: Callable[[onnx.ModelProto], object], model: Model) -> str | None:
    try:
        examine(outline(model.skeleton, model.weights))
    except _CHECKER_ERRORS as error:
        return " ".join(str(error).split())
    return None


def _infer_strictly(proto: onnx.ModelProto) -> None:
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)


def _bytes_on_disk(path: Path) -> int:
    external = path.with_name(path.name + ".data")
    return path.stat().st_size + (external.stat().st_size if external.exists() else 0)
