"""What a judge says of held-out samples, against closed forms and other ways to count."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcomp.evaluate import evaluate
from onnxcomp.metrics import Metric, load_metric
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from onnxcomp.search import judge as module
from onnxcomp.search.judge import Judge, Look, looks_memorised
from onnxcomp.search.settings import Limits

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((6, 5)).astype(np.float32)
X = RNG.standard_normal((200, 6)).astype(np.float32)
HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
NEW_SOURCES = 1.75  # what a promise on drift adds for other sources
SCORES = "net (float[N, 6] x) => (float[N, 5] y) { y = MatMul (x, w) }"
CLASSES = """net (float[N, 6] x) => (int64[N, 1] c) {
    y = MatMul (x, w)
    c = ArgMax <axis = 1, keepdims = 1> (y)
}"""
HEADS = """net (float[N, 6] x) => (float[N, 5] y, int64[N, 1] c, float[N, 5] z) {
    y = MatMul (x, w)
    c = ArgMax <axis = 1, keepdims = 1> (y)
    z = Neg (y)
}"""


def network(weight: np.ndarray = WEIGHT, text: str = SCORES) -> Model:
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    return Model.from_proto(proto)


def nudged(by: float) -> np.ndarray:
    return WEIGHT + by * np.random.default_rng(1).standard_normal(WEIGHT.shape)


def labels(right: float) -> np.ndarray:
    """The original's classes, of which a share is kept and the others are one off."""
    found = (X @ WEIGHT).argmax(axis=1)
    wrong = np.random.default_rng(2).random(len(X)) >= right
    return np.where(wrong, (found + 1) % 5, found)


def look(
    candidate: Model,
    metric: Metric | None = None,
    *,
    error: float = 0.0,
    original: Model | None = None,
    right: float | None = None,
) -> Look:
    samples = Samples({"x": X}, None if right is None else labels(right))
    judge = Judge(original or network(), samples, metric, threads=1)
    return judge.look(candidate, error)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_deleting_samples_one_by_one_gives_the_standard_error_of_a_mean(count):
    """Analytically: the sample's deviation over the root of its size."""
    values = np.random.default_rng(0).lognormal(size=count)
    found = module._jackknife(lambda index: float(values[index].mean()), count)
    wanted = values.std(ddof=1) / math.sqrt(count)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found != pytest.approx(values.std(ddof=0) / math.sqrt(count), rel=1e-3)


def test_deleting_groups_gives_about_the_same():
    """Twenty groups of fifty: the error of the error is 16 % (1 / sqrt(2 * 19))."""
    values = np.random.default_rng(0).standard_normal(1000)
    found = module._jackknife(lambda index: float(values[index].mean()), 1000)
    assert found == pytest.approx(1 / math.sqrt(1000), rel=0.5)
    calls = []
    module._jackknife(lambda index: float(calls.append(len(index)) or 0), 1000)
    assert calls == [950] * 20


def test_one_sample_promises_nothing():
    assert module._jackknife(lambda index: 1 / len(index), 1) == math.inf
    alone = Judge(network(), Samples({"x": X[:1]}), load_metric("agreement"), threads=1)
    found = alone.look(network(nudged(0.001)), 0.0)
    assert found.drift == found.drop == math.inf


def test_drift_is_that_of_an_evaluation_one_standard_error_and_new_sources():
    """In squares, of which the error is taken; both sums in float64."""
    candidate = network(nudged(0.05))
    drift = evaluate(network(), candidate, Samples({"x": X})).relative_l2
    a, b = X @ WEIGHT, X @ nudged(0.05).astype(np.float32)
    noise, signal = ((a - b) ** 2).sum(axis=1), (a**2).sum(axis=1)
    groups = np.arange(len(X)) % 20
    kept = [noise[groups != g].sum() / signal[groups != g].sum() for g in range(20)]
    error = math.sqrt(19 / 20 * np.sum((kept - np.mean(kept)) ** 2))
    found = look(candidate).drift
    assert found == pytest.approx(NEW_SOURCES * math.sqrt(drift**2 + error), rel=1e-5)
    assert found > 1.001 * drift
    assert look(network()).drift == 0.0
    assert look(network(nudged(0.1))).drift > 1.5 * found


def test_the_worst_output_counts_and_integers_by_the_share_that_differs():
    differing = (X @ WEIGHT).argmax(axis=1) != (X @ nudged(0.3)).argmax(axis=1)
    assert 0.05 < differing.mean() < 0.2
    groups = np.arange(len(X)) % 20
    kept = [differing[groups != g].mean() for g in range(20)]
    bound = differing.mean() + math.sqrt(19 / 20 * np.sum((kept - np.mean(kept)) ** 2))
    classes = look(network(nudged(0.3), CLASSES), original=network(text=CLASSES)).drift
    assert classes == pytest.approx(NEW_SOURCES * bound, rel=1e-12)
    floats = look(network(nudged(0.3))).drift
    assert floats > 1.2 * classes
    every = look(network(nudged(0.3), HEADS), original=network(text=HEADS)).drift
    assert every == pytest.approx(floats, rel=1e-5)


def test_scores_of_classes_are_bounded_by_how_far_the_outputs_move():
    """Nothing was lost here, but 0.45 of the error may be on new samples."""
    for error, drop in ((0.0, 0.0), (0.02, 0.009), (0.4, 0.18)):
        found = look(network(), load_metric("top1"), error=error, right=0.9)
        assert found.drop == pytest.approx(drop)
        assert found.error == error


