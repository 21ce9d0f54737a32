"""ResNet-56 and ResNet-20 on CIFAR-10: 512 unlabelled training images, no training.

At 0.7 and 0.5 of the MACs, ranks and widths free ("off") and on the hardware's grid ("auto").
Top-1 on the 5,000 test images is taken once, when all models are made; memory and time are
those of a fresh process for each case; latency is measured on one thread, all cases of a
network interleaved with the original.
"""

from __future__ import annotations

from typing import Any

from benchmarks import data
from benchmarks.common import (
    Options,
    Outcome,
    Table,
    count,
    interval,
    model_path,
    percent,
    run_child,
    shared_folder,
)

MODELS = ("akamaster_cifar10_resnet20", "akamaster_cifar10_resnet56")
CASES = (("off", 0.7), ("off", 0.5), ("auto", 0.7), ("auto", 0.5))
LATENCY_SECONDS = 90.0


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    models = MODELS[:1] if options.quick else MODELS
    rows = [row for model in models for row in _network(model, options)]
    return Outcome(rows, (_table(rows),), _notes(rows))


def _network(model: str, options: Options) -> list[dict[str, Any]]:
    folder = str(options.work)
    limit = 64 if options.quick else None
    run_child(
        "benchmarks.data:write", model=model, folder=folder, seed=options.seed, limit=limit
    )
    fit, new = (str(data.sample_file(folder, model, part)) for part in ("fit", "new"))
    rows, files = [], []
    for grid, share in CASES[::2] if options.quick else CASES:
        out = str(options.work / f"{model}-{grid}-{share}.onnx")
        child = run_child(
            "benchmarks.cases:compress",
            cores=options.threads,
            model=model,
            data=fit,
            out=out,
            macs=share,
            grid=grid,
            seed=options.seed,
            threads=options.threads,
        )
        rows.append({**child.value, "peak_rss": child.peak_rss})
        files.append(out)
    judged = run_child("benchmarks.cases:judge", model=model, files=files, data=new).value
    timed = run_child(
        "benchmarks.cases:latency",
        models=[str(model_path(model)), *files],
        data=new,
        seconds=3.0 if options.quick else LATENCY_SECONDS,
    ).value
    for row, seen, time in zip(rows, judged[1:], timed[1:-1], strict=True):
        row |= {
            "top1_original": judged[0]["top1"],
            "top1": seen["top1"],
            "relative_l2": seen["relative_l2"],
            "median_ms_original": timed[0]["median_ms"],
            "median_ms": time["median_ms"],
            "ratio": time["ratio"],
            "control": timed[-1]["ratio"],
        }
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = (
        "network",
        "grid",
        "limit",
        "MACs",
        "params",
        "bytes",
        "top-1",
        "lost",
        "ms",
        "speedup",
        "seconds",
        "peak memory",
    )
    cells = []
    for row in rows:
        before, after = row["original"], row["result"]
        cells.append(
            (
                row["model"].removeprefix("akamaster_cifar10_"),
                row["grid"],
                f"{row['limit']:g}",
                percent(after["macs"] / before["macs"]),
                percent(after["params"] / before["params"]),
                percent(after["file_bytes"] / before["file_bytes"]),
                percent(row["top1"], 2),
                f"{100 * (row['top1_original'] - row['top1']):+.2f}",
                f"{row['median_ms_original']:.2f} -> {row['median_ms']:.2f}",
                interval(row["ratio"]),
                f"{row['seconds']:.0f}",
                f"{count(row['peak_rss'])}B",
            )
        )
    return Table("CIFAR-10 after training, 512 unlabelled images", columns, cells)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = [
        f"A/A control of {row['model']}: {interval(row['control'])}"
        for row in rows
        if row["grid"] == "off" and row["limit"] == CASES[0][1]
    ]
    return [
        *notes,
        *(
            f"{r['model']} {r['grid']} {r['limit']}: limit not met"
            for r in rows
            if not r["met"]
        ),
    ]
