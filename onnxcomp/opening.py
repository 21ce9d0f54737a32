"""Opening a model file that nobody vouches for: its first run happens in a bounded child."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxcomp.analysis.probe import usual_shapes
from onnxcomp.errors import (
    ExecutionError,
    OnnxcompError,
    ParameterError,
    UnsupportedModelError,
)
from onnxcomp.loading import LoadedModel, as_model, read_model
from onnxcomp.model import Model, Value
from onnxcomp.samples import Samples, load_samples, random_samples
from onnxcomp.sandbox import first_run

FilePath = str | os.PathLike[str]
STDOUT = Path("-")


@dataclass(frozen=True)
class Opened:
    """A model that has run once.

    Attributes:
        model: The model.
        samples: The user's samples, or the one random sample on which it ran.
        warnings: What was put right in the file.
    """

    model: Model
    samples: Samples
    warnings: tuple[str, ...]

    @property
    def user_samples(self) -> Samples | None:
        """The user's samples; None where there are none."""
        return None if self.samples.origin == "random" else self.samples


def open_model(
    path: FilePath,
    data: FilePath | None = None,
    *,
    preprocess: FilePath | None = None,
    seed: int = 0,
) -> Opened:
    """Read a model file and its samples, and let it run once in a child process.

    Args:
        path: The model file.
        data: File or folder of samples; random inputs are tried where it is None.
        preprocess: For a folder of images: how they become inputs.
        seed: Seed of the random inputs.

    Raises:
        InvalidModelError: The file is broken or breaks a limit.
        UnsupportedModelError: It has foreign operators, or runs on no random input.
        ExecutionError: It cannot be loaded or run.
        DataError: The samples do not fit.
    """
    loaded = read_model(path)
    samples = first_samples(loaded, data, preprocess=preprocess, seed=seed)
    return Opened(as_model(loaded), samples, loaded.warnings)


def first_samples(
    loaded: LoadedModel,
    data: FilePath | None = None,
    *,
    preprocess: FilePath | None = None,
    seed: int = 0,
) -> Samples:
    """Return samples on which a model ran in a child process; see `open_model`."""
    if loaded.foreign_ops:
        raise UnsupportedModelError(
            f"{loaded.path}: operators outside the ONNX domain: "
            f"{', '.join(loaded.foreign_ops)}; what they compute is not known, so that only "
            "`inspect` works on the model"
        )
    model = Model(loaded.proto, {})
    inputs = model.signature.inputs
    if data is not None:
        samples = load_samples(data, inputs, preprocess=preprocess)
        _run_first(loaded, samples, inputs)
        return samples
    reason = "its inputs have unknown rank"
    for samples in _random_samples(model, seed):
        try:
            _run_first(loaded, samples, inputs)
            return samples
        except ExecutionError as error:
            if "a first attempt to run" not in str(error):
                raise
            reason = str(error)
    raise UnsupportedModelError(
        f"{loaded.path}: it runs on no random input; give samples with --data ({reason})"
    )


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path]) -> None:
    """Refuse outputs that cannot be written, before anything takes time.

    Args:
        outputs: Files to write, by the flag that names them; "-" stands for stdout.
        inputs: Files and folders that are read.

    Raises:
        ParameterError: An output is an input, no ordinary file, in a folder where nothing can
            be written, or named twice.
    """
    read, written = {os.path.realpath(path) for path in inputs}, set[str]()
    for flag, path in outputs.items():
        if path is None or path == STDOUT:
            continue
        if problem := _obstacle(path):
            raise ParameterError(f"{flag}: '{path}' {problem}")
        real = os.path.realpath(path)
        if real in read:
            raise ParameterError(f"{flag}: '{path}' is an input, which is never overwritten")
        if real in written:
            raise ParameterError(f"{flag}: '{path}' would be written twice")
        written.add(real)


def _obstacle(path: Path) -> str:
    """Return why a file cannot be written, or ""."""
    if path.is_dir():
        return "is a folder"
    if path.exists() and not path.is_file():
        return "is no ordinary file"
    if not path.parent.is_dir():
        return "is in a folder that does not exist"
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return ""
    except OSError as error:
        return f"cannot be written: {error.strerror}"


def _random_samples(model: Model, seed: int) -> Iterator[Samples]:
    for shapes in usual_shapes(model):
        yield random_samples(model.signature.inputs, 1, seed, shapes)


def _run_first(loaded: LoadedModel, samples: Samples, inputs: tuple[Value, ...]) -> None:
    feed = next(iter(samples.batches(inputs, 1))).feed
    try:
        first_run(loaded, feed)
    except OnnxcompError as error:
        raise type(error)(f"{loaded.path}: {error}") from error
