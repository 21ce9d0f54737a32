"""Measures the models of a bench kit on this machine; needs Python 3.8, numpy and onnxruntime.

    python measure.py [--seconds 120] [--threads 1] [-o result.json]

It lies beside `kit.json` in the kit's unpacked zip.  Take the result back to where onnxcomp
is: `onnxcomp bench --kit-result result.json` prints it, and `onnxcomp compress --target
result.json` uses it where the kit has micro-chains.  Nothing is sent anywhere.

All models are visited in random order, visit after visit, with second sessions of some as a
control.  A visit is a run that does not count and three timings of at least a millisecond;
sessions are opened afresh three times.  Entries that are marked cold have weights that no
cache keeps while a whole network runs: the caches are swept before each of their runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

SCHEMA_VERSION = 1
KIT_KIND, RESULT_KIND = "onnxcomp-kit", "onnxcomp-kit-result"
_ROUNDS = 3
_WARM_UPS = 3
_TIMINGS = 3
_MIN_TIMING_NS = 1000000
_MAX_REPEATS = 1000
_SWEPT_BYTES = 16 * 2**20
_LINE_SECONDS = 10.0
_CPU_INFO = Path("/proc/cpuinfo")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds in every so many, or "max"
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def measure(
    folder: Path,
    seconds: float,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Measure the models of the kit in a folder.

    Args:
        folder: Where `kit.json` is.
        seconds: Time limit; every model is visited at least once.
        threads: Intra-op threads.
        progress: Is told the share of the time that is over.

    Returns:
        What the result file holds: the kit's entries, each with its times in ns by round,
        visit and timing, or with the error that kept it from running.
    """
    kit = json.loads((folder / "kit.json").read_text(encoding="utf-8"))
    if kit.get("kind") != KIT_KIND or kit.get("schema_version") != SCHEMA_VERSION:
        raise SystemExit("kit.json is not of this script; take both from one zip")
    machine = describe_machine(threads)  # before this makes load of its own
    swept = np.zeros(_SWEPT_BYTES, np.uint8)
    entrants = [_Entrant(folder, entry, swept) for entry in kit["entries"]]
    rng = np.random.default_rng(0)
    start, collecting = time.monotonic(), gc.isenabled()
    gc.disable()
    try:
        for number in range(1, _ROUNDS + 1):
            for entrant in entrants:
                entrant.open(threads)
            running = [entrant for entrant in entrants if not entrant.error]
            share = 0.0
            while running and share < number / _ROUNDS:
                for index in rng.permutation(len(running)):
                    running[index].visit()
                share = (time.monotonic() - start) / seconds
                if progress is not None:
                    progress(min(share, 1.0))
            if share >= 1:
                break
    finally:
        if collecting:
            gc.enable()
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": RESULT_KIND,
        "machine": machine,
        "entries": [entrant.result() for entrant in entrants],
    }


class _Entrant:
    """One entry of the kit: its current session and all its times."""

    def __init__(self, folder: Path, entry: dict[str, Any], swept: Any) -> None:
        self.entry, self.error = entry, ""
        self._path, self._swept = str(folder / entry["file"]), swept
        rng = np.random.default_rng(0)
        self._feeds = {}
        for name, source in entry["inputs"].items():
            if isinstance(source, str):
                value = np.load(str(folder / source), allow_pickle=False)
            else:
                value = rng.standard_normal(source).astype(np.float32)
            self._feeds[name] = value
        self._rounds: list[list[list[tuple[int, int]]]] = []

    def open(self, threads: int) -> None:
        """Begin a round: a fresh session, warmed up, and how many runs a timing spans."""
        if self.error:
            return
        try:
            self._session = ort.InferenceSession(
                self._path, session_options(threads), providers=["CPUExecutionProvider"]
            )
            warm_ups = [self._time(1)[0] for _ in range(_WARM_UPS)]
        except Exception as error:  # an older onnxruntime lacks operators
            self.error = " ".join(str(error).split())
            return
        needed = math.ceil(_MIN_TIMING_NS / min(warm_ups))
        self._repeats = 1 if self.entry["cold"] else min(needed, _MAX_REPEATS)
        self._rounds.append([])

    def visit(self) -> None:
        """Run once unseen, as the caches hold another model, then time."""
        self._session.run(None, self._feeds)
        self._rounds[-1].append([self._time(self._repeats) for _ in range(_TIMINGS)])

    def result(self) -> dict[str, Any]:
        """Return the entry with its times."""
        if self.error:
            return dict(self.entry, error=self.error)
        walls, cpus = (
            [[[times[i] for times in visit] for visit in visits] for visits in self._rounds]
            for i in (0, 1)
        )
        return dict(self.entry, wall_ns=walls, cpu_ns=cpus)

    def _time(self, repeats: int) -> tuple[int, int]:
        run, feeds = self._session.run, self._feeds
        if self.entry["cold"]:
            self._swept += 1
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(repeats):
            run(None, feeds)
        cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
        # A coarse thread clock may not have moved.
        return max(wall // repeats, 1), max(cpu // repeats, 1)


def session_options(threads: int) -> Any:
    """Return the options under which onnxcomp measures models, too."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def describe_machine(threads: int) -> dict[str, Any]:
    """Describe this machine as far as it can be read."""
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "onnxruntime": ort.__version__,
        "threads": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "governor": _read(_GOVERNOR),
    }


def usable_cores() -> int:
    """Return how many cores the process may use: its affinity, and its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = (_read(_QUOTA) or "max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(int(quota[0]) // int(quota[1]), 1))
    return cores


def _cpu_name() -> str:
    for line in (_read(_CPU_INFO) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


class _Lines:
    """Progress as a line now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, share: float) -> None:
        if time.monotonic() - self._last >= _LINE_SECONDS:
            print(f"{share:4.0%}", file=sys.stderr, flush=True)
            self._last = time.monotonic()


def main() -> None:
    """Measure the kit in whose folder this script lies, and write the result."""
    parser = argparse.ArgumentParser(description="Measure the models of this bench kit.")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit [120]")
    parser.add_argument("--threads", type=int, default=1, help="threads of every session [1]")
    parser.add_argument("-o", "--out", type=Path, default=Path("result.json"))
    arguments = parser.parse_args()
    if not arguments.seconds > 0 or arguments.threads < 1:
        parser.error("--seconds must be above 0, --threads at least 1")
    folder = Path(__file__).resolve().parent
    result = measure(folder, arguments.seconds, arguments.threads, _Lines())
    temporary = arguments.out.with_name(arguments.out.name + ".tmp")
    temporary.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(arguments.out)
    for entry in result["entries"]:
        if entry["role"] == "chain" and "error" not in entry:
            continue
        outcome = entry.get("error") or f"{_median_ms(entry):.3f} ms"
        print(f"{entry['name']}: {outcome}")
    print(f"wrote {arguments.out}")


def _median_ms(entry: dict[str, Any]) -> float:
    visits = [np.median(visit) for visits in entry["wall_ns"] for visit in visits]
    return float(np.median(visits)) / 1e6


if __name__ == "__main__":
    main()
