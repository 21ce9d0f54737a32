"""The bridge to torch: what converts and trains, and what one training step costs.

Coverage: every shared model on its new samples, and every builder (of twins for CIFAR-10 and
CIFAR-100 the first), written by both of torch's exporters with BatchNorm kept and folded, on
noise.  A model is covered where outputs are those of onnxruntime, a gradient reaches every
Parameter, and the untrained module goes back to the same bytes.

Training step: ResNet-18 at 112 x 112, batch 4, one thread: forward, backward and a step of
gradient descent through the bridge, against the torch module that was exported.  Steps of both
alternate; a second module of the same kind is the control.  Memory is what a step adds at its
peak, each in a process of its own.

Where `ONNX2TORCH_PYTHON` names a Python that has onnx2torch, the same graphs go through it.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.common import (
    ChildError,
    ChildRun,
    Job,
    Options,
    Outcome,
    SkippedError,
    Table,
    count,
    interval,
    manifest,
    model_path,
    run_child,
    run_jobs,
    run_peer,
)

GOAL = 1.05  # of the hand-written module's time and memory
TOLERANCE = 1e-5  # relative L2 of the worst output against onnxruntime
BUILDER, IMAGE, BATCH = "resnet18_imagenet", 112, 4
QUICK_MODELS = ("linzaer_ultralight_face_RFB-320", "silero_vad_16k_op15")
QUICK_BUILDERS = ("resnet20a_cifar10",)
TWIN = "_cifar100"  # the same graphs as for CIFAR-10 but for the size of the last layer
PEER_PYTHON = "ONNX2TORCH_PYTHON"
_SAMPLES = 2
_ROUNDS, _QUICK_ROUNDS = 60, 12
_PROCESSES, _QUICK_PROCESSES = 5, 1
_STEPS = 3  # whose peak is taken
_RESAMPLES = 2000


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    if importlib.util.find_spec("torch") is None:
        raise SkippedError("torch is absent: install '.[torch]'")
    rows = _coverage(options)
    step = _step(options)
    covered = sum(_is_covered(row) for row in rows)
    refused = sum("refused" in row for row in rows)
    notes = [
        f"coverage: {covered} of {len(rows)} graphs are covered, {refused} refused with a "
        f"reason; worst relative L2 of the rest {_worst(rows):.1e}",
        f"training step: time {interval(step['time'])} of the hand-written module's "
        f"(control {interval(step['control'])}), memory {step['memory']['value']:.2f}; "
        f"goal {GOAL}: {_verdict(step)}",
        "drift: relative L2 of the worst output against onnxruntime, unoptimised",
    ]
    if any("onnx2torch" in row for row in rows):
        right = sum(row.get("onnx2torch", {}).get("drift", 1.0) <= TOLERANCE for row in rows)
        notes.append(f"onnx2torch: {right} of {len(rows)} graphs within {TOLERANCE:g}")
    return Outcome([*rows, step], (_coverage_table(rows), _step_table(step)), notes)


def _coverage(options: Options) -> list[dict[str, Any]]:
    from models.builders import BUILDERS

    names = [n for n in sorted(manifest()) if not options.quick or n in QUICK_MODELS]
    peer = os.environ.get(PEER_PYTHON)
    jobs = [
        Job("benchmarks.bridge:cover_shared", {"name": name, "peer": peer}) for name in names
    ]
    others = [name for name in BUILDERS if not name.endswith(TWIN)]
    for name in QUICK_BUILDERS if options.quick else others:
        for exporter in ("torchscript", "dynamo"):
            for folded in (False, True):
                how = {"name": name, "exporter": exporter, "folded": folded}
                how |= {"path": str(options.work / "built.onnx"), "peer": peer}
                jobs.append(Job("benchmarks.bridge:cover_built", how))
    found = run_jobs(jobs, workers=1, kept=options.work / "answers")
    return [_row(job.arguments, answer) for job, answer in zip(jobs, found, strict=True)]


def _row(asked: Mapping[str, Any], answer: ChildRun | ChildError) -> dict[str, Any]:
    row = {key: value for key, value in asked.items() if key not in ("path", "peer")}
    if isinstance(answer, ChildError):
        return row | {"failed": str(answer)}
    return row | dict(answer.value)


def cover_shared(*, name: str, peer: str | None) -> dict[str, Any]:
    """Return how a shared model fares; runs in a child."""
    import onnxcomp
    from onnxcomp.samples import as_samples

    model = onnxcomp.load(model_path(name))
    arrays = data.samples(name, "new", limit=_SAMPLES)
    given = {key: array for key, array in arrays.items() if key != data.LABELS}
    samples = as_samples(given, model.signature.inputs)
    return _cover(model, samples) | _peer(peer, model, str(model_path(name)), samples)


def cover_built(
    *, name: str, exporter: Any, folded: bool, path: str, peer: str | None
) -> dict[str, Any]:
    """Return how an export of a builder fares; runs in a child."""
    import onnxcomp
    from models.builders import export
    from onnxcomp.analysis.probe import random_inputs

    export(name, path, folded=folded, exporter=exporter)
    model = onnxcomp.load(path)
    samples = random_inputs(model, _SAMPLES)
    return _cover(model, samples) | _peer(peer, model, path, samples)


def _cover(model: Any, samples: Any) -> dict[str, Any]:
    """Convert, compare, train for a gradient, and write back."""
    import torch

    from onnxcomp.bridge import check_equal, from_torch, takes_batches, to_torch
    from onnxcomp.errors import UnsupportedModelError, ValidationError

    torch.set_num_threads(1)
    try:
        module = to_torch(model)
    except UnsupportedModelError as error:
        return {"refused": str(error)}
    try:
        check_equal(module, model, samples, tolerance=TOLERANCE)
        equal = True
    except ValidationError:
        equal = False
    drift = check_equal(module, model, samples, tolerance=np.inf)
    first = next(iter(samples.batches(model.signature.inputs, 1))).feed
    outputs = module({name: torch.from_numpy(np.array(a)) for name, a in first.items()})
    floats = [value for value in outputs.values() if value.requires_grad]
    sum((value * torch.randn_like(value)).sum() for value in floats).backward()
    reached = [w.grad is not None and w.grad.isfinite().all() for w in module.parameters()]
    return {
        "equal": equal,
        "drift": max(drift.values()),
        "parameters": len(reached),
        "reached": int(sum(bool(r) for r in reached)),
        "weights": sum(weight.numel() for weight in module.parameters()),
        "untrained": module.untrained,
        "round_trip": from_torch(module, like=model).digest == model.digest,
        "takes_batches": takes_batches(module, model, samples),
    }


def _peer(python: str | None, model: Any, file: str, samples: Any) -> dict[str, Any]:
    """Return how onnx2torch fares with a file, as `onnx2torch`; empty where it is absent."""
    from onnxcomp.runtime import Session

    if python is None:
        return {}
    feed = next(iter(samples.batches(model.signature.inputs, _SAMPLES))).feed
    answer = Session(model).run(feed)
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        given = {f"in:{value.name}": feed[value.name] for value in model.signature.inputs}
        named = [answer[value.name] for value in model.signature.outputs]
        np.savez(arrays, **given, **{f"out:{i}": array for i, array in enumerate(named)})
        try:
            found = run_peer(python, "bridge_onnx2torch.py", file, str(arrays))
        except ChildError as error:
            found = {"failed": str(error)}
    return {"onnx2torch": found}


def _is_covered(row: Mapping[str, Any]) -> bool:
    return (
        row.get("equal", False)
        and row["reached"] == row["parameters"] > 0
        and row["round_trip"]
    )


def _worst(rows: Sequence[Mapping[str, Any]]) -> float:
    return max((row["drift"] for row in rows if "drift" in row), default=0.0)


def _step(options: Options) -> dict[str, Any]:
    """Return what one training step costs against the hand-written module."""
    path = str(options.work / f"{BUILDER}.onnx")
    rounds = _QUICK_ROUNDS if options.quick else _ROUNDS
    processes = _QUICK_PROCESSES if options.quick else _PROCESSES
    times = run_child("benchmarks.bridge:time_steps", path=path, rounds=rounds).value
    seed, native = options.seed, times["native"]
    added = {
        kind: [
            run_child("benchmarks.bridge:step_memory", path=path, kind=kind).value
            for _ in range(processes)
        ]
        for kind in ("native", "bridge")
    }
    middle = {kind: statistics.median(found) for kind, found in added.items()}
    return {
        "name": f"{BUILDER} at {IMAGE} x {IMAGE}, batch {BATCH}",
        "milliseconds": {k: 1e3 * statistics.median(v) for k, v in times.items()},
        "time": _paired(times["bridge"], native, seed),
        "control": _paired(times["control"], native, seed),
        "memory_bytes": middle,
        "memory": {"value": middle["bridge"] / middle["native"]},
    }


def _paired(times: Sequence[float], native: Sequence[float], seed: int) -> dict[str, float]:
    """Return the median of paired ratios with its 95 % bootstrap interval."""
    ratios = np.array(times) / np.array(native)
    drawn = np.random.default_rng(seed).choice(ratios, (_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return {"value": float(np.median(ratios)), "low": float(low), "high": float(high)}


def time_steps(*, path: str, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of every step, both kinds in turn; runs in a child."""
    makers = {"native": _native_step, "bridge": _bridge_step, "control": _native_step}
    steps = {kind: make(path) for kind, make in makers.items()}
    found: dict[str, list[float]] = {kind: [] for kind in steps}
    rng = np.random.default_rng(0)
    for index in range(rounds + 2):
        for kind in rng.permutation(list(steps)):
            start = time.process_time()
            steps[kind]()
            if index >= 2:  # the first ones warm up
                found[kind].append(time.process_time() - start)
    return found


