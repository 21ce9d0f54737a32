"""Accuracy against the whole packed file, after training: what codebooks learn.

ResNet-56 with its weights on few levels, as `packed` makes it, learns from the original on all
50,000 training images with their labels, for half an hour on one thread: zeros stay zero, and
every level is one parameter.  Judged once on the 5,000 test images, before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import packed, tune
from benchmarks.common import (
    ChildError,
    Job,
    Options,
    Outcome,
    Table,
    model_path,
    percent,
    points,
    run_jobs,
    shared_folder,
)

SIZES = (0.054, 0.04)
TUNED_S, QUICK_TUNED_S = 1800.0, 15.0
GOAL, GOAL_SIZE = 0.0, 0.0544
_OVERTIME_S = 1200.0


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    model = packed.QUICK_MODEL if options.quick else packed.MODEL
    seconds = QUICK_TUNED_S if options.quick else TUNED_S
    sizes = SIZES[:1] if options.quick else SIZES
    made = [packed.job(model, size, "levels", options) for size in sizes]
    jobs = [_tuning(model, job, seconds, options) for job in made]
    rows: list[dict[str, Any]] = []
    for step in (made, jobs):
        answers = run_jobs(step, workers=options.threads, kept=options.work / "answers")
        for size, job, answer in zip(sizes, step, answers, strict=True):
            if isinstance(answer, ChildError):
                raise answer
            rows.append({"model": model, "limit": size} | _row(job, answer.value))
    packed.judge(model, rows, options)
    rows.sort(key=lambda row: (-row["limit"], row["tuned"]))
    return Outcome(rows, (_table(rows),), _notes(rows))


def _tuning(model: str, made: Job, seconds: float, options: Options) -> Job:
    file = Path(made.arguments["out"])
    arguments = {
        "model": str(file),
        "teacher": model,
        "data": tune.training_file(model, options),
        "out": str(file.with_name(f"{file.stem}-tuned.onnxc")),
        "labels": True,
        "seconds": seconds,
        "seed": options.seed,
    }
    return Job("benchmarks.tune:tune", arguments, timeout_s=seconds + _OVERTIME_S)


def _row(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a file before it is judged."""
    file = Path(job.arguments["out"])
    whole = model_path(job.arguments.get("teacher", job.arguments["model"])).stat().st_size
    size = file.stat().st_size
    row = {"file": str(file), "file_bytes": size, "share": size / whole}
    tuned = "tuned_s" in found
    seconds = found["tuned_s"] if tuned else found["seconds"]
    return row | {"tuned": tuned, "epochs": found.get("epochs", []), "seconds": seconds}


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ("model", "limit", "tuned", "file", "bytes", "top-1", "points lost", "minutes")
    cells = [
        (
            row["model"],
            percent(row["limit"]),
            "yes" if row["tuned"] else "no",
            percent(row["share"], 2),
            f"{row['file_bytes']:,}",
            percent(row["top1"], 2),
            points(row["lost"]),
            f"{row['seconds'] / 60:.0f}",
        )
        for row in rows
    ]
    return Table("Packed files before and after training", columns, cells)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        if row["tuned"] and row["model"] == packed.MODEL and row["share"] <= GOAL_SIZE:
            verdict = "met" if row["lost"]["value"] <= GOAL else "missed"
            notes.append(
                f"{percent(row['share'], 2)} of the file: {points(row['lost'])} points lost, "
                f"goal {100 * GOAL:g} at {percent(GOAL_SIZE, 2)}: {verdict}"
            )
    return notes
