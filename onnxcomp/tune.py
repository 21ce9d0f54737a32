"""`tune`: a compressed model learns again from the original, on samples without labels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from onnxcomp.augmentation import augmented
from onnxcomp.errors import DataError, ParameterError, UnsupportedModelError
from onnxcomp.evaluate import join_outputs, paired_outputs
from onnxcomp.model import Array, Model, Value, extract
from onnxcomp.runtime import Session, capture_tensors
from onnxcomp.samples import Samples, as_samples
from onnxcomp.search.deadline import Deadline, Progress, TimeLimitReached
from onnxcomp.search.outputs import raw_outputs
from onnxcomp.search.store import Store, identity_of

if TYPE_CHECKING:
    from onnxcomp.bridge import GraphModule
    from onnxcomp.bridge.distillation import Distillation, Epoch, Training

_GATE_SAMPLES = 4  # on which torch must give what onnxruntime gives
_HALF_TOLERANCE = 1e-2  # relative L2 of graphs that onnxruntime computes in half precision
_ENOUGH = 4096  # samples above which no copies are made to learn from
_COPIES = 4  # most images made of one, itself included
_SHOWN = 4  # names in a message


@dataclass(frozen=True)
class TuneResult:
    """What `tune` returns.

    Attributes:
        model: The tuned model, which differs from the given one in values of initializers
            only; the given one where nothing did better.
        before: Loss of the given model on the samples held out: the squared change of the
            outputs over the teacher's variance, averaged over outputs.  With labels the cross
            entropy is added.  None where the run ended before it was known.
        after: That of `model`, at most `before`.
        history: The epochs, those of earlier runs that were resumed included.
        notes: What else is to be said, such as why training ended early.
        interrupted: Whether Ctrl-C ended it; the model is then the best so far.
    """

    model: Model
    before: float | None
    after: float | None
    history: tuple[Epoch, ...]
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def improved(self) -> bool:
        """Whether the model is another one than was given."""
        return self.before is not None and self.after is not None and self.after < self.before


def tune(
    model: Model,
    teacher: Model,
    data: Samples | Mapping[str, Any] | Iterable[Any],
    *,
    epochs: int = 20,
    labels: bool = False,
    device: str = "cpu",
    batch: int = 32,
    learning_rate: float = 1e-4,
    keep_zeros: bool = True,
    augment: bool = True,
    seed: int = 0,
    threads: int = 1,
    time_limit: float | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Train a compressed model to give what the original gives, as its outputs tell.

    A quarter of the samples is held out; the result is never worse on them than the model
    given.  Shared initializers stay one, BatchNormalization's statistics as they are.

    Args:
        model: The compressed model; it is not changed.
        teacher: The original, with the same inputs and outputs.
        data: At least two samples; labels are read with `labels` only.
        epochs: Passes over the samples, at least 1; a resumed run keeps its number.
        labels: Learn from the labels too: classes of the output of class scores.
        device: "cpu" or "cuda".
        batch: Samples per step, at least 1.
        learning_rate: That of AdamW at its highest, > 0.
        keep_zeros: Keep exact zeros where a kernel or matrix has more than 1 % of them.
        augment: Learn from light copies of few images too; they count for epochs.
        seed: Seed of the split, of the copies and of the order of the samples.
        threads: Threads of torch and of onnxruntime, at least 1.
        time_limit: Seconds after which training stops.
        resume: Folder of the state, from which a run of the same arguments goes on.
        progress: Called with a label and the share of the phase that is done.

    Raises:
        ParameterError: PyTorch or the device is missing, a setting is outside its range, or
            teacher and model differ in inputs or outputs.
        UnsupportedModelError: The bridge cannot express a node, or nothing can be trained.
        ValidationError: Torch does not give what onnxruntime gives.
        DataError: The samples or labels do not fit.
    """
    _check_torch()
    from onnxcomp.bridge.distillation import Training, torch_threads

    deadline = Deadline(time_limit)
    training = Training(epochs, batch, learning_rate, keep_zeros=keep_zeros, seed=seed)
    with torch_threads(threads), threadpool_limits(threads):
        run = _Run(model, teacher, data, training, labels, augment, device, threads)
        return run.result(resume, deadline, progress or (lambda *_: None))


def _check_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise ParameterError(
            "tune: PyTorch is not installed; install it with: pip install 'onnxcomp[torch]'"
        )


