import numpy as np
import pytest

from onnxcomp.codec import contexts, rans
from onnxcomp.codec.contexts import (
    CLASSES,
    OUTSIDE,
    ContextModel,
    classes_of,
    edges_of,
    geometry_of,
)
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.tables import Tables, codes_of
from onnxcomp.errors import InvalidModelError


def smooth(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Symbols whose neighbours are alike."""
    noise = np.random.default_rng(seed).normal(size=(int(np.prod(shape)) + 1))
    return np.clip(np.rint(128 + 3 * (noise[1:] + noise[:-1])), 110, 146).astype(np.uint8)


def model_of(shape: tuple[int, ...], seed: int) -> ContextModel:
    tables = np.random.default_rng(seed).integers(0, 3, CLASSES)
    return ContextModel((120, 126, 130, 136), tuple(map(int, tables)), *geometry_of(shape))


SHAPES = [(16, 8, 3, 3), (40, 30), (64, 1, 5, 5), (33,), (16, 16, 1, 7), (16, 16, 7, 1)]


def case(length: int):
    """Segments of several tensors, cut anywhere, with tables for them."""
    tensors = [smooth(shape, i) for i, shape in enumerate(SHAPES)]
    symbols = np.concatenate(tensors)
    pieces = Pieces(np.cumsum([t.size for t in tensors]), np.arange(len(SHAPES)))
    codes = [codes_of(np.bincount(t, minlength=256) + np.ones(256, int)) for t in tensors[:3]]
    models = [model_of(shape, i) for i, shape in enumerate(SHAPES)]
    spans = [(b, min(b + length, symbols.size)) for b in range(0, symbols.size, length)]
    parts = [symbols[a:b] for a, b in spans]
    return parts, [pieces.between(*span) for span in spans], Tables(codes, models)


@pytest.mark.parametrize("length", [1, 50, 1000, 2**15])
def test_numba_and_numpy_give_the_same_bytes_and_symbols(length, monkeypatch):
    parts, pieces, tables = case(length)
    parts, pieces = parts[-60:], pieces[-60:]
    data = contexts.encode(parts, pieces, tables)
    if rans.kernels() is not None:
        decoded = contexts.decode(data, pieces, tables)
        assert all(np.array_equal(a, b) for a, b in zip(decoded, parts, strict=True))
    monkeypatch.setattr(rans, "kernels", lambda: None)
    assert contexts.encode(parts, pieces, tables) == data
    decoded = contexts.decode(data, pieces, tables)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, parts, strict=True))


@pytest.mark.parametrize("numba", [True, False])
def test_another_model_does_not_decode(numba, monkeypatch):
    if not numba:
        monkeypatch.setattr(rans, "kernels", lambda: None)
    parts, pieces, tables = case(2**15)
    data = contexts.encode(parts, pieces, tables)
    other = [model_of(shape, 9) for shape in SHAPES]
    with pytest.raises(InvalidModelError, match="lanes"):
        contexts.decode(data, pieces, Tables(tables.codes, other))


def test_classes_are_bins_of_the_neighbours():
    """One lane's view of a 3 x 3 kernel, worked out by hand; four lanes of nine symbols."""
    model = ContextModel((2, 4, 6, 8), (0,) * CLASSES, *geometry_of((4, 1, 3, 3)))
    kernel = np.array([0, 2, 4, 6, 8, 1, 3, 5, 7], np.uint8)
    bins = [0, 1, 2, 3, 4, 0, 1, 2, 3]
    found, numbers = classes_of(
        np.tile(kernel, 4), Pieces(np.array([36]), np.array([0])), [model]
    )
    for place in range(9):
        left = bins[place - 1] if place % 3 else OUTSIDE
        above = bins[place - 3] if place >= 3 else OUTSIDE
        assert found.reshape(4, 9)[:, place].tolist() == [left * 6 + above] * 4
    assert not numbers.any()


def test_edges_part_values_by_their_mean_magnitude():
    values = np.array([-3.0, -1.0, 0.0, 1.0, 3.0])
    edges = edges_of(values, np.ones(5), 126)
    assert edges == (127, 128, 129, 130)
    assert edges_of(values, np.array([1, 0, 1, 0, 1]), 0) == (1, 2, 3, 4)


def test_damage_shows():
    parts, pieces, tables = case(2**15)
    data = contexts.encode(parts, pieces, tables)[0]
    for wrong in (data[:-2], data + b"\0\0", data[:10]):
        with pytest.raises(InvalidModelError, match="lanes"):
            contexts.decode([wrong], pieces[:1], tables)
