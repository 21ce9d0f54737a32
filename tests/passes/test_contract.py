"""What every pass in PASSES has to keep, on the same graphs."""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import numpy as np
import onnx
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.moments import identity_moments
from onnxcomp.model import Model
from onnxcomp.passes import FINISH, NODE_PASSES, PASSES, PREPARE
from onnxcomp.passes.base import Option, Pass, Refusal, run_exact
from onnxcomp.passes.compress_collaboratively import CompressCollaboratively
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly, arrays_of
from onnxcomp.passes.prune_weights import PruneWeights
from onnxcomp.passes.share_weights import ShareWeights
from tests.analysis.channel_graphs import Graph
from tests.graphs import SHARED, sane_feeds
from tests.passes.exact_checks import TOLERANCE, drift
from tests.passes.joint_cases import members_of, solved
from tests.test_model import with_branch
from tests.unusual import calling, quantised


def residual() -> Model:
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 3, 16), 16))
    for _ in range(2):
        h = g.op("Relu", g.bn(g.conv(t, 16, 12), 12))
        t = g.op("Relu", g.op("Add", g.bn(g.conv(h, 12, 16), 16), t))
    t = g.op("Identity", t)
    return g.model(g.op("Gemm", g.mean(t), g.w(16, 5), g.w(5)))


def depthwise() -> Model:
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 3, 16), 16))
    t = g.op("Clip", g.bn(g.conv(t, 16, 16, group=16), 16), g.constant(np.float32(0)))
    return g.model(g.conv(g.op("Dropout", t), 16, 8, kernel=1))


def shared() -> Model:
    """One weight and one bias in two places, and equal slopes that can be merged."""
    g = Graph(16, 8, 8)
    weight, bias = g.w(16, 16, 3, 3), g.constant(np.zeros(16, np.float32))
    t = "x"
    for _ in range(2):
        t = g.op("Conv", t, weight, bias, pads=[1] * 4)
        t = g.op("PRelu", t, g.constant(np.full((16, 1, 1), 0.25, np.float32)))
    return g.model(g.conv(t, 16, 4))


def dense() -> Model:
    g = Graph(3, 4, 4)
    t = g.op("Flatten", g.op("Relu", g.conv("x", 3, 8)))
    t = g.op("Relu", g.op("Add", g.op("MatMul", t, g.w(128, 24)), g.w(24)))
    t = g.op("Relu", g.op("MatMul", t, g.w(24, 20)))
    return g.model(g.op("Gemm", t, g.w(6, 20), transB=1))


def transposed() -> Model:
    g = Graph(8, 5, 5)
    t = g.op("ConvTranspose", "x", g.w(8, 12, 3, 3), g.w(12), strides=[2, 2])
    t = g.op("Relu", g.bn(t, 12))
    return g.model(g.op("Concat", g.conv(t, 12, 6), t, axis=1))


GRAPHS = {
    "residual": residual,
    "depthwise": depthwise,
    "shared": shared,
    "dense": dense,
    "transposed": transposed,
    "branch": with_branch,
    "calling": calling,
    "quantised": quantised,
}
REAL = ["mlperftiny_cifar10_resnet8", "mlperftiny_kws_dscnn", "libonnx_mnist_8"]


@pytest.fixture(params=[*GRAPHS, *REAL], scope="module")
def facts(request) -> Analysis:
    if request.param in GRAPHS:
        model = GRAPHS[request.param]()
    else:
        path = SHARED / "models" / f"{request.param}.onnx"
        if not path.exists():
            pytest.skip("../shared is absent")
        model = Model.from_proto(onnx.load(path))
    return Analysis(model, sane_feeds(model, 2))


every_pass = pytest.mark.parametrize("kind", PASSES.values(), ids=list(PASSES))
exact_passes = pytest.mark.parametrize(
    "kind",
    [k for k in PASSES.values() if k.exact],
    ids=[n for n, k in PASSES.items() if k.exact],
)


@every_pass
def test_shape_of_a_pass(kind):
    pass_ = kind()
    assert isinstance(pass_, Pass)
    assert PASSES[kind.name] is kind
    assert is_dataclass(kind)
    assert kind() == pass_
    assert hash(kind()) == hash(pass_)
    for name in [f.name for f in fields(kind)] or ["anything"]:
        with pytest.raises((FrozenInstanceError, TypeError)):
            setattr(pass_, name, None)


def test_tables_hold_exact_passes_only():
    assert list(PASSES) == sorted(PASSES)
    for pass_ in (*PREPARE, *FINISH):
        assert pass_.exact
        assert pass_.name in PASSES
    assert "fold_batchnorm" not in [pass_.name for pass_ in PREPARE]
    assert not Factorize.exact


@every_pass
def test_proposing_is_pure_and_deterministic(kind, facts):
    before = facts.model.digest
    first = kind().propose(facts)
    copy = Model.from_proto(facts.model.to_proto())
    assert kind().propose(Analysis(copy, facts.samples)) == first
    del facts.model.__dict__["digest"]
    assert facts.model.digest == before


