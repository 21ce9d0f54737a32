"""Images have the statistics that BatchNormalization recorded, or there are none."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch

from onnxcomp import load
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.bridge import GraphModule, inversion, to_torch
from onnxcomp.bridge.inversion import inverted, records
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Array, Model
from onnxcomp.runtime import Session, with_outputs
from onnxcomp.samples import Samples
from tests.analysis.channel_graphs import Graph

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "digits.onnx"
CLOSE = 0.05  # divergence in onnxruntime; noise is at more than ten times as much
SAME = 1e-3  # relative, of gradients: variances are differences in float32


def residual(g: Graph, x: str) -> Model:
    """Two convolutions, and BatchNormalization in front of a third and of the classes."""
    t = g.op("Relu", g.bn(g.conv(x, 3, 8), 8))
    t = g.op("Add", g.bn(g.conv(t, 8, 8), 8), t)
    t = g.conv(g.op("Relu", g.bn(t, 8)), 8, 8)
    return g.model(g.op("Gemm", g.bn(g.mean(t), 8), g.w(8, 4), g.w(4)))


def plain() -> Model:
    g = Graph(3, 16, 16)
    return residual(g, "x")


def normalised() -> Model:
    """Takes pixels of 0 to 255."""
    g = Graph(3, 16, 16)
    centred = g.op("Sub", "x", g.constant(np.float32(120)))
    return residual(g, g.op("Div", centred, g.constant(np.float32(60))))


def pictures(model: Model, count: int = 128) -> Array:
    """Noise of images, brighter and of more contrast than what inversion begins with."""
    x = random_inputs(model, count, seed=9).arrays["x"]
    return (x * 1.3 + 0.4 * x.std()).astype(np.float32)


@cache
def trained(make) -> Model:
    """A network whose BatchNormalization has the statistics of pictures."""
    model = make()
    x = pictures(model)
    for node in [n for n in model.nodes if n.op == "BatchNormalization"]:
        y = values(model, node.input(0), x)
        axes = tuple(axis for axis in range(y.ndim) if axis != 1)
        draft = model.edit()
        draft.set_weight(node.input(3), y.mean(axes))
        draft.set_weight(node.input(4), y.var(axes))
        model = draft.seal(by="test")
    return model


@cache
def images(make) -> Samples:
    return inverted(trained(make), None)


def values(model: Model, name: str, x: Array) -> Array:
    return Session(with_outputs(model, [name]), optimize=False).run({"x": x})[name]


def divergence(model: Model, x: Array) -> float:
    """Mean Kullback-Leibler divergence in front of BatchNormalization, by onnxruntime."""
    found = []
    for node in (n for n in model.nodes if n.op == "BatchNormalization"):
        y = values(model, node.input(0), x).astype(np.float64)
        axes = tuple(axis for axis in range(y.ndim) if axis != 1)
        mean, variance = (model.weights[name].astype(np.float64) for name in node.inputs[3:])
        ratio = y.var(axes) / variance
        moved = (y.mean(axes) - mean) ** 2 / variance
        found.append((moved + ratio - 1 - np.log(ratio)).mean() / 2)
    return float(np.mean(found))


@pytest.fixture(autouse=True)
def _one_batch(monkeypatch):
    monkeypatch.setattr(inversion, "_BATCHES", 1)


@pytest.mark.parametrize("make", [plain, normalised])
def test_images_have_the_statistics(make):
    model = trained(make)
    x = images(make).arrays["x"]
    assert images(make).origin == "inverted"
    assert x.shape == (64, 3, 16, 16)
    assert x.dtype == np.float32
    assert divergence(model, x) <= CLOSE
    assert divergence(model, pictures(model)) <= CLOSE
    assert divergence(model, random_inputs(model, 64).arrays["x"]) > 2 * CLOSE
    if make is normalised:
        assert x.min() >= 0
        assert x.max() <= 255
        assert x.std() > 20


def test_seeds_decide():
    again, other = (inverted(trained(plain), None, seed=s).arrays["x"] for s in (0, 1))
    assert np.array_equal(images(plain).arrays["x"], again)
    assert not np.array_equal(other, again)


def test_classes_are_met_and_all_there():
    model = load(DIGITS)

    def counts(x: Array) -> Array:
        (logits,) = Session(model).run({"input": x}).values()
        return np.bincount(logits.argmax(axis=1), minlength=10)

    assert counts(inverted(model, "logits").arrays["input"]).min() >= 5  # of 64 / 10
    assert counts(random_inputs(model, 64).arrays["input"]).min() < 5


def test_little_memory_gives_the_same_gradients():
    """Parts of a batch, run twice, are worth the whole; parts by themselves are not."""
    model = trained(plain)
    module = to_torch(model).requires_grad_(False)
    places = torch.arange(24) / 24

    def gradient(rows: int, batch: slice = slice(None)) -> Array:
        x = torch.from_numpy(pictures(model, 24)).requires_grad_()
        scores = model.signature.outputs[0].name
        network = inversion._Network(module, records(model), scores, rows)
        sum(network.losses({"x": x[batch]}, places[batch])).backward()
        return x.grad.numpy()

    whole = gradient(24)
    size = np.linalg.norm(whole)
    assert np.linalg.norm(gradient(7) - whole) <= SAME * size
    apart = (gradient(24, slice(12)) + gradient(24, slice(12, None))) / 2
    assert np.linalg.norm(apart - whole) > 0.01 * size


def test_moments_and_their_gradients():
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(inversion._moments, x)
    mean, square = inversion._moments(x)
    wanted = torch.var_mean(x, (0, 2, 3), correction=0)
    assert torch.allclose(mean, wanted[1])
    assert torch.allclose(square - mean**2, wanted[0])
    assert not torch.allclose(square, wanted[0])


def test_what_was_recorded():
    g = Graph(3, 8, 8)
    known, computed = g.bn(g.conv("x", 3, 4), 4), g.conv("x", 3, 4)
    scale, shift, mean = (g.w(4) for _ in range(3))
    variance = g.op("Exp", g.op("ReduceMean", computed, axes=[0, 2, 3], keepdims=0))
    other = g.op("BatchNormalization", computed, scale, shift, mean, variance)
    model = g.model(g.op("Add", known, other))
    first, *_ = [n for n in model.nodes if n.op == "BatchNormalization"]
    (found,) = records(model)
    assert found.tensor == first.input(0)
    assert np.array_equal(found.mean, model.weights[first.input(3)])
    assert np.allclose(found.variance, model.weights[first.input(4)] + found.epsilon)


def test_batches_that_are_complete_count(monkeypatch):
    monkeypatch.setattr(inversion, "_BATCHES", 2)
    model, steps = trained(plain), []

    def late_after(count: int) -> Samples:
        steps.clear()
        return inverted(model, None, late=lambda: len(steps) >= count, progress=steps.append)

    assert late_after(100).count == 64
    assert steps == sorted(steps)
    assert steps[-1] < 1
    with pytest.raises(UnsupportedModelError, match="no time"):
        late_after(30)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_later_batch_that_fails_leaves_the_others(failing, monkeypatch):
    monkeypatch.setattr(inversion, "_BATCHES", 2)
    checked, count = inversion._Images.checked, iter(range(2))

    def check(self, network):
        if next(count) == failing:
            raise UnsupportedModelError("far from the statistics")
        return checked(self, network)

    monkeypatch.setattr(inversion._Images, "checked", check)
    if failing:
        assert inverted(trained(plain), None).count == 64
    else:
        with pytest.raises(UnsupportedModelError, match="far from"):
            inverted(trained(plain), None)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_batch_on_which_torch_fails_leaves_those_before(error, failing, monkeypatch):
    """Behind the forward pass, where no node can be named."""
    monkeypatch.setattr(inversion, "_BATCHES", 2)
    advance, count = inversion._Images.advance, iter(range(10**6))

    def fail(self, step, network):
        if next(count) == failing * inversion._STEPS:
            raise error
        return advance(self, step, network)

    monkeypatch.setattr(inversion._Images, "advance", fail)
    if failing:
        assert inverted(trained(plain), None).count == 64
    else:
        monkeypatch.setattr(inversion, "_BATCHES", 1)
        with pytest.raises(UnsupportedModelError, match=f"torch fails: {error.__name__}"):
            inverted(trained(plain), None)


def test_what_torch_computes_otherwise_is_refused(monkeypatch):
    forward = GraphModule.forward

    def off(self, feeds, outputs=None):
        return {n: 1.001 * value for n, value in forward(self, feeds, outputs).items()}

    monkeypatch.setattr(GraphModule, "forward", off)
    with pytest.raises(UnsupportedModelError, match="torch is off onnxruntime"):
        inverted(trained(plain), None)


def without_batchnorm() -> Model:
    g = Graph(3, 8, 8)
    return g.model(g.conv("x", 3, 4))


def vectors() -> Model:
    g = Graph(12)
    return g.model(g.bn(g.op("Gemm", "x", g.w(12, 4), g.w(4)), 4))


def one_image_in_a_shape() -> Model:
    """Its batch is declared as open, but a constant says one image."""
    g = Graph(3, 8, 8)
    t = g.op("Reshape", g.conv("x", 3, 4), g.ints(1, 4, 64))
    return g.model(g.bn(t, 4))


def one_image() -> Model:
    """Rows of a matrix are channels of one image, and nothing tells those of another."""
    g = Graph(3, 8, 8)
    t = g.op("Reshape", g.bn(g.conv("x", 3, 4), 4), g.ints(4, 64))
    proto = g.model(g.op("MatMul", t, g.w(64, 2))).to_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return Model.from_proto(proto)


def out_of_reach() -> Model:
    """The same values, said to vary and not to vary."""
    g = Graph(3, 8, 8)
    t = g.conv("x", 3, 4)
    one, other = g.bn(t, 4), g.bn(t, 4)
    for name in [n for n in g.weights if n.startswith("var")][1:]:
        g.weights[name] = g.weights[name] * 100
    return g.model(g.op("Add", one, other))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_batchnorm, "no BatchNormalization"),
        (vectors, "'x' is no float array of rank 4"),
        (one_image_in_a_shape, "onnxruntime cannot run the model"),
        (one_image, "one image at a time"),
        (out_of_reach, "divergence"),
    ],
)
def test_refusals_say_why(make, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        inverted(make(), None)


def test_scores_of_boxes_are_no_classes_of_images(monkeypatch):
    monkeypatch.setattr(inversion, "_STEPS", 2)
    monkeypatch.setattr(inversion, "_CLOSE", 1e6)
    monkeypatch.setattr(inversion, "_BATCHES", 1)
    g = Graph(3, 16, 16)
    t = g.conv(g.op("Relu", g.bn(g.conv("x", 3, 8), 8)), 8, 8)
    scores = g.op("Reshape", g.op("Transpose", t, perm=[0, 2, 3, 1]), g.ints(-1, 4))
    model = g.model(scores)
    found, plain_ = (inverted(model, name).arrays["x"] for name in (scores, None))
    assert np.array_equal(found, plain_)
