"""The gradient of the loss at the weights as they are, averaged over samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.analysis.outputs import class_scores, raw_outputs
from onnxcomp.bridge.equality import check_equal, tolerance_of
from onnxcomp.bridge.module import GraphModule, to_torch
from onnxcomp.bridge.objective import check_labels, label_loss, samples_first
from onnxcomp.bridge.plan import as_tensor
from onnxcomp.bridge.training import torch_threads
from onnxcomp.deadline import Progress
from onnxcomp.evaluate import usable_batch
from onnxcomp.model import Array, Model
from onnxcomp.runtime import Session, capture_tensors
from onnxcomp.samples import Batch, Samples

_BATCH = 32
_PIXELS = 2**19  # of all images of a batch together
_FEW = 4  # samples on which torch must give what onnxruntime gives


def mean_gradients(
    model: Model,
    samples: Samples,
    *,
    squared: bool = False,
    seed: int = 0,
    threads: int = 1,
    progress: Progress = lambda *_: None,
) -> dict[str, Array]:
    """Return the mean gradient of a loss at the weights, BatchNormalization frozen.

    The loss is the cross entropy of the class scores (the first raw output of shape (N, K))
    against the labels, or without labels against the class that the model itself puts first.
    Without class scores it is the squared change of the raw outputs relative to their
    variance, against the outputs shifted by noise of that variance: against the outputs as
    they are, the gradient would be zero.

    Args:
        model: The model.
        samples: The samples, as the model sees them in use.
        squared: Return the mean over samples of the squared gradient instead.
        seed: Seed of the noise.
        threads: Threads of torch.
        progress: Called with a label and the share done.

    Returns:
        float64 arrays by the name of the initializer, for all weights that are trained.

    Raises:
        UnsupportedModelError: The bridge cannot express a node.
        ValidationError: Torch does not give what onnxruntime gives.
        DataError: The labels are no classes.
    """
    with torch_threads(threads):
        module = to_torch(model)
        weights = module.trained
        if not weights:
            return {}
        few = samples.take(range(min(_FEW, samples.count)))
        check_equal(module, model, few, tolerance=tolerance_of(model))
        loss = _Loss(model, module, samples, seed)
        sums = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
        for feed in _single(model, samples) if squared else _feeds(model, samples):
            progress("gradients", feed.start / samples.count)
            found = torch.autograd.grad(
                loss.of(feed), list(weights.values()), allow_unused=True
            )
            share = feed.count / samples.count
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    value = gradient.double()
                    sums[name] += share * (value.square() if squared else value)
    return {name: value.numpy() for name, value in sums.items()}


def _single(model: Model, samples: Samples) -> Iterator[Batch]:
    """Feed samples one by one; a declared batch is filled with the same sample."""
    for index in range(samples.count):
        for batch in samples.take([index]).batches(model.signature.inputs, 1):
            yield replace(batch, start=index)


def _feeds(model: Model, samples: Samples) -> Iterator[Batch]:
    inputs = model.signature.inputs
    pixels = max(math.prod(array.shape[2:]) for array in samples.arrays.values())
    batch = max(1, min(_BATCH, _PIXELS // max(pixels, 1)))
    return samples.batches(
        inputs, usable_batch([Session(model, optimize=False)], inputs, samples, batch)
    )


class _Loss:
    """The mean loss of the samples of one run."""

    def __init__(self, model: Model, module: GraphModule, samples: Samples, seed: int) -> None:
        few = samples.take(range(min(_FEW, samples.count)))
        feeds = [batch.feed for batch in few.batches(model.signature.inputs, 1)]
        facts = capture_tensors(model, feeds[0])
        self._module = module
        self._names = raw_outputs(model, facts)
        self._scores, self._labels = None, None
        if scores := class_scores(model, facts):
            self._scores, classes = scores
            if samples.labels is not None:
                check_labels(samples.labels, classes)
                self._labels = samples.labels
        with torch.no_grad():
            found = [module(_tensors(feed), self._names) for feed in feeds]
        spread = {n: torch.cat([v[n].flatten() for v in found]) for n in self._names}
        self._deviations = {n: float(v.std(correction=0)) or 1.0 for n, v in spread.items()}
        self._noise = torch.Generator().manual_seed(seed)

    def of(self, feed: Batch) -> Tensor:
        tensors = _tensors(feed.feed)
        if self._scores is not None:
            scores = self._module(tensors, [self._scores])[self._scores]
            return self._cross_entropy(samples_first(scores, feed), feed)
        outputs = self._module(tensors, self._names)
        losses = [
            self._shifted(samples_first(value, feed), self._deviations[name])
            for name, value in outputs.items()
        ]
        return torch.stack(losses).mean()

    def _cross_entropy(self, scores: Tensor, feed: Batch) -> Tensor:
        """Return the cross entropy against the labels, or the model's own first class."""
        if self._labels is None:
            return label_loss(scores, scores.detach().flatten(1).argmax(dim=1).numpy())
        return label_loss(scores, self._labels[feed.start : feed.start + feed.count])

    def _shifted(self, value: Tensor, deviation: float) -> Tensor:
        """Return the squared change of values against themselves shifted by noise."""
        noise = torch.randn(value.shape, generator=self._noise, dtype=value.dtype)
        return functional.mse_loss(value, value.detach() + deviation * noise) / deviation**2


def _tensors(feed: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: as_tensor(array) for name, array in feed.items()}
