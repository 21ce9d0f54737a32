"""Collaborative compression of ResNet-56 at a rate of 0.5, without training and with it.

Published for the authors' checkpoint (CORING, NORTON): 48.0 % of the MACs, 51.8 % of the
parameters.  Gradients and refits see 1,024 training images with their labels; the common
allocator gets the same images and the MACs of the refitted network.  Both then learn for half
an hour, on one thread, from all 50,000 training images with their labels.  All are judged once
on the 5,000 test images.  A layer of 512 x 512 x 3 x 3 and the ResNet-50 builder are timed
beside.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

import onnxcomp
from benchmarks import data as parts
from benchmarks.cases import compress, cost, file_of
from benchmarks.common import (
    ChildError,
    ChildRun,
    Job,
    Options,
    Outcome,
    Table,
    percent,
    run_child,
    run_jobs,
    shared_folder,
)
from benchmarks.tune import training_file
from onnxcomp.analysis import Analysis
from onnxcomp.numerics.collaborative import Removal, sensitivity
from onnxcomp.passes.compress_collaboratively import CompressCollaboratively
from onnxcomp.passes.working import finish, prepare
from onnxcomp.search.collaboration import collaborate

MODEL, QUICK_MODEL = "akamaster_cifar10_resnet56", "mlperftiny_cifar10_resnet8"
PUBLISHED = (0.480, 0.518)  # shares of MACs and parameters
IMAGES, QUICK_IMAGES = 1024, 64
LAYER, QUICK_LAYER = (512, 512, 9), (64, 64, 9)
REFITTED, ALLOCATOR = "refitted", "common allocator"
VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {"exact_up_to": 64},  # which is exact for all layers of ResNet-56
    "without look-ahead": {"gamma": 0.0},
    "mean squared gradient": {"squared": True},
    "least sum of losses": {"per_cost": True},
    REFITTED: {"reconstruct": True},
    "refitted, mean squared gradient": {"reconstruct": True, "squared": True},
    "refitted, without labels": {"reconstruct": True, "labels": False},
}
TUNED, TUNED_S, QUICK_TUNED_S = (REFITTED, ALLOCATOR), 1800.0, 10.0
WHOLE, WHOLE_IMAGES = "resnet50_imagenet", 32
_TIMEOUT_S = 3600.0


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    model = QUICK_MODEL if options.quick else MODEL
    fit, new = options.work / "fit.npz", options.work / "new.npz"
    count = QUICK_IMAGES if options.quick else IMAGES
    if not fit.exists():
        seed = options.seed
        parts.write_part(
            model=model, part="fit", file=str(fit), seed=seed, count=count, labels=True
        )
    parts.ensure_part(model, "new", new, 500 if options.quick else None, options.seed)
    names = ("reference", REFITTED) if options.quick else tuple(VARIANTS)
    known = {"model": model, "data": str(fit), "seed": options.seed}
    jobs = [
        Job(
            "benchmarks.collaborative:make",
            {**known, "variant": name, "out": _file(options.work, name)},
            timeout_s=_TIMEOUT_S,
        )
        for name in names
    ]
    shape = QUICK_LAYER if options.quick else LAYER
    jobs.append(Job("benchmarks.collaborative:layer_seconds", {"shape": list(shape)}))
    if not options.quick:
        built = {"out": str(options.work / f"{WHOLE}.onnx"), "seed": options.seed}
        jobs.append(Job("benchmarks.collaborative:whole_seconds", built, cores=2))
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    rows: list[dict[str, Any]] = []
    for name, answer in zip(names, answers, strict=False):
        rows.append({"variant": name, **_found(answer)})
    rows.append({"variant": ALLOCATOR, **_allocated(rows, known, options)})
    rows += _tuned(model, rows, options)
    made = [row for row in rows if "file" in row]
    files = [row["file"] for row in made]
    judged = run_child("benchmarks.cases:judge", model=model, files=files, data=str(new)).value
    for row, seen in zip(made, judged[1:], strict=True):
        row |= {"top1": seen["top1"], "relative_l2": seen["relative_l2"]}
    timed = [
        {"timed": what, **_found(answer)}
        for what, answer in zip(
            (f"a layer of {shape}", WHOLE), answers[len(names) :], strict=False
        )
    ]
    original = {"variant": "original", "macs": 1.0, "params": 1.0, "top1": judged[0]["top1"]}
    notes = [f"{row['timed']} takes {row.get('seconds', float('nan')):.0f} s" for row in timed]
    notes += [
        f"{row['variant']}: {row['epochs']:.3g} passes over the training images"
        for row in rows
        if "epochs" in row
    ]
    return Outcome([original, *rows, *timed], (_table([original, *rows]),), notes)


def _file(folder: Path, name: str) -> str:
    return str(folder / f"{name.replace(', ', '-').replace(' ', '_')}.onnx")


def make(*, model: str, data: str, seed: int, variant: str, out: str) -> dict[str, Any]:
    """Compress a network at a rate of 0.5; runs in a child."""
    fields = dict(VARIANTS[variant])
    network = onnxcomp.load(file_of(model))
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    if not fields.pop("labels", True):
        samples = onnxcomp.Samples(samples.arrays)
    pass_ = CompressCollaboratively(**fields)
    start = time.monotonic()
    if pass_.reconstruct:
        small = collaborate(network, samples, pass_, seed=seed)
    else:  # BatchNormalization stays, as in the paper
        facts = Analysis(prepare(network)[0], samples, seed=seed)
        draft = facts.model.edit()
        pass_.apply(draft, facts, pass_.solve(facts))
        small = finish(draft.seal(by=pass_.name))
    seconds = time.monotonic() - start
    small.save(out)
    return {"file": out, "seconds": seconds, **_shares(model, out, data)}


def _shares(model: str, file: str, data: str) -> dict[str, float]:
    whole, small = (cost(file=f, data=data) for f in (str(file_of(model)), file))
    return {name: small[name] / whole[name] for name in ("macs", "params")}


def allocate(*, model: str, data: str, seed: int, macs: float, out: str) -> dict[str, Any]:
    """Compress a network by the common allocator; runs in a child."""
    start = time.monotonic()
    compress(model=model, data=data, out=out, macs=macs, grid="off", seed=seed)
    seconds = time.monotonic() - start
    return {"file": out, "seconds": seconds, **_shares(model, out, data)}


def _allocated(
    rows: list[dict[str, Any]], known: dict[str, Any], options: Options
) -> dict[str, Any]:
    """Return what the common allocator makes at the MACs of the refitted network."""
    share = next((row["macs"] for row in rows if row["variant"] == REFITTED), 0.5)
    arguments = {**known, "macs": share, "out": _file(options.work, ALLOCATOR)}
    job = Job("benchmarks.collaborative:allocate", arguments, timeout_s=_TIMEOUT_S)
    (answer,) = run_jobs([job], workers=1, kept=options.work / "answers")
    return _found(answer)


def _tuned(model: str, rows: list[dict[str, Any]], options: Options) -> list[dict[str, Any]]:
    """Return what some networks become by learning from all training images."""
    known = {
        "teacher": model,
        "data": training_file(model, options),
        "labels": True,
        "seconds": QUICK_TUNED_S if options.quick else TUNED_S,
        "seed": options.seed,
    }
    chosen = [row for row in rows if row["variant"] in TUNED and "file" in row]
    jobs = [
        Job(
            "benchmarks.tune:tune",
            {**known, "model": row["file"], "out": _file(options.work, _after(row))},
            timeout_s=_TIMEOUT_S,
        )
        for row in chosen
    ]
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    found = []
    for row, job, answer in zip(chosen, jobs, answers, strict=True):
        result = {"variant": _after(row), "macs": row["macs"], "params": row["params"]}
        if isinstance(answer, ChildError):
            found.append(result | {"error": str(answer)})
        else:
            made = {"file": job.arguments["out"], "seconds": answer.value["tuned_s"]}
            found.append(result | made | {"epochs": answer.value["epochs"]})
    return found


def _after(row: dict[str, Any]) -> str:
    return f"{row['variant']}, tuned"


def _found(answer: ChildRun | ChildError) -> dict[str, Any]:
    return {"error": str(answer)} if isinstance(answer, ChildError) else answer.value


def layer_seconds(*, shape: list[int]) -> dict[str, float]:
    """Return the seconds that curve and removal of one layer take at half of its MACs."""
    rng = np.random.default_rng(0)
    n, c, v = shape
    weight = rng.standard_normal((n, c, v)) * np.exp(0.5 * rng.standard_normal((1, c, 1)))
    importance = np.square(rng.standard_normal((n, c, v)))

    def macs(channels: int, rank: int | None) -> float:
        whole = n * channels * v
        return whole if rank is None else channels * v * rank + rank * n

    start = time.monotonic()
    sensitivity(weight, importance, macs)
    Removal(weight, importance, 0.9).until(macs, 0.5 * macs(c, None))
    return {"seconds": time.monotonic() - start}


def whole_seconds(*, out: str, seed: int) -> dict[str, float]:
    """Return the seconds that a whole network takes, gradients included; runs in a child."""
    from benchmarks.cases import build
    from onnxcomp.analysis.probe import random_inputs

    build(name=WHOLE, out=out, seed=seed)
    network = onnxcomp.load(out)
    samples = random_inputs(network, WHOLE_IMAGES, seed=seed)
    start = time.monotonic()
    facts = Analysis(prepare(network)[0], samples, seed=seed)
    pass_, draft = CompressCollaboratively(), facts.model.edit()
    pass_.apply(draft, facts, pass_.solve(facts))
    finish(draft.seal(by=pass_.name))
    return {"seconds": time.monotonic() - start}


def _table(rows: list[dict[str, Any]]) -> Table:
    title = "ResNet-56 without training; published shares {} of MACs, {} of parameters".format(
        *map(percent, PUBLISHED)
    )
    columns = ("variant", "MACs", "params", "top-1", "seconds")
    cells = [
        (
            row["variant"],
            *(percent(row[k]) if k in row else "-" for k in ("macs", "params", "top1")),
            f"{row['seconds']:.0f}" if "seconds" in row else row.get("error", "-"),
        )
        for row in rows
    ]
    return Table(title, columns, cells)
