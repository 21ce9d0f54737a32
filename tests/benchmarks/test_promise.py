"""Promises: who is promised what, and when a promise counts as kept."""

from benchmarks import common, promise
from benchmarks.promise import Promise


def test_every_model_gets_a_promise(shared):
    found = promise._promises(quick=False)
    assert {p.model for p in found} == {*common.manifest(), common.DIGITS}
    drops = [(p.model, p.labels) for p in found if p.limit == "drop"]
    assert sorted(drops) == sorted((m, b) for m in promise.LABELLED for b in (True, False))
    assert len({p.name for p in found}) == len(found)


def test_what_is_promised_is_what_is_judged():
    row = {"relative_l2": 0.2, "lost": {"value": 0.004}, "disagreement": 0.03}
    assert promise._found(Promise("any", "drift", False), row) == 0.2
    assert promise._found(Promise("any", "drop", True), row) == 0.004
    assert promise._found(Promise("any", "drop", False), row) == 0.03


def test_a_failed_search_keeps_no_promise(tmp_path):
    options = common.Options(True, 0, 1, tmp_path, tmp_path)
    case = Promise(common.DIGITS, "drop", True)
    row = promise._row(case, common.ChildError("it ended"), options)
    assert not row["kept"]
    assert "it ended" in promise._table([row]).text()
    assert "0 of 1" in promise._notes([row], options)[0]


def test_original_itself_keeps_its_promise(tmp_path):
    """The whole row, with the original in the place of the result."""
    options = common.Options(True, 0, 1, tmp_path, tmp_path)
    case = Promise(common.DIGITS, "drop", True)
    job = promise._job(case, options)
    assert job.arguments["drop"] == promise.DROP
    assert job.arguments["metric"] == "top1"
    out = tmp_path / f"{case.name}.onnx"
    out.write_bytes(common.model_path(common.DIGITS).read_bytes())
    figures = {"macs": 10, "params": 10, "file_bytes": 10}
    value = {"original": figures, "result": figures, "samples": 96, "holdout": None}
    value |= {"met": True, "seconds": 1.0, "phases": {}, "notes": []}
    row = promise._row(case, common.ChildRun(value, 1.0, 0, 0, 0), options)
    assert row["kept"]
    assert row["found"] == 0
    assert (row["fitted"], row["new"]) == (96, promise.QUICK_SAMPLES)