def step_memory(*, path: str, kind: str) -> int:
    """Return the bytes that a training step adds at its peak; runs in a child."""
    from benchmarks.child import MemoryWatch, read_status

    step = {"native": _native_step, "bridge": _bridge_step}[kind](path)
    before = read_status(Path("/proc/self/status"), "VmRSS")
    with MemoryWatch() as memory:
        for _ in range(_STEPS):
            step()
    return memory.resident - before


def _native_step(path: str) -> Callable[[], None]:
    """Return a step on the network as torch has it."""
    from models.builders import BUILDERS

    module = BUILDERS[BUILDER]()
    module.requires_grad_(True)
    return _stepper(module, lambda x: module(x))


def _bridge_step(path: str) -> Callable[[], None]:
    """Return a step on its export, read back through the bridge."""
    import onnxcomp
    from models.builders import INPUT, OUTPUT, export
    from onnxcomp.bridge import to_torch

    if not Path(path).exists():
        export(BUILDER, path, folded=False, image_size=IMAGE)
    module = to_torch(onnxcomp.load(path))
    return _stepper(module, lambda x: module({INPUT: x})[OUTPUT])


def _stepper(module: Any, forward: Callable[[Any], Any]) -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        forward(images).square().mean().backward()
        optimizer.step()

    return step


