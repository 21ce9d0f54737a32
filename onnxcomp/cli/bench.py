"""`onnxcomp bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxcomp.bench import paired_latency
from onnxcomp.cli.options import Data, Json, Threads
from onnxcomp.cli.output import emit, inputs_of, warn
from onnxcomp.errors import ParameterError
from onnxcomp.opening import check_outputs, open_model
from onnxcomp.report import SCHEMA_VERSION, plain
from onnxcomp.report.text import benchmark_view


def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...")],
    threads: Threads = None,
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Measure latency, paired and interleaved, with an A/A control; the first is the base."""
    opened = [open_model(path, data) for path in models]
    check_outputs(
        {"--json": json_file}, inputs_of([f for one in opened for f in one.model.files], data)
    )
    taken = [[value.name for value in one.model.signature.inputs] for one in opened]
    for path, names in zip(models, taken, strict=True):
        if names != taken[0]:
            raise ParameterError(f"{path} has inputs {names}, {models[0]} has {taken[0]}")
    base = opened[0]
    feed = next(iter(base.samples.batches(base.model.signature.inputs, 1))).feed
    found = paired_latency([one.model for one in opened], feed, threads=threads or 1)
    warn(warning for one in opened for warning in one.warnings)
    names = [str(path) for path in models]
    payload = {"schema_version": SCHEMA_VERSION, "names": names, **plain(found)}
    emit(json_file, payload, benchmark_view(names, found))
