"""What benchmarks do in fresh processes: compress, judge on new samples, measure latency."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onnxcomp
from benchmarks.common import model_path
from onnxcomp.analysis import Analysis
from onnxcomp.bench import Benchmark, paired_latency
from onnxcomp.drift import drift as drift_of
from onnxcomp.evaluate import predict
from onnxcomp.metrics import load_metric

Array = npt.NDArray[Any]
_BATCH = 100


def file_of(model: str) -> Path:
    """Return the file of a model that is given by its name or as a file."""
    return Path(model) if model.endswith((".onnx", ".onnxc")) else model_path(model)


def save(model: onnxcomp.Model, file: str) -> None:
    """Write a model, packed where the file is an `.onnxc`."""
    if file.endswith(".onnxc"):
        onnxcomp.pack(model, file)
    else:
        model.save(file)


def compress(
    *,
    model: str,
    data: str,
    out: str,
    macs: float | None = None,
    size: float | None = None,
    max_latency: float | None = None,
    drop: float | None = None,
    drift: float | None = None,
    metric: str | None = None,
    resume: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compress a model and save the result.

    Unless `latency` is among the settings, the result is kept whatever its latency; without
    `search_threads` the search has one.

    Args:
        model: Its name, or a file.
        data: Samples to fit on, an `.npz` file.
        out: The file to write; `.onnxc` packs it.
        macs: As in `Limits`.
        size: As in `Limits`.
        max_latency: `latency` of `Limits`.
        drop: As in `Limits`.
        drift: As in `Limits`.
        metric: Name of a metric; None for the default.
        resume: Folder of the search's state, such as its table of losses.
        settings: As in `Settings`.
    """
    network = onnxcomp.load(file_of(model))
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    limits = {"macs": macs, "size": size, "latency": max_latency, "drop": drop, "drift": drift}
    start = time.monotonic()
    result = onnxcomp.compress(
        network,
        samples,
        limits=onnxcomp.Limits(**limits),
        settings=onnxcomp.Settings(**{"latency": False, "search_threads": 1} | settings),
        metric=None if metric is None else load_metric(metric),
        resume=resume,
    )
    seconds = time.monotonic() - start
    save(result.model, out)
    seen = result.report.ladder.evaluation
    return {
        "model": model,
        "limits": {name: value for name, value in limits.items() if value is not None},
        "samples": samples.count,
        "met": result.met,
        "seconds": seconds,
        "phases": dict(result.report.seconds),
        "actions": len(result.report.actions),
        "kinds": Counter(_kind(action.what) for action in result.report.actions),
        "notes": list(result.report.notes),
        "loss": result.plan.loss,
        "holdout": None
        if seen is None
        else {key: getattr(seen, key) for key in ("samples", "relative_l2", "drop")},
        "original": asdict(result.report.original),
        "result": asdict(result.report.result),
    }


def _kind(what: str) -> str:
    """Return what an action did without its figures."""
    return "narrower" if " channels become " in what else what.split(" of rank ")[0]


def build(*, name: str, out: str, seed: int = 0) -> None:
    """Write a network of `models.builders` with BatchNorm kept; needs torch."""
    from models.builders import export

    export(name, out, folded=False, seed=seed)


def cost(*, file: str, data: str) -> dict[str, int]:
    """Return MACs, parameters and bytes of a model file."""
    network = onnxcomp.load(file)
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    found = Analysis(network, samples).cost
    return {"macs": found.macs, "params": found.params, "file_bytes": network.file_bytes}


def judge(
    *, model: str, files: Sequence[str], data: str, each: bool = False
) -> list[dict[str, Any]]:
    """Judge model files on new samples: top-1 where there are labels, and drift.

    Args:
        model: The original's name, or its file.
        files: Candidates.
        data: New samples, an `.npz` file.
        each: Say of every sample, too, whether it was right, where there are labels.

    Returns:
        For the original and then every candidate: `samples`, their number; `top1` and
        `agreement` with the original, or None without labels; `relative_l2` of the worst
        output; `reconstruction`, the mean squared error of an output that has the shape of
        the input, else None; and `right`, a string of "1" and "0".
    """
    original = onnxcomp.load(file_of(model))
    samples = onnxcomp.load_samples(data, original.signature.inputs)
    expected = predict(original, samples, batch=_BATCH)
    names = () if samples.labels is None else ("top1", "agreement")
    found: list[dict[str, Any]] = []
    for file in (str(file_of(model)), *files):
        outputs = predict(onnxcomp.load(file), samples, batch=_BATCH)
        drifts = drift_of(expected, outputs).values()
        row: dict[str, Any] = {"samples": samples.count, "top1": None, "agreement": None}
        row |= {name: load_metric(name).score(outputs, samples, expected) for name in names}
        row["relative_l2"] = max(d.relative_l2 for d in drifts)
        row["reconstruction"] = _reconstruction(outputs, samples)
        if each and names:
            row["right"] = _right(outputs, samples)
        found.append(row)
    return found


def _reconstruction(outputs: Mapping[str, Array], samples: onnxcomp.Samples) -> float | None:
    (given, *others), (found, *more) = samples.arrays.values(), outputs.values()
    if others or more or given.shape != found.shape:
        return None
    return float(np.mean(np.square(found.astype(np.float64) - given)))


def _right(outputs: Mapping[str, Array], samples: onnxcomp.Samples) -> str:
    """Return for every sample "1" where its largest score is that of its label, else "0"."""
    metric = load_metric("top1")
    return "".join(
        str(int(metric.score({n: a[i : i + 1] for n, a in outputs.items()}, one, {})))
        for i, one in ((i, samples.take([i])) for i in range(samples.count))
    )


def latency(
    *, models: Sequence[str], data: str, seconds: float, baseline: int = 0
) -> list[dict[str, Any]]:
    """Measure model files on one thread, interleaved, against one of them.

    Args:
        models: Model files.
        data: Samples, of which the first is run.
        seconds: Time limit.
        baseline: Which of them the ratios relate to.

    Returns:
        For every file, and at last for the A/A control of the baseline: `median_ms` and its
        `ratio` (time of the baseline over its own) with a 95 % interval.
    """
    networks = [onnxcomp.load(file) for file in models]
    order = [baseline, *(i for i in range(len(networks)) if i != baseline)]
    inputs = networks[0].signature.inputs
    samples = onnxcomp.load_samples(data, inputs)
    feed = next(samples.take([0]).batches(inputs, 1)).feed
    found = paired_latency([networks[i] for i in order], feed, time_limit_s=seconds)
    rows = _timings(found)
    return [*(rows[order.index(i)] for i in range(len(networks))), rows[-1]]


def _timings(found: Benchmark) -> list[dict[str, Any]]:
    return [
        {"median_ms": timing.median_ms, "ratio": asdict(timing.ratio)}
        for timing in (*found.models, found.control)
    ]
