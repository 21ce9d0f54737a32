"""Images made from what BatchNormalization recorded, where a network comes without any.

Noise with the spectrum of images is changed by gradients until it has, in front of every
BatchNormalization, the mean and variance that real images had there (DeepInversion, Yin et al.
2020; `spec/algorithms.md` 4.4).  Each batch matches them by itself.  Weak terms ask for smooth
images and, where the output is class scores, for confident images of all classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import pixel_ranges, random_inputs
from onnxcomp.bridge.equality import check_equal, takes_batches, tolerance_of
from onnxcomp.bridge.module import GraphModule, to_torch
from onnxcomp.bridge.plan import KERNEL_ERRORS, as_tensor, reason_of
from onnxcomp.bridge.training import activations, rows_within, torch_threads
from onnxcomp.errors import ExecutionError, UnsupportedModelError, ValidationError
from onnxcomp.model import Model
from onnxcomp.sample_rules import channel_axis
from onnxcomp.samples import Samples

_BATCH = 64  # images that have the statistics together
_BATCHES = 4
_STEPS = 60  # of Adam; chosen with the rest on ResNet-20 and its training images
_RATE = 0.2  # of the noise's deviation, at the first step; cosine decay to 0
_MOMENTA = (0.5, 0.9)
_SMOOTH = 0.1  # weight of the squared differences of neighbours
_CONFIDENT = 0.01  # weight of the cross entropy
_CLOSE = 0.05  # divergence of images that will do; batches of 64 real ones are at about 0.02
_WORK = 20 * 10**12  # MACs up to which further batches are made; ten minutes on a core, about
_PASSES = 3  # forward and backward, in units of a forward pass
_TOUCHES = 200  # of an element of an activation, in MACs of the same time
_RANK = 4  # of images in batches
_SHIFT = 8  # the largest shift is the extent divided by this
_MIRRORED = 3  # channels of pictures that are mirrored, every other time
_HALF = 0.5
Late = Callable[[], bool]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Record:
    """What a BatchNormalization knows of real inputs.

    Attributes:
        tensor: What it reads, channels on axis 1.
        mean: Per channel.
        variance: Per channel, with epsilon.
        epsilon: Added to variances.
    """

    tensor: str
    mean: Tensor
    variance: Tensor
    epsilon: float

    def divergence(self, mean: Tensor, square: Tensor) -> Tensor:
        """Return how far other means, and means of squares, are off, averaged over channels.

        It is the Kullback-Leibler divergence of normal distributions.
        """
        found = (square - mean**2).clamp_min(0) + self.epsilon
        ratio = found / self.variance
        return ((mean - self.mean) ** 2 / self.variance + ratio - 1 - ratio.log()).mean() / 2


def records(model: Model) -> tuple[Record, ...]:
    """Return what the BatchNormalizations of a model recorded, constants being folded.

    Those without statistics of their own, computed or of the batch at hand, are left out.
    """
    found = []
    for node in model.nodes:
        if node.op != "BatchNormalization" or node.attrs.get("training_mode"):
            continue
        mean, variance = (model.weights.get(name) for name in node.inputs[3:5])
        if mean is not None and variance is not None:
            epsilon = float(node.attrs.get("epsilon", 1e-5))
            tensors = as_tensor(mean), as_tensor(variance) + epsilon
            found.append(Record(node.input(0), *tensors, epsilon))
    return tuple(found)


def inverted(
    model: Model,
    scores: str | None,
    *,
    seed: int = 0,
    threads: int = 1,
    memory: float = 1e9,
    late: Late = lambda: False,
    progress: Progress = lambda _: None,
) -> Samples:
    """Return 256 images, fewer of large models, that stand for those a network was trained on.

    Args:
        model: A prepared model, its BatchNormalization in place.
        scores: Tensor of class scores of shape (N, K), or with axes of length 1; None where
            there are no classes.  Without one row per image it is left out.
        seed: Seed of the noise and of the classes.
        threads: Threads of torch, at least 1.
        memory: Bytes that activations may take, about.
        late: Says whether the time is up; batches that are complete count then.
        progress: Called with the share that is done.

    Raises:
        UnsupportedModelError: The model says too little of real images.  No BatchNormalization
            has statistics of its own; an input is no float array of rank 4 (nothing recorded
            tells a state or a token from a wrong one); torch cannot run the model, or gives
            something else than onnxruntime, or fails on several images at once, which only
            together have statistics; the time is up before the first batch; or its images
            stay far from the statistics.
    """
    recorded = records(model)
    if not recorded:
        raise UnsupportedModelError("no BatchNormalization holds statistics of real inputs")
    for value in model.signature.inputs:
        if len(value.shape or ()) != _RANK or value.dtype.kind != "f":
            raise UnsupportedModelError(f"input '{value.name}' is no float array of rank 4")
    module = _module(model, seed)
    batches, rows = _sizes(Analysis(model, seed=seed), memory)
    noise = random_inputs(model, batches * _BATCH, seed=seed)
    network, ranges = _Network(module, recorded, scores, rows), pixel_ranges(model)
    made: list[Samples] = []
    with torch_threads(threads):
        for index in range(batches):
            part = noise.take(range(index * _BATCH, (index + 1) * _BATCH))
            images = _Images(part, ranges, np.random.default_rng([seed, index]))
            try:
                for step in range(_STEPS):
                    if late():
                        return _joined(made)
                    progress((index + step / _STEPS) / batches)
                    images.advance(step, network)
                made.append(images.checked(network))
            except UnsupportedModelError:
                if not made:
                    raise
            except KERNEL_ERRORS as error:
                if not made:
                    raise UnsupportedModelError(f"torch fails: {reason_of(error)}") from error
    return _joined(made)


def _module(model: Model, seed: int) -> GraphModule:
    """Return a model for torch, or raise why not (UnsupportedModelError)."""
    module = to_torch(model).requires_grad_(False)
    try:
        check_equal(module, model, tolerance=tolerance_of(model), seed=seed)
    except (ExecutionError, ValidationError) as error:
        raise UnsupportedModelError(str(error)) from error
    if not takes_batches(module, model, seed=seed):
        raise UnsupportedModelError("the graph takes one image at a time, not a batch")
    return module


def _sizes(facts: Analysis, memory: float) -> tuple[int, int]:
    """Return the number of batches, and the images that a pass takes."""
    work = _STEPS * _BATCH * (_PASSES * facts.cost.macs + _TOUCHES * activations(facts))
    batches = min(max(_WORK // max(work, 1), 1), _BATCHES)
    return batches, min(rows_within(memory, facts), _BATCH)


def _joined(batches: Sequence[Samples]) -> Samples:
    """Return the images of all batches.

    Raises:
        UnsupportedModelError: There are none.
    """
    if not batches:
        raise UnsupportedModelError("the time limit leaves no time for inverting images")
    names = batches[0].arrays
    arrays = {name: np.concatenate([b.arrays[name] for b in batches]) for name in names}
    return replace(batches[0], arrays=arrays)


class _Network:
    """A network, and how far images are from what it recorded.

    Args:
        module: The network; its weights get no gradients.
        recorded: What its BatchNormalizations know.
        scores: Its tensor of class scores, or None.
        rows: Images that a pass takes.
    """

    def __init__(
        self, module: GraphModule, recorded: Sequence[Record], scores: str | None, rows: int
    ) -> None:
        self._module = module
        self._recorded = recorded
        self._scores = scores
        self._rows = rows

    def losses(self, images: Mapping[str, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence from what was recorded, and the cross entropy of the classes.

        Args:
            images: By input.
            places: The class that each image is to have, as a share of all classes.
        """
        seen, shares = [], []
        parts = [torch.split(value, self._rows) for value in (places, *images.values())]
        for some, *arrays in zip(*parts, strict=True):
            run = partial(self._seen, tuple(images))
            if len(some) < len(places):
                # All images of a batch have the statistics together, but the activations of a
                # few at a time fill the memory: they are computed again for the gradients.
                run = partial(checkpoint, run, use_reentrant=False)
            seen.append(run(some, *arrays))
            shares.append(len(some) / len(places))
        *moments, entropy = (
            torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum(0)
            for values in zip(*seen, strict=True)
        )
        pairs = zip(self._recorded, moments[::2], moments[1::2], strict=True)
        divergences = [record.divergence(*pair) for record, *pair in pairs]
        return torch.stack(divergences).mean(), entropy

    def _seen(self, names: Sequence[str], places: Tensor, *arrays: Tensor) -> list[Tensor]:
        """Return means and mean squares that were recorded elsewhere, and the entropy."""
        scores = [] if self._scores is None else [self._scores]
        wanted = dict.fromkeys([*(record.tensor for record in self._recorded), *scores])
        values = self._module(dict(zip(names, arrays, strict=True)), tuple(wanted))
        found: list[Tensor] = []
        for record in self._recorded:
            found += _moments(values[record.tensor])
        entropy = places.new_zeros(())
        for name in scores:
            flat = values[name].flatten(1)
            if len(flat) != len(places):  # such as those of all boxes of all images
                continue
            entropy = functional.cross_entropy(flat, (places * flat.shape[1]).long())
        return [*found, entropy]


