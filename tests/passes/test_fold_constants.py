import numpy as np
import pytest

from onnxcomp.passes.fold_constants import FoldConstants
from onnxcomp.runtime import Session
from tests.passes.exact_checks import drift, graph, normal, ops, reasons, run
from tests.unusual import quantised

FOLD = FoldConstants()
SHAPE_INPUT = "int64[k] wanted"  # `Reshape(c, wanted)` reads a constant of any dtype

X = np.linspace(-7.9, 7.9, 24).reshape(2, 3, 4)
FLOATS = {"a": X.astype(np.float32), "b": np.float32([[0.1], [-3.3], [7.7]])}
INTS = {
    "a": np.arange(-12, 12, dtype=np.int64).reshape(2, 3, 4),
    "b": np.array([[3], [-5], [7]], np.int64),
}
BYTES = {
    "a": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "scale": np.float32([0.1, 0.3, 0.7]),
    "zero": np.array([3, 5, 200], np.uint8),
}
CASES = [
    ("float", "c = Constant<value_float = 0.1>()", {}, 17),
    ("float", "c = Constant<value_floats = [0.1, 0.2]>()", {}, 17),
    ("int64", "c = Constant<value_int = 7>()", {}, 17),
    ("int64", "c = Constant<value_ints = [7, -8]>()", {}, 17),
    ("double", "c = Constant<value = double[2] {0.1, 0.2}>()", {}, 17),
    ("float", "c = ConstantOfShape(s)", {"s": np.array([2, 3], np.int64)}, 17),
    (
        "int64",
        "c = ConstantOfShape<value = int64[1] {5}>(s)",
        {"s": np.array([2, 3], np.int64)},
        17,
    ),
    ("int64", "c = Shape(a)", FLOATS, 17),
    ("int64", "c = Shape<start = 1, end = -1>(a)", FLOATS, 17),
    ("int64", "c = Size(a)", FLOATS, 17),
    ("float", "c = Identity(a)", FLOATS, 17),
    ("int64", "c = Cast<to = 7>(a)", FLOATS, 17),
    ("int8", "c = Cast<to = 3>(a)", INTS, 17),
    ("bool", "c = Cast<to = 9>(a)", FLOATS, 17),
    ("float16", "c = Cast<to = 10>(a)", FLOATS, 17),
    ("float", "s = Constant<value_ints = [0, -1]>() c = Reshape(a, s)", FLOATS, 17),
    ("float", "c = Transpose(a)", FLOATS, 17),
    ("float", "c = Transpose<perm = [1, 0, 2]>(a)", FLOATS, 17),
    ("float", "s = Constant<value_ints = [0, -1]>() c = Unsqueeze(a, s)", FLOATS, 17),
    ("float", "c = Unsqueeze<axes = [0, 2]>(a)", FLOATS, 11),
    ("float", "u = Unsqueeze<axes = [0]>(a) c = Squeeze<axes = [0]>(u)", FLOATS, 11),
    ("float", "c = Flatten<axis = 2>(a)", FLOATS, 17),
    ("float", "c = Concat<axis = -1>(a, a)", FLOATS, 17),
    ("float", "c = Slice<starts = [1], ends = [-1], axes = [2]>(a)", FLOATS, 9),
    (
        "float",
        "f = Constant<value_ints = [-1]>() t = Constant<value_ints = [-100]>() "
        "x = Constant<value_ints = [1]>() d = Constant<value_ints = [-2]>() "
        "c = Slice(a, f, t, x, d)",
        FLOATS,
        17,
    ),
    ("float", "i = Constant<value_ints = [1, -1]>() c = Gather<axis = 1>(a, i)", FLOATS, 17),
    ("float", "c, rest = Split<axis = 2>(a)", FLOATS, 13),
    ("float", "s = Constant<value_ints = [5, 1, 1, 4]>() c = Expand(a, s)", FLOATS, 17),
    ("float", "s = Constant<value_ints = [2, 1, 3]>() c = Tile(a, s)", FLOATS, 17),
    (
        "int64",
        "f = Constant<value_int = 9>() t = Constant<value_int = 0>() "
        "d = Constant<value_int = -2>() c = Range(f, t, d)",
        {},
        17,
    ),
    ("float", "q = Less(a, b) c = Where(q, a, b)", FLOATS, 17),
    ("float", "c = DequantizeLinear<axis = 1>(a, scale, zero)", BYTES, 13),
    (
        "float",
        "c = DequantizeLinear<axis = 0, block_size = 2>(q, scale)",
        {
            "q": np.arange(-10, 5, dtype=np.int8).reshape(3, 5),
            "scale": np.float32(np.linspace(0.1, 0.9, 10)).reshape(2, 5),
        },
        21,
    ),
    (
        "float",
        "c = DequantizeLinear(q, scale)",
        {"q": np.array([2**30 + 1, -7], np.int32), "scale": np.float32(0.1)},
        17,
    ),
    ("float", "c = Add(a, b)", FLOATS, 17),
    ("float", "c = Sub(b, a)", FLOATS, 17),
    ("float", "c = Mul(a, b)", FLOATS, 17),
    ("float", "c = Div(a, b)", FLOATS, 17),
    ("int64", "c = Div(a, b)", INTS, 17),
    ("float", "p = Abs(a) c = Sqrt(p)", FLOATS, 17),
    ("float", "n = Neg(a) c = Floor(n)", FLOATS, 17),
    ("float", "c = Ceil(a)", FLOATS, 17),
    ("bool", "p = Greater(a, b) q = Equal(a, a) r = And(p, q) c = Not(r)", FLOATS, 17),
    ("bool", "p = GreaterOrEqual(a, b) q = LessOrEqual(a, b) c = Or(p, q)", FLOATS, 17),
]


