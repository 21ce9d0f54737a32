"""A stream gives the tensors of a whole run, holds only live ones, and takes new weights."""

import numpy as np
import onnx
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.stream import Stream
from onnxcomp.errors import ParameterError
from onnxcomp.model import Model
from onnxcomp.runtime import Session, with_outputs
from tests.analysis.channel_graphs import Graph
from tests.graphs import SHARED, sane_feeds
from tests.passes.exact_checks import relative_l2

TOLERANCE = 1e-5  # relative L2; segments are optimised differently from the whole


def residual() -> Model:
    g = Graph(3, 8, 8)
    stem = g.op("Relu", g.conv("x", 3, 8))
    early = g.op("Softmax", g.op("Gemm", g.mean(stem), g.w(8, 4)))
    inner = g.op("Relu", g.conv(stem, 8, 8))
    body = g.op("Add", g.conv(inner, 8, 8), stem)
    return g.model(early, g.conv(body, 8, 3))


def stream_of(model: Model, count: int = 6, size: int = 2, **options) -> Stream:
    samples = sane_feeds(model, count)
    facts = Analysis(model, samples)
    batches = [b.feed for b in samples.batches(model.signature.inputs, size)]
    return Stream(model, batches, facts.tensors, **options)


def whole_run(model: Model, names: list[str], count: int = 6) -> dict[str, np.ndarray]:
    session = Session(with_outputs(model, names), optimize=False)
    batches = sane_feeds(model, count).batches(model.signature.inputs, 2)
    runs = [session.run(b.feed) for b in batches]
    return {name: np.concatenate([run[name] for run in runs]) for name in names}


def test_advancing_gives_every_input_of_a_linear_node():
    model = residual()
    stream = stream_of(model)
    names = [node.input(0) for node in model.nodes if node.op in ("Conv", "Gemm")]
    wanted = whole_run(model, [n for n in names if n != "x"])
    for name in names:
        stream.advance([name])
        found = np.concatenate(stream.batches(name))
        if name != "x":
            assert relative_l2(found, wanted[name]) <= TOLERANCE
            assert relative_l2(found * 1.0001, wanted[name]) > TOLERANCE


@pytest.mark.parametrize(
    "name", ["shiqiyu_yunet_n_dynamic", "apne_gtcrn_simple", "silero_vad_16k_op15"]
)
def test_real_models(name):
    path = SHARED / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    model = Model.from_proto(onnx.load(path))
    samples = sane_feeds(model, 2)
    facts = Analysis(model, samples)
    batches = [b.feed for b in samples.batches(model.signature.inputs, 1)]
    stream = Stream(model, batches, facts.tensors)
    linears = list(facts.linears.values())[:: max(len(facts.linears) // 6, 1)]
    inner = [li.x for li in linears if li.x not in batches[0]]
    session = Session(with_outputs(model, inner), optimize=False) if inner else None
    wanted = [session.run(feed) for feed in batches] if session else []
    for linear in linears:
        stream.advance([linear.x])
        for index, run in enumerate(wanted):
            if linear.x in run:
                found = stream.batches(linear.x)[index]
                assert relative_l2(found, run[linear.x]) <= 10 * TOLERANCE


def test_only_live_tensors_are_held():
    model = residual()
    stream = stream_of(model)
    last = [node for node in model.nodes if node.op == "Conv"][-1]
    stream.advance([last.input(0)])
    early = next(v.name for v in model.signature.outputs)
    assert set(stream.held()[0]) == {last.input(0), early}


def test_tensors_can_be_kept():
    """Raw outputs in front of an early Softmax are needed to the end."""
    model = residual()
    softmax = next(node for node in model.nodes if node.op == "Softmax")
    last = [node for node in model.nodes if node.op == "Conv"][-1]
    stream = stream_of(model, keep=[softmax.input(0)])
    stream.advance([last.input(0)])
    assert softmax.input(0) in stream.held()[0]


def test_dropped_and_unknown_tensors_are_refused():
    model = residual()
    convs = [node for node in model.nodes if node.op == "Conv"]
    stream = stream_of(model)
    stream.advance([convs[-1].input(0)])
    with pytest.raises(ParameterError, match="behind the front"):
        stream.advance([convs[1].id])
    with pytest.raises(ParameterError, match="no tensor"):
        stream.advance(["nowhere"])


def test_weights_change_for_nodes_that_come():
    model = residual()
    convs = [node for node in model.nodes if node.op == "Conv"]
    stream = stream_of(model)
    stream.advance([convs[1].input(0)])
    weight = convs[2].input(1)
    stream.set_weight(weight, model.weights[weight] * 2)
    found = np.concatenate(stream.peek(convs[3].input(0)))
    draft = model.edit()
    draft.set_weight(weight, model.weights[weight] * 2)
    wanted = whole_run(draft.seal(by="test"), [convs[3].input(0)])[convs[3].input(0)]
    assert relative_l2(found, wanted) <= TOLERANCE
    unchanged = whole_run(model, [convs[3].input(0)])[convs[3].input(0)]
    assert relative_l2(found, unchanged) > 0.01
    with pytest.raises(ParameterError, match="of shape"):
        stream.set_weight(weight, model.weights[weight][:1])


def test_peeking_does_not_move():
    model = residual()
    stream = stream_of(model)
    before = set(stream.held()[0])
    outputs = [v.name for v in model.signature.outputs]
    wanted = whole_run(model, outputs)
    for name in outputs:
        assert relative_l2(np.concatenate(stream.peek(name)), wanted[name]) <= TOLERANCE
    assert set(stream.held()[0]) == before


def test_tail_with_free_weights():
    model = residual()
    stream = stream_of(model)
    conv = [node for node in model.nodes if node.op == "Conv"][1]
    stream.advance([conv.input(0)])
    output = model.signature.outputs[1].name
    session = stream.tail([conv.input(1)], [output])
    assert conv.input(1) in session.input_names
    tried = model.weights[conv.input(1)] * np.float32(0.5)
    runs = [
        session.run({n: (held | {conv.input(1): tried})[n] for n in session.input_names})[
            output
        ]
        for held in stream.held()
    ]
    draft = model.edit()
    draft.set_weight(conv.input(1), tried)
    wanted = whole_run(draft.seal(by="test"), [output])[output]
    assert relative_l2(np.concatenate(runs), wanted) <= TOLERANCE


def test_depends():
    model = residual()
    convs = [node for node in model.nodes if node.op == "Conv"]
    stream = stream_of(model)
    stream.advance([convs[1].input(0)])
    assert stream.depends(convs[1].input(0)) == set()
    assert convs[1].id in stream.depends(convs[2].id)
    assert convs[0].id not in stream.depends(convs[2].id)


def test_a_stream_runs_every_node_once(monkeypatch):
    ran: list[str] = []
    original = Session.__init__

    def spy(self, model, **options):
        ran.extend(node.id for node in model.nodes)
        original(self, model, **options)

    model = residual()
    stream = stream_of(model)
    monkeypatch.setattr(Session, "__init__", spy)
    for node in model.nodes:
        if node.op == "Conv":
            stream.advance([node.input(0)])
    assert len(ran) == len(set(ran))