class _Moments(torch.autograd.Function):
    """Mean and mean square per channel; eight times as fast as `torch.var_mean`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values)
        axes = [axis for axis in range(values.dim()) if axis != 1]
        return values.mean(axes), values.square().mean(axes)

    @staticmethod
    def backward(ctx: Any, mean: Tensor, square: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        count = values.numel() // values.shape[1]
        shape = (1, -1, *(1,) * (values.dim() - 2))
        slope, offset = (2 * square / count).view(shape), (mean / count).view(shape)
        return torch.addcmul(offset, values, slope)


_moments: Callable[[Tensor], tuple[Tensor, Tensor]] = _Moments.apply


class _Images:
    """A batch of images that is being made.

    Args:
        noise: What it begins with.
        ranges: Lowest and highest value by input, where they are known.
        rng: Draws classes, shifts and reflections.
    """

    def __init__(
        self,
        noise: Samples,
        ranges: Mapping[str, tuple[float, float]],
        rng: np.random.Generator,
    ) -> None:
        self._dtypes = {name: array.dtype for name, array in noise.arrays.items()}
        self._ranges, self._rng = ranges, rng
        given = {name: as_tensor(array) for name, array in noise.arrays.items()}
        # One rate of learning serves pixels of 0 to 255 and normalised ones.
        self._units = {name: float(value.std()) or 1.0 for name, value in given.items()}
        self._leaves = {
            name: (value / self._units[name]).requires_grad_() for name, value in given.items()
        }
        self._places = torch.from_numpy(rng.permutation(noise.count) / noise.count)
        self._adam = torch.optim.Adam(self._leaves.values(), lr=_RATE, betas=_MOMENTA)

    def advance(self, step: int, network: _Network) -> None:
        """Take a step towards what a network recorded."""
        for group in self._adam.param_groups:
            group["lr"] = _RATE * (1 + math.cos(math.pi * step / _STEPS)) / 2
        self._adam.zero_grad()
        moved = {name: _moved(value, self._rng) for name, value in self._values().items()}
        divergence, entropy = network.losses(moved, self._places)
        roughness = torch.stack([_roughness(leaf) for leaf in self._leaves.values()]).mean()
        loss = divergence + _CONFIDENT * entropy + _SMOOTH * roughness
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
        self._adam.step()
        with torch.no_grad():
            for name, (low, high) in self._ranges.items():
                unit = self._units[name]
                self._leaves[name].clamp_(low / unit, high / unit)

    def checked(self, network: _Network) -> Samples:
        """Return the images.

        Raises:
            UnsupportedModelError: They are not close to what the network recorded.
        """
        with torch.no_grad():
            values = self._values()
            divergence = float(network.losses(values, self._places)[0])
        if not divergence <= _CLOSE:
            raise UnsupportedModelError(
                "no images were found that have the statistics of its BatchNormalizations "
                f"(divergence {divergence:.2g}, more than {_CLOSE})"
            )
        arrays = {n: value.numpy().astype(self._dtypes[n]) for n, value in values.items()}
        return Samples(arrays, origin="inverted")

    def _values(self) -> dict[str, Tensor]:
        return {name: self._units[name] * leaf for name, leaf in self._leaves.items()}


def _moved(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return pictures shifted round and perhaps mirrored, so that no pixel is special.

    Those of one channel are not mirrored, see `augmentation`; other arrays stay.
    """
    channel = channel_axis(images.shape[1:])
    if channel is None:
        return images
    rows, columns = _sides(images)
    if images.shape[channel] == _MIRRORED and rng.random() < _HALF:
        images = images.flip(columns)
    reach = [images.shape[axis] // _SHIFT for axis in (rows, columns)]
    shifts = [int(rng.integers(-most, most, endpoint=True)) for most in reach]
    return images.roll(shifts, (rows, columns))


def _roughness(images: Tensor) -> Tensor:
    """Return the mean squared differences of neighbours down and across, added up."""
    steps = [images.diff(dim=axis) for axis in _sides(images) if images.shape[axis] > 1]
    return torch.stack([images.new_zeros(()), *(s.square().mean() for s in steps)]).sum()


def _sides(images: Tensor) -> tuple[int, int]:
    return (1, 2) if channel_axis(images.shape[1:]) == -1 else (2, 3)
