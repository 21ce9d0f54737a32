"""The time of candidates: measured here, predicted for a target that is another machine."""

from dataclasses import replace

import pytest

import onnxcomp
from onnxcomp.analysis.target import TARGETS, Calibration
from onnxcomp.bench import describe_machine
from onnxcomp.deadline import Deadline
from onnxcomp.report.text import unmet_limits
from onnxcomp.samples import Samples
from onnxcomp.search import clock as clocks
from onnxcomp.search.clock import Clock
from onnxcomp.search.settings import Limits, Settings
from tests.search.cases import CASES
from tests.search.searching import inputs

HERE = describe_machine()
CALIBRATED = Calibration(HERE.cpu, HERE.architecture, HERE.onnxruntime, 1, 60, 0.05, 0.1)
OWN = TARGETS["x86-avx512"]
ELSEWHERE = replace(OWN, calibration=replace(CALIBRATED, cpu="another CPU"))


def clock_of(target, *, deadline=None) -> Clock:
    model = CASES["residual"]()
    samples = Samples(inputs(model, 2))
    return Clock(model, samples, target, threads=1, deadline=Deadline(deadline))


def test_a_target_that_was_measured_here_is_here():
    assert clock_of(replace(OWN, calibration=CALIBRATED)).elsewhere == ""
    assert "another CPU" in clock_of(ELSEWHERE).elsewhere


def test_a_built_in_profile_of_another_architecture_is_elsewhere():
    others = {"x86_64": "arm64", "aarch64": "x86-avx512"}
    assert others[HERE.architecture] in clock_of(TARGETS[others[HERE.architecture]]).elsewhere


def test_times_elsewhere_are_predicted(monkeypatch):
    def measured(*_, **__):
        raise AssertionError("nothing is to be measured here")

    monkeypatch.setattr(clocks, "paired_latency", measured)
    clock = clock_of(ELSEWHERE)
    assert clock(CASES["residual"]()) == pytest.approx(1.0)
    assert clock(CASES["concat_of_three"]()) != pytest.approx(1.0)
    assert clock.share(0.4) == 0.4
    assert clock.share(2e6) == pytest.approx(2 * clock.share(1e6))


@pytest.mark.parametrize(("left", "seconds"), [(None, 8.0), (3.0, 3.0), (0.0, 0.5)])
def test_measurements_end_towards_the_deadline(left, seconds, monkeypatch):
    asked = []

    def measured(*_, time_limit_s, **__):
        asked.append(time_limit_s)
        raise KeyboardInterrupt

    monkeypatch.setattr(clocks, "paired_latency", measured)
    clock = clock_of(replace(OWN, calibration=CALIBRATED), deadline=left)
    with pytest.raises(KeyboardInterrupt):
        clock(CASES["residual"]())
    assert asked == [pytest.approx(seconds, abs=0.2)]


def test_a_limit_on_the_time_of_another_machine_is_judged_by_its_prediction():
    """And the report says first that what was measured is of this machine."""
    model = CASES["residual"]()
    foreign = {"x86_64": "arm64", "aarch64": "x86-avx512"}[HERE.architecture]
    settings = Settings(target=foreign, methods=("remove_channels",), latency=False)
    for limit, met in ((0.8, True), (0.01, False)):
        result = onnxcomp.compress(
            model, data=inputs(model, 24), limits=Limits(latency=limit), settings=settings
        )
        assert result.met == met
        assert f"the target is {foreign}" in result.report.notes[0]
        assert bool(unmet_limits(result.report)) != met
        if met:
            assert 0 < result.report.predicted <= limit
