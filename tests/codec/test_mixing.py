"""The context-mixing coder: bit exact with plain integers, refuses damage, gains."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.codec import mixing, mixing_model, mixing_tables
from onnxcomp.codec.mixing import Layout
from onnxcomp.codec.symbols import Symbols
from onnxcomp.errors import InvalidModelError, ParameterError

FILES = ("jit", "mixing_tables", "mixing_bits", "mixing_context", "mixing_model")


def symbols_of(weights, levels: int, *, row: int = 1) -> Symbols:
    """Weights on a uniform grid of so many levels, zero among them."""
    step = 2 * np.abs(weights).max() / (levels - 1)
    values, indices = np.unique(np.rint(weights / step) * step, return_inverse=True)
    return Symbols(
        indices.reshape(weights.shape).astype(np.int32), values.astype(np.float32), row
    )


def smooth_kernels(outputs: int, inputs: int, rng) -> np.ndarray:
    """3 x 3 kernels whose neighbours are alike, of rows of unlike magnitude."""
    rough = rng.normal(size=(outputs, inputs, 5, 5))
    smooth = sum(rough[..., y : y + 3, x : x + 3] for y in range(3) for x in range(3))
    scales = np.exp(rng.normal(size=(outputs, 1, 1)))
    return scales * smooth.reshape(outputs, inputs, 9)


def layouts_of(symbols):
    return [Layout(each.indices.shape, each.values, each.row) for each in symbols]


def entropy_bytes(symbols: Symbols) -> float:
    counts = np.bincount(symbols.indices.ravel())
    shares = counts[counts > 0] / symbols.indices.size
    return float(-(shares * np.log2(shares)).sum() * symbols.indices.size / 8)


def assert_comes_back(symbols) -> bytes:
    data = mixing.encode(symbols)
    found = mixing.decode(data, layouts_of(symbols))
    assert len(found) == len(symbols)
    for indices, each in zip(found, symbols, strict=True):
        assert indices.dtype == np.int32
        np.testing.assert_array_equal(indices, each.indices)
    return data


@pytest.fixture(scope="module")
def plain():
    """`mixing_model` with every function as it is written, and with integers of 64 bits."""
    names = [f"onnxcomp.codec.{name}" for name in FILES]
    package = sys.modules["onnxcomp.codec"]
    with pytest.MonkeyPatch.context() as patch:
        stub = SimpleNamespace(njit=lambda **_: lambda function: function)
        patch.setitem(sys.modules, "numba", stub)
        for file, name in zip(FILES, names, strict=True):
            patch.setattr(package, file, getattr(package, file))
            patch.delitem(sys.modules, name)
        module = importlib.import_module(names[-1])
    assert module is not mixing_model
    assert not hasattr(module.code_tensor, "py_func")

    def code_stream(parts, data, *, decoding):
        return module.code_stream(parts, data, decoding=decoding, dtype=np.int64)

    return SimpleNamespace(code_stream=code_stream, most_bytes=module.most_bytes)


def cases() -> dict[str, list[Symbols]]:
    rng = np.random.default_rng(0)
    kernels = smooth_kernels(6, 5, rng)
    sparse = np.where(np.abs(kernels) > 2.5 * np.abs(kernels).mean(), kernels, 0)
    matrix = rng.laplace(size=(9, 30, 1))
    far = Symbols(
        rng.integers(0, 5, (4, 6, 9)).astype(np.int32),
        np.array([-3e38, -1e-30, 1e-42, 1.0, 3e38], np.float32),
        3,
    )
    same = Symbols(np.zeros((3, 4, 9), np.int32), np.array([0.5], np.float32), 3)
    positive = Symbols(
        rng.integers(0, 7, (5, 6, 5)).astype(np.int32),
        np.arange(1, 8, dtype=np.float32),
        5,
    )
    signs = Symbols(
        rng.integers(0, 2, (4, 8, 1)).astype(np.int32), np.array([-1, 1], np.float32)
    )
    return {
        "kernels": [symbols_of(kernels, 32, row=3), symbols_of(-kernels[:2], 16, row=3)],
        "sparse": [symbols_of(sparse, 255, row=3)],
        "depthwise": [symbols_of(kernels.reshape(30, 1, 9), 64, row=3)],
        "matrix": [symbols_of(matrix, 4096)],
        "odd": [same, far, positive, signs],
    }


@pytest.mark.parametrize("name", cases())
def test_compiled_equals_plain(name, plain, monkeypatch):
    symbols = cases()[name]
    data = assert_comes_back(symbols)
    monkeypatch.setattr(mixing, "_kernels", lambda: plain)
    assert mixing.encode(symbols) == data
    assert_comes_back(symbols)


@st.composite
def any_symbols(draw):
    shape = draw(
        st.tuples(st.integers(0, 4), st.integers(0, 5), st.sampled_from([0, 1, 3, 9]))
    )
    finite = st.floats(-1e9, 1e9, width=32, allow_subnormal=False)
    values = np.array(sorted(draw(st.lists(finite, min_size=1, max_size=40))), np.float32)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    indices = rng.integers(0, values.size, shape).astype(np.int32)
    return Symbols(indices, values, draw(st.sampled_from([1, 3])))


@given(st.lists(any_symbols(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_all_symbols_come_back(symbols):
    assert_comes_back(symbols)


def test_weights_are_cut_into_streams(monkeypatch):
    rng = np.random.default_rng(1)
    symbols = [symbols_of(smooth_kernels(n, 8, rng), 32, row=3) for n in (2, 40, 3)]
    whole = assert_comes_back(symbols)
    monkeypatch.setattr(mixing, "_STREAM", 1000)
    streams = list(mixing._streams(layouts_of(symbols)))
    assert all(sum(p.weights for p in pieces) < 2000 for pieces in streams)
    cut = assert_comes_back(symbols)
    assert len(streams) == 3
    assert len(whole) + 2 * 4 < len(cut) < 1.5 * len(whole)


def test_bytes_too_few_or_too_many_are_refused():
    symbols = cases()["kernels"]
    layouts = layouts_of(symbols)
    data = mixing.encode(symbols)
    for length in (0, 1, 2, 3, len(data) // 2, len(data) - 8):
        with pytest.raises(InvalidModelError):
            mixing.decode(data[:length], layouts)
    for more in (b"\0", b"x", data):
        with pytest.raises(InvalidModelError):
            mixing.decode(data + more, layouts)
    with pytest.raises(InvalidModelError):
        mixing.decode(b"x", [])


@given(st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_ranks_or_are_refused(seed):
    rng = np.random.default_rng(seed)
    symbols = cases()[list(cases())[seed % 5]]
    layouts = layouts_of(symbols)
    data = bytearray(mixing.encode(symbols))
    for place in rng.integers(0, len(data), rng.integers(1, 5)):
        data[place] = rng.integers(256)
    try:
        found = mixing.decode(bytes(data), layouts)
    except InvalidModelError:
        return
    for indices, layout in zip(found, layouts, strict=True):
        assert indices.shape == layout.shape
        assert 0 <= indices.min() <= indices.max() < layout.values.size


def test_correlated_kernels_take_less_than_their_entropy():
    """Gains at least 25 % from neighbours and rows, and nothing where they are shuffled."""
    rng = np.random.default_rng(2)
    weights = smooth_kernels(48, 32, rng)
    symbols = symbols_of(weights, 32, row=3)
    assert len(mixing.encode([symbols])) < 0.75 * entropy_bytes(symbols)
    mixed = rng.permutation(symbols.indices.ravel()).reshape(symbols.indices.shape)
    shuffled = Symbols(mixed, symbols.values, 3)
    assert len(mixing.encode([shuffled])) > 0.99 * entropy_bytes(shuffled)


@pytest.mark.parametrize("levels", [16, 256])
def test_independent_weights_take_little_more_than_their_entropy(levels):
    """At most 2 % for learning 150,000 weights that have no pattern."""
    weights = np.random.default_rng(3).laplace(size=(150, 1000, 1))
    symbols = symbols_of(weights, levels)
    assert len(mixing.encode([symbols])) < 1.02 * entropy_bytes(symbols)


@pytest.mark.parametrize("table", ["logistic_curve", "octaves", "powers"])
def test_tables_are_the_same_on_every_machine(table):
    """No formula is nearer to a rounding edge than 50 times the errors of doubles."""
    values = getattr(mixing_tables, table)()
    inexact = values[values != np.rint(values)]
    to_edge = np.abs(inexact - np.floor(inexact) - 0.5)
    assert inexact.size > 200
    assert (to_edge > 50 * np.spacing(inexact)).all()


def test_without_numba_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxcomp.codec.mixing_model", None)
    mixing._kernels.cache_clear()
    with pytest.raises(ParameterError, match=r"onnxcomp\[fast\]"):
        mixing.encode(cases()["kernels"])
    mixing._kernels.cache_clear()
