"""Promised against found: `--max-drop 1%` where there are labels, `--max-drift 0.1` elsewhere.

Every model is compressed in a process of its own, two side by side, within a time limit and
with latency measured, as a user would; then it is judged on new samples, which come from other
files.  Where there are labels the search gets those of the images that it fits on, and once
more none: what it then promises is disagreement with the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.common import (
    DIGITS,
    ChildError,
    ChildRun,
    Job,
    Options,
    Outcome,
    Table,
    interval,
    manifest,
    model_path,
    paired_interval,
    percent,
    points,
    run_child,
    run_jobs,
)

LABELLED = (
    "akamaster_cifar10_resnet56",
    "akamaster_cifar10_resnet20",
    "mlperftiny_cifar10_resnet8",
    DIGITS,
    "libonnx_mnist_8",
)
DROP, DRIFT = 0.01, 0.1
GOAL = 0.9
TIME_LIMIT_S, QUICK_TIME_LIMIT_S = 240.0, 20.0
LATENCY_SECONDS = 20.0
FIT = dict.fromkeys(LABELLED[:3], 1024)
FIT_AT_LEAST, NEW_AT_LEAST, NEW_LABELLED = 64, 32, 5000
QUICK_MODELS = (DIGITS, "mlperftiny_ad01_autoencoder")
QUICK_SAMPLES = 96
_OVERTIME = 2.0  # times the limit, after which a process is ended


@dataclass(frozen=True)
class Promise:
    """A limit on what may be lost, and whether the search sees labels."""

    model: str
    limit: str
    labels: bool

    @property
    def value(self) -> float:
        """The limit's value."""
        return DROP if self.limit == "drop" else DRIFT

    @property
    def name(self) -> str:
        """What the files of this case are called."""
        return f"{self.model}-{self.limit}{'-labels' if self.labels else ''}"

    @property
    def text(self) -> str:
        """The promise in words."""
        if self.limit == "drift":
            return f"drift {self.value:g}"
        what = "top-1 drop" if self.labels else "disagreement"
        return f"{what} {percent(self.value, 0)}"


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    promises = _promises(options.quick)
    jobs = [_job(promise, options) for promise in promises]
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    rows = [
        _row(promise, answer, options)
        for promise, answer in zip(promises, answers, strict=True)
    ]
    return Outcome(rows, (_table(rows),), _notes(rows, options))


def _promises(quick: bool) -> list[Promise]:
    """Return all cases; those of most images first, as they take longest."""
    rest = [name for name in sorted(manifest()) if name not in LABELLED]
    found = [Promise(name, "drop", labels) for name in LABELLED for labels in (True, False)]
    found += [Promise(name, "drift", False) for name in rest]
    return [promise for promise in found if not quick or promise.model in QUICK_MODELS]


def _job(promise: Promise, options: Options) -> Job:
    """Write the samples of a case and return its call."""
    fit, new = (_file(promise, part, options.work) for part in ("fit", "new"))
    limit = QUICK_SAMPLES if options.quick else None
    model = promise.model
    fitted = max(FIT.get(model, data.usual_count(model, "fit")), FIT_AT_LEAST)
    judged = max(data.usual_count(model, "new"), NEW_AT_LEAST)
    if not fit.exists():
        data.write_part(
            model=model,
            part="fit",
            file=str(fit),
            seed=options.seed,
            limit=limit,
            count=fitted,
            labels=promise.labels,
        )
    if not new.exists():
        count = NEW_LABELLED if model in LABELLED else judged
        data.write_part(
            model=model,
            part="new",
            file=str(new),
            seed=options.seed,
            limit=limit,
            count=count,
        )
    time_limit = QUICK_TIME_LIMIT_S if options.quick else TIME_LIMIT_S
    arguments = {
        "model": model,
        "data": str(fit),
        "out": str(options.work / f"{promise.name}.onnx"),
        promise.limit: promise.value,
        "metric": "top1" if promise.labels else None,
        "time_limit": time_limit,
        "latency": True,
        "seed": options.seed,
        "target": options.target,
    }
    timeout = _OVERTIME * time_limit + 60
    return Job("benchmarks.cases:compress", arguments, timeout_s=timeout)


