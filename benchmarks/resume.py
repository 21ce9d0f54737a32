"""Kill a compression at random moments; a valid model is on disk, and the rest ends the same.

The command line runs undisturbed once, with a resume folder of its own.  Then, in fresh
folders, it is started and ended with SIGKILL at a moment drawn uniformly between its first
line of progress and the time that the undisturbed run took; what it left under `-o` is loaded
and run in another process; and it is started again with the same `--resume`, to the end.  Its
file must be that of the undisturbed run, byte for byte.  In a chain there are several kills in
a row before the last start.  A run that ends before its moment counts as no kill, and another
moment is drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks import data
from benchmarks.common import (
    DIGITS,
    ROOT,
    SHARED,
    THREAD_VARIABLES,
    ChildError,
    Options,
    Outcome,
    Table,
    model_path,
    run_child,
)

NETWORK = "mlperftiny_cifar10_resnet8"
IMAGES = 256
KILLS, CHAINS = 20, 5
CHAIN_LENGTH = 4
_PATIENCE = 5  # runs of a trial that may end before they are killed


@dataclass(frozen=True)
class Case:
    """A model file with the samples that it is fitted on."""

    name: str
    model: Path
    samples: Path


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Exit code; minus the signal if it was killed.
        seconds: Wall time from its start.
        first: Seconds until its first line of progress, or until its end.
        lines: What it wrote to stderr.
    """

    code: int
    seconds: float
    first: float
    lines: Sequence[str]


@dataclass
class Folder:
    """Where one trial writes: its model, its resume folder and its report."""

    path: Path
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True)
        self.out = self.path / "out.onnx"

    def command(self, case: Case) -> list[str]:
        """Return the process's arguments."""
        flags = {
            "-o": self.out,
            "--data": case.samples,
            "--max-macs": 0.5,
            "--resume": self.path / "state",
            "--seed": 0,
            "--search-threads": 1,
            "--json": self.path / "report.json",
        }
        call = [sys.executable, "-c", "from onnxcomp.cli import main; main()", "compress"]
        return [
            *call,
            *(str(x) for x in (case.model, *(f for pair in flags.items() for f in pair))),
        ]

    def digest(self) -> str:
        """Return the SHA-256 of the model file, or "" where there is none."""
        return hashlib.sha256(self.out.read_bytes()).hexdigest() if self.out.exists() else ""

    def report(self) -> dict[str, Any]:
        """Return the report of a finished run; empty where there is none."""
        file = self.path / "report.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    rows: list[dict[str, Any]] = []
    notes = []
    for case in _cases(options):
        with tempfile.TemporaryDirectory(prefix="resume-", dir=options.work) as folder:
            found = _trials(case, Path(folder), options)
        rows += found
        notes += _notes(found)
    if not SHARED.exists():
        notes.append(f"../shared is absent: {NETWORK} was left out")
    return Outcome(rows, _tables(rows), notes)


def _trials(case: Case, folder: Path, options: Options) -> list[dict[str, Any]]:
    """Return a row for the undisturbed run of one case, and one for every trial."""
    kills, chains = (2, 1) if options.quick else (KILLS, CHAINS)
    rng = np.random.default_rng([options.seed, *case.name.encode()])
    start = _undisturbed(case, Folder(folder / "undisturbed"))
    rows = [start]
    kinds = [("kill", 1)] * kills + [("chain", CHAIN_LENGTH)] * chains
    for number, (kind, length) in enumerate(kinds):
        trial = Folder(folder / f"{kind}-{number}")
        found = _trial(case, trial, _moments(rng, start, length), length, start)
        rows.append({"case": case.name, "trial": kind, **found})
        print(f"{case.name} {kind} {number}: {_word(rows[-1])}", file=sys.stderr)
    return rows


def _cases(options: Options) -> Iterator[Case]:
    digits = model_path(DIGITS)
    yield Case(DIGITS, digits, digits.with_name("samples.npz"))
    if options.quick or not SHARED.exists():
        return
    folder = str(options.work)
    run_child(
        "benchmarks.data:write", model=NETWORK, folder=folder, seed=options.seed, limit=IMAGES
    )
    samples = data.sample_file(folder, NETWORK, "fit")
    yield Case(NETWORK, model_path(NETWORK), samples)


def _undisturbed(case: Case, folder: Folder) -> dict[str, Any]:
    """Run to the end, twice: with an empty and with a full resume folder."""
    ended = _start(case, folder)
    if not folder.out.exists():
        raise ChildError(f"{case.name}: exit code {ended.code}: {' '.join(ended.lines[-1:])}")
    digest = folder.digest()
    again = _start(case, folder)
    return {
        "case": case.name,
        "trial": "undisturbed",
        "code": ended.code,
        "seconds": ended.seconds,
        "first_seconds": ended.first,
        "again_seconds": again.seconds,
        "phases": list(folder.report().get("seconds", ())),
        "sha256": digest,
        "same": folder.digest() == digest,
        "notes": list(folder.report().get("notes", ())),
        **check(model=str(case.model), out=str(folder.out), samples=str(case.samples)),
    }


def _moments(
    rng: np.random.Generator, start: Mapping[str, Any], length: int
) -> Iterator[float]:
    """Yield seconds after the first line of progress; those of a chain leave time for all."""
    while True:
        yield float(rng.uniform(0.0, (start["seconds"] - start["first_seconds"]) / length))


