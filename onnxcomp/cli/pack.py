"""`onnxcomp pack` and `onnxcomp unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from onnxcomp import codec
from onnxcomp.cli.output import emit, warn
from onnxcomp.errors import InvalidModelError
from onnxcomp.loading import as_model, read_model, write_model
from onnxcomp.opening import check_outputs
from onnxcomp.report.text import clean, size

Out = Annotated[Path, typer.Option("-o", metavar="OUT", help="The file to write.")]


def pack(
    model: Path,
    out: Out,
    profile: Annotated[
        codec.Profile,
        typer.Option(help="fast decodes fastest, max is smallest and needs numba."),
    ] = codec.Profile.BALANCED,
) -> None:
    """Store a model entropy-coded in one .onnxc file, without loss.

    Operators and values may be any, also those that other commands refuse. All commands read
    it like the ONNX file; onnxcomp.open_session runs it.
    """
    loaded = read_model(model, to_store=True)
    check_outputs({"-o": out}, loaded.files)
    warn(loaded.warnings)
    written = codec.pack(as_model(loaded), out, profile)
    _show(model, loaded.file_bytes, out, written)


def unpack(model: Annotated[Path, typer.Argument(metavar="IN")], out: Out) -> None:
    """Write the ONNX file that a .onnxc file holds."""
    loaded = read_model(model, to_store=True)
    if not loaded.packed:
        raise InvalidModelError(f"{model}: not a packed model")
    check_outputs({"-o": out}, loaded.files)
    warn(loaded.warnings)
    network = as_model(loaded)
    proto = network.to_proto(external=True)
    written = write_model(proto, out, inputs=loaded.files, external=network.weights)
    _show(model, loaded.file_bytes, out, written)


def _show(source: Path, before: int, out: Path, after: int) -> None:
    share = f"{after / before:.1%}"
    line = f"{source}: {size(before)} -> {out}: {size(after)} ({after:,} bytes, {share})"
    emit(None, {}, Text(clean(line)))
