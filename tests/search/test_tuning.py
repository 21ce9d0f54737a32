"""`compress --tune`: what was found learns from the original, and is judged like the rest."""

import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

from onnxcomp.errors import DataError, ParameterError, UnsupportedModelError
from onnxcomp.evaluate import evaluate
from onnxcomp.model import Model
from onnxcomp.recipe import dump_recipe, load_recipe, resolve
from onnxcomp.samples import Samples
from onnxcomp.search import tuning
from onnxcomp.search.run import Result, compress
from onnxcomp.search.search import Search
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.tune import TuneResult, Tuning
from tests.analysis.channel_graphs import Graph
from tests.search.searching import inputs, wide

PLAIN = Settings(latency=False, grid="8", methods=("remove_channels",))
TUNED = replace(PLAIN, tune=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr("onnxcomp.search.loss_meter._MEASURED", 2)
    monkeypatch.setattr(tuning, "_SECONDS", None)  # 20 epochs, however slow this machine is


def run(settings: Settings = TUNED, **limits: float) -> Result:
    model = wide()
    return compress(model, inputs(model, 48), limits=Limits(**limits), settings=settings)


def fake(monkeypatch, scale: float = 0.5, **given: object) -> list[float]:
    """Tuning that gives the model back with other weights, at once; its time limits."""
    limits = []

    def tune(model: Model, *_: object, time_limit: float, **__: object) -> TuneResult:
        limits.append(time_limit)
        other = {n: (scale * a).astype(a.dtype) for n, a in model.weights.items()}
        found = {"model": Model(model.skeleton, other), "before": 0.2, "after": 0.1}
        return TuneResult(**({**found, "history": ()} | given))

    monkeypatch.setattr(tuning, "tune", tune)
    return limits


@pytest.mark.parametrize("limits", [{"macs": 0.5}, {"drift": 0.3}], ids=str)
def test_samples_that_judge_are_never_learnt_from(limits, monkeypatch) -> None:
    seen = []

    def tune(model: Model, _: Model, fit: Samples, *__: object, held: Samples, **___: object):
        seen.append((fit, held))
        return TuneResult(model, 0.1, 0.1, ())

    monkeypatch.setattr(tuning, "tune", tune)
    found = run(**limits)
    ((fit, held),) = seen
    judged = found.report.ladder.evaluation.samples
    rows = [{x.tobytes() for x in part.arrays["x"]} for part in (fit, held)]
    assert not rows[0] & rows[1]
    assert judged == held.count == len(rows[1])
    assert fit.count + held.count == 48


def test_the_result_is_tuned_and_said_to_be() -> None:
    plain, found = run(PLAIN, macs=0.5), run(macs=0.5)
    assert plain.plan == found.plan
    assert [n.id for n in plain.model.nodes] == [n.id for n in found.model.nodes]
    assert plain.model.digest != found.model.digest
    assert found.report.ladder.passed
    assert found.met
    assert "tune" in found.report.seconds
    (note,) = [note for note in found.report.notes if note.startswith("tuned for")]
    before, after = (float(text) for text in note.split("hold-out loss ")[1].split(" -> "))
    assert after < before
    assert not any("tuned" in note for note in plain.report.notes)
    unseen = np.random.default_rng(7).standard_normal((64, 16, 8, 8)).astype(np.float32)
    drifts = [
        evaluate(wide(), result.model, Samples({"x": unseen})).relative_l2
        for result in (plain, found)
    ]
    assert drifts[1] < drifts[0]


def test_the_best_so_far_is_the_tuned_one() -> None:
    kept: list[Model] = []
    model = wide()
    found = compress(
        model, inputs(model, 48), limits=Limits(macs=0.5), settings=TUNED, keep=kept.append
    )
    assert kept[-1].digest == found.model.digest
    assert kept[-2].digest != found.model.digest


def test_what_fails_validation_is_not_kept(monkeypatch) -> None:
    fake(monkeypatch, scale=np.nan)
    found = run(macs=0.5)
    assert found.plan.empty
    assert any("failed validation" in note for note in found.report.notes)


@pytest.mark.parametrize("after", [0.1, 0.3])
def test_what_is_not_better_is_left(monkeypatch, after: float) -> None:
    fake(monkeypatch, after=after)
    plain, found = run(PLAIN, macs=0.5), run(macs=0.5)
    assert (plain.model.digest == found.model.digest) == (after > 0.2)


def test_a_limit_that_held_must_hold_behind_it(monkeypatch) -> None:
    """Weights of half their size are better by what tuning says, not by the drift."""
    fake(monkeypatch)
    limits = {"macs": 0.9, "drift": 0.6}
    plain, found = run(PLAIN, **limits), run(**limits)
    assert plain.met
    assert found.met
    assert found.model.digest == plain.model.digest
    assert "the tuned model breaks a limit that held before; it was not kept" in (
        found.report.notes
    )


def test_a_file_that_became_too_large_is_not_kept(monkeypatch) -> None:
    fake(monkeypatch)
    plain = run(PLAIN, macs=0.5)
    within = Search.within
    untuned = {plain.model.digest, wide().digest}

    def tight(self: Search, model: Model, limits: Limits) -> bool:
        return within(self, model, limits) and model.digest in untuned

    monkeypatch.setattr(Search, "within", tight)
    found = run(macs=0.5)
    assert found.met
    assert found.model.digest == plain.model.digest


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnsupportedModelError("torch fails in node 'a'"), "torch fails in node 'a'"),
        (DataError("odd"), "odd"),
        (RuntimeError("can't allocate\nmemory"), "can't allocate"),
        (MemoryError(), "MemoryError"),
        (IndexError("out of range"), "out of range"),
        (TypeError("no float"), "no float"),
    ],
    ids=repr,
)
def test_what_cannot_be_tuned_stays_and_is_told(monkeypatch, error, reason: str) -> None:
    def refuse(*_: object, **__: object) -> TuneResult:
        raise error

    monkeypatch.setattr(tuning, "tune", refuse)
    plain, found = run(PLAIN, macs=0.5), run(macs=0.5)
    assert found.model.digest == plain.model.digest
    assert f"not tuned: {reason}" in found.report.notes