@every_pass
def test_options_and_refusals_are_named_and_disjoint(kind, facts):
    proposal = kind().propose(facts)
    assert all(isinstance(o, Option) and o.method == kind.name for o in proposal.options)
    assert len(set(proposal.options)) == len(proposal.options)
    for refusal in proposal.refusals:
        assert isinstance(refusal, Refusal)
        assert refusal.where
        assert len(refusal.reason) > 3
    assert {o.target for o in proposal.options}.isdisjoint(r.where for r in proposal.refusals)


@exact_passes
def test_exact_passes(kind, facts):
    model, pass_ = facts.model, kind()
    result, proposal = run_exact(pass_, facts)
    if not proposal.options:
        assert result is model
        return
    assert result.signature == model.signature
    feed = next(facts.samples.batches(model.signature.inputs, 1)).feed
    assert drift(model, result, feed) <= TOLERANCE
    again, proposal = run_exact(pass_, Analysis(result, facts.samples))
    assert again is result
    assert not proposal.options


@exact_passes
def test_every_exact_pass_finds_something(kind):
    """Otherwise the checks above prove nothing about it."""
    found = [kind().propose(Analysis(make())).options for make in GRAPHS.values()]
    if kind.name == "emit_codebook":
        model = dense()
        few = {n: np.sign(a) if a.ndim == 2 else a for n, a in model.weights.items()}
        found = [kind().propose(Analysis(Model(model.skeleton, few))).options]
    if kind.name == "fold_constants":
        g = Graph(4)
        c = g.op("Neg", g.w(4))
        found = [kind().propose(Analysis(g.model(g.op("Add", "x", c)))).options]
    if kind.name == "remove_dead":
        proto = residual().to_proto()
        proto.graph.node.append(onnx.helper.make_node("Relu", ["x"], ["unused"]))
        found = [kind().propose(Analysis(Model.from_proto(proto))).options]
    assert any(found)


def test_drift_sees_a_wrong_model():
    model = residual()
    feed = next(sane_feeds(model, 1).batches(model.signature.inputs, 1)).feed
    name = next(n for n, a in model.weights.items() if a.ndim == 4)
    wrong = Model(model.skeleton, {**model.weights, name: model.weights[name] * 1.001})
    assert drift(model, wrong, feed) > TOLERANCE


@every_pass
def test_applying_nothing_changes_nothing(kind, facts):
    draft = facts.model.edit()
    kind().apply(draft, facts, {})
    sealed = draft.seal(by="test")
    live = {node.id for node in sealed.nodes}
    kept = [n.proto.SerializeToString() for n in facts.model.nodes if n.id in live]
    assert [n.proto.SerializeToString() for n in sealed.nodes] == kept


@every_pass
def test_applying_leaves_the_source_alone(kind, facts):
    """Weights are read-only buffers that the new model shares."""
    before = facts.model.digest
    proposal = kind().propose(facts)
    by_target = {option.target: option for option in proposal.options}
    chosen = {}
    count = 1 if kind is FactorizeJointly else 3  # its groups overlap
    together = kind is CompressCollaboratively  # its layers follow one another
    whole = kind().solve(facts) if together and by_target else {}
    for option in list(by_target.values())[: None if together else count]:
        arrays = {}
        if option.method in NODE_PASSES:
            linear = facts.linears[option.target]
            kernel = linear.kernel(facts.model.weights[linear.weight])
            kernel.setflags(write=False)
            arrays, _ = NODE_PASSES[option.method].fit(option, kernel, None)
        elif option.method == "factorize_jointly":
            arrays = arrays_of(solved(facts, option), members_of(facts, option))
        elif option.method == "compress_collaboratively":
            arrays = whole[option]
        elif option.method == "prune_weights":
            linear = facts.linears[option.target]
            kernel = linear.kernel(facts.model.weights[linear.weight])
            moments = identity_moments(linear, kernel, np.zeros(linear.out_channels))
            arrays, _ = PruneWeights().fit(option, kernel, moments)
        elif option.method == "share_weights":
            linear = facts.linears[option.target]
            kernel = linear.kernel(facts.model.weights[linear.weight])
            arrays = ShareWeights().fit(option, {linear.id: kernel})
        elif option.method == "remove_channels":
            group = facts.channels.group(option.target)
            arrays = {"removed": np.arange(group.size - option.size[0])}
        for array in arrays.values():
            array.setflags(write=False)
        chosen[option] = arrays
    draft = facts.model.edit()
    kind().apply(draft, facts, chosen)
    sealed = draft.seal(by="test")
    assert sealed.signature == facts.model.signature
    del facts.model.__dict__["digest"]
    assert facts.model.digest == before
    if chosen:
        assert sealed.digest != before
    for array in sealed.weights.values():
        assert not array.flags.writeable
