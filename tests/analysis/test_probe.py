"""Random inputs are found on which a model runs, or the error says what to give."""

import numpy as np
import onnx
import pytest

from onnxcomp.analysis import probe
from onnxcomp.analysis.probe import pixel_ranges, probe_feeds, random_inputs
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from tests.graphs import shared_models
from tests.passes.exact_checks import graph, normal
from tests.unusual import calling


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


@pytest.mark.parametrize(
    ("body", "weight", "shape"),
    [
        ("y = Conv (x, w)", (4, 5, 3, 3), (1, 5, 224, 224)),
        ("y = Conv<group = 2> (x, w)", (4, 3, 3, 3), (1, 6, 224, 224)),
        ("y = ConvTranspose (x, w)", (5, 4, 3, 3), (1, 5, 224, 224)),
        ("a = Mul (x, c) b = Relu (a) y = Conv (b, w)", (4, 5, 3, 3), (1, 5, 224, 224)),
        ("s = Shape (x) y = Conv (x, w)", (4, 5, 3, 3), (1, 5, 224, 224)),
        ("y = MatMul (x, w)", (5, 3), (1, 224, 224, 5)),
        (
            "t = Transpose<perm = [0,3,1,2]> (x) y = Conv (t, w)",
            (4, 5, 3, 3),
            (1, 224, 224, 5),
        ),
    ],
)
def test_open_channels_are_those_of_the_first_weight(body, weight, shape, monkeypatch):
    weights = {"w": normal(*weight), "c": np.float32(2)}
    model = graph("float[N,C,H,W] x", "float[N,K,I,J] y", body, weights)
    runs = []
    monkeypatch.setattr(probe, "capture_tensors", lambda _, feed: runs.append(feed["x"].shape))
    random_inputs(model, 1)
    assert runs == [shape]


def test_open_channels_behind_a_call():
    assert random_inputs(calling(channels="C"), 2).arrays["x"].shape == (2, 3, 8, 8)


def test_shapes_that_are_tried_are_bounded():
    model = graph("float[N,C,D,H,W] x", "float[N,C,D,H,W] y", "y = Exp (x)")
    shapes = [found["x"] for found in probe.usual_shapes(model)]
    assert (1, 1, 1, 1, 1) in shapes
    assert (1, 64, 64, 64, 64) not in shapes
    assert all(np.prod(shape) <= 2**23 for shape in shapes)


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


def normalised(body: str, kind: str = "float", **constants: object) -> Model:
    """A model that begins with `body`, from x to n, in front of a convolution."""
    weights = {"w": normal(4, 3, 3, 3)}
    weights |= {name: np.asarray(value, np.float32) for name, value in constants.items()}
    text = f"{body} y = Conv (n, w)"
    return graph(f"{kind}[N,3,32,32] x", "float[N,4,30,30] y", text, weights)


def per_channel(*values: float) -> np.ndarray:
    return np.reshape(values, (3, 1, 1))


IMAGENET = {
    "a": per_channel(0.485, 0.456, 0.406),
    "b": per_channel(0.229, 0.224, 0.225),
}
BYTES, UNITS = (0.0, 255.0), (0.0, 1.0)


@pytest.mark.parametrize(
    ("body", "constants", "expected"),
    [
        ("n = Div (x, a)", {"a": 255}, BYTES),
        ("n = Mul (x, a)", {"a": 1 / 255}, BYTES),
        ("d = Div (x, a) n = Sub (d, b)", {"a": 127.5, "b": 1}, BYTES),
        ("d = Sub (x, a) n = Div (d, b)", {"a": 127, "b": 128}, BYTES),
        ("n = Sub (x, a)", {"a": per_channel(104, 117, 123)}, BYTES),
        ("n = Add (a, x)", {"a": -127}, BYTES),
        ("d = Div (x, c) e = Sub (d, a) n = Div (e, b)", {"c": 255, **IMAGENET}, BYTES),
        ("d = Sub (x, a) n = Div (d, b)", IMAGENET, UNITS),
        ("d = Mul (x, a) n = Sub (d, b)", {"a": 2, "b": 1}, UNITS),
        ("d = Sub (a, x) n = Div (d, b)", {"a": 0.5, "b": 0.5}, UNITS),
        ("n = Identity (x)", {}, None),
        ("n = Mul (x, a)", {"a": 3}, None),
        ("n = Mul (x, a)", {"a": 0}, None),
        ("n = Div (a, x)", {"a": 255}, None),
        ("n = Add (x, x)", {}, None),
        ("d = Relu (x) n = Div (d, a)", {"a": 255}, None),
    ],
)
def test_a_normalisation_tells_the_range_of_pixels(body, constants, expected):
    model = normalised(body, **constants)
    assert pixel_ranges(model) == ({} if expected is None else {"x": expected})
    found = random_inputs(model, 8).arrays["x"]
    if expected is None:
        assert found.mean() == pytest.approx(0, abs=1e-3)
        assert found.std() == pytest.approx(1, abs=1e-3)
    else:
        low, high = expected
        assert low <= found.min() < low + 0.1 * (high - low)
        assert found.max() > high - 0.1 * (high - low)


def test_layout_changes_and_casts_do_not_hide_it():
    body = "c = Cast<to=1> (x) t = Transpose<perm=[0,1,3,2]> (c) n = Div (t, a)"
    assert pixel_ranges(normalised(body, "float16", a=255)) == {"x": BYTES}
    pictures = random_inputs(normalised(body, "uint8", a=255), 8).arrays["x"]
    assert pictures.dtype == np.uint8
    assert pictures.std() > 40


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_real_models(path):
    model = Model.from_proto(onnx.load(path))
    feed = probe_feeds(model)
    for value in model.signature.inputs:
        assert feed[value.name].dtype == value.dtype
        assert feed[value.name].ndim == len(value.shape)
