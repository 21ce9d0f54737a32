import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.analysis import Analysis
from onnxcomp.model import Model
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from tests.passes import exact_checks as checks
from tests.passes.exact_checks import batchnorm, drift, graph, normal, ops, reasons, run

FOLD = FoldBatchnorm()
BN = "BatchNormalization(c, bn_s, bn_b, bn_m, bn_v)"
CHAIN = f"n = {BN} f = Mul(factor, n) y = Sub(f, offset)"


def chain_weights(channels: int, axes: int) -> dict:
    """A BatchNormalization, a factor and an offset per channel, `axes` behind them."""
    shape = (channels, *(1,) * axes)
    return {
        **batchnorm(channels),
        "factor": normal(*shape, seed=5) + 2,
        "offset": normal(*shape, seed=6),
    }


def perturbed(model: Model, name: str, factor: float) -> Model:
    draft = model.edit()
    draft.set_weight(name, model.weights[name] * np.float32(factor))
    return draft.seal(by="test")


def assert_exact(model: Model, after: Model, **feeds: np.ndarray) -> None:
    """The result is within the tolerance, and one with a weight off by 0.1 % is not."""
    assert drift(model, after, feeds) <= checks.TOLERANCE
    weight = next(name for name, a in after.weights.items() if a.dtype.kind == "f")
    assert drift(model, perturbed(after, weight, 1.001), feeds) > checks.TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    biased=st.booleans(),
)
def test_chains_behind_convolutions_go(op, groups, inputs, outputs, kernel, biased):
    channels = groups * outputs
    first = (channels, inputs) if op == "Conv" else (groups * inputs, outputs)
    weights = {"w": normal(*first, *kernel), **chain_weights(channels, len(kernel))}
    if biased:
        weights["b"] = normal(channels, seed=3)
    x = normal(2, groups * inputs, *(5,) * len(kernel), seed=4)
    shape = ",".join(map(str, x.shape))
    pads = ", ".join(["1"] * 2 * len(kernel))
    body = f"c = {op}<group = {groups}, pads = [{pads}]>(x, w{', b' * biased}) {CHAIN}"
    model = graph(f"float[{shape}] x", "float[?] y", body, weights)
    after, proposal = run(FOLD, model)
    assert ops(after) == [op]
    assert [option.target for option in proposal.options] == ["n", "f", "y"]
    assert proposal.refusals == ()
    assert_exact(model, after, x=x)


@settings(max_examples=20, deadline=None)
@given(
    alpha=st.sampled_from([1.0, -0.5]),
    beta=st.sampled_from([1.0, 0.0, 2.0]),
    turned=st.booleans(),
    turned_x=st.booleans(),
    bias=st.sampled_from([None, (), (1,), (4,), (1, 4)]),
)
def test_chains_behind_a_gemm_go(alpha, beta, turned, turned_x, bias):
    weights = {"w": normal(*((4, 3) if turned else (3, 4))), **chain_weights(4, 0)}
    if bias is not None:
        weights["b"] = normal(*bias, seed=3) if bias else np.float32(0.7)
    x = normal(*((3, 2) if turned_x else (2, 3)), seed=4)
    attrs = f"alpha = {alpha}, beta = {beta}, transA = {int(turned_x)}, transB = {int(turned)}"
    body = f"c = Gemm<{attrs}>(x, w{', b' * (bias is not None)}) {CHAIN}"
    model = graph(f"float[{x.shape[0]},{x.shape[1]}] x", "float[2,4] y", body, weights)
    after, _ = run(FOLD, model)
    assert ops(after) == ["Gemm"]
    assert_exact(model, after, x=x)


def test_a_matmul_keeps_one_add():
    """As tf2onnx writes Dense + BatchNorm: bias, scale, shift."""
    weights = {"w": normal(3, 4), "b": normal(4, seed=2), **chain_weights(4, 0)}
    body = "c = MatMul(x, w) n = Add(c, b) f = Mul(n, factor) y = Add(f, offset)"
    model = graph("float[2,7,3] x", "float[2,7,4] y", body, weights)
    after, proposal = run(FOLD, model)
    assert ops(after) == ["MatMul", "Add"]
    assert after.nodes[1].id == "y"
    assert len(proposal.options) == 3
    assert after.file_bytes < model.file_bytes
    assert_exact(model, after, x=normal(2, 7, 3))


