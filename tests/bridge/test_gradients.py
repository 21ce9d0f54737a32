"""Mean gradients against differences of the loss, computed by onnxruntime."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

from onnxcomp.bridge.gradients import mean_gradients
from onnxcomp.errors import DataError
from onnxcomp.model import Array, Model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from tests.analysis.channel_graphs import Graph
from tests.search.searching import inputs, wide

STEP = 1e-2
CLOSE = 2e-2  # relative; differences of a float32 loss
COUNT = 12


def classifier(*, softmax: bool = False) -> Model:
    g = Graph(3, 6, 6)
    t = g.op("Relu", g.bn(g.conv("x", 3, 8), 8))
    t = g.op("Relu", g.conv(t, 8, 8))
    t = g.op("Gemm", g.op("Flatten", g.mean(t)), g.w(8, 5), g.w(5))
    return g.model(g.op("Softmax", t, axis=1) if softmax else t)


def data(model: Model, *, labels: bool = True) -> Samples:
    rng = np.random.default_rng(1)
    return Samples(inputs(model, COUNT), rng.integers(0, 5, COUNT) if labels else None)


def scores(model: Model, samples: Samples, softmax: bool) -> Array:
    found = Session(model).run(dict(samples.arrays))
    values = next(iter(found.values())).astype(np.float64)
    return np.log(values) if softmax else values


def entropies(values: Array, labels: Array) -> Array:
    logs = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return -logs[np.arange(len(labels)), labels]


def differences(model, samples, labels, name, index, softmax=False) -> Array:
    """Slope of every sample's cross entropy along one weight."""
    found = []
    for sign in (1, -1):
        moved = model.weights[name].copy()
        moved[index] += sign * STEP
        other = Model(model.skeleton, {**model.weights, name: moved})
        found.append(entropies(scores(other, samples, softmax), labels))
    return (found[0] - found[1]) / (2 * STEP)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("known", [True, False], ids=["labels", "own classes"])
def test_gradients_are_slopes_of_the_cross_entropy(known, softmax):
    model = classifier(softmax=softmax)
    samples = data(model, labels=known)
    labels = samples.labels
    if labels is None:
        labels = scores(model, samples, softmax).argmax(axis=1)
    means = mean_gradients(model, samples)
    squares = mean_gradients(model, samples, squared=True)
    names = [n for n, a in model.weights.items() if a.ndim == 4]
    assert len(names) == 2
    for name in names:
        assert means[name].shape == model.weights[name].shape
        for index in ((0, 1, 1, 1), (3, 2, 0, 2)):
            wanted = differences(model, samples, labels, name, index, softmax)
            scale = np.sqrt(np.mean(wanted**2))
            assert abs(means[name][index] - wanted.mean()) <= CLOSE * scale
            assert squares[name][index] == pytest.approx(np.mean(wanted**2), rel=2 * CLOSE)


def test_the_comparison_sees_other_labels():
    model = classifier()
    samples = data(model)
    rolled = Samples(samples.arrays, (samples.labels + 1) % 5)
    one, other = (mean_gradients(model, each) for each in (samples, rolled))
    name = next(n for n, a in model.weights.items() if a.ndim == 4)
    assert np.linalg.norm(one[name] - other[name]) > 10 * CLOSE * np.linalg.norm(one[name])


def test_outputs_that_are_no_classes():
    """Mean squares are those of the outputs' own slopes, whatever the noise."""
    model = wide()
    samples = Samples(inputs(model, 8))
    found = mean_gradients(model, samples, squared=True)
    again = mean_gradients(model, samples, squared=True)
    other = mean_gradients(model, samples, squared=True, seed=1)
    for name, value in found.items():
        assert np.array_equal(value, again[name])
        assert not np.array_equal(value, other[name])
        if value.ndim > 1:
            assert value.min() >= 0
            assert value.max() > 0
            assert np.corrcoef(value.ravel(), other[name].ravel())[0, 1] > 0.2


def test_one_by_one_and_together():
    """A graph of one sample gives the same mean as one that takes them all."""
    model = classifier()
    proto = model.to_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    single, samples = Model.from_proto(proto), data(model)
    one, many = mean_gradients(single, samples), mean_gradients(model, samples)
    for name, value in many.items():
        assert one[name] == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("declared", [1, 3])
def test_squares_are_of_single_samples_whatever_batch_is_declared(declared):
    model = classifier()
    proto = model.to_proto()
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = declared
    fixed, samples = Model.from_proto(proto), data(model)
    one, many = (mean_gradients(m, samples, squared=True) for m in (fixed, model))
    for name, value in many.items():
        assert one[name] == pytest.approx(value, rel=1e-3, abs=1e-9)


def test_labels_that_are_no_classes():
    model = classifier()
    with pytest.raises(DataError, match="labels go from 9"):
        mean_gradients(model, Samples(inputs(model, COUNT), np.full(COUNT, 9)))


def test_a_single_number_per_run_has_gradients():
    """Whether its samples come one by one, as a declared batch of 1 makes them, or there is
    but one."""
    g = Graph(3, 6, 6)
    t = g.op("Relu", g.conv("x", 3, 8))
    model = g.model(g.op("Gemm", g.mean(t), g.w(8, 1), g.w(1)))
    proto = model.to_proto()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del proto.graph.value_info[:]
    arrays = inputs(model, COUNT)
    open_, fixed = (
        mean_gradients(m, Samples(arrays)) for m in (model, Model.from_proto(proto))
    )
    one = mean_gradients(model, Samples({name: a[:1] for name, a in arrays.items()}))
    for found in (open_, fixed, one):
        assert all(np.all(np.isfinite(array)) for array in found.values())
        assert max(np.abs(array).max() for array in found.values()) > 0
