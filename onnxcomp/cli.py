"""The command line: parses, calls the library and prints; it decides nothing."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from onnxcomp.analysis import Analysis
from onnxcomp.bench import paired_latency
from onnxcomp.errors import LimitError, OnnxcompError, ParameterError, UnsupportedModelError
from onnxcomp.loading import as_model, read_model, write_model, write_text
from onnxcomp.metrics import load_metric
from onnxcomp.opening import STDOUT, Opened, check_outputs, first_samples, open_model
from onnxcomp.recipe import (
    Recipe,
    dump_recipe,
    load_recipe,
    parse_quantity,
    provenance,
    resolve,
)
from onnxcomp.report import SCHEMA_VERSION, plain
from onnxcomp.report.comparison import compare_models
from onnxcomp.report.html import render, render_inspection
from onnxcomp.report.inspection import inspect_model, layer_changes
from onnxcomp.report.progress import ProgressView
from onnxcomp.report.text import (
    benchmark_view,
    clean,
    comparison_view,
    inspection_view,
    plan_view,
    report_view,
    unmet_limits,
)
from onnxcomp.search.run import Result
from onnxcomp.search.run import compress as compress_model
from onnxcomp.search.settings import Limits

_PIPE_WIDTH = 140  # columns where stdout is no terminal


class _Commands(TyperGroup):
    """The commands, and the one place where errors become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            message, code = _outcome(error)
            if code is None:
                raise
            _complain(message)
            if ctx.params.get("show_traceback"):
                traceback.print_exc()
            raise typer.Exit(code) from None