class _Run:
    """One run of `tune`: its phases, in order."""

    def __init__(
        self,
        model: Model,
        teacher: Model,
        data: Any,
        training: Training,
        labels: bool,
        augment: bool,
        device: str,
        threads: int,
    ) -> None:
        from onnxcomp.bridge import check_equal, to_torch
        from onnxcomp.bridge.distillation import check_device
        from onnxcomp.bridge.equality import TOLERANCE

        check_device(device)
        check_signatures(model, teacher)
        samples = as_samples(data, model.signature.inputs)
        if labels and samples.labels is None:
            raise DataError("tune: the data have no 'labels' to train on; leave labels out")
        self._identity = identity_of(
            model, samples, "tune", training, labels, augment, device, teacher.digest
        )
        self._model, self._teacher = model, teacher
        self._training, self._device, self._threads = training, device, threads
        self._module: GraphModule = to_torch(model)
        fit, self._held = samples.split(training.seed)
        self._fit = _with_copies(fit, model, training.seed) if augment else fit
        self._copies = self._fit.count - fit.count
        self._few = self._held.take(range(min(_GATE_SAMPLES, self._held.count)))
        self._tolerance = _HALF_TOLERANCE if _is_half(model) else TOLERANCE
        check_equal(self._module, model, self._few, tolerance=self._tolerance)
        self._pairs = _paired(model, teacher, self._few)
        self._classes = None
        if labels and samples.labels is not None:
            self._classes = _class_scores(model, self._few, samples.labels)
        self._distillation: Distillation | None = None

    def result(
        self, resume: str | Path | None, deadline: Deadline, progress: Progress
    ) -> TuneResult:
        """Train and write the weights back, whatever ends the training."""
        store = Store(None if resume is None else Path(resume), self._identity)
        notes, interrupted = [], False
        if self._copies:
            known = self._fit.count - self._copies
            notes.append(
                f"learns from {known} samples and {self._copies} light copies of them"
            )
        try:
            self._distillation = self._prepared(deadline, progress)
            state = store.get("tune", "state")
            if state is not None:
                self._distillation.restore(state)
            self._distillation.run(
                late=lambda: deadline.passed,
                progress=progress,
                save=lambda found: store.put("tune", "state", found),
            )
        except TimeLimitReached:
            notes.append("the time limit was reached before training began")
        except KeyboardInterrupt:
            notes.append("interrupted; this is the best so far")
            interrupted = True
        if self._distillation is None:
            return TuneResult(self._model, None, None, (), tuple(notes), interrupted)
        return self._written(self._distillation, notes, interrupted)

    def _prepared(self, deadline: Deadline, progress: Progress) -> Distillation:
        """Compute what the teacher gives, and set the training up."""
        from onnxcomp.bridge.distillation import Distillation
        from onnxcomp.bridge.objective import Examples, Objective

        fit, held = (
            Examples(part, self._targets(part, label, deadline, progress))
            for part, label in ((self._fit, "fit"), (self._held, "hold-out"))
        )
        objective = Objective(
            self._model, self._module, fit, self._training.batch, self._classes
        )
        self._module.to(self._device)
        return Distillation(self._module, objective, fit, held, self._training)

    def _targets(
        self, samples: Samples, label: str, deadline: Deadline, progress: Progress
    ) -> dict[str, Array]:
        """Return the teacher's values by the student's tensors, samples first."""
        part = extract(self._teacher, (), list(dict.fromkeys(self._pairs.values())))
        session = Session(part, threads=self._threads)
        read = [v for v in self._teacher.signature.inputs if v.name in session.input_names]
        used = Samples({value.name: samples.arrays[value.name] for value in read})
        runs: list[dict[str, Array]] = []
        done = 0
        for (outputs,) in paired_outputs([session], read, used, self._training.batch):
            progress(f"teacher: {label} samples", done / used.count)
            deadline.check()
            runs.append(outputs)
            done += len(next(iter(outputs.values())))
        found = join_outputs(runs)
        for name, array in found.items():
            if len(array) != used.count:
                raise UnsupportedModelError(
                    f"teacher: '{name}' has {len(array)} rows for {used.count} samples; tune "
                    "needs one per sample"
                )
            if not np.all(np.isfinite(array)):
                raise DataError(f"teacher: '{name}' is NaN or infinite on the {label} samples")
        return {mine: found[its].astype(np.float32) for mine, its in self._pairs.items()}

    def _written(
        self, distillation: Distillation, notes: list[str], interrupted: bool
    ) -> TuneResult:
        """Return the best weights in the graph, if they are better there too."""
        from onnxcomp.bridge import check_equal, from_torch, to_torch
        from onnxcomp.bridge.distillation import holding

        if distillation.ended:
            notes.append(distillation.ended)
        before, history = distillation.before, tuple(distillation.history)
        if distillation.best is not None:
            with holding(self._module, distillation.best):
                tuned = from_torch(self._module, like=self._model)
            written = to_torch(tuned)  # its half-precision weights are rounded
            check_equal(written, tuned, self._few, tolerance=self._tolerance)
            after = distillation.loss_of(written.to(self._device))
            if after < before:
                return TuneResult(tuned, before, after, history, tuple(notes), interrupted)
        notes.append("nothing did better on the samples held out; the model stays as it was")
        return TuneResult(self._model, before, before, history, tuple(notes), interrupted)