def _file(promise: Promise, part: data.Part, folder: Path) -> Path:
    if part == "new":
        return data.sample_file(folder, promise.model, part)
    return folder / f"{promise.name}.fit.npz"


def _row(promise: Promise, answer: ChildRun | ChildError, options: Options) -> dict[str, Any]:
    """Judge one result on new samples and time it."""
    row: dict[str, Any] = {
        "model": promise.model,
        "promise": promise.text,
        "promised": promise.value,
        "labels": promise.labels,
        "kept": False,
    }
    if isinstance(answer, ChildError):
        return row | {"error": str(answer)}
    found = answer.value
    before, after = found["original"], found["result"]
    out = str(options.work / f"{promise.name}.onnx")
    new = str(_file(promise, "new", options.work))
    drop = promise.limit == "drop"
    original, judged = run_child(
        "benchmarks.cases:judge", model=promise.model, files=[out], data=new, each=drop
    ).value
    timed = run_child(
        "benchmarks.cases:latency",
        models=[str(model_path(promise.model)), out],
        data=new,
        seconds=3.0 if options.quick else LATENCY_SECONDS,
    ).value
    row |= {
        "fitted": found["samples"],
        "new": judged["samples"],
        "holdout": found["holdout"],
        "relative_l2": judged["relative_l2"],
        **{key: after[key] / max(before[key], 1) for key in ("macs", "params", "file_bytes")},
        "ratio": timed[1]["ratio"],
        "control": timed[-1]["ratio"],
        **{key: found[key] for key in ("met", "seconds", "phases", "notes")},
        "peak_rss": answer.peak_rss,
    }
    if drop:
        row["lost"] = paired_interval([judged["right"]], original["right"])
        row["disagreement"] = 1 - judged["agreement"]
    row["found"] = _found(promise, row)
    return row | {"kept": row["found"] <= promise.value}


def _found(promise: Promise, row: dict[str, Any]) -> float:
    """Return what was promised, as found on new samples."""
    if promise.limit == "drift":
        return float(row["relative_l2"])
    return float(row["lost"]["value"] if promise.labels else row["disagreement"])


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        if "error" in row:
            cells.append((row["model"], row["promise"], *["-"] * 9, row["error"]))
            continue
        drifts = row["promise"].startswith("drift")
        cells.append(
            (
                row["model"],
                row["promise"],
                str(row["fitted"]),
                str(row["new"]),
                f"{row['found']:.3f}" if drifts else percent(row["found"], 2),
                points(row.get("lost")),
                "yes" if row["kept"] else "no",
                percent(row["macs"]),
                percent(row["file_bytes"]),
                interval(row["ratio"]),
                f"{row['control']['value']:.2f}",
                f"{row['seconds']:.0f}",
            )
        )
    columns = (
        "model",
        "promise",
        "given",
        "new",
        "found",
        "points lost [95 %]",
        "kept",
        "MACs",
        "bytes",
        "speedup",
        "A/A",
        "seconds",
    )
    return Table("Promised, and found on new samples", columns, cells)


def _notes(rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    kept = sum(row["kept"] for row in rows)
    made = [row for row in rows if "error" not in row]
    faster = sum(row["ratio"]["low"] > 1 for row in made)
    changed = [row for row in made if row["macs"] < 1]
    seconds = QUICK_TIME_LIMIT_S if options.quick else TIME_LIMIT_S
    verdict = "met" if kept >= GOAL * len(rows) else "missed"
    return [
        f"promises kept on new samples: {kept} of {len(rows)} (goal: nine of ten, {verdict}); "
        f"of the {len(changed)} models that were made smaller: "
        f"{sum(row['kept'] for row in changed)}; {faster} are faster beyond the interval",
        "given: samples that the search got, of which it holds some out; new: samples from "
        "other files; found: what was promised, on the new ones; seconds: of the search",
        f"time limit of each search: {seconds:g} s, one thread, {options.threads} searches "
        "side by side; latency afterwards, alone",
        *(
            f"{row['model']}, {row['promise']}: {note}"
            for row in made
            for note in row["notes"]
        ),
        *(
            f"{model}: {data.NOTES[model]}"
            for model in dict.fromkeys(row["model"] for row in rows)
            if model in data.NOTES
        ),
    ]
