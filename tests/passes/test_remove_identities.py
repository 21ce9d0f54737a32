import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.analysis import Analysis
from onnxcomp.passes.base import Option
from onnxcomp.passes.remove_identities import RemoveIdentities
from tests.passes.exact_checks import drift, graph, normal, ops, reasons, run

REMOVE = RemoveIdentities()
IO = ("float[2,3,4] x", "float[2,3,4] y")
X = {"x": normal(2, 3, 4)}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


GONE = [
    ("i = Identity(x)", {}, 17),
    ("i = Dropout(x)", {}, 17),
    ("i = Dropout<ratio = 0.3>(x)", {}, 7),
    ("i = Dropout(x, r, t)", {"r": np.float32(0.5), "t": np.array(False)}, 13),
    ("i, mask = Dropout(x)", {}, 17),
    ("i = Cast<to = 1>(x)", {}, 17),
    ("i = Transpose<perm = [0, 1, 2]>(x)", {}, 17),
    ("h = Transpose<perm = [1, 2, 0]>(x) i = Transpose<perm = [2, 0, 1]>(h)", {}, 17),
    ("h = Transpose(x) i = Transpose(h)", {}, 17),
    ("h = Transpose(x) i = Transpose<perm = [2, 1, 0]>(h)", {}, 17),
    ("i = Reshape(x, s)", {"s": ints(2, 3, 4)}, 17),
    ("i = Reshape(x, s)", {"s": ints(0, -1, 4)}, 17),
    ("h = Neg(x) g = Flatten(h) f = Flatten(g) i = Reshape(f, s)", {"s": ints(2, 3, 4)}, 17),
    ("i = Concat<axis = 1>(x)", {}, 17),
    ("i = Sum(x)", {}, 17),
    ("i = Mean(x)", {}, 17),
    ("i = Max(x)", {}, 17),
    ("i = Min(x)", {}, 17),
    ("i = Add(x, c)", {"c": np.zeros((3, 1), np.float32)}, 17),
    ("i = Add(c, x)", {"c": np.float32(0)}, 17),
    ("i = Sub(x, c)", {"c": np.zeros(4, np.float32)}, 17),
    ("i = Mul(c, x)", {"c": np.ones((1, 1, 1), np.float32)}, 17),
    ("i = Div(x, c)", {"c": np.ones((2, 3, 4), np.float32)}, 17),
    ("i = Pad(x, p)", {"p": ints(0, 0, 0, 0, 0, 0)}, 17),
    ("i = Pad<pads = [0, 0, 0, 0, 0, 0]>(x)", {}, 9),
    (
        "i = Slice(x, f, e, a, s)",
        {"f": ints(0, 0), "e": ints(2**31 - 1, 2**63 - 1), "a": ints(0, 2), "s": ints(1, 1)},
        17,
    ),
    ("i = Slice<starts = [0], ends = [2147483647], axes = [1]>(x)", {}, 9),
]


@pytest.mark.parametrize(("body", "weights", "opset"), GONE)
def test_nodes_without_effect_go(body, weights, opset):
    model = graph(*IO, f"{body} y = Neg(i)", weights, opset=opset)
    after, proposal = run(REMOVE, model)
    kept = ["Neg", "Flatten", "Reshape", "Neg"] if "Flatten" in body else ["Neg"]
    assert ops(after) == kept
    assert proposal.refusals == ()
    assert drift(model, after, X) == 0


@pytest.mark.parametrize(("body", "weights", "opset"), GONE)
def test_the_output_of_the_graph_keeps_its_name(body, weights, opset):
    body = body.replace("(x", "(n").replace(", x)", ", n)") + " y = Identity(i)"
    model = graph(*IO, f"n = Abs(x) {body}", weights, opset=opset)
    after, _ = run(REMOVE, model)
    assert "Identity" not in ops(after)
    assert len(after.nodes) == (4 if "Flatten" in body else 1)
    assert after.nodes[-1].id == "y"
    assert drift(model, after, X) == 0


