"""`onnxcomp bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from onnxcomp.bench import Benchmark, paired_latency
from onnxcomp.cli.options import Data, Json, Preprocess, Threads
from onnxcomp.cli.output import emit, inputs_of, warn
from onnxcomp.errors import ParameterError
from onnxcomp.json_fields import read_json
from onnxcomp.kit import SCRIPT, parse_result, write_kit
from onnxcomp.model import Array, Model
from onnxcomp.opening import check_outputs, open_model
from onnxcomp.report import SCHEMA_VERSION, plain
from onnxcomp.report.text import benchmark_view, clean

Kit = Annotated[
    Path | None,
    typer.Option("--kit", metavar="ZIP", help="Write what measures an edge device."),
]


def bench(
    models: Annotated[list[Path] | None, typer.Argument(metavar="MODEL...")] = None,
    threads: Threads = None,
    data: Data = None,
    preprocess: Preprocess = None,
    kit: Kit = None,
    kit_result: Annotated[
        Path | None,
        typer.Option("--kit-result", metavar="PATH", help="Show what a kit measured."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure latency, paired and interleaved, with an A/A control; the first is the base.

    With --kit nothing is measured here: the zip holds the models and a script for an edge
    device, whose result --kit-result shows.
    """
    if kit_result is not None:
        if models or kit or data or preprocess or threads:
            raise ParameterError("--kit-result shows a measurement; give only --json with it")
        check_outputs({"--json": json_file}, [kit_result])
        names, found = parse_result(read_json(kit_result), str(kit_result)).benchmark()
        _show(names, found, json_file)
        return
    if not models:
        raise ParameterError("bench: give at least one MODEL, or --kit-result")
    if kit is not None:
        if threads or json_file:
            raise ParameterError(
                f"--kit measures nothing; --threads is for {SCRIPT}, --json for --kit-result"
            )
        write_model_kit(kit, models, data, preprocess)
        return
    opened, feed = _open_all(models, data, preprocess, {"--json": json_file})
    names = [str(path) for path in models]
    _show(names, paired_latency(opened, feed, threads=threads or 1), json_file)


def write_model_kit(
    kit: Path,
    models: Sequence[Path],
    data: Path | None = None,
    preprocess: Path | None = None,
    *,
    chains: Sequence[str] = (),
) -> None:
    """Write a kit and say what to do with it.

    Args:
        kit: The zip.
        models: Models to compare with the first of them.
        data: Their samples, of which the first is used.
        preprocess: How images become inputs.
        chains: Micro-chains to measure, too.
    """
    opened, feed = _open_all(models, data, preprocess, {"--kit": kit}) if models else ([], {})
    check_outputs({"--kit": kit}, [])
    named = [(clean(path.name), model) for path, model in zip(models, opened, strict=True)]
    write_kit(kit, chains=chains, models=named, feeds=feed)
    lines = [f"wrote {kit}; on the device, where Python, numpy and onnxruntime are:"]
    lines += [f"    unzip {kit.name} -d kit && python kit/{SCRIPT} -o result.json"]
    lines += ["then, here:"]
    lines += ["    onnxcomp bench --kit-result result.json"] if models else []
    lines += ["    onnxcomp compress ... --target result.json"] if chains else []
    emit(None, {}, Text("\n".join(map(clean, lines))))


def _open_all(
    models: Sequence[Path],
    data: Path | None,
    preprocess: Path | None,
    outputs: dict[str, Path | None],
) -> tuple[list[Model], dict[str, Array]]:
    """Return models that take the same inputs, and the first sample of the first one."""
    opened = [open_model(path, data, preprocess=preprocess) for path in models]
    files = [file for one in opened for file in one.model.files]
    check_outputs(outputs, inputs_of(files, data, preprocess))
    taken = [[value.name for value in one.model.signature.inputs] for one in opened]
    for path, names in zip(models, taken, strict=True):
        if names != taken[0]:
            raise ParameterError(f"{path} has inputs {names}, {models[0]} has {taken[0]}")
    base = opened[0]
    feed = next(iter(base.samples.batches(base.model.signature.inputs, 1))).feed
    warn(warning for one in opened for warning in one.warnings)
    return [one.model for one in opened], dict(feed)


def _show(names: Sequence[str], found: Benchmark, json_file: Path | None) -> None:
    payload = {"schema_version": SCHEMA_VERSION, "names": list(names), **plain(found)}
    emit(json_file, payload, benchmark_view(names, found))
