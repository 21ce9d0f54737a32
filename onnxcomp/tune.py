"""`tune`: a compressed model learns again from the original, on samples without labels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from onnxcomp.analysis.outputs import class_scores
from onnxcomp.errors import DataError, ParameterError, ValidationError
from onnxcomp.model import Model
from onnxcomp.runtime import capture_tensors
from onnxcomp.samples import Samples, as_samples
from onnxcomp.search.deadline import Deadline, Progress, TimeLimitReached
from onnxcomp.search.store import Store, identity_of
from onnxcomp.teaching import AUGMENTATIONS, Course, Teacher, check_signatures

if TYPE_CHECKING:
    from onnxcomp.bridge import GraphModule
    from onnxcomp.bridge.distillation import Distillation
    from onnxcomp.bridge.objective import Examples, Objective
    from onnxcomp.bridge.processes import Processes
    from onnxcomp.bridge.training import Epoch

BLOCKS = ("added", "auto", "first", "off")
_GATE_SAMPLES = 4  # on which torch must give what onnxruntime gives
_LOOKED_AT = 16  # samples on which model and teacher are matched
_HELD_SHARE, _MOST_HELD = 0.25, 2048  # of the samples; more would only slow the epochs
_SCALED_ON = 128  # samples of which the variances of outputs are taken
_EPOCHS = 20  # where nothing bounds them
_MOST_EPOCHS = 1000  # that a time limit is filled with
_FAR = 0.1  # squared change relative to the variance, from which blocks learn alone first
_FILLED = 0.9  # share of the time left that is planned for


@dataclass(frozen=True)
class TuneResult:
    """What `tune` returns.

    Attributes:
        model: The tuned model, which differs from the given one in values of initializers
            only; the given one where nothing did better.
        before: Loss of the given model on the samples held out: the squared change of the
            outputs over the teacher's variance, averaged over outputs; with labels, and their
            cross entropy as in `Tuning`.  None where the run ended before it was known.
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

    @property
    def epochs(self) -> float:
        """Passes over the samples, of all phases."""
        return sum({epoch.phase: epoch.number for epoch in self.history}.values())


@dataclass(frozen=True)
class Tuning:
    """How `tune` trains.

    Attributes:
        epochs: Passes over the samples, at least 1; None = as many as the time limit holds,
            or 20 without one.  A resumed run keeps its number.
        labels: Learn from the labels too: classes of the output of class scores, or the
            shares of all classes.  Each counts by how far off it the teacher is.
        blocks: What the ends of blocks are used for that both graphs have: "added" compares
            them beside the outputs; "first" trains each block by its own end for half of the
            epochs, all in one pass, and then goes on as with "added"; "off" compares outputs
            only; "auto" is "first" where the outputs are more than 10 % off, else "off", as
            nearly right outputs pay for better blocks.
        augment: "none"; "light": images become light copies, other ones at every step;
            "mixup": two thirds of them get parts of others too.
        batch: Samples per step, at least 1.
        optimizer: "adamw", or "sgd" with momentum.
        learning_rate: Its highest, > 0; None = 1e-4 for AdamW, 1e-3 for SGD.
        keep_structure: Keep pruned zeros zero and codebooks codebooks.
        device: "cpu" or "cuda".
        seed: Seed of the split, of the order of the samples and of what becomes of them.
        threads: Threads of torch and of onnxruntime, at least 1.
    """

    epochs: int | None = None
    labels: bool = False
    blocks: str = "auto"
    augment: str = "light"
    batch: int = 32
    optimizer: str = "adamw"
    learning_rate: float | None = None
    keep_structure: bool = True
    device: str = "cpu"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("blocks", BLOCKS), ("augment", AUGMENTATIONS)):
            if getattr(self, name) not in allowed:
                raise ParameterError.choice("tune", name, allowed, getattr(self, name))


