"""The options that several commands take, as annotated types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxcomp.errors import ParameterError
from onnxcomp.recipe import parse_duration, parse_latency, parse_quantity

_Parser = Callable[[str], float]


def _parser(parse: _Parser) -> _Parser:
    def parsed(text: str) -> float:
        try:
            return parse(text)
        except ParameterError as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


_quantity = _parser(parse_quantity)


def _points(text: str) -> float:
    zero = text.strip().removesuffix("%").strip() in ("0", "0.0")
    return 0.0 if zero else _quantity(text)


def _limit(flag: str, what: str, parse: _Parser = _quantity) -> Any:
    """Return the option of a limit."""
    return typer.Option(flag, parser=parse, metavar="LIMIT", help=f"At most, {what}.")


def _path(flag: str, what: str) -> Any:
    """Return the option of a file."""
    return typer.Option(flag, metavar="PATH", help=what)


Data = Annotated[
    Path | None,
    _path("--data", "Samples: .npz, a folder of .npy, or a folder of images."),
]
Preprocess = Annotated[Path | None, _path("--preprocess", "YAML: how images become inputs.")]
Json = Annotated[Path | None, _path("--json", "Write JSON to a file, or - for stdout.")]
RecipeFile = Annotated[Path | None, _path("--recipe", "Settings; flags beat them.")]
Page = Annotated[Path | None, _path("--report", "Write a page.")]
Html = Annotated[Path | None, _path("--html", "Write a page.")]
Metric = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="top1, psnr, psnr:PEAK, agreement or module:function."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of a run, where its time is measured [1].")
]
SearchThreads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of search and training [all cores, at most 8]."),
]
Macs = Annotated[float | None, _limit("--max-macs", "multiply-accumulates per sample")]
Params = Annotated[float | None, _limit("--max-params", "parameters")]
Size = Annotated[float | None, _limit("--max-size", "bytes of the file")]
Latency = Annotated[
    float | None,
    _limit(
        "--max-latency",
        "time of a run, at batch 1 or as declared (0.6, 4ms)",
        _parser(parse_latency),
    ),
]
MaxDrop = Annotated[
    float | None, _limit("--max-drop", "points of the metric lost on new samples (1%)")
]
MaxDrift = Annotated[
    float | None, _limit("--max-drift", "relative L2 of any output on new samples")
]
Tune = Annotated[
    bool, typer.Option("--tune", help="Train the result on --data at the end; needs PyTorch.")
]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help="Where torch computes [cpu].")
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        parser=_parser(parse_duration),
        metavar="TIME",
        help="At most so long, such as 10m; the best so far is kept.",
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep what is measured there, and go on from it."),
]
Methods = Annotated[str | None, typer.Option(metavar="A,B", help="Lossy passes to use.")]
Exclude = Annotated[str | None, typer.Option(metavar="REGEX", help="Nodes to leave alone.")]
Target = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="CPU: a profile, or what `calibrate` wrote."),
]
Grid = Annotated[
    str | None, typer.Option(metavar="auto|off|N", help="Widths and ranks that are allowed.")
]
Emit = Annotated[
    str | None,
    typer.Option(
        "--emit", metavar="onnx|codebook", help="Whole weights, or at most a byte each."
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(parser=_quantity, metavar="BYTES", help="For activations, such as 4GB."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of everything that is drawn.")]
Force = Annotated[bool, typer.Option("--force", help="Keep a larger or slower result.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; make no model.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Drop = Annotated[
    float | None,
    typer.Option(parser=_points, metavar="X", help="Points of the metric lost, such as 1%."),
]
Drift = Annotated[float | None, typer.Option(min=0, help="Relative L2 of any output.")]
Speedup = Annotated[float | None, typer.Option(min=0, help="Time of A over that of B.")]
