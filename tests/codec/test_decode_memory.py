"""Decoding takes twice the bytes of a tensor and those of a few segments, no more."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from onnxcomp import codec
from onnxcomp.codec import coders, container, rans
from onnxcomp.codec.coders import CODERS, CoderId, StreamReader, segments
from onnxcomp.codec.container import PackedFile
from onnxcomp.codec.contexts import CLASSES, ContextModel, geometry_of
from onnxcomp.codec.mixing import Layout
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.records import Kind
from onnxcomp.codec.tables import Tables, codes_of
from onnxcomp.codec.transforms import from_planes
from tests.codec.models import model_of

MIB = 2**20
SEGMENTS = 2 * MIB
LZMA_SEGMENTS = 14 * MIB  # of 4 MiB each: in the dictionary, and twice where they are joined
IN_STEP = 32 * MIB  # segments that are decoded in step where there is no numba
LEARNED = 2 * MIB  # what context mixing learns


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that are held while this runs."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def normal(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=count)


def levels(count: int, scale: float = 3.0) -> np.ndarray:
    return np.rint(np.random.default_rng(0).laplace(0, scale, count)) + 0.0  # no -0.0


def smooth(count: int) -> np.ndarray:
    noise = normal(count + 1)
    return np.rint(3 * (noise[1:] + noise[:-1])).reshape(-1, 64, 4, 4)


TENSORS: dict[str, Callable[[], np.ndarray]] = {
    "float32": lambda: normal(2 * MIB).astype(np.float32),
    "float16": lambda: normal(2 * MIB).astype(np.float16),
    "ranks": lambda: levels(4 * MIB).astype(np.float16),
    "escapes": lambda: levels(2 * MIB, 80).astype(np.float32),
    "contexts": lambda: smooth(4 * MIB).astype(np.int8),
    "runs": lambda: np.where(np.arange(2 * MIB) % 900 < 850, 0, levels(2 * MIB)),
    "repeated": lambda: np.tile(normal(2048), 1024).astype(np.float32),
}


@pytest.mark.parametrize(
    ("name", "kind", "coder", "times", "more"),
    [
        ("float32", Kind.PLANES, CoderId.RANS, 2, SEGMENTS),
        ("float16", Kind.PLANES, CoderId.RANS, 2, SEGMENTS),
        ("ranks", Kind.RANKS, CoderId.RANS, 2, SEGMENTS),
        ("escapes", Kind.RANKS, CoderId.RANS, 2, SEGMENTS),
        ("contexts", Kind.RANKS, CoderId.CONTEXTS, 2, SEGMENTS),
        ("runs", Kind.RUNS, CoderId.RANS, 2, SEGMENTS),
        ("repeated", Kind.WHOLE, CoderId.LZMA, 1, LZMA_SEGMENTS),
    ],
)
def test_a_tensor_of_a_file(name, kind, coder, times, more, tmp_path):
    """With numba; one copy of the tensor more would be too much in each case."""
    pytest.importorskip("numba")
    array, path = TENSORS[name](), tmp_path / "model.onnxc"
    codec.pack(model_of({"w": array}), path, "balanced" if name == "contexts" else "fast")
    with PackedFile(path) as file:
        (record,) = file.head.records
    assert record.kind == kind
    assert coder in {part.coder for part in record.parts}
    ((_, found),) = codec.stream(path)  # compiles, too, what is measured next
    assert found.tobytes() == array.tobytes()
    del found
    most = times * array.nbytes + more
    assert most - array.nbytes < peak_of(lambda: next(codec.stream(path))) < most


def test_a_copy_is_noticed(tmp_path, monkeypatch):
    array, path = TENSORS["float16"](), tmp_path / "model.onnxc"
    codec.pack(model_of({"w": array}), path, "fast")
    assert peak_of(lambda: next(codec.stream(path))) < 2 * array.nbytes + IN_STEP
    monkeypatch.setattr(
        container, "from_planes", lambda planes, dtype: from_planes(planes, dtype).copy()
    )
    assert peak_of(lambda: next(codec.stream(path))) > 2 * array.nbytes + SEGMENTS


def reader(coder_id: CoderId, symbols: np.ndarray, tables: Tables) -> StreamReader:
    """A stream of one sequence with the first of the tables, models or layouts."""
    coder = CODERS[coder_id]
    pieces = Pieces(np.array([symbols.size]), np.array([0]))
    spans = segments(pieces, coder)
    parts = [symbols[begin:end] for begin, end in spans]
    data = coder.encode(parts, [pieces.between(*span) for span in spans], tables)
    return StreamReader(coder, pieces, tables, lambda i: bytes(memoryview(data[i])))


def stepped(coder_id: CoderId, count: int) -> tuple[np.ndarray, StreamReader]:
    """Symbols of eight bits each, nearly, and a stream of them."""
    symbols = np.random.default_rng(0).integers(0, 250, count, np.uint8)
    codes = [codes_of(np.bincount(symbols, minlength=256))]
    shape = (count // 1024, 64, 4, 4)
    model = ContextModel((40, 70, 90, 120), (0,) * CLASSES, *geometry_of(shape))
    return symbols, reader(coder_id, symbols, Tables(codes, [model]))


@pytest.mark.parametrize(
    ("coder_id", "size"), [(CoderId.RANS, 10 * MIB), (CoderId.CONTEXTS, 6 * MIB)]
)
def test_segments_in_step(coder_id, size, monkeypatch):
    symbols, stream = stepped(coder_id, size)
    monkeypatch.setattr(rans, "kernels", lambda: None)
    found: list[np.ndarray] = []
    assert peak_of(lambda: found.append(stream.take(size))) < size + IN_STEP
    assert np.array_equal(found[0], symbols)


def test_more_segments_in_step_are_noticed(monkeypatch):
    symbols, stream = stepped(CoderId.RANS, 16 * MIB)
    monkeypatch.setattr(rans, "kernels", lambda: None)
    monkeypatch.setattr(coders, "_TOGETHER", 64 * MIB)
    assert peak_of(lambda: stream.take(symbols.size)) > symbols.size + IN_STEP


@pytest.mark.parametrize(
    ("coder_id", "more"), [(CoderId.RAW, SEGMENTS), (CoderId.LZMA, LZMA_SEGMENTS)]
)
def test_segments_one_by_one(coder_id, more, monkeypatch):
    """Coders that gain nothing from many segments at once take one, without numba too."""
    symbols = np.tile(np.random.default_rng(0).integers(0, 256, 2**16, np.uint8), 2**8)
    stream = reader(coder_id, symbols, Tables([]))
    monkeypatch.setattr(rans, "kernels", lambda: None)
    assert peak_of(lambda: stream.take(symbols.size)) < symbols.size + more


def test_context_mixing():
    pytest.importorskip("numba")
    layout = Layout((512, 64, 16), np.arange(-16, 16).astype(np.float32), 4)
    symbols = (levels(MIB // 2).clip(-16, 15) + 128).astype(np.uint8)
    streams = [reader(CoderId.MIXING, symbols, Tables([], (), [layout])) for _ in range(2)]
    assert np.array_equal(streams[0].take(symbols.size), symbols)
    peak = peak_of(lambda: streams[1].take(symbols.size))
    assert peak < 2 * symbols.size + LEARNED
