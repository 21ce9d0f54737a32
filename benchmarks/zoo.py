"""All shared models through `onnxcomp inspect` and `onnxcomp compress --max-macs 0.8`.

Both run as a user runs them: the command line in a process of its own, with samples in a file.
What was written is read back, climbs the validation ladder once more, now on new samples, and
its drift is that on the new samples.  Latency comes from the command's own report.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.common import (
    ChildError,
    Options,
    Outcome,
    Table,
    command,
    count,
    interval,
    manifest,
    model_path,
    percent,
    run_child,
)

SHARE = 0.8
GOAL = 16  # models that must end with exit code 0
QUICK_MODELS = (
    "linzaer_ultralight_face_RFB-320",
    "mlperftiny_kws_dscnn",
    "silero_vad_16k_op15",
)


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    names = [name for name in sorted(manifest()) if not options.quick or name in QUICK_MODELS]
    rows = [_row(name, options) for name in names]
    codes = collections.Counter(row["exit_code"] for row in rows)
    counted = ", ".join(f"{codes[code]} with {code}" for code in sorted(codes))
    notes = [
        f"exit codes of compress: {counted}; the goal is at least {GOAL} of 22 with 0, the "
        "rest with 5 or 3",
        f"ladder on new samples: {sum(row.get('ladder') == 'passed' for row in rows)} passed",
        "drift: relative L2 of the worst output, on samples that were not fitted on",
        *(
            f"{row['model']}: {data.NOTES[row['model']]}"
            for row in rows
            if row["model"] in data.NOTES
        ),
    ]
    return Outcome(rows, (_table(rows), _refusals(rows)), notes)


def _row(model: str, options: Options) -> dict[str, Any]:
    """Return everything about one model."""
    folder = options.work
    limit = 16 if options.quick else None
    run_child(
        "benchmarks.data:write",
        model=model,
        folder=str(folder),
        seed=options.seed,
        limit=limit,
    )
    fit, new = (str(data.sample_file(folder, model, part)) for part in ("fit", "new"))
    path, out = str(model_path(model)), folder / f"{model}.onnx"
    inspection, report = folder / "inspect.json", folder / f"{model}.json"
    inspected = command("inspect", path, "--data", fit, "--json", str(inspection))
    code, seconds, said = command(
        *("compress", path, "-o", str(out), "--data", fit, "--max-macs", str(SHARE)),
        *("--seed", str(options.seed), "--json", str(report), "--quiet"),
    )
    row: dict[str, Any] = {
        "model": model,
        "inspect_exit_code": inspected[0],
        "exit_code": code,
        "seconds": seconds,
        "said": said.strip().splitlines()[-1:] if code else [],
    }
    if inspected[0] == 0:
        row |= _inspected(json.loads(inspection.read_text()))
    if report.exists():
        row |= _reported(json.loads(report.read_text()), row.get("layers", {}))
    row.pop("layers", None)
    if out.exists():
        try:
            row |= run_child(
                "benchmarks.zoo:check", model=model, file=str(out), data=new
            ).value
        except ChildError as error:
            row["ladder"] = str(error)
    return row


def check(*, model: str, file: str, data: str) -> dict[str, Any]:
    """Send a written file up the validation ladder on new samples; runs in a child."""
    import onnxcomp
    from onnxcomp.validation import validate

    original, candidate = onnxcomp.load(model_path(model)), onnxcomp.load(file)
    samples = onnxcomp.load_samples(data, original.signature.inputs)
    ladder = validate(original, candidate, samples, path=Path(file))
    seen = ladder.evaluation
    last = ladder.rungs[-1]
    return {
        "ladder": "passed" if ladder.passed else f"{last.name}: {last.detail}",
        "drift": None if seen is None else seen.relative_l2,
        "new_samples": samples.count,
    }


def _inspected(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "nodes": sum(found["operators"].values()),
        "groups": len(found["groups"]),
        "pinned_groups": sum(group["pinned"] is not None for group in found["groups"]),
        "layers": {layer["id"]: layer["share"] for layer in found["layers"]},
    }


def _reported(report: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, Any]:
    """Return what the report of `compress` says, in short."""
    benchmark = report["benchmark"]
    timed = None if benchmark is None else benchmark["models"][1]
    return {
        "met": report["met"],
        "original": report["original"],
        "result": report["result"],
        "changed_macs": report["changed_macs"],
        "ratio": None if timed is None else timed["cpu_ratio"] or timed["wall_ratio"],
        "control": None if timed is None else benchmark["control"]["cpu_ratio"],
        "notes": report["notes"],
        "phases": report["seconds"],
        "refusals": _ranked(report["refusals"], shares),
    }


def _ranked(
    refusals: Sequence[Mapping[str, str]], shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the reasons of refusals without names, those with the most MACs first."""
    macs: dict[str, float] = collections.defaultdict(float)
    places: collections.Counter[str] = collections.Counter()
    for refusal in refusals:
        reason = re.sub(r"'[^']*'", "'...'", refusal["reason"])
        reason = re.sub(r"\b\d+(x\d+)?\b", "N", reason)
        places[reason] += 1
        macs[reason] += shares.get(refusal["where"], 0.0)
    order = sorted(places, key=lambda reason: (-macs[reason], -places[reason]))
    return [{"reason": r, "places": places[r], "macs": macs[r]} for r in order]


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "model",
        "exit",
        "params",
        "MACs",
        "MACs after",
        "bytes after",
        "speedup",
        "A/A",
        "drift",
        "changed",
        "ladder",
        "seconds",
    )
    cells = []
    for row in rows:
        before, after = row.get("original", {}), row.get("result", {})
        known = bool(before and after)
        drift, control = row.get("drift"), row.get("control")
        cells.append(
            (
                row["model"],
                f"{row['inspect_exit_code']} {row['exit_code']}",
                f"{count(before['params'])} -> {count(after['params'])}" if known else "-",
                count(before["macs"]) if known else "-",
                percent(after["macs"] / max(before["macs"], 1)) if known else "-",
                percent(after["file_bytes"] / before["file_bytes"]) if known else "-",
                interval(row.get("ratio")),
                f"{control['value']:.2f}" if control else "-",
                "-" if drift is None else f"{drift:.3f}",
                percent(row.get("changed_macs")),
                row.get("ladder", "-"),
                f"{row['seconds']:.0f}",
            )
        )
    return Table("22 models, --max-macs 0.8 (exit: inspect compress)", columns, cells)


def _refusals(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for row in rows:
        top = next(iter(row.get("refusals", [])), None)
        why = "; ".join([*row["said"], *row.get("notes", [])]) or "-"
        if top is None:
            cells.append((row["model"], "-", "-", why))
        else:
            share = percent(top["macs"])
            cells.append(
                (row["model"], f"{top['reason']} ({top['places']} places)", share, why)
            )
    columns = ("model", "top refusal reason", "MACs there", "notes")
    return Table("Top refusal reason of each model, and what the run said", columns, cells)
