"""`compress` that is ended at any moment, goes on, and is short of time or of samples."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from onnxcomp import load
from onnxcomp.analysis import Analysis
from onnxcomp.errors import ParameterError, UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from onnxcomp.search import setup
from onnxcomp.search.judge import Judge, Look
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.walk import Walk
from tests.search.cases import residual
from tests.search.searching import inputs, wide
from tests.search.test_run import with_batchnorm

ROOT = Path(__file__).parents[2]
QUICK = Settings(latency=False, grid="16", methods=("remove_channels",))
COSTS, DRIFT = Limits(macs=0.5), Limits(drift=0.1)


def run(limits: Limits = COSTS, settings: Settings = QUICK, **options: object) -> Result:
    model = wide()
    return compress(model, inputs(model), limits=limits, settings=settings, **options)


@cache
def undisturbed(limits: Limits) -> Result:
    return run(limits)


def same(found: Result, wanted: Result) -> bool:
    return (
        found.model.digest == wanted.model.digest
        and found.plan == wanted.plan
        and found.met == wanted.met
        and found.report.notes == wanted.report.notes
    )


def fail(*_: object) -> None:
    raise AssertionError("this was done already")


@pytest.mark.parametrize("limits", [COSTS, DRIFT], ids=str)
def test_what_was_found_is_not_done_again(limits, tmp_path, monkeypatch):
    state = tmp_path / "state"
    assert same(run(limits, resume=state), undisturbed(limits))
    with monkeypatch.context() as patch:
        patch.setattr(LossMeter, "_visit", fail)
        patch.setattr(Walk, "run", fail)
        assert same(run(limits, resume=state), undisturbed(limits))
        assert same(run(limits, resume=str(state)), undisturbed(limits))
        with pytest.raises(AssertionError, match="done already"):
            run(limits, replace(QUICK, seed=1), resume=state)
    monkeypatch.setattr(LossMeter, "_visit", fail)
    other = replace(limits, macs=0.6)  # losses do not depend on what is asked for
    found = run(other, resume=state)
    monkeypatch.undo()
    assert same(found, run(other))


def test_a_limit_on_drift_is_another_run_as_it_holds_other_samples_out(tmp_path):
    run(COSTS, resume=tmp_path / "state")
    assert same(run(DRIFT, resume=tmp_path / "state"), undisturbed(DRIFT))


def test_other_samples_are_another_run(tmp_path, monkeypatch):
    model = wide()
    run(resume=tmp_path / "state")
    monkeypatch.setattr(LossMeter, "_visit", fail)
    with pytest.raises(AssertionError, match="done already"):
        compress(
            model, inputs(model, 30), limits=COSTS, settings=QUICK, resume=tmp_path / "state"
        )


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    kept = []
    with pytest.raises(ParameterError, match=r"--resume: .*holds files that are not of a run"):
        run(resume=tmp_path, keep=kept.append)
    assert not kept
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]


class Moments:
    """Counts reports of progress, and ends the run at one of them."""

    def __init__(self, last: int = 10**9) -> None:
        self.last, self.labels = last, list[str]()

    def __call__(self, label: str, share: float) -> None:
        self.labels.append(label)
        if len(self.labels) == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("limits", [COSTS, DRIFT], ids=str)
def test_a_run_that_is_interrupted_gives_the_best_so_far_and_goes_on(limits, tmp_path):
    moments = Moments()
    run(limits, progress=moments, resume=tmp_path / "whole")
    whole = undisturbed(limits)
    outcomes, original = [], wide()
    for last in np.linspace(1, len(moments.labels), 6).round().astype(int).tolist():
        state, kept = tmp_path / f"{last}", list[Model]()
        try:
            ended = run(limits, resume=state, progress=Moments(last), keep=kept.append)
        except KeyboardInterrupt:
            outcomes.append("raised")  # before there was a search, or at its very end
        else:
            assert ended.interrupted
            assert ended.model.signature == original.signature
            assert ended.report.ladder.passed
            assert any("interrupted" in note for note in ended.report.notes)
            assert kept[-1].digest == ended.model.digest or ended.plan.empty
            outcomes.append("empty" if ended.plan.empty else "plan")
        assert kept[0].digest == original.digest
        assert same(run(limits, resume=state), whole)
    assert {"raised", "empty"} <= set(outcomes)
    assert not whole.interrupted


def test_a_search_that_is_interrupted_late_has_a_plan(monkeypatch):
    """While a second candidate is looked at, the first is the best so far."""
    look, seen = Judge.look, []

    def looked(self: Judge, candidate: Model, error: float) -> Look:
        seen.append(candidate.digest)
        if seen[1:]:
            raise KeyboardInterrupt
        return look(self, candidate, error)

    monkeypatch.setattr(Judge, "look", looked)
    ended = run(Limits(drift=0.05))  # where the first leaves half of the limit
    assert ended.interrupted
    assert ended.met
    assert len(seen) == 2
    assert ended.model.digest == seen[0]


# Time


@pytest.mark.parametrize(
    "limits",
    [COSTS, Limits(latency=0.5), replace(COSTS, drift=0.01), Limits(macs=0.5, size=0.5)],
    ids=str,
)
def test_without_time_the_prepared_original_is_returned(limits):
    result = run(limits, replace(QUICK, time_limit=1e-6))
    assert not result.met
    assert result.plan.empty
    assert result.report.ladder.passed
    assert result.model.digest == result.search.nothing.model.digest
    assert any("time limit" in note for note in result.report.notes)
    assert Analysis(result.model).cost.macs == Analysis(wide()).cost.macs


def test_within_a_time_limit_the_result_is_no_worse():
    """What is tried beyond the first plan is kept only where it loses less."""
    result = run(settings=replace(QUICK, time_limit=10.0))
    assert result.met
    drift = result.report.ladder.evaluation.relative_l2
    assert drift <= 1.05 * undisturbed(COSTS).report.ladder.evaluation.relative_l2


def measured(monkeypatch, milliseconds: float) -> None:
    """Let latency be that of MACs, with a quarter that nothing changes."""

    def paired_latency(models, *_: object, **__: object) -> SimpleNamespace:
        macs = [Analysis(model).cost.macs for model in models]
        timings = []
        for own in macs:
            share = 0.25 + 0.75 * own / macs[0]
            ratio = SimpleNamespace(value=1 / share)
            timings.append(SimpleNamespace(ratio=ratio, median_ms=milliseconds * share))
        return SimpleNamespace(models=timings)

    monkeypatch.setattr("onnxcomp.search.clock.paired_latency", paired_latency)


def test_latency_is_limited_as_a_share_or_absolutely(monkeypatch):
    measured(monkeypatch, milliseconds=2.0)
    results = [run(Limits(latency=limit)) for limit in (0.6, 1200.0)]
    assert results[0].model.digest == results[1].model.digest
    assert all(result.met for result in results)
    share = Analysis(results[0].model).cost.macs / Analysis(wide()).cost.macs
    assert 0.25 + 0.75 * share <= 0.6
    faster = run(Limits(latency=800.0))
    assert faster.met
    assert Analysis(faster.model).cost.macs < Analysis(results[0].model).cost.macs
    slow = run(Limits(latency=400.0))  # less than the quarter that stays
    assert not slow.met
    assert slow.report.notes


# Samples


def refuse(*_: object) -> None:
    raise UnsupportedModelError("images are not what is tested here")


@pytest.mark.parametrize("make", [with_batchnorm, residual])
def test_without_samples_the_report_says_so_first(make, monkeypatch):
    monkeypatch.setattr(setup, "_inverted", refuse)
    model, settings = make(), replace(QUICK, grid="8")
    result = compress(model, limits=Limits(macs=0.7), settings=settings)
    notes = result.report.notes
    assert notes[0].startswith("no samples given")
    adapted = [note for note in notes if "BatchNormalizations stand for real inputs" in note]
    assert len(adapted) == (make is with_batchnorm)
    assert result.met
    assert not result.plan.empty
    feed = {"x": inputs(model)["x"]}
    (wanted,), (found,) = (Session(m).run(feed).values() for m in (model, result.model))
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.8
    again = compress(model, limits=Limits(macs=0.7), settings=settings)
    assert again.model.digest == result.model.digest


def test_without_samples_half_of_a_limit_on_drift_is_used():
    model = residual()
    result = compress(model, limits=Limits(drift=0.1), settings=replace(QUICK, grid="4"))
    assert result.met
    assert any("were halved" in note for note in result.report.notes)
    assert 0.01 < result.report.ladder.evaluation.relative_l2 <= 0.05
    given = compress(
        model, inputs(model), limits=Limits(drift=0.1), settings=replace(QUICK, grid="4")
    )
    assert not any("halved" in note for note in given.report.notes)


@pytest.mark.parametrize(("labelled", "metric"), [(True, "top1"), (False, "agreement")])
def test_a_limit_on_the_drop_chooses_its_metric(labelled, metric):
    model = wide(classes=True)
    labels = np.arange(32) % 16 if labelled else None
    data = Samples(inputs(model), labels)
    result = compress(model, data, limits=Limits(drop=0.01), settings=QUICK)
    assert result.met
    assert result.report.ladder.evaluation.metric == metric


def test_models_are_kept_from_the_input_to_the_result():
    kept = []
    result = run(keep=kept.append)
    assert kept[0].digest == wide().digest
    assert kept[-1] is result.model
    assert len(kept) == len({model.digest for model in kept}) > 1
    assert {model.signature for model in kept} == {wide().signature}


# Kills

KILLED = """
import sys
import numpy as np
from onnxcomp import Limits, Settings, compress, load
from onnxcomp.loading import write_model
from threadpoolctl import threadpool_limits
threadpool_limits(1)
model, state, out = load(sys.argv[1]), sys.argv[2], sys.argv[3]
def keep(best):
    write_model(best.to_proto(external=True), out, inputs=[], external=best.weights)
