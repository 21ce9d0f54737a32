"""What a run found so far, in a folder, so that a run that was killed can go on from there.

Every entry is one file, named by the SHA-256 of what it answers: the identity of the run (its
model, samples and settings), a kind, and a key.  Same question, same file; another model or
setting asks other questions, so that nothing has to be thrown away and one folder serves many
runs.  A file is

    magic (8 bytes) | length of the header (u64) | SHA-256 of the header | header | arrays

in little endian without holes.  The header is JSON: the question in full, the value, and for
each array its dtype, shape, order and SHA-256.  A file that is not exactly this, or answers
another question, is ignored with a warning and replaced.

A file gets its name when it is complete, so that a process can be killed at any moment.
Entries are not flushed to the disk: after a power cut some may be damaged, which is found out.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import secrets
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # has no stubs

from onnxcomp.errors import ParameterError
from onnxcomp.model import Array, Model
from onnxcomp.samples import Samples

SCHEMA_VERSION = 2
MARKER = "README"

T = TypeVar("T")
_Question = tuple[str, str, object]
_log = logging.getLogger(__name__)

_TITLE = "onnxcomp resume state, schema "
_README = f"""{_TITLE}{SCHEMA_VERSION}

What `--resume` with this folder has found so far.  A run that was ended goes
on from here when it is started again with the same model, samples and settings; entries of
other runs do no harm.  The folder can be deleted when no run uses it.
"""
_PREFIX = struct.Struct("<8sQ32s")
_MAGIC = b"onnxcomp"
_HEADER_BYTES = 2**24
_MAX_RANK = 64  # of NumPy
_TEMPORARY = re.compile(rf"\.({MARKER}|[0-9a-f]{{64}}\.entry)\.[0-9a-f]{{16}}\.tmp")
_DTYPES: Mapping[str, np.dtype[Any]] = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        *("bool", "float16", "float32", "float64", ml_dtypes.bfloat16),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}


class Store:
    """Entries of one run in a folder.

    Args:
        folder: Made where it is absent; None keeps nothing.
        identity: What the run depends on, see `identity_of`.

    Raises:
        ParameterError: The folder holds something else, was written with another schema, or
            cannot be written.
    """

    def __init__(self, folder: Path | None, identity: str = "") -> None:
        self.folder = folder
        self._identity = identity
        if folder is not None:
            _open_folder(folder)

    def scoped(self, *parts: object) -> Store:
        """Return a store in the same folder for a run, or a part of one, of its own.

        Args:
            parts: Plain values, or dataclasses of them, on which its entries depend as well.
        """
        other = copy.copy(self)
        other._identity = hashlib.sha256(_canonical([self._identity, parts])).hexdigest()
        return other

    def put(self, kind: str, key: object, value: object) -> None:
        """Keep a value, in the place of an earlier one.

        Args:
            kind: What the value is, such as "loss".
            key: A plain value, or a tuple of them; equal numbers of other types differ.
            value: None inside it, bool, int, float, str, list, tuple, dict (with such keys),
                and NumPy arrays and scalars of numbers; they come back as they were.

        Raises:
            ParameterError: The file cannot be written.
        """
        if value is None:
            raise TypeError("Store.put: None stands for what is not there")
        arrays: list[Array] = []
        self._write(("value", kind, key), _encode(value, arrays), arrays)

    def get(self, kind: str, key: object) -> Any | None:
        """Return what `put` kept, or None."""
        return self._read(("value", kind, key), _decode)

    def put_model(self, kind: str, key: object, model: Model) -> None:
        """Keep a model; see `put`."""
        if self.folder is None:
            return
        skeleton = model.skeleton.SerializeToString(deterministic=True)
        value = {
            "digest": model.digest,
            "names": list(model.weights),
            "files": [os.fspath(file) for file in model.files],
            "file_bytes": model.file_bytes,
            "foreign_ops": list(model.foreign_ops),
        }
        arrays = [np.frombuffer(skeleton, np.uint8), *model.weights.values()]
        self._write(("model", kind, key), value, arrays)

    def get_model(self, kind: str, key: object) -> Model | None:
        """Return what `put_model` kept, or None; its digest and `save` are as they were."""
        return self._read(("model", kind, key), _as_model)

    def _write(self, question: _Question, value: object, arrays: Sequence[Array]) -> None:
        if self.folder is None:
            return
        asked = _canonical([self._identity, *question])
        blocks = [(a.dtype.name, a.shape, _order(a), _digest(a)) for a in arrays]
        content = {"question": asked.decode(), "value": value, "arrays": blocks}
        header = json.dumps(content).encode()
        if len(header) > _HEADER_BYTES:
            raise ValueError(f"Store: {question} is too large; keep its numbers as arrays")
        prefix = _PREFIX.pack(_MAGIC, len(header), hashlib.sha256(header).digest())
        pieces = (_flat(a) for a in arrays)  # one at a time: some are copies
        _replace(self.folder / _name(asked), chain((prefix, header), pieces))

    def _read(self, question: _Question, build: Callable[[Any, list[Array]], T]) -> T | None:
        if self.folder is None:
            return None
        asked = _canonical([self._identity, *question])
        file = self.folder / _name(asked)
        try:
            with _ordinary_file(file) as stream:
                return build(*_parse(stream, asked))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with it, the work is done again
            _log.warning("'%s' is ignored: %s", file, error or type(error).__name__)
            return None


def identity_of(model: Model, samples: Samples | None, *parts: object) -> str:
    """Return a digest of what a run depends on.

    Args:
        model: The model, by its digest.
        samples: All bytes of all arrays, labels included, with names, dtypes and shapes.
        parts: Plain values, or dataclasses of them, such as the settings.
    """
    labelled = {} if samples is None else {**samples.arrays, "": samples.labels}
    blocks = [
        (name, a.dtype.str, a.shape, _digest(np.ascontiguousarray(a)))
        for name, a in sorted(labelled.items())
        if a is not None
    ]
    origin = None if samples is None else samples.origin
    version = importlib.metadata.version("onnxcomp")
    content = (SCHEMA_VERSION, version, model.digest, origin, blocks, parts)
    return hashlib.sha256(_canonical(content)).hexdigest()


def _name(question: bytes) -> str:
    return f"{hashlib.sha256(question).hexdigest()}.entry"


def _canonical(value: object) -> bytes:
    """Return plain values as JSON text; tuples are lists, dataclasses are objects."""

    def plain(item: object) -> object:
        if isinstance(item, np.generic):
            return item.item()
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        raise TypeError(f"a key is made of plain values, not of {type(item).__name__}")

    return json.dumps(value, default=plain, sort_keys=True, separators=(",", ":")).encode()


def _encode(value: object, arrays: list[Array]) -> object:
    """Return a value as JSON, in which an object is a tag with its content."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) and value.dtype in _DTYPES.values():
        return {"scalar": [value.dtype.name, value.item()]}
    if isinstance(value, np.ndarray) and value.dtype in _DTYPES.values():
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, list):
        return [_encode(item, arrays) for item in value]
    if type(value) is tuple:
        return {"tuple": [_encode(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(part, arrays) for part in pair] for pair in value.items()]}
    raise TypeError(f"Store.put: {type(value).__name__} is no plain value and no array")


