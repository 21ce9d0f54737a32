"""Lighter operators compute and cost what they claim, and are proposed where legal."""

from dataclasses import replace

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import collect_moments
from onnxcomp.errors import ParameterError
from onnxcomp.model import Model
from onnxcomp.passes.base import Option
from onnxcomp.passes.substitute_operators import (
    FITTED,
    TRAINED,
    SubstituteOperators,
    chain,
    seconds,
)
from onnxcomp.runtime import Session
from tests.analysis.channel_graphs import Graph
from tests.graphs import sane_feeds
from tests.passes.exact_checks import relative_l2

TOLERANCE = 1e-5  # relative L2: float32 products in another order
EVERY = SubstituteOperators((*FITTED, *TRAINED), step=1)
CASES = {
    "plain": {"pads": [1] * 4},
    "strided": {"pads": [1] * 4, "strides": [2, 2]},
    "uneven strides": {"pads": [1] * 4, "strides": [2, 1]},
    "dilated": {"pads": [2] * 4, "dilations": [2, 2]},
    "no padding": {},
    "padded behind": {"pads": [0, 0, 1, 1], "strides": [2, 2]},
    "same upper": {"auto_pad": "SAME_UPPER"},
    "same lower": {"auto_pad": "SAME_LOWER"},
    "same strided": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "valid": {"auto_pad": "VALID"},
    "5 x 5": {"kernel": (5, 5), "pads": [2] * 4},
    "5 x 5 shifted": {"kernel": (5, 5), "pads": [4, 4, 0, 0]},
    "5 x 5 same": {"kernel": (5, 5), "auto_pad": "SAME_UPPER", "outputs": 16},
    "4 x 4": {"kernel": (4, 4), "pads": [1, 1, 2, 2]},
    "1 x 1": {"kernel": (1, 1)},
    "padded widely": {"pads": [1, 1, 3, 1]},
    "1-D": {"kernel": (5,), "pads": [2, 2]},
    "widening": {"pads": [1] * 4, "outputs": 16},
}


def lone(kernel=(3, 3), outputs=8, bias=True, **attrs) -> Model:
    g = Graph(8, *(9, 10)[: len(kernel)])
    weights = [g.w(outputs, 8, *kernel), *([g.w(outputs)] if bias else [])]
    return g.model(g.op("Conv", "x", *weights, **attrs))


def facts_of(model: Model) -> tuple[Analysis, Linear]:
    facts = Analysis(model, sane_feeds(model, 3))
    (linear,) = facts.linears.values()
    return facts, linear


def run(model: Model, facts: Analysis, *, optimize: bool = False) -> np.ndarray:
    feed = next(facts.samples.batches(model.signature.inputs, 3)).feed
    (y,) = Session(model, optimize=optimize).run(feed).values()
    return y


def applied(facts: Analysis, option: Option, arrays) -> Model:
    draft = facts.model.edit()
    EVERY.apply(draft, facts, {option: arrays})
    return draft.seal(by="test")


def with_kernel(facts: Analysis, linear: Linear, kernel: np.ndarray) -> Model:
    draft = facts.model.edit()
    draft.set_weight(linear.weight, linear.stored(kernel))
    return draft.seal(by="test")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_written_operators_are_their_dense_kernels(name, bias):
    facts, linear = facts_of(lone(bias=bias, **CASES[name]))
    kernel = linear.kernel(facts.model.weights[linear.weight])
    options = [o for o in EVERY.propose(facts).options if o.form in FITTED]
    assert options
    original = run(facts.model, facts)
    for option in options:
        arrays, dense = EVERY.fit(option, kernel, None)
        small = applied(facts, option, arrays)
        assert small.signature == facts.model.signature
        found, wanted = run(small, facts), run(with_kernel(facts, linear, dense), facts)
        assert relative_l2(found, wanted) <= TOLERANCE, option
        assert relative_l2(found, original) > 100 * TOLERANCE, option
        fast = run(small, facts, optimize=True)  # where blocked kernels know less
        assert relative_l2(fast, wanted) <= TOLERANCE, option
        check_costs(facts, small, linear, option)