def test_a_matmul_with_batchnorm_gets_an_add_where_the_rank_is_2():
    weights = {"w": normal(3, 4), **batchnorm(4)}
    body = f"c = MatMul(x, w) y = {BN}"
    model = graph("float[2,3] x", "float[2,4] y", body, weights)
    after, _ = run(FOLD, model)
    assert ops(after) == ["MatMul", "Add"]
    assert_exact(model, after, x=normal(2, 3))
    model = graph("float[2,4,3] x", "float[2,4,4] y", body, weights)
    after, proposal = run(FOLD, model)
    assert after is model
    assert "not known to be on axis 1" in reasons(proposal)["y"]


@pytest.mark.parametrize("body", ["y = Add(c, b)", "y = Add(b, c)", "y = Sub(c, b)"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_a_matmul_with_its_bias_is_neither_proposed_nor_refused(body, dtype):
    kind = np.float32 if dtype == "float" else np.float16
    weights = {"w": normal(3, 4).astype(kind), "b": normal(4).astype(kind)}
    model = graph(f"{dtype}[2,3] x", f"{dtype}[2,4] y", f"c = MatMul(x, w) {body}", weights)
    after, proposal = run(FOLD, model)
    assert after is model
    assert proposal.refusals == ()


@pytest.mark.parametrize(
    "body",
    [
        "y = Add(c, k)",
        "y = Add(k, c)",
        "y = Sub(c, k)",
        "y = Sub(k, c)",
        "y = Mul(c, k)",
        "y = Mul(k, c)",
        "y = Div(c, k)",
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (1, 4, 1, 1)])
def test_every_arithmetic_operation_per_channel_goes(body, shape):
    weights = {"w": normal(4, 3, 3, 3), "k": np.asarray(normal(*shape) + 3, np.float32)}
    model = graph("float[1,3,5,5] x", "float[1,4,3,3] y", f"c = Conv(x, w) {body}", weights)
    after, _ = run(FOLD, model)
    assert ops(after) == ["Conv"]
    assert_exact(model, after, x=normal(1, 3, 5, 5))


@pytest.mark.parametrize(
    ("body", "constant", "reason"),
    [
        ("y = Add(c, k)", normal(1, 1, 1, 3), "varies along more than the 4 channels"),
        ("y = Add(c, k)", normal(1, 1, 4, 1, 1), "5 axes"),
        ("y = Div(k, c)", normal(4, 1, 1), "divides by its input"),
        ("y = Div(c, k)", np.zeros((4, 1, 1), np.float32), "not finite"),
        ("y = Mul(c, k)", np.full((4, 1, 1), 3e38, np.float32), "would not be finite"),
    ],
)
def test_what_is_not_affine_per_channel_is_refused(body, constant, reason):
    weights = {"w": normal(4, 3, 3, 3) * 100, "k": constant}
    model = graph("float[1,3,5,5] x", "float[?] y", f"c = Conv(x, w) {body}", weights)
    after, proposal = run(FOLD, model)
    assert after is model
    assert reason in reasons(proposal)["y"]


def conv_bn(bn: str = BN, outputs: str = "float[?] y", more: str = "", **weights) -> Model:
    every = {"w": normal(4, 3, 3, 3), **batchnorm(4), **weights}
    body = f"c = Conv<pads = [1, 1, 1, 1]>(x, w) y = {bn} {more}"
    return graph("float[1,3,5,5] x", outputs, body, every)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            conv_bn(BN, "float[?] y, float[?] c"),
            "its input 'c' is read in 2 places",
        ),
        (conv_bn(BN, "float[?] y, float[?] z", "z = Relu(c)"), "'c' is read in 2 places"),
        (conv_bn(bn_v=-np.ones(4, np.float32)), "its variance is negative"),
        (
            conv_bn(BN.replace("(", "<epsilon = 0.0>("), bn_v=np.zeros(4, np.float32)),
            "its scale or shift is not finite",
        ),
        (
            conv_bn(BN, "float[?] y, float[?] z", "z = Conv<pads = [1, 1, 1, 1]>(x, w)"),
            "weight 'w' is shared by 2 readers; folding copies it",
        ),
    ],
)
def test_batchnorm_that_cannot_be_folded_is_refused(model, reason):
    after, proposal = run(FOLD, model)
    assert after is model
    assert reason in reasons(proposal)["y"]


