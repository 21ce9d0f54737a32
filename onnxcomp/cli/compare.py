"""`onnxcomp compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxcomp.cli.options import Data, Drift, Drop, Json, Metric, Preprocess, Speedup
from onnxcomp.cli.output import emit, inputs_of, warn
from onnxcomp.metrics import load_metric
from onnxcomp.opening import check_outputs, open_model
from onnxcomp.report import plain
from onnxcomp.report.comparison import compare_models
from onnxcomp.report.text import comparison_view
from onnxcomp.search.settings import Limits


def compare(
    original: Annotated[Path, typer.Argument(metavar="A", help="The original.")],
    candidate: Annotated[Path, typer.Argument(metavar="B", help="The candidate.")],
    data: Data = None,
    preprocess: Preprocess = None,
    metric: Metric = None,
    max_drop: Drop = None,
    max_drift: Drift = None,
    min_speedup: Speedup = None,
    json_file: Json = None,
) -> None:
    """Compare two models; a gate that is not met ends with exit code 5.

    Without --metric, --max-drop means top-1 where the data have labels, else the share of
    samples on which the two models disagree.
    """
    first, second = (
        open_model(path, data, preprocess=preprocess) for path in (original, candidate)
    )
    inputs = inputs_of((*first.model.files, *second.model.files), data, preprocess)
    check_outputs({"--json": json_file}, inputs)
    if metric is None and max_drop is not None:
        metric = "agreement" if first.samples.labels is None else "top1"
    judged = None if metric is None else load_metric(metric)
    if max_drop and judged is not None and judged.classes:
        Limits(drop=max_drop).check_share()
    found = compare_models(
        first.model,
        second.model,
        first.user_samples,
        metric=judged,
        max_drop=max_drop,
        max_drift=max_drift,
        min_speedup=min_speedup,
    )
    warn((*first.warnings, *second.warnings))
    emit(json_file, plain(found), comparison_view(found))
    found.raise_if_failed()
