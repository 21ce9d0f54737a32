"""Benchmarks: samples fit the models they are for, children are measured, records are JSON."""

import json
import math

import numpy as np
import pytest

from benchmarks import child, common, data, memory, shared_tensors, zoo
from benchmarks.__main__ import NAMES
from onnxcomp import load
from onnxcomp.samples import as_samples

KEYS = {
    "schema_version",
    "benchmark",
    "quick",
    "seed",
    "threads",
    "seconds",
    "machine",
    "versions",
    "notes",
    "rows",
}
QUICK_TO_MAKE = ("kazuhito00_yolox_nano", "silero_vad_16k_op15", "mlperftiny_kws_dscnn")


def record(rows) -> common.Record:
    table = common.Table("numbers", ("name", "value"), [("a|b", "1.5"), ("c", "-")])
    outcome = common.Outcome(rows, (table,), ("a note",))
    machine = {"cpu": "some", "cores": 2}
    return common.Record("example", True, 3, 1, 1.25, machine, outcome)


def test_record_is_plain_json(tmp_path):
    file = str(tmp_path / "work" / "a.onnx")
    row = {"case": "a", "value": 1.5, "none": None, "file": file}
    path = record([row]).write(tmp_path, tmp_path / "work")
    found = json.loads(path.read_text())
    assert found.keys() == KEYS
    assert found["schema_version"] == common.SCHEMA_VERSION
    assert found["rows"] == [row | {"file": "a.onnx"}]
    assert {"python", "onnxruntime"} <= found["versions"].keys()
    page = path.with_suffix(".md").read_text()
    assert "| a\\|b | 1.5 |" in page
    assert "figures mean nothing" in page


def test_record_refuses_numbers_that_json_lacks(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record([{"value": math.inf}]).write(tmp_path, tmp_path)


def test_table_aligns_figures_right():
    table = common.Table("t", ("name", "value"), [("a", "1"), ("bb", "100")])
    assert table.text().splitlines()[3:] == ["a         1", "bb      100"]


def test_absent_models_are_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "SHARED", tmp_path)
    with pytest.raises(common.SkippedError, match="absent"):
        common.model_path("any")


def test_child_returns_value_and_memory():
    found = common.run_child("json:loads", s="[1, 2]")
    assert found.value == [1, 2]
    assert 10**6 < found.peak_rss < 10**9


def test_child_that_fails_says_why():
    with pytest.raises(common.ChildError, match="JSONDecodeError"):
        common.run_child("json:loads", s="[")


def test_memory_watch_sees_a_block_and_not_what_was_before():
    big = np.ones(20_000_000)
    with child.MemoryWatch() as before:
        small = np.ones(1000)
    del big
    with child.MemoryWatch() as after:
        small += 1
    if not before.resident or not child.read_status(child._STATUS, "VmHWM"):
        pytest.skip("this kernel does not tell")
    assert before.resident - after.resident > 100_000_000


def test_jobs_come_back_in_order_and_failures_too(tmp_path):
    texts = ("[1]", "[", "[3]")
    jobs = [common.Job("json:loads", {"s": text}) for text in texts]
    first, failed, last = common.run_jobs(jobs, workers=2, kept=tmp_path / "answers")
    assert first.value == [1]
    assert last.value == [3]
    assert isinstance(failed, common.ChildError)


def test_kept_answers_are_not_asked_again(tmp_path):
    job = common.Job("time:time_ns", {})
    first, again = (common.run_jobs([job], workers=1, kept=tmp_path)[0] for _ in range(2))
    assert first == again
    (other,) = common.run_jobs([job], workers=1, kept=tmp_path / "other")
    assert other.value > first.value


def test_child_is_ended_after_its_time():
    with pytest.raises(common.ChildError, match="ended after 1 s"):
        common.run_child("benchmarks.common:command", timeout_s=1)