def test_training_mode_and_computed_parameters_are_refused():
    io = ("float[1,3,5,5] x, float[4] p", "float[?] y, float[?] z")
    weights = {"w": normal(4, 3, 3, 3), "v": normal(4, 3, 3, 3, seed=8), **batchnorm(4)}
    training = BN.replace("(", "<training_mode = 1>(")
    body = f"""c = Conv(x, w) y, m, v2 = {training}
               d = Conv(x, v) z = {BN.replace("c,", "d,").replace("bn_b", "p")}"""
    after, proposal = run(FOLD, graph(*io, body, weights))
    assert reasons(proposal) == {
        "y": "it is in training mode",
        "z": "its parameters are computed",
    }
    assert len(after.nodes) == 4


def test_extra_outputs_mean_training_before_opset_14():
    weights = {"w": normal(4, 3, 3, 3), **batchnorm(4)}
    body = "c = Conv(x, w) y, m, v, sm, sv = " + BN
    _, proposal = run(FOLD, graph("float[1,3,5,5] x", "float[?] y", body, weights, opset=9))
    assert "it has a second output, 'm'" in reasons(proposal)["y"]


def test_a_computed_weight_or_bias_is_refused():
    weights = {"w": normal(4, 3, 3, 3), **batchnorm(4)}
    body = f"c = Conv(x, w, b) y = {BN} d = Conv(x, v) z = {BN.replace('c,', 'd,')}"
    io = ("float[1,3,5,5] x, float[4] b, float[4,3,3,3] v", "float[?] y, float[?] z")
    _, proposal = run(FOLD, graph(*io, body, weights))
    assert reasons(proposal) == {
        "y": "the bias of 'c' is computed",
        "z": "the weight of 'd' is computed",
    }


def test_half_precision_is_refused():
    half = {name: a.astype(np.float16) for name, a in batchnorm(4).items()}
    weights = {"w": normal(4, 3, 3, 3).astype(np.float16), **half}
    body = f"c = Conv(x, w) y = {BN}"
    model = graph("float16[1,3,5,5] x", "float16[?] y", body, weights)
    after, proposal = run(FOLD, model)
    assert after is model
    assert "is float16: rounding would show" in reasons(proposal)["y"]


def test_a_shared_weight_still_takes_the_shift_before_a_scale():
    """The shift needs only the bias; the scale behind it would need a copy of the weight."""
    weights = {"w": normal(4, 3, 3, 3), "k": normal(4, 1, 1), **batchnorm(4)}
    body = f"a = Conv(x, w) c = Add(a, k) y = {BN} b = Conv(x, w) z = Add(k, b)"
    model = graph("float[1,3,5,5] x", "float[?] y, float[?] z", body, weights)
    after, proposal = run(FOLD, model)
    assert sorted(ops(after)) == ["BatchNormalization", "Conv", "Conv"]
    assert list(reasons(proposal)) == ["y"]
    assert drift(model, after, {"x": normal(1, 3, 5, 5)}) <= checks.TOLERANCE


def test_a_shared_bias_and_shared_batchnorm_parameters_are_forked():
    weights = {"w": normal(4, 3, 3, 3), "v": normal(4, 3, 3, 3, seed=8), "b": normal(4)}
    body = f"c = Conv(x, w, b) y = {BN} d = Conv(x, v, b) z = {BN.replace('c,', 'd,')}"
    model = graph(
        "float[1,3,5,5] x", "float[?] y, float[?] z", body, {**weights, **batchnorm(4)}
    )
    after, _ = run(FOLD, model)
    assert ops(after) == ["Conv", "Conv"]
    assert len({node.inputs[2] for node in after.nodes}) == 2
    assert after.file_bytes < model.file_bytes
    assert_exact(model, after, x=normal(1, 3, 5, 5))


