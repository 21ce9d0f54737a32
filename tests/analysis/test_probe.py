"""Random inputs are found on which a model runs, or the error says what to give."""

import numpy as np
import onnx
import pytest

from onnxcomp.analysis.probe import probe_feeds, random_inputs
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from tests.graphs import shared_models
from tests.passes.exact_checks import graph, normal


def fixed_size(size: int) -> Model:
    """A model with open height and width that runs on one size only."""
    return graph(
        "float[N,3,H,W] x",
        "float[N,4] y",
        "f = Flatten (x)  y = Gemm (f, w)",
        {"w": normal(3 * size * size, 4)},
    )


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_open_axes_are_tried(size):
    model = fixed_size(size)
    samples = random_inputs(model, 3)
    assert samples.arrays["x"].shape == (3, 3, size, size)
    assert samples.origin == "random"
    Session(model).run(probe_feeds(model))


def test_unusual_sizes_need_samples():
    model = fixed_size(37)
    with pytest.raises(UnsupportedModelError, match="--data"):
        random_inputs(model, 1)
    samples = Samples({"x": np.zeros((2, 3, 37, 37), np.float32)})
    assert probe_feeds(model, samples)["x"].shape == (1, 3, 37, 37)


def test_unknown_rank():
    proto = fixed_size(32).to_proto()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UnsupportedModelError, match="unknown rank"):
        random_inputs(Model.from_proto(proto), 1)


def test_seeds():
    model = fixed_size(32)
    first, same, other = (probe_feeds(model, seed=seed)["x"] for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_a_batch_name_on_several_inputs_is_the_batch():
    model = graph("float[B,4] x, float[4,B] m", "float[B,B] y", "y = MatMul (x, m)")
    feed = probe_feeds(model)
    assert feed["x"].shape == (1, 4)
    assert feed["m"].shape == (4, 1)


def test_fixed_batch():
    model = graph("float[3,4] x", "float[3,4] y", "y = Relu (x)")
    assert probe_feeds(model)["x"].shape == (3, 4)
    samples = Samples({"x": np.ones((1, 4), np.float32)})
    assert probe_feeds(model, samples)["x"].shape == (3, 4)


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_real_models(path):
    model = Model.from_proto(onnx.load(path))
    feed = probe_feeds(model)
    for value in model.signature.inputs:
        assert feed[value.name].dtype == value.dtype
        assert feed[value.name].ndim == len(value.shape)
