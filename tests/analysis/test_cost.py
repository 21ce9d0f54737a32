"""Costs against counts by hand and the published numbers of well-known networks."""

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.cost import Cost
from onnxcomp.model import Model
from tests.analysis.channel_graphs import Graph
from tests.passes.exact_checks import graph, normal
from tests.test_model import with_branch
from tests.unusual import quantised


def cost(model: Model) -> Cost:
    return Analysis(model).cost


def test_by_hand():
    g = Graph(3, 10, 10)
    a = g.conv("x", 3, 8, strides=[2, 2])  # 5 x 5
    b = g.conv(a, 8, 8, group=8)
    c = g.op("ConvTranspose", b, g.w(8, 4, 2, 2), g.w(4), strides=[2, 2])  # on 5 x 5 inputs
    d = g.op("Gemm", g.op("Flatten", c), g.w(400, 7), g.w(7))
    model = g.model(d)
    facts = Analysis(model)
    conv, depthwise = 8 * 3 * 9, 8 * 9
    transposed, dense = 8 * 4 * 4, 400 * 7
    assert facts.costs[a].macs == 25 * conv
    assert facts.costs[b].macs == 25 * depthwise
    assert facts.costs[c].macs == 25 * transposed
    assert facts.costs[d].macs == dense
    weights = conv + depthwise + transposed + dense + 8 + 8 + 4 + 7
    assert facts.cost == Cost(
        weights, 25 * (conv + depthwise + transposed) + dense, 4 * weights
    )
    assert facts.costs[a].params == conv + 8


def test_matrix_products():
    g = Graph(6, 8)
    a = g.op("MatMul", "x", g.w(8, 5))  # 6 rows
    b = g.op("Transpose", a, perm=[0, 2, 1])
    c = g.op("MatMul", a, b)  # (6, 5) x (5, 6)
    facts = Analysis(g.model(c))
    assert facts.costs[a].macs == 6 * 8 * 5
    assert facts.costs[c].macs == 6 * 5 * 6
    assert facts.costs[b].macs == 0
    left = Graph(8, 6)
    y = left.op("MatMul", left.w(5, 8), "x")
    facts = Analysis(left.model(y))
    assert facts.costs[y].macs == 5 * 8 * 6
    assert "not an initializer" in facts.not_linear[y]


def test_recurrent_nodes():
    g = Graph(1)
    weights = {"w": normal(1, 16, 3), "r": normal(1, 16, 4)}
    model = graph(
        "float[7,1,3] x",
        "float[7,1,1,4] y",
        "y = LSTM <hidden_size = 4> (x, w, r)",
        weights,
    )
    assert cost(model).macs == 7 * (16 * 3 + 16 * 4)
    assert g.shape == (1,)


def test_a_shared_weight_counts_once():
    g = Graph(4, 6, 6)
    weight = g.w(4, 4, 3, 3)
    t = g.op("Conv", g.op("Conv", "x", weight, pads=[1] * 4), weight, pads=[1] * 4)
    found = cost(g.model(t))
    assert found.params == 144
    assert found.macs == 2 * 36 * 144


def test_weights_of_subgraphs_count():
    assert cost(with_branch()).params == 3 + 1  # "outer" is read in a branch only, and "zero"


def test_constant_nodes_count_and_integers_do_not():
    g = Graph(4)
    model = g.model(g.op("Reshape", g.op("Mul", "x", g.w(4)), g.ints(-1, 4)))
    assert cost(model).params == 4
    body = "c = Constant <value = float[4] {1, 2, 3, 4}> ()  y = Add (x, c)"
    assert cost(graph("float[N,4] x", "float[N,4] y", body)).params == 4


def test_half_precision_takes_two_bytes():
    body = "y = MatMul (x, w)"
    weights = {"w": normal(4, 5).astype(np.float16)}
    found = cost(graph("float16[N,4] x", "float16[N,5] y", body, weights))
    assert found == Cost(20, 20, 40)


@pytest.mark.parametrize("batch", [1, 4])
def test_macs_are_those_of_one_sample(batch):
    proto = onnx.ModelProto()
    g = Graph(3, 6, 6)
    t = g.op("Relu", g.conv("x", 3, 8))
    proto.CopyFrom(g.model(g.op("Gemm", g.mean(t), g.w(8, 5))).to_proto())
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_value = batch
    del proto.graph.value_info[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert cost(Model.from_proto(proto)).macs == 36 * 8 * 27 + 40


def test_sums():
    assert Cost(5, 4, 3) - Cost(1, 1, 1) + Cost(0, 1, 2) == Cost(4, 4, 4)


# MACs of the published networks: ResNet-50 4.089 G (torchvision), ResNet-20 40.55 M and
# ResNet-56 125.49 M (He et al. 2016, shortcuts of option A); all without biases.
PUBLISHED = {
    "resnet50_imagenet": (4_089_184_256, 25_557_032),
    "resnet20a_cifar10": (40_551_040, 269_722),
    "resnet56a_cifar10": (125_485_696, 853_018),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name, tmp_path):
    pytest.importorskip("torch")
    from models.builders import BUILDERS, export

    path = tmp_path / "model.onnx"
    export(name, path, folded=True)
    model = Model.from_proto(onnx.load(path))
    macs, parameters = PUBLISHED[name]
    assert abs(cost(model).macs - macs) <= 1e-4 * macs
    assert BUILDERS[name].parameter_count() == parameters


def test_integers_that_are_dequantised_are_parameters():
    kernels = 32 * 3 * 9 + 48 * 32 * 9 + 40 * 48
    found = cost(quantised())
    assert found.params == kernels + 32 + 48 + 2  # bias and scales, but no zero points
    assert found.weight_bytes == kernels + 4 * (32 + 48 + 2)
    assert found.macs == 64 * (32 * 3 * 9 + 48 * 32 * 9) + 40 * 48


def test_checks_bite():
    wrong = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])
    proto = graph(
        "float[1,3,8,8] x", "float[1,4,N,M] y", "y = Conv (x, w)", {"w": normal(4, 3, 1, 1)}
    ).to_proto()
    whole = cost(Model.from_proto(proto)).macs
    del proto.graph.node[:]
    proto.graph.node.append(wrong)
    assert cost(Model.from_proto(proto)).macs == whole // 4
