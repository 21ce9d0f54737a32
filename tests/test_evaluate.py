"""Drift against its formulas, predictions, metrics, and a wrong model for each rung."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

from onnxcomp import report
from onnxcomp.drift import DriftMeter, drift
from onnxcomp.errors import (
    DataError,
    ExecutionError,
    ParameterError,
    UnsupportedModelError,
    ValidationError,
)
from onnxcomp.evaluate import evaluate, join_outputs, paired_outputs, predict
from onnxcomp.metrics import Metric, load_metric
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from onnxcomp.validation import validate
from tests.graphs import sane_feeds, shared_models

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
CLASSIFIER = """net (float[N, 3, H, W] x) => (float[N, 4] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = MatMul (f, v)
}"""
RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
V = RNG.standard_normal((4, 4)).astype(np.float32)
IMAGES = RNG.standard_normal((7, 3, 8, 8)).astype(np.float32)


def network(text: str = CLASSIFIER, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return Model.from_proto(proto)


def classifier(text: str = CLASSIFIER, w: np.ndarray = W, v: np.ndarray = V) -> Model:
    return network(text, w=w, v=v)


def samples(labels: np.ndarray | None = None) -> Samples:
    return Samples({"x": IMAGES}, labels)


# Drift


# Sessions flush denormals on the calling thread, where hypothesis then refuses to make them.
FLOATS = st.floats(-100, 100, width=32, allow_subnormal=False)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_drift_follows_its_formulas_over_any_batches(data: st.DataObject) -> None:
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=4, max_side=5))
    a = data.draw(arrays.arrays(np.float32, shape, elements=FLOATS))
    b = data.draw(arrays.arrays(np.float32, shape, elements=FLOATS))
    meter = DriftMeter()
    cut = data.draw(st.integers(0, shape[0]))
    for part in (slice(None, cut), slice(cut, None)):
        meter.update({"y": a[part]}, {"y": b[part]})
    found, x, y = meter.result()["y"], a.astype(np.float64), b.astype(np.float64)
    signal, noise = np.sum(x**2), np.sum((x - y) ** 2)
    assert found.max_abs == np.abs(x - y).max()
    if signal and noise:
        # float64 sums in another order
        assert found.relative_l2 == pytest.approx(math.sqrt(noise / signal), rel=1e-9)
        assert found.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-6)
    if len(shape) == 2 and shape[1] >= 2:
        assert found.top1_agreement == np.mean(a.argmax(1) == b.argmax(1))
    else:
        assert found.top1_agreement is None


def test_drift_of_equal_and_of_zero_outputs() -> None:
    zero, one = np.zeros((2, 3, 1), np.float32), np.ones((2, 3, 1), np.float32)
    same = drift({"y": one}, {"y": one})["y"]
    assert (same.relative_l2, same.sqnr_db, same.max_abs) == (0.0, math.inf, 0.0)
    assert drift({"y": zero}, {"y": zero})["y"].relative_l2 == 0.0
    lost = drift({"y": zero}, {"y": one})["y"]
    assert (lost.relative_l2, lost.sqnr_db) == (math.inf, -math.inf)
    plain = report.plain(lost)
    assert (plain["relative_l2"], plain["sqnr_db"]) == (None, None)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_drift_of_integers_is_the_share_that_differs(dtype: type) -> None:
    a = np.array([[0, 1, 1, 0]], dtype)
    b = np.array([[0, 1, 0, 1]], dtype)
    found = drift({"y": a}, {"y": b})["y"]
    assert (found.relative_l2, found.sqnr_db, found.top1_agreement) == (0.5, None, None)
    assert found.max_abs == 1.0


def test_drift_refuses_nan_where_the_reference_is_finite() -> None:
    a = np.array([[1.0, np.inf, 3.0]], np.float32)
    nan = np.array([[1.0, 2.0, np.nan]], np.float32)
    with pytest.raises(ValidationError, match="'y': 1 of 3 values are NaN or infinite"):
        drift({"y": a}, {"y": nan})
    fine = drift({"y": a}, {"y": np.array([[2.0, np.nan, 3.0]], np.float32)})["y"]
    assert fine.relative_l2 == pytest.approx(1 / math.sqrt(10), rel=1e-12)


def test_drift_refuses_other_names_and_shapes() -> None:
    one = np.ones((2, 3), np.float32)
    with pytest.raises(ValidationError, match="must be"):
        drift({"y": one}, {"z": one})
    with pytest.raises(ValidationError, match=r"'y' has shape \(3, 2\)"):
        drift({"y": one}, {"y": one.T})


# Predictions


def one_by_one(model: Model, chosen: Samples) -> list[dict[str, np.ndarray]]:
    session = Session(model)
    return [
        session.run(part.feed)
        for index in range(chosen.count)
        for part in chosen.take([index]).batches(model.signature.inputs, 1)
    ]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_prediction_of_an_open_batch() -> None:
    found = predict(classifier(), samples(), batch=3)["y"]
    runs = np.concatenate([run["y"] for run in one_by_one(classifier(), samples())])
    assert found.shape == (7, 4)
    assert relative(runs, found) <= 1e-5
    assert relative(runs, found[::-1]) > 1e-2


def test_prediction_of_a_fixed_batch_drops_the_filling() -> None:
    fixed = classifier(
        CLASSIFIER.replace("[N, 3, H, W]", "[3, 3, 8, 8]").replace("[N,", "[3,")
    )
    found = predict(fixed, samples())["y"]
    assert found.shape == (7, 4)
    assert relative(predict(classifier(), samples())["y"], found) <= 1e-5


BATCH_ONE = CLASSIFIER.replace("f = Flatten (p)", "f = Reshape (p, s)")
MIXING = """net (float[N, 3, 8, 8] x) => (float[N, 1] y) {
    a = ReduceSum <keepdims = 1> (x)
    m = ReduceMean <axes = [1, 2, 3], keepdims = 0> (x)
    s = Mul (m, a)
    y = Reshape (s, shape)
}"""


def test_prediction_where_only_single_samples_run_or_are_right() -> None:
    single = network(BATCH_ONE, w=W, v=V, s=np.array([1, 4]))
    with pytest.raises(ExecutionError):
        Session(single).run({"x": IMAGES[:2]})
    expected = predict(classifier(), samples())["y"]
    assert relative(expected, predict(single, samples())["y"]) <= 1e-5
    mixing = network(MIXING, shape=np.array([-1, 1]))
    runs = np.concatenate([run["y"] for run in one_by_one(mixing, samples())])
    assert relative(runs, predict(mixing, samples())["y"]) <= 1e-5
    assert relative(runs, Session(mixing).run({"x": IMAGES})["y"]) > 1e-1


def test_prediction_of_inputs_without_batch_axis() -> None:
    text = """net (float[2, 3] state, float scale) => (float[2, 3] next, float total) {
        next = Mul (state, scale)
        total = ReduceSum <keepdims = 0> (next)
    }"""
    state = RNG.standard_normal((5, 2, 3)).astype(np.float32)
    scale = np.arange(5, dtype=np.float32)
    found = predict(network(text), Samples({"state": state, "scale": scale}))
    assert {name: a.shape for name, a in found.items()} == {"next": (5, 2, 3), "total": (5,)}
    np.testing.assert_array_equal(found["next"], state * scale[:, None, None])


def test_prediction_refuses_shapes_that_depend_on_the_data() -> None:
    text = """net (float[1, 6] x) => (int64[2, K] y) {
        r = Relu (x)
        y = NonZero (r)
    }"""
    x = np.array([[1, -1, -1, -1, -1, -1], [1, 1, 1, -1, -1, -1]], np.float32)
    with pytest.raises(UnsupportedModelError, match="depends on the data"):
        predict(network(text), Samples({"x": x}))


@pytest.mark.parametrize("fixed", [False, True])
def test_pairs_are_the_outputs_of_both_models_on_the_same_samples(fixed: bool) -> None:
    """Batch by batch, without the filling of a batch of fixed size."""
    text = CLASSIFIER
    if fixed:
        text = text.replace("[N, 3, H, W]", "[3, 3, 8, 8]").replace("[N,", "[3,")
    models = [classifier(text), classifier(text, v=V[:, ::-1])]
    sessions = [Session(model) for model in models]
    runs = list(paired_outputs(sessions, models[0].signature.inputs, samples(), 3))
    assert [[len(outputs["y"]) for outputs in run] for run in runs] == [[3, 3], [3, 3], [1, 1]]
    joined = [join_outputs(column)["y"] for column in zip(*runs, strict=True)]
    for model, found in zip(models, joined, strict=True):
        assert relative(predict(model, samples())["y"], found) <= 1e-5
    assert relative(*joined) > 1e-2


@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_real_models_predict_as_single_runs_do(path: Path) -> None:
    model = Model.from_proto(onnx.load(path))
    chosen = sane_feeds(model, count=3)
    found, runs = predict(model, chosen, batch=2), one_by_one(model, chosen)
    assert set(found) == {value.name for value in model.signature.outputs}
    for name, array in found.items():
        assert len(array) == 3
        for index, run in enumerate(runs):
            # kernels may sum in another order at another batch size
            alone = run[name].reshape(array[index].shape)
            assert np.linalg.norm(array[index] - alone) <= 1e-4 * np.linalg.norm(alone) + 1e-6


# Metrics


SCORES = {"y": np.array([[3, 1, 2], [0, 5, 1], [1, 2, 9], [7, 0, 0]], np.float32)}


def score(metric: Metric, labels: object, outputs: dict = SCORES) -> float:
    found = None if labels is None else np.asarray(labels)
    return metric.score(outputs, Samples({"x": np.zeros((4, 1))}, found), SCORES)


def test_top1() -> None:
    top1 = load_metric("top1")
    assert score(top1, [0, 1, 2, 1]) == 0.75
    assert score(top1, [[0], [1], [2], [0]]) == 1.0
    assert score(top1, np.eye(3)[[0, 1, 1, 1]]) == 0.5
    boxes = {"boxes": np.ones((4, 5, 2), np.float32), **SCORES}
    assert score(top1, [0, 1, 2, 1], boxes) == 0.75
    pooled = {"y": SCORES["y"].reshape(4, 3, 1, 1)}
    assert score(top1, [0, 1, 2, 1], pooled) == 0.75
    with pytest.raises(DataError, match="needs labels"):
        score(top1, None)
    with pytest.raises(DataError, match="labels have shape"):
        score(top1, np.zeros((4, 2), np.int64))
    with pytest.raises(DataError, match="no output is class scores"):
        score(top1, [0, 0, 0, 0], {"y": np.ones((4, 1), np.float32)})


@pytest.mark.parametrize(
    ("labels", "wrong"), [([1, 2, 3, 1], "3"), ([0, -1, 2, 0], "-1"), ([0, 1.5, 2, 0], "1.5")]
)
def test_labels_are_classes(labels: list[float], wrong: str) -> None:
    """Those of all samples, not of the scored ones only."""
    with pytest.raises(DataError, match=rf"label {wrong} is no class: .* from 0 to 2"):
        score(load_metric("top1"), labels)
    with pytest.raises(DataError, match=f"label {wrong} is no class"):
        load_metric("top1").check_labels(SCORES, np.asarray([*range(3), *labels]))
    assert score(load_metric("top1"), [0.0, 1.0, 2.0, 0.0]) == 1.0
    for spec in ("agreement", "psnr"):
        load_metric(spec).check_labels(SCORES, np.asarray(labels))


def test_agreement_needs_no_labels() -> None:
    agreement = load_metric("agreement")
    assert score(agreement, None) == 1.0
    assert score(agreement, None, {"y": SCORES["y"][::-1]}) == 0.5


def test_metrics_of_classes_say_so() -> None:
    """Their points are shares of the samples; of others nobody knows what a point is."""
    kinds = {spec: load_metric(spec).classes for spec in ("top1", "agreement", "psnr")}
    assert kinds == {"top1": True, "agreement": True, "psnr": False}
    assert not Metric("mine", lambda *_: 0.0).classes


def test_psnr() -> None:
    target = RNG.random((4, 3, 5, 5)).astype(np.float32)
    noisy = {"y": target + np.float32(0.1)}
    # a constant error of 0.1 has a mean square of 0.01; float32 rounding of the inputs
    assert score(load_metric("psnr"), target, noisy) == pytest.approx(20, abs=1e-4)
    assert score(load_metric("psnr:10"), target, noisy) == pytest.approx(40, abs=1e-4)
    assert score(load_metric("psnr"), target, {"y": target}) == 100
    for labels in (None, target[:, :1]):
        with pytest.raises(DataError, match="needs target images"):
            score(load_metric("psnr"), labels, noisy)


def test_metric_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics_of_mine.py").write_text(
        "def mean(outputs, labels, inputs):\n    return outputs['y'].mean() + len(inputs)\n"
        "def nan(outputs, labels, inputs):\n    return float('nan')\n"
        "def broken(outputs, labels, inputs):\n    return labels.sum()\n"
    )
    (tmp_path / "metrics_that_fail.py").write_text("import a_module_that_is_absent\n")
    monkeypatch.chdir(tmp_path)
    mean = load_metric("metrics_of_mine:mean")
    assert mean.name == "metrics_of_mine:mean"
    assert score(mean, None) == pytest.approx(float(SCORES["y"].mean()) + 1)
    with pytest.raises(DataError, match="returned nan"):
        score(load_metric("metrics_of_mine:nan"), None)
    with pytest.raises(DataError, match="failed: AttributeError"):
        score(load_metric("metrics_of_mine:broken"), None)
    with pytest.raises(ParameterError, match="no function 'median'; it has mean, nan, broken"):
        load_metric("metrics_of_mine:median")
    with pytest.raises(ParameterError, match="a_module_that_is_absent"):
        load_metric("metrics_that_fail:mean")
    with pytest.raises(ParameterError, match="no_such_module"):
        load_metric("no_such_module:mean")


@pytest.mark.parametrize("spec", ["", "top5", "psnr:0", "psnr:wide", ":f", "module:"])
def test_unknown_metrics(spec: str) -> None:
    with pytest.raises(ParameterError, match="must be"):
        load_metric(spec)


# Evaluation


def test_evaluation() -> None:
    original, changed = classifier(), classifier(v=V[:, ::-1])
    before, after = predict(original, samples())["y"], predict(changed, samples())["y"]
    labels = before.argmax(axis=1)
    found = evaluate(original, changed, samples(labels), metric=load_metric("top1"), batch=2)
    assert found.drift["y"].relative_l2 == pytest.approx(relative(before, after), rel=1e-5)
    assert found.relative_l2 == found.drift["y"].relative_l2
    accuracy = float(np.mean(after.argmax(axis=1) == labels))
    assert (found.metric, found.metric_reference) == ("top1", 1.0)
    assert found.metric_candidate == pytest.approx(accuracy)
    assert found.drop == pytest.approx(1 - accuracy)
    assert found.drop > 0
    assert (found.samples, found.origin) == (7, "user")
    assert json.loads(json.dumps(report.plain(found), allow_nan=False))["samples"] == 7


def test_evaluation_of_a_model_with_itself() -> None:
    found = evaluate(classifier(), classifier(), samples(), metric=load_metric("agreement"))
    assert (found.relative_l2, found.drop) == (0.0, 0.0)
    assert report.plain(found)["drift"]["y"]["sqnr_db"] is None
    assert evaluate(classifier(), classifier(), samples()).metric is None


# The ladder


RUNGS = (
    "structure",
    "strict shapes",
    "signature",
    "load",
    "execution",
    "finite outputs",
    "drift",
    "size",
)


def test_a_sound_candidate_climbs_the_ladder() -> None:
    ladder = validate(
        classifier(), classifier(v=V * 1.01), samples(), metric=load_metric("agreement")
    )
    assert ladder.passed
    ladder.raise_if_failed()
    assert tuple(rung.name for rung in ladder.rungs) == RUNGS
    assert ladder.note == "judged on 7 samples"
    assert ladder.evaluation is not None
    assert ladder.evaluation.relative_l2 == pytest.approx(0.01, rel=1e-3)
    assert ladder.evaluation.drop == 0.0
    execution = ladder.rungs[4].detail
    for shape in ("[1, 3, 8, 8]", "[3, 3, 8, 8]", "[1, 3, 16, 16]", "[1, 3, 8, 16]"):
        assert shape in execution
    assert json.loads(json.dumps(report.plain(ladder), allow_nan=False))["note"] == ladder.note


def test_random_inputs_are_noted() -> None:
    ladder = validate(classifier(), classifier(), None)
    assert ladder.passed
    assert "random inputs" in ladder.note
    assert ladder.evaluation is not None
    assert ladder.evaluation.origin == "random"


WRONG = {
    "structure": (classifier(CLASSIFIER.replace("Relu", "Relux")), "Relux"),
    "strict shapes": (classifier(v=np.ones((5, 4), np.float32)), "MatMul"),
    "signature": (classifier(CLASSIFIER.replace("N, 4", "M, 4")), "outputs: found"),
    "load": (
        classifier(
            CLASSIFIER.replace(
                "r = Relu (c)", "i = Cast <to = 5> (c)\n k = Relu (i)\nr = Cast <to = 1> (k)"
            )
        ),
        "cannot load",
    ),
    "execution": (network(BATCH_ONE, w=W, v=V, s=np.array([1, 4])), r"on x \[2, 3, 8, 8\]"),
    "finite outputs": (classifier(v=np.full_like(V, 3e38)), "NaN or infinite"),
}


@pytest.mark.parametrize("rung", WRONG)
def test_a_wrong_candidate_fails_its_rung(rung: str) -> None:
    candidate, reason = WRONG[rung]
    ladder = validate(classifier(), candidate, samples())
    assert not ladder.passed
    assert tuple(r.name for r in ladder.rungs) == RUNGS[: RUNGS.index(rung) + 1]
    assert [r.passed for r in ladder.rungs] == [True] * (len(ladder.rungs) - 1) + [False]
    assert ladder.evaluation is None
    with pytest.raises(ValidationError, match=rf"'{rung}': .*{reason}"):
        ladder.raise_if_failed()


def test_a_candidate_of_other_output_shape_fails_at_execution() -> None:
    text = CLASSIFIER.replace("y = MatMul (f, v)", "m = MatMul (f, v)\n y = Slice (m, a, b)")
    text = text.replace("float[N, 4] y", "float[N, K] y")
    original = network(text, w=W, v=V, a=np.array([0, 0]), b=np.array([9, 4]))
    candidate = network(text, w=W, v=V, a=np.array([0, 0]), b=np.array([9, 3]))
    ladder = validate(original, candidate, samples())
    assert ladder.rungs[-1].name == "execution"
    assert "output 'y' has shape (1, 3), the original's (1, 4)" in ladder.rungs[-1].detail


def test_sizes_that_the_original_cannot_run_are_skipped() -> None:
    single = network(BATCH_ONE, w=W, v=V, s=np.array([1, 4]))
    ladder = validate(single, single, samples())
    assert ladder.passed
    assert "the original itself cannot run x [2, 3, 8, 8]" in ladder.rungs[4].detail


def test_a_larger_file_fails_the_size(tmp_path: Path) -> None:
    original = classifier()
    path = tmp_path / "small.onnx"
    path.write_bytes(b"0" * (original.file_bytes - 10))
    assert validate(original, original, samples(), path=path).passed
    (tmp_path / "small.onnx.data").write_bytes(b"0" * 11)
    ladder = validate(original, original, samples(), path=path)
    assert ladder.rungs[-1].name == "size"
    assert not ladder.passed
    with pytest.raises(ValidationError, match="larger than the input"):
        ladder.raise_if_failed()
    assert validate(original, original, samples(), path=path, allow_larger=True).passed


def test_what_fails_in_the_original_may_fail_in_the_candidate() -> None:
    def old(model: Model) -> Model:
        proto = model.to_proto()
        proto.ir_version = 3  # where initializers must be declared as inputs
        return Model.from_proto(proto)

    assert not validate(classifier(), old(classifier()), samples()).passed
    ladder = validate(old(classifier()), old(classifier()), samples())
    assert ladder.passed
    assert "as the original does" in ladder.rungs[0].detail


def test_an_original_that_cannot_run_is_no_fault_of_the_candidate() -> None:
    with pytest.raises(ExecutionError):
        validate(classifier(CLASSIFIER.replace("Relu", "Relux")), classifier(), samples())
