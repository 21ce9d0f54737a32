"""Codebooks in the file: smaller, and the same outputs to the bit."""

import numpy as np
import onnx
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.loading import load
from onnxcomp.model import Model
from onnxcomp.passes.base import run_exact
from onnxcomp.passes.emit_codebook import EmitCodebook
from onnxcomp.runtime import Session
from tests.graphs import sane_feeds
from tests.passes.test_contract import GRAPHS


def few_valued(name: str, levels: int = 50) -> Model:
    model = GRAPHS[name]()
    found = {}
    for key, array in model.weights.items():
        step = np.float32(np.abs(array).max() / (levels // 2) or 1)
        found[key] = np.rint(array / step) * step + 0 if array.ndim > 1 else array
    return Model(model.skeleton, found)


@pytest.mark.parametrize("levels", [50, 12])
@pytest.mark.parametrize("name", ["residual", "dense", "transposed", "shared"])
def test_the_file_is_smaller_and_its_outputs_are_the_same(name, levels, tmp_path):
    model = few_valued(name, levels)
    found, proposal = run_exact(EmitCodebook(), Analysis(model))
    assert proposal.options
    for each, path in ((model, "a.onnx"), (found, "b.onnx")):
        each.save(tmp_path / path)
    big = sum(model.weights[o.target].nbytes for o in proposal.options)
    before, after = ((tmp_path / p).stat().st_size for p in ("a.onnx", "b.onnx"))
    assert before - after > 0.5 * big
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    feed = next(sane_feeds(model, 2).batches(model.signature.inputs, 2)).feed
    again = load(tmp_path / "b.onnx")
    wanted, outputs = (Session(m).run(feed) for m in (model, again))
    for key in wanted:
        assert np.array_equal(wanted[key], outputs[key])


def wide(shape: tuple[int, ...], opset: int = 13) -> Model:
    """One layer of 16 values."""
    weight = np.random.default_rng(0).integers(16, size=shape).astype(np.float32)
    w = onnx.numpy_helper.from_array(weight, "w")
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("x", shape[0]), ("y", shape[1]))
    )
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [x], [y], [w])
    imports = [onnx.helper.make_opsetid("", opset)]
    return Model.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))


@pytest.mark.parametrize(
    ("shape", "opset", "halves"),
    [((64, 64), 13, True), ((64, 64), 9, False), ((65, 65), 13, False), ((24, 32), 13, False)],
)
def test_sixteen_values_take_half_a_byte_where_that_pays(shape, opset, halves):
    model = wide(shape, opset)
    found, _ = run_exact(EmitCodebook(), Analysis(model))
    size = np.prod(shape) // (2 if halves else 1)
    assert found.weights["w_indices"].size == size
    x = np.random.default_rng(1).standard_normal((3, shape[0])).astype(np.float32)
    wanted, outputs = (Session(m).run({"x": x})["y"] for m in (model, found))
    assert np.array_equal(wanted, outputs)


def test_a_wrong_codebook_shows():
    model = few_valued("dense")
    found, _ = run_exact(EmitCodebook(), Analysis(model))
    books = {n: a * 1.001 if n.endswith("_codebook") else a for n, a in found.weights.items()}
    feed = next(sane_feeds(model, 2).batches(model.signature.inputs, 2)).feed
    wanted, outputs = (Session(m).run(feed) for m in (model, Model(found.skeleton, books)))
    assert not all(np.array_equal(wanted[key], outputs[key]) for key in wanted)


def test_reasons():
    facts = Analysis(GRAPHS["dense"]())
    proposal = EmitCodebook().propose(facts)
    assert not proposal.options
    reasons = {r.reason for r in proposal.refusals}
    assert "it has more than 256 values" in reasons
    assert any("not smaller" in reason for reason in reasons)
    assert all(facts.model.weights[r.where].size > 100 for r in proposal.refusals)
