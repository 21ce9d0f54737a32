"""Structured pruning of onnxsim 0.8 against onnxcomp at the same MACs.

The peer removes a share of the channels of every chain that it finds, ranked by weights ("l2")
or by weights and activations on the same samples ("wanda"); its documentation asks for
`simplify` first.  The MACs of what it returns, counted by onnxcomp, become the limit for
onnxcomp on its default grid.  All models of a case are then judged on new samples at once, and
timed at once, interleaved: the original, both rankings of the peer (equal shapes, one timed)
and ours.
"""

from __future__ import annotations

from typing import Any

from benchmarks import data
from benchmarks.common import (
    ChildError,
    Options,
    Outcome,
    SkippedError,
    Table,
    count,
    interval,
    model_path,
    percent,
    run_child,
    shared_folder,
    versions,
)

MODELS = (
    "akamaster_cifar10_resnet20",
    "akamaster_cifar10_resnet56",
    "kazuhito00_yolox_nano",
    "linzaer_ultralight_face_RFB-320",
)
SPARSITIES = (0.3, 0.5)
PATIENCE = {"ours": 1.5, "hurried": 4.0}  # the default, and one that gives more loss for time
RANKINGS = ("l2", "wanda")
LATENCY_SECONDS = 20.0
_CALIBRATION = 64  # samples for the peer's activations


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    used = versions()["onnxsim"]
    if used == "absent":
        raise SkippedError("onnxsim is absent: install onnxsim>=0.8")
    models = MODELS[::3] if options.quick else MODELS
    rows = [row for model in models for row in _model(model, options)]
    won = [row for row in rows if "ours" in row and row["peer_runs"]]
    notes = [
        f"onnxsim {used}: {name} (patience {patience:g}) loses less in "
        f"{sum(row[name]['loses_less'] for row in won)} of {len(won)} cases and is faster "
        f"beyond the 95 % interval in {sum(row[name]['ratio']['low'] > 1 for row in won)}"
        for name, patience in PATIENCE.items()
    ] + [
        "lost: points of top-1 on 5,000 test images; for detectors, which have no labels, "
        "drift (relative L2 of the worst output) on new pictures",
        "speed: time of the peer's model over ours, one thread",
    ]
    return Outcome(rows, (_table(rows),), notes)


def _model(model: str, options: Options) -> list[dict[str, Any]]:
    folder = str(options.work)
    limit = 32 if options.quick else None
    run_child(
        "benchmarks.data:write", model=model, folder=folder, seed=options.seed, limit=limit
    )
    sparsities = SPARSITIES[1:2] if options.quick else SPARSITIES
    return [_case(model, sparsity, options) for sparsity in sparsities]


def _case(model: str, sparsity: float, options: Options) -> dict[str, Any]:
    """Return one row; where the peer's model cannot be run, it says so and ends there."""
    fit, new = (str(data.sample_file(options.work, model, part)) for part in ("fit", "new"))
    stem = options.work / f"{model}-{sparsity}"
    row: dict[str, Any] = {"model": model, "sparsity": sparsity}
    peers = {}
    for ranking in RANKINGS:
        file = f"{stem}-{ranking}.onnx"
        try:
            row[ranking] = run_child(
                "benchmarks.peers:prune",
                model=model,
                data=fit,
                out=file,
                sparsity=sparsity,
                ranking=ranking,
            ).value
            row[ranking] |= run_child("benchmarks.cases:cost", file=file, data=new).value
            peers[ranking] = file
        except ChildError as error:
            row[ranking] = {"error": str(error)}
    row["peer_runs"] = RANKINGS[0] in peers
    if not row["peer_runs"]:
        return row
    own = {name: f"{stem}-{name}.onnx" for name in PATIENCE}
    for name, file in own.items():
        row[name] = run_child(
            "benchmarks.cases:compress",
            cores=options.threads,
            model=model,
            data=fit,
            out=file,
            macs=row["l2"]["macs"],
            seed=options.seed,
            search_threads=options.threads,
            patience=PATIENCE[name],
        ).value
    files = peers | own
    judged = run_child(
        "benchmarks.cases:judge", model=model, files=list(files.values()), data=new
    ).value
    row["original"] = {**row["ours"].pop("original"), **judged[0]}
    row["hurried"].pop("original")
    for name, seen in zip(files, judged[1:], strict=True):
        row[name] |= seen
    timed = run_child(
        "benchmarks.cases:latency",
        models=[peers["l2"], str(model_path(model)), *own.values()],
        data=new,
        seconds=3.0 if options.quick else LATENCY_SECONDS,
    ).value
    for name, time in zip(("l2", "original", *own), timed[:-1], strict=True):
        row[name]["median_ms"], row[name]["ratio"] = time["median_ms"], time["ratio"]
    row["control"] = timed[-1]["ratio"]
    best = min(_loss(row[ranking], row["original"]) for ranking in peers)
    for name in own:
        row[name]["loses_less"] = _loss(row[name], row["original"]) < best
    return row


