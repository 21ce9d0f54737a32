"""Model files: read without trusting them, written without leaving half of one behind."""

import os

from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.reading import PACKED_MAGIC, LoadedModel, parse_model, read_model
from onnxcomp.loading.writing import replacing, write_model, write_text
from onnxcomp.model import Model

__all__ = [
    "PACKED_MAGIC",
    "LoadLimits",
    "LoadedModel",
    "as_model",
    "load",
    "parse_model",
    "read_model",
    "replacing",
    "write_model",
    "write_text",
]


def load(path: str | os.PathLike[str], *, limits: LoadLimits | None = None) -> Model:
    """Read a model file that nobody vouches for.

    Its structure is checked before any library touches it; external data stay memory-mapped.
    Run it in `sandbox.first_run` once before anything else runs it.

    Args:
        path: An ONNX file.
        limits: Limits on what is accepted.

    Raises:
        InvalidModelError: The file is broken or breaks a limit.
        UnsupportedModelError: It holds what onnxcomp does not read.
    """
    return as_model(read_model(path, limits=limits))


def as_model(loaded: LoadedModel) -> Model:
    """Return a checked file as a model; it takes the payloads over."""
    return Model.from_proto(
        loaded.proto,
        external=loaded.external,
        consume=True,
        files=loaded.files,
        file_bytes=loaded.file_bytes,
        foreign_ops=loaded.foreign_ops,
        packed=loaded.packed,
    )
