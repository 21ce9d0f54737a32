import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node, make_sparse_tensor, make_tensor
from onnx.numpy_helper import from_array
from typer.testing import CliRunner

from onnxcomp.cli import app
from onnxcomp.loading import load
from tests.codec.models import every_kind
from tests.codec.test_files import network
from tests.corpus import build
from tests.loading.graphs import loop_of_unknown_length, weight_with
from tests.unusual import calling


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def plain(tmp_path):
    network().save(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("profile", ["fast", "balanced"])
def test_pack_and_unpack(profile, plain, tmp_path):
    packed, back = tmp_path / "model.onnxc", tmp_path / "back.onnx"
    done = run("pack", plain, "-o", packed, "--profile", profile)
    assert done.exit_code == 0, done.output
    size = packed.stat().st_size
    assert f"({size:,} bytes, {size / plain.stat().st_size:.1%})" in done.stdout
    assert run("unpack", packed, "-o", back).exit_code == 0
    assert load(back).digest == load(packed).digest == network().digest


def test_functions_come_back_as_they_were(tmp_path):
    plain, packed, back = (tmp_path / name for name in ("a.onnx", "a.onnxc", "b.onnx"))
    calling().save(plain)
    assert run("pack", plain, "-o", packed).exit_code == 0
    assert run("unpack", packed, "-o", back).exit_code == 0
    assert back.read_bytes() == plain.read_bytes()
    assert len(load(packed).skeleton.functions) == 2


def test_other_commands_read_packed_files(plain, tmp_path):
    packed = tmp_path / "model.onnxc"
    assert run("pack", plain, "-o", packed).exit_code == 0
    shown = run("inspect", packed)
    assert shown.exit_code == 0, shown.output
    assert "large" in run("inspect", packed, "--json", "-").stdout


def test_an_input_is_never_overwritten(plain, tmp_path):
    before = plain.read_bytes()
    refused = run("pack", plain, "-o", plain)
    assert refused.exit_code == 2
    assert "never overwritten" in refused.stderr
    assert plain.read_bytes() == before


def test_only_packed_files_are_unpacked(plain, tmp_path):
    refused = run("unpack", plain, "-o", tmp_path / "back.onnx")
    assert refused.exit_code == 2
    assert "not a packed model" in refused.stderr
    assert not (tmp_path / "back.onnx").exists()


def test_damaged_files_and_unknown_profiles_are_refused(plain, tmp_path):
    packed = tmp_path / "model.onnxc"
    assert run("pack", plain, "-o", packed).exit_code == 0
    packed.write_bytes(packed.read_bytes()[:-1])
    assert run("unpack", packed, "-o", tmp_path / "back.onnx").exit_code == 2
    assert run("pack", plain, "-o", packed, "--profile", "smallest").exit_code == 2


def test_a_failed_write_leaves_the_old_file(plain, tmp_path, monkeypatch):
    packed = tmp_path / "model.onnxc"
    assert run("pack", plain, "-o", packed).exit_code == 0
    before = packed.read_bytes()
    every_kind().save(plain)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
    assert run("pack", plain, "-o", packed).exit_code == 2
    assert packed.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnxc"]


RELU = make_node("Relu", ["x"], ["y"])
MANY = np.arange(-150, 150).reshape(3, 100)


def initializer(tensor: TensorProto) -> bytes:
    return build.nodes(RELU, weights=[tensor])


def quantized() -> bytes:
    """A MatMul between QuantizeLinear and DequantizeLinear."""
    weights = [
        from_array(np.arange(-128, 128, dtype=np.int8).reshape(16, 16), "q"),
        from_array(np.float32(0.1), "s"),
        from_array(np.int8(0), "z"),
    ]
    nodes = [
        make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        make_node("MatMul", ["xd", "w"], ["y"]),
    ]
    return build.nodes(*nodes, weights=weights)


def unusual() -> bytes:
    """Metadata, a declared sequence, and a NaN and text among the attributes."""
    node = make_node("LeakyRelu", ["x"], ["y"], alpha=float("nan"), mode="text", names=["a"])
    model = build.model(build.graph([node]))
    model.metadata_props.add(key="trace", value="v" * 5000)
    model.graph.node[0].metadata_props.add(key="k", value="v")
    kind = model.graph.value_info.add(name="list").type
    kind.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    return model.SerializeToString()


@pytest.mark.parametrize(
    "make",
    [
        loop_of_unknown_length,
        lambda: weight_with(np.nan),
        lambda: weight_with(np.inf),
        lambda: build.foreign("com.example", "Secret"),
        lambda: build.functions([("Relu", "F1"), ("Neg", "Relu")]),
        quantized,
        unusual,
        lambda: initializer(from_array((MANY % 16 - 8).astype("int4"), "w")),
        lambda: initializer(from_array(MANY.astype("float8_e4m3fn"), "w")),
        lambda: initializer(from_array(MANY.astype("bfloat16"), "w")),
        lambda: initializer(from_array(MANY.astype(np.complex64), "w")),
        lambda: initializer(make_tensor("w", TensorProto.STRING, [3], [b"a", b"", b"b"])),
        lambda: build.nodes(make_node("Constant", [], ["c"], value=from_array(MANY)), RELU),
    ],
)
def test_any_model_comes_back_as_it_was(make, tmp_path):
    plain, packed, back = (tmp_path / name for name in ("a.onnx", "a.onnxc", "b.onnx"))
    plain.write_bytes(make())
    for arguments in (("pack", plain, "-o", packed), ("unpack", packed, "-o", back)):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
    before, after = (onnx.load(path).SerializeToString() for path in (plain, back))
    assert after == before


@pytest.mark.parametrize("kind", ["sparse initializers", "sparse tensor", "training steps"])
def test_what_is_not_packed_is_refused_with_advice(kind, plain, tmp_path):
    values = from_array(np.ones(2, np.float32), "s")
    sparse = make_sparse_tensor(values, from_array(np.array([1, 5])), [16])
    model = onnx.load(plain)
    if kind == "sparse initializers":
        model.graph.sparse_initializer.append(sparse)
    elif kind == "sparse tensor":
        model.graph.node.append(make_node("Constant", [], ["s"], sparse_value=sparse))
    else:
        model.training_info.add()
    onnx.save(model, plain)
    refused = run("pack", plain, "-o", tmp_path / "model.onnxc")
    assert refused.exit_code == 3
    assert f"{plain}: " in refused.stderr
    assert kind in refused.stderr
    assert ("make" if "sparse" in kind else "export it for inference") in refused.stderr
    assert not (tmp_path / "model.onnxc").exists()


def test_what_pack_takes_is_still_refused_where_it_would_run(tmp_path):
    plain, packed = tmp_path / "model.onnx", tmp_path / "model.onnxc"
    plain.write_bytes(weight_with(np.nan))
    assert run("pack", plain, "-o", packed).exit_code == 0
    for path in (plain, packed):
        refused = run("inspect", path)
        assert refused.exit_code == 2
        assert "'w' holds nan" in refused.stderr
