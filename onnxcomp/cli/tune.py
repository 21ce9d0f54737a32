"""`onnxcomp tune`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from onnxcomp import codec
from onnxcomp.cli.compress import PACKED_SUFFIX
from onnxcomp.cli.options import (
    Device,
    Memory,
    Preprocess,
    Quiet,
    Resume,
    Seed,
    TimeLimit,
)
from onnxcomp.cli.output import complain, emit, inputs_of, stderr, warn
from onnxcomp.loading import load, write_model
from onnxcomp.opening import check_outputs, open_model
from onnxcomp.report.progress import ProgressView
from onnxcomp.teaching import AUGMENTATIONS, check_signatures
from onnxcomp.tune import BLOCKS, TuneResult, Tuning, check_torch
from onnxcomp.tune import tune as tune_model

Teacher = Annotated[
    Path, typer.Option("--teacher", metavar="PATH", help="The original to learn from.")
]
Data = Annotated[
    Path,
    typer.Option("--data", metavar="PATH", help="Samples: .npz, a folder of .npy, or images."),
]
Out = Annotated[
    Path, typer.Option("-o", metavar="OUT", help="The file to write, .onnx or .onnxc.")
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Passes over the samples [20, or what time holds]."),
]
Labels = Annotated[bool, typer.Option("--labels", help="Learn from labels in the data too.")]
Blocks = Annotated[
    str, typer.Option(metavar="|".join(BLOCKS), help="What ends of blocks are used for.")
]
Augment = Annotated[
    str, typer.Option(metavar="|".join(AUGMENTATIONS), help="What becomes of images.")
]
Optimizer = Annotated[str, typer.Option(metavar="adamw|sgd", help="What takes the steps.")]
Rate = Annotated[
    float | None, typer.Option(metavar="X", help="The highest [1e-4; with sgd 1e-3].")
]


def tune(
    model: Path,
    teacher: Teacher,
    data: Data,
    out: Out,
    preprocess: Preprocess = None,
    epochs: Epochs = None,
    labels: Labels = False,
    blocks: Blocks = "auto",
    augment: Augment = "light",
    optimizer: Optimizer = "adamw",
    learning_rate: Rate = None,
    device: Device = None,
    time_limit: TimeLimit = None,
    resume: Resume = None,
    memory: Memory = None,
    seed: Seed = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and onnxruntime.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Train a compressed model to give what its original gives; needs PyTorch.

    A part of the samples is held out, and OUT is never worse on it than MODEL.  Only values
    of weights change: structure, names, shared weights, zeros of pruned weights and codebooks
    stay.  `torchrun --nproc-per-node N -m onnxcomp tune ...` trains in N processes.
    """
    tuning = Tuning(
        epochs=epochs,
        labels=labels,
        blocks=blocks,
        augment=augment,
        optimizer=optimizer,
        learning_rate=learning_rate,
        device=device or "cpu",
        memory=memory or Tuning.memory,
        seed=seed or 0,
        threads=threads,
    )
    check_torch()
    from onnxcomp.bridge.processes import leads

    first = leads()
    with ProgressView(stderr(), quiet=quiet or not first, time_limit_s=time_limit) as progress:
        student = open_model(model, data, preprocess=preprocess)
        check_signatures(student.model, load(teacher))  # says more than that samples misfit
        original = open_model(teacher, data, preprocess=preprocess)
        models = (student.model, original.model)
        inputs = inputs_of([f for m in models for f in m.files], data, preprocess)
        check_outputs({"-o": out}, inputs)
        result = tune_model(
            *models,
            student.samples,
            tuning,
            time_limit=time_limit,
            resume=resume,
            progress=progress.update,
        )
    if first:
        warn((*student.warnings, *original.warnings))
        _deliver(result, out, inputs)


def _deliver(result: TuneResult, out: Path, inputs: Iterable[Path]) -> None:
    """Write and print what tuning gave, and tell by the exit code how it ended."""
    if out.suffix == PACKED_SUFFIX:
        codec.pack(result.model, out, inputs=inputs)
    else:
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
    for heading in ("phase", "epoch", "loss", "hold-out loss", "learning rate"):
        table.add_column(heading, justify="right")
    for epoch in result.history:
        losses = (f"{value:.4g}" for value in (epoch.fit_loss, epoch.holdout_loss))
        table.add_row(
            epoch.phase, f"{epoch.number:.3g}", *losses, f"{epoch.learning_rate:.2g}"
        )
    return Group(table, f"hold-out loss: {result.before:.4g} -> {result.after:.4g}")
