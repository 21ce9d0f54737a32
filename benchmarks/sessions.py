"""From a packed file to a running session, against the plain file: seconds and peak memory.

A network of 25.8 million weights on 31 levels, 3 x 3 convolutions and dense layers, opened in
fresh processes that take turns, each until its first run is done.  Imports do not count.
Memory is what opening and the first run add at their peak, over the bytes of the weights: in
a fresh process, and again where a tiny network was opened before, so that onnxruntime and the
compiled loops, which are loaded once, do not count.
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
TINY = 16  # width of the network that is opened before
GOAL_S, GOAL_MEMORY = 0.5, 1.25
LEVELS = ("EXTENDED", "ALL")
FILES = ("plain", *(profile.value for profile in codec.Profile if profile != "max"))
_LEVEL, _LARGEST = 0.3, 15  # deviations between two levels, and how many of them
_TURNS = 5


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shrink = 4 if options.quick else 1
    large = _made(options, CONV_WIDTH // shrink, MATMUL_WIDTH // shrink)
    tiny = _made(options, TINY, TINY)["files"]
    runs: dict[tuple[str, str, bool], list[dict[str, float]]] = {}
    for _ in range(1 if options.quick else _TURNS):
        for level in LEVELS:
            for file, path in large["files"].items():
                for first in (None, tiny[file]):
                    given = {"path": path, "level": level, "first": first}
                    found = run_child("benchmarks.sessions:opened", **given).value
                    runs.setdefault((file, level, first is None), []).append(found)
    rows: list[dict[str, Any]] = []
    for file, level in dict.fromkeys(key[:2] for key in runs):
        fresh, later = (runs[file, level, alone] for alone in (True, False))
        size = large["weight_bytes"]
        rows.append(
            {
                "file": file,
                "level": level,
                "file_bytes": Path(large["files"][file]).stat().st_size,
                "seconds": median(one["seconds"] for one in fresh),
                "memory_fresh": median(one["bytes"] for one in fresh) / size,
                "memory": median(one["bytes"] for one in later) / size,
            }
        )
    for row in rows:
        plain = next(r for r in rows if r["file"] == "plain" and r["level"] == row["level"])
        row["more_s"] = row["seconds"] - plain["seconds"]
    return Outcome(rows, (_table(rows, large["weight_bytes"]),), _notes(rows))


def _made(options: Options, conv_width: int, matmul_width: int) -> dict[str, Any]:
    """Return the files of a network in all forms, and the bytes of its weights."""
    folder = options.work / str(conv_width)
    folder.mkdir(exist_ok=True)
    source = folder / "source.onnx"
    memory.build(source, conv_width=conv_width, matmul_width=matmul_width)
    found: dict[str, Any] = run_child(
        "benchmarks.sessions:write", source=str(source), folder=str(folder)
    ).value
    return found


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


def opened(*, path: str, level: str, first: str | None) -> dict[str, float]:
    """Open a session and run it once; return its seconds and the bytes added at the peak.

    Args:
        path: The file.
        level: Optimization level of onnxruntime.
        first: A file that is opened before, and does not count.
    """
    import onnxruntime as ort

    from benchmarks.child import MemoryWatch, read_status
    from onnxcomp.codec import rans

    rans.kernels()  # an import, as those of onnxruntime and NumPy
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
    )
    options.intra_op_num_threads = 1
    if first is not None:
        _run(first, options)
    before = read_status(Path("/proc/self/status"), "VmRSS")
    with MemoryWatch() as watch:
        start = time.monotonic()
        _run(path, options)
        seconds = time.monotonic() - start
    return {"seconds": seconds, "bytes": watch.resident - before}


def _run(path: str, options: Any) -> None:
    """Open a session on a file, plain or packed, and run it."""
    import onnxruntime as ort

    if path.endswith(".onnx"):
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    else:
        session = codec.open_session(path, options)
    session.run(None, {"x": np.zeros((1, 16, 4, 4), np.float32)})


def _table(rows: list[dict[str, Any]], weight_bytes: int) -> Table:
    cells = [
        (
            row["level"],
            row["file"],
            f"{row['file_bytes']:,}",
            f"{row['seconds']:.2f}",
            f"{row['more_s']:+.2f}",
            f"{row['memory_fresh']:.2f}",
            f"{row['memory']:.2f}",
        )
        for row in rows
    ]
    title = f"{count(weight_bytes)}B of float weights, to the end of the first run"
    columns = ("level", "file", "bytes", "seconds", "more than plain")
    columns += ("memory / weights", "with libraries loaded")
    return Table(title, columns, cells)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    more = max(row["more_s"] for row in rows if row["file"] == "fast")
    worst = max(
        row["memory"] for row in rows if row["level"] == "EXTENDED" and row["file"] != "plain"
    )
    fresh = max(row["memory_fresh"] for row in rows if row["level"] == "EXTENDED")
    return [
        f"fast: at most {more:+.2f} s; goal {GOAL_S}: {'met' if more <= GOAL_S else 'missed'}",
        f"memory at EXTENDED: {worst:.2f} of the weights where libraries were loaded before, "
        f"goal {GOAL_MEMORY}: {'met' if worst <= GOAL_MEMORY else 'missed'}; {fresh:.2f} in a "
        "fresh process",
    ]