def _outcome(error: BaseException) -> tuple[str, int | None]:
    """Return the message and the exit code of an error; no code if typer handles it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: what was not finished was not written", 130
    if isinstance(error, OnnxcompError):
        return f"error: {error}", error.exit_code
    own = type(error).__module__.partition(".")[0] in ("typer", "click")
    if own or isinstance(error, BrokenPipeError):
        return "", None
    hint = "`onnxcomp --traceback ...` shows where"
    return f"internal error: {type(error).__name__}: {error} ({hint})", 1


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of tensors are anything
    app(prog_name="onnxcomp")


@app.callback()
def _onnxcomp(
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Make trained ONNX CNNs smaller and faster, and measure what that costs.

    Everything runs on this machine; nothing is sent anywhere.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


def _quantity(text: str) -> float:
    try:
        return parse_quantity(text)
    except ParameterError as error:
        raise typer.BadParameter(str(error)) from error


def _points(text: str) -> float:
    zero = text.strip().removesuffix("%").strip() in ("0", "0.0")
    return 0.0 if zero else _quantity(text)


def _limit(flag: str, what: str) -> Any:
    """Return the option of a limit."""
    return typer.Option(flag, parser=_quantity, metavar="LIMIT", help=f"At most, {what}.")


def _path(flag: str, what: str) -> Any:
    """Return the option of a file."""
    return typer.Option(flag, metavar="PATH", help=what)


_Data = Annotated[
    Path | None, _path("--data", "Samples: .npz, a folder of .npy, or a folder of images.")
]
_Preprocess = Annotated[Path | None, _path("--preprocess", "YAML: how images become inputs.")]
_Json = Annotated[Path | None, _path("--json", "Write JSON to a file, or - for stdout.")]
_Metric = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="top1, psnr, psnr:PEAK, agreement or module:function."),
]
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads of every session [1].")]
_Macs = Annotated[float | None, _limit("--max-macs", "multiply-accumulates per sample")]
_Params = Annotated[float | None, _limit("--max-params", "parameters")]
_Size = Annotated[float | None, _limit("--max-size", "bytes of the file")]
_Methods = Annotated[str | None, typer.Option(metavar="A,B", help="Lossy passes to use.")]
_Exclude = Annotated[str | None, typer.Option(metavar="REGEX", help="Nodes to leave alone.")]
_Target = Annotated[str | None, typer.Option(metavar="NAME", help="Profile of the CPU.")]
_Grid = Annotated[
    str | None, typer.Option(metavar="auto|off|N", help="Widths and ranks that are allowed.")
]
_Memory = Annotated[
    float | None,
    typer.Option(parser=_quantity, metavar="BYTES", help="For activations, such as 4GB."),
]
_Seed = Annotated[int | None, typer.Option(min=0, help="Seed of everything that is drawn.")]
_Force = Annotated[bool, typer.Option("--force", help="Keep a larger or slower result.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
_Drop = Annotated[
    float | None,
    typer.Option(parser=_points, metavar="X", help="Points of the metric lost, such as 1%."),
]
_Drift = Annotated[float | None, typer.Option(min=0, help="Relative L2 of any output.")]
_Speedup = Annotated[float | None, typer.Option(min=0, help="Time of A over that of B.")]


@app.command()
def inspect(
    model: Path,
    data: _Data = None,
    preprocess: _Preprocess = None,
    json_file: _Json = None,
    html: Annotated[Path | None, _path("--html", "Write a page.")] = None,
) -> None:
    """Show layers, MACs, parameters, shared tensors, channel groups and refusals."""
    loaded = read_model(model)
    inputs = _inputs(loaded.files, data, preprocess)
    check_outputs({"--json": json_file, "--html": html}, inputs)
    notes, samples = list(loaded.warnings), None
    try:
        samples = first_samples(loaded, data, preprocess=preprocess)
    except UnsupportedModelError as error:
        notes.append(f"shapes, MACs and channels are not known: {error}")
    network = as_model(loaded)
    facts = None if samples is None else Analysis(network, samples)
    found = inspect_model(network, facts, notes=notes)
    if html is not None:
        write_text(html, render_inspection(found), inputs=inputs)
    _emit(json_file, plain(found), inspection_view(found))


@app.command()
def compress(
    model: Path,
    out: Annotated[Path, typer.Option("-o", metavar="OUT", help="The file to write.")],
    max_macs: _Macs = None,
    max_params: _Params = None,
    max_size: _Size = None,
    data: _Data = None,
    preprocess: _Preprocess = None,
    metric: _Metric = None,
    recipe: Annotated[Path | None, _path("--recipe", "Settings; flags beat them.")] = None,
    methods: _Methods = None,
    exclude: _Exclude = None,
    target: _Target = None,
    grid: _Grid = None,
    memory: _Memory = None,
    seed: _Seed = None,
    threads: _Threads = None,
    report: Annotated[Path | None, _path("--report", "Write a page.")] = None,
    json_file: _Json = None,
    dry_run: _DryRun = False,
    force: _Force = False,
    quiet: _Quiet = False,
) -> None:
    """Make a model smaller and faster after training, within limits.

    A limit is a share (0.5, 50%) or absolute (20M, 1.5MB).  The recipe is written beside OUT.
    """
    base = Recipe() if recipe is None else load_recipe(recipe)
    flags = {
        "limits": Limits(macs=max_macs, params=max_params, size=max_size),
        "methods": None if methods is None else tuple(methods.split(",")),
        "exclude": exclude,
        "target": target,
        "grid": grid,
        "memory": memory,
        "seed": seed,
        "threads": threads,
        "force": force or None,
    }
    settings, metric = resolve(base, flags), metric or base.metric
    outputs = _Outputs(out, out.with_suffix(".recipe.yaml"), report, json_file)
    with ProgressView(_stderr(), quiet=quiet) as progress:
        opened = open_model(model, data, preprocess=preprocess, seed=settings.seed)
        inputs = _inputs(opened.model.files, data, preprocess, recipe)
        check_outputs(outputs.by_flag(), inputs)
        result = compress_model(
            opened.model,
            opened.user_samples,
            settings=settings,
            metric=None if metric is None else load_metric(metric),
            progress=progress.update,
            dry_run=dry_run,
        )
    _warn(opened.warnings)
    if dry_run:
        _show_plan(result, json_file)
    else:
        sources = provenance({"model": model, "data": data, "preprocess": preprocess})
        text = dump_recipe(settings, metric=metric, provenance=sources)
        _deliver(result, opened, text, outputs, inputs)


class _Outputs(NamedTuple):
    """The files that `compress` writes."""

    model: Path
    recipe: Path
    page: Path | None
    json: Path | None

    def by_flag(self) -> dict[str, Path | None]:
        """Return the files by the flag that names them."""
        return dict(zip(("-o", "-o (its recipe)", "--report", "--json"), self, strict=True))


def _show_plan(result: Result, json_file: Path | None) -> None:
    """Print what a compression would do, and tell by the exit code whether it is enough."""
    payload = {**result.report.to_json(), "dry_run": True}
    _emit(json_file if json_file == STDOUT else None, payload, plan_view(result.report))
    if not result.met:
        raise LimitError(f"limit not met: {'; '.join(unmet_limits(result.report))}")


def _deliver(
    result: Result,
    opened: Opened,
    recipe: str,
    outputs: _Outputs,
    inputs: Iterable[Path],
) -> None:
    """Write and print what a compression gave, and tell by the exit code how it ended."""
    report = result.report
    report.ladder.raise_if_failed()
    proto = result.model.to_proto(external=True)
    written = write_model(proto, outputs.model, inputs=inputs, external=result.model.weights)
    report = replace(report, result=replace(report.result, file_bytes=written))
    write_text(outputs.recipe, recipe, inputs=inputs)
    if outputs.page is not None:
        before, after = (Analysis(m, opened.samples) for m in (opened.model, result.model))
        page = render(report, layer_changes(before, after))
        write_text(outputs.page, page, inputs=inputs)
    _emit(outputs.json, report.to_json(), report_view(report))
    if result.interrupted:
        _complain(f"interrupted; the best so far is in {outputs.model}")
        raise typer.Exit(130)
    unmet = unmet_limits(report)
    if unmet or not result.met:
        reasons = "; ".join(unmet) or "see the notes"
        raise LimitError(f"limit not met: {reasons}; the best is in {outputs.model}")


@app.command()
def compare(
    original: Annotated[Path, typer.Argument(metavar="A", help="The original.")],
    candidate: Annotated[Path, typer.Argument(metavar="B", help="The candidate.")],
    data: _Data = None,
    metric: _Metric = None,
    max_drop: _Drop = None,
    max_drift: _Drift = None,
    min_speedup: _Speedup = None,
    json_file: _Json = None,
) -> None:
    """Compare two models; a gate that is not met ends with exit code 5.

    Without --metric, --max-drop means top-1 where the data have labels, else the share of
    samples on which the two models disagree.
    """
    first, second = open_model(original, data), open_model(candidate, data)
    inputs = _inputs((*first.model.files, *second.model.files), data)
    check_outputs({"--json": json_file}, inputs)
    if metric is None and max_drop is not None:
        metric = "agreement" if first.samples.labels is None else "top1"
    found = compare_models(
        first.model,
        second.model,
        first.user_samples,
        metric=None if metric is None else load_metric(metric),
        max_drop=max_drop,
        max_drift=max_drift,
        min_speedup=min_speedup,
    )
    _warn((*first.warnings, *second.warnings))
    _emit(json_file, plain(found), comparison_view(found))
    found.raise_if_failed()


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...")],
    threads: _Threads = None,
    data: _Data = None,
    json_file: _Json = None,
) -> None:
    """Measure latency, paired and interleaved, with an A/A control; the first is the base."""
    opened = [open_model(path, data) for path in models]
    check_outputs(
        {"--json": json_file}, _inputs([f for one in opened for f in one.model.files], data)
    )
    taken = [[value.name for value in one.model.signature.inputs] for one in opened]
    for path, names in zip(models, taken, strict=True):
        if names != taken[0]:
            raise ParameterError(f"{path} has inputs {names}, {models[0]} has {taken[0]}")
    base = opened[0]
    feed = next(iter(base.samples.batches(base.model.signature.inputs, 1))).feed
    found = paired_latency([one.model for one in opened], feed, threads=threads or 1)
    _warn(warning for one in opened for warning in one.warnings)
    names = [str(path) for path in models]
    payload = {"schema_version": SCHEMA_VERSION, "names": names, **plain(found)}
    _emit(json_file, payload, benchmark_view(names, found))


def _inputs(files: Iterable[Path], *given: Path | None) -> list[Path]:
    """Return all files and folders that a command reads."""
    return [*files, *(path for path in given if path is not None)]


def _emit(path: Path | None, payload: Mapping[str, Any], view: RenderableType) -> None:
    """Print tables, write JSON to a file, or print nothing but JSON."""
    text = json.dumps(payload, indent=1) + "\n"
    if path == STDOUT:
        typer.echo(text, nl=False)
        return
    if path is not None:
        write_text(path, text)
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    Console(width=width, markup=False, highlight=False, emoji=False).print(view)


def _stderr() -> Console:
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def _warn(warnings: Iterable[str]) -> None:
    for warning in dict.fromkeys(warnings):
        _complain(f"warning: {warning}")


def _complain(message: str) -> None:
    typer.echo(clean(message), err=True)