def _trial(
    case: Case,
    folder: Folder,
    moments: Iterator[float],
    length: int,
    start: Mapping[str, Any],
) -> dict[str, Any]:
    """Kill a run `length` times, each time at the next moment, and let it end."""
    kills: list[dict[str, Any]] = []
    early = 0
    while len(kills) < length and early < _PATIENCE:
        moment = next(moments)
        ended = _start(case, folder, moment=moment)
        if ended.code >= 0:  # it was faster than the moment
            early += 1
            if not kills:
                folder = Folder(folder.path / f"again-{early}")
            continue
        left = check(model=str(case.model), out=str(folder.out), samples=str(case.samples))
        phase = _phase(ended.lines, start["phases"])
        kills.append({"moment_seconds": moment, "phase": phase, **left})
    resumed = _start(case, folder)
    return {
        "kills": kills,
        "ended_early": early,
        "code": resumed.code,
        "seconds": resumed.seconds,
        "same": folder.digest() == start["sha256"] and resumed.code == start["code"],
        "notes": list(folder.report().get("notes", ())),
        "said": "" if resumed.code == 0 else " ".join(resumed.lines[-1:]),
    }


def _start(case: Case, folder: Folder, *, moment: float | None = None) -> Ended:
    """Run the command; with `moment`, kill it so many seconds after its first line."""
    lines: list[str] = []
    spoke: list[float] = []
    heard = threading.Event()

    def listen(stream: IO[str]) -> None:
        for line in stream:
            spoke.append(time.monotonic() - begun)
            lines.append(line.strip())
            heard.set()
        heard.set()

    begun = time.monotonic()
    with subprocess.Popen(
        folder.command(case),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")},
    ) as process:
        listener = threading.Thread(target=listen, args=(process.stderr,))
        listener.start()
        if moment is not None:
            heard.wait()
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        seconds = time.monotonic() - begun
        listener.join()
    return Ended(process.returncode, seconds, spoke[0] if spoke else seconds, lines)


def _phase(lines: Sequence[str], phases: Sequence[str]) -> str:
    """Return the last phase that began; lines of progress name nodes as well."""
    begun = [line.partition(" (")[0] for line in lines]
    return next((line for line in reversed(begun) if line in phases), "before the first")


def check(*, model: str, out: str, samples: str) -> dict[str, Any]:
    """Return whether a file is a model with the original's signature that runs.

    Args:
        model: The original.
        out: The file.
        samples: Samples, of which the first eight are run, in a process of their own.
    """
    try:
        found = run_child("benchmarks.resume:drift_of", model=model, out=out, samples=samples)
    except ChildError as error:
        why = str(error).replace(f"{Path(out).parent}{os.sep}", "")
        return {"valid": False, "why": why, "drift": None}
    return {"valid": True, "why": "", "drift": found.value}


def drift_of(*, model: str, out: str, samples: str) -> float:
    """Return the largest relative L2 drift of a model file; raise where it cannot be run."""
    import onnxcomp
    from onnxcomp.drift import drift
    from onnxcomp.evaluate import predict

    original, candidate = onnxcomp.load(model), onnxcomp.load(out)
    if original.signature != candidate.signature:
        raise ValueError(f"{out} has another signature")
    few = onnxcomp.load_samples(samples, original.signature.inputs).take(range(8))
    found = drift(predict(original, few), predict(candidate, few))
    worst = max(d.relative_l2 for d in found.values())
    if not np.isfinite(worst):
        raise ValueError(f"{out} gives outputs that are not finite")
    return float(worst)


def _word(row: Mapping[str, Any]) -> str:
    valid = all(kill["valid"] for kill in row["kills"])
    return f"{'valid' if valid else 'NOT VALID'}, {'same' if row['same'] else 'NOT THE SAME'}"


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the verdict of one case, and what went wrong."""
    start, *trials = rows
    kills = [kill for row in trials for kill in row["kills"]]
    same, valid = sum(row["same"] for row in trials), sum(kill["valid"] for kill in kills)
    name = start["case"]
    notes = [
        f"{name}: after {len(kills)} kills a valid model was on disk {valid} times; "
        f"{same} of {len(trials)} resumed runs ended with the undisturbed run's file"
    ]
    if not start["same"]:
        notes.append(f"{name}: the undisturbed run, run again, ends with another file")
    for kill in kills:
        if not kill["valid"]:
            notes.append(f"{name}, killed at '{kill['phase']}': {kill['why']}")
    for row in trials:
        if not row["same"]:
            found = "; ".join(row["notes"]) or "none"
            notes.append(f"{name}, another file: {row['said']} notes: {found}")
    return notes


def _tables(rows: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    summary, single = [], []
    for case in dict.fromkeys(row["case"] for row in rows):
        start, *trials = [row for row in rows if row["case"] == case]
        for kind in ("kill", "chain"):
            own = [row for row in trials if row["trial"] == kind]
            kills = [kill for row in own for kill in row["kills"]]
            summary.append(
                (
                    case,
                    kind,
                    str(len(own)),
                    str(len(kills)),
                    str(sum(kill["valid"] for kill in kills)),
                    str(sum(row["same"] for row in own)),
                    f"{start['seconds']:.1f}",
                    f"{np.mean([row['seconds'] for row in own]):.1f}",
                    f"{start['again_seconds']:.1f}",
                )
            )
            single += [(case, kind, *_cells(row)) for row in own]
    columns = ("model", "trial", "trials", "kills", "valid", "same file")
    seconds = ("seconds undisturbed", "resumed", "nothing left to do")
    each = ("model", "trial", "killed after", "in phase", "valid", "same file", "resumed, s")
    return (
        Table("Killed and resumed", (*columns, *seconds), summary),
        Table("Every trial", each, single),
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    kills = row["kills"]
    return (
        ", ".join(f"{kill['moment_seconds']:.1f} s" for kill in kills),
        ", ".join(kill["phase"] for kill in kills),
        "yes" if all(kill["valid"] for kill in kills) else "no",
        "yes" if row["same"] else "no",
        f"{row['seconds']:.1f}",
    )
