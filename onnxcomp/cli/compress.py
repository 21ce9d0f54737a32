"""`onnxcomp compress`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import typer

from onnxcomp import codec
from onnxcomp.analysis import Analysis
from onnxcomp.cli.options import (
    Data,
    Device,
    DryRun,
    Emit,
    Exclude,
    Force,
    Grid,
    Json,
    Latency,
    Macs,
    MaxDrift,
    MaxDrop,
    Memory,
    Methods,
    Metric,
    Page,
    Params,
    Preprocess,
    Quiet,
    RecipeFile,
    Resume,
    Seed,
    Size,
    Target,
    Threads,
    TimeLimit,
    Tune,
)
from onnxcomp.cli.output import complain, emit, inputs_of, stderr, warn
from onnxcomp.errors import LimitError, ParameterError
from onnxcomp.loading import write_model, write_text
from onnxcomp.metrics import load_metric
from onnxcomp.model import Model
from onnxcomp.opening import STDOUT, Opened, check_outputs, open_model
from onnxcomp.recipe import Recipe, dump_recipe, load_recipe, provenance, resolve
from onnxcomp.report.html import render
from onnxcomp.report.inspection import layer_changes
from onnxcomp.report.progress import ProgressView
from onnxcomp.report.text import plan_view, report_view, unmet_limits
from onnxcomp.search.run import Result
from onnxcomp.search.run import compress as compress_model
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.storage import in_form

PACKED_SUFFIX = ".onnxc"


def compress(
    model: Path,
    out: Annotated[Path, typer.Option("-o", metavar="OUT", help="The file to write.")],
    max_macs: Macs = None,
    max_params: Params = None,
    max_size: Size = None,
    max_latency: Latency = None,
    max_drop: MaxDrop = None,
    max_drift: MaxDrift = None,
    data: Data = None,
    preprocess: Preprocess = None,
    metric: Metric = None,
    recipe: RecipeFile = None,
    methods: Methods = None,
    exclude: Exclude = None,
    target: Target = None,
    grid: Grid = None,
    tune: Tune = False,
    device: Device = None,
    emitted: Emit = None,
    time_limit: TimeLimit = None,
    resume: Resume = None,
    memory: Memory = None,
    seed: Seed = None,
    threads: Threads = None,
    report: Page = None,
    json_file: Json = None,
    dry_run: DryRun = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Make a model smaller and faster after training, within limits.

    Limits are shares (0.5, 50%) or absolute (20M, 1.5MB); on drop or drift they ask for the
    fastest model, on costs for the most accurate.  The best so far is in OUT at any time.
    """
    flags: dict[str, Any] = {"exclude": exclude, "target": target, "grid": grid}
    flags |= {"device": device, "memory": memory, "seed": seed, "threads": threads}
    flags |= {
        "limits": Limits(max_macs, max_params, max_size, max_latency, max_drop, max_drift),
        "methods": None if methods is None else tuple(methods.split(",")),
        "emit": _form(out, emitted),
        "tune": tune or None,
        "time_limit": time_limit,
        "force": force or None,
    }
    settings, metric = _resolved(recipe, flags, metric)
    outputs = _Outputs(out, out.with_suffix(".recipe.yaml"), report, json_file)
    with ProgressView(stderr(), quiet=quiet, time_limit_s=settings.time_limit) as progress:
        opened = open_model(model, data, preprocess=preprocess, seed=settings.seed)
        inputs = inputs_of(opened.model.files, data, preprocess, recipe)
        check_outputs(outputs.by_flag(), inputs)
        best = _BestSoFar(out, settings.emit, inputs)
        result = _search(opened, settings, metric, best, progress, dry_run, resume)
    warn(opened.warnings)
    if dry_run:
        return _show_plan(result, json_file)
    sources = provenance({"model": model, "data": data, "preprocess": preprocess})
    text = dump_recipe(settings, metric=metric, provenance=sources)
    return _deliver(result, opened, text, outputs, inputs)


def _form(out: Path, emitted: str | None) -> str | None:
    """Return the form of the file to write, or None where neither name nor flag tells."""
    if emitted is not None and emitted not in ("onnx", "codebook"):
        raise ParameterError.choice("compress", "--emit", ("onnx", "codebook"), emitted)
    if out.suffix != PACKED_SUFFIX:
        return emitted
    if emitted is not None:
        raise ParameterError(
            f"--emit: '{emitted}' is a form of ONNX files, but -o names the packed '{out}'; "
            "leave one of them out"
        )
    return "onnxc"


def _write(model: Model, path: Path, emitted: str, inputs: Iterable[Path]) -> int:
    """Write a model in the form that the settings ask for; return its bytes."""
    if emitted == "onnxc":
        return codec.pack(model, path, inputs=inputs)
    model = in_form(model, emitted)
    proto = model.to_proto(external=True)
    return write_model(proto, path, inputs=inputs, external=model.weights)


def _resolved(
    recipe: Path | None, flags: Mapping[str, Any], metric: str | None
) -> tuple[Settings, str | None]:
    """Return settings and metric: flags over the recipe over defaults."""
    base = Recipe() if recipe is None else load_recipe(recipe)
    settings = resolve(base, flags)
    if settings.emit == "onnxc" and flags["emit"] is None:
        raise ParameterError(
            f"-o: the recipe makes a packed file, so that the name must end in {PACKED_SUFFIX}"
        )
    return settings, metric or base.metric


def _search(
    opened: Opened,
    settings: Settings,
    metric: str | None,
    best: _BestSoFar,
    progress: ProgressView,
    dry_run: bool,
    resume: Path | None,
) -> Result:
    """Compress, with the best model so far in its file."""
    with best:
        result = compress_model(
            opened.model,
            opened.user_samples,
            settings=settings,
            metric=None if metric is None else load_metric(metric),
            progress=progress.update,
            dry_run=dry_run,
            resume=resume,
            keep=None if dry_run else best.write,
        )
        result.report.ladder.raise_if_failed()
    return result


class _BestSoFar:
    """Keeps the best model so far in the output file; an error takes it away again."""

    def __init__(self, path: Path, emitted: str, inputs: Iterable[Path]) -> None:
        self._path = path
        self._emitted = emitted
        self._inputs = inputs
        self._skip = self._there = path.exists()

    def write(self, model: Model) -> None:
        """Write a model; the first, which is the input, only where there is no file yet."""
        if not self._skip:
            _write(model, self._path, self._emitted, self._inputs)
        self._skip = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and not self._there:
            for file in (self._path, self._path.with_name(self._path.name + ".data")):
                file.unlink(missing_ok=True)


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
    emit(json_file if json_file == STDOUT else None, payload, plan_view(result.report))
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
    written = _write(result.model, outputs.model, report.settings.emit, inputs)
    report = replace(report, result=replace(report.result, file_bytes=written))
    write_text(outputs.recipe, recipe, inputs=inputs)
    if outputs.page is not None:
        before, after = (Analysis(m, opened.samples) for m in (opened.model, result.model))
        page = render(report, layer_changes(before, after))
        write_text(outputs.page, page, inputs=inputs)
    emit(outputs.json, report.to_json(), report_view(report))
    if result.interrupted:
        complain(f"interrupted; the best so far is in {outputs.model}")
        raise typer.Exit(130)
    unmet = unmet_limits(report)
    if unmet or not result.met:
        reasons = "; ".join(unmet) or "see the notes"
        raise LimitError(f"limit not met: {reasons}; the best is in {outputs.model}")
