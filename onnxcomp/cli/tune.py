"""`onnxcomp tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from onnxcomp.cli.options import Quiet, Resume, Seed, Threads, TimeLimit
from onnxcomp.cli.output import complain, emit, inputs_of, stderr, warn
from onnxcomp.loading import load, write_model
from onnxcomp.opening import check_outputs, open_model
from onnxcomp.report.progress import ProgressView
from onnxcomp.tune import TuneResult, check_signatures
from onnxcomp.tune import tune as tune_model


def tune(
    model: Path,
    teacher: Annotated[
        Path, typer.Option("--teacher", metavar="PATH", help="The original to learn from.")
    ],
    data: Annotated[
        Path, typer.Option("--data", metavar="PATH", help="Samples: .npz or a folder of .npy.")
    ],
    out: Annotated[Path, typer.Option("-o", metavar="OUT", help="The file to write.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over samples and copies.")] = 20,
    labels: Annotated[
        bool, typer.Option("--labels", help="Learn from the labels in the data too.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where torch computes.")
    ] = "cpu",
    time_limit: TimeLimit = None,
    resume: Resume = None,
    seed: Seed = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Train a compressed model to give what its original gives; needs PyTorch.

    A part of the samples is held out, and OUT is never worse on it than MODEL.  Only values
    of weights change: structure, names, shared weights and zeros of pruned weights stay.
    """
    with ProgressView(stderr(), quiet=quiet, time_limit_s=time_limit) as progress:
        student = open_model(model, data)
        check_signatures(student.model, load(teacher))  # says more than that samples misfit
        original = open_model(teacher, data)
        inputs = inputs_of((*student.model.files, *original.model.files), data)
        check_outputs({"-o": out}, inputs)
        result = tune_model(
            student.model,
            original.model,
            student.samples,
            epochs=epochs,
            labels=labels,
            device=device,
            seed=seed or 0,
            threads=threads or 1,
            time_limit=time_limit,
            resume=resume,
            progress=progress.update,
        )
    warn((*student.warnings, *original.warnings))
    proto = result.model.to_proto(external=True)
    write_model(proto, out, inputs=inputs, external=result.model.weights)
    emit(None, {}, _view(result))
    for note in result.notes:
        complain(f"note: {note}")
    if result.interrupted:
        complain(f"interrupted; the best so far is in {out}")
        raise typer.Exit(130)


def _view(result: TuneResult) -> Group:
    """Return the epochs as a table, and what was gained."""
    if result.before is None or result.after is None:
        return Group("not trained")
    table = Table(box=None, pad_edge=False)
    for heading in ("epoch", "loss", "hold-out loss", "learning rate"):
        table.add_column(heading, justify="right")
    for epoch in result.history:
        losses = (f"{value:.4g}" for value in (epoch.fit_loss, epoch.holdout_loss))
        table.add_row(str(epoch.number), *losses, f"{epoch.learning_rate:.2g}")
    return Group(table, f"hold-out loss: {result.before:.4g} -> {result.after:.4g}")
