"""What benchmarks do in fresh processes: compress, judge on new samples, measure latency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import onnxcomp
from benchmarks.common import model_path
from onnxcomp.analysis import Analysis
from onnxcomp.bench import Benchmark, paired_latency
from onnxcomp.drift import drift
from onnxcomp.evaluate import predict
from onnxcomp.metrics import load_metric

_BATCH = 100


def compress(
    *,
    model: str,
    data: str,
    out: str,
    macs: float,
    grid: str = "auto",
    seed: int = 0,
    threads: int = 1,
    patience: float = onnxcomp.Settings.patience,
) -> dict[str, Any]:
    """Compress a shared model and save the result.

    The result is kept whatever its latency: that is measured afterwards, on one thread.

    Args:
        model: Its name in the manifest.
        data: Samples to fit on, an `.npz` file.
        out: The file to write.
        macs: Limit, a share or absolute.
        grid: As in `Settings`.
        seed: As in `Settings`.
        threads: Threads of the search.
        patience: As in `Settings`.
    """
    network = onnxcomp.load(model_path(model))
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    settings = onnxcomp.Settings(
        grid=grid, seed=seed, threads=threads, patience=patience, latency=False
    )
    start = time.monotonic()
    result = onnxcomp.compress(
        network, samples, limits=onnxcomp.Limits(macs=macs), settings=settings
    )
    seconds = time.monotonic() - start
    result.model.save(out)
    return {
        "model": model,
        "limit": macs,
        "grid": grid,
        "met": result.met,
        "seconds": seconds,
        "phases": dict(result.report.seconds),
        "actions": len(result.report.actions),
        "notes": list(result.report.notes),
        "original": asdict(result.report.original),
        "result": asdict(result.report.result),
    }


def cost(*, file: str, data: str) -> dict[str, int]:
    """Return MACs, parameters and bytes of a model file."""
    network = onnxcomp.load(file)
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    found = Analysis(network, samples).cost
    return {"macs": found.macs, "params": found.params, "file_bytes": network.file_bytes}


def judge(*, model: str, files: Sequence[str], data: str) -> list[dict[str, float | None]]:
    """Judge model files on new samples: top-1 where there are labels, and drift.

    Args:
        model: The original's name.
        files: Candidates.
        data: New samples, an `.npz` file.

    Returns:
        For the original and then every candidate: `top1`, or None without labels, and
        `relative_l2` of the worst output.
    """
    original = onnxcomp.load(model_path(model))
    samples = onnxcomp.load_samples(data, original.signature.inputs)
    metric = None if samples.labels is None else load_metric("top1")
    expected = predict(original, samples, batch=_BATCH)
    found: list[dict[str, float | None]] = []
    for file in (str(model_path(model)), *files):
        outputs = predict(onnxcomp.load(file), samples, batch=_BATCH)
        drifts = drift(expected, outputs).values()
        found.append(
            {
                "top1": None if metric is None else metric.score(outputs, samples, expected),
                "relative_l2": max(d.relative_l2 for d in drifts),
            }
        )
    return found


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
