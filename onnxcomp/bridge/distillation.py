"""Short training of a module against a teacher; only weights that did better are kept."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from onnxcomp.bridge.module import GraphModule
from onnxcomp.bridge.objective import Examples, Objective
from onnxcomp.bridge.processes import ALONE, Processes
from onnxcomp.bridge.structure import Structure
from onnxcomp.bridge.training import Epoch, Training
from onnxcomp.deadline import Progress
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Array
from onnxcomp.samples import Samples

State = dict[str, Any]
"""A training so far: plain values and NumPy arrays."""

_HARM = 1.1  # times the loss at first, from which training begins again at a lower rate
_LOWER, _LEAST = 3.0, 0.05  # what divides the rate, and its least share of the given one
FILLED = 0.95  # share of the time left that is planned for
MOST_EPOCHS = 1000  # that a time limit is filled with
_LARGE = 0.2  # of the highest rate, above which looks do not tell that nothing gets better
_LOOK_STEPS = 256  # behind which the weights are judged within a long pass


class Lessons(Protocol):
    """Samples to learn from, of which every step draws some."""

    @property
    def count(self) -> int:
        """Number of samples."""
        ...

    def drawn(self, index: Sequence[int], seed: Sequence[int]) -> Samples:
        """Return the samples at `index` as a step sees them, perhaps changed at random."""
        ...

    def taught(self, samples: Samples) -> Examples:
        """Return such samples with what the teacher makes of them."""
        ...


class Distillation:
    """Trains a module: gradient clipping, a moving average of the weights.

    Attributes:
        phase: What the epochs are called.
        before: Hold-out loss of the module as given.
        best: Weights of the best average so far, in the order of the module's Parameters;
            None as long as none did better than the module as given.
        best_loss: Their hold-out loss, or `before`.
        history: The epochs so far, or parts of long ones.
        per_epoch: Steps of a pass over the samples.
        steps: Steps of the whole training.
        ended: Why training ended, in words; empty where it went through.

    Args:
        module: What is trained.
        objective: What it is trained for.
        lessons: Samples to learn from.
        judge: What decides which weights are best, on `held`.
        held: Examples held out, at least one; with several processes, this one's part.
        training: How it is trained.
        processes: Those that train together.
        held_share: What the loss on `held` counts; that of all processes is added up.
        phase: What the epochs are called.

    Raises:
        UnsupportedModelError: The module has no Parameter.
    """

    def __init__(
        self,
        module: GraphModule,
        objective: Objective,
        lessons: Lessons,
        judge: Objective,
        held: Examples,
        training: Training,
        *,
        processes: Processes = ALONE,
        held_share: float = 1.0,
        phase: str = "outputs",
    ) -> None:
        if not module.trained:
            reason = "; ".join(module.notes) or "none is read"
            raise UnsupportedModelError(
                f"the model has no weights that can be trained ({reason})"
            )
        self._module = module
        self._objective, self._judge = objective, judge
        self._lessons, self._training = lessons, training
        self._processes, self.phase = processes, phase
        self._held, self._held_share = held, held_share
        self._weights: list[nn.Parameter] = list(module.trained.values())
        self._structure = Structure(self._weights if training.keep_structure else ())
        self._optimizer = training.make_optimizer(self._weights)
        self._average = [weight.detach().clone() for weight in self._weights]
        self._given = [weight.detach().clone() for weight in self._weights]
        self.per_epoch = math.ceil(lessons.count / training.batch)
        self.steps = self.per_epoch * training.epochs
        self._per_look = min(self.per_epoch, _LOOK_STEPS)
        self._step, self._stale, self._running, self._seen = 0, 0, 0.0, 0
        self._begun, self._given_rate = 0, training.highest_rate
        self.before = self.best_loss = self.loss_of(module)
        self.best: list[Tensor] | None = None
        self.history: list[Epoch] = []
        self.ended = ""

    def take_best(self) -> None:
        """Leave the module with its best weights, or those given."""
        with torch.no_grad():
            best = self._given if self.best is None else self.best
            for weight, value in zip(self._weights, best, strict=True):
                weight.copy_(value)

    def run(
        self,
        *,
        late: Callable[[], bool],
        progress: Progress,
        save: Callable[[State], None] | None,
        save_every_s: float = 60.0,
        left: Callable[[], float] | None = None,
    ) -> None:
        """Train until the epochs are over or nothing gets better.

        Args:
            late: Says whether the time is up; the weights of that moment are judged too.
            left: Seconds that remain, to which steps are fitted; None where they are given.
            progress: Called with a label and the share of the steps that is done.
            save: Called with the state: behind the first step, once in a while, and at the
                end, unless that comes within a step.
            save_every_s: Seconds between two states.
        """
        saved, whole, is_late = -math.inf, True, False
        start, first = time.monotonic(), self._step
        try:
            progress(self._label(), self._step / self.steps)
            while self._step < self.steps and not self._is_stale():
                self._processes.check()
                is_late = bool(self._processes.total(late()))
                if is_late:
                    break
                whole = False
                if not self._advance():
                    self.ended = "the loss became NaN or infinite; try a lower learning rate"
                    return
                if self._step % self._per_look == 0 or self._step == self.steps:
                    self._close_look()
                    if left is not None:
                        self._fit_steps(left() / (time.monotonic() - start), first)
                whole = True
                if save is not None and time.monotonic() - saved > save_every_s:
                    save(self.state())
                    saved = time.monotonic()
                progress(self._label(), self._step / self.steps)
        finally:
            if save is not None and whole:
                save(self.state())
        if is_late:
            self._look()  # is in no state: going on gives the same as undisturbed
            self.ended = "the time limit was reached"
        elif self._step < self.steps:
            self.ended = f"no better hold-out loss at the last {self._stale} looks"

    def _fit_steps(self, more: float, first: int) -> None:
        """Let the rate reach 0 when the time is up, however fast the machine is by now.

        Args:
            more: What is left of the time, in units of what the steps since `first` took.
            first: Where this run began.
        """
        fitting = self._step + int(FILLED * more * (self._step - first))
        fitting = min(fitting, MOST_EPOCHS * self.per_epoch)
        if 2 * self._step > self.steps:  # its end is near: it may come sooner only
            fitting = min(fitting, self.steps)
        self.steps = int(self._processes.from_first(max(fitting, self._step)))

    def _is_stale(self) -> bool:
        return self._stale >= self._training.patience

    def _label(self) -> str:
        epochs = math.ceil(self.steps / self.per_epoch)
        where = (
            f"{self.phase}, epoch {min(self._step // self.per_epoch + 1, epochs)} of {epochs}"
        )
        last = self.history[-1].holdout_loss if self.history else self.before
        return f"tune: {where}, hold-out loss {self.before:.3g} -> {last:.3g}"

    def step_seconds(self) -> float:
        """Return about how long a step takes with its share of a look, without effect."""
        self._loss_and_gradients()  # is slower than those that follow
        start = time.monotonic()
        self._loss_and_gradients()
        step = time.monotonic() - start
        self.loss_of(self._module)
        return step + (time.monotonic() - start - step) / self._per_look

    def _loss_and_gradients(self) -> tuple[float, int]:
        """Return loss and number of the samples of a step, with their gradients computed."""
        epoch, place = divmod(self._step, self.per_epoch)
        seed, size = [self._training.seed, epoch], self._training.batch
        order = np.random.default_rng(seed).permutation(self._lessons.count)
        index = order[place * size : (place + 1) * size].tolist()
        drawn = self._lessons.drawn(index, [*seed, place])
        mine = self._processes.share(drawn.count)
        weight = len(mine) / drawn.count  # with none, one sample that does not count
        examples = self._lessons.taught(drawn.take(mine or [0]))
        self._optimizer.zero_grad()
        total = 0.0
        for share, loss in self._objective.parts(self._module, examples):
            (weight * share * loss).backward()  # type: ignore[no-untyped-call]  # torch has no types there
            total += weight * share * loss.item()
        self._processes.add([w.grad for w in self._weights if w.grad is not None])
        return self._processes.total(total), drawn.count

    def _advance(self) -> bool:
        """Take a step; False where its loss or gradient is not finite."""
        loss, count = self._loss_and_gradients()
        self._structure.restrict(self._weights)
        norm = nn.utils.clip_grad_norm_(self._weights, self._training.clip)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            return False
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self._step)
        self._optimizer.step()
        taken = self._step - self._begun
        decay = min(self._training.average, (1 + taken) / (10 + taken))
        with torch.no_grad():
            self._structure.settle(self._weights)
            for average, weight in zip(self._average, self._weights, strict=True):
                average.lerp_(weight, 1 - decay)
            self._structure.settle(self._average)
        self._running += loss * count
        self._seen += count
        self._step += 1
        return True

    def _close_look(self) -> None:
        fit_loss, number = self._running / self._seen, self._step / self.per_epoch
        rate = self._rate(self._step - 1)
        loss, better = self._look()
        self.history.append(Epoch(self.phase, number, fit_loss, loss, rate))
        large = rate > _LARGE * self._training.highest_rate  # steps that hide what they gain
        self._stale = 0 if better or large else self._stale + 1
        self._running, self._seen = 0.0, 0
        if loss > _HARM * self.before and rate > _LEAST * self._given_rate:
            self._lower()

    def _rate(self, step: int) -> float:
        return self._training.rate(step - self._begun, self.steps - self._begun)

    def _lower(self) -> None:
        """Go back to the best weights, and on from there at a lower rate."""
        self.take_best()
        with torch.no_grad():
            for average, weight in zip(self._average, self._weights, strict=True):
                average.copy_(weight)
        rate = self._training.highest_rate / _LOWER
        self._training = replace(self._training, learning_rate=rate)
        self._optimizer = self._training.make_optimizer(self._weights)
        self._begun = self._step

    def _look(self) -> tuple[float, bool]:
        """Return the hold-out loss of the averaged weights, and whether it is the best."""
        with holding(self._module, self._average):
            loss = self.loss_of(self._module)
        better = loss < self.best_loss
        if better:
            self.best, self.best_loss = [w.clone() for w in self._average], loss
        return loss, better

    def loss_of(self, module: GraphModule) -> float:
        """Return the hold-out loss of a module of the same graph."""
        return self._processes.total(self._held_share * self._judge.of(module, self._held))

    def state(self) -> State:
        """Return everything on which the rest of the training depends."""
        optimizer = {
            index: {name: _array(value) for name, value in entry.items()}
            for index, entry in self._optimizer.state_dict()["state"].items()
        }
        return {
            "step": self._step,
            "steps": self.steps,
            "stale": self._stale,
            "begun": self._begun,
            "learning_rate": self._training.highest_rate,
            "running": self._running,
            "seen": self._seen,
            "weights": [_array(weight) for weight in self._weights],
            "average": [_array(average) for average in self._average],
            "optimizer": optimizer,
            "best": None if self.best is None else [_array(weight) for weight in self.best],
            "best_loss": self.best_loss,
            "history": [dataclasses.astuple(epoch) for epoch in self.history],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a training with the same module, examples and settings."""
        with torch.no_grad():
            for weight, array in zip(self._weights, state["weights"], strict=True):
                weight.copy_(torch.from_numpy(array))
            for average, array in zip(self._average, state["average"], strict=True):
                average.copy_(torch.from_numpy(array))
        optimizer = {
            index: {name: torch.from_numpy(array) for name, array in entry.items()}
            for index, entry in state["optimizer"].items()
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        device = self._weights[0].device
        best = state["best"]
        self.best = None if best is None else [torch.from_numpy(a).to(device) for a in best]
        self.best_loss = state["best_loss"]
        self.history = [Epoch(*entry) for entry in state["history"]]
        self._step, self.steps, self._stale = state["step"], state["steps"], state["stale"]
        self._begun = state["begun"]
        self._training = replace(self._training, learning_rate=state["learning_rate"])
        self._running, self._seen = state["running"], state["seen"]


@contextmanager
def holding(module: GraphModule, weights: Sequence[Tensor]) -> Iterator[None]:
    """Give a module other weights for the time of a block."""
    own = [parameter.data for parameter in module.trained.values()]
    try:
        for parameter, weight in zip(module.trained.values(), weights, strict=True):
            parameter.data = weight
        yield
    finally:
        for parameter, weight in zip(module.trained.values(), own, strict=True):
            parameter.data = weight


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.detach().cpu().numpy())