def recurrent() -> Model:
    g = Graph(8, 6, 6)
    t = g.op("Relu", g.conv(g.op("Relu", g.conv("x", 8, 32)), 32, 16))
    rows = g.op("Reshape", t, g.ints(36, 1, 16))
    outputs = g.op("GRU", rows, g.w(1, 12, 16), g.w(1, 12, 4), hidden_size=4)
    return g.model(g.op("Reshape", outputs, g.ints(1, 144)))


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_torch_cannot_express_is_refused_before_the_search(dry_run: bool) -> None:
    proto = recurrent().to_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model, seen = Model.from_proto(proto), []
    options = {"limits": Limits(macs=0.5), "progress": lambda label, _: seen.append(label)}
    with pytest.raises(UnsupportedModelError, match=r"tune: .* GRU '.*leave --tune out"):
        compress(model, inputs(model, 8), settings=TUNED, dry_run=dry_run, **options)
    assert set(seen) == {"prepare"}
    compress(model, inputs(model, 8), settings=PLAIN, dry_run=True, **options)
    assert "analyse" in seen


@pytest.mark.parametrize(("after", "told"), [(0.1, "tuned for"), (0.2, "trained for")])
def test_what_training_says_reaches_the_report(monkeypatch, after: float, told: str) -> None:
    notes = ("the loss became NaN or infinite", "tuned weights failed a check ('y' differs)")
    fake(monkeypatch, after=after, notes=notes)
    found = run(macs=0.5).report.notes
    assert {f"tune: {note}" for note in notes} < set(found)
    (head,) = [note for note in found if note.startswith(told)]
    assert head.endswith("epochs, nothing better was found") == (after == 0.2)


def test_training_that_did_not_begin_is_told(monkeypatch) -> None:
    fake(monkeypatch, before=None, after=None, notes=("the time limit was reached",))
    found = run(macs=0.5).report.notes
    assert {"not tuned", "tune: the time limit was reached"} <= set(found)