KEPT = [
    ("i, mask = Dropout(x, r, t)", {"r": np.float32(0.5), "t": np.array(True)}, 13),
    ("h = Cast<to = 11>(x) i = Cast<to = 1>(h)", {}, 17),
    ("h = Transpose<perm = [1, 2, 0]>(x) i = Transpose<perm = [1, 2, 0]>(h)", {}, 17),
    ("i = Concat<axis = 1>(x, x)", {}, 17),
    ("i = Sum(x, x)", {}, 17),
    ("i = Add(x, c)", {"c": np.zeros((1, 2, 3, 4), np.float32)}, 17),
    ("i = Add(x, c)", {"c": np.float32([0, 0, 1e-3, 0])}, 17),
    ("i = Sub(c, x)", {"c": np.float32(0)}, 17),
    ("i = Div(c, x)", {"c": np.float32(1)}, 17),
    ("i = Mul(x, c)", {"c": np.float32(0)}, 17),
    ("i = Pad(x, p)", {"p": ints(0, 0, 0, 0, 0, 1)}, 17),
    ("i = Slice(x, f, e)", {"f": ints(1), "e": ints(2**31 - 1)}, 17),
    ("i = Slice(x, f, e)", {"f": ints(0), "e": ints(1)}, 17),
    (
        "i = Slice(x, f, e, a, s)",
        {"f": ints(0), "e": ints(2**31 - 1), "a": ints(2), "s": ints(2)},
        17,
    ),
    ("i = Reshape(x, s)", {"s": ints(3, 2, 4)}, 17),
    ("i = Reshape(x, s)", {"s": ints(2, 3, 4, 1)}, 17),
    ("i = Flatten(x)", {}, 17),
]


@pytest.mark.parametrize(("body", "weights", "opset"), KEPT)
def test_nodes_with_an_effect_stay(body, weights, opset):
    model = graph("float[2,3,4] x", "float[?] y", f"{body} y = Neg(i)", weights, opset=opset)
    after, _ = run(REMOVE, model)
    assert after is model


def test_a_factor_that_is_an_output_too_hides_no_shapes():
    weights = {"k": np.ones((3, 1), np.float32), "c": np.zeros((1, 1, 4), np.float32)}
    io = (IO[0], "float[2,3,4] y, float[3,1] k")
    model = graph(*io, "h = Mul(x, k) n = Neg(h) i = Add(n, c) y = Relu(i)", weights)
    assert ops(run(REMOVE, model)[0]) == ["Neg", "Relu"]


def test_removing_a_node_with_an_effect_would_be_seen():
    model = graph(*IO, "i = Add(x, c) y = Neg(i)", {"c": np.float32([0, 0, 1e-3, 0])})
    assert drift(model, graph(*IO, "y = Neg(x)"), X) > 1e-5


def test_addition_that_may_broadcast_an_unknown_shape_stays():
    model = graph(
        "float x, int64[3] s",
        "float[?] y",
        "r = Reshape(x, s) y = Add(r, c)",
        {"c": np.zeros((1, 1, 4), np.float32)},
    )
    assert run(REMOVE, model)[0] is model


def test_reshape_copies_unknown_dimensions():
    io = ("float[N,C,4] x", "float[N,C,4] y")
    for shape, gone in (
        (ints(0, 0, 4), True),
        (ints(0, -1, 4), True),
        (ints(-1, 3, 4), False),
    ):
        model = graph(*io, "i = Reshape(x, s) y = Neg(i)", {"s": shape})
        assert (len(run(REMOVE, model)[0].nodes) == 1) == gone


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4)))
def test_transposes_go_exactly_where_they_cancel(first, second):
    body = f"""h = Transpose<perm = [{", ".join(map(str, first))}]>(x)
               i = Transpose<perm = [{", ".join(map(str, second))}]>(h) y = Neg(i)"""
    model = graph("float[2,3,4,5] x", "float[a,b,c,d] y", body)
    x = normal(2, 3, 4, 5)
    cancels = np.array_equal(x.transpose(first).transpose(second), x) and [
        first[axis] for axis in second
    ] == [0, 1, 2, 3]
    after, _ = run(REMOVE, model)
    assert (ops(after) == ["Neg"]) == cancels
    assert drift(model, after, {"x": x}) == 0


def test_nested_transposes_and_identities_go_in_one_application():
    body = """
        a = Transpose<perm = [1, 2, 0]>(x)
        b = Identity(a)
        c = Transpose<perm = [1, 0, 2]>(b)
        d = Dropout(c)
        e = Transpose<perm = [1, 0, 2]>(d)
        f = Transpose<perm = [2, 0, 1]>(e)
        y = Identity(f)
    """
    model = graph(*IO, "n = Abs(x) " + body.replace("(x)", "(n)"))
    after, _ = run(REMOVE, model)
    assert ops(after) == ["Abs"]
    assert drift(model, after, X) == 0


