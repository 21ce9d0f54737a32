"""Chains with common factors compute and cost what they claim; every node is answered for."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import TARGETS
from onnxcomp.model import Array, Model
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes.chains import kernel_shape4
from onnxcomp.passes.factorize_jointly import (
    FactorizeJointly,
    arrays_of,
    chain,
    private_weights,
    shared_weights,
)
from onnxcomp.passes.joint_groups import PaperRule
from onnxcomp.runtime import Session, with_outputs
from onnxcomp.search.space import Space
from tests.analysis.channel_graphs import Graph
from tests.graphs import sane_feeds
from tests.passes.exact_checks import drift, relative_l2
from tests.passes.joint_cases import (
    FLAT,
    PAIRS,
    Made,
    applied,
    common_readers,
    facts_of,
    feed_of,
    made,
    members_of,
    one_of_every_group,
    real_facts,
    reconstructed,
    solved,
    stages,
    whole_groups,
    wrong_joint,
)

TOLERANCE = 1e-6  # relative L2 against the dense kernels: float32 products in another order
HEADER = 80  # bytes by which the size of a node's chain beside its weights may be mistaken
BOTH = [pair for pair in PAIRS if pair[1].endswith("_both")]
WHOLE = FactorizeJointly(materialize=True)
TARGET = TARGETS["x86-avx512"]
REAL = ["mlperftiny_ad01_autoencoder", "mlperftiny_kws_dscnn"]
SLOW = ["akamaster_cifar10_resnet20", "akamaster_cifar10_resnet56"]


def space_of(facts: Analysis, **settings: object) -> Space:
    return Space(facts, [FactorizeJointly(step=1, **settings).propose(facts)], TARGET)


def check(found: Made, *, header: int, share: float) -> None:
    """Outputs are those of the dense kernels, costs those that were predicted."""
    facts, small = found.facts, found.model
    assert small.signature == facts.model.signature
    wanted = reconstructed(facts, found.joints)
    assert drift(wanted, small, found.feed) <= TOLERANCE
    assert drift(facts.model, small, found.feed) > 1e4 * TOLERANCE  # it did something
    space = space_of(facts)
    predicted = space.cost({}, found.forms)
    assert predicted == Analysis(small, facts.samples).cost
    size = space.file_bytes(predicted, found.forms)
    assert abs(size - small.file_bytes) <= max(
        share * small.file_bytes, header * len(found.forms)
    )


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_applied_models_are_their_dense_kernels_at_the_predicted_cost(case, form):
    check(made(case, form), header=HEADER, share=0)


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_the_checks_see_a_wrong_model(case, form):
    """Private factors in each other's place, and one rank more."""
    found = made(case, form)
    wrong = {option: wrong_joint(joint) for option, joint in found.joints.items()}
    wanted = reconstructed(found.facts, found.joints)
    assert drift(wanted, applied(found.facts, wrong), found.feed) > 1e3 * TOLERANCE
    cost = Analysis(found.model).cost
    more = {
        node: replace(option, size=(option.size[0] + 1, *option.size[1:]))
        for node, option in found.forms.items()
    }
    other = space_of(found.facts).cost({}, more)
    assert (other.params, other.macs) > (cost.params, cost.macs)


@pytest.mark.parametrize("name", REAL)
def test_real_models(name):
    facts = real_facts(name)
    for form in ("output_basis_first", "output_basis_last", "output_basis_both"):
        check(Made.of(facts, form), header=0, share=0.01)


@pytest.mark.parametrize("form", ["spatial_first", "input_basis_last"])
def test_a_residual_network(form):
    check(Made.of(real_facts(SLOW[0]), form), header=0, share=0.01)


@pytest.mark.heavy
@pytest.mark.parametrize("form", JOINT_FORMS)
@pytest.mark.parametrize("name", SLOW)
def test_residual_networks_in_every_form(name, form):
    check(Made.of(real_facts(name), form), header=0, share=0.01)


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_costs_of_a_group_add_up(case, form):
    """Weights of the chain's shapes are those of its members' own and of the common ones."""
    found = made(case, form)
    after = Analysis(found.model, found.facts.samples)
    for option in found.joints:
        nodes = members_of(found.facts, option)
        for node in nodes:
            linear = found.facts.linears[node]
            shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
            steps = chain(linear, option, *shape[:2])
            own, common = private_weights(option, shape), shared_weights(option, shape)
            assert sum(step.weights for step in steps) == own + common
            ids = [n.id for n in after.model.nodes if n.id.startswith(f"{node}_{form}")]
            ids = [n for n in ids if after.costs[n].macs] + [node]
            assert [after.costs[n].macs for n in ids] == [step.macs for step in steps]


