"""From a packed file to a running session, against the plain file: seconds and peak memory.

A network of 25.8 million weights on 31 levels, 3 x 3 convolutions and dense layers, opened in
fresh processes that take turns, each until its first run is done.  Imports do not count.
Memory is what opening and the first run add at their peak, over the bytes of the weights.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import onnxcomp
from benchmarks import memory
from benchmarks.common import Options, Outcome, Table, count, run_child
from onnxcomp import codec

CONV_WIDTH, MATMUL_WIDTH = 512, 896
GOAL_S, GOAL_MEMORY = 0.5, 1.25
LEVELS = ("EXTENDED", "ALL")
FILES = ("plain", *(profile.value for profile in codec.Profile if profile != "max"))
_LEVEL, _LARGEST = 0.3, 15  # deviations between two levels, and how many of them
_TURNS = 5


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shrink = 4 if options.quick else 1
    large = options.work / "large.onnx"
    memory.build(large, conv_width=CONV_WIDTH // shrink, matmul_width=MATMUL_WIDTH // shrink)
    made = run_child("benchmarks.sessions:write", source=str(large), folder=str(options.work))
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(1 if options.quick else _TURNS):
        for level in LEVELS:
            for file, path in made.value["files"].items():
                found = run_child("benchmarks.sessions:opened", path=path, level=level)
                runs.setdefault((file, level), []).append(found.value)
    rows: list[dict[str, Any]] = [
        {
            "file": file,
            "level": level,
            "file_bytes": Path(made.value["files"][file]).stat().st_size,
            "seconds": median(one["seconds"] for one in found),
            "memory": median(one["bytes"] for one in found) / made.value["weight_bytes"],
        }
        for (file, level), found in runs.items()
    ]
    for row in rows:
        plain = next(r for r in rows if r["file"] == "plain" and r["level"] == row["level"])
        row["more_s"] = row["seconds"] - plain["seconds"]
    return Outcome(rows, (_table(rows, made.value["weight_bytes"]),), _notes(rows))


def write(*, source: str, folder: str) -> dict[str, Any]:
    """Round the weights of a network to few levels and write it in all forms."""
    draft = onnxcomp.load(source).edit()
    for name, array in list(draft.weights.items()):
        step = _LEVEL * float(array.std())
        levels = np.clip(np.rint(array / step), -_LARGEST, _LARGEST)
        draft.set_weight(name, (levels * step + 0.0).astype(np.float32))  # no -0
    model = draft.seal(by="sessions")
    files = {}
    for file in FILES:
        path = Path(folder) / ("plain.onnx" if file == "plain" else f"{file}.onnxc")
        files[file] = str(path)
        if file == "plain":
            model.save(path)
        else:
            codec.pack(model, path, file)
    size = sum(array.nbytes for array in model.weights.values())
    return {"files": files, "weight_bytes": size}


def opened(*, path: str, level: str) -> dict[str, float]:
    """Open a session and run it once; return its seconds and the bytes added at the peak."""
    import onnxruntime as ort

    from benchmarks.child import MemoryWatch, read_status
    from onnxcomp.codec import rans

    rans.kernels()  # compiled loops are loaded from a cache, as torch and others are imported
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
    )
    options.intra_op_num_threads = 1
    x = np.zeros((1, 16, 4, 4), np.float32)
    before = read_status(Path("/proc/self/status"), "VmRSS")
    with MemoryWatch() as watch:
        start = time.monotonic()
        if path.endswith(".onnx"):
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        else:
            session = codec.open_session(path, options)
        session.run(None, {"x": x})
        seconds = time.monotonic() - start
    return {"seconds": seconds, "bytes": watch.resident - before}


def _table(rows: list[dict[str, Any]], weight_bytes: int) -> Table:
    cells = [
        (
            row["level"],
            row["file"],
            f"{row['file_bytes']:,}",
            f"{row['seconds']:.2f}",
            f"{row['more_s']:+.2f}",
            f"{row['memory']:.2f}",
        )
        for row in rows
    ]
    title = f"{count(weight_bytes)}B of float weights, to the end of the first run"
    columns = ("level", "file", "bytes", "seconds", "more than plain", "memory / weights")
    return Table(title, columns, cells)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    more = max(row["more_s"] for row in rows if row["file"] == "fast")
    worst = max(
        row["memory"] for row in rows if row["level"] == "EXTENDED" and row["file"] != "plain"
    )
    return [
        f"fast: at most {more:+.2f} s; goal {GOAL_S}: {'met' if more <= GOAL_S else 'missed'}",
        f"memory at EXTENDED: {worst:.2f} of the weights; goal {GOAL_MEMORY}: "
        f"{'met' if worst <= GOAL_MEMORY else 'missed'}",
    ]