def test_a_removed_dead_reader_frees_a_mask():
    model = graph(*IO, "i, mask = Dropout(x) dead = Not(mask) y = Neg(i)")
    assert ops(run(REMOVE, model)[0]) == ["Neg"]


def test_names_that_cannot_move_are_refused():
    body = """
        n = Abs(x)
        z = Identity(n)
        w = Identity(n)
        y = Identity(x)
        i = Identity(n)
        v = If (flag) <
            then_branch = t () => (float[2] p) { p = Neg(i) },
            else_branch = e () => (float[2] q) { q = Abs(i) }
        >
        m, mask = Dropout(n)
        u = Not(mask)
        s = Neg(m)
        first, second = Split<axis = 0>(n)
        h = Identity(second)
    """
    outputs = (
        "float[2] y, float[2] z, float[2] w, float[2] v, float[1] h, bool[2] u, float[2] s"
    )
    model = graph("float[2] x, bool flag", outputs, body, opset=13)
    after, proposal = run(REMOVE, model)
    assert reasons(proposal) == {
        "w": "'w' is a graph output, and 'n' takes another output's name",
        "y": "'y' is a graph output, and its input 'x' is an input or initializer",
        "i": "'i' is captured by the subgraph of 'v', and 'n' takes another output's name",
        "m": "its second output 'mask' is read",
        "h": "'h' is a graph output, and 'second' is not the first output of 'first'",
    }
    assert [option.target for option in proposal.options] == ["z"]
    for flag in (True, False):
        feeds = {"x": normal(2), "flag": np.array(flag)}
        assert drift(model, after, feeds) == 0


def test_a_captured_name_is_taken_on_by_the_node_before():
    body = """
        n = Abs(x)
        i = Identity(n)
        v = If (flag) <
            then_branch = t () => (float[2] p) { p = Neg(i) },
            else_branch = e () => (float[2] q) { q = Abs(i) }
        >
        z = Neg(n)
    """
    model = graph("float[2] x, bool flag", "float[2] v, float[2] z", body)
    after, _ = run(REMOVE, model)
    assert sorted(ops(after)) == ["Abs", "If", "Neg"]
    for flag in (True, False):
        assert drift(model, after, {"x": normal(2), "flag": np.array(flag)}) == 0


def test_any_choice_of_options_gives_the_same_values():
    body = (
        "n = Abs(x) a = Identity(n) b = Dropout(a) c = Identity(b) y = Identity(c) z = Neg(b)"
    )
    model = graph("float[2] x", "float[2] y, float[2] z", body)
    facts = Analysis(model)
    options = REMOVE.propose(facts).options
    assert len(options) == 4
    for mask in range(1, 2 ** len(options)):
        chosen = {option: {} for i, option in enumerate(options) if mask >> i & 1}
        draft = model.edit()
        REMOVE.apply(draft, facts, chosen)
        after = draft.seal(by="test")
        assert len(after.nodes) == len(model.nodes) - len(chosen)
        assert drift(model, after, {"x": normal(2)}) == 0


ZERO = [
    ("y = Conv(x, w, b)", (1, 3, 5, 5), (4, 3, 3, 3), 4, 17),
    ("y = ConvTranspose<group = 3>(x, w, b)", (1, 3, 5, 5), (3, 2, 3, 3), 6, 17),
    ("y = Gemm(x, w, b)", (2, 3), (3, 4), 4, 11),
]


@pytest.mark.parametrize(("body", "x_shape", "w_shape", "channels", "opset"), ZERO)
def test_zero_biases_go_and_others_stay(body, x_shape, w_shape, channels, opset):
    shape = ",".join(map(str, x_shape))
    io = (f"float[{shape}] x", "float[?] y", body)
    weights = {"w": normal(*w_shape), "b": np.zeros(channels, np.float32)}
    model = graph(*io, weights, opset=opset)
    after, proposal = run(REMOVE, model)
    assert proposal.options == (Option("remove_identities", "y", "zero bias"),)
    assert set(after.weights) == {"w"}
    feeds = {"x": normal(*x_shape)}
    assert drift(model, after, feeds) == 0
    real = graph(*io, {**weights, "b": normal(channels)}, opset=opset)
    assert run(REMOVE, real)[0] is real
    assert drift(real, after, feeds) > 1e-5


def test_before_opset_11_a_gemm_keeps_its_zero_bias():
    weights = {"w": normal(3, 4), "b": np.zeros(4, np.float32)}
    model = graph("float[2,3] x", "float[2,4] y", "y = Gemm(x, w, b)", weights, opset=9)
    assert run(REMOVE, model)[0] is model
