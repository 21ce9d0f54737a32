"""What `inspect` gathers, and which layers a changed model is compared by."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.analysis import Analysis
from onnxcomp.model import Model
from onnxcomp.passes import PASSES
from onnxcomp.passes.base import Need
from onnxcomp.report import plain
from onnxcomp.report.html import render_inspection
from onnxcomp.report.inspection import LayerChange, inspect_model, layer_changes
from onnxcomp.report.text import inspection_view
from tests.report.test_html import parsed
from tests.report.test_text import printed
from tests.unusual import calling


def model_of(nodes, weights, channels=4) -> Model:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, 8, 8])
        for name in ("x", "y")
    ]
    initializers = [
        numpy_helper.from_array(np.full(shape, 0.1, np.float32), name)
        for name, shape in weights.items()
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    opset = [helper.make_opsetid("", 17)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=8))


def conv(x, weight, y, name=""):
    return helper.make_node("Conv", [x, weight], [y], name=name)


SCALES = dict.fromkeys(("scale", "bias", "mean", "var"), (4,))


def original() -> Model:
    nodes = [
        conv("x", "w", "c1", "first"),
        helper.make_node("BatchNormalization", ["c1", *SCALES], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]),
        conv("r", "w", "y"),
    ]
    return model_of(nodes, {"w": (4, 4, 1, 1), **SCALES})


MACS = 4 * 4 * 64


def test_inspection_counts_a_shared_weight_once():
    found = inspect_model(original(), Analysis(original()))
    assert [layer.name for layer in found.layers] == ["first", "b", "y"]
    assert [layer.params for layer in found.layers] == [16, 16, 0]
    assert [layer.macs for layer in found.layers] == [MACS, 0, MACS]
    assert sum(layer.share for layer in found.layers) == pytest.approx(1, abs=1e-12)
    assert found.cost.params == 32
    (shared,) = found.shared
    assert (shared.name, shared.shape, shared.readers) == ("w", (4, 4, 1, 1), ("c1", "y"))
    assert found.inputs[0].shape == ("batch", 4, 8, 8)


def test_inspection_has_all_passes_and_groups():
    found = inspect_model(original(), Analysis(original()))
    quick = [name for name, kind in PASSES.items() if Need.TORCH not in kind.needs]
    assert [view.name for view in found.passes] == quick
    assert {node for group in found.groups for node in group.producers} == {"c1", "y"}
    assert any("it is the graph output 'y'" in (group.pinned or "") for group in found.groups)


def test_inspection_without_a_run_tells_what_needs_none():
    found = inspect_model(original(), None, notes=["not known"])
    assert found.cost.params == 32
    assert (found.cost.macs, found.groups, found.passes) == (0, (), ())
    assert printed(inspection_view(found)).startswith("note: not known")
    assert "unknown" in parsed(render_inspection(found)).text


def test_views_of_an_inspection_agree():
    found = inspect_model(original(), Analysis(original()))
    content = json.loads(json.dumps(plain(found), allow_nan=False))
    assert content["schema_version"] == 1
    text, page = printed(inspection_view(found)), parsed(render_inspection(found)).text
    for layer in content["layers"]:
        assert layer["name"] in text
        assert layer["name"] in page


def test_parts_of_a_layer_are_added_up():
    nodes = [
        conv("x", "u", "c1_part"),
        conv("c1_part", "v", "b"),  # BatchNorm folded: the last part makes its output
        helper.make_node("Relu", ["b"], ["r"]),
        conv("r", "w", "y"),
    ]
    weights = {"u": (1, 4, 1, 1), "v": (4, 1, 1, 1), "w": (4, 4, 1, 1)}
    result = Analysis(model_of(nodes, weights))
    changes = layer_changes(Analysis(original()), result)
    assert changes == (LayerChange("first", MACS, 2 * 4 * 64), LayerChange("y", MACS, MACS))
    assert sum(change.after for change in changes) == result.cost.macs


def test_macs_of_no_layer_are_told_apart():
    relu = model_of([helper.make_node("Relu", ["x"], ["y"])], {})
    result = Analysis(model_of([conv("x", "w", "y")], {"w": (4, 4, 1, 1)}))
    assert layer_changes(Analysis(relu), result) == (LayerChange("(other)", 0, MACS),)
    assert layer_changes(result, Analysis(relu)) == (LayerChange("y", MACS, 0),)


def test_functions_are_shown_inlined():
    model = calling()
    found = inspect_model(model, Analysis(model))
    assert [layer.op for layer in found.layers if layer.macs] == ["Conv", "Conv", "Gemm"]
    assert found.operators["Conv"] == 2
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert inspect_model(model, None).operators["local::Block"] == 2


def test_repeated_layers_are_shown():
    nodes = [conv("x", "w1", "c1"), conv("c1", "w2", "y")]
    model = model_of(nodes, {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1)})
    found = inspect_model(model, Analysis(model))
    assert [repetition.members for repetition in found.repetitions] == [("c1", "y")]
    assert "repeated layers" in printed(inspection_view(found))
    assert "Repeated layers" in parsed(render_inspection(found)).text
