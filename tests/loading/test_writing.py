"""Writing model files atomically, their weights streamed."""

import os
import stat
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array

from onnxcomp.errors import ParameterError
from onnxcomp.loading import read_model, write_model, write_text
from tests.corpus import build
from tests.loading.graphs import two_matmuls

SHARED = Path(__file__).parents[3] / "shared" / "models"
REAL = sorted(SHARED.glob("*.onnx"))[:6] or [
    pytest.param(Path("absent"), marks=pytest.mark.skip("../shared is absent"))
]
THRESHOLDS = pytest.mark.parametrize("threshold", [2**31, 0], ids=["embedded", "external"])


def matmul(size: int) -> onnx.ModelProto:
    data = build.matmul(build.weight(size, size), x=(1, size))
    return onnx.ModelProto.FromString(data)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
@THRESHOLDS
def test_what_is_written_is_read_back(path, threshold, tmp_path):
    proto, target = onnx.load(path), tmp_path / "out.onnx"
    size = write_model(proto, target, external_threshold=threshold)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (tmp_path / "out.onnx.data").exists() == (threshold == 0)
    loaded = read_model(target)
    assert bool(loaded.external) == (threshold == 0)
    assert loaded.file_bytes == size
    for tensor in loaded.proto.graph.initializer:
        if tensor.name in loaded.external:
            tensor.raw_data = loaded.external[tensor.name].tobytes()
    assert loaded.proto == proto
    onnx.checker.check_model(target, full_check=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "bool", "bfloat16"])
@THRESHOLDS
def test_arrays_are_streamed_whatever_their_layout(dtype, threshold, tmp_path):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    bits = np.random.default_rng(0).integers(0, 2, (96, 64))
    arrays = {
        "w": bits.astype(kind).T,
        "scalar": np.array(1, kind),
        "empty": np.empty((0, 4), kind),
    }
    tensors = [
        TensorProto(
            name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(kind), dims=a.shape
        )
        for name, a in arrays.items()
    ]
    proto = build.model(build.graph([make_node("Relu", ["x"], ["y"])], tensors))
    before = proto.SerializeToString()
    target = tmp_path / "m.onnx"
    write_model(proto, target, external=arrays, external_threshold=threshold)
    assert proto.SerializeToString() == before
    for tensor in onnx.load(target).graph.initializer:
        np.testing.assert_array_equal(to_array(tensor), arrays[tensor.name])
    assert (tmp_path / "m.onnx.data").exists() == (threshold == 0)


def test_external_tensors_are_aligned(tmp_path):
    proto = two_matmuls(build.weight(99, 99, name="a"), build.weight(77, 77, name="b"))
    write_model(proto, tmp_path / "m.onnx", external_threshold=0)
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in stored]
    assert [int(entry["offset"]) for entry in entries] == [0, 40960]
    assert {entry["location"] for entry in entries} == {"m.onnx.data"}


@THRESHOLDS
def test_streaming_copies_no_weights(threshold, tmp_path):
    values = np.ones((4096, 4096), np.float32)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=values.shape)
    proto = onnx.ModelProto.FromString(build.matmul(tensor, x=(1, 4096)))
    target = tmp_path / "m.onnx"
    tracemalloc.start()
    write_model(proto, target, external={"w": values}, external_threshold=threshold)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 16


