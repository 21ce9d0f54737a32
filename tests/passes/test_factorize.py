"""Chains compute and cost what they claim, and every linear node is answered for."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import helper, numpy_helper

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import collect_moments
from onnxcomp.analysis.target import TARGETS
from onnxcomp.errors import ParameterError
from onnxcomp.model import Model
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Option
from onnxcomp.passes.chains import expressible, kernel_shape4
from onnxcomp.passes.factorize import Factorize, chain
from onnxcomp.runtime import Session, capture_tensors
from tests.analysis.channel_graphs import Graph
from tests.graphs import sane_feeds, shared_models
from tests.passes.exact_checks import relative_l2

TOLERANCE = 1e-5  # relative L2 at full rank: float32 products in another order

CASES = {
    "conv": ("Conv", (2, 6, 9, 10), (8, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    "conv 3x2 uneven": ("Conv", (2, 6, 9, 10), (8, 6, 3, 2), {"pads": [0, 1, 2, 3]}),
    "conv strides": ("Conv", (2, 6, 9, 10), (8, 6, 3, 3), {"strides": [2, 3]}),
    "conv dilations": (
        "Conv",
        (2, 6, 9, 10),
        (8, 6, 3, 3),
        {"dilations": [2, 1], "strides": [1, 2], "pads": [2, 0, 2, 0]},
    ),
    "conv same upper": (
        "Conv",
        (2, 6, 9, 10),
        (8, 6, 3, 3),
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ),
    "conv same lower": ("Conv", (2, 6, 9, 10), (8, 6, 2, 3), {"auto_pad": "SAME_LOWER"}),
    "conv valid": ("Conv", (2, 6, 9, 10), (8, 6, 3, 3), {"auto_pad": "VALID"}),
    "conv 1x1 stride 2": ("Conv", (2, 6, 9, 10), (8, 6, 1, 1), {"strides": [2, 2]}),
    "conv 1x1 padded": ("Conv", (2, 6, 9, 10), (8, 6, 1, 1), {"pads": [1, 1, 1, 1]}),
    "conv 1d": ("Conv", (2, 6, 20), (8, 6, 5), {"strides": [2], "pads": [2, 1]}),
    "conv 3d": (
        "Conv",
        (2, 4, 5, 6, 7),
        (6, 4, 3, 2, 1),
        {"pads": [1, 0, 0, 1, 1, 0], "strides": [1, 2, 1]},
    ),
    "transpose": ("ConvTranspose", (2, 6, 5, 6), (6, 8, 3, 4), {}),
    "transpose strides": (
        "ConvTranspose",
        (2, 6, 5, 6),
        (6, 8, 3, 4),
        {"strides": [2, 3], "output_padding": [1, 1], "pads": [1, 0, 0, 1]},
    ),
    "transpose dilations": (
        "ConvTranspose",
        (2, 6, 5, 6),
        (6, 8, 3, 3),
        {"strides": [2, 2], "dilations": [2, 2]},
    ),
    "transpose same": (
        "ConvTranspose",
        (2, 6, 5, 6),
        (6, 8, 3, 3),
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    "transpose output shape": (
        "ConvTranspose",
        (2, 6, 5, 6),
        (6, 8, 3, 3),
        {"strides": [2, 2], "output_shape": [10, 13]},
    ),
    "transpose 1x1": (
        "ConvTranspose",
        (2, 6, 5, 6),
        (6, 8, 1, 1),
        {"strides": [2, 2], "output_padding": [1, 1]},
    ),
    "transpose 1d": ("ConvTranspose", (2, 6, 9), (6, 8, 4), {"strides": [2], "pads": [1, 1]}),
    "gemm": ("Gemm", (3, 9), (9, 7), {}),
    "gemm transposed": ("Gemm", (3, 9), (7, 9), {"transB": 1}),
    "matmul": ("MatMul", (2, 3, 9), (9, 7), {}),
}
BIASED = [*((name, True) for name in CASES), *((name, False) for name in CASES)]


def node_model(name: str, bias: bool, opset: int = 17, dtype=np.float32) -> Model:
    op, shape, weight, attrs = CASES[name]
    rng = np.random.default_rng(1)
    weights = {"w": (rng.standard_normal(weight) / np.sqrt(np.prod(weight[1:]))).astype(dtype)}
    outputs = len(weights["w"]) if op == "Conv" or attrs.get("transB") else weight[1]
    if bias:
        weights["b"] = rng.standard_normal(outputs).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    if op == "MatMul" and bias:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["b", "product"], ["y"]),
        ]
    else:
        nodes = [helper.make_node(op, ["x", "w", "b"][: 2 + bias], ["y"], **attrs)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", *shape[1:]])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def facts_of(model: Model) -> tuple[Analysis, Linear]:
    facts = Analysis(model, sane_feeds(model, 2))
    (linear,) = facts.linears.values()
    return facts, linear


def forms_of(linear: Linear) -> list[str]:
    """All forms that differ at this kernel's shape and can carry its padding."""
    shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
    return [f for f in FORMS if FORMS[f].applies(shape) and expressible(linear, f)]