def test_lost_points_are_paired_by_sample():
    original = "1" * 90 + "0" * 10
    same = common.paired_interval([original] * 3, original)
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}
    worse = "0" * 10 + "1" * 80 + "0" * 10
    lost = common.paired_interval([original, worse], original)
    assert lost["value"] == pytest.approx(0.05)
    # Lost on other samples than those gained on: the same mean, and an interval around it.
    moved = "0" * 10 + "1" * 90
    swapped = common.paired_interval([moved], original)
    assert swapped["value"] == pytest.approx(0.0)
    # Standard error of the mean of ten +1, ten -1 and zeros: sqrt(0.2 / 100); 2,000 resamples.
    width = (swapped["high"] - swapped["low"]) / 2
    assert width == pytest.approx(1.96 * (0.2 / 100) ** 0.5, rel=0.15)


def test_bundled_model_has_new_samples():
    fit, new = (data.samples(common.DIGITS, part, labels=True) for part in ("fit", "new"))
    assert len(fit["labels"]) == 512
    assert len(new["labels"]) == 797
    assert "labels" not in data.samples(common.DIGITS, "fit")
    fitted = {image.tobytes() for image in fit["input"]}
    repeated = sum(image.tobytes() in fitted for image in new["input"])
    assert repeated == 0


def test_every_model_has_samples(shared):
    assert data.names() == sorted([*common.manifest(), common.DIGITS])


@pytest.mark.parametrize("name", QUICK_TO_MAKE)
def test_samples_fit_and_are_disjoint(shared, name):
    inputs = load(common.model_path(name)).signature.inputs
    fit, new = (data.samples(name, part, seed=1, limit=4) for part in ("fit", "new"))
    assert as_samples(dict(fit), inputs).count == 4
    assert as_samples(dict(new), inputs).count == 4
    first = inputs[0].name
    assert not np.array_equal(fit[first], new[first])
    again = data.samples(name, "fit", seed=1, limit=4)
    assert np.array_equal(fit[first], again[first])
    other = data.samples(name, "fit", seed=2, limit=4)
    assert not np.array_equal(fit[first], other[first])


def test_large_model_is_what_it_says(tmp_path):
    path = tmp_path / "large.onnx"
    memory.build(path, conv_width=16, matmul_width=32)
    model = load(path)
    assert sum(node.op == "Conv" for node in model.nodes) == memory.CONVS
    assert sum(node.op == "MatMul" for node in model.nodes) == memory.MATMULS
    assert len(model.files) == 2


def test_shared_tensor_cases_share(tmp_path):
    readers = {}
    for case in shared_tensors.CASES:
        proto = shared_tensors.build(case)
        names = [name for node in proto.graph.node for name in node.input[1:]]
        readers[case] = max(names.count(name) for name in set(names))
    assert readers["own weight, own bias"] == 1
    assert readers["shared weight, no bias"] == shared_tensors.LAYERS
    assert readers["own weight, equal biases merged"] == shared_tensors.LAYERS + 1


def test_law_bites_on_a_wrong_model(tmp_path):
    path, out = str(tmp_path / "model.onnx"), str(tmp_path / "out.onnx")
    shared_tensors.onnx.save(shared_tensors.build("own weight, own bias"), path)
    good = shared_tensors.treat(path=path, tool="remove_channels", out=out)
    assert good["obeys"]
    original = load(path)
    weight = original.weights["w2"] * np.float32(1.001)
    wrong = shared_tensors._with_weights(path, {"w2": weight})
    found = shared_tensors._verdict(
        original, wrong, str(tmp_path / "wrong.onnx"), reference=original, shares=True
    )
    assert found["runs"]
    assert not found["obeys"]


def test_refusals_rank_by_macs():
    refusals = [
        {"where": "a", "reason": "weight 'x' has 3 readers"},
        {"where": "b", "reason": "weight 'y' has 5 readers"},
        {"where": "c", "reason": "depthwise"},
    ]
    ranked = zoo._ranked(refusals, {"a": 0.1, "c": 0.5})
    assert [(r["reason"], r["places"]) for r in ranked] == [
        ("depthwise", 1),
        ("weight '...' has N readers", 2),
    ]


def test_names_are_modules():
    for name in NAMES:
        assert (common.ROOT / "benchmarks" / f"{name}.py").exists()
