"""Time and memory of the whole search against the size of the model.

Real CIFAR ResNets, and builders at 224 x 224 whose weights are random and whose BatchNorm
statistics were measured on the pictures, so that activations keep their size.  Every case is
a process of its own, with all threads, at `--max-macs 0.5` on the target's grid; latency is
not measured.  The samples of the builders are views of COCO pictures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnxcomp
from benchmarks import data
from benchmarks.baselines import with_measured_statistics
from benchmarks.cases import build
from benchmarks.common import (
    ChildError,
    ChildRun,
    Job,
    Options,
    Outcome,
    SkippedError,
    Table,
    count,
    percent,
    run_jobs,
    shared_folder,
)
from benchmarks.pictures import Views

CASES: tuple[tuple[str, int], ...] = (
    ("akamaster_cifar10_resnet20", 768),  # of fewer images light copies are made
    ("akamaster_cifar10_resnet20", 2304),
    ("akamaster_cifar10_resnet56", 768),
    ("akamaster_cifar10_resnet56", 2304),
    ("resnet18_imagenet", 64),
    ("resnet18_imagenet", 256),
    ("resnet50_imagenet", 64),
    ("resnet50_imagenet", 256),
    ("vgg16_bn_imagenet", 32),
    ("vgg16_bn_imagenet", 96),
)
QUICK_CASES = (("akamaster_cifar10_resnet20", 32), ("resnet18_imagenet", 4))
SHARE = 0.5
MEMORY = 4.5e9  # bytes for activations; more than the default, so that all samples are used
QUICK_MEMORY = 6e7
GOAL = ("resnet50_imagenet", 256)
GOAL_SECONDS, GOAL_BYTES = 1200.0, 6e9
_TIMEOUT_S = 3 * 3600.0
_STATISTICS = 32  # pictures on which BatchNorm statistics are measured
_VIEWS = Views("input", ("coco", "faces"), (224, 224), mean=(123.7, 116.3, 103.5), scale=58.0)


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    if importlib.util.find_spec("torch") is None:
        raise SkippedError("torch is absent: the networks at 224 x 224 cannot be built")
    cases = QUICK_CASES if options.quick else CASES
    kept = options.work / "answers"
    builders = {
        name: str(options.work / f"{name}.onnx") for name, _ in cases if _is_builder(name)
    }
    making = [
        Job("benchmarks.scale:make", {"name": name, "out": file, "seed": options.seed})
        for name, file in builders.items()
    ]
    for answer in run_jobs(making, workers=1, kept=kept):
        if isinstance(answer, ChildError):
            raise answer
    jobs = [_job(name, images, builders.get(name, name), options) for name, images in cases]
    answers = run_jobs(jobs, workers=1, kept=kept)
    rows = [_row(*case, answer) for case, answer in zip(cases, answers, strict=True)]
    return Outcome(rows, (_table(rows),), _notes(rows, options))


def _is_builder(name: str) -> bool:
    return name.endswith("_imagenet")


def make(*, name: str, out: str, seed: int) -> None:
    """Write a builder's network with BatchNorm statistics of pictures; runs in a child."""
    build(name=name, out=out, seed=seed)
    model = onnxcomp.load(out)
    views = _VIEWS("fit", _STATISTICS, np.random.default_rng(seed))
    file = Path(out).with_suffix(".npz")
    np.savez(file, allow_pickle=False, **views)
    samples = onnxcomp.load_samples(file, model.signature.inputs)
    file.unlink()
    with_measured_statistics(model, samples).save(out)


def _job(name: str, images: int, model: str, options: Options) -> Job:
    """Write the samples of a case and return its call."""
    file = options.work / f"{name}-{images}.npz"
    if not file.exists() and _is_builder(name):
        views = _VIEWS("fit", images, np.random.default_rng(options.seed))
        np.savez(file, allow_pickle=False, **views)
    elif not file.exists():
        data.write_part(
            model=name, part="fit", file=str(file), count=images, seed=options.seed
        )
    arguments = {
        "model": model,
        "data": str(file),
        "out": str(options.work / f"{name}-{images}-small.onnx"),
        "macs": SHARE,
        "memory": QUICK_MEMORY if options.quick else MEMORY,
        "search_threads": options.threads,
        "seed": options.seed,
        "target": options.target,
    }
    return Job(
        "benchmarks.cases:compress", arguments, cores=options.threads, timeout_s=_TIMEOUT_S
    )


def _row(name: str, images: int, answer: ChildRun | ChildError) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "samples": images}
    if isinstance(answer, ChildError):
        return row | {"error": str(answer)}
    found = answer.value
    return row | {
        "params": found["original"]["params"],
        "macs": found["original"]["macs"],
        "kept": found["result"]["macs"] / found["original"]["macs"],
        "seconds": answer.seconds,
        "peak_rss": answer.peak_rss,
        "peak_anonymous": answer.peak_anonymous,
        **{key: found[key] for key in ("met", "phases", "notes")},
    }


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent a of seconds = c * size ** a, by least squares of logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        if "error" in row:
            cells.append((row["model"], str(row["samples"]), *["-"] * 5, row["error"]))
            continue
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["phases"].items())
        cells.append(
            (
                row["model"],
                str(row["samples"]),
                count(row["params"]),
                count(row["macs"]),
                percent(row["kept"]),
                f"{row['seconds']:.0f}",
                f"{count(row['peak_rss'])}B",
                phases,
            )
        )
    columns = (
        "model",
        "samples",
        "params",
        "MACs",
        "MACs kept",
        "seconds",
        "peak memory",
        "seconds by phase",
    )
    return Table(f"The whole search at --max-macs {SHARE:g}", columns, cells)


def _notes(rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    made = [row for row in rows if "error" not in row]
    memory = QUICK_MEMORY if options.quick else MEMORY
    notes = [f"{options.threads} threads; memory for activations {count(memory)}B"]
    goal = next((r for r in made if (r["model"], r["samples"]) == GOAL), None)
    if goal is not None:
        met = goal["seconds"] <= GOAL_SECONDS and goal["peak_rss"] <= GOAL_BYTES
        notes.append(
            f"{GOAL[0]} with {GOAL[1]} samples: {goal['seconds'] / 60:.1f} minutes, "
            f"{goal['peak_rss'] / 1e9:.2f} GB (goal: {GOAL_SECONDS / 60:.0f} minutes, "
            f"{GOAL_BYTES / 1e9:.0f} GB: {'met' if met else 'missed'})"
        )
    for what, key in (("parameters", "params"), ("MACs", "macs")):
        if len(made) > 1:
            sizes = [row[key] * row["samples"] for row in made]
            found = exponent(sizes, [row["seconds"] for row in made])
            notes.append(
                f"seconds grow as ({what} x samples) ** {found:.2f} over all cases"
                f"{' (goal: at most 1)' if key == 'params' else ''}"
            )
    for model in dict.fromkeys(row["model"] for row in made):
        own = [row for row in made if row["model"] == model]
        if len(own) > 1:
            found = exponent([r["samples"] for r in own], [r["seconds"] for r in own])
            notes.append(f"{model}: seconds grow as samples ** {found:.2f}")
    notes += [f"{r['model']}, {r['samples']}: {note}" for r in made for note in r["notes"]]
    return notes
