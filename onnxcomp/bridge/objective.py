"""What a module is trained for: a teacher's outputs on samples, and labels where wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.equality import takes_batches
from onnxcomp.bridge.module import GraphModule
from onnxcomp.bridge.plan import as_tensor
from onnxcomp.errors import DataError, ValidationError
from onnxcomp.evaluate import usable_batch
from onnxcomp.model import Array, Model, extract
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch, Samples


@dataclass(frozen=True, eq=False)
class Examples:
    """Samples with what the teacher makes of them.

    Attributes:
        samples: The samples; their labels are read where the objective has classes.
        targets: The teacher's values of shape (samples, ...), by tensor of the module.
    """

    samples: Samples
    targets: Mapping[str, Array]

    def take(self, index: Sequence[int]) -> Examples:
        """Return the examples at `index`, in that order."""
        targets = {name: array[index] for name, array in self.targets.items()}
        return Examples(self.samples.take(index), targets)


class Objective:
    """Mean over outputs of the squared change relative to the teacher's variance.

    With classes the cross entropy of that output against the labels is added.

    Args:
        model: The model that is trained.
        fit: The examples that it is trained on, of which the variances are taken.
        batch: Samples per run where the graph allows several.
        classes: Tensor of class scores, in front of Softmax, of shape (N, K) or with axes of
            length 1; None without labels.
    """

    def __init__(
        self, model: Model, module: GraphModule, fit: Examples, batch: int, classes: str | None
    ) -> None:
        self._inputs = model.signature.inputs
        self._classes = classes
        self._scales = {
            name: float(np.var(array, dtype=np.float64)) or 1.0
            for name, array in fit.targets.items()
        }
        self._names = tuple(dict.fromkeys([*fit.targets, *([classes] if classes else [])]))
        self.batch = batch
        first = next(fit.samples.batches(self._inputs, 1))
        stacked = module.one_sample and first.rows == 1
        free = stacked and takes_batches(module, model, fit.samples)
        self._free = free and self._has_rows(module, fit.samples)
        session = Session(extract(model, (), self._names), optimize=False)
        read = [value for value in self._inputs if value.name in session.input_names]
        few = Samples({v.name: fit.samples.arrays[v.name] for v in read})
        self._size = usable_batch([session], read, few, batch) if read else batch

    def parts(self, module: GraphModule, examples: Examples) -> Iterator[tuple[float, Tensor]]:
        """Yield share of the samples and loss of every run that examples take.

        Raises:
            ValidationError: An output has another shape than the teacher's.
        """
        count = examples.samples.count
        device = next(module.parameters()).device
        for feed in self._feeds(examples.samples):
            tensors = {name: as_tensor(array).to(device) for name, array in feed.feed.items()}
            outputs = module(tensors, self._names)
            index = slice(feed.start, feed.start + feed.count)
            rows = {name: _samples_first(value, feed) for name, value in outputs.items()}
            losses = [
                self._change(name, rows[name], array[index])
                for name, array in examples.targets.items()
            ]
            loss = torch.stack(losses).mean()
            if self._classes is not None and examples.samples.labels is not None:
                labels = examples.samples.labels[index]
                loss = loss + _cross_entropy(rows[self._classes], labels)
            yield feed.count / count, loss

    def of(self, module: GraphModule, examples: Examples) -> float:
        """Return the loss on examples, without gradients."""
        total, count = 0.0, examples.samples.count
        with torch.no_grad():
            for start in range(0, count, self.batch):
                index = range(start, min(start + self.batch, count))
                share = len(index) / count
                parts = self.parts(module, examples.take(index))
                total += share * sum(part * loss.item() for part, loss in parts)
        return total

    def _has_rows(self, module: GraphModule, samples: Samples) -> bool:
        """Whether each output has one row per sample; those of detectors may have more."""
        for count in (1, min(2, samples.count)):
            feed = {name: as_tensor(array[:count]) for name, array in samples.arrays.items()}
            with torch.no_grad():
                outputs = module(feed, self._names).values()
            if any(value.shape[:1] != (count,) for value in outputs):
                return False
        return True

    def _feeds(self, samples: Samples) -> Iterator[Batch]:
        if self._free:  # the declared batch of one would hold back a graph that takes more
            yield Batch(dict(samples.arrays), 0, samples.count, samples.count)
        else:
            yield from samples.batches(self._inputs, self._size)

    def _change(self, name: str, value: Tensor, target: Array) -> Tensor:
        if tuple(value.shape) != target.shape:
            raise ValidationError(
                f"'{name}' has shape {tuple(value.shape)}, the teacher's {target.shape} on "
                "the same samples"
            )
        wanted = as_tensor(target).to(value)
        return functional.mse_loss(value, wanted) / self._scales[name]


def check_labels(labels: Array, classes: int) -> None:
    """Check that labels are classes: indices, or one row of scores per sample.

    Raises:
        DataError: They are not.
    """
    if labels.shape == (len(labels), classes):
        return
    flat = labels.reshape(-1)
    if flat.size != len(labels) or labels.dtype.kind not in "biu":
        raise DataError(
            f"labels are {labels.dtype} of shape {labels.shape}; training on them needs one "
            f"class index per sample, or {classes} scores"
        )
    if flat.min() < 0 or flat.max() >= classes:
        raise DataError(f"labels go from {flat.min()} to {flat.max()}; there are {classes}")


def _cross_entropy(scores: Tensor, labels: Array) -> Tensor:
    scores = scores.flatten(1)
    if labels.shape == tuple(scores.shape):
        labels = labels.argmax(axis=1)
    wanted = torch.from_numpy(labels.reshape(-1).astype(np.int64)).to(scores.device)
    return functional.cross_entropy(scores, wanted)


def _samples_first(value: Tensor, batch: Batch) -> Tensor:
    """Return the rows of the samples; what has no batch axis gets one, as in `predict`."""
    if value.dim() and value.shape[0] == (batch.rows or 1):
        return value if batch.rows is None else value[: batch.count]
    return value[None]