@pytest.mark.parametrize(
    ("classes", "labels", "used"),
    [
        (True, np.arange(48) % 16, True),
        (True, None, False),
        (True, np.arange(48), False),  # of another task
        (False, np.arange(48) % 16, False),
    ],
    ids=["classes", "none", "too many", "maps"],
)
def test_labels_that_are_classes_teach_too(monkeypatch, classes, labels, used) -> None:
    seen = []

    def tune(model: Model, _: Model, __: Samples, how: Tuning, **___: object) -> TuneResult:
        seen.append((how.labels, how.memory))
        return TuneResult(model, 0.2, 0.1, ())

    monkeypatch.setattr(tuning, "tune", tune)
    model = wide(classes=classes)
    data = Samples(inputs(model, 48), labels)
    settings = replace(TUNED, memory=2e9)
    found = compress(model, data, limits=Limits(macs=0.5), settings=settings)
    assert seen == [(used, 2e9)]
    assert any("learned from the labels too" in n for n in found.report.notes) is used


def test_labels_are_learned_from() -> None:
    model = wide(classes=True)
    labels = np.arange(48) % 16
    given = (Samples(inputs(model, 48), part) for part in (labels, None))
    digests = {
        compress(model, data, limits=Limits(macs=0.5), settings=TUNED).model.digest
        for data in given
    }
    assert len(digests) == 2


def test_codebooks_stay_codebooks() -> None:
    settings = replace(TUNED, methods=("remove_channels", "share_weights"), emit="codebook")
    found = run(settings, macs=0.5)
    plain = run(replace(settings, tune=False), macs=0.5)
    assert any(note.startswith("tuned for") for note in found.report.notes)
    assert found.model.digest != plain.model.digest
    assert [n.op for n in found.model.nodes] == [n.op for n in plain.model.nodes]
    sizes = [result.report.result.file_bytes for result in (found, plain)]
    assert sizes[0] <= 1.05 * sizes[1]  # with longer names


def test_an_interrupt_keeps_what_there_is(monkeypatch) -> None:
    fake(monkeypatch, interrupted=True)
    found = run(macs=0.5)
    assert found.interrupted
    assert found.model.digest != run(PLAIN, macs=0.5).model.digest
    assert "interrupted; this is the best so far" in found.report.notes


def test_without_a_plan_nothing_is_tuned(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "tune", None)
    assert run(macs=1.0).plan.empty


def test_the_search_leaves_time(monkeypatch) -> None:
    """At least what half of 8 seconds leaves behind the measurement that is reported."""
    limits = fake(monkeypatch)
    run(replace(TUNED, time_limit=8.0), macs=0.5)
    assert len(limits) == 1
    assert 1.0 < limits[0] < 0.85 * 8.0


def test_samples_and_torch_must_be_there(monkeypatch) -> None:
    model = wide()
    for data in (None, inputs(model, 1)):
        with pytest.raises(ParameterError, match="at least two real samples"):
            compress(model, data, limits=Limits(macs=0.5), settings=TUNED)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ParameterError, match="PyTorch is not installed"):
        run(macs=0.5)


def test_the_device_is_checked_first_and_used(monkeypatch) -> None:
    with pytest.raises(ParameterError, match="'device' must be one of cpu, cuda"):
        run(replace(TUNED, device="tpu"), macs=0.5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    seen: list[Tuning] = []

    def tune(model: Model, _: Model, __: Samples, how: Tuning, **___: object) -> TuneResult:
        seen.append(how)
        return TuneResult(model, 0.1, 0.1, ())

    monkeypatch.setattr(tuning, "tune", tune)
    run(replace(TUNED, device="cuda", memory=5e8), macs=0.5)
    assert [(how.device, how.memory) for how in seen] == [("cuda", 5e8)]


def test_the_recipe_says_it(tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(TUNED, provenance={}))
    assert resolve(load_recipe(file), {}).tune
    assert not resolve(load_recipe(file), {"tune": False}).tune
