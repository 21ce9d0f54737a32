"""Predicted against measured speedup of compressed variants.

Variants are made by hand, the same share of all inner widths, all widths or all ranks, from
the weights alone, as latency does not depend on their values: ResNet-18 and ResNet-50 at 224 x
224 with random weights, and the real CIFAR ResNets.  The prediction is the one that the search
uses; what it is compared with is measured on one thread, all variants of a network interleaved
with the original.  With `--target target.json` both profiles predict.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import onnxcomp
from benchmarks import figures
from benchmarks.baselines import WIDTHS, uniform_plan, whole_space, written
from benchmarks.cases import file_of
from benchmarks.common import (
    TARGET,
    Job,
    Options,
    Outcome,
    SkippedError,
    Table,
    interval,
    percent,
    run_child,
    run_jobs,
    shared_folder,
)
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.analysis.target import find_target
from onnxcomp.errors import ParameterError
from onnxcomp.passes.working import finish, prepare, working_model

IMAGENET = ("resnet18_imagenet", "resnet50_imagenet")
CIFAR = ("akamaster_cifar10_resnet20", "akamaster_cifar10_resnet56")
GOALS: Mapping[str, float] = dict.fromkeys(IMAGENET, 0.05) | dict.fromkeys(CIFAR, 0.15)
MIN_VARIANTS = 20
LATENCY_SECONDS = 240.0
Variant = tuple[str, float, int]
"""Kind, share that is kept of widths or full ranks, and multiple that sizes are rounded to."""
ON_GRID: tuple[Variant, ...] = (
    (WIDTHS, 0.75, 16),
    (WIDTHS, 0.5, 16),
    ("all widths", 0.7, 16),
    ("output_basis", 0.5, 16),
    ("input_basis", 0.5, 16),
    ("spatial", 1 / 6, 16),
    ("spatial", 1 / 4, 16),
    ("tucker2", 0.5, 16),
)
SMALL: tuple[Variant, ...] = (
    (WIDTHS, 0.75, 4),
    (WIDTHS, 0.5, 4),
    (WIDTHS, 0.25, 4),
    ("all widths", 0.75, 4),
    ("input_basis", 0.5, 4),
    ("spatial", 1 / 4, 8),
)
FREE: tuple[Variant, ...] = ((WIDTHS, 0.62, 1), ("input_basis", 0.37, 1))


def run(options: Options) -> Outcome:
    """Run the benchmark and draw `latency_model.png` beside the results."""
    shared_folder()
    figures.require_matplotlib()
    if importlib.util.find_spec("torch") is None:
        raise SkippedError("torch is absent: the ResNets at 224 x 224 cannot be built")
    networks = (IMAGENET[0], CIFAR[0]) if options.quick else (*IMAGENET, *CIFAR)
    rows = [row for network in networks for row in _network(network, options)]
    options.out.mkdir(parents=True, exist_ok=True)
    figures.scatter(
        [row["predicted"][Path(options.target).name] for row in rows],
        [row["ratio"]["value"] for row in rows],
        options.out / "latency_model.png",
        labels=("predicted speedup", "measured speedup"),
        factor=1 + max(GOALS[network] for network in networks),
        logarithmic=False,
    )
    targets = list(rows[0]["predicted"])
    return Outcome(rows, (_table(rows, targets), _errors(rows, targets)), _notes(rows))


def _variants(network: str, quick: bool) -> list[Variant]:
    found = [*(ON_GRID if network in IMAGENET else SMALL), *FREE]
    return found[::3] if quick else found


def _network(network: str, options: Options) -> list[dict[str, Any]]:
    """Return a row for every variant of a network."""
    model, kept = network, options.work / "answers"
    if network in IMAGENET:
        model = str(options.work / f"{network}.onnx")
        arguments = {"name": network, "out": model, "seed": options.seed}
        _only(run_jobs([Job("benchmarks.cases:build", arguments)], workers=1, kept=kept))
    variants = _variants(network, options.quick)
    made = _only(
        run_jobs(
            [
                Job(
                    "benchmarks.latency_model:make",
                    {
                        "model": model,
                        "stem": str(options.work / network),
                        "variants": [list(variant) for variant in variants],
                        "targets": list(dict.fromkeys((TARGET, options.target))),
                    },
                )
            ],
            workers=1,
            kept=kept,
        )
    )
    timed = run_child(
        "benchmarks.cases:latency",
        models=[str(file_of(model)), *(row["file"] for row in made)],
        data=str(_inputs(model, options.work / f"{network}.npz")),
        seconds=10.0 if options.quick else LATENCY_SECONDS,
    ).value
    return [
        {
            "network": network,
            "variant": list(variant),
            "macs": row["macs"],
            "median_ms_original": timed[0]["median_ms"],
            "median_ms": found["median_ms"],
            "ratio": found["ratio"],
            "control": timed[-1]["ratio"],
            "predicted": row["predicted"],
            "error": {
                target: ratio / found["ratio"]["value"] - 1
                for target, ratio in row["predicted"].items()
            },
        }
        for variant, row, found in zip(variants, made, timed[1:-1], strict=True)
    ]


def _only(answers: Sequence[Any]) -> Any:
    """Return the value of the only answer; raise what it failed with."""
    (answer,) = answers
    if isinstance(answer, Exception):
        raise answer
    return answer.value


def _inputs(model: str, file: Path) -> Path:
    """Write one random input."""
    if not file.exists():
        samples = random_inputs(onnxcomp.load(file_of(model)), 1)
        np.savez(file, allow_pickle=False, **samples.arrays)
    return file


def make(
    *, model: str, stem: str, variants: Sequence[Variant], targets: Sequence[str]
) -> list[dict[str, Any]]:
    """Write variants of a model; runs in a child.

    Args:
        model: Its name, or a file.
        stem: What the files begin with.
        variants: Kind, share kept, and the multiple that sizes are rounded to.
        targets: Profiles that predict, by name or file.

    Returns:
        For every variant its `file`, its share of the `macs`, and by the target's name the
        `predicted` speedup.

    Raises:
        ParameterError: A variant changes nothing.
    """
    network = onnxcomp.load(file_of(model))
    samples = random_inputs(network, 2)
    facts = Analysis(working_model(prepare(network)[0], samples, seed=0), samples)
    spaces = {target: whole_space(facts, find_target(target)) for target in targets}
    found = []
    for kind, share, step in variants:
        space = spaces[targets[0]]
        whole = kind.startswith("all ")
        plan = uniform_plan(space, kind.removeprefix("all "), share, step=step, trunks=whole)
        if plan.empty:
            allowed = f"a smaller share than {share:g} for {kind}"
            raise ParameterError.of("make", "variants", allowed, share)
        file = f"{stem}-{kind.replace(' ', '_')}-{share:.3g}-{step}.onnx"
        finish(written(space, plan)).save(file)
        predicted = {
            Path(target).name: each.seconds({}, {}) / each.seconds(plan.widths, plan.forms)
            for target, each in spaces.items()
        }
        macs = plan.cost.macs / facts.cost.macs
        found.append({"file": file, "macs": macs, "predicted": predicted})
    return found


def _table(rows: Sequence[dict[str, Any]], targets: Sequence[str]) -> Table:
    cells = [
        (
            row["network"].removeprefix("akamaster_cifar10_"),
            row["variant"][0],
            f"{row['variant'][1]:.3g}",
            str(row["variant"][2]),
            percent(row["macs"]),
            f"{row['median_ms_original']:.2f} -> {row['median_ms']:.2f}",
            interval(row["ratio"]),
            *(f"{row['predicted'][t]:.2f} ({100 * row['error'][t]:+.1f} %)" for t in targets),
        )
        for row in rows
    ]
    columns = ("network", "variant", "kept", "multiple of", "MACs", "ms", "speedup")
    predicted = (f"predicted (error), {target}" for target in targets)
    return Table("Predicted and measured speedup", (*columns, *predicted), cells)


def _errors(rows: Sequence[dict[str, Any]], targets: Sequence[str]) -> Table:
    """Return median and largest errors by network, with their goals."""
    cells = []
    for target in targets:
        for network in dict.fromkeys(row["network"] for row in rows):
            own = [row for row in rows if row["network"] == network]
            errors = [abs(row["error"][target]) for row in own]
            goal = GOALS[network]
            cells.append(
                (
                    target,
                    network.removeprefix("akamaster_cifar10_"),
                    str(len(errors)),
                    percent(median(errors)),
                    percent(max(errors)),
                    percent(goal, 0),
                    f"{sum(error <= goal for error in errors)} of {len(errors)}",
                )
            )
    columns = ("target", "network", "variants", "median", "largest", "goal", "within it")
    return Table("Errors of the predicted speedup", columns, cells)


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    controls = {row["network"]: row["control"] for row in rows}
    return [
        f"{len(rows)} variants (at least {MIN_VARIANTS} are wanted)",
        "error: of the predicted speedup, relative to the measured one",
        *(f"A/A control of {network}: {interval(r)}" for network, r in controls.items()),
    ]
