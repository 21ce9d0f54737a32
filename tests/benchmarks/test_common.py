"""Benchmarks: samples fit the models they are for, children are measured, records are JSON."""

import json
import math

import numpy as np
import pytest

from benchmarks import child, common, data, memory, shared_tensors, zoo
from benchmarks.__main__ import NAMES
from benchmarks.accuracy_curve import draw
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


@pytest.fixture
def shared():
    if not (common.SHARED / "models" / "manifest.json").exists():
        pytest.skip("../shared is absent")


def record(rows) -> common.Record:
    table = common.Table("numbers", ("name", "value"), [("a|b", "1.5"), ("c", "-")])
    outcome = common.Outcome(rows, (table,), ("a note",))
    machine = {"cpu": "some", "cores": 2}
    return common.Record("example", True, 3, 1, 1.25, machine, outcome)


def test_record_is_plain_json(tmp_path):
    path = record([{"case": "a", "value": 1.5, "none": None}]).write(tmp_path)
    found = json.loads(path.read_text())
    assert found.keys() == KEYS
    assert found["schema_version"] == common.SCHEMA_VERSION
    assert found["rows"] == [{"case": "a", "value": 1.5, "none": None}]
    assert {"python", "onnxruntime"} <= found["versions"].keys()
    page = path.with_suffix(".md").read_text()
    assert "| a\\|b | 1.5 |" in page
    assert "figures mean nothing" in page


def test_record_refuses_numbers_that_json_lacks(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record([{"value": math.inf}]).write(tmp_path)


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


def test_every_model_has_samples(shared):
    assert data.names() == sorted(common.manifest())


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


def test_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"model": "akamaster_cifar10_resnet20", "method": m, "share": s, "top1": 0.9}
        for m in ("original", "ours", "svd", "wanda", "l2")
        for s in (0.5, 1.0)
    ]
    draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_names_are_modules():
    for name in NAMES:
        assert (common.ROOT / "benchmarks" / f"{name}.py").exists()