@pytest.mark.parametrize(("case", "form"), BOTH)
def test_whole_kernels_on_demand(case, form):
    """For runtimes that want constant weights: no Concat, the same outputs, more bytes."""
    found = made(case, form)
    whole = applied(found.facts, found.joints, WHOLE)
    assert "Concat" in [node.op for node in found.model.nodes]
    assert "Concat" not in [node.op for node in whole.nodes]
    assert drift(found.model, whole, found.feed) <= TOLERANCE
    cost, more = (Analysis(m, found.facts.samples).cost for m in (found.model, whole))
    assert more.params > cost.params
    assert more.macs == cost.macs


@pytest.mark.parametrize(("case", "form"), [pair for pair in PAIRS if pair not in BOTH])
def test_whole_kernels_change_nothing_where_no_kernel_is_joined(case, form):
    found = made(case, form)
    assert applied(found.facts, found.joints, WHOLE).digest == found.model.digest


def values(found: Made) -> dict[str, Array]:
    """All tensors that the original and the changed model both name, in the latter."""
    names = [n for n in found.facts.tensors if n in found.model.producers]
    session = Session(with_outputs(found.model, names), optimize=False)
    return {**found.feed, **session.run(found.feed)}


def branches(x: Array, parts: list[tuple[Array, Array]], attrs: dict[str, list[int]]) -> Array:
    """Sum of chains of two convolutions each, spelt out for a window of kh x kw."""
    (top, left, bottom, right), (down, across) = attrs["pads"], attrs["strides"]
    total: Array | None = None
    for first, last in parts:
        extent = first.shape[2], last.shape[3]
        padded = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)])
        views = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(2, 3))
        views = views[:, :, ::down, ::across]
        y = np.einsum("nchwij,qcik,oqlj->nohw", views, first, last, optimize=True)
        total = y if total is None else total + y
    assert total is not None
    return total


def test_the_fused_chain_is_the_two_branches_of_the_paper():
    """Bi-JSVD: W_i ~ (U_i, V) + (U, V_i), each a chain of its own, in float64."""
    found = made("uneven", "spatial_both")
    ((option, joint),) = found.joints.items()
    first_common, last_common = joint.shared
    tensors = values(found)
    for (first, last), node in zip(
        joint.private, members_of(found.facts, option), strict=True
    ):
        linear = found.facts.linears[node]
        x = tensors[linear.x].astype(np.float64)
        bias = found.facts.model.weights[linear.bias].reshape(-1, 1, 1)
        parts = [(first, last_common), (first_common, last)]
        y = branches(x, parts, dict(linear.node.attrs)) + bias
        assert relative_l2(tensors[node].astype(np.float64), y) <= TOLERANCE
        lone = branches(x, parts[:1], dict(linear.node.attrs)) + bias
        assert relative_l2(tensors[node].astype(np.float64), lone) > 1e4 * TOLERANCE


@pytest.mark.parametrize("case", FLAT)
def test_the_fused_chain_of_matrices_is_two_products(case):
    found = made(case, "output_basis_both")
    ((option, joint),) = found.joints.items()
    tensors = values(found)
    ends = [None if part is None else part[:, :, 0, 0] for part in joint.shared]
    for parts, node in zip(joint.private, members_of(found.facts, option), strict=True):
        linear = found.facts.linears[node]
        x = tensors[linear.x].astype(np.float64)
        first, last = (part[:, :, 0, 0] for part in parts)
        y = x @ first.T @ ends[1].T + x @ ends[0].T @ last.T
        y = y + found.facts.model.weights[linear.bias]
        assert relative_l2(tensors[linear.y].astype(np.float64), y) <= TOLERANCE


def test_the_optimised_graph_computes_the_same():
    for form in JOINT_FORMS:
        found = made("residual bn", form)
        (wanted,) = Session(found.model, optimize=False).run(found.feed).values()
        (y,) = Session(found.model).run(found.feed).values()
        assert relative_l2(y, wanted) <= 10 * TOLERANCE  # other kernels, BatchNorm folded