def test_a_bias_that_ends_at_zero_is_not_written():
    weights = {"w": normal(4, 3, 3, 3), "b": normal(4), "k": normal(4, 1, 1)}
    weights["k"] = weights["b"].reshape(4, 1, 1)
    body = "c = Conv(x, w, b) y = Sub(c, k)"
    model = graph("float[1,3,5,5] x", "float[?] y", body, weights)
    after, _ = run(FOLD, model)
    assert set(after.weights) == {"w"}
    assert_exact(model, after, x=normal(1, 3, 5, 5))


FORWARD = "n = BatchNormalization(r, bn_s, bn_b, bn_m, bn_v)"


@pytest.mark.parametrize(
    ("body", "x_shape", "w_shape", "result"),
    [
        ("y = Conv(n, w)", (2, 4, 5, 5), (6, 4, 3, 3), ["Relu", "Conv"]),
        ("y = Conv<group = 2>(n, w, b)", (2, 4, 5, 5), (6, 2, 3, 3), ["Relu", "Conv"]),
        ('y = Conv<auto_pad = "VALID">(n, w)', (2, 4, 5, 5), (6, 4, 1, 1), ["Relu", "Conv"]),
        ("y = Gemm<alpha = 0.5>(n, w, b)", (2, 4), (4, 6), ["Relu", "Gemm"]),
        ("y = Gemm<transB = 1>(n, w)", (2, 4), (6, 4), ["Relu", "Gemm"]),
        ("y = MatMul(n, w)", (2, 4), (4, 6), ["Relu", "MatMul", "Add"]),
        ("m = MatMul(n, w) y = Add(m, b)", (2, 4), (4, 6), ["Relu", "MatMul", "Add"]),
        ("m = MatMul(n, w) y = Tanh(m)", (2, 4), (4, 6), ["Relu", "MatMul", "Add", "Tanh"]),
        ("c = Conv(n, w) y = Mul(c, b2)", (2, 4, 5, 5), (6, 4, 3, 3), ["Relu", "Conv"]),
    ],
)
def test_batchnorm_in_front_goes_forward(body, x_shape, w_shape, result):
    weights = {"w": normal(*w_shape), "b": normal(6), "b2": normal(6, 1, 1)}
    used = {
        name: a for name, a in weights.items() if f" {name})" in body or f" {name}," in body
    }
    shape = ",".join(map(str, x_shape))
    model = graph(
        f"float[{shape}] x",
        "float[?] y",
        f"r = Relu(x) {FORWARD} {body}",
        {**used, **batchnorm(4)},
    )
    after, proposal = run(FOLD, model)
    assert ops(after) == result
    assert proposal.options[0].form == "forward"
    assert_exact(model, after, x=normal(*x_shape))


@pytest.mark.parametrize(
    ("body", "x_shape", "w_shape"),
    [
        ("y = Conv<pads = [1, 1, 1, 1]>(n, w)", (2, 4, 5, 5), (6, 4, 3, 3)),
        ('y = Conv<auto_pad = "SAME_UPPER">(n, w)', (2, 4, 5, 5), (6, 4, 3, 3)),
        ("y = ConvTranspose(n, w)", (2, 4, 5, 5), (4, 6, 3, 3)),
    ],
)
def test_a_shift_does_not_go_through_padding_but_a_scale_does(body, x_shape, w_shape):
    shape = ",".join(map(str, x_shape))
    io = (f"float[{shape}] x", "float[?] y", f"r = Relu(x) {FORWARD} {body}")
    weights = {"w": normal(*w_shape), **batchnorm(4)}
    model = graph(*io, weights)
    after, proposal = run(FOLD, model)
    assert after is model
    assert reasons(proposal)["n"] == "its shift does not reach the borders of 'y'"
    zero = np.zeros(4, np.float32)
    model = graph(*io, {**weights, "bn_b": zero, "bn_m": zero})
    after, _ = run(FOLD, model)
    assert len(after.nodes) == 2
    assert_exact(model, after, x=normal(*x_shape))


