"""What `compress` asks of samples, labels and limits before it promises anything."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import onnxcomp
from onnxcomp.errors import DataError, ParameterError
from onnxcomp.evaluate import evaluate, predict
from onnxcomp.metrics import load_metric
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.setup import assign_samples
from tests.search.searching import QUICK, inputs, wide

DIGITS = Path(__file__).parents[2] / "models" / "digits"
ENOUGH = 32  # different samples, for a promise on drop or drift
CHANNELS = Settings(latency=False, methods=("remove_channels",))


@cache
def digits() -> Model:
    return onnxcomp.load(DIGITS / "digits.onnx")


def images(name: str) -> Samples:
    with np.load(DIGITS / f"{name}.npz") as found:
        return Samples({"input": found["input"]}, found["labels"])


def first(count: int, copies: int = 1) -> Samples:
    return images("samples").take(np.repeat(np.arange(count), copies))


def run(data: Samples, settings: Settings = CHANNELS, **limits: float) -> Result:
    return compress(digits(), data, limits=Limits(**limits), settings=settings)


@pytest.mark.parametrize(
    ("count", "copies"), [(1, 1), (3, 1), (8, 1), (ENOUGH - 1, 1), (4, 16)]
)
@pytest.mark.parametrize("limit", [{"drift": 0.1}, {"drop": 0.01}], ids=str)
def test_few_different_samples_promise_nothing(count, copies, limit):
    with pytest.raises(DataError, match=f"at least {ENOUGH} different .*; got {count}:"):
        run(first(count, copies), **limit)


@pytest.mark.parametrize("count", [ENOUGH, 64])
def test_a_promise_is_kept_on_new_samples(count):
    result = run(first(count), drift=0.2)
    assert result.met
    assert not result.plan.empty
    assert evaluate(digits(), result.model, images("test")).relative_l2 <= 0.2


@pytest.mark.parametrize(("count", "copies"), [(1, 1), (3, 1), (4, 16)])
def test_few_samples_do_for_limits_on_costs(count, copies):
    result = run(first(count, copies), macs=0.7)
    assert result.met
    assert not result.plan.empty
    found = [note for note in result.report.notes if "equal others" in note]
    assert found == ["60 of 64 samples equal others and were left out"] * (copies > 1)


def test_equal_samples_count_once():
    """By all inputs, in their order; the rest is split as if they had never been there."""
    model, notes = wide(), []
    x = inputs(model, 30)["x"]
    data = Samples({"x": np.concatenate([x, x[:5], x[::-1]])}, np.arange(65))
    roles = assign_samples(model, data, QUICK, notes)
    assert roles.given is not None
    assert np.array_equal(roles.given.arrays["x"], x)
    assert np.array_equal(roles.given.labels, np.arange(30))
    assert notes == ["35 of 65 samples equal others and were left out"]
    alone = assign_samples(model, Samples({"x": x}), QUICK, [])
    assert np.array_equal(roles.holdout.arrays["x"], alone.holdout.arrays["x"])


@pytest.mark.parametrize("metric", [None, "top1", "agreement"])
def test_points_of_classes_are_shares(metric):
    chosen = None if metric is None else load_metric(metric)
    with pytest.raises(ParameterError, match=r"5 means 500 points; 5% is 0\.05"):
        compress(digits(), first(32), metric=chosen, limits=Limits(drop=5), settings=CHANNELS)


def test_points_of_other_metrics_are_any_number():
    model = wide()
    samples = Samples(inputs(model))
    (target,) = predict(model, samples).values()
    data, psnr = Samples(samples.arrays, target), load_metric("psnr:10")
    result = compress(model, data, metric=psnr, limits=Limits(drop=60), settings=QUICK)
    assert result.met
    assert not result.plan.empty


def test_labels_that_are_no_classes_are_refused():
    """Wherever they are: the one that is wrong is not among those that judge."""
    data = images("samples").take(np.arange(64))
    judging = assign_samples(digits(), data, CHANNELS, []).holdout.arrays["input"]
    fitted = [
        not (image == judging).all(axis=(1, 2, 3)).any() for image in data.arrays["input"]
    ]
    labels = np.array(data.labels)
    labels[fitted.index(True)] = 10
    wrong = Samples(data.arrays, labels)
    with pytest.raises(DataError, match=r"label 10 is no class: .* 0 to 9"):
        compress(digits(), wrong, metric=load_metric("top1"), settings=CHANNELS)


def test_a_run_without_limits_says_so():
    noted = "no limit was given"
    assert any(noted in note for note in run(first(32)).report.notes)
    assert not any(noted in note for note in run(first(32), macs=0.9).report.notes)