def test_points_that_were_lost_count_with_their_standard_error():
    candidate = network(nudged(0.2))
    found = look(candidate, load_metric("top1"), right=0.9)
    evaluation = evaluate(
        network(), candidate, Samples({"x": X}, labels(0.9)), metric=load_metric("top1")
    )
    assert evaluation.drop is not None
    assert evaluation.drop > 0.02
    before = (X @ WEIGHT).argmax(axis=1) == labels(0.9)
    after = (X @ nudged(0.2)).argmax(axis=1) == labels(0.9)
    lost = before.astype(float) - after
    error = lost.std(ddof=1) / math.sqrt(len(X))  # in groups: within 50 %
    assert evaluation.drop + 0.5 * error < (found.drop or 0) < evaluation.drop + 1.5 * error
    assert found.score == pytest.approx(before.mean())


def test_agreement_grows_with_the_root_and_has_no_score():
    found = look(network(), load_metric("agreement"), error=0.04)
    assert found.drop == pytest.approx(0.35 * math.sqrt(0.04))
    assert found.score is None
    changed = look(network(nudged(0.3)), load_metric("agreement"))
    same = (X @ WEIGHT).argmax(axis=1) == (X @ nudged(0.3)).argmax(axis=1)
    assert 1 - same.mean() < (changed.drop or 0) < 1.5 * (1 - same.mean())


def test_other_metrics_lose_what_they_lose():
    def mean(outputs, labels, inputs):
        return float(outputs["y"].mean())

    found = look(network(WEIGHT - 0.5), Metric("mean", mean), error=1.0, right=1.0)
    lost = (X @ WEIGHT).mean(axis=1) - (X @ (WEIGHT - 0.5)).mean(axis=1)
    assert found.drop == pytest.approx(lost.mean() + lost.std() / math.sqrt(200), abs=0.1)
    assert abs(lost.mean()) < 0.25 < 1.0


def test_outputs_that_are_not_finite_are_infinitely_far():
    broken = WEIGHT.copy()
    broken[0, 0] = np.nan
    assert look(network(broken)).drift == math.inf
    assert look(network(np.full_like(WEIGHT, 3e38))).drift == math.inf


def test_strain_is_the_share_of_the_tightest_limit_in_squares():
    found = Look(0.0, drift=0.1, drop=0.01, score=None)
    assert found.strain(Limits()) == 0.0
    assert found.strain(Limits(drop=0.02)) == pytest.approx(0.5)
    assert found.strain(Limits(drift=0.2)) == pytest.approx(0.25)
    assert found.strain(Limits(drop=0.02, drift=0.05)) == pytest.approx(4.0)
    assert Look(0.0, drift=math.inf, drop=None, score=None).strain(Limits(drift=1)) == math.inf
    assert found.within(Limits(drop=0.01, drift=0.1))
    assert not found.within(Limits(drop=0.0099))
    assert not found.within(Limits(drift=0.099))
    assert Look(0.0, drift=0.1, drop=-0.01, score=None).within(Limits(drop=0.001))


def test_a_drift_from_large_outputs_does_not_allow_a_constant():
    constant = Look(error=0.0, drift=0.03, drop=None, score=None, unexplained=1.0)
    assert not constant.within(Limits(drift=0.1))
    assert replace(constant, unexplained=0.2).within(Limits(drift=0.1))
    assert constant.strain(Limits(drift=0.1)) == pytest.approx(4.0)
    assert constant.drifts_little(Limits(drift=0.1))
    assert not constant.drifts_little(Limits(drift=0.02))
    assert not replace(constant, unexplained=0.2).drifts_little(Limits(drift=0.1))
    assert not constant.drifts_little(Limits(drop=0.01))


@pytest.mark.parametrize("count", [40, 41])
def test_what_is_left_of_the_variance_over_samples(count):
    """Element by element: outputs around 3 and 8 that vary by 0.1 are no variance of 2.5."""
    rng = np.random.default_rng(0)
    outputs = np.array([3.0, 8.0]) + 0.1 * rng.standard_normal((count, 2))

    def lost(other: np.ndarray, outputs: np.ndarray = outputs) -> float:
        compared = module._Compared()
        for batch in zip(np.split(outputs, [32]), np.split(other, [32]), strict=True):
            compared.add(*batch)
        return compared.unexplained()

    assert lost(np.broadcast_to(outputs.mean(axis=0), outputs.shape)) == pytest.approx(1.0)
    assert lost(outputs + 0.05 * (outputs - outputs.mean(axis=0))) == pytest.approx(0.05**2)
    assert lost(outputs) == 0.0
    assert lost(outputs + 9.0) == 1.0
    same = np.ones((count, 2))
    assert lost(same + 1e-3, same) == 0.0  # what never varies tells nothing


def test_looks_see_what_is_left_of_the_variance():
    assert look(network()).unexplained == 0.0
    moved = look(network(1.1 * WEIGHT)).unexplained
    assert moved == pytest.approx(0.01, rel=0.05)


def test_a_score_of_nearly_one_looks_memorised():
    top1 = load_metric("top1")
    assert looks_memorised(look(network(), top1, right=1.0))
    assert not looks_memorised(look(network(), top1, right=0.9))
    assert not looks_memorised(look(network(), load_metric("agreement"), right=1.0))
    assert not looks_memorised(look(network()))