def _with_copies(samples: Samples, model: Model, seed: int) -> Samples:
    """Return samples with light copies behind them, where they are few images."""
    count = min(_COPIES * samples.count, max(samples.count, _ENOUGH))
    found = augmented(samples, model.signature.inputs, count, seed=seed).samples
    if samples.labels is None or found.count == samples.count:
        return found
    return replace(found, labels=samples.labels[np.arange(count) % samples.count])


def check_signatures(model: Model, teacher: Model) -> None:
    """Check that a model takes and gives what its teacher does.

    Raises:
        ParameterError: Inputs or outputs differ.
    """
    for what in ("inputs", "outputs"):
        mine = getattr(model.signature, what)
        its = getattr(teacher.signature, what)
        same = len(mine) == len(its) and all(map(_alike, mine, its))
        if not same:
            raise ParameterError(
                f"tune: {what} of the model are {_shown(mine)}, of the teacher {_shown(its)}; "
                "give the original that the model was made from"
            )


def _alike(mine: Value, its: Value) -> bool:
    """Whether two declarations agree but for the batch and what one leaves open."""
    if (mine.name, mine.dtype) != (its.name, its.dtype):
        return False
    if mine.shape is None or its.shape is None:
        return True
    pairs = zip(mine.shape[1:], its.shape[1:], strict=False)
    fixed = ((a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return len(mine.shape) == len(its.shape) and all(a == b for a, b in fixed)


def _shown(values: Sequence[Value]) -> str:
    few = ", ".join(f"'{v.name}' {v.dtype}{list(v.shape or ())}" for v in values[:_SHOWN])
    return few + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")


def _paired(model: Model, teacher: Model, samples: Samples) -> dict[str, str]:
    """Return the teacher's tensor for each tensor of the model that is compared.

    These are the raw outputs, in front of Softmax and Sigmoid; where those of the two graphs
    do not match one by one, the float outputs as they are.
    """
    mine, its = (_raw_kinds(part, samples) for part in (model, teacher))
    if list(mine.values()) == list(its.values()):
        return dict(zip(mine, its, strict=True))
    names = [v.name for v in model.signature.outputs if v.dtype.kind == "f"]
    if not names:
        raise UnsupportedModelError("no output is of floats; there is nothing to learn from")
    return {name: name for name in names}


def _raw_kinds(model: Model, samples: Samples) -> dict[str, object]:
    """Return shape and place of every raw output: an output's name, or what reads it."""
    facts = capture_tensors(model, next(samples.batches(model.signature.inputs, 1)).feed)
    kinds: dict[str, object] = {}
    for name in raw_outputs(model, facts):
        readers = tuple(sorted(use.node.op for use in model.readers.get(name, ())))
        place = name if name in model.output_names else readers
        kinds[name] = (facts[name].shape, place)
    return kinds


def _class_scores(model: Model, samples: Samples, labels: Array) -> str:
    """Return the tensor of class scores, in front of Softmax, that fits the labels."""
    from onnxcomp.bridge.objective import check_labels

    facts = capture_tensors(model, next(samples.batches(model.signature.inputs, 1)).feed)
    for name in raw_outputs(model, facts):
        shape = facts[name].shape
        if len(shape) >= 2 and max(shape[1:]) == math.prod(shape[1:]) >= 2:
            check_labels(labels, max(shape[1:]))
            return name
    raise DataError("tune: no output is class scores of shape (N, K); leave labels out")


def _is_half(model: Model) -> bool:
    return any(a.dtype.name in ("float16", "bfloat16") for a in model.weights.values())