def outputs(model: Model, facts: Analysis) -> np.ndarray:
    feed = next(facts.samples.batches(model.signature.inputs, 2)).feed
    (y,) = Session(model, optimize=False).run(feed).values()
    return y


def applied(model: Model, facts: Analysis, option: Option, arrays) -> Model:
    draft = model.edit()
    Factorize().apply(draft, facts, {option: arrays})
    return draft.seal(by="test")


def dense_model(model: Model, linear: Linear, kernel: np.ndarray) -> Model:
    draft = model.edit()
    draft.set_weight(linear.weight, linear.stored(kernel))
    return draft.seal(by="test")


@pytest.mark.parametrize(("name", "bias"), BIASED)
def test_chains(name, bias):
    """Every form, from the weights alone, at full and at low rank."""
    model = node_model(name, bias)
    facts, linear = facts_of(model)
    kernel = linear.kernel(model.weights["w"])
    shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
    forms = forms_of(linear)
    assert "output_basis" in forms
    original = outputs(model, facts)
    for form in forms:
        full = FORMS[form].max_rank(shape)
        for rank in (full, max(full // 3, 1)):
            option = Option("factorize", linear.id, form, (rank,))
            arrays, dense = Factorize().fit(option, kernel, None)
            small = applied(model, facts, option, arrays)
            assert small.signature == model.signature
            found = outputs(small, facts)
            wanted = outputs(dense_model(model, linear, dense), facts)
            assert relative_l2(found, wanted) <= TOLERANCE, (form, rank)
            if rank == full:
                assert relative_l2(found, original) <= TOLERANCE, form
            else:
                assert relative_l2(found, original) > 100 * TOLERANCE, form
            check_costs(model, small, facts, linear, form, rank)


def check_costs(model, small, facts, linear, form, rank):
    """Weights and MACs of `chain` are those that are measured on the written model."""
    steps = chain(linear, form, rank, linear.out_channels, linear.in_channels)
    after = Analysis(small, facts.samples)
    assert len(after.linears) == len(steps)
    bias = facts.cost.params - linear.convolution.weights
    assert after.cost.params - bias == sum(step.weights for step in steps)
    assert after.cost.macs == sum(step.macs for step in steps)
    for made, step in zip(after.linears.values(), steps, strict=True):
        assert replace(made.convolution, op="") == replace(step, op=""), (form, rank)


@pytest.mark.parametrize("name", ["conv", "conv 1d", "transpose strides", "gemm", "matmul"])
def test_data_aware_chains(name):
    """Fitted on moments, the chain is the returned dense kernel, and better than without."""
    model = node_model(name, True)
    facts, linear = facts_of(model)
    kernel = linear.kernel(model.weights["w"])
    samples = sane_feeds(model, 64)
    feed = next(samples.batches(model.signature.inputs, 64)).feed
    scales = np.geomspace(1, 0.02, linear.in_channels).astype(np.float32)
    x = feed["x"] * np.moveaxis(
        scales.reshape(-1, *[1] * (feed["x"].ndim - 1)), 0, linear.x_axis
    )
    y = Session(model, optimize=False).run({"x": x})["y"]
    rng = np.random.default_rng(0)
    (metric,) = collect_moments(linear, [x], [y], rng)
    for form in forms_of(linear):
        shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
        option = Option(
            "factorize", linear.id, form, (max(FORMS[form].max_rank(shape) // 3, 1),)
        )
        arrays, dense = Factorize().fit(option, kernel, metric)
        found = Session(applied(model, facts, option, arrays)).run({"x": x})["y"]
        wanted = Session(dense_model(model, linear, dense)).run({"x": x})["y"]
        assert relative_l2(found, wanted) <= TOLERANCE, form
        arrays, _ = Factorize().fit(option, kernel, None)
        blind = Session(applied(model, facts, option, arrays)).run({"x": x})["y"]
        assert relative_l2(found, y) < relative_l2(blind, y), form


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 21])
def test_gemm_at_every_opset(opset):
    """Before opset 11 the bias of a Gemm is not optional, so that MatMul comes first."""
    model = node_model("gemm transposed", True, opset=opset)
    facts, linear = facts_of(model)
    option = Option("factorize", linear.id, "output_basis", (7,))
    arrays, _ = Factorize().fit(option, linear.kernel(model.weights["w"]), None)
    small = applied(model, facts, option, arrays)
    assert relative_l2(outputs(small, facts), outputs(model, facts)) <= TOLERANCE
    check_costs(model, small, facts, linear, "output_basis", 7)


def test_half_precision_stays_half():
    model = node_model("conv", True, dtype=np.float16)
    facts, linear = facts_of(model)
    option = Option("factorize", linear.id, "spatial", (18,))
    arrays, _ = Factorize().fit(option, linear.kernel(model.weights["w"]), None)
    small = applied(model, facts, option, arrays)
    assert {a.dtype for a in small.weights.values()} == {np.dtype(np.float16)}
    assert relative_l2(outputs(small, facts), outputs(model, facts)) <= 5e-3  # 11 bits


def test_names_and_place_of_a_chain():
    model = node_model("conv", True)
    facts, linear = facts_of(model)
    option = Option("factorize", linear.id, "tucker2", (4,))
    arrays, _ = Factorize().fit(option, linear.kernel(model.weights["w"]), None)
    small = applied(model, facts, option, arrays)
    assert [n.id for n in small.nodes] == ["y_tucker20", "y_tucker21", "y"]
    assert [bool(n.input(2)) for n in small.nodes] == [False, False, True]
    assert "w" not in small.weights


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_every_linear_node_is_answered_for(path):
    import onnx

    model = Model.from_proto(onnx.load(path))
    facts = Analysis(model, sane_feeds(model))
    for step in (None, 1):
        proposal = Factorize(step=step).propose(facts)
        answered = {o.target for o in proposal.options} | {r.where for r in proposal.refusals}
        ops = ("Conv", "ConvTranspose", "Gemm", "MatMul")
        assert answered == {node.id for node in model.nodes if node.op in ops}
        assert all(refusal.reason for refusal in proposal.refusals)
        twice = {o.target for o in proposal.options} & {r.where for r in proposal.refusals}
        assert not twice


def test_options_save_weights_and_macs():
    g = Graph(32, 8, 8)
    model = g.model(g.conv(g.op("Relu", g.conv("x", 32, 64)), 64, 48, kernel=1))
    facts = Analysis(model)
    options = Factorize(step=4).propose(facts).options
    assert options
    for option in options:
        linear = facts.linears[option.target]
        whole = linear.convolution
        steps = chain(linear, option.form, *option.size, whole.out_channels, whole.in_channels)
        assert sum(s.weights for s in steps) < whole.weights
        assert sum(s.macs for s in steps) < whole.macs
    strict = Factorize().propose(facts).options
    target = TARGETS["x86-avx512"]
    for option in strict:
        linear = facts.linears[option.target]
        whole = linear.convolution
        steps = chain(linear, option.form, *option.size, whole.out_channels, whole.in_channels)
        assert target.chain_seconds(steps) < target.seconds(whole)
        assert option.size[0] in (4, 8, 12) or option.size[0] % 16 == 0


def test_shares_take_the_ranks_of_the_grid_next_to_them():
    g = Graph(48, 8, 8)
    facts = Analysis(g.model(g.op("Relu", g.conv("x", 48, 64))))
    low_rank = Factorize(forms=("output_basis",))
    for shares, step, ranks in (
        ((0.25, 0.5), None, [16, 32]),
        ((0.3, 0.7), None, [16, 48]),
        ((0.3, 0.28), None, [16]),
        ((0.3, 0.7), 1, [20, 44]),
    ):
        found = replace(low_rank, shares=shares, step=step).propose(facts).options
        assert [option.size[0] for option in found] == ranks


def test_shares_are_not_judged_by_their_time():
    g = Graph(8, 4, 4)
    facts = Analysis(g.model(g.conv("x", 8, 8)))
    assert not Factorize(forms=("output_basis",)).propose(facts).options
    assert Factorize(forms=("output_basis",), shares=(0.5,)).propose(facts).options


def test_refusals_say_why():
    g = Graph(8, 6, 6)
    shared = g.w(8, 8, 3, 3)
    t = g.op("Conv", "x", shared, pads=[1] * 4)
    t = g.op("Conv", t, shared, pads=[1] * 4)
    t = g.conv(t, 8, 8, group=8)
    t = g.conv(t, 8, 8, group=2)
    t = g.op("Gemm", g.mean(t), g.w(8, 8), alpha=0.5)
    model = g.model(g.op("Gemm", t, g.w(8, 8), g.w(1)))
    reasons = [r.reason for r in Factorize().propose(Analysis(model)).refusals]
    for words in ("shared by 2 readers", "depthwise", "2 groups", "alpha", "one value per"):
        assert any(words in reason for reason in reasons), words


def test_bad_parameters():
    with pytest.raises(ParameterError, match="forms"):
        Factorize(forms=("spatial", "nothing"))
    for step in (0, -4):
        with pytest.raises(ParameterError, match="step"):
            Factorize(step=step)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ParameterError, match="shares"):
            Factorize(shares=(share,))
    model = node_model("conv", False)
    _, linear = facts_of(model)
    kernel = linear.kernel(model.weights["w"])
    for rank in (0, 9):
        with pytest.raises(ParameterError, match="rank"):
            Factorize().fit(Option("factorize", "y", "output_basis", (rank,)), kernel, None)


def test_spatial_is_not_proposed_where_padding_cannot_be_split():
    for name in ("transpose same", "transpose output shape"):
        facts, _ = facts_of(node_model(name, False))
        assert "spatial" not in {o.form for o in Factorize(step=1).propose(facts).options}
    facts, _ = facts_of(node_model("transpose strides", False))
    assert "spatial" in {o.form for o in Factorize(step=1).propose(facts).options}


def test_shapes_of_a_chain_are_those_of_the_run():
    model = node_model("conv strides", True)
    facts, linear = facts_of(model)
    option = Option("factorize", linear.id, "spatial", (5,))
    arrays, _ = Factorize().fit(option, linear.kernel(model.weights["w"]), None)
    small = applied(model, facts, option, arrays)
    feed = next(facts.samples.batches(model.signature.inputs, 1)).feed
    tensors = capture_tensors(small, feed)
    steps = chain(linear, "spatial", 5, 8, 6)
    assert np.prod(tensors["y_spatial0"].shape[2:]) == steps[0].out_positions
    assert np.prod(tensors["y"].shape[2:]) == steps[1].out_positions