def _verdict(step: Mapping[str, Any]) -> str:
    missed = [
        what
        for what, ratio in (("time", step["time"]), ("memory", step["memory"]))
        if ratio["value"] > GOAL
    ]
    return f"missed by {' and '.join(missed)}" if missed else "met"


def _coverage_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("graph", "exporter", "BatchNorm", "drift", "gradient reaches", "weights")
    columns += ("same bytes back", "any batch", "covered, or why not", "onnx2torch")
    cells = []
    for row in rows:
        form = {True: "folded", False: "kept"}.get(row.get("folded"), "-")
        head = (row["name"], row.get("exporter", "-"), form)
        if "drift" not in row:
            why = row.get("refused") or row["failed"]
            cells.append((*head, "-", "-", "-", "-", "-", _short(why), _peer_cell(row)))
            continue
        reasons = collections.Counter(row["untrained"].values())
        left = "; ".join(f"{n} weights stay: {why}" for why, n in reasons.items())
        cells.append(
            (
                *head,
                f"{row['drift']:.1e}",
                f"{row['reached']} of {row['parameters']}",
                count(row["weights"]),
                _yes(row["round_trip"]),
                _yes(row["takes_batches"]),
                " ".join(filter(None, ("yes" if _is_covered(row) else "no", left))),
                _peer_cell(row),
            )
        )
    return Table("Coverage of the bridge", columns, cells)


def _peer_cell(row: Mapping[str, Any]) -> str:
    """Return what onnx2torch made of a graph."""
    found = row.get("onnx2torch")
    if found is None:
        return "-"
    if "failed" in found:
        return _short(found["failed"])
    return f"{found['drift']:.1e}, {found['parameters']} parameters"


def _short(reason: str) -> str:
    """Return a reason with the first of the nodes that it lists."""
    first, *rest = reason.split("; ")
    return f"{first}; ..." if rest else first


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _step_table(step: Mapping[str, Any]) -> Table:
    cells = [
        (
            kind,
            f"{step['milliseconds'][kind]:.1f}",
            interval(ratio),
            f"{count(step['memory_bytes'].get(kind))}B" if kind != "control" else "-",
        )
        for kind, ratio in (
            ("native", None),
            ("bridge", step["time"]),
            ("control", step["control"]),
        )
    ]
    columns = ("module", "ms", "time to native", "memory of a step")
    return Table(f"Training step of {step['name']}", columns, cells)