def test_unknown_fields_and_metadata_survive(tmp_path):
    unknown = bytes([0xC2, 0x3E, 2, 65, 66])  # field 1000, two bytes
    proto = onnx.ModelProto.FromString(build.matmul(build.weight(16, 16)) + unknown)
    proto.metadata_props.add(key="author", value="vendor")
    proto.graph.metadata_props.add(key="k", value="v")
    write_model(proto, tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    assert onnx.ModelProto.FromString(data) == proto
    assert unknown in data


@pytest.mark.parametrize("kind", ["itself", "symlink", "hard link", "data file"])
def test_inputs_are_never_overwritten(kind, tmp_path):
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    if kind == "data file":
        source = tmp_path / "out.onnx.data"
    source.write_bytes(b"precious")
    if kind == "itself":
        (tmp_path / "sub").mkdir()
        target = tmp_path / "sub" / ".." / "in.onnx"
    elif kind == "symlink":
        target.symlink_to(source)
    elif kind == "hard link":
        target.hardlink_to(source)
    with pytest.raises(ParameterError, match="never overwritten"):
        write_model(matmul(64), target, inputs=[source], external_threshold=0)
    assert source.read_bytes() == b"precious"


def test_other_files_are_replaced_and_links_are_not_followed(tmp_path):
    other, target = tmp_path / "other", tmp_path / "out.onnx"
    other.write_bytes(b"kept")
    target.symlink_to(other)
    write_model(matmul(16), target, inputs=[tmp_path / "in.onnx"])
    assert other.read_bytes() == b"kept"
    assert read_model(target).path == target


@pytest.mark.parametrize("kind", ["folder", "fifo", "no folder"])
def test_impossible_targets_are_refused(kind, tmp_path):
    target = tmp_path / "out.onnx"
    if kind == "folder":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target = tmp_path / "absent" / "out.onnx"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ParameterError, match="cannot be written"):
        write_model(matmul(16), target)
    assert sorted(tmp_path.iterdir()) == before


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ParameterError, match="not writable"):
        write_model(matmul(16), tmp_path / "out.onnx")


@pytest.mark.parametrize("failing", ["fsync", "rename", "write"])
def test_a_failure_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_for_model(source: Path, to: Path) -> None:
        if to == target:
            fail()
        source.rename(to)

    if failing == "fsync":
        monkeypatch.setattr("os.fsync", fail)
    elif failing == "rename":
        monkeypatch.setattr(Path, "replace", fail_for_model)
    else:
        monkeypatch.setattr("onnxcomp.loading.writing._write_proto", fail)
    with pytest.raises(ParameterError, match="No space left"):
        write_model(matmul(64), target, external_threshold=0)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == b"old"


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcomp.loading.writing._write_proto", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(matmul(16), tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_atomically_too(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    write_text(target, "ä")
    assert target.read_bytes() == "ä".encode()
    with pytest.raises(ParameterError, match="never overwritten"):
        write_text(target, "b", inputs=[target])

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ParameterError, match="No space left"):
        write_text(target, "b")
    assert target.read_bytes() == "ä".encode()
    assert list(tmp_path.iterdir()) == [target]


def test_new_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_model(matmul(16), tmp_path / "out.onnx")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "'w' has no array"),
        ({"w": np.ones((16, 15), np.float32)}, "declares"),
        ({"w": np.ones((16, 16), np.float64)}, "declares"),
        ({"w": np.ones((16, 16), np.float32), "v": np.ones(1)}, "no initializer 'v'"),
    ],
)
def test_arrays_must_fit_the_model(arrays, says, tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16, 16])
    proto = onnx.ModelProto.FromString(build.matmul(tensor))
    with pytest.raises(ParameterError, match=says):
        write_model(proto, tmp_path / "out.onnx", external=arrays)
    assert list(tmp_path.iterdir()) == []


def test_a_payload_and_an_array_for_one_tensor_are_refused(tmp_path):
    array = to_array(from_array(np.ones((16, 16), np.float32)))
    with pytest.raises(ParameterError, match="has a payload"):
        write_model(matmul(16), tmp_path / "out.onnx", external={"w": array})


@pytest.mark.heavy
def test_models_above_two_gigabytes_get_a_data_file_by_themselves(tmp_path):
    array = np.ones((17_000, 17_000), np.float32)
    tensors = [TensorProto(name=name, data_type=1, dims=array.shape) for name in "ab"]
    external = {"a": array, "b": array}
    size = write_model(two_matmuls(*tensors), tmp_path / "big.onnx", external=external)
    assert size > 2 * 2**30
    loaded = read_model(tmp_path / "big.onnx")
    assert loaded.file_bytes == size
    np.testing.assert_array_equal(loaded.external["b"][-1], array[-1])