def prune(*, model: str, data: str, out: str, sparsity: float, ranking: str) -> dict[str, Any]:
    """Let the peer simplify and prune a model, and run the result once; runs in a child.

    Raises:
        ExecutionError: Its result cannot be loaded or run.
    """
    import onnx
    import onnxsim

    import onnxcomp
    from onnxcomp.runtime import Session

    original = onnxcomp.load(model_path(model))
    inputs = original.signature.inputs
    samples = onnxcomp.load_samples(data, inputs)
    simplified, checked = onnxsim.simplify(onnx.load(model_path(model)))
    if ranking == "l2":
        pruned = onnxsim.apply_structured_pruning(simplified, sparsity=sparsity)
    else:
        part = samples.take(range(min(_CALIBRATION, samples.count)))
        feeds = [batch.feed for batch in part.batches(inputs, 16)]
        pruned = onnxsim.apply_structured_wanda_pruning(simplified, feeds, sparsity=sparsity)
    onnx.save(pruned, out)
    feed = next(samples.take([0]).batches(inputs, 1)).feed
    Session(onnxcomp.load(out)).run(feed)
    return {"simplify_checked": bool(checked)}


def _loss(found: dict[str, Any], original: dict[str, Any]) -> float:
    """Return lost points of top-1, or drift where there are no labels."""
    if original["top1"] is None:
        return float(found["relative_l2"])
    return float(original["top1"] - found["top1"])


def _table(rows: list[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        name = f"{row['model']}, {row['sparsity']:g}"
        if not row["peer_runs"]:
            cells.append((name, "-", "the peer's model does not run", *["-"] * 8))
            continue
        original = row["original"]

        def lost(key: str, row: dict[str, Any] = row) -> str:
            if "error" in row[key]:
                return "does not run"
            loss = _loss(row[key], row["original"])
            return f"{loss:.3f}" if row["original"]["top1"] is None else f"{100 * loss:+.2f}"

        cells.append(
            (
                name,
                count(original["macs"]),
                percent(row["l2"]["macs"] / original["macs"]),
                " / ".join(
                    percent(row[k]["result"]["macs"] / original["macs"]) for k in PATIENCE
                ),
                lost("l2"),
                lost("wanda"),
                lost("ours"),
                lost("hurried"),
                " / ".join(
                    f"{row[k]['median_ms']:.2f}" for k in ("original", "l2", *PATIENCE)
                ),
                interval(row["ours"]["ratio"]),
                interval(row["hurried"]["ratio"]),
            )
        )
    columns = (
        "network, sparsity",
        "MACs",
        "peer",
        "ours / hurried",
        "lost by l2",
        "by wanda",
        "by ours",
        "by hurried",
        "ms: original / peer / ours / hurried",
        "speed of ours",
        "of hurried",
    )
    return Table("Structured pruning at equal MACs", columns, cells)
