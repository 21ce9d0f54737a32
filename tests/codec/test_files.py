import stat
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

from onnxcomp import codec
from onnxcomp.codec import files
from onnxcomp.errors import ExecutionError, InvalidModelError
from onnxcomp.loading import load, read_model
from onnxcomp.model import Model
from onnxcomp.opening import open_model
from tests.codec.models import every_kind


def network() -> Model:
    """Two matrices, one large enough for external data; a shared vector; an uneven order."""
    rng = np.random.default_rng(0)
    arrays = {
        "large": rng.normal(size=(64, 64)).astype(np.float32),
        "few": rng.integers(-2, 3, (64, 10)).astype(np.float32),
        "shared": rng.normal(size=64).astype(np.float32),
    }
    nodes = [
        make_node("MatMul", ["x", "large"], ["a"]),
        make_node("Add", ["a", "shared"], ["b"]),
        make_node("Mul", ["b", "shared"], ["c"]),
        make_node("MatMul", ["c", "few"], ["y"]),
    ]
    x = make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    initializers = [from_array(array, name) for name, array in arrays.items()]
    graph = make_graph(nodes, "graph", [x], [y], initializers)
    return Model.from_proto(
        make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=8)
    )


@pytest.fixture
def packed(tmp_path) -> Path:
    codec.pack(network(), tmp_path / "model.onnxc")
    return tmp_path / "model.onnxc"


def run(session: ort.InferenceSession) -> np.ndarray:
    feed = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    return session.run(None, {"x": feed})[0]


def plain_session(model: Model) -> ort.InferenceSession:
    data = model.to_proto().SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_session_gives_what_the_plain_file_gives(packed, level):
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    found = run(codec.open_session(packed, options))
    assert np.allclose(found, run(plain_session(network())), rtol=1e-5, atol=1e-5)
    wrong = network()
    wrong = Model(wrong.skeleton, {**wrong.weights, "few": wrong.weights["few"] + 1})
    assert not np.allclose(found, run(plain_session(wrong)), rtol=1e-5, atol=1e-5)


def test_weights_lie_in_a_private_folder_that_is_gone(packed, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    seen: list[tuple[int, list[str]]] = []
    open_file = files.open_file

    def looking(path, *args, **kwargs):
        mode = stat.S_IMODE(path.parent.stat().st_mode)
        seen.append((mode, sorted(file.name for file in path.parent.iterdir())))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(files, "open_file", looking)
    session = codec.open_session(packed)
    assert seen == [(0o700, ["model.onnx", "model.onnx.data"])]
    assert not list(folder.iterdir())
    assert run(session).shape == (3, 10)


def test_a_refused_model_leaves_nothing_behind(tmp_path, monkeypatch):
    broken = network()
    broken.skeleton.graph.node[0].op_type = "NoSuchOperator"
    codec.pack(broken, tmp_path / "model.onnxc")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(ExecutionError, match="NoSuchOperator"):
        codec.open_session(tmp_path / "model.onnxc")
    assert not list(folder.iterdir())


def test_loading_takes_a_packed_file_like_a_plain_one(packed):
    loaded = read_model(packed)
    assert loaded.packed
    assert loaded.files == (packed,)
    assert loaded.file_bytes == packed.stat().st_size
    model = load(packed)
    assert model.digest == network().digest
    opened = open_model(packed)
    assert opened.model.digest == model.digest


def test_loading_checks_the_graph(tmp_path):
    model = network()
    weights = {**model.weights, "few": np.full((64, 10), np.nan, np.float32)}
    codec.pack(Model(model.skeleton, weights), tmp_path / "model.onnxc")
    with pytest.raises(InvalidModelError, match=r"model\.onnxc: tensor 'few' holds nan"):
        load(tmp_path / "model.onnxc")


def test_streaming_gives_every_coded_tensor_once_and_in_order(tmp_path):
    model = every_kind()
    codec.pack(model, tmp_path / "model.onnxc")
    coded = [name for name, array in model.weights.items() if array.nbytes > 64]
    names = []
    for name, array in codec.stream(tmp_path / "model.onnxc"):
        names.append(name)
        assert array.dtype == model.weights[name].dtype
        assert array.tobytes() == model.weights[name].tobytes()
    assert names == coded


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "no.onnxc"
    path.write_bytes(bytes(100))
    for read in (codec.unpack, codec.open_session, lambda p: list(codec.stream(p))):
        with pytest.raises(InvalidModelError, match=r"no\.onnxc: not a packed model"):
            read(path)
