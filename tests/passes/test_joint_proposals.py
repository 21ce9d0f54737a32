"""What is proposed of common factors, what is refused, and why."""

import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import TARGETS
from onnxcomp.errors import ParameterError
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes.base import Option, Proposal
from onnxcomp.passes.chains import kernel_shape4
from onnxcomp.passes.factorize_jointly import (
    FactorizeJointly,
    chain,
    possible,
    private_weights,
    shared_weights,
)
from onnxcomp.passes.joint_groups import PaperRule
from tests.analysis.channel_graphs import Graph
from tests.graphs import sane_feeds
from tests.passes.joint_cases import (
    CASES,
    NAME,
    facts_of,
    real_facts,
    residual,
    solved,
)

TARGET = TARGETS["x86-avx512"]
REAL = [
    "akamaster_cifar10_resnet20",
    "mlperftiny_ad01_autoencoder",
    "mlperftiny_kws_dscnn",
    "oarriaga_emotion_mini_XCEPTION",
]


def everything_is_answered_for(facts: Analysis, pass_: FactorizeJointly) -> Proposal:
    """Every node is in the group of an option, or refused; it stays so without a change."""
    before = facts.model.digest
    proposal, groups = pass_.propose(facts), pass_.groups(facts)
    grouped = {n for o in proposal.options for n in groups[o.target].members}
    refused = {refusal.where for refusal in proposal.refusals}
    assert grouped | refused == {*facts.linears, *facts.not_linear}
    assert grouped.isdisjoint(refused)
    assert all(refusal.reason for refusal in proposal.refusals)
    assert pass_.propose(facts) == proposal
    del facts.model.__dict__["digest"]
    assert facts.model.digest == before
    return proposal


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [None, 1, 4])
def test_every_linear_node_is_answered_for(case, step):
    facts, pass_ = facts_of(case), FactorizeJointly(step=step, slower=True)
    proposal = everything_is_answered_for(facts, pass_)
    assert pass_.propose(Analysis(CASES[case](), facts.samples)) == proposal


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("step", [None, 1])
def test_real_nodes_are_answered_for(name, step):
    facts = real_facts(name)
    everything_is_answered_for(facts, FactorizeJointly(step=step))


@pytest.mark.parametrize("case", CASES)
def test_options_save_weights_and_macs(case):
    facts = facts_of(case)
    pass_ = FactorizeJointly(step=1)
    groups, options = pass_.groups(facts), pass_.propose(facts).options
    assert options
    for option in options:
        linears = [facts.linears[n] for n in groups[option.target].members]
        shape = kernel_shape4(linears[0], linears[0].out_channels, linears[0].in_channels)
        assert possible(option, shape)
        count = len(linears)
        weights = shared_weights(option, shape) + count * private_weights(option, shape)
        assert weights < sum(n.convolution.weights for n in linears)
        macs = sum(s.macs for n in linears for s in chain(n, option, *shape[:2]))
        assert macs < sum(n.convolution.macs for n in linears)


def test_more_rank_is_not_possible_than_makes_a_chain_smaller():
    shape = (12, 10, 3, 3)
    for form, kind in JOINT_FORMS.items():
        most = kind.max_rank(shape)
        sizes = {
            "outer": [(10, 12), (11, 12), (10, 13)],
            "both": [(most - 2, 1), (most - 1, 1)],
        }
        ranks = sizes.get(kind.shares, [(most - 1,), (most,)])
        allowed = [possible(Option(NAME, "g", form, size), shape) for size in ranks]
        assert allowed == [True, *[False] * (len(ranks) - 1)], form


def test_groups_are_whole_and_in_halves_from_four_members_on():
    for blocks, halves in ((3, 0), (4, 1), (5, 1)):
        model = residual(blocks=blocks)
        groups = FactorizeJointly().groups(Analysis(model, sane_feeds(model)))
        whole = [g for g in groups.values() if g.name == g.repetition]
        assert sorted(len(g.members) for g in whole) == [blocks - 1, blocks]
        for group in whole:
            parts = [g for g in groups.values() if g.repetition == group.name and g != group]
            wanted = len(group.members) >= 4
            assert bool(parts) is wanted
            assert sum((g.members for g in parts), ()) == (group.members if wanted else ())
            sizes = [len(g.members) for g in parts]
            assert not parts or max(sizes) - min(sizes) <= 1
        assert any(g not in whole for g in groups.values()) is bool(halves)


