"""Sessions, captured facts and pieces of models agree with plain onnxruntime."""

import gc
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcomp.errors import ExecutionError
from onnxcomp.model import Model, extract
from onnxcomp.runtime import (
    Session,
    capture_tensors,
    inner_value,
    session_options,
    with_outputs,
)
from tests.graphs import sane_feeds, shared_models
from tests.passes.exact_checks import graph, normal, relative_l2

STATM = Path("/proc/self/statm")
TOLERANCE = 1e-5  # relative L2; the pieces are optimised differently from the whole


def one_feed(model: Model) -> dict[str, np.ndarray]:
    return dict(next(sane_feeds(model).batches(model.signature.inputs, 1)).feed)


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_equals_plain_onnxruntime(path):
    model = Model.from_proto(onnx.load(path))
    feed = one_feed(model)
    options = session_options(optimize=False, threads=1)
    plain = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = plain.run(None, feed)
    found = Session(model, optimize=False).run(feed)
    assert list(found) == [v.name for v in plain.get_outputs()]
    for mine, theirs in zip(found.values(), wanted, strict=True):
        assert np.array_equal(mine, theirs, equal_nan=True)


def test_lent_weights_are_used():
    model = graph("float[N,64] x", "float[N,64] y", "y = MatMul (x, w)", {"w": normal(64, 64)})
    other = Model(model.skeleton, {"w": 2 * model.weights["w"]})
    x = normal(3, 64, seed=1)
    assert np.allclose(
        Session(other).run({"x": x})["y"], 2 * Session(model).run({"x": x})["y"]
    )


def test_weights_that_nothing_reads_do_no_harm():
    model = graph("float[N,64] x", "float[N,64] y", "y = MatMul (x, w)", {"w": normal(64, 64)})
    proto = model.to_proto()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(64, 64), "unread"))
    x = normal(3, 64, seed=1)
    found = Session(Model.from_proto(proto)).run({"x": x})
    assert np.array_equal(found["y"], Session(model).run({"x": x})["y"])