def test_a_gemm_that_transposes_its_input_takes_nothing_from_before():
    weights = {"w": normal(2, 6), **batchnorm(4)}
    body = f"r = Relu(x) {FORWARD} y = Gemm<transA = 1>(n, w)"
    _, proposal = run(FOLD, graph("float[2,4] x", "float[4,6] y", body, weights))
    assert reasons(proposal) == {"n": "its parameters do not have 2 elements"}
    square = {"w": normal(4, 6), **batchnorm(4)}
    _, proposal = run(FOLD, graph("float[4,4] x", "float[4,6] y", body, square))
    assert reasons(proposal) == {"n": "'y' transposes its input"}


def test_two_batchnorms_in_front_and_a_chain_behind_go_at_once():
    weights = {"w": normal(6, 4, 3, 3), "k": normal(6, 1, 1), **batchnorm(4)}
    weights |= batchnorm(4, "b2", seed=9)
    body = f"""r = Relu(x) {FORWARD} p = BatchNormalization(n, b2_s, b2_b, b2_m, b2_v)
               c = Conv(p, w) y = Div(c, k)"""
    model = graph("float[2,4,5,5] x", "float[2,6,3,3] y", body, weights)
    after, proposal = run(FOLD, model)
    assert ops(after) == ["Relu", "Conv"]
    assert [option.target for option in proposal.options] == ["p", "n", "y"]
    assert_exact(model, after, x=normal(2, 4, 5, 5))


def test_names_stay_right_where_one_fold_renames_what_the_next_one_reads():
    weights = {"w": normal(4, 4, 1, 1), "k": normal(4, 1, 1), **batchnorm(4)}
    weights["v"] = normal(4, 4, 1, 1, seed=8)
    body = f"""a = Conv(x, w) r = Mul(a, k) {FORWARD} b = Conv(n, v) y = Add(b, k)
               z = Relu(r)"""
    for outputs in ("float[?] y, float[?] z", "float[?] y, float[?] z, float[?] r"):
        model = graph("float[2,4,5,5] x", outputs, body, weights)
        after, _ = run(FOLD, model)
        assert ops(after) == ["Conv", "Conv", "Relu"]
        assert_exact(model, after, x=normal(2, 4, 5, 5))


def test_a_batchnorm_alone_is_refused():
    model = graph("float[2,4] x", "float[2,4] y", f"c = Relu(x) y = {BN}", batchnorm(4))
    _, proposal = run(FOLD, model)
    assert reasons(proposal) == {
        "y": "there is no linear node with constant weights beside it"
    }


def test_a_chosen_part_of_a_chain_is_folded_up_to_the_first_gap():
    weights = {"w": normal(4, 3, 3, 3), **chain_weights(4, 2)}
    model = graph("float[1,3,5,5] x", "float[?] y", f"c = Conv(x, w) {CHAIN}", weights)
    facts = Analysis(model)
    options = FOLD.propose(facts).options
    for keep, left in (((0,), 3), ((0, 1), 2), ((0, 2), 3), ((1, 2), 4), ((0, 1, 2), 1)):
        draft = model.edit()
        FOLD.apply(draft, facts, {options[i]: {} for i in keep})
        after = draft.seal(by="test")
        assert len(after.nodes) == left
        assert drift(model, after, {"x": normal(1, 3, 5, 5)}) <= checks.TOLERANCE


def test_weights_in_constant_nodes_are_folded_too():
    constants = ", ".join(str(v) for v in range(1, 9))
    body = (
        f"""w = Constant<value = float[4,2,1,1] {{{constants}}}>() c = Conv(x, w) y = {BN}"""
    )
    model = graph("float[1,2,3,3] x", "float[1,4,3,3] y", body, batchnorm(4))
    after, _ = run(FOLD, model)
    assert ops(after) == ["Conv"]
    assert_exact(model, after, x=normal(1, 2, 3, 3))


def test_before_opset_7_nothing_is_folded():
    body = "c = Conv(x, w) y = Add<axis = 1, broadcast = 1>(c, k)"
    weights = {"w": normal(4, 3, 3, 3), "k": normal(4)}
    model = graph("float[1,3,5,5] x", "float[1,4,3,3] y", body, weights, opset=6)
    assert "before opset 7" in reasons(FOLD.propose(Analysis(model)))["y"]