data = dict(np.load(sys.argv[4]))
settings = Settings(latency=False, grid="16", methods=("remove_channels",))
result = compress(model, data, limits=Limits(macs=0.5), settings=settings, resume=state,
                  keep=keep, progress=lambda *_: print(".", flush=True))
print(result.model.digest, flush=True)
"""


@pytest.mark.heavy
def test_a_process_that_is_killed_at_any_moment_goes_on(tmp_path):
    """SIGKILL after so many reports of progress; then to the same bits as undisturbed."""
    model, samples = tmp_path / "model.onnx", tmp_path / "samples.npz"
    wide().save(model)
    np.savez(samples, **inputs(wide()))

    def start(state: Path, out: Path) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", KILLED, model, state, out, samples]
        return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def finished(name: str) -> list[str]:
        with start(tmp_path / name, tmp_path / f"{name}.onnx") as process:
            lines, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        return lines.split()

    *reports, wanted = finished("whole")
    rng = np.random.default_rng(0)
    for number, last in enumerate(np.linspace(1, len(reports), 8).astype(int)):
        out = tmp_path / f"{number}.onnx"
        with start(tmp_path / f"{number}", out) as process:
            for _ in range(last):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        assert load(out).signature == wide().signature  # whole, from the start
        assert finished(f"{number}")[-1] == wanted
        assert load(out).digest == wanted
