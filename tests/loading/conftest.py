from collections.abc import Callable

import onnx
import pytest

from onnxcomp.loading import LoadedModel, LoadLimits, read_model

Read = Callable[..., LoadedModel]


@pytest.fixture
def read(tmp_path) -> Read:
    """Return a function that writes a model to `model.onnx` and reads it."""

    def read_bytes(model: onnx.ModelProto | bytes, **limits: int) -> LoadedModel:
        path = tmp_path / "model.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return read_model(path, limits=LoadLimits(**limits))

    return read_bytes
