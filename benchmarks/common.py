"""What all benchmarks share: real models, fresh processes, tables and result files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).parent / "results"
DIGITS = "digits"
"""The bundled model, which stands beside the shared ones."""
TARGET = "x86-avx512"
SCHEMA_VERSION = 1
PACKAGES = (
    "onnxcomp",
    "onnx",
    "onnxruntime",
    "onnx-graphsurgeon",
    "numpy",
    "scipy",
    "onnxsim",
    "torch",
)
_RESAMPLES = 2000
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class SkippedError(Exception):
    """A benchmark cannot be run here; the message says what is missing."""


class ChildError(Exception):
    """A child process failed; the message ends with the last line that it wrote."""


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    Attributes:
        quick: Tiny settings, to see that a benchmark works.
        seed: Seed of all draws.
        threads: Threads of the search; latency is always measured with one.
        work: Folder for models that a benchmark makes; one that is kept also holds the
            answers of its children, which are then not asked again.
        out: Folder of the results.
        target: Profile of the CPU, or the `target.json` of a calibrated one.
    """

    quick: bool
    seed: int
    threads: int
    work: Path
    out: Path
    target: str = TARGET


@dataclass(frozen=True)
class Table:
    """A table of strings with a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return the table for a terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        left = [not all(_is_figure(row[i]) for row in self.rows) for i in range(len(widths))]
        padded = [
            "  ".join(
                cell.ljust(width) if words else cell.rjust(width)
                for cell, width, words in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title, padded[0], rule, *padded[1:]])

    def markdown(self) -> str:
        """Return the table in Markdown."""
        figures = [
            all(_is_figure(row[i]) for row in self.rows) for i in range(len(self.columns))
        ]
        rule = ["---:" if figure else "---" for figure in figures]
        lines = [self.columns, rule, *([_escaped(c) for c in row] for row in self.rows)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{body}"


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found.

    Attributes:
        rows: Plain JSON values, one object per case.
        tables: The same for people.
        notes: What the reader must know first.
    """

    rows: Sequence[Mapping[str, Any]]
    tables: Sequence[Table]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """A call for a fresh process.

    Attributes:
        target: "module:function".
        arguments: Plain JSON values, passed by keyword.
        cores: Threads of linear algebra.
        timeout_s: Seconds after which the process is ended; None for no limit.
    """

    target: str
    arguments: Mapping[str, Any]
    cores: int = 1
    timeout_s: float | None = None


@dataclass(frozen=True)
class ChildRun:
    """What a call in a fresh process returned and took.

    Attributes:
        value: Its plain JSON value.
        seconds: Wall time of the call, without starting Python.
        peak_rss: Largest resident memory, in bytes, mapped pages of files included.
        peak_anonymous: The same without pages of files; sampled every few milliseconds.
        peak_children: Largest resident memory of a process that the call started; 0 if none.
    """

    value: Any
    seconds: float
    peak_rss: int
    peak_anonymous: int
    peak_children: int


def shared_folder() -> Path:
    """Return the folder of real models and data; `SkippedError` where it is absent."""
    if not (SHARED / "models" / "manifest.json").exists():
        raise SkippedError("../shared is absent: no real models and data to measure on")
    return SHARED


def model_path(name: str) -> Path:
    """Return the file of a shared model, or of the bundled one."""
    if name == DIGITS:
        return ROOT / "models" / "digits" / "digits.onnx"
    return shared_folder() / "models" / f"{name}.onnx"


def manifest() -> dict[str, dict[str, Any]]:
    """Return the manifest's entries of the shared models by name."""
    entries = json.loads((shared_folder() / "models" / "manifest.json").read_text())
    return {entry["name"]: entry for entry in entries}


