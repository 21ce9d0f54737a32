"""The gate between torch and onnxruntime: both compute the same, or training is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch

from onnxcomp.analysis.probe import random_inputs
from onnxcomp.bridge.module import GraphModule
from onnxcomp.bridge.plan import as_tensor
from onnxcomp.drift import DriftMeter
from onnxcomp.errors import UnsupportedModelError, ValidationError
from onnxcomp.model import Array, Model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples

TOLERANCE = 1e-5  # relative L2; float32 rounding of deep networks is below 5e-6
_HALF_TOLERANCE = 1e-2  # relative L2 of graphs that onnxruntime computes in half precision
_RANDOM_COUNT = 3
_GATE_SAMPLES = 4
_ROWS = 2  # samples of a run where the batch is open
_SIGMOID_ERROR = 2.0**-22  # of onnxruntime's Sigmoid, which is 0 below -18
_MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def tolerance_of(model: Model) -> float:
    """Return the relative L2 up to which a module computes what onnxruntime does."""
    half = any(a.dtype.name in ("float16", "bfloat16") for a in model.weights.values())
    return _HALF_TOLERANCE if half else TOLERANCE


def check_equal(
    module: GraphModule,
    model: Model,
    samples: Samples | None = None,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, float]:
    """Check that a module in evaluation mode computes what onnxruntime computes.

    Args:
        module: The module, on any device.
        model: The model with the same weights.
        samples: Inputs to compare on; three random ones if None.
        tolerance: Largest relative L2 distance of an output, over all samples; for integers
            the largest share that differs.  For half-precision graphs, which torch computes in
            float32, give what that type allows.  Outputs of Sigmoid that are tiny everywhere
            may be off by what onnxruntime rounds there.
        seed: Seed of the random inputs.

    Returns:
        The distance by output.

    Raises:
        ValidationError: An output differs by more, in shape, or is not finite.
        UnsupportedModelError: No random input runs; give samples.  Or torch fails in a node.
    """
    inputs = model.signature.inputs
    samples = samples or random_inputs(model, _RANDOM_COUNT, seed=seed)
    session = Session(model, optimize=False)
    meter = DriftMeter()
    for batch in samples.batches(inputs, _ROWS):
        meter.update(session.run(batch.feed), run(module, batch.feed))
    drifts = meter.result()
    found = {name: drift.relative_l2 for name, drift in drifts.items()}
    for name, distance in found.items():
        close = drifts[name].max_abs <= _SIGMOID_ERROR and _is_sigmoid(model, name)
        if not (distance <= tolerance or close):
            raise ValidationError(
                f"output '{name}': torch is off onnxruntime by {distance:.2e} (relative L2), "
                f"more than {tolerance:.0e}; this model cannot be trained here"
            )
    return found


class Gate:
    """Samples, and random inputs, on which torch must give what onnxruntime gives.

    Samples that are varied in training reach what they do not reach as they are.

    Args:
        model: The model that is trained.
        samples: Some of which are taken.
        seed: Seed of the random inputs; there are none where the model does not run on them.
    """

    def __init__(self, model: Model, samples: Samples, seed: int) -> None:
        self._tolerance = tolerance_of(model)
        self._parts = [samples.take(range(min(_GATE_SAMPLES, samples.count)))]
        with suppress(UnsupportedModelError):
            self._parts.append(random_inputs(model, _RANDOM_COUNT, seed=seed))

    def check(self, module: GraphModule, model: Model) -> None:
        """Check a module with the weights of a model; see `check_equal`."""
        for part in self._parts:
            check_equal(module, model, part, tolerance=self._tolerance)


def _is_sigmoid(model: Model, name: str) -> bool:
    """Whether a tensor holds outputs of Sigmoid, perhaps moved."""
    node = model.producers.get(name)
    while node is not None and node.op in _MOVES:
        node = model.producers.get(node.input(0))
    return node is not None and node.op == "Sigmoid"


def takes_batches(
    module: GraphModule,
    model: Model,
    samples: Samples | None = None,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> bool:
    """Say whether a graph written for one sample gives the same for several at once.

    Graphs with an open batch axis do.  Of the others, those do not that mix the batch with
    other axes by constants; they have to be trained one sample at a time.

    Args:
        module: The module.
        model: The model that it was made from.
        samples: Inputs to compare on; three random ones if None.
        tolerance: Largest relative L2 distance of an output.
        seed: Seed of the random inputs.

    Raises:
        UnsupportedModelError: Torch fails on a single sample; the message names the node.
    """
    if not module.one_sample:
        return True
    samples = samples or random_inputs(model, _RANDOM_COUNT, seed=seed)
    few = samples.take(range(min(samples.count, _RANDOM_COUNT)))
    feeds = [batch.feed for batch in few.batches(model.signature.inputs, 1)]
    single = [run(module, feed) for feed in feeds]
    meter = DriftMeter()
    try:
        several = run(module, _joined(feeds))
        meter.update(_joined(single), several)
    except (UnsupportedModelError, ValidationError, ValueError):
        return False
    return all(drift.relative_l2 <= tolerance for drift in meter.result().values())


def run(
    module: GraphModule, feed: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """Run a module in evaluation mode, without gradients, on arrays; see `forward`."""
    tensors = {name: as_tensor(array).to(module.device) for name, array in feed.items()}
    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            found = module(tensors, outputs)
    finally:
        module.train(mode)
    return {name: value.cpu().numpy() for name, value in found.items()}


def _joined(runs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Put the arrays of several runs behind one another."""
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
