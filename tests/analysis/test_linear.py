"""Patches times kernel give what onnxruntime computes, for every linear node."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear, find_linears
from onnxcomp.model import Model
from onnxcomp.runtime import Session, with_outputs
from tests.graphs import sane_feeds, shared_models

TOLERANCE = 1e-4  # relative L2 in float32, products of up to 25,000 terms


def reconstruction_error(model: Model, facts: Analysis, linear: Linear) -> float:
    """Relative L2 error of kernel @ patches + bias against onnxruntime's output."""
    names = sorted({linear.x, linear.y} - set(facts.feeds))
    values = dict(facts.feeds) | Session(with_outputs(model, names), optimize=False).run(
        facts.feeds
    )
    patches, targets = linear.patches(
        values[linear.x], values[linear.y], 500, np.random.default_rng(0)
    )
    kernel = linear.kernel(model.weights[linear.weight])
    per_group = linear.out_channels // linear.groups
    inputs = linear.in_channels // linear.groups
    columns = [
        patches[:, g * inputs : (g + 1) * inputs].reshape(len(patches), -1)
        @ kernel[g * per_group : (g + 1) * per_group].reshape(per_group, -1).T
        for g in range(linear.groups)
    ]
    found = np.concatenate(columns, axis=1)
    if linear.bias:
        found = found + model.weights[linear.bias].reshape(-1)
    return float(np.linalg.norm(found - targets) / (np.linalg.norm(targets) + 1e-9))


CONVOLUTIONS = [
    {"pads": [1, 1, 1, 1]},
    {"pads": [0, 1, 2, 3], "strides": [2, 1]},
    {"dilations": [2, 3], "strides": [1, 2]},
    {"group": 2, "pads": [1, 1, 1, 1]},
    {"group": 4},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"auto_pad": "VALID"},
]
TRANSPOSED = [
    {},
    {"strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"strides": [2, 3], "output_padding": [1, 1], "pads": [1, 0, 0, 1]},
    {"strides": [2, 2], "group": 2},
    {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"strides": [2, 2], "dilations": [2, 2]},
    {"strides": [2, 2], "output_shape": [14, 17]},
]


def one_node(op: str, shape: tuple[int, ...], weight: tuple[int, ...], attrs: dict) -> Model:
    rng = np.random.default_rng(1)
    node = helper.make_node(op, ["x", "w"], ["y"], **attrs)
    array = rng.standard_normal(weight).astype(np.float32)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(array, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=9))


@pytest.mark.parametrize("attrs", CONVOLUTIONS, ids=str)
def test_conv_patches(attrs):
    weight = (8, 8 // attrs.get("group", 1), 3, 2)
    check(one_node("Conv", (2, 8, 11, 9), weight, attrs))


@pytest.mark.parametrize("attrs", TRANSPOSED, ids=str)
def test_conv_transpose_patches(attrs):
    weight = (8, 6 // attrs.get("group", 1), 3, 4)
    check(one_node("ConvTranspose", (2, 8, 7, 8), weight, attrs))


def test_other_ranks():
    check(one_node("Conv", (2, 4, 9), (5, 4, 3), {}))
    check(one_node("Conv", (2, 4, 5, 6, 7), (5, 4, 3, 2, 1), {"pads": [1, 0, 0, 1, 1, 0]}))
    check(one_node("MatMul", (2, 3, 7), (7, 5), {}))
    check(one_node("Gemm", (4, 7), (7, 5), {}))
    check(one_node("Gemm", (4, 7), (5, 7), {"transB": 1}))


def check(model: Model) -> None:
    facts = Analysis(model)
    (linear,), refused = find_linears(model, facts.tensors)
    assert not refused
    assert reconstruction_error(model, facts, linear) < TOLERANCE
    weight = model.weights["w"]
    assert np.array_equal(linear.stored(linear.kernel(weight)), weight)
    wrong = Model(model.skeleton, {"w": np.ascontiguousarray(weight * 1.01)})
    facts.__dict__.pop("tensors")
    values = Session(model, optimize=False).run(facts.feeds)
    patches, targets = linear.patches(
        facts.feeds["x"], values["y"], 500, np.random.default_rng(0)
    )
    kernel = linear.kernel(wrong.weights["w"])
    first = patches[:, : kernel.shape[1]].reshape(len(patches), -1) @ kernel[0].reshape(-1)
    assert np.linalg.norm(first - targets[:, 0]) > TOLERANCE * np.linalg.norm(targets[:, 0])


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_real_models(path):
    model = Model.from_proto(onnx.load(path))
    facts = Analysis(model, sane_feeds(model))
    linears, refused = find_linears(model, facts.tensors)
    assert len(linears) + len(refused) == sum(
        node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") for node in model.nodes
    )
    for linear in linears:
        error = reconstruction_error(model, facts, linear)
        assert error < TOLERANCE, f"{linear.id}: {error}"
