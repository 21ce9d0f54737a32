"""`python -m benchmarks NAME`: run one benchmark, print its tables, write its results."""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import RESULTS, TARGET, Options, Outcome, Record, SkippedError

NAMES = (
    "additivity",
    "bridge",
    "collaborative",
    "joint",
    "joint_runtime",
    "latency_model",
    "memory",
    "packed",
    "packed_tuned",
    "peers",
    "promise",
    "record",
    "resume",
    "scale",
    "selection",
    "sessions",
    "shared_tensors",
    "storage",
    "storage_speed",
    "tune",
    "zoo",
)


def main() -> int:
    """Parse, run, print, write; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="tiny settings: does it work?")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--threads", type=int, default=2, help="threads of the search")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--target", default=TARGET, help="profile, or a calibrated target.json"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder to keep models and answers in: started again, a benchmark goes on there",
    )
    given = parser.parse_args()
    with _work(given.work) as work:
        out = given.out or (Path(tempfile.gettempdir(), "quick") if given.quick else RESULTS)
        target = Path(given.target).resolve() if Path(given.target).is_file() else given.target
        options = Options(given.quick, given.seed, given.threads, work, out, str(target))
        start = time.monotonic()
        try:
            outcome = _run(given.name, options)
        except SkippedError as reason:
            print(f"skipped: {reason}")
            return 0
        record = _record(given.name, options, time.monotonic() - start, outcome)
    print("\n\n".join(table.text() for table in outcome.tables))
    for note in outcome.notes:
        print(f"* {note}")
    print(f"{record.seconds:.0f} s; written to {record.write(out, options.work)}")
    return 0


@contextmanager
def _work(kept: Path | None) -> Iterator[Path]:
    """Give the folder to work in: one that stays, or one that goes."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        yield Path(folder)


def _run(name: str, options: Options) -> Outcome:
    outcome: Outcome = importlib.import_module(f"benchmarks.{name}").run(options)
    return outcome


def _record(name: str, options: Options, seconds: float, outcome: Outcome) -> Record:
    from onnxcomp.bench import describe_machine
    from onnxcomp.report import plain

    machine = plain(describe_machine(threads=1))
    quick, seed, threads = options.quick, options.seed, options.threads
    return Record(name, quick, seed, threads, seconds, machine, outcome)


if __name__ == "__main__":
    raise SystemExit(main())
