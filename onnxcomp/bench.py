"""Paired latency: interleaved sessions, medians of per-visit ratios, and an A/A control.

Measuring one model after the other does not converge, as the host drifts in between.  Here
all sessions are visited in random order, visit after visit; what is compared is the ratio
within a visit.  Sessions of one and the same model differ by about 1 % (memory layout), so a
measurement consists of rounds, each with fresh sessions, and the interval of a ratio is a
two-stage bootstrap: rounds are drawn first, then visits within them.

References:
    B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from onnxcomp import kit_script
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array, Model
from onnxcomp.runtime import Session

_WARM_UPS = 3
_MIN_ROUNDS = 3
_MIN_VISITS = 20
_HALF_WIDTH = 0.01
_MIN_TIMING_NS = 1_000_000
_MAX_REPEATS = 1000
_RESAMPLES = 1000
_WALL_CPU_GAP = 0.03
_CONTROL_GAP = 0.02


@dataclass(frozen=True)
class Ratio:
    """Median of the per-visit ratios time(first model) / time(model), with its interval.

    Attributes:
        value: The median; above 1 = faster than the first model.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
    """

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval, relative to the value."""
        return (self.high - self.low) / (2 * self.value)


@dataclass(frozen=True)
class Timing:
    """Latency of one model.

    Attributes:
        median_ms: Median wall time of a run, in milliseconds (median of the visits).
        p90_ms: 90th percentile over all timings, in milliseconds.
        wall_ratio: Speedup over the first model by wall time.
        cpu_ratio: The same by CPU time of the calling thread; None with several threads.
    """

    median_ms: float
    p90_ms: float
    wall_ratio: Ratio
    cpu_ratio: Ratio | None

    @property
    def ratio(self) -> Ratio:
        """The ratio that counts: by CPU time where there is one, as load distorts it less."""
        return self.cpu_ratio or self.wall_ratio


@dataclass(frozen=True)
class Machine:
    """Where a measurement was made.

    Attributes:
        cpu: Model name of the processor.
        architecture: Instruction set, such as `x86_64`.
        cores: Logical cores that this process may use.
        onnxruntime: Version of onnxruntime.
        threads: Intra-op threads of the sessions.
        load_average: Load over the last minute; None where it cannot be read.
        governor: Frequency governor of the first core; None where it cannot be read.
    """

    cpu: str
    architecture: str
    cores: int
    onnxruntime: str
    threads: int
    load_average: float | None
    governor: str | None


@dataclass(frozen=True)
class Benchmark:
    """Result of `paired_latency`.

    Attributes:
        models: One timing per model, in the order given.
        control: A second, independent session on the first model; its ratio should be 1.
        visits: Visits of every session.
        rounds: How often all sessions were opened afresh.
        machine: Where it was measured.
        warnings: What limits the trust in these figures.
    """

    models: tuple[Timing, ...]
    control: Timing
    visits: int
    rounds: int
    machine: Machine
    warnings: tuple[str, ...]