def check_costs(facts: Analysis, small: Model, linear: Linear, option: Option) -> None:
    """Shapes, weights and MACs of `chain` are those of the written model."""
    steps = chain(linear, option, linear.out_channels, linear.in_channels)
    after = Analysis(small, facts.samples)
    made = [other.convolution for other in after.linears.values()]
    assert made == steps, option
    biases = facts.cost.params - linear.convolution.weights
    assert after.cost.params - biases == sum(step.weights for step in steps)
    assert after.cost.macs == sum(step.macs for step in steps)
    assert after.cost.params < facts.cost.params


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("plain", {"grouped", "pointwise", "row", "column", "cross", "separable"}),
        ("no padding", {"grouped", "separable"}),
        ("valid", {"grouped", "separable"}),
        ("padded behind", {"grouped", "separable"}),
        ("same strided", {"grouped", "separable"}),
        ("same upper", {"grouped", "pointwise", "row", "column", "cross", "separable"}),
        ("5 x 5", {"grouped", "pointwise", "row", "column", "cross", "separable", "dilated"}),
        ("5 x 5 shifted", {"grouped", "separable", "dilated"}),
        ("1 x 1", {"grouped"}),
        ("1-D", {"grouped", "pointwise", "separable", "dilated"}),
    ],
)
def test_what_is_legal(name, legal):
    facts, _ = facts_of(lone(**CASES[name]))
    forms = {option.form for option in EVERY.propose(facts).options}
    assert forms & set(FITTED) == legal


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("plain", {"separable_twice", "average_pool", "max_pool", "skip"}),
        ("strided", {"separable_twice", "average_pool", "max_pool"}),
        ("widening", {"separable_twice"}),
        ("no padding", {"separable_twice", "average_pool", "max_pool"}),
        ("dilated", {"separable_twice", "skip"}),
        ("padded widely", {"separable_twice"}),
    ],
)
def test_what_is_legal_to_train(name, legal):
    facts, _ = facts_of(lone(**CASES[name]))
    forms = {option.form for option in EVERY.propose(facts).options}
    assert forms & set(TRAINED) == legal


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["plain", "strided", "same upper"])
def test_operators_without_a_dense_kernel(name, bias):
    """Pools and skips, written out here; the bias stays."""
    facts, linear = facts_of(lone(bias=bias, **CASES[name]))
    x = next(facts.samples.batches(facts.model.signature.inputs, 3)).feed["x"]
    windows = linear._windows(x)
    shift = facts.model.weights[linear.bias][:, None, None] if bias else 0.0
    wanted = {"average_pool": windows.mean((-2, -1)), "skip": x}
    if bias and name == "plain":
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        views = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        wanted["max_pool"] = views.max((-2, -1))
    for option in EVERY.propose(facts).options:
        if option.form not in wanted:
            continue
        small = applied(facts, option, EVERY.start(option, np.zeros((8, 8, 3, 3)), None))
        assert small.signature == facts.model.signature
        y = wanted[option.form] + shift
        assert relative_l2(run(small, facts), y) <= TOLERANCE, option
        assert Analysis(small, facts.samples).cost.macs == 0


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("behind", range(4))
@pytest.mark.parametrize("kernel", [1, 3])
def test_pools_are_proposed_where_onnxruntime_can_run_them(kernel, before, behind):
    """Which needs less padding than there is kernel."""
    pads = [before, 0, behind, 0]
    facts, _ = facts_of(lone(kernel=(kernel, kernel), pads=pads))
    options = [
        o for o in EVERY.propose(facts).options if o.form in ("average_pool", "max_pool")
    ]
    assert bool(options) == (max(pads) < kernel)
    for option in options:
        found = run(applied(facts, option, {}), facts)
        assert found.shape == run(facts.model, facts).shape


def test_separable_twice_starts_as_separable_once():
    """Behind a Relu, where the first half passes its inputs on."""
    g = Graph(8, 9, 10)
    model = g.model(g.conv(g.op("Relu", "x"), 8, 8))
    facts, linear = facts_of(model)
    kernel = linear.kernel(model.weights[linear.weight])
    once = Option(EVERY.name, linear.id, "separable", (1,))
    twice = Option(EVERY.name, linear.id, "separable_twice")
    found = applied(facts, twice, EVERY.start(twice, kernel, None))
    wanted = applied(facts, once, EVERY.fit(once, kernel, None)[0])
    assert relative_l2(run(found, facts), run(wanted, facts)) <= TOLERANCE
    assert len(Analysis(found).linears) == 4
    check_costs(facts, found, linear, twice)


