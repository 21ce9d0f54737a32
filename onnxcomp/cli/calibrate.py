"""`onnxcomp calibrate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxcomp.analysis.target import Target
from onnxcomp.calibration import SECONDS
from onnxcomp.calibration import calibrate as calibrate_target
from onnxcomp.calibration_chains import CHAINS
from onnxcomp.cli.bench import Kit, write_model_kit
from onnxcomp.cli.options import Data, Preprocess, Quiet, Threads
from onnxcomp.cli.output import emit, stderr
from onnxcomp.errors import ParameterError
from onnxcomp.kit import SCRIPT
from onnxcomp.loading import write_text
from onnxcomp.opening import check_outputs
from onnxcomp.report.progress import ProgressView
from onnxcomp.report.text import clean, percent


def calibrate(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="For --kit: models to measure, too."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", metavar="OUT", help="File to write [target.json].")
    ] = None,
    kit: Kit = None,
    data: Data = None,
    preprocess: Preprocess = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time of the measurement.")] = SECONDS,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Measure this machine, for `compress --target`: what its convolutions cost.

    With --kit nothing is measured here: the zip holds the same for an edge device.
    """
    if kit is not None:
        if out or threads or seconds != SECONDS:
            raise ParameterError(
                f"--kit measures nothing; -o, --seconds and --threads are flags of {SCRIPT}"
            )
        write_model_kit(kit, models or [], data, preprocess, chains=CHAINS)
        return
    if models or data or preprocess:
        raise ParameterError("calibrate: models, --data and --preprocess are for --kit")
    path = out or Path("target.json")
    check_outputs({"-o": path}, [])
    with ProgressView(stderr(), quiet=quiet) as progress:
        target = calibrate_target(
            seconds=seconds, threads=threads or 1, progress=progress.update
        )
    write_text(path, json.dumps(target.to_json(), indent=1) + "\n")
    emit(None, {}, _view(target, path))


def _view(target: Target, path: Path) -> RenderableType:
    costs = Table("cost", "ps per FLOP or byte", box=box.SIMPLE_HEAD)
    for name, value in dataclasses.asdict(target.costs).items():
        costs.add_row(name, f"{value:.3g}" + (" ns" if name == "node" else ""))
    elements = Table("operator", "ns per output element", box=box.SIMPLE_HEAD)
    for name, value in sorted(target.element_ns):
        elements.add_row(Text(clean(name)), f"{value:.3g}")
    lines = [f"{target.name}: widths and ranks in blocks of {target.block}"]
    found = target.calibration
    if found is not None:
        lines.append(
            f"{found.chains} micro-chains, onnxruntime {found.onnxruntime}; error of those "
            f"left out of the fit: median {percent(found.median_error)}, "
            f"90 % below {percent(found.p90_error)}"
        )
    lines.append(f"wrote {path}; use it with --target {path}")
    return Group(costs, elements, *(Text(clean(line)) for line in lines))