def paired_latency(
    models: Sequence[Model],
    feeds: Mapping[str, Array],
    *,
    threads: int = 1,
    max_visits: int = 200,
    min_visits: int = _MIN_VISITS,
    runs_per_visit: int = 5,
    seed: int = 0,
    time_limit_s: float = 60,
    target_half_width: float = _HALF_WIDTH,
) -> Benchmark:
    """Measure the latency of models against the first of them, as deployed.

    A visit of a session is a discarded run and `runs_per_visit` timings, whose median counts;
    a timing spans as many runs as fill 1 ms.  Sessions are opened afresh for every third of
    `min_visits`.

    Args:
        models: Models to compare; they take the same feeds.
        feeds: One feed, by input name.
        threads: Intra-op threads.
        max_visits: Upper limit on the visits of every session.
        min_visits: Visits before the interval may end the measurement.
        runs_per_visit: Timings per visit; 3 to 5 are sound.
        seed: Seed of the visiting order and of the bootstrap.
        time_limit_s: Upper limit on the time, in seconds; one visit is always made.
        target_half_width: Stop when every `Timing.ratio` is at least so narrow (relative).

    Raises:
        ExecutionError: Onnxruntime cannot load or run one of the models.
    """
    _check_positive(
        models=len(models),
        threads=threads,
        min_visits=min_visits,
        max_visits=max_visits,
        runs_per_visit=runs_per_visit,
        target_half_width=target_half_width,
    )
    machine = describe_machine(threads=threads)  # before this makes load of its own
    entrants = [_Entrant(model) for model in (*models, models[0])]
    rng = np.random.default_rng(seed)
    start, visits = time.monotonic(), 0
    per_round = math.ceil(min_visits / _MIN_ROUNDS)
    with _no_garbage_collection():
        for rounds in itertools.count(1):
            for entrant in entrants:
                entrant.open(feeds, threads)
            # A slow model gets its fresh sessions too: no round takes more than its share.
            deadline = start + time_limit_s * min(rounds / _MIN_ROUNDS, 1)
            wanted = min(per_round, max_visits - visits)
            visits += _visit(entrants, feeds, runs_per_visit, wanted, deadline, rng)
            timings = _summarize(entrants, cpu=threads == 1, seed=seed)
            narrow = all(t.ratio.half_width <= target_half_width for t in timings)
            late = time.monotonic() > start + time_limit_s
            if late or visits >= max_visits or (narrow and visits >= min_visits):
                break
    warnings = _warnings(timings, visits, min_visits, target_half_width)
    return Benchmark(timings[:-1], timings[-1], visits, rounds, machine, warnings)


def recorded_latency(recordings: Sequence[Recording], machine: Machine) -> Benchmark:
    """Return the result of a measurement that was made elsewhere, as `paired_latency` does.

    Args:
        recordings: One per model, then that of the A/A control; all of the same visits, at
            least one in every round.
        machine: Where it was made.
    """
    timings = _summarize(recordings, cpu=machine.threads == 1, seed=0)
    rounds = [len(visits) for visits in recordings[0].wall]
    warnings = _warnings(timings, sum(rounds), _MIN_VISITS, _HALF_WIDTH)
    return Benchmark(timings[:-1], timings[-1], sum(rounds), len(rounds), machine, warnings)


def is_slower(benchmark: Benchmark, index: int) -> bool:
    """Tell whether a model is slower than the first one beyond doubt.

    Its 95 % interval must lie wholly beyond what the A/A control shows.  The control may err
    to either side, so its interval counts together with its reciprocal.

    Args:
        benchmark: The measurement.
        index: Position of the model in it.
    """
    control = benchmark.control.ratio
    return benchmark.models[index].ratio.high < min(control.low, 1 / control.high)


def describe_machine(*, threads: int = 1) -> Machine:
    """Describe this machine as far as it can be read.

    Args:
        threads: Intra-op threads that sessions use.
    """
    return Machine(**kit_script.describe_machine(threads))


