"""HAM, sHAM and their company: the paper's example, round trips, bounds, and the products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.codec import huffman, paper_formats
from onnxcomp.codec.huffman import Huffman, Stream
from onnxcomp.codec.paper_formats import (
    FORMATS,
    Csc,
    Ham,
    Sham,
    csc_share,
    ham_bound,
    index_map_share,
    sham_bound,
)
from onnxcomp.errors import DataError
from onnxcomp.numerics.pruning import kept_above, prune_smallest

every_format = pytest.mark.parametrize("name", FORMATS)


def example() -> np.ndarray:
    """The 5 x 5 matrix of the paper."""
    W = np.zeros((5, 5), np.float32)
    places = [(0, 0, 1), (2, 0, 2), (1, 1, 10), (2, 1, 3), (0, 2, 4), (2, 4, 5), (4, 4, 6)]
    for row, column, value in places:
        W[row, column] = value
    return W


def few(n: int, m: int, k: int, zeros: float, seed: int = 0) -> np.ndarray:
    """A matrix of at most k values besides zero."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=k)[rng.integers(k, size=(n, m))]
    return np.where(rng.random((n, m)) < zeros, 0, W).astype(np.float32)


CASES = {
    "example": example(),
    "one value": np.full((4, 3), 2.5, np.float32),
    "two values": few(7, 5, 2, 0.0),
    "all distinct": np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32),
    "all zero": np.zeros((6, 4), np.float32),
    "minus zero": np.array([[0.0, -0.0], [1.0, np.nan], [np.inf, 0.0]], np.float32),
    "one row": few(1, 40, 5, 0.5),
    "one column": few(40, 1, 5, 0.5),
    "long gaps": np.eye(1, 2000, 1999, dtype=np.float32).reshape(1000, 2),
    "many values": few(50, 60, 1000, 0.3),
    "empty": np.zeros((0, 3), np.float32),
}


def test_arrays_of_the_papers_example():
    csc = Csc.encode(example())
    assert csc.values.tolist() == [1, 2, 10, 3, 4, 5, 6]
    assert (csc.rows + 1).tolist() == [1, 3, 2, 3, 1, 3, 5]
    assert (csc.starts + 1).tolist() == [1, 3, 5, 6, 6, 8]
    ham = Ham.encode(example())
    symbols = ham.code.decode(ham.stream, 25)
    assert ham.values[symbols].tolist() == example().T.reshape(-1).tolist()


@every_format
@pytest.mark.parametrize("case", CASES)
def test_round_trip(name, case):
    W = CASES[case]
    if not W.size and name != "csc":
        W = W.reshape(0, 3)
    found = FORMATS[name](W).decode()
    assert found.shape == W.shape
    assert np.array_equal(found.view(np.uint32), W.view(np.uint32))


@every_format
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    k=st.integers(1, 1000),
    zeros=st.floats(0, 1, allow_subnormal=False),
    seed=st.integers(0, 10**6),
)
def test_round_trip_and_product_of_any(name, n, m, k, zeros, seed):
    W = few(n, m, k, zeros, seed)
    stored = FORMATS[name](W)
    assert np.array_equal(stored.decode().view(np.uint32), W.view(np.uint32))
    x = np.random.default_rng(seed).normal(size=(3, n)).astype(np.float32)
    wanted = x.astype(np.float64) @ W
    assert np.allclose(stored.dot(x), wanted, rtol=1e-5, atol=1e-5)


@every_format
def test_product_in_blocks_of_columns(name, monkeypatch):
    """And a weight too many shows."""
    monkeypatch.setattr(paper_formats, "_DOT_COLUMNS", 7)
    monkeypatch.setattr(huffman, "_CHUNK", 32)
    W = few(30, 50, 16, 0.8)
    x = np.random.default_rng(0).normal(size=(8, 30)).astype(np.float32)
    wanted, found = x.astype(np.float64) @ W, FORMATS[name](W).dot(x)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
    W[3, 49] += 1
    assert np.linalg.norm(FORMATS[name](W).dot(x) - wanted) > 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("k", [2, 32, 200])
def test_sizes_keep_the_bounds(k, zeros):
    n, m = 128, 96
    W = few(n, m, k, zeros)
    dense = 32 * n * m
    q, values = np.count_nonzero(W), len(np.unique(W))
    assert Ham.encode(W).bits <= ham_bound(n, m, values) * dense
    assert Sham.encode(W).bits <= sham_bound(n, m, values, q / W.size) * dense
    assert Csc.encode(W).bits == pytest.approx(csc_share(n, m, q) * dense)
    found = FORMATS["im"](W).bits
    assert found == pytest.approx(index_map_share(n, m, values) * dense)


def test_the_printed_bound_of_sham_is_too_small():
    """It counts n row indices where there are as many as non-zeros."""
    n, m, k = 128, 96, 32
    W = few(n, m, k, 0.6)
    s = np.count_nonzero(W) / W.size
    printed = s * (1 + np.log2(k)) / 32 + 6 * k / (n * m) + (n + m + 1) / (n * m)
    assert Sham.encode(W).bits > printed * 32 * n * m


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=300))
def test_code_lengths_are_within_a_bit_of_the_entropy(counts):
    counts = np.array(counts)
    if np.count_nonzero(counts) < 2:
        return
    code = Huffman.of(counts)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-shares @ np.log2(shares))
    mean = float(counts @ code.lengths / counts.sum())
    assert entropy - 1e-9 <= mean < entropy + 1
    assert sum(0.5**length for length in code.lengths[counts > 0]) == 1.0


def test_a_stream_that_ends_early_is_refused():
    code = Huffman.of(np.array([3, 1]))
    stream = code.encode(np.array([0, 1] * 100))
    with pytest.raises(DataError, match="ends after"):
        code.decode(Stream(stream.words[:2]), 200)


TABLE = {  # share of non-zeros: gap-coded, HAM, sHAM with 16-bit rows; bits per weight
    0.40: (2.98, 2.98, 8.41),
    0.10: (0.97, 1.50, 2.13),
    0.01: (0.131, 1.05, 0.24),
}


@pytest.mark.parametrize("nonzeros", TABLE)
def test_measured_table_of_the_specification(nonzeros):
    """Laplacian 512 x 1024, 32 values of equal share: within 2 %, without codes' tables."""
    W = np.random.default_rng(0).laplace(size=(512, 1024))
    W = prune_smallest(W, kept_above(W, [100 * (1 - nonzeros)])[0]).astype(np.float32)
    left = W != 0
    ends = np.quantile(W[left], np.linspace(0, 1, 33)[1:-1])
    W[left] = 1 + np.searchsorted(ends, W[left])
    ham, sham, gap = Ham.encode(W), Sham.encode(W), Sham.encode_gaps(W)
    streams = (
        gap.ham.stream.bits + gap.places.stream.bits,
        ham.stream.bits,
        sham.ham.stream.bits + sham.places.bits,
    )
    for found, wanted in zip(streams, TABLE[nonzeros], strict=True):
        assert found / W.size == pytest.approx(wanted, rel=0.02)
