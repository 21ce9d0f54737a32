"""The bounded child process: what passes, and how each kind of failure is reported."""

import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.errors import ExecutionError, InvalidModelError, UnsupportedModelError
from onnxcomp.loading import LoadedModel, read_model
from onnxcomp.sandbox import first_run
from tests.corpus import build

SHARED = Path(__file__).parents[2] / "shared" / "models"
FEED = {"x": np.ones((1, 16), np.float32)}


def unchecked(path: Path, data: bytes) -> LoadedModel:
    """Return what `read_model` would, had it no checks."""
    path.write_bytes(data)
    proto = onnx.ModelProto.FromString(data)
    return LoadedModel(
        proto=proto,
        external={},
        path=path,
        files=(path,),
        file_bytes=len(data),
        foreign_ops=(),
        reordered=False,
        warnings=(),
    )


def checked(path: Path, data: bytes) -> LoadedModel:
    path.write_bytes(data)
    return read_model(path)


@pytest.mark.parametrize(
    "data",
    [
        build.matmul(build.weight(16, 16)),
        build.nested_ifs(8),
        build.loop(10_000),
        build.functions([("F1", "F1"), ("F2", "F2"), ("Relu", "Relu")]),
    ],
    ids=["matmul", "if", "loop", "functions"],
)
def test_sound_models_run(data, tmp_path):
    first_run(checked(tmp_path / "m.onnx", data), FEED)


def test_external_data_is_found_beside_the_model(tmp_path):
    path = build.build(tmp_path)[2]
    first_run(read_model(path), FEED)


def test_a_reordered_model_is_checked_in_its_new_order(tmp_path):
    data = build.nodes(
        onnx.helper.make_node("Relu", ["a"], ["y"]),
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"]),
        weights=[build.weight(16, 16)],
    )
    loaded = checked(tmp_path / "m.onnx", data)
    first_run(loaded, FEED)
    with pytest.raises(InvalidModelError, match="ONNX specification"):
        first_run(unchecked(tmp_path / "m.onnx", data), FEED)


def test_input_names_may_be_anything(tmp_path):
    proto = onnx.ModelProto.FromString(build.matmul(build.weight(16, 16)))
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "../file"
    loaded = checked(tmp_path / "m.onnx", proto.SerializeToString())
    first_run(loaded, {"../file": FEED["x"]})


@pytest.mark.parametrize(("number", "seconds"), [(34, 3), (37, 3)])
def test_hanging_models_are_killed(number, seconds, tmp_path):
    data = build.CASES[number - 1].make()
    start = time.perf_counter()
    with pytest.raises(ExecutionError, match="did not end within 3 s"):
        first_run(unchecked(tmp_path / "m.onnx", data), FEED, timeout_s=seconds)
    assert time.perf_counter() - start < seconds + 3


def test_memory_is_bounded(tmp_path):
    data = build.CASES[24 - 1].make()
    with pytest.raises(ExecutionError, match="run the model failed"):
        first_run(
            unchecked(tmp_path / "m.onnx", data),
            {"x": np.ones((1, 1), np.float32)},
            memory_bytes=2**30,
            timeout_s=20,
        )


def test_failures_name_their_stage(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(InvalidModelError, match="ONNX specification"):
        first_run(unchecked(path, build.CASES[40 - 1].make()))
    with pytest.raises(UnsupportedModelError, match="does not support"):
        first_run(checked(path, build.foreign("com.example", "Secret")))
    wrong = {"x": np.ones((1, 17), np.float32)}
    with pytest.raises(ExecutionError, match="run the model failed"):
        first_run(checked(path, build.matmul(build.weight(16, 16))), wrong)


def test_a_child_that_cannot_start_is_reported(tmp_path):
    loaded = checked(tmp_path / "m.onnx", build.matmul(build.weight(16, 16)))
    with pytest.raises(ExecutionError, match="failed"):
        first_run(loaded, FEED, memory_bytes=2**24)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    loaded = checked(tmp_path / "m.onnx", build.loop(2))
    first_run(loaded, FEED)
    with pytest.raises(ExecutionError):
        first_run(loaded, {"x": np.ones((2, 2, 2), np.float32)})
    assert list(temporary.iterdir()) == []


def test_a_real_model_runs():
    path = SHARED / "akamaster_cifar10_resnet20.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    loaded = read_model(path)
    name = loaded.proto.graph.input[0].name
    first_run(loaded, {name: np.zeros((1, 3, 32, 32), np.float32)})
