"""What `tune` gives back of what compression took, and what it gains on new pictures.

CIFAR-10 networks are compressed to a share of their MACs on 1,024 unlabelled training images,
widths off the grid included, and then learn from their originals: from the same images, or
from all 50,000 with their labels; both are judged once, on the 5,000 test images.  The other
models are fitted and tuned on pictures without labels, and judged by the drift of their worst
output on pictures from other files.  Every run has one thread and a time limit:
an hour with all images for ResNet-56, five minutes elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnxcomp
from benchmarks import data
from benchmarks.cases import file_of, save
from benchmarks.common import (
    ChildError,
    Job,
    Options,
    Outcome,
    Table,
    paired_interval,
    percent,
    points,
    run_child,
    run_jobs,
    shared_folder,
)

RESNET56, RESNET20 = "akamaster_cifar10_resnet56", "akamaster_cifar10_resnet20"
IMAGES, QUICK_IMAGES = 1024, 64
TRAINING_IMAGES = 50_000
FEW_S, LONG_S = 300.0, 3600.0
_OVERTIME_S = 1200.0


@dataclass(frozen=True)
class Case:
    """A compressed model and how it is tuned.

    Attributes:
        model: The original's name.
        macs: Share of its MACs that compression leaves.
        labels: Whether it learns from all training images and their labels.
        seconds: Time limit of tuning.
        goal: Points of top-1 that it may lose at most, as a share; None for no goal.
    """

    model: str
    macs: float
    labels: bool = False
    seconds: float = FEW_S
    goal: float | None = None

    @property
    def name(self) -> str:
        """What the files of this case are called."""
        return f"{self.model}-{self.macs:g}{'-labels' if self.labels else ''}"


CASES = (
    Case(RESNET56, 0.5, labels=True, seconds=LONG_S, goal=0.0),
    Case(RESNET56, 0.3, labels=True, seconds=LONG_S, goal=0.015),
    Case(RESNET56, 0.5, goal=0.005),
    Case(RESNET20, 0.5, labels=True, seconds=300.0),
    Case(RESNET20, 0.3, labels=True, seconds=300.0),
    Case(RESNET20, 0.5),
    Case("libonnx_super_resolution_10", 0.5),
    Case("kazuhito00_yolox_nano", 0.7),
    Case("linzaer_ultralight_face_RFB-320", 0.5),
)
QUICK_CASES = (Case(RESNET20, 0.5, seconds=15.0),)


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    cases = QUICK_CASES if options.quick else CASES
    small = dict.fromkeys((case.model, case.macs) for case in cases)
    made = run_jobs(
        [_compressing(model, macs, options) for model, macs in small],
        workers=options.threads,
        kept=options.work / "answers",
    )
    for answer in made:
        if isinstance(answer, ChildError):
            raise answer
    jobs = [_tuning(case, options) for case in cases]
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    rows = []
    for case, job, answer in zip(cases, jobs, answers, strict=True):
        row: dict[str, Any] = asdict(case) | {"name": case.name}
        if isinstance(answer, ChildError):
            rows.append(row | {"error": str(answer)})
        else:
            rows.append(row | dict(answer.value) | {"file": job.arguments["out"]})
    for model in dict.fromkeys(case.model for case in cases):
        _judge(model, [row for row in rows if row["model"] == model], options)
    return Outcome(rows, (_table(rows),), _notes(rows))


def training_file(model: str, options: Options) -> str:
    """Return the file of all training images with their labels."""
    file = options.work / f"{model}.labelled.npz"
    count = QUICK_IMAGES if options.quick else TRAINING_IMAGES
    if not file.exists():
        name, seed = str(file), options.seed
        data.write_part(
            model=model, part="fit", file=name, seed=seed, count=count, labels=True
        )
    return str(file)


def fitting_file(model: str, options: Options) -> str:
    """Return the file of samples to fit on, without labels."""
    file = options.work / f"{model}.fit.npz"
    count = IMAGES if model in (RESNET56, RESNET20) else None
    count = QUICK_IMAGES if options.quick else count
    data.ensure_part(model, "fit", file, count, options.seed)
    return str(file)


def _compressing(model: str, macs: float, options: Options) -> Job:
    arguments = {
        "model": model,
        "data": fitting_file(model, options),
        "out": str(options.work / f"{model}-{macs:g}.onnx"),
        "macs": macs,
        "grid": "off",
        "seed": options.seed,
        "target": options.target,
        "force": True,
    }
    return Job("benchmarks.cases:compress", arguments, timeout_s=_OVERTIME_S)


def _tuning(case: Case, options: Options) -> Job:
    arguments = {
        "model": str(options.work / f"{case.model}-{case.macs:g}.onnx"),
        "teacher": case.model,
        "data": (training_file if case.labels else fitting_file)(case.model, options),
        "out": str(options.work / f"{case.name}-tuned.onnx"),
        "seconds": case.seconds,
        "seed": options.seed,
        "labels": case.labels,
    }
    return Job("benchmarks.tune:tune", arguments, timeout_s=case.seconds + _OVERTIME_S)


def tune(
    *, model: str, teacher: str, data: str, out: str, seconds: float, **tuning: Any
) -> dict[str, Any]:
    """Tune a model file, as `Tuning` says, and save it; runs in a child."""
    student, original = onnxcomp.load(model), onnxcomp.load(file_of(teacher))
    samples = onnxcomp.load_samples(data, student.signature.inputs)
    start = time.monotonic()
    how = onnxcomp.Tuning(**tuning)
    found = onnxcomp.tune(student, original, samples, how, time_limit=seconds)
    save(found.model, out)
    return {
        "samples": samples.count,
        "tuned_s": time.monotonic() - start,
        "epochs": found.epochs,
        "history": [asdict(epoch) for epoch in found.history],
        "loss": {"before": found.before, "after": found.after},
        "notes": list(found.notes),
    }


def _judge(model: str, rows: list[dict[str, Any]], options: Options) -> None:
    """Add accuracy and drift on new samples, before and after, of all cases of a model."""
    rows = [row for row in rows if "file" in row]
    before = [str(options.work / f"{model}-{row['macs']:g}.onnx") for row in rows]
    pairs = list(zip(before, (row.pop("file") for row in rows), strict=True))
    for row, seen in zip(rows, before_and_after(model, pairs, options), strict=True):
        row |= seen


def before_and_after(
    model: str, pairs: Sequence[tuple[str, str]], options: Options
) -> list[dict[str, Any]]:
    """Judge files before and after training once, on new samples.

    Args:
        model: The original's name.
        pairs: File before and file after.
        options: Those of the run.

    Returns:
        For every pair `drift_before`, `top1_before`, `lost_before` (against the original, with
        its interval; None without labels), and the same `_after`.
    """
    new = data.sample_file(options.work, model, "new")
    data.ensure_part(model, "new", new, 500 if options.quick else None, options.seed)
    labelled = model in (RESNET56, RESNET20)
    files = [file for pair in pairs for file in pair]
    original, *judged = run_child(
        "benchmarks.cases:judge", model=model, files=files, data=str(new), each=labelled
    ).value
    found = []
    for start in range(0, len(judged), 2):
        row: dict[str, Any] = {}
        for when, seen in zip(("before", "after"), judged[start : start + 2], strict=True):
            row[f"drift_{when}"], row[f"top1_{when}"] = seen["relative_l2"], seen["top1"]
            row[f"lost_{when}"] = (
                paired_interval([seen["right"]], original["right"], seed=options.seed)
                if labelled
                else None
            )
        found.append(row)
    return found


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("model", "MACs left", "learns from", "minutes", "epochs", "drift before")
    columns += ("after", "points lost before", "after", "top-1 after")
    cells = []
    for row in rows:
        head = (row["model"], percent(row["macs"], 0))
        if "error" in row:
            cells.append((*head, row["error"], *["-"] * 7))
            continue
        kind = "labelled" if row["labels"] else "unlabelled"
        cells.append(
            (
                *head,
                f"{row['samples']:,} {kind}",
                f"{row['tuned_s'] / 60:.0f}",
                f"{row['epochs']:.3g}",
                f"{row['drift_before']:.4f}",
                f"{row['drift_after']:.4f}",
                points(row["lost_before"]),
                points(row["lost_after"]),
                percent(row["top1_after"], 2),
            )
        )
    return Table("Before and after tuning, on new samples", columns, cells)


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        if row["goal"] is not None and "lost_after" in row:
            verdict = "met" if row["lost_after"]["value"] <= row["goal"] else "missed"
            notes.append(
                f"{row['name']}: {points(row['lost_after'])} points lost, "
                f"goal {100 * row['goal']:g}: {verdict}"
            )
    return notes