def test_lent_weights_outlive_their_arrays():
    """A session holds what it was lent, also copies that nothing else refers to."""
    source = graph(
        "float[2,300] x",
        "float[300,300] y",
        "s = ReduceSum (x)  y = Mul (s, w)",
        {"w": normal(300, 300)},
    )
    x, w = np.ones((2, 300), np.float32), np.array(source.weights["w"])
    session = Session(Model(source.skeleton, {"w": np.asfortranarray(w)}), optimize=False)
    gc.collect()
    noise = [np.full((300, 300), 7.0, np.float32) for _ in range(50)]
    assert np.array_equal(session.run({"x": x})["y"], 600 * w)
    assert len(noise) == 50


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_captured_shapes_and_pieces(path):
    model = Model.from_proto(onnx.load(path))
    feed = one_feed(model)
    facts = capture_tensors(model, feed)
    made = [n for node in model.nodes for n in node.outputs if n]
    probed = [n for n in made[:: max(len(made) // 25, 1)] if n in facts]
    values = Session(with_outputs(model, probed), optimize=False).run(feed)
    for name in probed:
        assert facts[name].shape == values[name].shape
        assert facts[name].dtype == values[name].dtype
        if facts[name].value is not None:
            assert np.array_equal(facts[name].value, values[name])
    assert facts.keys() >= {*feed, *model.weights}
    middle = model.nodes[len(model.nodes) // 2].id
    if middle not in facts or facts[middle].dtype.kind != "f":
        middle = next(n for n in reversed(probed) if facts[n].dtype.kind == "f")
    outputs = [v.name for v in model.signature.outputs]
    front, back = extract(model, (), [middle]), None
    back = extract(model, [inner_value(middle, facts[middle])], outputs)
    session = Session(front, optimize=False)
    cut = session.run({n: feed[n] for n in session.input_names})
    session = Session(back, optimize=False)
    pieces = session.run({n: (feed | cut)[n] for n in session.input_names})
    whole = Session(model, optimize=False).run(feed)
    for name, wanted in whole.items():
        assert relative_l2(pieces[name], wanted) <= TOLERANCE
    if facts[middle].shape and middle in session.input_names:
        wrong = session.run(
            {n: (feed | {middle: 3 - 2 * cut[middle]})[n] for n in session.input_names}
        )
        assert any(not np.array_equal(wrong[n], whole[n]) for n in whole)


def test_integers_keep_their_values():
    body = "s = Shape (x)  y = Reshape (x, s)"
    model = graph("float[N,3] x", "float[N,3] y", body)
    facts = capture_tensors(model, {"x": normal(2, 3)})
    assert facts["s"].value.tolist() == [2, 3]
    assert facts["y"].value is None


def test_sequences_are_left_out():
    body = "s = SplitToSequence (x)  y = ConcatFromSequence <axis = 0> (s)"
    model = graph("float[4,3] x", "float[4,3] y", body)
    facts = capture_tensors(model, {"x": normal(4, 3)})
    assert "s" not in facts
    assert facts["y"].shape == (4, 3)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
def test_other_float_weights_are_lent(dtype):
    weight = normal(40, 40).astype(dtype)
    kind = onnx.TensorProto.FLOAT
    body = f"f = Cast <to = {kind}> (w)  y = MatMul (x, f)"
    model = graph("float[2,40] x", "float[2,40] y", body, {"w": weight})
    x = normal(2, 40)
    found = Session(model, optimize=False).run({"x": x})["y"]
    assert relative_l2(found, x @ weight.astype(np.float32)) <= 1e-5


@pytest.mark.parametrize("at_once", [1, 3])
def test_every_feed_is_run_in_order(at_once):
    model = graph("float[N,64] x", "float[N,64] y", "y = MatMul (x, w)", {"w": normal(64, 64)})
    feeds = [{"x": normal(2, 64, seed=seed), "other": normal(1)} for seed in range(8)]
    session = Session(model, at_once=at_once)
    taken: list[int] = []
    runs = session.run_each(taken.append(index) or feed for index, feed in enumerate(feeds))
    first = next(runs)
    assert len(taken) <= at_once + 1  # no more are held than are worked on, and one
    for out, feed in zip([first, *runs], feeds, strict=True):
        assert np.array_equal(out["y"], session.run({"x": feed["x"]})["y"])
    broken = [feeds[0], {"x": normal(2, 65)}, *feeds]
    with pytest.raises(ExecutionError, match="cannot run the model"):
        list(session.run_each(broken))


def resident() -> float:
    """Megabytes of this process."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc/self/statm")
def test_held_outputs_keep_no_more_than_themselves_without_an_arena():
    """Three of 1 MB, behind two tensors of 67 MB each."""
    body = "h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)"
    weights = {"a": normal(1, 4096), "b": normal(4096, 64)}
    model, x = graph("float[N,1] x", "float[N,64] y", body, weights), normal(4096, 1)
    grown, found = {}, {}
    for arena in (True, False):
        before = resident()
        found[arena] = [Session(model, arena=arena).run({"x": x})["y"] for _ in range(3)]
        grown[arena] = resident() - before
    assert grown[False] < 30
    assert grown[True] > 100  # else there is nothing to go without
    assert all(map(np.array_equal, found[True], found[False]))


def test_errors_are_ours():
    model = graph("float[N,3] x", "float[N,4] y", "y = MatMul (x, w)", {"w": normal(3, 4)})
    with pytest.raises(ExecutionError, match="cannot run the model"):
        Session(model).run({"x": normal(2, 5)})
    with pytest.raises(ExecutionError, match="cannot load the model"):
        Session(Model(model.skeleton, {"w": normal(2, 3, 4, 5)[0, 0]}), optimize=False).run(
            {"x": normal(2, 3)}
        )
    broken = onnx.ModelProto()
    broken.CopyFrom(model.skeleton)
    broken.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(ExecutionError, match="NoSuchOp"):
        Session(Model(broken, model.weights))
