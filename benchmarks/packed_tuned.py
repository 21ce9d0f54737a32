"""Quality against the whole packed file, after training: what codebooks learn.

Networks with their weights on few levels, as `packed` makes them, learn from their originals:
zeros stay zero, and every level is one parameter.  ResNet-56 learns on all 50,000 training
images with their labels, for twenty minutes on one thread, and is judged once on the 5,000
test images.  The autoencoder, whose weights are all in dense layers, learns on the 512 samples
that it was fitted on, and is judged by the mean squared error of what it reconstructs of new
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
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

AUTOENCODER = "mlperftiny_ad01_autoencoder"
SIZES = {AUTOENCODER: (0.12, 0.054, 0.025, 0.0175), packed.MODEL: (0.054, 0.04)}
SECONDS = {AUTOENCODER: 120.0, packed.MODEL: 1200.0}
QUICK_SECONDS = 15.0
GOAL, GOAL_SIZE = 0.0, 0.0544
_OVERTIME_S = 1200.0


@dataclass(frozen=True)
class _Case:
    """A packed model, how it is made and how it is tuned."""

    model: str
    size: float
    made: Job
    tuned: Job


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    sizes = {packed.QUICK_MODEL: (SIZES[packed.MODEL][0],)} if options.quick else SIZES
    cases = [_case(model, size, options) for model in sizes for size in sizes[model]]
    rows: list[dict[str, Any]] = []
    for jobs in ([case.made for case in cases], [case.tuned for case in cases]):
        answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
        for case, job, answer in zip(cases, jobs, answers, strict=True):
            if isinstance(answer, ChildError):
                raise answer
            rows.append(_row(case, job, answer.value))
    for model in sizes:
        packed.judge(model, [row for row in rows if row["model"] == model], options)
    rows.sort(key=lambda row: (row["model"], -row["limit"], row["tuned"]))
    return Outcome(rows, (_table(rows),), _notes(rows))


def _case(model: str, size: float, options: Options) -> _Case:
    made = packed.job(model, size, "levels", options)
    file, labelled = Path(made.arguments["out"]), model in (packed.MODEL, packed.QUICK_MODEL)
    seconds = QUICK_SECONDS if options.quick else SECONDS[model]
    samples = tune.training_file if labelled else packed.fitting_file
    arguments = {
        "model": str(file),
        "teacher": model,
        "data": samples(model, options),
        "out": str(file.with_name(f"{file.stem}-tuned.onnxc")),
        "labels": labelled,
        "seconds": seconds,
        "seed": options.seed,
    }
    tuned = Job("benchmarks.tune:tune", arguments, timeout_s=seconds + _OVERTIME_S)
    return _Case(model, size, made, tuned)


def _row(case: _Case, job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a file before it is judged."""
    file, tuned = Path(job.arguments["out"]), job is case.tuned
    size = file.stat().st_size
    return {
        "model": case.model,
        "limit": case.size,
        "file": str(file),
        "file_bytes": size,
        "share": size / model_path(case.model).stat().st_size,
        "tuned": tuned,
        "epochs": found["epochs"] if tuned else 0.0,
        "seconds": found["tuned_s" if tuned else "seconds"],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ("model", "limit", "epochs", "file", "bytes", "drift", "points lost", "error")
    columns += ("minutes",)
    cells = [
        (
            row["model"],
            percent(row["limit"]),
            f"{row['epochs']:.3g}" if row["tuned"] else "not tuned",
            percent(row["share"], 2),
            f"{row['file_bytes']:,}",
            f"{row['relative_l2']:.4f}",
            points(row["lost"]),
            f"{row['error_ratio']:.3f}x" if "error_ratio" in row else "-",
            f"{row['seconds'] / 60:.0f}",
        )
        for row in rows
    ]
    return Table("Packed files before and after training", columns, cells)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = ["error: that of the reconstruction, over the original's"]
    for row in rows:
        if row["tuned"] and row["model"] == packed.MODEL and row["share"] <= GOAL_SIZE:
            verdict = "met" if row["lost"]["value"] <= GOAL else "missed"
            notes.append(
                f"{percent(row['share'], 2)} of the file: {points(row['lost'])} points lost, "
                f"goal {100 * GOAL:g} at {percent(GOAL_SIZE, 2)}: {verdict}"
            )
    return notes