def _decode(value: Any, arrays: list[Array]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "array":
        return arrays[content]
    if tag == "scalar":
        name, number = content
        return _DTYPES[name].type(number)
    if tag == "tuple":
        return tuple(_decode(item, arrays) for item in content)
    if tag == "dict":
        return {_decode(k, arrays): _decode(v, arrays) for k, v in content}
    raise ValueError(f"it has a value of kind '{tag}'")


def _as_model(value: Any, arrays: list[Array]) -> Model:
    skeleton, *weights = arrays
    for array in weights:
        array.setflags(write=False)
    try:
        proto = onnx.ModelProto.FromString(skeleton.tobytes())
    except DecodeError as error:
        raise ValueError(str(error)) from error
    model = Model(
        proto,
        dict(zip(value["names"], weights, strict=True)),
        files=tuple(Path(file) for file in value["files"]),
        file_bytes=value["file_bytes"],
        foreign_ops=tuple(value["foreign_ops"]),
    )
    if model.digest != value["digest"]:
        raise ValueError("the model in it is another one")
    return model


def _parse(stream: FileIO, asked: bytes) -> tuple[Any, list[Array]]:
    """Return the value and the arrays of an entry, or raise where it is none."""
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(_PREFIX.size)
    magic, length, digest = _PREFIX.unpack(prefix.ljust(_PREFIX.size, b"\0"))
    if magic != _MAGIC or length > min(size, _HEADER_BYTES):
        raise ValueError("it is no entry")
    header = stream.read(length)
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("its header is damaged")
    content = json.loads(header)
    if content["question"] != asked.decode():
        raise ValueError("it answers another question")
    blocks = [(_DTYPES[name], *rest) for name, *rest in content["arrays"]]
    total = _PREFIX.size + length + sum(_nbytes(dtype, shape) for dtype, shape, *_ in blocks)
    if total != size:
        raise ValueError(f"it has {size} bytes instead of {total}")
    arrays = []
    for dtype, shape, order, wanted in blocks:
        array = np.empty(shape, dtype, order)
        _fill(stream, _flat(array))
        if _digest(array) != wanted:
            raise ValueError("an array in it is damaged")
        arrays.append(array)
    return content["value"], arrays


def _nbytes(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    if len(shape) > _MAX_RANK or any(type(dim) is not int or dim < 0 for dim in shape):
        raise ValueError("an array in it has no shape")
    return math.prod(shape) * dtype.itemsize


def _fill(stream: FileIO, target: memoryview) -> None:
    while target:
        count = stream.readinto(target)
        if not count:
            raise ValueError("it is cut off")
        target = target[count:]


def _order(array: Array) -> Literal["C", "F"]:
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def _flat(array: Array) -> memoryview:
    """Return the bytes of an array in its order, copied only where they have gaps."""
    ordered = array.T if _order(array) == "F" else np.ascontiguousarray(array)
    return ordered.reshape(-1).view(np.uint8).data


def _digest(array: Array) -> str:
    return hashlib.sha256(_flat(array)).hexdigest()


@contextmanager
def _ordinary_file(file: Path) -> Iterator[FileIO]:
    """Open a file for reading, without following a link or waiting for a pipe."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with FileIO(descriptor) as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no ordinary file")
        yield stream


def _open_folder(folder: Path) -> None:
    """Make a folder, or check that it is one of ours; clear what killed runs left behind."""
    try:
        folder.mkdir(exist_ok=True)
        names = [file.name for file in folder.iterdir()]
    except OSError as error:
        raise ParameterError(
            f"--resume: '{folder}' cannot be used: {error.strerror}; give a folder, or a name "
            "for a new one in a folder that exists"
        ) from error
    unfinished = [name for name in names if _TEMPORARY.fullmatch(name)]
    if len(names) > len(unfinished):
        _check_marker(folder)
    for name in unfinished:
        _clear(folder / name)
    _replace(folder / MARKER, [_README.encode()], flush=True)


def _check_marker(folder: Path) -> None:
    title = ""
    with suppress(OSError, ValueError), _ordinary_file(folder / MARKER) as stream:
        title = stream.read(200).decode(errors="replace").partition("\n")[0]
    if title == f"{_TITLE}{SCHEMA_VERSION}":
        return
    what = f"holds files that are not of a run (it has no {MARKER} that says so)"
    if title.startswith(_TITLE):
        what = f"is of schema {title.removeprefix(_TITLE)}, not {SCHEMA_VERSION}"
    raise ParameterError(f"--resume: '{folder}' {what}; give a new or an empty folder")


def _clear(file: Path) -> None:
    """Delete a temporary file unless a living process holds its lock."""
    with suppress(OSError, ValueError), _ordinary_file(file) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()


def _replace(file: Path, pieces: Iterable[bytes | memoryview], *, flush: bool = False) -> None:
    """Write a file so that all of it appears under its name, or nothing does."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        with _locked(temporary) as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            if flush:
                os.fsync(stream.fileno())
            temporary.replace(file)
    except OSError as error:
        raise ParameterError(
            f"--resume: '{file}' cannot be written: {error.strerror}; make room for it, "
            "or give another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _locked(file: Path) -> Iterator[BinaryIO]:
    """Make a file that `_clear` leaves alone while this process lives."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with os.fdopen(os.open(file, flags, 0o666), "wb") as stream:
            with suppress(OSError):  # a file system without locks: leftovers may stay
                fcntl.flock(stream, fcntl.LOCK_EX)
            if os.fstat(stream.fileno()).st_nlink:
                yield stream
                return
