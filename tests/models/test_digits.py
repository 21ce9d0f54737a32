"""The bundled demo model: small, valid, and as accurate as its README says."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import models.digits
from models.digits.make import split_digits
from onnxcomp.sample_files import read_npz

FOLDER = Path(models.digits.__file__).parent


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(FOLDER / "digits.onnx"), options, ["CPUExecutionProvider"]
    )


def accuracy(session: onnxruntime.InferenceSession, name: str) -> float:
    arrays = read_npz(FOLDER / name, max_bytes=10_000_000)
    logits = session.run(None, {"input": arrays["input"]})[0]
    return float((logits.argmax(1) == arrays["labels"]).mean())


def test_the_model_is_small_and_keeps_batchnorm() -> None:
    path = FOLDER / "digits.onnx"
    assert path.stat().st_size < 1_500_000
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 17
    assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) == 7
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 1, 8, 8]


def test_its_accuracy(session: onnxruntime.InferenceSession) -> None:
    assert accuracy(session, "test.npz") == pytest.approx(0.9912, abs=5e-4)
    assert accuracy(session, "samples.npz") == 1.0


def test_the_samples_are_training_images_and_the_test_images_are_not() -> None:
    images, labels, test_images, test_labels = split_digits()
    samples = read_npz(FOLDER / "samples.npz", max_bytes=10_000_000)
    test = read_npz(FOLDER / "test.npz", max_bytes=10_000_000)
    assert samples["input"].dtype == np.float32
    assert np.array_equal(samples["input"], images[:512])
    assert np.array_equal(samples["labels"], labels[:512])
    assert np.array_equal(test["input"], test_images)
    assert np.array_equal(test["labels"], test_labels)
    assert len(test["input"]) == 797
    assert 0 <= samples["input"].min() < samples["input"].max() == 1
    seen = {image.tobytes() for image in images}
    assert not any(image.tobytes() in seen for image in test["input"])
