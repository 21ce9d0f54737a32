"""`onnxcomp inspect`."""

from __future__ import annotations

from pathlib import Path

from onnxcomp.analysis import Analysis
from onnxcomp.cli.options import Data, Html, Json, Preprocess
from onnxcomp.cli.output import emit, inputs_of
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.loading import as_model, read_model, write_text
from onnxcomp.opening import check_outputs, first_samples
from onnxcomp.report import plain
from onnxcomp.report.html import render_inspection
from onnxcomp.report.inspection import inspect_model
from onnxcomp.report.text import inspection_view


def inspect(
    model: Path,
    data: Data = None,
    preprocess: Preprocess = None,
    json_file: Json = None,
    html: Html = None,
) -> None:
    """Show layers, MACs, parameters, shared tensors, channel groups and refusals."""
    loaded = read_model(model)
    inputs = inputs_of(loaded.files, data, preprocess)
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
    emit(json_file, plain(found), inspection_view(found))
