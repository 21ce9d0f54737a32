"""`onnxcomp compress`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import typer

from onnxcomp import codec
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import TARGETS
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
    SearchThreads,
    Seed,
    Size,
    Target,
    Threads,
    TimeLimit,
    Tune,
)
from onnxcomp.cli.output import complain, emit, inputs_of, stderr, warn
from onnxcomp.errors import LimitError, OnnxcompError, ParameterError
from onnxcomp.loading import load, write_model, write_text
from onnxcomp.metrics import load_metric
from onnxcomp.model import Model, Signature
from onnxcomp.opening import Opened, check_outputs, open_model
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
    search_threads: SearchThreads = None,
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
    flags |= {"tune": tune or None, "device": device, "memory": memory, "seed": seed}
    flags |= {"threads": threads, "search_threads": search_threads, "force": force or None}
    flags |= {"emit": _form(out, emitted), "time_limit": time_limit}
    flags["methods"] = None if methods is None else tuple(methods.split(","))
    flags["limits"] = Limits(max_macs, max_params, max_size, max_latency, max_drop, max_drift)
    settings, metric, same = _resolved(recipe, flags, metric)
    _check_used(settings, device, report, dry_run)
    outputs = _Outputs.of(out, report, json_file, recipe if same else None)
    sources = {"model": model, "data": data, "preprocess": preprocess}
    sources["target"] = None if settings.target in TARGETS else Path(settings.target)
    with ProgressView(stderr(), quiet=quiet, time_limit_s=settings.time_limit) as progress:
        opened = open_model(model, data, preprocess=preprocess, seed=settings.seed)
        inputs = inputs_of(opened.model.files, recipe, *sources.values())
        check_outputs(outputs.by_flag(), inputs)
        best = _BestSoFar(out, settings.emit, inputs)
        result = _search(opened, settings, metric, best, progress, dry_run, resume)
    warn(opened.warnings)
    if dry_run:
        return _show_plan(result, json_file)
    text = dump_recipe(settings, metric=metric, provenance=provenance(sources))
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
) -> tuple[Settings, str | None, bool]:
    """Return settings and metric, and whether they are the recipe's own.

    Flags beat the recipe, the recipe beats the defaults.
    """
    base = Recipe() if recipe is None else load_recipe(recipe)
    settings = resolve(base, flags)
    if settings.emit == "onnxc" and flags["emit"] is None:
        raise ParameterError(
            f"-o: the recipe makes a packed file, so that the name must end in {PACKED_SUFFIX}"
        )
    metric = metric or base.metric
    return settings, metric, (settings, metric) == (resolve(base, {}), base.metric)


def _check_used(
    settings: Settings, device: str | None, page: Path | None, dry_run: bool
) -> None:
    """Refuse flags that would do nothing beside the others."""
    if device is not None and not settings.tune:
        raise ParameterError("--device: nothing is trained there without --tune")
    if page is not None and dry_run:
        raise ParameterError("--report: --dry-run makes no model; --json has its plan")


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
        self._first = True
        self._made = False  # by this run, where there was no model that stands for the input

    def write(self, model: Model) -> None:
        """Write a model; not the first, the input, where a model with its signature is."""
        first, self._first = self._first, False
        if first and _is_model(self._path, model.signature):
            return
        _write(model, self._path, self._emitted, self._inputs)
        self._made |= first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and self._made:
            for file in (self._path, self._path.with_name(self._path.name + ".data")):
                file.unlink(missing_ok=True)


def _is_model(path: Path, signature: Signature) -> bool:
    """Whether a file holds a model that takes and gives the same."""
    try:
        return load(path).signature == signature
    except OnnxcompError:
        return False


class _Outputs(NamedTuple):
    """The files that `compress` writes."""

    model: Path
    recipe: Path | None
    page: Path | None
    json: Path | None

    @classmethod
    def of(cls, model: Path, page: Path | None, json: Path | None, read: Path | None) -> Self:
        """Return the files, without the recipe where `read` says the same in its place."""
        recipe = model.with_suffix(".recipe.yaml")
        stays = read is not None and recipe.exists() and recipe.samefile(read)
        return cls(model, None if stays else recipe, page, json)

    def by_flag(self) -> dict[str, Path | None]:
        """Return the files by the flag that names them."""
        return dict(zip(("-o", "-o (its recipe)", "--report", "--json"), self, strict=True))


def _show_plan(result: Result, json_file: Path | None) -> None:
    """Print what a compression would do, and tell by the exit code whether it is enough."""
    payload = {**result.report.to_json(), "dry_run": True}
    emit(json_file, payload, plan_view(result.report))
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
    if outputs.recipe is not None:
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
