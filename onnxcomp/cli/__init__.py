"""The command line: parses, calls the library and prints; it decides nothing."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from onnxcomp.cli import bench, calibrate, compare, compress, inspect, pack, tune
from onnxcomp.cli.output import complain
from onnxcomp.errors import OnnxcompError


class _Commands(TyperGroup):
    """The commands, and the one place where errors become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            message, code = _outcome(error)
            if code is None:
                raise
            complain(message)
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
    """Run the command line; stdout is for results alone, whatever native libraries print."""
    out = sys.__stdout__
    if out is not None and sys.__stderr__ is not None and sys.stdout is out:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=out.encoding)
        os.dup2(2, 1)
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


for _command in (
    inspect.inspect,
    compress.compress,
    compare.compare,
    bench.bench,
    calibrate.calibrate,
    tune.tune,
    pack.pack,
    pack.unpack,
):
    app.command()(_command)
