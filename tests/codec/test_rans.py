import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.codec import rans
from onnxcomp.codec.coders import CODERS, CoderId, segments
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.tables import Tables, cluster, codes_of, cost, entropy_bits, frequencies
from onnxcomp.errors import InvalidModelError

SEGMENT = CODERS[CoderId.RANS].segment


def laplacian(count: int, scale: float, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).laplace(0, scale, count)
    return np.clip(np.rint(draws) + 128, 0, 255).astype(np.uint8)


def coded(symbols: np.ndarray, pieces: Pieces, tables: Tables, length: int = SEGMENT):
    spans = [(b, min(b + length, symbols.size)) for b in range(0, symbols.size, length)]
    parts = [pieces.between(*span) for span in spans]
    data = rans.encode([symbols[a:b] for a, b in spans], parts, tables)
    return data, parts


def without_numba(monkeypatch):
    monkeypatch.setattr(rans, "kernels", lambda: None)


def tables_of(*sequences: np.ndarray) -> Tables:
    return Tables([codes_of(np.bincount(part, minlength=256)) for part in sequences])


def test_numba_and_numpy_give_the_same_bytes_and_symbols(monkeypatch):
    pytest.importorskip("numba")
    one, two = laplacian(90_000, 3), laplacian(50_001, 20, seed=1)
    symbols = np.concatenate([one, two, one[:777]])
    ends = np.cumsum([one.size, two.size, 777])
    pieces, tables = Pieces(ends, np.array([0, 1, 0])), tables_of(one, two)
    fast, parts = coded(symbols, pieces, tables, 2**16)
    decoded = rans.decode(fast, parts, tables)
    without_numba(monkeypatch)
    slow, _ = coded(symbols, pieces, tables, 2**16)
    assert slow == fast
    assert np.array_equal(np.concatenate(decoded), symbols)
    assert np.array_equal(np.concatenate(rans.decode(fast, parts, tables)), symbols)


@pytest.mark.parametrize("numba", [True, False])
@given(
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    scale=st.sampled_from([0.2, 2.0, 60.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_pieces_of_any_length_come_back(numba, counts, scale, seed):
    with pytest.MonkeyPatch.context() as patch:
        if not numba:
            without_numba(patch)
        symbols = laplacian(sum(counts), scale, seed)
        pieces = Pieces(np.cumsum(counts), np.zeros(len(counts), np.int64))
        data, parts = coded(symbols, pieces, tables_of(symbols), 100)
        assert np.array_equal(
            np.concatenate(rans.decode(data, parts, tables_of(symbols))), symbols
        )


@pytest.mark.parametrize(("scale", "levels"), [(0.7, 8), (3.0, 16), (12.0, 64), (40.0, 128)])
def test_a_million_weights_take_their_entropy(scale, levels):
    symbols = np.clip(laplacian(10**6, scale), 128 - levels, 127 + levels)
    counts = np.bincount(symbols, minlength=256)
    pieces = Pieces(np.array([symbols.size]), np.array([0]))
    data, _ = coded(symbols, pieces, tables_of(symbols))
    assert 8 * sum(map(len, data)) <= 1.006 * entropy_bits(counts)
    wrong = tables_of(laplacian(10**6, 2 * scale))
    if not (wrong.codes[0][counts > 0] == 0).any():
        assert 8 * sum(
            len(d) for d in coded(symbols, pieces, wrong)[0]
        ) > 1.006 * entropy_bits(counts)


@pytest.mark.parametrize("numba", [True, False])
def test_damage_shows_in_the_lanes(numba, monkeypatch):
    """Two symbols of the same frequency can change places unseen: the CRC is for those."""
    if not numba:
        without_numba(monkeypatch)
    symbols = laplacian(200, 2)
    tables, pieces = tables_of(symbols), Pieces(np.array([200]), np.array([0]))
    (data,), parts = coded(symbols, pieces, tables)
    seen = unseen = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            unseen += not np.array_equal(rans.decode([damaged], parts, tables)[0], symbols)
        except InvalidModelError:
            seen += 1
    assert seen + unseen == 8 * len(data)
    assert unseen <= 0.01 * seen
    for wrong in (data[:-2], data + b"\0\0", data[:10], data + b"\0"):
        with pytest.raises(InvalidModelError, match="lanes"):
            rans.decode([wrong], parts, tables)


@given(st.lists(st.integers(0, 10**9), min_size=256, max_size=256).filter(any))
def test_frequencies_sum_up_and_leave_none_out(counts):
    codes = codes_of(np.array(counts))
    found = frequencies(codes)
    assert found.sum() == 4096
    assert found.max() < 4096
    assert (found[np.array(counts) > 0] > 0).all()


def test_alike_sequences_share_a_table_and_others_do_not():
    alike = [np.bincount(laplacian(3000, 2, seed), minlength=256) for seed in range(5)]
    other = np.bincount(laplacian(3000, 30), minlength=256)
    numbers, codes = cluster([*alike, other], [0] * 6, [False] * 6)
    assert len(set(numbers[:5])) == 1
    assert numbers[5] != numbers[0]
    assert len(codes) == 2
    assert cost(other, codes[numbers[5]]) < 1.01 * entropy_bits(other)


def test_noise_stays_raw_unless_it_needs_a_table():
    noise = np.bincount(np.random.default_rng(0).integers(0, 256, 600), minlength=256)
    assert cluster([noise], [0], [False]) == ([-1], [])
    numbers, codes = cluster([noise], [0], [True])
    assert (numbers, len(codes)) == ([0], 1)


def test_segments_cover_a_stream():
    pieces = Pieces(np.array([5, 2 * SEGMENT + 1]), np.zeros(2, np.int64))
    spans = segments(pieces, CODERS[CoderId.RANS])
    assert spans == [(0, SEGMENT), (SEGMENT, 2 * SEGMENT), (2 * SEGMENT, 2 * SEGMENT + 1)]
    assert segments(Pieces(np.array([]), np.array([])), CODERS[CoderId.RANS]) == []


def test_segments_of_mixing_hold_whole_tensors():
    million = 2**20
    ends = np.cumsum([million, 6 * million, million, 3 * million, million])
    spans = segments(Pieces(ends, np.arange(5)), CODERS[CoderId.MIXING])
    assert [end // million for _, end in spans] == [7, 11, 12]
