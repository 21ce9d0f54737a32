"""What a module is trained for: a teacher's outputs on samples, and labels where wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.equality import run, takes_batches
from onnxcomp.bridge.module import GraphModule
from onnxcomp.bridge.plan import as_tensor
from onnxcomp.errors import DataError, ValidationError
from onnxcomp.evaluate import usable_batch
from onnxcomp.model import Array, Model, extract
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch, Samples

_SHARES = 1e-3  # by which the sum of a sample's shares of classes may be off 1


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

    The same mean over ends of blocks is added.  So is, with classes, the cross entropy of that
    output against the labels, each label weighed by how far off it the teacher is: at a weight
    of 1 for all, a network that is nearly right moves away from a teacher that is right too.

    Args:
        model: The model that is trained.
        module: The same as a module.
        few: Some examples, of which variances and batches are learnt; their targets are what
            is compared.
        batch: Samples per run where the graph allows several.
        classes: Tensor of class scores, in front of Softmax, of shape (N, K) or with axes of
            length 1; None without labels.
        ends: Targets that are ends of blocks, in the order of the graph; the others are the
            outputs.
    """

    def __init__(
        self,
        model: Model,
        module: GraphModule,
        few: Examples,
        batch: int,
        classes: str | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        self._inputs = model.signature.inputs
        self._classes = classes
        self._scales = {
            name: float(np.var(array, dtype=np.float64)) or 1.0
            for name, array in few.targets.items()
        }
        self._ends = tuple(ends)
        self._outputs = tuple(name for name in few.targets if name not in ends)
        self._names = tuple(dict.fromkeys([*few.targets, *([classes] if classes else [])]))
        self.batch = batch
        first = next(few.samples.batches(self._inputs, 1))
        stacked = module.one_sample and first.rows == 1
        free = stacked and takes_batches(module, model, few.samples)
        self._free = free and self._has_rows(module, few.samples)
        session = Session(extract(model, (), self._names), optimize=False)
        read = [value for value in self._inputs if value.name in session.input_names]
        used = Samples({v.name: few.samples.arrays[v.name] for v in read})
        self._size = usable_batch([session], read, used, batch) if read else batch

    def parts(self, module: GraphModule, examples: Examples) -> Iterator[tuple[float, Tensor]]:
        """Yield share of the samples and loss of every run that examples take.

        Raises:
            ValidationError: An output has another shape than the teacher's.
        """
        count = examples.samples.count
        for feed in self._feeds(examples.samples):
            tensors = {n: as_tensor(a).to(module.device) for n, a in feed.feed.items()}
            index = range(feed.start, feed.start + feed.count)
            for loss in self.losses(module, tensors, feed, examples.take(index)):
                yield feed.count / count, loss

    def losses(
        self,
        module: GraphModule,
        tensors: Mapping[str, Tensor],
        feed: Batch,
        examples: Examples,
    ) -> Iterator[Tensor]:
        """Yield the losses of one run, whose sum is its loss.

        Args:
            module: The module.
            tensors: Its inputs.
            feed: The same as arrays.
            examples: The samples in the feed.
        """
        outputs = module(tensors, self._names)
        loss = self._change(self._outputs, outputs, feed, examples)
        if self._ends:
            loss = loss + self._change(self._ends, outputs, feed, examples)
        if self._classes is not None and examples.samples.labels is not None:
            scores = samples_first(outputs[self._classes], feed)
            known = examples.targets.get(self._classes)
            loss = loss + label_loss(scores, examples.samples.labels, known)
        yield loss

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
            feed = {name: array[:count] for name, array in samples.arrays.items()}
            outputs = run(module, feed, self._names).values()
            if any(value.shape[:1] != (count,) for value in outputs):
                return False
        return True

    def _feeds(self, samples: Samples) -> Iterator[Batch]:
        if not self._free:
            yield from samples.batches(self._inputs, self._size)
            return
        # the declared batch of one would hold back a graph that takes more
        for start in range(0, samples.count, self.batch):
            feed = {n: a[start : start + self.batch] for n, a in samples.arrays.items()}
            count = min(self.batch, samples.count - start)
            yield Batch(feed, start, count, count)

    def _change(
        self,
        names: Sequence[str],
        values: Mapping[str, Tensor],
        feed: Batch,
        examples: Examples,
    ) -> Tensor:
        """Return the mean over tensors of their squared change relative to the variance."""
        found = []
        for name in names:
            value, target = samples_first(values[name], feed), examples.targets[name]
            if tuple(value.shape) != target.shape:
                raise ValidationError(
                    f"'{name}' has shape {tuple(value.shape)}, the teacher's {target.shape} "
                    "on the same samples"
                )
            wanted = as_tensor(target).to(value)
            found.append(functional.mse_loss(value, wanted) / self._scales[name])
        return torch.stack(found).mean()


class BlockObjective(Objective):
    """Mean over blocks of what changes at their ends, each trained by its own end alone.

    All blocks are run one after the other on what the model itself gives at the ends in front
    of them, and no gradient passes an end; the outputs end the last one.  A skip that leads
    round an end, as in a U-Net, carries gradients to the block that it comes from.
    """

    def losses(
        self,
        module: GraphModule,
        tensors: Mapping[str, Tensor],
        feed: Batch,
        examples: Examples,
    ) -> Iterator[Tensor]:
        """Yield the loss of each block; see `Objective.losses`."""
        blocks = [*((end,) for end in self._ends), self._outputs]
        known = dict(tensors)
        for names in blocks:
            found = module(known, names)
            known |= {name: value.detach() for name, value in found.items()}
            loss = self._change(names, found, feed, examples) / len(blocks)
            if loss.requires_grad:  # a block may hold no weights
                yield loss


def check_labels(labels: Array, classes: int) -> None:
    """Check that labels are classes: indices, or the shares of all classes per sample.

    Raises:
        DataError: They are not.
    """
    if labels.shape == (len(labels), classes):
        if labels.min() < 0 or np.abs(labels.sum(axis=1) - 1).max() > _SHARES:
            raise DataError(
                "labels with a number for each class must be shares: >= 0, of sum 1 for "
                f"every sample; found {labels.min():.3g} to {labels.max():.3g}"
            )
        return
    flat = labels.reshape(-1)
    if flat.size != len(labels) or labels.dtype.kind not in "biu":
        raise DataError(
            f"labels are {labels.dtype} of shape {labels.shape}; training on them needs one "
            f"class index per sample, or shares of {classes} classes"
        )
    if flat.min() < 0 or flat.max() >= classes:
        raise DataError(f"labels go from {flat.min()} to {flat.max()}; there are {classes}")


def label_loss(scores: Tensor, labels: Array, known: Array | None = None) -> Tensor:
    """Return the mean cross entropy, weighed by what the teacher does not know.

    Args:
        scores: (N, K), or with axes of length 1.
        labels: Classes, or the shares of all classes.
        known: The teacher's scores, of as many elements; None for weights of 1.
    """
    scores = scores.flatten(1)
    if labels.shape == tuple(scores.shape):
        wanted = torch.from_numpy(labels.astype(np.float32)).to(scores)
    else:
        classes = torch.from_numpy(labels.reshape(-1).astype(np.int64)).to(scores.device)
        wanted = functional.one_hot(classes, scores.shape[1]).to(scores)
    entropy = functional.cross_entropy(scores, wanted, reduction="none")
    if known is None:
        return entropy.mean()
    taught = as_tensor(known).to(scores).reshape(scores.shape).softmax(1)
    off = (wanted - taught).abs().sum(1) / 2  # total variation distance; 1 - p of a class
    return (off * entropy).mean()


def samples_first(value: Tensor, batch: Batch) -> Tensor:
    """Return the rows of the samples; what has no batch axis gets one, as in `predict`."""
    if value.dim() and value.shape[0] == (batch.rows or 1):
        return value if batch.rows is None else value[: batch.count]
    return value[None]
