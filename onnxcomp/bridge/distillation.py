"""Short training of a module against a teacher; only weights that did better are kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onnxcomp.bridge.module import GraphModule
from onnxcomp.bridge.objective import Examples, Objective
from onnxcomp.errors import ParameterError, UnsupportedModelError
from onnxcomp.model import Array

State = dict[str, Any]
"""A training so far: plain values and NumPy arrays."""

_WARM_UP = 0.1  # share of the steps in which the learning rate grows
_ZEROS = 0.01  # share of exact zeros above which a weight was pruned
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Training:
    """How a module is trained; see `spec/algorithms.md` section 9 for the defaults.

    Attributes:
        epochs: Passes over the samples, at least 1.
        batch: Samples per step, at least 1.
        learning_rate: That of AdamW at its highest, > 0.
        weight_decay: That of AdamW.
        average: Decay of the moving average of the weights, approached in the first steps.
        clip: Largest norm of a gradient.
        patience: Epochs without a better hold-out loss before training ends.
        keep_zeros: Exact zeros of matrices and kernels stay zero where they are more than
            1 %.  Vectors are left out: biases begin at zero without having been pruned.
        seed: Seed of the order of the samples.
    """

    epochs: int = 20
    batch: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    average: float = 0.99
    clip: float = 1.0
    patience: int = 8
    keep_zeros: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ParameterError.of("tune", name, ">= 1", getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise ParameterError.of("tune", "learning_rate", "> 0", self.learning_rate)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay to 0."""
        warm = max(round(_WARM_UP * steps), 1)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return (
            self.learning_rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        )


@dataclass(frozen=True)
class Epoch:
    """One pass over the samples.

    Attributes:
        number: 1 for the first.
        fit_loss: Mean loss of its steps.
        holdout_loss: Loss of the averaged weights behind it, on samples held out.
        learning_rate: That of its last step.
    """

    number: int
    fit_loss: float
    holdout_loss: float
    learning_rate: float