def run_child(
    target: str, /, *, cores: int = 1, timeout_s: float | None = None, **arguments: Any
) -> ChildRun:
    """Call a function in a fresh process, so that its memory is its own.

    Args:
        target: "module:function".
        cores: Threads of linear algebra in the child.
        timeout_s: Seconds after which the process is ended; None for no limit.
        arguments: Plain JSON values, passed by keyword.

    Raises:
        ChildError: The call raised, the process died, or its time was over.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        answer = Path(folder) / "answer.json"
        try:
            ran = subprocess.run(
                [sys.executable, "-m", "benchmarks.child", target, str(answer)],
                input=json.dumps(arguments),
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(cores))},
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise ChildError(f"{target}: ended after {error.timeout:.0f} s") from error
        if ran.returncode or not answer.exists():
            said = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
            raise ChildError(f"{target}: {said[-1]}")
        return ChildRun(**json.loads(answer.read_text()))


def run_peer(python: str, script: str, *arguments: str) -> Any:
    """Return what a script beside this file prints at last, as JSON, in another environment.

    Args:
        python: Its interpreter.
        script: Name of the script.
        arguments: Those of the script.

    Raises:
        ChildError: It failed; the message is the last line that it wrote.
    """
    ran = subprocess.run(
        [python, str(Path(__file__).with_name(script)), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")},
        check=False,
    )
    if ran.returncode:
        raise ChildError("".join(ran.stderr.strip().splitlines()[-1:]))
    return json.loads(ran.stdout.splitlines()[-1])


def run_jobs(jobs: Sequence[Job], *, workers: int, kept: Path) -> list[ChildRun | ChildError]:
    """Make calls in fresh processes, some of them side by side.

    Args:
        jobs: The calls.
        workers: Processes at a time.
        kept: Folder of answers: a call that has one there is not made again.

    Returns:
        For every job what it returned, or why it failed.
    """
    kept.mkdir(parents=True, exist_ok=True)

    def run(job: Job) -> ChildRun | ChildError:
        key = json.dumps([job.target, dict(job.arguments)], sort_keys=True)
        answer = kept / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if answer.exists():
            return ChildRun(**json.loads(answer.read_text()))
        try:
            found = run_child(
                job.target, cores=job.cores, timeout_s=job.timeout_s, **job.arguments
            )
        except ChildError as error:
            return error
        answer.write_text(json.dumps(asdict(found)))
        return found

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, jobs))


def paired_interval(right: Sequence[str], original: str, *, seed: int = 0) -> dict[str, float]:
    """Return the points lost against the original with a 95 % interval, paired by sample.

    A percentile bootstrap draws the samples, the same for all runs, and the runs, both with
    replacement: what it says holds for new samples and, as far as so few runs can tell, for
    new runs.

    Args:
        right: For every run one character per sample: "1" where it was right, else "0".
        original: The same for the original.
        seed: Seed of the draws.

    Returns:
        `value`, the mean over samples and runs as a share, `low` and `high`.
    """
    before, *after = (np.frombuffer(run.encode(), np.uint8) for run in (original, *right))
    lost = before.astype(np.float64) - np.stack(after)  # (runs, samples)
    rng = np.random.default_rng(seed)
    runs, count = lost.shape
    samples = rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES) / count
    drawn = rng.multinomial(runs, np.full(runs, 1 / runs), _RESAMPLES) / runs
    means = np.einsum("rs,rs->r", samples @ lost.T, drawn)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"value": float(lost.mean()), "low": float(low), "high": float(high)}


def command(*arguments: str, cores: int = 1) -> tuple[int, float, str]:
    """Run the `onnxcomp` command in a process; return exit code, seconds and stderr."""
    start = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", "from onnxcomp.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(cores))},
        check=False,
    )
    return ran.returncode, time.monotonic() - start, ran.stderr


def versions() -> dict[str, str]:
    """Return the versions of what is measured and of what it stands on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "from source" if package == "onnxcomp" else "absent"
    return found


@dataclass(frozen=True)
class Record:
    """One run of a benchmark, as it is written to its JSON file."""

    benchmark: str
    quick: bool
    seed: int
    threads: int
    seconds: float
    machine: Mapping[str, Any]
    outcome: Outcome
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": self.benchmark,
            "quick": self.quick,
            "seed": self.seed,
            "threads": self.threads,
            "seconds": round(self.seconds, 1),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "notes": list(self.outcome.notes),
            "rows": [dict(row) for row in self.outcome.rows],
        }

    def markdown(self) -> str:
        """Return the page beside the JSON file."""
        machine, used = self.machine, self.versions
        head = (
            f"# {self.benchmark}\n\n{machine['cpu']}, {machine['cores']} cores, onnxruntime "
            f"{used['onnxruntime']}, seed {self.seed}, {self.seconds:.0f} s in all"
            f"{'; quick settings: figures mean nothing' if self.quick else ''}."
        )
        notes = "\n".join(f"* {note}" for note in self.outcome.notes)
        tables = "\n\n".join(table.markdown() for table in self.outcome.tables)
        return "\n\n".join(part for part in (head, notes, tables) if part) + "\n"

    def write(self, folder: Path, work: Path) -> Path:
        """Write NAME.json and NAME.md into a folder and return the first.

        Files that a run made are named as in its folder `work`, not by their whole path.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        for file, content in ((path, text), (path.with_suffix(".md"), self.markdown())):
            file.write_text(content.replace(f"{work}/", ""), encoding="utf-8")
        return path


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as per cent; "-" for None."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def count(number: float | None) -> str:
    """Return a count with k, M or G; "-" for None."""
    if number is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def points(lost: Mapping[str, float] | None) -> str:
    """Return lost points of a metric with their interval; "-" for None."""
    if lost is None:
        return "-"
    value, low, high = (100 * lost[key] for key in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def interval(ratio: Mapping[str, float] | None) -> str:
    """Return a ratio with its interval; "-" for None."""
    if ratio is None:
        return "-"
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _is_figure(cell: str) -> bool:
    return cell[:1] in "+-0123456789"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
