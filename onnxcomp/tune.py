"""`tune`: a compressed model learns again from the original, on samples without labels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from onnxcomp.analysis import Analysis
from onnxcomp.deadline import Deadline, Progress, TimeLimitReached
from onnxcomp.errors import ParameterError, ValidationError
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from onnxcomp.search.store import Store, identity_of
from onnxcomp.teaching import (
    AUGMENTATIONS,
    Course,
    Teacher,
    check_signatures,
    label_scores,
    parts_of,
)

if TYPE_CHECKING:
    from onnxcomp.bridge import GraphModule
    from onnxcomp.bridge.distillation import Distillation
    from onnxcomp.bridge.objective import Examples, Objective
    from onnxcomp.bridge.processes import Processes
    from onnxcomp.bridge.training import Epoch

BLOCKS = ("added", "auto", "first", "off")
_LOOKED_AT = 16  # samples on which model and teacher are matched, and ends are scaled
_SCALED_ON = 128  # samples of which the variances of outputs are taken
_EPOCHS = 20  # where nothing bounds them
_FAR = 0.1  # squared change relative to the variance, from which blocks learn alone first


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
            only; "auto" is "first" where the squared change of the outputs is above a tenth
            of their variance (they are off by a third, about), else "off", as nearly right
            outputs pay for better blocks.
        augment: "none"; "light": images become light copies, other ones at every step;
            "mixup": two thirds of them get parts of others too.
        batch: Samples per step, at least 1.
        optimizer: "adamw", or "sgd" with momentum.
        learning_rate: Its highest, > 0; None = 1e-4 for AdamW, 1e-3 for SGD.
        keep_structure: Keep pruned zeros zero and codebooks codebooks.
        device: "cpu" or "cuda".
        memory: Bytes that activations of a step may take: of a batch that takes more, fewer
            samples are run at once, and their gradients are added up.
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
    memory: float = 1e9
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
    than the model given, and an error leaves what was learnt before.  Shared initializers
    stay one, BatchNormalization's statistics as they are.  Under `torchrun` all processes
    train together, on the CPU, and get the same result.

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
    from onnxcomp.bridge.training import single_precision, torch_threads

    deadline, tuning = Deadline(time_limit), tuning or Tuning()
    threads = tuning.threads
    with (
        torch_threads(threads),
        threadpool_limits(threads),
        single_precision(),
        joined() as processes,
    ):
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
        from onnxcomp.bridge import to_torch
        from onnxcomp.bridge.equality import Gate
        from onnxcomp.bridge.training import Training, check_device, rows_within

        check_device(tuning.device)
        if tuning.device != "cpu" and processes.count > 1:
            raise ParameterError("tune: several processes train on the CPU only; use cpu")
        check_signatures(model, teacher)
        fit, self._held = parts_of(model, data, held, tuning.seed)
        judged = identity_of(teacher, self._held)
        self._identity = identity_of(model, fit, "tune", tuning, judged)
        self._model, self._tuning, self._processes = model, tuning, processes
        self._training = Training(
            _EPOCHS if tuning.epochs is None else tuning.epochs,
            tuning.batch,
            tuning.optimizer,
            tuning.learning_rate,
            keep_structure=tuning.keep_structure,
            seed=tuning.seed,
        )
        self._module: GraphModule = to_torch(model).to(tuning.device)
        self._notes = self._module.notes
        self._gate = Gate(model, self._held, tuning.seed)
        self._gate.check(self._module, model)
        self._scaled_on = fit.take(range(min(_SCALED_ON, fit.count)))
        self._looked = fit.take(range(min(_LOOKED_AT, fit.count)))
        facts = Analysis(model, self._looked, threads=tuning.threads)
        self._rows = min(rows_within(tuning.memory, facts), tuning.batch)
        self._teacher = Teacher(
            model, teacher, self._looked, threads=tuning.threads, batch=self._rows
        )
        self._scores, classes = None, 0
        if tuning.labels:
            self._scores, classes = label_scores(model, fit, self._held)
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
        from onnxcomp.bridge.plan import reason_of

        store = Store(resume if self._processes.rank == 0 else None, self._identity)
        interrupted = False
        try:
            self._train(store, deadline, progress)
        except TimeLimitReached:
            self._notes.append("the time limit was reached before training began")
        except KeyboardInterrupt:
            self._notes.append("interrupted; this is the best so far")
            interrupted = True
        except Exception as error:  # such as of a kernel; what was learnt is not lost for it
            if self._distillation is None or self._processes.count > 1:
                raise  # there is nothing yet, or the others wait for this one's part
            why = reason_of(error)
            self._notes.append(f"training failed ({why}); this is the best so far")
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

        held, held_share = self._my_held(check)
        judge, phases = self._objectives()
        course = Course(
            self._fit,
            self._teacher,
            self._model.signature.inputs,
            augmentation=self._tuning.augment,
            ends=self._blocks != "off",
            classes=self._classes,
        )
        for index, (phase, objective) in enumerate(phases):
            self._distillation = Distillation(
                self._module,
                objective,
                course,
                judge,
                held,
                self._training,
                processes=self._processes,
                held_share=held_share,
                phase=phase,
            )
            if self._before is None:
                self._before = self._distillation.before
            box = deadline.share(1 / (len(phases) - index))
            given = max((self._tuning.epochs or _EPOCHS) // len(phases), 1)
            self._distillation.steps = self._steps(self._distillation, store, box, given)
            self._finish(self._distillation, store, deadline, box, progress)
            if self._processes.total(deadline.passed):
                return

    def _finish(
        self,
        phase: Distillation,
        store: Store,
        deadline: Deadline,
        box: Deadline,
        progress: Progress,
    ) -> None:
        """Go through a phase, from where an earlier run left it, in a part of the time."""
        state = self._processes.from_first(store.get("tune", phase.phase))
        if state is not None:
            phase.restore(state)
        save = None if store.folder is None else partial(store.put, "tune", phase.phase)
        fitted = self._tuning.epochs is None and state is None and not math.isinf(box.left)
        left = (lambda: box.left) if fitted else None
        try:
            phase.run(late=lambda: deadline.passed, progress=progress, save=save, left=left)
        finally:
            phase.take_best()
            self._history += phase.history
            if phase.ended:
                self._notes.append(phase.ended)

    def _objectives(self) -> tuple[Objective, list[tuple[str, Objective]]]:
        """Return what judges on the hold-out, and what each phase trains for.

        Decides what becomes of the ends of blocks, where that is left open.
        """
        from onnxcomp.bridge.objective import BlockObjective, Objective

        alone = self._examples(self._scaled_on, ends=False)
        given, rows, scores = (self._model, self._module), self._rows, self._scores
        plain = Objective(*given, alone, rows)
        judge = Objective(*given, alone, rows, scores) if scores else plain
        if self._blocks == "auto":
            self._blocks = "first" if plain.of(self._module, alone) > _FAR else "off"
        if self._blocks == "off":
            return judge, [("outputs", judge)]
        few = self._examples(self._looked, ends=True)
        ends = [end.name for end in self._teacher.ends]
        phases = [("outputs", Objective(*given, few, rows, scores, ends))]
        if self._blocks == "first":
            phases.insert(0, ("blocks", BlockObjective(*given, few, rows, None, ends)))
        return judge, phases

    def _my_held(self, check: Callable[[float], None]) -> tuple[Examples, float]:
        """Return this process's part of the hold-out, and its share of it."""
        count, mine = self._held.count, self._processes.share(self._held.count)
        # as many samples for all processes, which meet at every check
        index = [*mine, 0][: math.ceil(count / self._processes.count)]
        found = self._examples(self._held.take(index), ends=False, each=check)
        return found.take(range(len(mine) or 1)), len(mine) / count

    def _examples(self, samples: Samples, **options: Any) -> Examples:
        from onnxcomp.bridge.objective import Examples

        return Examples(samples, self._teacher.values(samples, **options))

    def _steps(
        self, phase: Distillation, store: Store, deadline: Deadline, epochs: int
    ) -> int:
        """Return the steps of a phase: as given, of an earlier run, or what time holds."""
        from onnxcomp.bridge.distillation import FILLED, MOST_EPOCHS

        given = epochs * phase.per_epoch
        if self._tuning.epochs is not None:
            return given
        kept = self._processes.from_first(store.get("steps", phase.phase))
        if kept is not None:
            return int(kept)
        if not math.isinf(deadline.left):
            fitting = int(FILLED * deadline.left / phase.step_seconds())
            most = MOST_EPOCHS * phase.per_epoch
            given = int(self._processes.from_first(min(max(fitting, 1), most)))
        store.put("steps", phase.phase, given)
        return given

    def _written(self, last: Distillation, interrupted: bool) -> TuneResult:
        """Return the best weights in the graph, if they are better there too."""
        from onnxcomp.bridge import from_torch, to_torch

        model, before, after = self._model, self._before, self._before
        reason = "nothing did better on the samples held out"
        if before is not None and last.best_loss < before:
            tuned = from_torch(self._module, like=self._model)
            written = to_torch(tuned).to(self._tuning.device)  # half precision is rounded
            try:
                self._gate.check(written, tuned)
            except ValidationError as error:
                reason = f"tuned weights failed a check ({error})"
            else:
                loss = last.loss_of(written)
                if loss < before:
                    model, after = tuned, loss
        if model is self._model:
            self._notes.append(f"{reason}; the model stays as it was")
        history, notes = tuple(self._history), tuple(self._notes)
        return TuneResult(model, before, after, history, notes, interrupted)
