"""Reading model files with their external data."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node, make_tensor
from onnx.numpy_helper import from_array, to_array

from onnxcomp import codec
from onnxcomp.errors import InvalidModelError, UnsupportedModelError
from onnxcomp.loading import LoadLimits, as_model, load, read_model
from tests.corpus import build
from tests.loading.graphs import refused, two_matmuls

SHARED = Path(__file__).parents[3] / "shared" / "models"
REAL = sorted(SHARED.glob("*.onnx")) or [
    pytest.param(Path("absent"), marks=pytest.mark.skip("../shared is absent"))
]


def refer(tensor: TensorProto, location: str, **entries: int) -> TensorProto:
    """Return the tensor without payload, with a reference to external data."""
    reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    reference.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **entries}.items():
        reference.external_data.add(key=key, value=str(text))
    return reference


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_models_are_read_unchanged(path):
    loaded = read_model(path)
    assert loaded.proto == onnx.load(path)
    assert loaded.file_bytes == path.stat().st_size
    assert (loaded.foreign_ops, loaded.warnings, loaded.reordered) == ((), (), False)


def test_a_link_to_a_model_is_followed_to_its_folder(tmp_path):
    paths = build.build(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.onnx"
    link.symlink_to(paths[2])
    loaded = read_model(link)
    assert loaded.path == paths[2].resolve()
    assert loaded.files == (loaded.path, loaded.path.with_name("ok.bin"))
    assert list(loaded.external) == ["w"]


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "zero", "nul"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "model.onnx"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    with pytest.raises(InvalidModelError, match=r"model\.onnx"):
        read_model(f"{path}\0" if kind == "nul" else path)


def test_the_error_names_the_file_and_keeps_its_type(read):
    refused(read, build.new_opset(), r"model\.onnx: .*opset 9999", UnsupportedModelError)


def test_size_limits(read, tmp_path):
    data = build.matmul(build.weight(16, 16))
    assert read(data, model_bytes=len(data)).file_bytes == len(data)
    with pytest.raises(InvalidModelError, match="at most"):
        read(data, model_bytes=len(data) - 1)
    path = build.build(tmp_path / "corpus")[2]
    total = path.stat().st_size + 4096
    assert read_model(path, limits=LoadLimits(total_bytes=total)).file_bytes == total
    with pytest.raises(InvalidModelError, match="external data take"):
        read_model(path, limits=LoadLimits(total_bytes=total - 1))


@pytest.fixture
def packed(tmp_path) -> Path:
    """A packed file of some 14 kB, nearly all of it a weight of 16 kB."""
    plain = tmp_path / "model.onnx"
    plain.write_bytes(build.matmul(build.weight(64, 64), x=(1, 64)))
    codec.pack(load(plain), tmp_path / "model.onnxc")
    return tmp_path / "model.onnxc"


def test_the_limit_of_protobuf_is_none_of_packed_files(packed):
    limits = LoadLimits(model_bytes=4096)
    assert packed.stat().st_size > 2 * limits.model_bytes
    loaded = read_model(packed, limits=limits)
    assert loaded.packed
    assert loaded.file_bytes == packed.stat().st_size
    plain = packed.with_suffix(".onnx")
    assert as_model(loaded).digest == load(plain).digest
    with pytest.raises(InvalidModelError, match="at most 4096 are allowed"):
        read_model(plain, limits=limits)


def test_packed_files_are_as_large_as_what_they_hold_may_be(packed):
    size = packed.stat().st_size
    with pytest.raises(InvalidModelError, match=f"has {size} bytes; at most {size - 1} are"):
        read_model(packed, limits=LoadLimits(total_bytes=size - 1))
    os.truncate(packed, 2**32 + 1)
    with pytest.raises(InvalidModelError, match=f"at most {2**32} are allowed"):
        read_model(packed)


def test_only_the_first_bytes_tell_a_packed_file(packed):
    size = packed.stat().st_size
    os.truncate(packed, 3 * 2**30)  # what follows is in no block of the disk
    tracemalloc.start()
    try:
        with pytest.raises(InvalidModelError, match=f"was written with {size}"):
            read_model(packed)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("length", [1, 7, 8])
def test_files_shorter_than_a_head_are_refused(length, packed):
    packed.write_bytes(packed.read_bytes()[:length])
    with pytest.raises(InvalidModelError, match=r"model\.onnxc: "):
        read_model(packed)


def test_external_arrays_are_mapped_read_only_and_taken_out_of_the_model(read, tmp_path):
    values = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(b"abc" + values.tobytes())
    loaded = read(build.matmul(refer(from_array(values, "w"), "sub/w.bin", offset=3)))
    np.testing.assert_array_equal(loaded.external["w"], values)
    assert isinstance(loaded.external["w"], np.memmap)
    assert not loaded.external["w"].flags.writeable
    (initializer,) = loaded.proto.graph.initializer
    assert initializer == TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16, 16])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1024), (1024, 0)])
def test_tensors_may_share_external_bytes(first, second, read, tmp_path):
    (tmp_path / "w.bin").write_bytes(np.arange(512, dtype=np.float32).tobytes())
    a, b = build.weight(16, 16, name="a"), build.weight(16, 16, name="b")
    both = (refer(a, "w.bin", offset=first), refer(b, "./w.bin", offset=second))
    loaded = read(two_matmuls(*both))
    assert [array[0, 0] for array in loaded.external.values()] == [first / 4, second / 4]
    assert loaded.file_bytes == (tmp_path / "model.onnx").stat().st_size + 2048


def test_external_bytes_must_not_overlap(read, tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(2048))
    a, b = build.weight(16, 16, name="a"), build.weight(16, 16, name="b")
    for first, second in ((0, 4), (1020, 0)):
        both = (refer(a, "w.bin", offset=first), refer(b, "w.bin", offset=second))
        refused(read, two_matmuls(*both), "overlap")


def test_an_empty_external_tensor_needs_no_bytes(read, tmp_path):
    (tmp_path / "w.bin").touch()
    empty = refer(TensorProto(name="e", data_type=TensorProto.FLOAT, dims=[0, 4]), "w.bin")
    loaded = read(build.nodes(make_node("Relu", ["x"], ["y"]), weights=[empty]))
    assert loaded.external["e"].shape == (0, 4)
    assert not loaded.external["e"].flags.writeable


def test_external_data_that_cannot_be_mapped_is_read_into_the_model(read, tmp_path):
    packed = from_array(np.array([1, 2, 3, 4]).astype("int4"), "q")
    constant = from_array(np.arange(4, dtype=np.float32))
    (tmp_path / "w.bin").write_bytes(packed.raw_data)
    (tmp_path / "c.bin").write_bytes(constant.raw_data)
    nodes = [
        make_node("Constant", [], ["c"], value=refer(constant, "c.bin")),
        make_node("Relu", ["x"], ["y"]),
    ]
    loaded = read(build.nodes(*nodes, weights=[refer(packed, "w.bin")]))
    assert not loaded.external
    graph = loaded.proto.graph
    np.testing.assert_array_equal(to_array(graph.initializer[0]).astype(int), [1, 2, 3, 4])
    np.testing.assert_array_equal(to_array(graph.node[0].attribute[0].t), [0, 1, 2, 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_external_weights_must_be_finite(bad, read, tmp_path):
    values = np.ones((16, 16), np.float32)
    values[15, 15] = bad
    (tmp_path / "w.bin").write_bytes(values.tobytes())
    refused(read, build.matmul(refer(from_array(values, "w"), "w.bin")), f"'w' holds {bad}")


def test_an_external_loop_count_is_seen(read, tmp_path):
    model = onnx.ModelProto.FromString(build.loop(10_001))
    count = model.graph.initializer[0]
    (tmp_path / "n.bin").write_bytes(count.raw_data)
    count.CopyFrom(refer(make_tensor("trips", TensorProto.INT64, [], [0]), "n.bin"))
    refused(read, model, "10001 loop iterations")
