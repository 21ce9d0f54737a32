"""Operators chosen by gradient, against channels, ranks and uniform replacement.

A network's operators are searched for at a share of its predicted time, on unlabelled samples.
Channel removal, factorisation, both, and the default methods then get the time that the result
takes, and every convolution but the first becomes the same lighter operator.  All of them
learn from the original for the same time: the ResNets from all 50,000 training images with
their labels, the detector from its pictures.  The search by gradient takes its part of that
time, but leaves a third for training; what the other searches take does not count.  ResNet-56
is compressed to a share of its time, without a search by gradient.  Judged once on new
samples; latency is measured in one run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import onnxcomp
from benchmarks import data, tune
from benchmarks.cases import file_of
from benchmarks.common import (
    ChildError,
    Job,
    Options,
    Outcome,
    Table,
    interval,
    percent,
    points,
    run_jobs,
    shared_folder,
)

DETECTOR = "linzaer_ultralight_face_RFB-320"
TARGETS = {tune.RESNET20: (0.5, 0.25), DETECTOR: (0.5,), tune.RESNET56: (0.5,)}
SEARCHED = (tune.RESNET20, DETECTOR)
SECONDS = {tune.RESNET20: 480.0, DETECTOR: 300.0, tune.RESNET56: 480.0}
QUICK_SECONDS = 20.0
RIVALS: dict[str, tuple[str, ...] | None] = {
    "channels": ("remove_channels",),
    "ranks": ("factorize",),
    "channels and ranks": ("remove_channels", "factorize"),
    "default methods": None,
}
UNIFORM = (
    ("grouped", 2),
    ("grouped", 4),
    ("grouped", 8),
    ("pointwise", 1),
    ("separable", 1),
    ("separable_twice", 0),
)
LATENCY_S = 5.0  # for each network
_LEAST_TRAINED = 1 / 3  # of the time, even where the search took longer
_OVERTIME_S = 3600.0


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    rows: list[dict[str, Any]] = []
    for model in (tune.RESNET20,) if options.quick else TARGETS:
        new = data.sample_file(options.work, model, "new")
        data.ensure_part(model, "new", new, 500 if options.quick else None, options.seed)
        made = _searched(model, options) if model in SEARCHED else []
        made += _rivals(model, made, str(new), options)
        rows += _judged(model, _tuned(model, made, options), str(new), options)
    return Outcome(rows, (_table(rows),))


def _searched(model: str, options: Options) -> list[dict[str, Any]]:
    """Return networks whose operators were chosen by gradient."""
    targets = TARGETS[model][:1] if options.quick else TARGETS[model]
    known = {"model": model, "data": tune.fitting_file(model, options), "seed": options.seed}
    if options.quick:
        known |= {"epochs": 1, "warm_up": 0}
    asked: dict[tuple[str, float | None], Job] = {
        ("by gradient", target): Job(
            "benchmarks.selection:search",
            {**known, "target": target, "out": _file(options, model, f"gradient-{target:g}")},
            timeout_s=_OVERTIME_S,
        )
        for target in targets
    }
    return _made(asked, options)


def _rivals(
    model: str, searched: Sequence[dict[str, Any]], new: str, options: Options
) -> list[dict[str, Any]]:
    """Return networks made in other ways, most of them as fast as those that were searched."""
    fit = tune.fitting_file(model, options)
    shares = {target: target for target in TARGETS[model]}
    if searched:
        pairs = zip(searched, _latency(model, searched, new, options), strict=True)
        shares = {row["target"]: 1 / found["ratio"]["value"] for row, found in pairs}
    asked: dict[tuple[str, float | None], Job] = {}
    for target, share in shares.items():
        for way, methods in RIVALS.items():
            arguments: dict[str, Any] = {"model": model, "data": fit, "seed": options.seed}
            arguments |= {"max_latency": min(share, 1.0), "target": options.target}
            arguments |= {"force": True} | ({} if methods is None else {"methods": methods})
            out = _file(options, model, f"{way.replace(' ', '_')}-{target:g}")
            job = Job("benchmarks.cases:compress", {**arguments, "out": out})
            asked[way, target] = job
    uniform = UNIFORM[:1] if options.quick else UNIFORM
    for form, size in uniform if model == tune.RESNET20 else ():
        arguments = {"model": model, "data": fit, "form": form, "size": size}
        arguments |= {"out": _file(options, model, f"{form}-{size}"), "seed": options.seed}
        asked[f"all {form} {size}", None] = Job("benchmarks.selection:replace", arguments)
    return _made(asked, options)


def _made(
    asked: Mapping[tuple[str, float | None], Job], options: Options
) -> list[dict[str, Any]]:
    """Return way, target, file, and the seconds of making it, or why it failed."""
    answers = run_jobs(
        list(asked.values()), workers=options.threads, kept=options.work / "answers"
    )
    rows: list[dict[str, Any]] = []
    for ((way, target), job), answer in zip(asked.items(), answers, strict=True):
        row: dict[str, Any] = {"way": way, "target": target}
        if isinstance(answer, ChildError):
            rows.append(row | {"error": str(answer)})
        else:
            file, seconds = job.arguments["out"], answer.value["seconds"]
            met = answer.value.get("met", True)
            rows.append(row | {"file": file, "seconds": seconds, "met": met})
    return rows


def search(
    *, model: str, data: str, target: float, out: str, seed: int, **selection: Any
) -> dict[str, Any]:
    """Choose operators by gradient and save the result; runs in a child."""
    from onnxcomp.bridge.selection import Selection
    from onnxcomp.bridge.selection import search as select

    network = onnxcomp.load(file_of(model))
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    start = time.monotonic()
    how = Selection(
        cost="seconds", target=target, factor=4.0, tuning=0, seed=seed, **selection
    )
    found = select(network, samples, how)
    found.model.save(out)
    seconds = time.monotonic() - start
    return {"seconds": seconds, "share": found.share, "table": found.table}


def replace(
    *, model: str, data: str, form: str, size: int, out: str, seed: int
) -> dict[str, Any]:
    """Replace every convolution but the first that has such an operator; runs in a child."""
    from onnxcomp.analysis import Analysis
    from onnxcomp.analysis.target import TARGETS as PROFILES
    from onnxcomp.bridge.branches import find_branches, written
    from onnxcomp.bridge.selection import Choice, Supernet
    from onnxcomp.passes.operator_plan import working_graph
    from onnxcomp.passes.substitute_operators import SubstituteOperators

    network = onnxcomp.load(file_of(model))
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    work, target = working_graph(network), PROFILES["x86-avx512"]
    facts = Analysis(work, samples, seed=seed)
    operators = [SubstituteOperators((form,), target, step=1)]
    branches = find_branches(facts, samples, operators, target)
    choices = {node: Choice(found, "macs", "identity") for node, found in branches.items()}
    first = next(iter(facts.linears))
    chosen = {
        node: next((b for b in found if node != first and _is(b.option, size)), found[0])
        for node, found in branches.items()
    }
    written(facts, Supernet(work, choices), chosen).model.save(out)
    return {"seconds": 0.0}


def _is(option: Any, size: int) -> bool:
    return option is not None and (option.size or (0,))[0] == size


def _tuned(
    model: str, made: Sequence[dict[str, Any]], options: Options
) -> list[dict[str, Any]]:
    """Return all networks after training for what is left of the time."""
    whole = QUICK_SECONDS if options.quick else SECONDS[model]
    labelled = model != DETECTOR
    samples = (tune.training_file if labelled else tune.fitting_file)(model, options)
    jobs, rows = [], [row for row in made if "file" in row]
    for row in rows:
        spent = row["seconds"] if row["way"] == "by gradient" else 0.0
        arguments = {
            "model": row["file"],
            "teacher": model,
            "data": samples,
            "out": row["file"].replace(".onnx", "-tuned.onnx"),
            "seconds": max(whole - spent, _LEAST_TRAINED * whole),
            "seed": options.seed,
            "labels": labelled,
        }
        jobs.append(Job("benchmarks.tune:tune", arguments, timeout_s=_OVERTIME_S))
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    found = []
    for row, job, answer in zip(rows, jobs, answers, strict=True):
        if isinstance(answer, ChildError):
            found.append(row | {"error": str(answer)})
        else:
            tuned = {"tuned": job.arguments["out"], "tuned_s": answer.value["tuned_s"]}
            found.append(row | tuned | {"epochs": answer.value["epochs"]})
    return [*found, *(row for row in made if "file" not in row)]


def _latency(
    model: str, rows: Sequence[dict[str, Any]], new: str, options: Options
) -> list[dict[str, Any]]:
    """Return median and speedup of every file, all measured in one run."""
    files = [str(file_of(model)), *(row.get("tuned", row["file"]) for row in rows)]
    given = {"models": files, "data": new, "seconds": LATENCY_S * len(files)}
    job = Job("benchmarks.cases:latency", given)
    (answer,) = run_jobs([job], workers=1, kept=options.work / "answers")
    if isinstance(answer, ChildError):
        raise answer
    names = {"ms": "median_ms", "ratio": "ratio"}
    return [{key: found[name] for key, name in names.items()} for found in answer.value[1:-1]]


def _judged(
    model: str, made: Sequence[dict[str, Any]], new: str, options: Options
) -> list[dict[str, Any]]:
    """Return all networks with accuracy or drift, before and after training, and latency."""
    rows = [row for row in made if "tuned" in row]
    judged = tune.before_and_after(
        model, [(row["file"], row["tuned"]) for row in rows], options
    )
    times = _latency(model, rows, new, options)
    for row, seen, timed in zip(rows, judged, times, strict=True):
        row |= seen | timed
    return [{"model": model, **row} for row in made]


def _file(options: Options, model: str, what: str) -> str:
    return str(options.work / f"{model}-{what}.onnx")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("model", "time asked", "way", "ms", "speedup", "epochs")
    columns += ("drift before", "after", "top-1 before", "after", "points lost")
    cells = []
    for row in rows:
        way = row["way"] if row.get("met", True) else f"{row['way']} (limit not met)"
        head = (row["model"], percent(row["target"], 0), way)
        if "error" in row:
            cells.append((*head, row["error"], *["-"] * 7))
            continue
        cells.append(
            (
                *head,
                f"{row['ms']:.3f}",
                interval(row["ratio"]),
                f"{row['epochs']:.3g}",
                *(f"{row[f'drift_{when}']:.4f}" for when in ("before", "after")),
                *(percent(row[f"top1_{when}"], 2) for when in ("before", "after")),
                points(row["lost_after"]),
            )
        )
    return Table("Operators by gradient and other ways, after equal training", columns, cells)
