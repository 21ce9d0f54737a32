"""How a module is trained: settings, what an epoch gave, device and threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from onnxcomp.analysis import Analysis
from onnxcomp.errors import ParameterError

RATES: Mapping[str, float] = {"adamw": 1e-4, "sgd": 1e-3}
"""Usual highest learning rate by optimizer; networks with folded BatchNorm bear no more."""

_WARM_UP = 0.1  # share of the steps in which the learning rate grows
_MOMENTUM = 0.9  # of SGD
_DEVICES = ("cpu", "cuda")
_COPIES = 3  # of every activation that a step holds at once
_BYTES = 4  # of a number


@dataclass(frozen=True)
class Training:
    """How a module is trained; see `spec/algorithms.md` section 9 for the defaults.

    Attributes:
        epochs: Passes over the samples, at least 1.
        batch: Samples per step, at least 1.
        optimizer: "adamw", or "sgd" with momentum.
        learning_rate: The highest, > 0; None = the usual one of the optimizer.
        weight_decay: That of kernels and matrices; vectors, such as biases, have none.
        average: Decay of the moving average of the weights, approached in the first steps.
        clip: Largest norm of a gradient.
        patience: Looks at the hold-out loss without a better one before training ends, once
            the learning rate is low.
        keep_structure: Exact zeros and codebooks stay; see `Structure`.
        seed: Seed of the order of the samples, and of what is drawn for them.
    """

    epochs: int = 20
    batch: int = 32
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    average: float = 0.99
    clip: float = 1.0
    patience: int = 8
    keep_structure: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ParameterError.of("tune", name, ">= 1", getattr(self, name))
        if self.optimizer not in RATES:
            raise ParameterError.choice("tune", "optimizer", RATES, self.optimizer)
        if not 0 < self.highest_rate < math.inf:
            raise ParameterError.of("tune", "learning_rate", "> 0", self.learning_rate)

    @property
    def highest_rate(self) -> float:
        """The learning rate behind the warm-up."""
        usual = RATES[self.optimizer]
        return usual if self.learning_rate is None else self.learning_rate

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay to 0."""
        warm = max(round(_WARM_UP * steps), 1)
        if step < warm:
            return self.highest_rate * (step + 1) / warm
        angle = math.pi * (step - warm) / (steps - warm)
        return self.highest_rate * (1 + math.cos(angle)) / 2

    def make_optimizer(self, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of some weights."""
        decayed = [weight for weight in weights if weight.dim() > 1]
        others = [weight for weight in weights if weight.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.highest_rate, momentum=_MOMENTUM)
        return torch.optim.AdamW(groups, lr=self.highest_rate)


@dataclass(frozen=True)
class Epoch:
    """One pass over the samples, or a part of a long one.

    Attributes:
        phase: "blocks" or "outputs", see `tune`.
        number: Passes of the phase so far, its own included.
        fit_loss: Mean loss of its steps.
        holdout_loss: Loss of the averaged weights behind it, on samples held out.
        learning_rate: That of its last step.
    """

    phase: str
    number: float
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


def activations(facts: Analysis) -> int:
    """Return the numbers that a model computes for a sample, inner tensors included."""
    weights = facts.model.weights
    return sum(math.prod(f.shape) for name, f in facts.tensors.items() if name not in weights)


def rows_within(memory: float, facts: Analysis) -> int:
    """Return how many samples a step can run at once in so many bytes, at least 1."""
    return max(int(memory / max(_COPIES * _BYTES * activations(facts), 1)), 1)


@contextmanager
def single_precision() -> Iterator[None]:
    """Keep CUDA from multiplying in TensorFloat-32 for the time of a block."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


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