def bootstrap_ratio(rounds: Sequence[Sequence[float]], *, seed: int = 0) -> Ratio:
    """Return the median of ratios with its 95 % interval, by a two-stage bootstrap.

    Args:
        rounds: Per round of sessions the ratios of its visits; no round is empty.
        seed: Seed of the resampling.
    """
    counts = np.array([len(ratios) for ratios in rounds])
    table = np.zeros((len(rounds), counts.max()))
    for row, ratios in zip(table, rounds, strict=True):
        row[: len(ratios)] = ratios
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(rounds), size=(_RESAMPLES, len(rounds), 1))
    draws = rng.random((_RESAMPLES, len(rounds), table.shape[1]))
    visits = (draws * counts[drawn]).astype(np.intp)
    medians = np.median(table[drawn, visits].reshape(_RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Ratio(float(np.median(np.concatenate(rounds))), float(low), float(high))


@dataclass(eq=False)
class Recording:
    """Times of one model.

    Attributes:
        wall: Per round of sessions the median wall time of every visit, in ns per run.
        cpu: The same of CPU time.
        timings: All wall times, in ns per run.
    """

    wall: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)
    timings: list[float] = field(default_factory=list)


class _Entrant(Recording):
    """A model in the measurement: its current session and all its times."""

    session: Session
    repeats: int

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def open(self, feeds: Mapping[str, Array], threads: int) -> None:
        """Begin a round: a fresh session, warmed up, and how many runs a timing spans."""
        self.session = Session(self.model, threads=threads, spinning=True)
        warm_ups = [self._time(feeds, 1)[0] for _ in range(_WARM_UPS)]
        needed = math.ceil(_MIN_TIMING_NS / max(min(warm_ups), 1))
        self.repeats = min(needed, _MAX_REPEATS)
        self.wall.append([])
        self.cpu.append([])

    def visit(self, feeds: Mapping[str, Array], runs: int) -> None:
        """Run once unseen, as the caches hold another model, then time."""
        self.session.run(feeds)
        times = np.array([self._time(feeds, self.repeats) for _ in range(runs)])
        wall, cpu = np.median(times, axis=0)
        self.wall[-1].append(float(wall))
        self.cpu[-1].append(float(cpu))
        self.timings.extend(times[:, 0].tolist())

    def _time(self, feeds: Mapping[str, Array], repeats: int) -> tuple[float, float]:
        run = self.session.run
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(repeats):
            run(feeds)
        cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
        # A coarse thread clock may not have moved.
        return wall / repeats, max(cpu, 1) / repeats


def _visit(
    entrants: Sequence[_Entrant],
    feeds: Mapping[str, Array],
    runs: int,
    visits: int,
    deadline: float,
    rng: np.random.Generator,
) -> int:
    """Visit all entrants in random order, again and again; return how often."""
    for made in range(1, visits + 1):
        for index in rng.permutation(len(entrants)):
            entrants[index].visit(feeds, runs)
        if time.monotonic() > deadline:
            return made
    return visits


def _summarize(entrants: Sequence[Recording], *, cpu: bool, seed: int) -> tuple[Timing, ...]:
    first = entrants[0]
    timings = []
    for entrant in entrants:
        timings.append(
            Timing(
                median_ms=float(np.median(np.concatenate(entrant.wall))) / 1e6,
                p90_ms=float(np.quantile(entrant.timings, 0.9)) / 1e6,
                wall_ratio=_ratio(first.wall, entrant.wall, seed),
                cpu_ratio=_ratio(first.cpu, entrant.cpu, seed) if cpu else None,
            )
        )
    return tuple(timings)


def _ratio(first: list[list[float]], other: list[list[float]], seed: int) -> Ratio:
    pairs = zip(first, other, strict=True)
    return bootstrap_ratio([np.divide(a, b).tolist() for a, b in pairs], seed=seed)


def _warnings(
    timings: Sequence[Timing], visits: int, min_visits: int, target: float
) -> tuple[str, ...]:
    found = []
    names = [f"model {index}" for index in range(len(timings) - 1)] + ["the A/A control"]
    for name, timing in zip(names, timings, strict=True):
        if timing.cpu_ratio is not None:
            wall, cpu = timing.wall_ratio.value, timing.cpu_ratio.value
            if abs(wall / cpu - 1) > _WALL_CPU_GAP:
                found.append(
                    f"{name}: the ratio by wall time is {wall:.3f}, by CPU time {cpu:.3f}; "
                    "the machine is busy, measure again on a quiet one"
                )
        if timing.ratio.half_width > target:
            found.append(
                f"{name}: the 95 % interval is +-{timing.ratio.half_width:.1%}, wider than "
                f"+-{target:.1%}, after {visits} visits; allow more time or visits"
            )
    control = timings[-1].ratio.value
    if abs(control - 1) > _CONTROL_GAP:
        found.append(
            f"the A/A control is {control:.3f} instead of 1: smaller differences between "
            "models mean nothing here"
        )
    if visits < min_visits:
        found.append(f"only {visits} of {min_visits} visits were made; allow more time")
    return tuple(found)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ParameterError.of("paired_latency", name, "> 0", value)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