def test_samples_make_operators_better():
    """On inputs of unequal channels; from the weights alone every form loses more."""
    facts, linear = facts_of(lone(pads=[1] * 4))
    model = facts.model
    x = next(sane_feeds(model, 64).batches(model.signature.inputs, 64)).feed["x"]
    x = x * np.geomspace(1, 0.05, 8, dtype=np.float32)[:, None, None]
    x[:, 1::2] += x[:, ::2]
    y = Session(model, optimize=False).run({"x": x})[linear.y]
    (metric,) = collect_moments(linear, [x], [y], np.random.default_rng(0))
    kernel = linear.kernel(model.weights[linear.weight])
    for option in EVERY.propose(facts).options:
        if option.form in FITTED:
            errors = []
            for known in (metric, None):
                _, dense = EVERY.fit(option, kernel, known)
                bias = metric.bias(dense.reshape(8, -1))
                draft = with_kernel(facts, linear, dense).edit()
                draft.set_weight(linear.bias, bias)
                found = Session(draft.seal(by="test"), optimize=False).run({"x": x})
                errors.append(relative_l2(found[linear.y], y))
            assert errors[0] < errors[1], option


def test_a_cross_loses_less_than_its_row_or_its_column():
    facts, linear = facts_of(lone(pads=[1] * 4))
    kernel = linear.kernel(facts.model.weights[linear.weight])
    options = {o.form: o for o in EVERY.propose(facts).options}
    three = [options[form] for form in ("cross", "row", "column")]
    cross, row, column = EVERY.errors(three, kernel, None).values()
    assert cross < min(row, column)
    arrays, dense = EVERY.fit(options["cross"], kernel, None)
    np.testing.assert_array_equal(dense[:, :, 1], kernel[:, :, 1])
    np.testing.assert_array_equal(dense[:, :, ::2, ::2], 0)
    np.testing.assert_array_equal(arrays["1"][:, :, 1], 0)  # the middle is in the row


def test_refusals():
    g = Graph(8, 8, 8)
    weight = g.w(8, 8, 3, 3)
    t = g.op("Conv", "x", weight, pads=[1] * 4)
    t = g.op("Conv", t, weight, pads=[1] * 4)
    t = g.conv(t, 8, 8, group=8)
    t = g.conv(t, 8, 8, group=2)
    t = g.op("ConvTranspose", t, g.w(8, 8, 3, 3))
    facts = Analysis(g.model(g.op("Gemm", g.mean(t), g.w(8, 5), g.w(5))))
    proposal = EVERY.propose(facts)
    assert not proposal.options
    reasons = [refusal.reason for refusal in proposal.refusals]
    assert sum("shared by 2" in reason for reason in reasons) == 2
    for word in ("depthwise", "2 groups", "ConvTranspose", "Gemm"):
        assert any(word in reason for reason in reasons), word
    assert {r.where for r in proposal.refusals} == set(facts.linears)


def test_slower_operators_are_refused_with_the_reason():
    """At 16 channels groups are slower than the dense kernel."""
    g = Graph(16, 32, 32)
    facts = Analysis(g.model(g.conv("x", 16, 16)))
    proposal = SubstituteOperators(("grouped",)).propose(facts)
    assert not proposal.options
    assert "predicted faster" in proposal.refusals[0].reason
    (linear,) = facts.linears.values()
    option = Option("substitute_operators", linear.id, "grouped", (2,))
    target = SubstituteOperators().target
    assert seconds(linear, option, target) > target.seconds(linear.convolution)
    assert SubstituteOperators(("grouped",), step=1).propose(facts).options
    assert SubstituteOperators(("separable",)).propose(facts).options


@pytest.mark.parametrize(
    ("form", "size", "widths", "possible"),
    [
        ("grouped", (4,), (8, 4), True),
        ("grouped", (4,), (6, 4), False),
        ("pointwise", (1,), (3, 5), True),
        ("pointwise", (2,), (8, 5), False),
        ("separable", (1,), (8, 8), True),
        ("separable", (4,), (1, 8), False),
        ("skip", (), (8, 8), True),
        ("skip", (), (4, 4), False),
        ("average_pool", (), (8, 4), False),
    ],
)
def test_what_is_possible_at_other_widths(form, size, widths, possible):
    _, linear = facts_of(lone(pads=[1] * 4))
    option = Option("substitute_operators", linear.id, form, size)
    assert EVERY.possible(option, linear, *widths) is possible


def test_wrong_parameters():
    with pytest.raises(ParameterError, match="separable"):
        SubstituteOperators(("depthwise",))
    option = Option("substitute_operators", "y", "skip")
    with pytest.raises(ParameterError, match="form"):
        EVERY.fit(option, np.zeros((2, 2, 3, 3)), None)


def test_the_check_of_costs_bites():
    facts, linear = facts_of(lone(pads=[1] * 4))
    option = Option(EVERY.name, linear.id, "separable", (2,))
    kernel = linear.kernel(facts.model.weights[linear.weight])
    small = applied(facts, option, EVERY.fit(option, kernel, None)[0])
    with pytest.raises(AssertionError):
        check_costs(facts, small, linear, replace(option, size=(1,)))
