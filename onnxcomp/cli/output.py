"""What commands read and print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType

from onnxcomp.loading import write_text
from onnxcomp.opening import STDOUT
from onnxcomp.report.text import clean

_PIPE_WIDTH = 140  # columns where stdout is no terminal


def inputs_of(files: Iterable[Path], *given: Path | None) -> list[Path]:
    """Return all files and folders that a command reads."""
    return [*files, *(path for path in given if path is not None)]


def emit(path: Path | None, payload: Mapping[str, Any], view: RenderableType) -> None:
    """Print tables, write JSON to a file, or print nothing but JSON."""
    text = json.dumps(payload, indent=1) + "\n"
    if path == STDOUT:
        typer.echo(text, nl=False)
        return
    if path is not None:
        write_text(path, text)
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    Console(width=width, markup=False, highlight=False, emoji=False).print(view)


def stderr() -> Console:
    """Return the console for progress."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def warn(warnings: Iterable[str]) -> None:
    """Print every warning once, to stderr."""
    for warning in dict.fromkeys(warnings):
        complain(f"warning: {warning}")


def complain(message: str) -> None:
    """Print one line to stderr; control codes in it become visible."""
    typer.echo(clean(message), err=True)
