"""Packed files as what other code reads: a model, an ONNX file, an onnxruntime session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxcomp.codec.container import PackedFile, check_readable, packed
from onnxcomp.codec.planning import Profile
from onnxcomp.errors import OnnxcompError
from onnxcomp.loading import LoadLimits, replacing
from onnxcomp.model import Array, Model, fill
from onnxcomp.runtime import open_file

if TYPE_CHECKING:
    import onnxruntime as ort

FilePath = str | os.PathLike[str]

_PAGE = 4096  # onnxruntime maps external data by pages; what is smaller stays in the model


def pack(
    model: Model,
    path: FilePath,
    profile: str = Profile.BALANCED,
    *,
    inputs: Iterable[FilePath] = (),
) -> int:
    """Write a model as a packed file, atomically; lossless for any model.

    Args:
        model: The model.
        path: The file to write; one that exists is replaced.
        profile: "fast" decodes fastest, "max" is smallest and needs numba.
        inputs: Files that must not be overwritten, besides those of the model.

    Returns:
        The bytes of the file.

    Raises:
        ParameterError: The profile is unknown, or the file is an input or cannot be written.
        UnsupportedModelError: The file would break a limit of the format when it is read.
    """
    pieces = packed(model, Profile(profile))
    with _naming(path):
        check_readable(pieces)
    with replacing(path, inputs=(*model.files, *inputs)) as stream:
        for piece in pieces:
            stream.write(piece)
    return sum(map(len, pieces))


def packed_bytes(model: Model, profile: str = Profile.BALANCED) -> int:
    """Return the bytes of the file that `pack` would write."""
    return sum(map(len, packed(model, Profile(profile))))


def unpack(path: FilePath, *, limits: LoadLimits | None = None) -> Model:
    """Read a packed file into memory: the same model, digest and all.

    `onnxcomp.load` reads it too, and refuses what it refuses in an ONNX file.

    Raises:
        InvalidModelError: The file is damaged or breaks a limit.
    """
    with _naming(path), PackedFile(path, limits) as file:
        return Model.from_proto(
            file.head.skeleton,
            external=dict(file.arrays()),
            consume=True,
            files=(file.path,),
            file_bytes=file.size,
            packed=True,
        )


def stream(path: FilePath, *, limits: LoadLimits | None = None) -> Iterator[tuple[str, Array]]:
    """Decode the coded tensors of a packed file one by one.

    Memory is about twice that of the largest tensor, that of those that come again, and a few
    segments; tensors of at most 64 bytes lie in the graph and are not among them.

    Raises:
        InvalidModelError: The file is damaged or breaks a limit.
    """
    with _naming(path), PackedFile(path, limits) as file:
        yield from file.arrays()


def open_session(
    path: FilePath,
    options: ort.SessionOptions | None = None,
    *,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    limits: LoadLimits | None = None,
) -> ort.InferenceSession:
    """Open an onnxruntime session on a packed file.

    The weights go one by one into an external-data file in a private folder, which is gone
    from the disk when the session is open. The graph is not checked as `load` does it.

    Args:
        path: The packed file.
        options: Any options of onnxruntime; ORT_ENABLE_EXTENDED takes the least memory.
        providers: Execution providers of onnxruntime.
        limits: What the file may ask for.

    Raises:
        InvalidModelError: The file is damaged or breaks a limit.
        ExecutionError: Onnxruntime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        with _naming(path):
            plain = unpack_to(path, Path(folder), limits=limits)
        return open_file(plain, options, providers=providers)


def unpack_to(path: FilePath, folder: Path, *, limits: LoadLimits | None = None) -> Path:
    """Write a packed file as `model.onnx` and `model.onnx.data` into a private folder.

    One tensor at a time is in memory.

    Returns:
        The path of the model.

    Raises:
        InvalidModelError: The file is damaged or breaks a limit.
    """
    target = folder / "model.onnx"
    data = target.with_name(target.name + ".data")
    with PackedFile(path, limits) as file, data.open("xb") as out:
        skeleton = onnx.ModelProto()
        skeleton.CopyFrom(file.head.skeleton)
        stubs = {tensor.name: tensor for tensor in skeleton.graph.initializer}
        for name, array in file.arrays():
            if array.nbytes < _PAGE:
                fill(stubs[name], array)
                continue
            out.write(bytes(-out.tell() % _PAGE))
            _refer(stubs[name], data.name, out.tell(), array.nbytes)
            out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    with target.open("xb") as out:
        out.write(skeleton.SerializeToString())
    return target


def _refer(stub: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    stub.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        stub.external_data.add(key=key, value=str(value))


@contextmanager
def _naming(path: FilePath) -> Iterator[None]:
    """Put the name of the file in front of what is wrong with it."""
    try:
        yield
    except OnnxcompError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error
