"""What `record` writes: means over the seeds with their intervals, tables and notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.common import Table, count, interval, paired_interval, percent, points
from benchmarks.figures import METHODS

RESNET56, RESNET20 = "akamaster_cifar10_resnet56", "akamaster_cifar10_resnet20"
IMAGES, FEW_IMAGES = 1024, 64
GOALS: Mapping[tuple[str, int, str, str, float], float] = {
    (RESNET56, IMAGES, "off", "macs", 0.7): 0.000,
    (RESNET56, IMAGES, "off", "macs", 0.5): 0.003,
    (RESNET56, IMAGES, "off", "macs", 0.4): 0.012,
    (RESNET56, IMAGES, "off", "macs", 0.3): 0.035,
    (RESNET56, FEW_IMAGES, "off", "macs", 0.5): 0.007,
    (RESNET20, IMAGES, "off", "macs", 0.7): 0.002,
    (RESNET20, IMAGES, "off", "macs", 0.5): 0.013,
    (RESNET56, IMAGES, "auto", "max_latency", 0.62): 0.005,
    (RESNET56, IMAGES, "auto", "max_latency", 0.5): 0.020,
}
SPEEDS = {0.62: 1.6, 0.5: 2.0}
Row = dict[str, Any]
_SECONDS = ("table_seconds", "plan_seconds", "walk_seconds")


def summaries(rows: Iterable[Row], originals: Mapping[str, Row]) -> list[Row]:
    """Return a row for every setting: means over the seeds, and what was lost."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "right" in row:
            key = (row["model"], row["method"], row["images"], row["grid"], *row["limit"])
            groups.setdefault(key, []).append(row)
    found = []
    for (model, method, images, grid, *limit), runs in groups.items():
        lost = paired_interval([r["right"] for r in runs], originals[model]["right"])
        each = [100 * (originals[model]["top1"] - r["top1"]) for r in runs]
        names = ("macs", "params", "file_bytes", "top1", *_SECONDS)
        summary: Row = {
            "row": "mean",
            "model": model,
            "method": method,
            "images": images,
            "grid": grid,
            "limit": limit,
            "seeds": len(runs),
            **{name: mean(r.get(name, 0.0) for r in runs) for name in names},
            "peak_rss": max(r.get("peak_rss", 0) for r in runs),
            "lost": lost,
            "lost_deviation": stdev(each) / 100 if len(each) > 1 else None,
            "goal": GOALS.get((model, images, grid, limit[0], limit[1])),
            "median_ms_original": originals[model]["median_ms"],
        }
        timed = next((r for r in runs if "ratio" in r), {})
        summary |= {key: timed.get(key) for key in ("median_ms", "ratio")}
        found.append(summary)
    return found


def table(means: Sequence[Row]) -> Table:
    """Return our own results."""
    cells = []
    for row in (row for row in means if row["grid"]):
        name, value = row["limit"]
        cells.append(
            (
                short(row["model"]),
                str(row["images"]),
                row["grid"],
                f"{'MACs' if name == 'macs' else 'time'} {value:g}",
                percent(row["macs"]),
                percent(row["params"]),
                percent(row["file_bytes"]),
                percent(row["top1"], 2),
                points(row["lost"]),
                "-" if row["lost_deviation"] is None else f"{100 * row['lost_deviation']:.2f}",
                _verdict(row),
                interval(row["ratio"]),
                *(f"{row[name]:.0f}" for name in _SECONDS),
                f"{count(row['peak_rss'])}B",
            )
        )
    columns = (
        "network",
        "images",
        "grid",
        "limit",
        "MACs",
        "params",
        "bytes",
        "top-1",
        "points lost [95 %]",
        "deviation",
        "goal",
        "speedup",
        "table, s",
        "model, s",
        "of them walk",
        "peak memory",
    )
    return Table("CIFAR-10 after training, means over the seeds", columns, cells)


def _verdict(row: Row) -> str:
    """Return the goals of a setting and whether they are met; "-" where there is none."""
    if row["goal"] is None:
        return "-"
    goals = [f"{100 * row['goal']:.1f}"]
    met = row["lost"]["value"] <= row["goal"]
    name, value = row["limit"]
    if name == "max_latency":
        goals.append(f"{SPEEDS[value]:g}x")
        met = met and row["ratio"] is not None and row["ratio"]["value"] >= SPEEDS[value]
    return f"{', '.join(goals)}: {'met' if met else 'missed'}"


def others_table(means: Sequence[Row]) -> Table:
    """Return all methods by network and MACs."""
    chosen = [r for r in means if r["limit"][0] != "max_latency" and r["images"] == IMAGES]
    chosen = chosen or [row for row in means if row["limit"][0] != "max_latency"]
    order = {model: i for i, model in enumerate(dict.fromkeys(r["model"] for r in means))}
    methods = list(METHODS)
    chosen.sort(key=lambda r: (order[r["model"]], methods.index(r["method"]), -r["macs"]))
    cells = [
        (
            short(row["model"]),
            METHODS[row["method"]].label,
            percent(row["macs"]),
            percent(row["file_bytes"]),
            percent(row["top1"], 2),
            points(row["lost"]),
        )
        for row in chosen
    ]
    columns = ("network", "method", "MACs", "bytes", "top-1", "points lost [95 %]")
    return Table("All methods by MACs", columns, cells)


def notes(
    rows: Sequence[Row], means: Sequence[Row], originals: Mapping[str, Row]
) -> list[str]:
    """Return what the reader must know."""
    goals = [_verdict(row) for row in means if row["goal"] is not None]
    return [
        f"goals met: {sum(goal.endswith('met') for goal in goals)} of {len(goals)}",
        "points lost: mean over the seeds; its 95 % interval is a percentile bootstrap that "
        "draws test images (the same for the original and for all seeds) and seeds, both with "
        "replacement; three seeds tell little about other seeds, so their deviation is shown",
        "speedup: the first seed's models, one thread, interleaved with the original",
        "table: measuring the losses, once for all limits of a seed and grid; model: all the "
        "rest for one limit; walk: solving its plans; peak memory: of the process that made "
        "all models of a seed and grid",
        "the other methods were given the images of the first seed",
        *(
            f"{short(model)}: original {percent(found['top1'], 2)}, "
            f"{found['median_ms']:.2f} ms, A/A control {interval(found['control'])}"
            for model, found in originals.items()
        ),
        *(
            f"{short(r['model'])} {r['method']} {r['limit']} seed {r['seed']}: {r['error']}"
            for r in rows
            if "error" in r
        ),
        *(
            f"{short(r['model'])} {r['method']} {r['limit']} seed {r['seed']}: limit not met"
            for r in rows
            if not r.get("met", True)
        ),
    ]


def short(model: str) -> str:
    """Return a CIFAR-10 network's name without where it comes from."""
    return model.rpartition("_")[2]
