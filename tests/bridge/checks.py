"""What every converted model has to stand."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from onnxcomp.bridge import GraphModule, check_equal, from_torch, to_torch
from onnxcomp.bridge.plan import as_tensor
from onnxcomp.model import Array, Model
from onnxcomp.samples import Samples


def feed_of(model: Model, samples: Samples, count: int = 1) -> dict[str, Tensor]:
    """The first samples as tensors."""
    batch = next(samples.batches(model.signature.inputs, count))
    return {name: as_tensor(array) for name, array in batch.feed.items()}


def converted(model: Model, samples: Samples | None = None) -> GraphModule:
    """The module, which computes what onnxruntime does and goes back to the same bytes."""
    module = to_torch(model)
    check_equal(module, model, samples)
    back = from_torch(module, like=model)
    assert back.digest == model.digest
    assert back.to_proto().SerializeToString() == model.to_proto().SerializeToString()
    return module


def backward(module: GraphModule, feed: Mapping[str, Tensor]) -> None:
    """Give every float output a gradient, the same for every entry but for its place."""
    outputs = [value for value in module(feed).values() if value.requires_grad]
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator)).sum() / value.numel()
        for value in outputs
    )
    assert isinstance(loss, Tensor)
    loss.backward()


def without_gradient(module: GraphModule) -> list[str]:
    """Names of the Parameters that no gradient reached, or a broken one."""
    return [
        name
        for name, weight in module.trained.items()
        if weight.grad is None or not torch.isfinite(weight.grad).all()
    ]


def changed(before: Model, after: Model) -> set[str]:
    """Names of the initializers that differ; everything else must be the same."""
    assert before.skeleton.SerializeToString() == after.skeleton.SerializeToString()
    assert list(before.weights) == list(after.weights)
    return {
        name
        for name, array in before.weights.items()
        if array.tobytes() != after.weights[name].tobytes()
    }


def relative(found: Tensor | Array, wanted: Tensor | Array) -> float:
    """Relative L2 distance."""
    a, b = (_array(value).astype(np.float64) for value in (found, wanted))
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def _array(value: Tensor | Array) -> Array:
    return value.detach().numpy() if isinstance(value, Tensor) else value
