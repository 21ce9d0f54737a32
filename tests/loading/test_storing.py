"""Reading models that are only stored: what would refuse to run is packed and comes back."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.helper import make_node
from onnx.numpy_helper import from_array

from onnxcomp import codec
from onnxcomp.errors import InvalidModelError, OnnxcompError, UnsupportedModelError
from onnxcomp.loading import LoadLimits, as_model, load, read_model
from onnxcomp.model import Model
from tests.corpus import build
from tests.loading.graphs import loop_of_unknown_length, two_matmuls, weight_with
from tests.test_corpus import damaged

# Cases of the corpus whose fault shows only where they run.
FAULTS_OF_RUNNING = {22, 23, 24, 30, 33, 34, 37, 38, 39, 40, 41, 42, 44}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[int, Path]:
    return build.build(tmp_path_factory.mktemp("corpus"))


def digest(path: Path) -> str:
    return as_model(read_model(path, to_store=True)).digest


def reason(path: Path) -> str:
    """Why a file is not loaded, without its name."""
    with pytest.raises(OnnxcompError) as error:
        load(path)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (loop_of_unknown_length, "decides while it runs"),
        (lambda: weight_with(np.nan), "'w' holds nan"),
        (lambda: weight_with(-np.inf), "'w' holds -inf"),
        (lambda: build.nodes(make_node("ImageScaler", ["x"], ["y"])), "no operator"),
        (
            lambda: build.nodes(make_node("Gelu", ["x"], ["y"], domain="com.microsoft")),
            "does not import",
        ),
        (build.conv(pads=[-1, -1, -1, -1]), "pads"),
        (build.new_opset, "opset 9999"),
    ],
)
def test_what_does_not_run_is_stored_and_refused_where_it_is_loaded(make, says, tmp_path):
    plain, packed = tmp_path / "model.onnx", tmp_path / "model.onnxc"
    plain.write_bytes(make())
    model = as_model(read_model(plain, to_store=True))
    codec.pack(model, packed)
    assert codec.unpack(packed).digest == digest(packed) == model.digest
    assert says in reason(plain)
    assert reason(packed) == reason(plain)


@pytest.mark.parametrize("case", build.CASES, ids=lambda case: f"{case.number}")
def test_all_other_faults_of_the_corpus_are_refused(case, corpus, tmp_path):
    path = corpus[case.number]
    if case.expected == build.OK or case.number in FAULTS_OF_RUNNING:
        model = as_model(read_model(path, to_store=True))
        codec.pack(model, tmp_path / "model.onnxc")
        assert digest(tmp_path / "model.onnxc") == model.digest
        return
    with pytest.raises(OnnxcompError, match=re.escape(case.says)) as error:
        read_model(path, to_store=True)
    assert type(error.value).__name__ == case.expected


def test_what_is_left_of_damaged_files_comes_back(tmp_path):
    path, packed = tmp_path / "damaged.onnx", tmp_path / "model.onnxc"
    stored = 0
    for data in damaged(seed=4, count=200):
        if len(data) > 20_000:
            continue
        path.write_bytes(data)
        try:
            model = as_model(read_model(path, to_store=True))
        except (InvalidModelError, UnsupportedModelError):
            continue
        codec.pack(model, packed)
        assert codec.unpack(packed).digest == digest(packed) == model.digest
        stored += 1
    assert stored > 10


@pytest.mark.parametrize("name", ["sparse_tensor", "sparse_tensors"])
def test_no_reference_to_another_file_hides_beside_the_value_of_an_attribute(name, tmp_path):
    model = build.model(build.graph([make_node("LeakyRelu", ["x"], ["y"], alpha=0.5)]))
    (attribute,) = model.graph.node[0].attribute
    hidden = onnx.SparseTensorProto()
    hidden.values.external_data.add(key="location", value="/etc/passwd")
    held = getattr(attribute, name)
    held.append(hidden) if name.endswith("s") else held.CopyFrom(hidden)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match=rf"holds \['f', '{name}'\]"):
        read_model(tmp_path / "model.onnx", to_store=True)


def test_models_of_a_program_are_stored_whatever_their_weights_hold(tmp_path):
    plain, packed = tmp_path / "model.onnx", tmp_path / "model.onnxc"
    bits = np.random.default_rng(0).integers(0, 2**32, (16, 16), np.uint32)
    bits[0] = 0x7FC00000 + np.arange(16)  # NaN, each of another payload
    weights = {"a": bits.view(np.float32), "b": np.full((16, 16), np.inf, np.float32)}
    model = Model.from_proto(
        two_matmuls(*(from_array(array, name) for name, array in weights.items()))
    )
    model.save(plain)
    codec.pack(model, packed)
    unpacked = codec.unpack(packed)
    assert {n: w.tobytes() for n, w in unpacked.weights.items()} == {
        name: array.tobytes() for name, array in weights.items()
    }
    assert unpacked.digest == digest(packed) == digest(plain) == model.digest
    assert reason(packed) == reason(plain)
    assert "'a' holds" in reason(plain)


@pytest.mark.parametrize("limit", ["model_bytes", "elements", "nodes", "attributes"])
def test_limits_hold_for_what_is_stored(limit, tmp_path):
    path = tmp_path / "model.onnx"
    node = make_node("Gemm", ["x", "w"], ["y"], alpha=0.5)
    path.write_bytes(build.nodes(node, weights=[build.weight(16, 16)]))
    value = {"model_bytes": path.stat().st_size, "elements": 256, "nodes": 1, "attributes": 1}
    assert read_model(path, limits=LoadLimits(**{limit: value[limit]}), to_store=True)
    with pytest.raises(InvalidModelError, match=r"at most|more than"):
        read_model(path, limits=LoadLimits(**{limit: value[limit] - 1}), to_store=True)