def tune(
    model: Model,
    teacher: Model,
    data: Samples | Mapping[str, Any] | Iterable[Any],
    tuning: Tuning | None = None,
    *,
    held: Samples | Mapping[str, Any] | Iterable[Any] | None = None,
    time_limit: float | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Train a compressed model to give what the original gives, as its outputs tell.

    A quarter of the samples, at most 2,048, is held out; the result is never worse on them
    than the model given.  Shared initializers stay one, BatchNormalization's statistics as
    they are.  Under `torchrun` all processes train together, on the CPU, and get the same
    result.

    Args:
        model: The compressed model; it is not changed.
        teacher: The original, with the same inputs and outputs.
        data: At least two samples; labels are read where `tuning` says so.
        tuning: How to train.
        held: Samples that judge, instead of a part of `data`.
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
    check_torch()
    from onnxcomp.bridge.processes import joined
    from onnxcomp.bridge.training import torch_threads

    deadline, tuning = Deadline(time_limit), tuning or Tuning()
    threads = tuning.threads
    with torch_threads(threads), threadpool_limits(threads), joined() as processes:
        run = _Run(model, teacher, data, held, tuning, processes)
        folder = None if resume is None else Path(resume)
        return run.result(folder, deadline, progress or (lambda *_: None))


def check_torch() -> None:
    """Check that PyTorch is there.

    Raises:
        ParameterError: It is not.
    """
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
        held: Any,
        tuning: Tuning,
        processes: Processes,
    ) -> None:
        from onnxcomp.bridge import check_equal, to_torch
        from onnxcomp.bridge.equality import tolerance_of
        from onnxcomp.bridge.training import Training, check_device

        check_device(tuning.device)
        if tuning.device != "cpu" and processes.count > 1:
            raise ParameterError("tune: several processes train on the CPU only; use cpu")
        check_signatures(model, teacher)
        fit, self._held = _parts(model, data, held, tuning)
        judged = identity_of(teacher, self._held)
        self._identity = identity_of(model, fit, "tune", tuning, judged)
        self._model, self._tuning, self._processes = model, tuning, processes
        self._training = training = Training(
            _EPOCHS if tuning.epochs is None else tuning.epochs,
            tuning.batch,
            tuning.optimizer,
            tuning.learning_rate,
            keep_structure=tuning.keep_structure,
            seed=tuning.seed,
        )
        self._module: GraphModule = to_torch(model)
        self._few = self._held.take(range(min(_GATE_SAMPLES, self._held.count)))
        self._tolerance = tolerance_of(model)
        check_equal(self._module, model, self._few, tolerance=self._tolerance)
        self._scaled_on = fit.take(range(min(_SCALED_ON, fit.count)))
        looked = fit.take(range(min(_LOOKED_AT, fit.count)))
        self._teacher = Teacher(
            model, teacher, looked, threads=tuning.threads, batch=training.batch
        )
        self._scores, classes = None, 0
        if tuning.labels:
            self._scores, classes = _class_scores(model, looked, fit, self._held)
        self._notes: list[str] = []
        self._blocks = tuning.blocks
        if self._blocks != "off" and not self._teacher.ends:
            self._notes.append("no block ends alike in both graphs; compares outputs only")
            self._blocks = "off"
        self._fit, self._classes = fit, classes
        self._distillation: Distillation | None = None
        self._before: float | None = None
        self._history: list[Epoch] = []

    def result(
        self, resume: Path | None, deadline: Deadline, progress: Progress
    ) -> TuneResult:
        """Train and write the weights back, whatever ends the training."""
        store = Store(resume if self._processes.rank == 0 else None, self._identity)
        interrupted = False
        try:
            self._train(store, deadline, progress)
        except TimeLimitReached:
            self._notes.append("the time limit was reached before training began")
        except KeyboardInterrupt:
            self._notes.append("interrupted; this is the best so far")
            interrupted = True
        if self._distillation is None:
            return TuneResult(self._model, None, None, (), tuple(self._notes), interrupted)
        return self._written(self._distillation, interrupted)

    def _train(self, store: Store, deadline: Deadline, progress: Progress) -> None:
        """Train phase by phase, each from the best weights of the one before."""
        from onnxcomp.bridge.distillation import Distillation

        def check(share: float) -> None:
            progress("teacher: hold-out samples", share)
            self._processes.check()
            if self._processes.total(deadline.passed):
                raise TimeLimitReached

        held = self._examples(self._held, ends=False, each=check)
        judge, phases = self._objectives()
        course = Course(
            self._fit,
            self._teacher,
            self._model.signature.inputs,
            augmentation=self._tuning.augment,
            ends=self._blocks != "off",
            classes=self._classes,
        )
        self._module.to(self._tuning.device)
        for index, (phase, objective) in enumerate(phases):
            self._distillation = Distillation(
                self._module,
                objective,
                course,
                judge,
                held,
                self._training,
                processes=self._processes,
                phase=phase,
            )
            if self._before is None:
                self._before = self._distillation.before
            box = deadline.share(1 / (len(phases) - index))
            given = max((self._tuning.epochs or _EPOCHS) // len(phases), 1)
            self._distillation.plan(self._steps(self._distillation, store, box, given))
            self._finish(self._distillation, store, deadline, progress)
            if self._processes.total(deadline.passed):
                return

    def _finish(
        self, phase: Distillation, store: Store, deadline: Deadline, progress: Progress
    ) -> None:
        """Go through a phase, from where an earlier run left it."""
        state = self._processes.from_first(store.get("tune", phase.phase))
        if state is not None:
            phase.restore(state)
        try:
            phase.run(
                late=lambda: deadline.passed,
                progress=progress,
                save=lambda found: store.put("tune", phase.phase, found),
            )
        finally:
            phase.take_best()
            self._history += phase.history
            if phase.ended:
                self._notes.append(phase.ended)

    def _objectives(self) -> tuple[Objective, list[tuple[str, Objective]]]:
        """Return what judges on the hold-out, and what each phase trains for.

        Decides what becomes of the ends of blocks, where that is left open.
        """
        from onnxcomp.bridge.objective import BlockObjective, Examples, Objective

        few = self._examples(self._scaled_on, ends=self._blocks != "off")
        outputs = {name: few.targets[name] for name in self._teacher.outputs}
        alone = Examples(few.samples, outputs)
        given = (self._model, self._module)
        batch, scores = self._training.batch, self._scores
        plain = Objective(*given, alone, batch)
        judge = Objective(*given, alone, batch, scores) if scores else plain
        if self._blocks == "auto":
            self._blocks = "first" if plain.of(self._module, alone) > _FAR else "off"
        if self._blocks == "off":
            return judge, [("outputs", judge)]
        ends = [end.name for end in self._teacher.ends]
        phases = [("outputs", Objective(*given, few, batch, scores, ends))]
        if self._blocks == "first":
            phases.insert(0, ("blocks", BlockObjective(*given, few, batch, None, ends)))
        return judge, phases

    def _examples(self, samples: Samples, **options: Any) -> Examples:
        from onnxcomp.bridge.objective import Examples

        return Examples(samples, self._teacher.values(samples, **options))

    def _steps(
        self, phase: Distillation, store: Store, deadline: Deadline, epochs: int
    ) -> int:
        """Return the steps of a phase: as given, of an earlier run, or what time holds."""
        given = epochs * phase.per_epoch
        if self._tuning.epochs is not None:
            return given
        kept = self._processes.from_first(store.get("steps", phase.phase))
        if kept is not None:
            return int(kept)
        if not math.isinf(deadline.left):
            fitting = int(_FILLED * deadline.left / phase.step_seconds())
            most = _MOST_EPOCHS * phase.per_epoch
            given = int(self._processes.from_first(min(max(fitting, 1), most)))
        store.put("steps", phase.phase, given)
        return given

    def _written(self, last: Distillation, interrupted: bool) -> TuneResult:
        """Return the best weights in the graph, if they are better there too."""
        from onnxcomp.bridge import check_equal, from_torch, to_torch

        model, before, after = self._model, self._before, self._before
        reason = "nothing did better on the samples held out"
        if before is not None and last.best_loss < before:
            tuned = from_torch(self._module, like=self._model)
            written = to_torch(tuned)  # its half-precision weights are rounded
            try:
                check_equal(written, tuned, self._few, tolerance=self._tolerance)
            except ValidationError as error:
                reason = f"tuned weights failed a check ({error})"
            else:
                loss = last.loss_of(written.to(self._tuning.device))
                if loss < before:
                    model, after = tuned, loss
        if model is self._model:
            self._notes.append(f"{reason}; the model stays as it was")
        history, notes = tuple(self._history), tuple(self._notes)
        return TuneResult(model, before, after, history, notes, interrupted)


def _parts(model: Model, data: Any, held: Any, tuning: Tuning) -> tuple[Samples, Samples]:
    """Return the samples to learn from and those to judge by."""
    inputs = model.signature.inputs
    samples = as_samples(data, inputs)
    if held is None:
        share = min(_HELD_SHARE, _MOST_HELD / samples.count)
        parts = samples.split(tuning.seed, share)
    else:
        parts = samples, as_samples(held, inputs)
    if tuning.labels and any(part.labels is None for part in parts):
        raise DataError("tune: the data have no 'labels' to train on; leave labels out")
    return parts


def _class_scores(model: Model, samples: Samples, *parts: Samples) -> tuple[str, int]:
    """Return tensor and number of class scores, in front of Softmax, that fit the labels."""
    from onnxcomp.bridge.objective import check_labels

    facts = capture_tensors(model, next(samples.batches(model.signature.inputs, 1)).feed)
    found = class_scores(model, facts)
    if found is None:
        raise DataError("tune: no output is class scores of shape (N, K); leave labels out")
    for part in parts:
        if part.labels is not None:
            check_labels(part.labels, found[1])
    return found