def test_names_of_a_chain():
    small = made("one dimension", "output_basis_both").model
    stem = "conv2_0_output_basis_both"
    first, last = (small.producers[name] for name in (f"{stem}0", "conv2_0"))
    assert [bool(n.input(2)) for n in (first, last)] == [False, True]
    joined = small.producers[first.input(1)]
    assert joined.inputs == ("w2_output_basis_both0", "w2_output_basis_both0_common")
    joined = small.producers[last.input(1)]
    assert joined.inputs == ("w2_output_basis_both1_common", "w2_output_basis_both1")
    assert "w2" not in small.weights


def test_half_precision_stays_half():
    g = Graph(8)
    t = "x"
    for _ in range(2):
        weight = g.constant(g.rng.standard_normal((8, 8)).astype(np.float16) / 4)
        t = g.op("Relu", g.op("MatMul", t, weight))
    proto = g.model(t).to_proto()
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del proto.graph.value_info[:]
    model = Model.from_proto(proto)
    facts = Analysis(model, sane_feeds(model, 4))
    for form in ("output_basis_first", "output_basis_both"):
        found = Made.of(facts, form)
        assert {a.dtype for a in found.model.weights.values()} == {np.dtype(np.float16)}
        wanted = reconstructed(facts, found.joints)
        assert drift(wanted, found.model, found.feed) <= 5e-3  # 11 bits


def test_layers_that_are_stored_differently_do_not_meet():
    """Of Gemms, those with transposed weights; of convolutions, those of other dilations."""
    g = Graph(16)
    t = "x"
    for rows in (0, 1, 0, 1):
        t = g.op("Relu", g.op("Gemm", t, g.w(16, 16), g.w(16), transB=rows))
    model = g.model(t)
    facts = Analysis(model, sane_feeds(model, 4))
    groups = list(FactorizeJointly().groups(facts).values())
    assert [len(group.members) for group in groups] == [2, 2]
    assert len({group.name for group in groups}) == 2
    for option in one_of_every_group(facts, "output_basis_both"):
        joint = solved(facts, option)
        small = applied(facts, {option: joint})
        wanted = reconstructed(facts, {option: joint})
        assert drift(wanted, small, feed_of(facts)) <= TOLERANCE


@pytest.mark.parametrize(
    ("scheme", "form", "readers"),
    [
        ("svd", "spatial_first", [1] * 8),
        ("ljsvd", "spatial_first", [1, 3, 4]),
        ("rjsvd1", "spatial_last", [4, 4]),
        ("rjsvd2", "spatial_last", [1, 3, 4]),
        ("bijsvd", "spatial_both", [1, 3, 3, 4, 4]),
    ],
)
def test_groups_of_the_paper_are_applied_too(scheme, form, readers):
    """Groups of one, layers with fewer inputs than others, and the paper's split."""
    model = stages()
    facts = Analysis(model, sane_feeds(model, 4))
    pass_ = FactorizeJointly(paper=PaperRule(scheme, 0.3))
    options = pass_.propose(facts).options
    assert form in {option.form for option in options}
    joints = {option: solved(facts, option, pass_) for option in options}
    small = applied(facts, joints, pass_)
    assert sorted(common_readers(small).values()) == readers
    feed = feed_of(facts)
    assert drift(reconstructed(facts, joints, pass_), small, feed) <= TOLERANCE
    assert drift(model, small, feed) > 1e4 * TOLERANCE
    for joint in joints.values():
        if joint.form == "spatial_last":  # all energy is in the first factors
            rank = joint.shared[1].shape[1]
            common = np.moveaxis(joint.shared[1], 1, -1).reshape(-1, rank)
            np.testing.assert_allclose(common.T @ common, np.eye(rank), atol=1e-9)


def test_arrays_are_named_by_place_and_node():
    facts = facts_of("gemm")
    for form, common in (("first", {"0"}), ("last", {"1"}), ("both", {"0", "1"})):
        (option,) = one_of_every_group(facts, f"output_basis_{form}")
        nodes = members_of(facts, option)
        names = set(arrays_of(solved(facts, option), nodes))
        assert {name for name in names if " of " not in name} == common
        own = {"0", "1"} if form == "both" else {"0", "1"} - common
        assert names - common == {f"{place} of {node}" for place in own for node in nodes}
    assert set(whole_groups(facts)) == {"repeated.16x16"}