@pytest.mark.parametrize(("dtype", "body", "weights", "opset"), CASES)
def test_results_are_those_of_onnxruntime_bit_for_bit(dtype, body, weights, opset):
    body += " y = Reshape(c, wanted)"
    model = graph(SHAPE_INPUT, f"{dtype}[n] y", body, weights, opset=opset)
    after, proposal = run(FOLD, model)
    assert ops(after) == ["Reshape"]
    assert proposal.refusals == ()
    feeds = {"wanted": np.array([-1], np.int64)}
    wanted = Session(model, optimize=False).run(feeds)["y"]
    found = Session(after, optimize=False).run(feeds)["y"]
    assert found.dtype == wanted.dtype
    assert found.tobytes() == wanted.tobytes()


def test_bit_comparison_tells_a_floored_from_a_truncated_quotient():
    quotient = np.floor_divide(INTS["a"], INTS["b"])
    model = graph(SHAPE_INPUT, "int64[n] y", "c = Div(a, b) y = Reshape(c, wanted)", INTS)
    wanted = Session(model, optimize=False).run({"wanted": np.array([-1], np.int64)})["y"]
    assert quotient.tobytes() != wanted.tobytes()


@pytest.mark.parametrize("exponent", [0.5, 2.0, 3.0, -1.7])
def test_powers_are_within_one_unit_in_the_last_place(exponent):
    weights = {"a": np.abs(FLOATS["a"]), "e": np.float32(exponent)}
    body = "c = Pow(a, e) y = Reshape(c, wanted)"
    model = graph(SHAPE_INPUT, "float[n] y", body, weights)
    after, _ = run(FOLD, model)
    feeds = {"wanted": np.array([-1], np.int64)}
    wanted = Session(model, optimize=False).run(feeds)["y"]
    found = Session(after, optimize=False).run(feeds)["y"]
    np.testing.assert_array_max_ulp(found, wanted, maxulp=1)


def test_the_pads_of_an_option_a_shortcut_become_one_initializer():
    """As the TorchScript exporter writes F.pad: eight nodes for one constant."""
    body = """
        p = Constant<value_ints = [0, 0, 0, 0, 2, 2]>()
        n = Constant<value_int = 2>()
        zero = Constant<value = int64[1] {0}>()
        count = Unsqueeze(n, zero)
        rest = ConstantOfShape<value = int64[1] {0}>(count)
        all = Concat<axis = 0>(p, rest)
        two = Constant<value_ints = [-1, 2]>()
        pairs = Reshape(all, two)
        f = Constant<value_ints = [-1]>()
        t = Constant<value_ints = [-9223372036854775807]>()
        d = Constant<value_ints = [-1]>()
        turned = Slice(pairs, f, t, zero, d)
        columns = Transpose<perm = [1, 0]>(turned)
        minus = Constant<value_ints = [-1]>()
        flat = Reshape(columns, minus)
        pads = Cast<to = 7>(flat)
        y = Pad(x, pads)
    """
    model = graph("float[2,4,3,3] x", "float[2,8,3,3] y", body)
    after, proposal = run(FOLD, model)
    assert ops(after) == ["Pad"]
    assert len(proposal.options) == len(model.nodes) - 1
    assert after.weights[after.nodes[0].inputs[1]].tolist() == [0, 2, 0, 0, 0, 2, 0, 0]
    assert after.file_bytes < model.file_bytes
    assert drift(model, after, {"x": normal(2, 4, 3, 3)}) == 0


def test_a_large_expansion_is_refused_unless_it_is_a_weight():
    shape = {"s": np.array([64, 64], np.int64), "one": np.ones(64, np.float32)}
    added = graph(
        "float[64,64] x", "float[64,64] y", "c = Expand(one, s) y = Add(x, c)", shape
    )
    after, proposal = run(FOLD, added)
    assert after is added
    assert reasons(proposal) == {
        "c": "as an initializer it would make the file 16112 bytes larger"
    }
    weight = graph(
        "float[64,64] x", "float[64,64] y", "c = Expand(one, s) y = MatMul(x, c)", shape
    )
    assert ops(run(FOLD, weight)[0]) == ["MatMul"]


