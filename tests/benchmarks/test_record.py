"""The record: what is asked for, and how means, intervals and verdicts come from runs."""

import pytest

from benchmarks import record, record_tables

COUNT = 1000


def original(right=900):
    return {
        "right": "1" * right + "0" * (COUNT - right),
        "top1": right / COUNT,
        "median_ms": 2.0,
        "control": {"value": 1.0, "low": 0.99, "high": 1.01},
    }


def runs(limit, rights, *, model=record.RESNET56, images=record.IMAGES, grid="off"):
    """Return rows as `record` makes them, one per seed."""
    return [
        {
            "row": "run",
            "model": model,
            "method": f"onnxcomp_{grid}",
            "images": images,
            "grid": grid,
            "limit": list(limit),
            "seed": seed,
            "macs": 0.5,
            "params": 0.6,
            "file_bytes": 0.6,
            "table_seconds": 10.0,
            "plan_seconds": 5.0,
            "walk_seconds": 2.0,
            "peak_rss": 10**9,
            "right": "1" * right + "0" * (COUNT - right),
            "top1": right / COUNT,
            **({"ratio": {"value": 1.7, "low": 1.6, "high": 1.8}} if seed == 0 else {}),
        }
        for seed, right in enumerate(rights)
    ]


def test_all_that_is_asked_for_is_run(shared):
    asked = {
        (case.model, case.images, case.grid, *limit)
        for case in record._cases(quick=False)
        for limit in case.limits
    }
    assert record_tables.GOALS.keys() <= asked
    assert {(m, 1024, g, "macs", s) for m in record.MODELS for g in record.GRIDS
            for s in record.SHARES} <= asked  # fmt: skip
    seeds = {(c.model, c.images, c.grid): [] for c in record._cases(quick=False)}
    for case in record._cases(quick=False):
        seeds[case.model, case.images, case.grid].append(case.seed)
    assert all(found == list(record.SEEDS) for found in seeds.values())
    others = {(model, method) for model, method, *_ in record._others(quick=False)}
    assert {(record.RESNET56, m) for m in (*record.figures.OTHERS, "l2", "wanda")} <= others


def test_every_file_is_written_once(shared, tmp_path):
    files = [
        record._model_file(case.stem(tmp_path), limit)
        for case in record._cases(quick=False)
        for limit in case.limits
    ]
    files += [
        record._other_file(*other[:3], tmp_path) for other in record._others(quick=False)
    ]
    assert len(set(files)) == len(files)


def test_means_are_over_the_seeds():
    rows = runs(("macs", 0.5), (899, 897, 895))
    (found,) = record_tables.summaries(rows, {record.RESNET56: original()})
    assert found["lost"]["value"] == pytest.approx(0.003)
    assert found["lost"]["low"] < 0.003 < found["lost"]["high"]
    assert found["lost_deviation"] == pytest.approx(0.002)
    assert found["seeds"] == 3
    assert found["goal"] == 0.003
    assert found["ratio"]["value"] == 1.7


@pytest.mark.parametrize(
    ("limit", "grid", "right", "verdict"),
    [
        (("macs", 0.5), "off", 897, "0.3: met"),
        (("macs", 0.5), "off", 896, "0.3: missed"),
        (("macs", 0.5), "auto", 897, "-"),
        (("max_latency", 0.62), "auto", 895, "0.5, 1.6x: met"),
        (("max_latency", 0.5), "auto", 899, "2.0, 2x: missed"),  # 1.7 times as fast
    ],
)
def test_verdicts(limit, grid, right, verdict):
    rows = runs(limit, (right,) * 3, grid=grid)
    (found,) = record_tables.summaries(rows, {record.RESNET56: original()})
    assert record_tables._verdict(found) == verdict


def test_tables_and_notes_name_every_case():
    rows = runs(("macs", 0.5), (899, 897, 895)) + runs(
        ("max_latency", 0.5), (880,), grid="auto"
    )
    originals = {record.RESNET56: original()}
    means = record_tables.summaries(rows, originals)
    text = record_tables.table(means).text()
    assert "MACs 0.5" in text
    assert "time 0.5" in text
    assert "time" not in record_tables.others_table(means).text()
    failed = {**rows[0], "error": "it failed"}
    notes = record_tables.notes([*rows, failed], means, originals)
    assert notes[0] == "goals met: 1 of 2"
    assert any("it failed" in note for note in notes)
