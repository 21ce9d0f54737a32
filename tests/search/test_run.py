"""`compress` from end to end on small models."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcomp.analysis import Analysis
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from tests.analysis.channel_graphs import Graph
from tests.graphs import SHARED
from tests.passes.exact_checks import relative_l2
from tests.search.cases import CASES, residual
from tests.search.searching import inputs, wide
from tests.unusual import calling, quantised

QUICK = Settings(latency=False, grid="8")


@pytest.fixture(autouse=True)
def _few_are_measured(monkeypatch):
    """Two options of a node instead of four, which halves the time of these tests."""
    monkeypatch.setattr("onnxcomp.search.loss_meter._MEASURED", 2)


def run(model: Model, settings: Settings = QUICK, **limits: float) -> Result:
    return compress(model, inputs(model, 16), limits=Limits(**limits), settings=settings)


def cost(model: Model):
    return Analysis(model).cost


def with_batchnorm() -> Model:
    g = Graph(3, 8, 8)
    t = "x"
    for inputs_, outputs in ((3, 16), (16, 32), (32, 32)):
        t = g.op("Relu", g.bn(g.conv(t, inputs_, outputs), outputs))
    return g.model(g.op("Softmax", g.op("Gemm", g.mean(t), g.w(32, 5), g.w(5))))


@pytest.mark.parametrize("limits", [{"macs": 0.6}, {"params": 0.5}, {"size": 0.6}])
def test_limits_are_met(limits):
    model = with_batchnorm()
    result = run(model, **limits)
    assert result.met
    assert not result.plan.empty
    assert result.report.ladder.passed
    before, after = cost(model), cost(result.model)
    assert after.macs <= before.macs * limits.get("macs", 1)
    assert after.params <= before.params * limits.get("params", 1)
    assert result.model.file_bytes <= model.file_bytes * limits.get("size", 1)
    written = len(result.model.to_proto().SerializeToString())
    assert result.model.file_bytes == pytest.approx(written, rel=0.01)
    assert result.model.signature == model.signature


def test_the_vendors_model_is_not_changed():
    model = with_batchnorm()
    before = Model.from_proto(model.to_proto()).digest
    run(model, macs=0.6)
    assert Model.from_proto(model.to_proto()).digest == before


def test_latency_has_threads_of_its_own(monkeypatch):
    opened = set()
    begin = Session.__init__

    def watched(self, model, *, threads=1, spinning=False, **others):
        opened.add((threads, spinning))
        begin(self, model, threads=threads, spinning=spinning, **others)

    monkeypatch.setattr(Session, "__init__", watched)
    report = run(residual(), replace(QUICK, latency=True, search_threads=2), macs=0.6).report
    assert report.benchmark.machine.threads == 1
    assert (2, False) in opened
    assert {threads for threads, spinning in opened if spinning} == {1}


def test_same_seed_same_model():
    model = with_batchnorm()
    one, three = (replace(QUICK, search_threads=threads) for threads in (1, 3))
    first, second = run(model, one, macs=0.6), run(model, three, macs=0.6)
    assert first.model.digest == second.model.digest
    assert first.plan == second.plan
    other = run(model, replace(QUICK, seed=1), macs=0.6)
    assert other.model.digest != first.model.digest


def test_without_limits_only_the_exact_passes_run():
    model = with_batchnorm()
    result = run(model)
    assert result.met
    assert result.plan.empty
    feed = {"x": inputs(model)["x"][:3]}
    wanted, found = Session(model).run(feed), Session(result.model).run(feed)
    assert all(relative_l2(found[n], wanted[n]) <= 1e-5 for n in wanted)
    assert "BatchNormalization" not in {node.op for node in result.model.nodes}


@pytest.mark.parametrize("limits", [{"macs": 1e-5}, {"size": 1e-3}, {"params": 1e-4}])
def test_limits_out_of_reach_give_the_nearest(limits):
    model = with_batchnorm()
    result = run(model, **limits)
    assert not result.met
    assert not result.plan.empty
    assert cost(result.model).macs < 0.5 * cost(model).macs
    assert any("within reach" in note for note in result.report.notes)


@pytest.mark.parametrize("name", ["macs", "params", "size"])
def test_planning_again_finds_nothing_to_do(name):
    model = with_batchnorm()
    before = {"macs": cost(model).macs, "params": cost(model).params, "size": model.file_bytes}
    limits = {name: 0.6 * before[name]}
    first = run(model, **limits)
    assert not first.plan.empty
    again = run(Model.from_proto(first.model.to_proto()), **limits)
    assert again.plan.empty
    assert again.met


def test_a_result_that_is_larger_is_not_kept(monkeypatch):
    """Whatever the candidate is, a model larger than the input is not shipped."""
    model = residual()
    monkeypatch.setattr(
        type(model), "file_bytes", property(lambda self: 10**6 - (self is model)), raising=True
    )
    result = run(model, macs=0.6)
    assert result.plan.empty
    assert not result.met
    assert any("kept" in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("grid", "force", "limits", "kept"),
    [
        ("8", False, {"macs": 0.6}, False),
        ("8", False, {"macs": 0.6, "size": 0.9}, False),
        ("8", False, {"size": 0.6}, True),
        ("off", False, {"macs": 0.6}, True),
        ("8", True, {"macs": 0.6}, True),
    ],
)
def test_a_slower_result(monkeypatch, grid, force, limits, kept):
    """It is kept only where time was not asked for, and the report says so."""
    monkeypatch.setattr("onnxcomp.search.run._LATENCY_SECONDS", 0.05)
    monkeypatch.setattr("onnxcomp.search.run.is_slower", lambda *_: True)
    settings = Settings(grid=grid, force=force, methods=("remove_channels",))
    result = run(residual(), settings, **limits)
    assert result.met is kept
    assert result.plan.empty is not kept
    assert force or any("slower" in note for note in result.report.notes)


def test_what_came_before_a_slower_result_is_kept(monkeypatch):
    verdicts = [True, False]
    monkeypatch.setattr("onnxcomp.search.run._LATENCY_SECONDS", 0.05)
    monkeypatch.setattr("onnxcomp.search.run.is_slower", lambda *_: verdicts.pop(0))
    kept: list[Model] = []
    model = wide()
    settings = replace(QUICK, latency=True)
    result = compress(
        model, inputs(model, 48), limits=Limits(drift=0.1), settings=settings, keep=kept.append
    )
    assert len(kept) > 2  # the input, and two candidates at least
    assert not verdicts
    assert result.met
    assert result.model is kept[-2]
    assert any("slower" in note and "not kept" in note for note in result.report.notes)


def test_a_result_that_fails_validation_is_not_kept(monkeypatch):
    from onnxcomp.search import search

    def broken(model: Model) -> Model:
        proto = model.to_proto()
        proto.graph.output[0].name = "renamed"
        proto.graph.node.append(
            helper.make_node("Identity", [model.signature.outputs[0].name], ["renamed"])
        )
        return Model.from_proto(proto)

    finish = search.finish
    monkeypatch.setattr(search, "finish", lambda model: broken(finish(model)))
    model = residual()
    result = run(model, macs=0.6)
    assert result.plan.empty
    assert not result.met
    assert result.model.signature == model.signature
    assert any("failed validation" in note for note in result.report.notes)


def test_excluded_nodes_stay_byte_identical():
    model = residual()
    kept = [node.id for node in model.nodes if node.op == "Conv"][-2:]
    settings = replace(QUICK, exclude="|".join(f"^{name}$" for name in kept))
    result = run(model, settings, macs=0.8)
    assert not result.plan.empty
    for name in kept:
        old, new = model.producers[name], result.model.producers[name]
        assert new.attrs == old.attrs
        for index in (1, 2):
            before = model.weights[old.input(index)]
            assert np.array_equal(result.model.weights[new.input(index)], before)
    free = run(model, macs=0.8)
    changed = [
        not np.array_equal(
            free.model.weights.get(free.model.producers[n].input(1)),
            model.weights[model.producers[n].input(1)],
        )
        for n in kept
    ]
    assert any(changed)


def test_excluding_a_depthwise_node_keeps_its_channels():
    model = CASES["depthwise"]()
    node = next(n for n in model.nodes if n.attrs.get("group", 1) > 1)
    result = run(model, replace(QUICK, exclude=f"^{node.id}$"), params=0.8)
    new = result.model.producers[node.id]
    assert np.array_equal(result.model.weights[new.input(1)], model.weights[node.input(1)])
    assert not result.plan.empty


@pytest.mark.parametrize("bias", ["shared", "own", "none"])
@pytest.mark.parametrize("weight", ["shared", "own"])
def test_the_matrix_of_shared_tensors(weight, bias):
    """Stem, four 3x3 convolutions, pool, Gemm: weights and biases shared, own or absent."""
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.conv("x", 3, 32))
    weights, biases = [], []
    for _ in range(4):
        if weight == "own" or not weights:
            weights.append(g.w(32, 32, 3, 3))
        if bias == "own" or not biases:
            value = g.rng.normal(size=32) * 0.1
            biases.append(g.constant(np.asarray(value, np.float32)))
        names = [t, weights[-1], *([] if bias == "none" else [biases[-1]])]
        t = g.op("Relu", g.op("Conv", *names, pads=[1] * 4))
    model = g.model(g.op("Gemm", g.mean(t), g.w(32, 10), g.w(10)))
    check_chain(model, shared=weight == "shared")


def test_equal_biases_that_are_merged():
    """The trigger that users meet: all-zero biases become one before channels go."""
    g = Graph(3, 8, 8)
    t, width = "x", 3
    for _ in range(4):
        t = g.op(
            "Conv", t, g.w(32, width, 3, 3), g.constant(np.zeros(32, np.float32)), pads=[1] * 4
        )
        t, width = g.op("Relu", t), 32
    check_chain(g.model(g.op("Gemm", g.mean(t), g.w(32, 10), g.w(10))), shared=False)


def check_chain(model: Model, *, shared: bool) -> None:
    result = run(model, QUICK, macs=0.6)
    assert result.report.ladder.passed
    assert result.met, result.report.notes
    assert not result.plan.empty
    readers = max(len(result.model.readers[n]) for n, a in result.model.weights.items()
                  if a.ndim == 4)  # fmt: skip
    assert readers == (4 if shared else 1)
    drift = result.report.ladder.evaluation
    assert drift is not None
    feed = {"x": inputs(model)["x"]}
    (wanted,), (found,) = (Session(m).run(feed).values() for m in (model, result.model))
    assert relative_l2(found, wanted) < 0.7


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_graph(name):
    result = run(CASES[name](), params=0.7)
    assert result.report.ladder.passed
    if not result.met:
        assert result.report.notes


def test_fixed_batch_and_whole_inputs():
    proto = residual().to_proto()
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_value = 4
    for info in (*proto.graph.value_info, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    result = run(Model.from_proto(proto), macs=0.6)
    assert result.met
    assert not result.plan.empty
    g = Graph(8, 6)  # a recurrent state, whose first axis is no batch
    t = g.op("Add", g.op("MatMul", g.op("Add", "x", "state"), g.w(6, 24)), g.w(24))
    t = g.op("Relu", t)
    y = g.op("MatMul", t, g.w(24, 6))
    proto = g.model(y, g.op("Tanh", y)).to_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    proto.graph.input.append(helper.make_tensor_value_info("state", 1, [2, 8, 6]))
    for info in (*proto.graph.value_info, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    model = Model.from_proto(proto)
    rng = np.random.default_rng(0)
    data = Samples(
        {
            "x": rng.standard_normal((12, 1, 8, 6)).astype(np.float32),
            "state": rng.standard_normal((12, 2, 8, 6)).astype(np.float32),
        }
    )
    result = compress(model, data, limits=Limits(macs=0.8), settings=QUICK)
    assert result.report.ladder.passed
    assert result.met


def test_half_precision():
    g = Graph(8, 8, 8)
    t = g.op("Cast", "x", to=onnx.TensorProto.FLOAT16)
    for inputs_, outputs in ((8, 32), (32, 32)):
        weight = g.constant(
            (g.rng.normal(size=(outputs, inputs_, 3, 3)) / 17).astype(np.float16)
        )
        t = g.op("Relu", g.op("Conv", t, weight, pads=[1] * 4))
    model = g.model(g.op("Cast", t, to=onnx.TensorProto.FLOAT))
    result = run(model, macs=0.6)
    assert result.met
    kinds = {a.dtype for a in result.model.weights.values() if a.ndim == 4}
    assert kinds == {np.dtype(np.float16)}


def test_outputs_whose_shape_depends_on_the_data():
    """Such models are measured in front of what selects, and never crash."""
    g = Graph(8, 8, 8)
    t = g.op("Relu", g.conv(g.op("Relu", g.conv("x", 8, 32)), 32, 32))
    y = g.conv(t, 32, 8)
    far = g.op("Greater", y, g.constant(np.float32(1e9)))  # selects nothing, in both models
    model = g.model(y, g.op("Compress", y, g.op("Reshape", far, g.ints(-1))))
    assert run(model, macs=0.7).report.ladder.passed


def test_one_sample_and_random_samples():
    model = residual()
    one = compress(model, inputs(model, 1), limits=Limits(macs=0.8), settings=QUICK)
    assert any("one sample only" in note for note in one.report.notes)
    none = compress(model, limits=Limits(macs=0.8), settings=QUICK)
    assert none.report.notes[0].startswith("no samples given")


def test_little_memory_fits_on_fewer_samples():
    result = run(residual(), replace(QUICK, memory=1e5), macs=0.8)
    assert any("to stay within" in note for note in result.report.notes)
    assert result.report.ladder.passed


def test_custom_operators_are_refused():
    model = residual()
    foreign = Model(model.skeleton, model.weights, foreign_ops=("acme::Magic",))
    with pytest.raises(UnsupportedModelError, match="acme::Magic"):
        run(foreign, macs=0.5)


def test_functions_are_compressed():
    model = calling()
    result = run(model, macs=0.6)
    assert result.met
    assert result.report.original.macs == cost(model).macs
    assert 0 < cost(result.model).macs <= 0.6 * cost(model).macs
    assert not result.model.skeleton.functions


def test_quantised_models_are_left_alone():
    model = quantised()
    result = run(model, replace(QUICK, force=True), macs=0.6)
    assert not result.met
    assert result.plan.empty
    refused = {r.where: r.reason for r in result.report.refusals if "quantised" in r.reason}
    assert {n: refused[n] for n in ("a", "b", "y")} == dict.fromkeys("aby", "it is quantised")
    assert result.report.result.params == result.report.original.params
    assert result.model.file_bytes <= model.file_bytes


def test_no_pass_complains_of_a_node_that_another_has_changed():
    result = run(CASES["fully_connected"](), replace(QUICK, grid="2"), macs=0.5)
    changed = {*result.plan.forms, *result.plan.widths}
    assert any("is no convolution" in r.reason for r in result.search.space.refusals)
    assert changed & {refusal.where for refusal in result.search.space.refusals}
    assert not changed & {refusal.where for refusal in result.report.refusals}


def test_a_real_model():
    path = SHARED / "models" / "mlperftiny_cifar10_resnet8.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    model = Model.from_proto(onnx.load(path))
    rng = np.random.default_rng(0)
    data = rng.uniform(0, 255, (16, 32, 32, 3)).astype(np.float32)
    settings = replace(QUICK, grid="16", methods=("remove_channels",))
    result = compress(model, data, limits=Limits(macs=0.9), settings=settings)
    assert result.met
    assert cost(result.model).macs <= 0.9 * cost(model).macs
    assert 0 < result.report.changed_macs <= 1


def test_the_front_falls():
    result = run(residual(), QUICK, macs=0.8)
    shares = [point.macs for point in result.report.front]
    assert shares == sorted(shares, reverse=True)
    predicted = [point.loss for point in result.report.front if point.error is None]
    assert len(predicted) > 3
    assert predicted == sorted(predicted)
    (solved,) = [point for point in result.report.front if point.error is not None]
    assert solved.macs == result.plan.cost.macs / cost(residual()).macs
    assert 0 < solved.error < 3 * solved.loss
    assert "front" in result.report.seconds
    assert run(residual(), QUICK).report.front == ()  # nothing was measured


def test_dry_runs_change_nothing():
    model = residual()
    result = compress(
        model, inputs(model), limits=Limits(macs=0.7), settings=QUICK, dry_run=True
    )
    assert not result.plan.empty
    assert cost(result.model).macs == cost(model).macs
    assert result.report.result.macs == result.plan.cost.macs <= 0.7 * cost(model).macs
