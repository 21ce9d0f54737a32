"""Calibration: the latency model of a CPU, fitted to the times of micro-chains measured on it.

The time of a chain is the work of its convolutions, times the costs of the target, plus what
a run and its input take.  The costs are found by non-negative least squares on relative
errors.  The grid (16, 8 or 4 channels a block) is the one under which this fits those chains
best whose channels are no multiples of 16.
Elementwise operators are what a chain takes longer than the same one without them.

References:
    C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, chapter 23 (NNLS).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from onnxcomp import kit_script
from onnxcomp.analysis.target import (
    ELEMENT_NS,
    KIND,
    TARGETS,
    Calibration,
    Convolution,
    Costs,
    Target,
    work_terms,
)
from onnxcomp.calibration_chains import CHAINS
from onnxcomp.deadline import Progress
from onnxcomp.errors import ParameterError
from onnxcomp.json_fields import Fields, read_json
from onnxcomp.kit import Result, Timed, assemble, parse_result

SECONDS = 120.0
_LEAST_CHAINS = 40
_TERMS = tuple(field.name for field in fields(Costs))
_SMALLEST_NODE = 1.0  # ns; no convolution takes no time at all
_DEFAULT_NS = 0.1  # of an elementwise operator that no table has
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Fit:
    """Costs of one grid.

    Attributes:
        costs: Per term, in the units of `Costs`.
        run: Seconds that any run takes.
        end: Seconds per element of a chain's ends.
        errors: Relative error of each chain when it is left out of the fit.
    """

    costs: Costs
    run: float
    end: float
    errors: Array


def calibrate(
    *,
    seconds: float = SECONDS,
    threads: int = 1,
    chains: Sequence[str] = CHAINS,
    progress: Progress | None = None,
) -> Target:
    """Measure the micro-chains on this machine and fit a target to them.

    Args:
        seconds: Time limit of the measurement.
        threads: Intra-op threads; with one, CPU time is fitted, else wall time.
        chains: Chains to measure.
        progress: Is told the phase and the share of it that is done.

    Raises:
        ParameterError: There are too few chains.
    """

    def report(share: float) -> None:
        if progress is not None:
            progress("measure micro-chains", share)

    report(0.0)
    with tempfile.TemporaryDirectory() as name:
        assemble(Path(name), chains)
        data = kit_script.measure(Path(name), seconds, threads, report)
    return fit_target(parse_result(data, "the calibration"))


def read_target(path: Path) -> Target:
    """Read what `calibrate` wrote, or fit what the script of a kit did.

    Args:
        path: The JSON file.

    Raises:
        ParameterError: The file holds neither, or something in it is wrong.
    """
    try:
        data = read_json(path)
        kind = Fields(data, str(path)).get("kind")
        if kind == KIND:
            return Target.from_json(data, str(path))
        if kind == kit_script.RESULT_KIND:
            return fit_target(parse_result(data, str(path)))
        wanted = f"'{KIND}' or '{kit_script.RESULT_KIND}'"
        raise Fields(data, str(path)).error("kind", wanted, kind)
    except ParameterError as error:
        raise ParameterError(f"target: {error}") from error


def fit_target(result: Result) -> Target:
    """Fit a target to what the script of a kit measured.

    Args:
        result: Times of the micro-chains.

    Raises:
        ParameterError: The kit had no micro-chains, or too few of them ran.
    """
    timed = [e for e in result.entries if e.role == "chain" and e.recording is not None]
    plain = [entry for entry in timed if not entry.elements]
    if len(plain) < _LEAST_CHAINS:
        raise ParameterError(
            f"{result.source} has times of {len(plain)} micro-chains; a target needs "
            f"{_LEAST_CHAINS}. Write the kit with `onnxcomp calibrate --kit`"
        )
    cpu = result.machine.threads == 1
    seconds = {entry.name: entry.seconds(cpu=cpu) for entry in timed}
    fits = {name: _fit(plain, seconds, profile) for name, profile in TARGETS.items()}
    telling = [index for index, chain in enumerate(plain) if _tells_grid(chain)]
    best = min(fits, key=lambda name: np.abs(fits[name].errors[telling]).mean())
    fit, machine = fits[best], result.machine
    name = machine.cpu if cpu else f"{machine.cpu}, {machine.threads} threads"
    return replace(
        TARGETS[best],
        name=name,
        costs=fit.costs,
        element_ns=tuple(_element_ns(timed, seconds).items()),
        table=_table(plain, seconds, fit),
        calibration=Calibration(
            machine.cpu,
            machine.architecture,
            machine.onnxruntime,
            machine.threads,
            len(plain),
            float(np.median(np.abs(fit.errors))),
            float(np.quantile(np.abs(fit.errors), 0.9)),
        ),
    )


def _tells_grid(chain: Timed) -> bool:
    """Whether the blocks of the grids round the channels of a chain differently."""
    coarsest = max(target.block for target in TARGETS.values())
    finest = min(target.block for target in TARGETS.values())
    widths = {n for c in chain.convolutions for n in (c.in_channels, c.out_channels)}
    whole = all(width % finest == 0 for width in widths)
    return whole and any(width % coarsest for width in widths)


def _fit(chains: Sequence[Timed], seconds: Mapping[str, float], profile: Target) -> _Fit:
    """Fit the costs, and find the error of each chain with the fit to the others."""
    rows = np.zeros((len(chains), len(_TERMS) + 2))
    for row, chain in zip(rows, chains, strict=True):
        for conv in chain.convolutions:
            for term, work in work_terms(conv, profile.block).items():
                row[_TERMS.index(term)] += 1e-12 * work
        row[-2:] = 1.0, chain.ends
        row /= seconds[chain.name]
    scale = np.maximum(rows.max(axis=0), np.finfo(float).tiny)
    scaled = rows / scale
    found = _solve(scaled) / scale
    errors = np.empty(len(rows))
    for index, row in enumerate(scaled):
        errors[index] = row @ _solve(np.delete(scaled, index, axis=0)) - 1
    costs = dict(zip(_TERMS, found[:-2].tolist(), strict=True))
    costs["node"] = max(costs["node"], _SMALLEST_NODE)
    return _Fit(Costs(**costs), float(found[-2]), float(found[-1]), errors)


def _solve(rows: Array) -> Array:
    """Return the non-negative solution of `rows` x = 1."""
    solution: Array = nnls(rows, np.ones(len(rows)))[0]
    return solution


def _element_ns(chains: Sequence[Timed], seconds: Mapping[str, float]) -> dict[str, float]:
    """Return nanoseconds per output element of elementwise operators.

    Of a chain with several, those that are known are subtracted, and the rest is shared as
    the defaults are.  What no chain has keeps its default, Upsample that of Resize.
    """
    measured: dict[str, float] = {}
    for chain in chains:
        if not chain.elements or chain.base not in seconds:
            continue
        rest = 1e9 * (seconds[chain.name] - seconds[chain.base])
        rest -= sum(measured.get(op, 0.0) * count for op, count in chain.elements)
        new = {
            op: ELEMENT_NS.get(op, _DEFAULT_NS)
            for op, _ in chain.elements
            if op not in measured
        }
        expected = sum(new[op] * count for op, count in chain.elements if op in new)
        measured |= {op: ns * max(rest, 0.0) / expected for op, ns in new.items()}
    if "Resize" in measured:
        measured["Upsample"] = measured["Resize"]
    return {**ELEMENT_NS, **measured}


def _table(
    chains: Sequence[Timed], seconds: Mapping[str, float], fit: _Fit
) -> tuple[tuple[Convolution, float], ...]:
    """Return the seconds of shapes of which a whole chain consists."""
    found: dict[Convolution, float] = {}
    for chain in chains:
        if len(set(chain.convolutions)) > 1:
            continue
        rest = seconds[chain.name] - fit.run - fit.end * chain.ends
        if rest > 0:
            found[chain.convolutions[0]] = rest / len(chain.convolutions)
    return tuple(found.items())