def check_device(device: str) -> None:
    """Check that there is such a device.

    Raises:
        ParameterError: There is none.
    """
    if device not in _DEVICES:
        raise ParameterError.choice("tune", "device", _DEVICES, device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ParameterError(
            "tune: 'device' is cuda, but PyTorch finds no usable CUDA device here; use cpu"
        )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads for the time of a block.

    Raises:
        ParameterError: They are fewer than one.
    """
    if threads < 1:
        raise ParameterError.of("tune", "threads", ">= 1", threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Distillation:
    """Trains a module: AdamW, gradient clipping, a moving average of the weights.

    Attributes:
        before: Hold-out loss of the module as given.
        best: Weights of the best average so far, in the order of the module's Parameters;
            None as long as none did better than the module as given.
        best_loss: Their hold-out loss, or `before`.
        history: The epochs so far.
        ended: Why training ended, in words; empty where it went through.

    Raises:
        UnsupportedModelError: The module has no Parameter.
    """

    def __init__(
        self,
        module: GraphModule,
        objective: Objective,
        fit: Examples,
        held: Examples,
        training: Training,
    ) -> None:
        if not module.trained:
            reasons = "; ".join(f"'{name}': {why}" for name, why in module.untrained.items())
            raise UnsupportedModelError(
                f"the model has no weights that can be trained ({reasons or 'none is read'})"
            )
        self._module = module
        self._objective = objective
        self._fit, self._held = fit, held
        self._training = training
        self._weights: list[nn.Parameter] = list(module.trained.values())
        if training.keep_zeros:
            _freeze_zeros(self._weights)
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self._average = [weight.detach().clone() for weight in self._weights]
        self._per_epoch = math.ceil(fit.samples.count / training.batch)
        self.steps = self._per_epoch * training.epochs
        self._step, self._stale, self._running = 0, 0, 0.0
        self.before = self.best_loss = self.loss_of(module)
        self.best: list[Tensor] | None = None
        self.history: list[Epoch] = []
        self.ended = ""

    def run(
        self,
        *,
        late: Callable[[], bool],
        progress: Callable[[str, float], None],
        save: Callable[[State], None],
        save_every_s: float = 60.0,
    ) -> None:
        """Train until the epochs are over or nothing gets better.

        Args:
            late: Says whether the time is up; the weights of that moment are judged too.
            progress: Called with a label and the share of the steps that is done.
            save: Called with the state, behind every epoch and once in a while.
            save_every_s: Seconds between two states within an epoch.
        """
        saved = time.monotonic()
        progress(self._label(), self._step / self.steps)
        while self._step < self.steps and not self._is_stale():
            if late():
                save(self.state())
                self._judge()  # is in no state: going on gives the same as undisturbed
                self.ended = "the time limit was reached"
                return
            if not self._advance():
                self.ended = "the loss became NaN or infinite; try a lower learning rate"
                return
            if self._step % self._per_epoch == 0:
                self._close_epoch()
            if self._step % self._per_epoch == 0 or time.monotonic() - saved > save_every_s:
                save(self.state())
                saved = time.monotonic()
            progress(self._label(), self._step / self.steps)
        if self._step < self.steps:
            self.ended = f"no better hold-out loss in {self._stale} epochs"

    def _is_stale(self) -> bool:
        return self._stale >= self._training.patience

    def _label(self) -> str:
        epoch = min(self._step // self._per_epoch + 1, self._training.epochs)
        text = f"tune: epoch {epoch} of {self._training.epochs}, hold-out loss"
        last = self.history[-1].holdout_loss if self.history else self.before
        return f"{text} {self.before:.3g} -> {last:.3g}"

    def _advance(self) -> bool:
        """Take a step; False where its loss or gradient is not finite."""
        epoch, place = divmod(self._step, self._per_epoch)
        rng = np.random.default_rng([self._training.seed, epoch])
        order = rng.permutation(self._fit.samples.count)
        size = self._training.batch
        chosen = self._fit.take(order[place * size : (place + 1) * size].tolist())
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.rate(self._step, self.steps)
        self._optimizer.zero_grad()
        total = 0.0
        for share, loss in self._objective.parts(self._module, chosen):
            (share * loss).backward()  # type: ignore[no-untyped-call]  # torch has no types there
            total += share * loss.item()
        norm = nn.utils.clip_grad_norm_(self._weights, self._training.clip)
        if not math.isfinite(total) or not torch.isfinite(norm):
            return False
        self._optimizer.step()
        decay = min(self._training.average, (1 + self._step) / (10 + self._step))
        with torch.no_grad():
            for average, weight in zip(self._average, self._weights, strict=True):
                average.lerp_(weight, 1 - decay)
        self._running += total * chosen.samples.count
        self._step += 1
        return True

    def _close_epoch(self) -> None:
        fit_loss = self._running / self._fit.samples.count
        number = self._step // self._per_epoch
        rate = self._training.rate(self._step - 1, self.steps)
        loss, better = self._judge()
        self.history.append(Epoch(number, fit_loss, loss, rate))
        self._stale = 0 if better else self._stale + 1
        self._running = 0.0

    def _judge(self) -> tuple[float, bool]:
        """Return the hold-out loss of the averaged weights, and whether it is the best."""
        with holding(self._module, self._average):
            loss = self.loss_of(self._module)
        better = loss < self.best_loss
        if better:
            self.best, self.best_loss = [w.clone() for w in self._average], loss
        return loss, better

    def loss_of(self, module: GraphModule) -> float:
        """Return the hold-out loss of a module of the same graph."""
        return self._objective.of(module, self._held)

    def state(self) -> State:
        """Return everything on which the rest of the training depends."""
        moments = []
        for index, weight in enumerate(self._weights):
            if entry := self._optimizer.state.get(weight):
                names = ("step", "exp_avg", "exp_avg_sq")
                moments.append((index, [_array(entry[name]) for name in names]))
        return {
            "step": self._step,
            "stale": self._stale,
            "running": self._running,
            "weights": [_array(weight) for weight in self._weights],
            "average": [_array(average) for average in self._average],
            "moments": moments,
            "best": None if self.best is None else [_array(weight) for weight in self.best],
            "best_loss": self.best_loss,
            "history": [
                (e.number, e.fit_loss, e.holdout_loss, e.learning_rate) for e in self.history
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a training with the same module, examples and settings."""
        with torch.no_grad():
            for weight, array in zip(self._weights, state["weights"], strict=True):
                weight.copy_(torch.from_numpy(array))
            for average, array in zip(self._average, state["average"], strict=True):
                average.copy_(torch.from_numpy(array))
        moments = {
            index: {
                "step": torch.from_numpy(step),
                "exp_avg": torch.from_numpy(first),
                "exp_avg_sq": torch.from_numpy(second),
            }
            for index, (step, first, second) in state["moments"]
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        device = self._weights[0].device
        best = state["best"]
        self.best = None if best is None else [torch.from_numpy(a).to(device) for a in best]
        self.best_loss = state["best_loss"]
        self.history = [Epoch(*entry) for entry in state["history"]]
        self._step, self._stale = state["step"], state["stale"]
        self._running = state["running"]


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


def _freeze_zeros(weights: Sequence[nn.Parameter]) -> None:
    """Take the gradient away from the zeros of pruned weights, so that they stay zero."""
    for weight in weights:
        kept = weight.detach() != 0
        if weight.dim() >= 2 and kept.logical_not().float().mean() > _ZEROS:
            hook = partial(torch.mul, kept)
            weight.register_hook(hook)  # type: ignore[no-untyped-call]  # nor there


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.detach().cpu().numpy())
