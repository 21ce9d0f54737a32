"""Accuracy against the whole packed file, no training: `compress -o small.onnxc --max-size`.

ResNet-56 is made to fit shares of its float file three ways: with its weights on few levels
alone, with its structure alone (channels and ranks, packed without loss), and with both in
one search.  512 unlabelled training images; judged once on the 5,000 test images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import data
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

MODEL, QUICK_MODEL = "akamaster_cifar10_resnet56", "akamaster_cifar10_resnet20"
SIZES = (0.25, 0.12, 0.08, 0.054, 0.04)
STRUCTURE = ("remove_channels", "factorize", "factorize_jointly")
METHODS = {
    "levels": ("share_weights",),
    "structure": STRUCTURE,
    "both": (*STRUCTURE, "share_weights"),
}
LARGEST_ONLY = 2  # sizes at which structure alone is tried; below, nothing is left of it
IMAGES, QUICK_IMAGES = 512, 64
GOALS = {0.12: 0.003}
"""Points that ResNet-56 may lose without training, by share of the float file."""
_TIMEOUT_S = 3600.0


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    model = QUICK_MODEL if options.quick else MODEL
    cases = [
        (model, size, way)
        for index, size in enumerate(SIZES[1:2] if options.quick else SIZES)
        for way in METHODS
        if way != "structure" or index < LARGEST_ONLY
    ]
    jobs = [job(*case, options) for case in cases]
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    rows: list[dict[str, Any]] = []
    for (_, size, way), asked, answer in zip(cases, jobs, answers, strict=True):
        row: dict[str, Any] = {"model": model, "limit": size, "way": way}
        if isinstance(answer, ChildError):
            rows.append(row | {"error": str(answer)})
            continue
        found = answer.value
        share = found["result"]["file_bytes"] / found["original"]["file_bytes"]
        row |= {key: found[key] for key in ("met", "seconds", "notes", "kinds")}
        row |= {"file": str(asked.arguments["out"]), "share": share}
        rows.append(row | {"file_bytes": found["result"]["file_bytes"]})
    judge(model, [row for row in rows if "file" in row], options)
    return Outcome(rows, (_table(rows),), _notes(rows))


def job(model: str, size: float, way: str, options: Options) -> Job:
    """Return the call that makes a file of a size in one of the `METHODS`."""
    arguments = {
        "model": model,
        "data": fitting_file(model, options),
        "out": str(options.work / f"{model}-{size:g}-{way}.onnxc"),
        "size": size,
        "methods": list(METHODS[way]),
        "emit": "onnxc",
        "seed": options.seed,
        "target": options.target,
        "force": True,
    }
    return Job("benchmarks.cases:compress", arguments, timeout_s=_TIMEOUT_S)


def fitting_file(model: str, options: Options) -> str:
    """Return the file of unlabelled samples to fit on."""
    fit = options.work / f"{model}.fit.npz"
    count = QUICK_IMAGES if options.quick else IMAGES
    data.ensure_part(model, "fit", fit, count, options.seed)
    return str(fit)


def judge(model: str, rows: list[dict[str, Any]], options: Options) -> None:
    """Add to rows that name a `file` what it loses on new samples; remove the files."""
    new = data.sample_file(options.work, model, "new")
    data.ensure_part(model, "new", new, 500 if options.quick else None, options.seed)
    files = [row["file"] for row in rows]
    original, *judged = run_child(
        "benchmarks.cases:judge", model=model, files=files, data=str(new), each=True
    ).value
    for row, seen in zip(rows, judged, strict=True):
        row |= {"top1": seen["top1"], "relative_l2": seen["relative_l2"], "lost": None}
        if "right" in seen:
            row["lost"] = paired_interval(
                [seen["right"]], original["right"], seed=options.seed
            )
        elif seen["reconstruction"] is not None:
            row["error_ratio"] = seen["reconstruction"] / original["reconstruction"]
        Path(row.pop("file")).unlink()


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ("model", "limit", "way", "file", "bytes", "top-1", "points lost", "seconds")
    cells = [
        (
            row["model"],
            percent(row["limit"]),
            row["way"],
            *(
                (row["error"], *["-"] * 4)
                if "error" in row
                else (
                    percent(row["share"], 2) + ("" if row["met"] else " (limit not met)"),
                    f"{row['file_bytes']:,}",
                    percent(row["top1"], 2),
                    points(row["lost"]),
                    f"{row['seconds']:.0f}",
                )
            ),
        )
        for row in rows
    ]
    return Table("Packed files, no training; shares of the float file", columns, cells)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        goal = GOALS.get(row["limit"])
        if row["model"] == MODEL and row["way"] == "both" and goal and "lost" in row:
            verdict = "met" if row["lost"]["value"] <= goal else "missed"
            notes.append(
                f"{row['model']} at {percent(row['limit'], 0)} of its file: "
                f"{points(row['lost'])} points lost, goal {100 * goal:g}: {verdict}"
            )
    return notes
