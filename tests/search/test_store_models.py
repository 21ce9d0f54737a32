"""Models in the store of a run come back as they were; another run has another identity."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp import load
from onnxcomp.errors import ParameterError
from onnxcomp.loading import write_model
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.store import Store, identity_of
from tests.graphs import shared_models
from tests.search.cases import CASES, concat_of_three, residual

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "digits.onnx"
KEY = ("best", 0.5)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "state", "run")


def odd() -> Model:
    """What numpy cannot hold, metadata, unknown fields, an initializer with two names."""
    shared = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "w"], ["t"]),
            helper.make_node("Add", ["t", "v"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
        [
            *(numpy_helper.from_array(shared, name) for name in "wv"),
            helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"\xff"]),
            helper.make_tensor("small", TensorProto.FLOAT8E4M3FN, [2], b"\x01\x02", raw=True),
            numpy_helper.from_array(np.array(3.0), "scalar"),
            numpy_helper.from_array(np.empty((0, 4), np.int64), "empty"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.metadata_props.add(key="author", value="vendor")
    proto.graph.initializer[0].doc_string = "kept"
    unknown = bytes([0xC2, 0x3E, 2, 65, 66])  # field 1000, two bytes
    proto = onnx.ModelProto.FromString(proto.SerializeToString() + unknown)
    model = Model.from_proto(proto)
    weights = {**model.weights, "w": shared, "v": shared}
    return Model(model.skeleton, weights, foreign_ops=("ai.acme::Op",))


def assert_comes_back(store: Store, model: Model, tmp_path: Path) -> Model:
    store.put_model("best", KEY, model)
    found = Store(store.folder, "run").get_model("best", KEY)
    assert found is not None
    assert found.digest == model.digest
    assert found.skeleton == model.skeleton
    assert list(found.weights) == list(model.weights)
    assert (found.files, found.file_bytes) == (model.files, model.file_bytes)
    assert found.foreign_ops == model.foreign_ops
    for name, array in found.weights.items():
        wanted = model.weights[name]
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        assert array.tobytes() == wanted.tobytes()
        assert not array.flags.writeable
    for one, name in ((model, "original.onnx"), (found, "stored.onnx")):
        one.save(tmp_path / name)
    written = [(tmp_path / name).read_bytes() for name in ("original.onnx", "stored.onnx")]
    assert written[0] == written[1]
    return found


@pytest.mark.parametrize("make", [*CASES.values(), odd], ids=lambda make: make.__name__)
def test_models_come_back(store, make, tmp_path):
    assert_comes_back(store, make(), tmp_path)


@pytest.mark.parametrize("path", [DIGITS, *shared_models()], ids=lambda p: p.stem)
def test_files_come_back(store, path, tmp_path):
    model = load(path)
    found = assert_comes_back(store, model, tmp_path)
    with pytest.raises(ParameterError, match="never overwritten"):
        found.save(path)


def test_sealed_models_and_external_data_come_back(store, tmp_path):
    draft = residual().edit()
    name = next(iter(draft.weights))
    draft.set_weight(name, draft.weights[name] * np.float32(1.5))
    sealed = draft.seal(by="test")
    assert_comes_back(store, sealed, tmp_path)
    proto = sealed.to_proto()
    write_model(proto, tmp_path / "out.onnx", external_threshold=0)
    external = load(tmp_path / "out.onnx")
    assert len(external.files) == 2
    assert_comes_back(store, external, tmp_path)


def test_identity_tells_runs_apart():
    model, other = residual(), concat_of_three()
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    settings = Settings()
    given = [
        (model, None),
        (other, None),
        (model, Samples({"x": x})),
        (model, Samples({"y": x})),
        (model, Samples({"x": x.astype(np.float64)})),
        (model, Samples({"x": x.reshape(2, 4, 3)})),
        (model, Samples({"x": x + np.float32(1e-6)})),
        (model, Samples({"x": x}, labels=np.zeros(2))),
        (model, Samples({"x": x}, origin="random")),
        (model, None, settings),
        (model, None, dataclasses.replace(settings, seed=1)),
        (model, None, dataclasses.replace(settings, limits=Limits(macs=0.5))),
        (model, None, dataclasses.replace(settings, limits=Limits(params=0.5))),
        (model, None, "a", 1),
        (model, None, "a", 1.0),
    ]
    found = [identity_of(*one) for one in given]
    assert len(set(found)) == len(given)
    assert found == [identity_of(*one) for one in given]


def test_identity_reads_contents_not_layout():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    plain = identity_of(residual(), Samples({"x": x}))
    assert identity_of(residual(), Samples({"x": np.asfortranarray(x)})) == plain
    reordered = np.frombuffer(x.tobytes(), np.float32).reshape(x.shape, order="F")
    assert identity_of(residual(), Samples({"x": reordered})) != plain
