"""Channel groups are found where they are, pinned with a reason where they must stay."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcomp.analysis.channels import find_channels
from onnxcomp.errors import ParameterError
from onnxcomp.model import Model
from onnxcomp.runtime import TensorFact
from tests.analysis.channel_cases import CASES
from tests.analysis.channel_graphs import Graph, feeds
from tests.analysis.channel_law import (
    TOLERANCE,
    analyse,
    difference,
    draw,
    free_groups,
    obeys,
    obeys_everywhere,
    removed_from,
    zeroed,
)


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_zeroing(name: str) -> None:
    make, sizes = CASES[name]
    model = make()
    channels = obeys_everywhere(model, feeds(model, 1, 3))
    assert sorted(channels.group(g).size for g in free_groups(channels)) == sizes


@pytest.mark.parametrize("name", CASES)
def test_groups_cover_every_weighted_node(name: str) -> None:
    model = CASES[name][0]()
    channels = analyse(model, feeds(model)[0])
    producers = {node for group in channels.groups for node in group.producers}
    followers = {n.id for n in model.nodes if n.attrs.get("group", 1) > 1}
    weighted = {n.id for n in model.nodes if n.op in ("Conv", "ConvTranspose", "Gemm")}
    assert weighted <= producers | followers
    for node in weighted:
        members = channels.members(node, 1)
        parts = [s for g in members for s in g.slices if (s.tensor, s.axis) == (node, 1)]
        positions = np.concatenate([part.index.reshape(-1) for part in parts])
        ids = channels.axis_ids(node, 1)
        assert ids is not None
        np.testing.assert_array_equal(np.sort(positions), np.arange(len(ids)))


def test_the_law_fails_for_a_wrong_removal() -> None:
    model = CASES["residual"][0]()
    feed = feeds(model)[0]
    channels = analyse(model, feed)
    small = removed_from(model, channels, {"conv0_0": [1, 2]})
    limit = 100 * TOLERANCE
    assert difference(small, zeroed(model, channels, {"conv0_0": [1, 2]}), feed) <= TOLERANCE
    assert difference(small, zeroed(model, channels, {"conv0_0": [1, 3]}), feed) > limit
    assert difference(small, model, feed) > limit
    name = next(n for n, w in small.weights.items() if w.shape == (4, 5, 3, 3))
    draft = small.edit()
    draft.set_weight(name, small.weights[name][::-1])
    wrong = draft.seal(by="test")
    assert difference(wrong, zeroed(model, channels, {"conv0_0": [1, 2]}), feed) > limit


def _pinned(g: Graph, x: str, inputs: int) -> Model:
    return g.model(g.conv(x, inputs, 2), g.conv("x", 3, 2))


def _softmax_old(g: Graph) -> Model:
    return _pinned(g, g.op("Softmax", g.conv("x", 3, 6), axis=1), 6)


def _softmax(g: Graph) -> Model:
    return _pinned(g, g.op("Softmax", g.conv("x", 3, 6), axis=1), 6)


def _layer_norm(g: Graph) -> Model:
    x = g.op("Transpose", g.conv("x", 3, 6), perm=[0, 2, 3, 1])
    x = g.op("LayerNormalization", x, g.w(6), g.w(6))
    return _pinned(g, g.op("Transpose", x, perm=[0, 3, 1, 2]), 6)


def _lrn(g: Graph) -> Model:
    return _pinned(g, g.op("LRN", g.conv("x", 3, 6), size=3), 6)


def _reduced(g: Graph) -> Model:
    return _pinned(g, g.op("ReduceMean", g.conv("x", 3, 6), axes=[1]), 1)


def _arg_max(g: Graph) -> Model:
    index = g.op("Cast", g.op("ArgMax", g.conv("x", 3, 6), axis=1), to=1)
    return _pinned(g, index, 1)


def _recurrent(g: Graph) -> Model:
    x = g.op("MatMul", g.op("Reshape", "x", g.ints(0, 3, -1)), g.w(16, 6))
    x = g.op("GRU", x, g.w(1, 12, 6), g.w(1, 12, 4), hidden_size=4)
    return g.model(g.op("MatMul", x, g.w(4, 2)), g.conv("x", 3, 2))


def _sorted(g: Graph) -> Model:
    x = g.ops("TopK", g.conv("x", 3, 6), g.ints(6), outputs=2, axis=1)[0]
    return _pinned(g, x, 6)


def _every_second(g: Graph) -> Model:
    x = g.op("Slice", g.conv("x", 3, 6), g.ints(0), g.ints(6), g.ints(1), g.ints(2))
    return _pinned(g, x, 3)


def _mirrored(g: Graph) -> Model:
    x = g.op("Pad", g.conv("x", 3, 6), g.ints(0, 1, 0, 0, 0, 1, 0, 0), mode="reflect")
    return _pinned(g, x, 8)


def _scaled_by_count(g: Graph) -> Model:
    x = g.conv("x", 3, 6)
    count = g.op("Gather", g.op("Shape", x), g.constant(np.array(1)))
    return _pinned(g, g.op("Div", x, g.op("Cast", count, to=1)), 6)


def _count_is_output(g: Graph) -> Model:
    x = g.conv("x", 3, 6)
    return g.model(g.conv(x, 6, 2), g.op("Shape", x), g.conv("x", 3, 2))


def _computed_half(g: Graph) -> Model:
    x = g.conv("x", 3, 6)
    half = g.op("Div", g.op("Shape", x, start=1, end=2), g.ints(2))
    return _pinned(g, g.op("Slice", x, g.ints(0), half, g.ints(1)), 3)


def _broadcast(g: Graph) -> Model:
    return _pinned(g, g.op("Mul", g.conv("x", 3, 1), g.conv("x", 3, 6)), 6)


def _indices(g: Graph) -> Model:
    x = g.ops("MaxPool", g.conv("x", 3, 6), outputs=2, kernel_shape=[1, 1])
    return g.model(g.conv(x[0], 6, 2), x[1], g.conv("x", 3, 2))


def _untracked(g: Graph) -> Model:
    return _pinned(g, g.op("Add", g.conv("x", 3, 3), "x"), 3)


def _one_selected(g: Graph) -> Model:
    x = g.op("Gather", g.conv("x", 3, 6), g.constant(np.array(2)), axis=1)
    return _pinned(g, g.op("Unsqueeze", x, g.ints(1)), 1)


def _merged(g: Graph) -> Model:
    x = g.op("Reshape", g.conv("x", 3, 3), g.ints(-1, 2, 24))
    return g.model(g.op("MatMul", x, g.w(24, 2)), g.conv("x", 3, 2))


def _slid_over(g: Graph) -> Model:
    x = g.op("Transpose", g.conv("x", 3, 6), perm=[0, 2, 1, 3])
    return g.model(g.conv(x, 4, 2), g.conv("x", 3, 2))


def _resampled(g: Graph) -> Model:
    scales = g.constant(np.array([1, 2, 1, 1], np.float32))
    return _pinned(g, g.op("Resize", g.conv("x", 3, 6), "", scales), 12)


def _computed_weight(g: Graph) -> Model:
    x = g.conv("x", 3, 6)
    return g.model(g.op("Conv", x, g.op("Mul", g.w(2, 6, 1, 1), g.w(1))), g.conv("x", 3, 2))


def _weight_is_output(g: Graph) -> Model:
    weight = g.w(6, 3, 1, 1)
    x = g.op("Conv", "x", weight)
    return g.model(g.conv(x, 6, 2), weight, g.conv("x", 3, 2))


def _captured(g: Graph) -> Model:
    x = g.conv("x", 3, 6)
    out = onnx.ValueInfoProto(name="inner")
    body = helper.make_graph([helper.make_node("Neg", [x], ["inner"])], "b", [], [out])
    flag = g.constant(np.array(True))
    y = g.op("If", flag, then_branch=body, else_branch=body)
    return g.model(g.conv(x, 6, 2), g.op("Relu", y), g.conv("x", 3, 2))


PINNED: dict[str, tuple[Callable[[Graph], Model], str]] = {
    "softmax": (_softmax, "normalised over at Softmax"),
    "softmax before opset 13": (_softmax_old, "normalised over at Softmax"),
    "layer norm": (_layer_norm, "normalised over at LayerNormalization"),
    "LRN": (_lrn, "neighbouring channels are mixed at LRN"),
    "reduction": (_reduced, "reduced over at ReduceMean"),
    "argmax": (_arg_max, "reduced over at ArgMax"),
    "recurrent": (_recurrent, "GRU 'gru2_0' is not understood"),
    "unknown operator": (_sorted, "TopK 'topk1_0' is not understood"),
    "steps": (_every_second, "every n-th channel"),
    "mirror": (_mirrored, "cuts or mirrors"),
    "count used as a number": (_scaled_by_count, "Div 'div4_0' depends on their number"),
    "count returned": (_count_is_output, "their number is in the graph output 'shape2_0'"),
    "computed end": (_computed_half, "computes their number"),
    "broadcast": (_broadcast, "repeats it over all channels"),
    "indices": (_indices, "returns indices"),
    "network input": (_untracked, "joins it with untracked 'x'"),
    "selected": (_one_selected, "channels are selected at Gather"),
    "merged": (_merged, "merges the channels"),
    "convolved": (_slid_over, "a kernel slides over it"),
    "resampled": (_resampled, "it is resampled at Resize"),
    "computed weight": (_computed_weight, "a weight that is computed"),
    "exposed weight": (_weight_is_output, "is a graph output"),
    "captured": (_captured, "If 'if1_0' is not understood"),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_must_stay_is_pinned_with_the_reason(name: str) -> None:
    make, reason = PINNED[name]
    model = make(Graph(3, 4, 4, opset=11 if "before" in name else 17))
    channels = analyse(model, feeds(model)[0])
    first = next(n.id for n in model.nodes if n.op in ("Conv", "MatMul"))
    group = channels.group(first)
    assert group.pinned is not None
    assert reason in group.pinned
    with pytest.raises(ParameterError, match="must stay"):
        channels.keeping({group.name: [0]})
    free = free_groups(channels)
    if free:
        obeys(model, channels, draw(channels, free, 0), feeds(model))


def test_softmax_before_opset_13_spans_all_later_axes() -> None:
    g = Graph(3, 4, 4, opset=11)
    x = g.op("Transpose", g.conv("x", 3, 6), perm=[0, 2, 3, 1])
    x = g.op("Transpose", g.op("Softmax", x, axis=2), perm=[0, 3, 1, 2])
    model = _pinned(g, x, 6)
    assert analyse(model, feeds(model)[0]).group("conv0_0").pinned is not None


def test_an_operator_of_another_domain_is_not_understood() -> None:
    g = Graph(3, 4, 4)
    x = g.conv("x", 3, 6)
    g.nodes.append(helper.make_node("Foo", [x], ["foo"], domain="vendor"))
    model = g.model(g.conv("foo", 6, 2), domains=("vendor",))
    four = np.dtype(np.float32)
    shapes = {"x": (1, 3, 4, 4), x: (1, 6, 4, 4), "foo": (1, 6, 4, 4), "conv2_0": (1, 2, 4, 4)}
    tensors = {name: TensorFact(four, shape) for name, shape in shapes.items()}
    tensors |= {name: TensorFact(w.dtype, w.shape) for name, w in model.weights.items()}
    channels = find_channels(model, tensors)
    assert channels.group(x).pinned == "vendor::Foo 'foo' is not understood"


@pytest.mark.parametrize("weight", ["shared", "own"])
@pytest.mark.parametrize("bias", ["shared", "own", "equal", "none"])
@pytest.mark.parametrize("norm", ["shared", "own", "none"])
def test_shared_tensors(weight: str, bias: str, norm: str) -> None:
    """A stem and four equal convolutions whose tensors may be shared: all cases run."""
    g = Graph(3, 5, 5)
    size, weights = 8, [g.w(8, 8, 3, 3) for _ in range(4 if weight == "own" else 1)]
    biases = [g.w(size) for _ in range({"shared": 1, "none": 0}.get(bias, 4))]
    if bias == "equal":
        for name in biases:
            g.weights[name] = g.weights[biases[0]]
    norms = [[g.w(size) for _ in range(3)] for _ in range({"own": 4, "none": 0}.get(norm, 1))]
    variance = g.constant(np.linspace(0.5, 2, size).astype(np.float32))
    x = g.conv("x", 3, size)
    for layer in range(4):
        inputs = [x, weights[layer % len(weights)]]
        x = g.op(
            "Conv", *inputs, *biases[layer % 4 : layer + 1][:1] or biases[:1], pads=[1] * 4
        )
        if norms:
            x = g.op("BatchNormalization", x, *norms[layer % len(norms)], variance)
        x = g.op("Relu", x)
    model = g.model(g.op("Gemm", g.mean(x), g.w(size, 3)))
    channels = obeys_everywhere(model, feeds(model))
    assert len(free_groups(channels)) == (1 if weight == "shared" else 5)