def test_what_is_made_large_and_cut_small_again_is_folded():
    weights = {"s": np.array([5000], np.int64), "f": np.array([0], np.int64)}
    weights["t"] = np.array([4], np.int64)
    body = "c = ConstantOfShape(s) d = Slice(c, f, t) y = Add(x, d)"
    after, proposal = run(FOLD, graph("float[4] x", "float[4] y", body, weights))
    assert ops(after) == ["Add"]
    assert len(proposal.options) == 2


def test_a_large_intermediate_does_not_pay_for_a_large_result():
    weights = {"s": np.array([50, 100], np.int64)}
    body = "c = ConstantOfShape(s) d = Transpose(c) y = Add(x, d)"
    model = graph("float[100,50] x", "float[100,50] y", body, weights)
    after, proposal = run(FOLD, model)
    assert after is model
    assert list(reasons(proposal)) == ["d", "c"]


def test_the_transpose_of_a_weight_with_other_readers_is_not_copied():
    weights = {"w": normal(64, 64)}
    body = "t = Transpose(w) y = Add(x, t) z = Mul(x, w)"
    io = ("float[64,64] x", "float[64,64] y, float[64,64] z")
    after, proposal = run(FOLD, graph(*io, body, weights))
    assert "Transpose" in ops(after)
    assert "larger" in reasons(proposal)["t"]


def test_a_weight_dequantised_for_a_conv_is_folded():
    weights = {
        "q": np.arange(-60, 48, dtype=np.int8).reshape(4, 3, 3, 3),
        "scale": np.float32([0.1, 0.2, 0.3, 0.4]),
        "zero": np.zeros(4, np.int8),
    }
    body = "w = DequantizeLinear<axis = 0>(q, scale, zero) y = Conv(x, w)"
    model = graph("float[1,3,8,8] x", "float[1,4,6,6] y", body, weights)
    after, _ = run(FOLD, model)
    assert ops(after) == ["Conv"]
    assert drift(model, after, {"x": normal(1, 3, 8, 8)}) <= 1e-6


def test_the_weights_of_quantised_nodes_stay_in_integers():
    model = quantised()
    after, proposal = run(FOLD, model)
    assert ops(after) == ops(model)
    why = "it makes a weight of a quantised node"
    assert reasons(proposal) == dict.fromkeys(["w0", "c0", "w1", "v", "t"], why)


def test_weights_alone_in_integers_are_folded():
    model = quantised(dense=False)
    after, _ = run(FOLD, model)
    assert not {"DequantizeLinear", "Transpose"} & set(ops(after))
    assert drift(model, after, {"x": normal(2, 3, 8, 8)}) <= 1e-6


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("c = RandomUniform<shape = [4]>()", {}, "'RandomUniform' is not evaluated"),
        ("c = Exp(a)", {"a": np.ones(4, np.float32)}, "'Exp' is not evaluated"),
        (
            "b = Cast<to = 3>(a) c = Cast<to = 1>(b)",
            {"a": np.float32([1, 2, 3, 128])},
            "casts numbers to int8 that do not fit",
        ),
        (
            "b = Cast<to = 6>(a) c = Cast<to = 1>(b)",
            {"a": np.float32([1, 2, np.nan, 4])},
            "casts numbers to int32 that do not fit",
        ),
        (
            "q = Div(a, a) c = Cast<to = 1>(q)",
            {"a": np.zeros(4, np.int64)},
            "integer division by zero",
        ),
        (
            "s = ConstantOfShape(n) t = Slice(s, f, e) c = Reshape(t, f4)",
            {
                "n": np.array([2**25], np.int64),
                "f": np.array([0], np.int64),
                "e": np.array([4], np.int64),
                "f4": np.array([4], np.int64),
            },
            "33554432 elements are more than",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(body, weights, reason):
    model = graph("float[4] x", "float[4] y", f"{body} y = Add(x, c)", weights)
    after, proposal = run(FOLD, model)
    assert any(reason in text for text in reasons(proposal).values())
    assert len(after.nodes) == len(model.nodes)


def test_names_that_must_stay_keep_their_nodes():
    body = """
        c = Constant<value_floats = [1.0, 2.0]>()
        inner = Constant<value_floats = [3.0, 4.0]>()
        z = If (flag) <
            then_branch = a () => (float[2] p) { p = Identity(inner) },
            else_branch = b () => (float[2] q) { q = Identity(inner) }
        >
        y = Add(x, c)
    """
    model = graph("float[2] x, bool flag", "float[2] y, float[2] c, float[2] z", body)
    after, proposal = run(FOLD, model)
    assert after is model
    assert reasons(proposal) == {
        "c": "'c' is a graph output",
        "inner": "'inner' is captured by the subgraph of 'z'",
    }


def test_a_condition_read_by_a_node_with_subgraphs_is_refused():
    body = """
        flag = Constant<value = bool {1}>()
        y = If (flag) <
            then_branch = a () => (float[2] p) { p = Identity(x) },
            else_branch = b () => (float[2] q) { q = Neg(x) }
        >
    """
    _, proposal = run(FOLD, graph("float[2] x", "float[2] y", body))
    assert reasons(proposal) == {"flag": "'flag' is read by 'y', which carries a subgraph"}
