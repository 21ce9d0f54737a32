"""The storage benchmark: sets are what they say, peers' sizes are right, goals can fail."""

import sys

import numpy as np
import pytest

import onnxcomp
from benchmarks import storage, storage_peers
from benchmarks.common import SkippedError, model_path
from benchmarks.storage_peers import Ranks
from onnxcomp.codec.huffman import Huffman

SMALL = "mlperftiny_kws_dscnn"


def sparse(rng, share: float, shape=(6, 50)) -> Ranks:
    values = rng.integers(-3, 4, shape) * (rng.random(shape) < share)
    return Ranks.of(values.astype(np.float32) / 4)


@pytest.mark.parametrize(("quantizer", "levels", "zeros"), storage.SETTINGS)
def test_sets_are_what_they_say(quantizer, levels, zeros, shared):
    model = onnxcomp.load(model_path(SMALL))
    weights = storage.shared_weights(model, quantizer, levels, zeros)
    assert all(np.unique(array).size <= levels for array in weights.values())
    zero = np.concatenate([array.ravel() == 0 for array in weights.values()])
    if zeros:
        assert zero.mean() >= zeros / 100 - 1e-3
        assert zero.mean() <= zeros / 100 + (1e-3 if quantizer == "cws" else 1)


def test_sizes_of_a_network(shared, tmp_path, monkeypatch):
    monkeypatch.delenv(storage_peers.CABAC_PYTHON, raising=False)
    model = onnxcomp.load(model_path(SMALL))
    row = {"network": SMALL, **storage._sizes(model, ("uq", 16, 95), tmp_path)}
    ranks, files = row["ranks"], row["files"]
    assert ranks["DeepCABAC"] is None
    assert files["DeepCABAC"] is None
    coded = {name: size for name, size in ranks.items() if size and name != "entropy"}
    assert min(coded, key=lambda name: coded[name]) == "max"
    assert files["max"] <= files["balanced"] <= files["fast"] < files["float"] / 4
    assert ranks["fast"] < files["fast"]
    assert row["large"] == []
    monkeypatch.setattr(storage, "LARGE_TENSOR", 2000)
    sparse_row = storage._sizes(model, ("uq", 16, 95), tmp_path)
    assert sparse_row["large"]
    assert all(entropy > 0 for _, entropy in sparse_row["large"])  # all zeros are left out
    for table in (storage._ranks_table([row]), storage._files_table([row])):
        assert all(len(line) == len(table.columns) for line in table.rows)


def test_large_tensors_come_near_their_entropy():
    """Also the companion: a tensor of a few hundred weights pays for its table."""
    rng = np.random.default_rng(3)
    for shape, near in (((400, 400), True), ((4, 90), False)):
        levels = np.rint(rng.laplace(size=shape) * 2).astype(np.int32)
        tensor = Ranks.of(levels.astype(np.float32))  # no negative zero
        size = storage.coded_bytes([tensor], storage.PROFILES[0])
        ratio = size / storage_peers.entropy_bytes([tensor])
        assert (1 <= ratio <= storage.NEAR_ENTROPY) == near


def test_goals_are_missed_where_the_peer_is_smaller():
    files = {"HAM": 10.0, "sHAM": 9.0, "fast": 9.5, "balanced": 8.0, "max": 7.0}
    ranks = {"max": 101.0, "DeepCABAC": 100.0}
    large = [(102, 100.0), (101, 100.0)]
    row = {"network": storage.MODELS[0], "ranks": ranks, "files": files, "large": large}
    notes = storage._goals([row])
    assert "smaller in 0 of 1, mean 1.0 %" in notes[0]
    assert "fast: file under HAM's and sHAM's in 0 of 1" in notes
    assert "max: file under HAM's and sHAM's in 1 of 1" in notes
    assert "in 1 of 2 tensors" in notes[-1]


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_deep_compression_is_the_length_of_its_two_streams(share):
    """The size is that of the streams written out: 15 zeros at most, then an entry."""
    tensor = sparse(np.random.default_rng(0), share)
    entries, skipped = [], 0
    for level in tensor.levels.ravel():
        if level == 0 and skipped < 15:
            skipped += 1
        else:
            entries.append((skipped, int(level)))
            skipped = 0
    while entries and entries[-1][1] == 0:
        entries.pop()  # nothing comes behind it
    lowest = int(tensor.levels.min())
    bits = 0
    for symbols, size in (
        ([gap for gap, _ in entries], 16),
        ([level - lowest for _, level in entries], int(tensor.levels.max()) - lowest + 1),
    ):
        counts = np.bincount(symbols, minlength=size)
        bits += int((Huffman.of(counts).lengths * counts).sum()) + 8 * size
    assert storage_peers.deep_compression_bytes([tensor]) == -(-bits // 8)


@pytest.mark.parametrize("sign", [-1, 1])
def test_deep_compression_takes_levels_of_one_sign(sign):
    weights = np.zeros((1, 40), np.float32)
    weights[0, 30] = sign
    tensor = Ranks.of(weights)
    lengths, bits = 8 * (16 + 2), 4  # two entries of a bit in each of the two streams
    assert storage_peers.deep_compression_bytes([tensor]) == -(-(lengths + bits) // 8)


def test_levels_count_from_the_value_nearest_zero():
    tensor = Ranks.of(np.array([[-2.0, 0.5], [3.0, -2.0]], np.float32))
    np.testing.assert_array_equal(tensor.levels, [[-1, 0], [1, -1]])
    assert tensor.codebook_bytes == 12
    assert storage_peers.entropy_bytes([tensor]) == pytest.approx(1.5 * 4 / 8)


def test_general_coders_give_back_what_they_took():
    data = storage_peers.as_bytes([sparse(np.random.default_rng(1), 0.5)])
    coders = storage_peers.general_coders()
    assert "xz -9e" in coders
    for name, (encode, decode) in coders.items():
        coded = encode(data)
        assert 0 < len(coded) < data.size
        if isinstance(found := decode(coded), bytes):
            assert found == data.tobytes(), name


def test_a_python_without_the_peer_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv(storage_peers.CABAC_PYTHON, sys.executable)
    with pytest.raises(SkippedError, match=storage_peers.CABAC_PYTHON):
        storage_peers.cabac([sparse(np.random.default_rng(2), 0.5)], tmp_path)
