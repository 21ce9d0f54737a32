"""CIFAR-10 after training: top-1 by MACs and by latency, three seeds, against simpler methods.

A seed draws 1,024 unlabelled training images (once also 64) and is the seed of the search.
For every network, seed and grid one fresh process measures one table of losses, from which all
limits' models are made; two processes run side by side, with one thread each.  All models are
judged once, at the end, on the 5,000 test images; those of the first seed are then timed on
one thread, interleaved with the original.  The other methods get the
first seed's images of ResNet-56.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import data, figures
from benchmarks.cases import compress
from benchmarks.common import (
    ChildError,
    ChildRun,
    Job,
    Options,
    Outcome,
    SkippedError,
    manifest,
    model_path,
    run_child,
    run_jobs,
    shared_folder,
    versions,
)
from benchmarks.record_tables import (
    FEW_IMAGES,
    IMAGES,
    RESNET20,
    RESNET56,
    notes,
    others_table,
    summaries,
    table,
)

QUICK_MODEL = "mlperftiny_cifar10_resnet8"
MODELS = (RESNET56, RESNET20, QUICK_MODEL)
SEEDS = (0, 1, 2)
GRIDS = ("off", "auto")
SHARES = (0.7, 0.5, 0.4, 0.3)
LATENCIES = (0.62, 0.5)
QUICK_IMAGES = 500  # to judge on
QUICK_METHODS = ("widths", "svd", "magnitude", "l2")
QUICK_MEMORY = 3e7
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
LATENCY_SECONDS = 180.0
_TIMEOUT_S = 7200.0
Limit = tuple[str, float]


@dataclass(frozen=True)
class Case:
    """One search: a network, its images, a grid and a seed, under several limits."""

    model: str
    images: int
    grid: str
    seed: int
    limits: tuple[Limit, ...]

    def fit(self, folder: Path) -> Path:
        """Return the file of its images."""
        return folder / f"{self.model}-{self.images}-{self.seed}.npz"

    def stem(self, folder: Path) -> str:
        """Return what the files of its models begin with."""
        return str(folder / f"{self.model}-{self.images}-{self.grid}-{self.seed}")


def run(options: Options) -> Outcome:
    """Run the benchmark and draw `accuracy_curve.png` beside the results."""
    shared_folder()
    if versions()["onnxsim"] == "absent":
        raise SkippedError("onnxsim is absent: install onnxsim>=0.8")
    figures.require_matplotlib()
    cases, others = (_cases(options.quick), _others(options.quick))
    for case in cases:
        data.ensure_part(case.model, "fit", case.fit(options.work), case.images, case.seed)
    for model in dict.fromkeys(case.model for case in cases):
        few = QUICK_IMAGES if options.quick else None
        data.ensure_part(model, "new", data.sample_file(options.work, model, "new"), few)
    jobs = [_search_job(case, options) for case in cases]
    jobs += [_other_job(*other, options.work) for other in others]
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    rows = [
        row
        for case, answer in zip(cases, answers, strict=False)
        for row in _runs(case, answer, options.work)
    ]
    rows += [
        _other(*other, answer, options.work)
        for other, answer in zip(others, answers[len(cases) :], strict=True)
    ]
    models = dict.fromkeys(case.model for case in cases)
    originals = {m: _judge(m, [r for r in rows if r["model"] == m], options) for m in models}
    means = summaries(rows, originals)
    options.out.mkdir(parents=True, exist_ok=True)
    tops = {model: found["top1"] for model, found in originals.items()}
    figures.accuracy_curve(means, tops, options.out / "accuracy_curve.png")
    plain = [{k: v for k, v in row.items() if k not in ("file", "right")} for row in rows]
    tables = (table(means), others_table(means))
    return Outcome([*means, *plain], tables, notes(rows, means, originals))


def _cases(quick: bool) -> list[Case]:
    """Return all searches, the long ones first."""
    macs = tuple(("macs", share) for share in SHARES)
    times = tuple(("max_latency", share) for share in LATENCIES)
    if quick:
        return [Case(QUICK_MODEL, FEW_IMAGES, "auto", seed, macs[1:2]) for seed in SEEDS[:2]]
    found = [
        Case(m, IMAGES, grid, seed, macs + (times if (m, grid) == (RESNET56, "auto") else ()))
        for m in MODELS
        for grid in GRIDS
        for seed in SEEDS
    ]
    return found + [Case(RESNET56, FEW_IMAGES, "off", seed, macs[1:2]) for seed in SEEDS]


def _others(quick: bool) -> list[tuple[str, str, float, int]]:
    """Return network, method, sparsity or share, and images of all comparisons."""
    shares, sparsities = (SHARES[1:2], SPARSITIES[1:2]) if quick else (SHARES, SPARSITIES)
    amounts = {
        **dict.fromkeys(figures.OTHERS, shares),
        **dict.fromkeys(figures.ONNXSIM, sparsities),
    }
    return [
        (model, method, amount, FEW_IMAGES if quick else IMAGES)
        for model in ((QUICK_MODEL,) if quick else (RESNET56,))
        for method, each in amounts.items()
        if not quick or method in QUICK_METHODS
        for amount in each
        if method != "magnitude_statistics" or "BatchNormalization" in manifest()[model]["ops"]
    ]


def _search_job(case: Case, options: Options) -> Job:
    arguments = {
        "model": case.model,
        "data": str(case.fit(options.work)),
        "stem": case.stem(options.work),
        "limits": [list(limit) for limit in case.limits],
        "grid": case.grid,
        "seed": case.seed,
        "target": options.target,
        **({"memory": QUICK_MEMORY} if options.quick else {}),
    }
    return Job("benchmarks.record:search", arguments, timeout_s=_TIMEOUT_S)


def search(
    *, model: str, data: str, stem: str, limits: Sequence[Limit], **settings: Any
) -> list[dict[str, Any]]:
    """Compress under several limits with one table of losses; runs in a child."""
    state = Path(f"{stem}.state")
    shutil.rmtree(state, ignore_errors=True)  # what an earlier run left would cost no time
    found = []
    for name, value in limits:
        arguments: dict[str, Any] = {name: value, **settings}
        out = _model_file(stem, (name, value))
        found.append(compress(model=model, data=data, out=out, resume=str(state), **arguments))
    return found


def _model_file(stem: str, limit: Limit) -> str:
    return f"{stem}-{limit[0]}-{limit[1]:g}.onnx"


def _other_job(model: str, method: str, amount: float, images: int, folder: Path) -> Job:
    arguments: dict[str, Any] = {
        "model": model,
        "out": _other_file(model, method, amount, folder),
    }
    fit = {"data": str(Case(model, images, "", SEEDS[0], ()).fit(folder))}
    if method in figures.ONNXSIM:
        arguments |= fit | {"sparsity": amount, "ranking": method}
        return Job("benchmarks.peers:prune", arguments)
    arguments["share"] = amount
    if method == "svd":
        return Job("benchmarks.baselines:plain_svd", arguments)
    if method.startswith("magnitude"):
        arguments |= fit | {"reestimate": method == "magnitude_statistics"}
        return Job("benchmarks.baselines:magnitude", arguments)
    return Job("benchmarks.baselines:uniform", arguments | fit | {"kind": method})


def _other_file(model: str, method: str, amount: float, folder: Path) -> str:
    return str(folder / f"{model}-{method}-{amount:g}.onnx")


def _runs(case: Case, answer: ChildRun | ChildError, folder: Path) -> list[dict[str, Any]]:
    """Return a row for every limit of a search."""
    rows: list[dict[str, Any]] = []
    for index, limit in enumerate(case.limits):
        row: dict[str, Any] = {
            "row": "run",
            "model": case.model,
            "method": f"onnxcomp_{case.grid}",
            "images": case.images,
            "grid": case.grid,
            "limit": list(limit),
            "seed": case.seed,
        }
        if isinstance(answer, ChildError):
            rows.append(row | {"error": str(answer)})
            continue
        found = answer.value[index]
        before, after = found["original"], found["result"]
        rows.append(
            row
            | {
                **{k: after[k] / before[k] for k in ("macs", "params", "file_bytes")},
                **{k: found[k] for k in ("met", "loss", "phases", "seconds", "notes")},
                "table_seconds": answer.value[0]["phases"].get("losses", 0.0),
                "walk_seconds": found["phases"].get("walk", 0.0),
                "plan_seconds": found["seconds"] - found["phases"].get("losses", 0.0),
                "peak_rss": answer.peak_rss,
                "file": _model_file(case.stem(folder), limit),
            }
        )
    return rows


def _other(
    model: str,
    method: str,
    amount: float,
    images: int,
    answer: ChildRun | ChildError,
    folder: Path,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "row": "run",
        "model": model,
        "method": method,
        "images": images,
        "grid": None,
        "limit": ["sparsity" if method in figures.ONNXSIM else "macs", amount],
        "seed": SEEDS[0],
    }
    if isinstance(answer, ChildError):
        return row | {"error": str(answer)}
    file = _other_file(model, method, amount, folder)
    new = str(data.sample_file(folder, model, "new"))
    made, whole = (
        run_child("benchmarks.cases:cost", file=f, data=new).value
        for f in (file, str(model_path(model)))
    )
    shares = {k: made[k] / whole[k] for k in ("macs", "params", "file_bytes")}
    return row | shares | {"seconds": answer.seconds, "file": file}


def _judge(model: str, rows: Sequence[dict[str, Any]], options: Options) -> dict[str, Any]:
    """Add top-1 to the rows of a network, and latency to those of the first seed."""
    made = [row for row in rows if "file" in row]
    if not made:
        return {}
    new = str(data.sample_file(options.work, model, "new"))
    files = [row["file"] for row in made]
    judged = run_child(
        "benchmarks.cases:judge", model=model, files=files, data=new, each=True
    ).value
    for row, seen in zip(made, judged[1:], strict=True):
        row |= seen
    timed = [r for r in made if r["grid"] and r["seed"] == SEEDS[0] and r["images"] == IMAGES]
    timed = timed or [row for row in made if row["grid"] and row["seed"] == SEEDS[0]]
    found = run_child(
        "benchmarks.cases:latency",
        models=[str(model_path(model)), *(row["file"] for row in timed)],
        data=new,
        seconds=5.0 if options.quick else LATENCY_SECONDS,
    ).value
    for row, seen in zip(timed, found[1:-1], strict=True):
        row |= {"median_ms": seen["median_ms"], "ratio": seen["ratio"]}
    return {**judged[0], "median_ms": found[0]["median_ms"], "control": found[-1]["ratio"]}