def wide(channels: int, extent: int, kernel: int) -> Analysis:
    g = Graph(channels, extent, extent)
    t = "x"
    for _ in range(3):
        t = g.op("Relu", g.conv(t, channels, channels, kernel=kernel))
    return Analysis(g.model(t))


@pytest.mark.parametrize(("channels", "extent"), [(32, 8), (64, 14)])
def test_what_is_slower_is_proposed_on_demand_only(channels, extent):
    facts = wide(channels, extent, 1)
    strict = FactorizeJointly().propose(facts).options
    every = FactorizeJointly(slower=True).propose(facts).options
    assert set(strict) < set(every)
    groups = FactorizeJointly().groups(facts)
    for option in every:
        linears = [facts.linears[n] for n in groups[option.target].members]
        steps = [s for n in linears for s in chain(n, option, n.out_channels, n.in_channels)]
        now = TARGET.chain_seconds([n.convolution for n in linears])
        assert (TARGET.chain_seconds(steps) <= now) is (option in strict)


@pytest.mark.parametrize("step", [None, 1, 8])
def test_ranks_follow_the_grid(step):
    options = FactorizeJointly(step=step, slower=True).propose(wide(32, 8, 3)).options
    assert {option.form for option in options} == set(JOINT_FORMS)
    ranks = {sum(o.size) for o in options if JOINT_FORMS[o.form].shares != "outer"}
    allowed = {
        None: {4, 8, 12, *range(16, 96, 16)},
        1: set(range(96)),
        8: set(range(0, 96, 8)),
    }
    assert ranks <= allowed[step]
    assert (ranks <= allowed[None]) is (step is None)
    assert max(sum(o.form == form for o in options) for form in JOINT_FORMS) <= 6
    for option in options:
        if JOINT_FORMS[option.form].shares == "both":
            assert abs(option.size[0] - option.size[1]) <= 1


def test_only_the_forms_that_are_asked_for():
    facts = facts_of("residual")
    options = FactorizeJointly(("spatial_first",), step=1).propose(facts).options
    assert {option.form for option in options} == {"spatial_first"}


def test_refusals_say_why():
    g = Graph(8, 6, 6)
    shared, t = g.w(8, 8, 3, 3), "x"
    for _ in range(2):
        t = g.op("Conv", t, shared, pads=[1] * 4)
    for _ in range(2):
        t = g.conv(t, 8, 8, group=8)
    for _ in range(2):
        t = g.conv(t, 8, 8, group=2)
    for _ in range(2):
        t = g.op("Relu", g.conv(t, 8, 8))
    t = g.op("Gemm", g.mean(t), g.w(8, 8), alpha=0.5)
    facts = Analysis(g.model(g.op("Gemm", t, g.w(8, 3), g.w(3))))
    reasons = [r.reason for r in FactorizeJointly(step=64).propose(facts).refusals]
    for words in (
        "shared by 2 readers",
        "depthwise",
        "2 groups",
        "alpha",
        "no form with common factors",
        "no other layer of its shape",
    ):
        assert any(words in reason for reason in reasons), words
    left = PaperRule("ljsvd", 0.5)
    reasons = [r.reason for r in FactorizeJointly(paper=left).propose(facts).refusals]
    assert "the paper leaves it dense" in reasons


def test_transposed_convolutions_whose_padding_cannot_be_split_take_no_spatial_form():
    g = Graph(8, 5, 5)
    t = "x"
    for _ in range(2):
        attrs = {"strides": [2, 2], "auto_pad": "SAME_UPPER"}
        t = g.op("Relu", g.op("ConvTranspose", t, g.w(8, 8, 3, 3), g.w(8), **attrs))
    found = FactorizeJointly(step=1).propose(Analysis(g.model(t))).options
    assert found
    assert not any(option.form.startswith("spatial") for option in found)


def test_bad_parameters():
    with pytest.raises(ParameterError, match="forms"):
        FactorizeJointly(forms=("spatial_first", "nothing"))
    for step in (0, -4):
        with pytest.raises(ParameterError, match="step"):
            FactorizeJointly(step=step)
    for arguments, word in (
        (("joint", 0.1), "scheme"),
        (("svd", 0.0), "rate"),
        (("svd", 1.5), "rate"),
        (("bijsvd", 0.1, 1.1), "left"),
    ):
        with pytest.raises(ParameterError, match=word):
            PaperRule(*arguments)
    facts = facts_of("gemm")
    option = Option(NAME, "repeated.16x16", "output_basis_first", (0,))
    with pytest.raises(ParameterError, match="rank"):
        solved(facts, option)
