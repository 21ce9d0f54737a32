"""What others take for ranks into codebooks: formats, general compressors and DeepCABAC.

All work on `Ranks`, tensors already pruned and shared. Sizes are bytes without codebooks,
which are the same for all; the paper's formats alone hold their own.
"""

from __future__ import annotations

import importlib
import lzma
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import ChildError, SkippedError, run_peer
from onnxcomp.codec.huffman import Huffman
from onnxcomp.codec.paper_formats import FORMATS

Uint8 = npt.NDArray[np.uint8]

CABAC_PYTHON = "NNCODEC_PYTHON"
"""Environment variable that names the Python in which `nncodec` is installed."""
BYTE_CODERS = ("xz -9e", "zstd -19", "brotli -11")
"""Those of `general_coders` that take any file; the others take numbers."""
_GAP = 15  # zeros that one symbol of Deep Compression's format skips


@dataclass(frozen=True)
class Ranks:
    """A tensor of few values.

    Attributes:
        levels: int32, shape of the tensor: rank, counted from the value nearest to zero.
        weights: float32, the tensor.
    """

    levels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, weights: npt.NDArray[np.float32]) -> Ranks:
        """Return a tensor with its levels."""
        values, ranks = np.unique(weights, return_inverse=True)
        zero = int(np.abs(values).argmin())
        return cls((ranks.reshape(weights.shape) - zero).astype(np.int32), weights)

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the values as float32."""
        return 4 * (int(self.levels.max()) - int(self.levels.min()) + 1)


@dataclass(frozen=True)
class Timed:
    """Size and speed of one coder; no seconds where it was not run twice."""

    size: int
    encode_s: float | None = None
    decode_s: float | None = None


def entropy_bytes(tensors: Sequence[Ranks]) -> float:
    """Return the zero-order entropy, each tensor by its own frequencies, without tables."""
    total = 0.0
    for tensor in tensors:
        _, counts = np.unique(tensor.levels, return_counts=True)
        total -= float((counts * np.log2(counts / tensor.levels.size)).sum())
    return total / 8


def paper_bytes(tensors: Sequence[Ranks], name: str) -> int:
    """Return the bytes of one of the paper's formats, codebooks and codes included."""
    matrices = [tensor.weights.reshape(len(tensor.weights), -1).T for tensor in tensors]
    return sum(-(-FORMATS[name](matrix).bits // 8) for matrix in matrices)


def deep_compression_bytes(tensors: Sequence[Ranks]) -> int:
    """Return the bytes of Han et al. (arXiv:1510.00149): Huffman of values and 4-bit gaps.

    Each code is stored as 8 bits of length per symbol; codebooks are not counted.
    """
    bits = 0
    for tensor in tensors:
        flat = tensor.levels.ravel()
        gaps = np.diff(np.flatnonzero(flat), prepend=-1) - 1
        fillers = gaps // (_GAP + 1)
        skipped = np.bincount(gaps % (_GAP + 1), minlength=_GAP + 1)
        skipped[_GAP] += fillers.sum()
        low, high = min(int(flat.min()), 0), max(int(flat.max()), 0)
        values = np.bincount(flat[flat != 0] - low, minlength=high - low + 1)
        values[-low] += fillers.sum()
        for counts in (skipped, values):
            code = Huffman.of(counts)
            bits += int((code.lengths * counts).sum()) + 8 * len(counts)
    return -(-bits // 8)


def as_bytes(tensors: Sequence[Ranks]) -> Uint8:
    """Return all levels one after the other, modulo 256."""
    return np.concatenate([tensor.levels.ravel() for tensor in tensors]).astype(np.uint8)


def general_coders() -> dict[str, tuple[Callable[[Uint8], bytes], Callable[[bytes], Any]]]:
    """Return encoder and decoder of every general compressor that is installed."""
    xz = lzma.PRESET_EXTREME | 9
    found: dict[str, tuple[Callable[[Uint8], bytes], Callable[[bytes], Any]]] = {
        "xz -9e": (lambda data: lzma.compress(data.tobytes(), preset=xz), lzma.decompress)
    }
    for make in (_zstd, _brotli, _pcodec, _openzl):
        try:
            found.update(make())
        except ImportError:
            continue
    return found


def absent() -> list[str]:
    """Return the packages of general compressors that are not installed."""
    return [name for name in ("zstandard", "brotli", "pcodec", "openzl") if not _has(name)]


def timed(
    coder: tuple[Callable[[Uint8], bytes], Callable[[bytes], Any]], data: Uint8
) -> Timed:
    """Encode and decode once."""
    encode, decode = coder
    begin = time.perf_counter()
    coded = encode(data)
    middle = time.perf_counter()
    decode(coded)
    return Timed(len(coded), middle - begin, time.perf_counter() - middle)


def cabac(tensors: Sequence[Ranks], folder: Path) -> Timed | None:
    """Return DeepCABAC by its best settings, or None where no Python for it is named.

    Raises:
        SkippedError: The Python that is named cannot run it.
    """
    python = os.environ.get(CABAC_PYTHON)
    if not python:
        return None
    path = folder / "levels.npz"
    np.savez(path, **{f"t{i}": tensor.levels for i, tensor in enumerate(tensors)})
    try:
        answer = run_peer(python, "storage_cabac.py", str(path))
    except ChildError as error:
        raise SkippedError(f"{CABAC_PYTHON}={python} cannot run DeepCABAC: {error}") from error
    return Timed(answer["bytes"], answer["encode_s"], answer["decode_s"])


def _has(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _zstd() -> dict[str, Any]:
    import zstandard

    writer, reader = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
    return {"zstd -19": (lambda data: writer.compress(data.tobytes()), reader.decompress)}


def _brotli() -> dict[str, Any]:
    import brotli

    def encode(data: Uint8) -> bytes:
        coded: bytes = brotli.compress(data.tobytes(), quality=11)
        return coded

    return {"brotli -11": (encode, brotli.decompress)}


def _pcodec() -> dict[str, Any]:
    from pcodec import ChunkConfig, standalone

    config = ChunkConfig(compression_level=12)

    def encode(data: Uint8) -> bytes:
        coded: bytes = standalone.simple_compress(data.view(np.int8).astype(np.int16), config)
        return coded

    return {"pcodec -12": (encode, standalone.simple_decompress)}


def _openzl() -> dict[str, Any]:
    import openzl.ext as zl

    compressor, writer = zl.Compressor(), zl.CCtx()
    compressor.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
    compressor.select_starting_graph(zl.graphs.Fse().parameterize(compressor))
    writer.ref_compressor(compressor)

    def encode(data: Uint8) -> bytes:
        writer.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        coded: bytes = writer.compress([zl.Input(zl.Type.Numeric, data)])
        return coded

    return {"OpenZL": (encode, lambda coded: zl.DCtx().decompress(coded))}
