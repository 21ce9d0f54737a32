from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxcomp import codec
from onnxcomp.codec import container, rans
from onnxcomp.codec.coders import CoderId
from onnxcomp.codec.container import PackedFile
from onnxcomp.codec.records import Kind
from onnxcomp.errors import InvalidModelError, ParameterError, UnsupportedModelError
from onnxcomp.loading import LoadLimits, load
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from tests.codec.models import every_kind, model_of
from tests.graphs import shared_models

STATIC = ["fast", "balanced"]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int64, np.bool_]


def small_models() -> list:
    """Real models that are packed in no time."""
    found = shared_models()
    return [p for p in found if not isinstance(p, Path) or p.stat().st_size < 600_000]


def round_trip(model: Model, path, profile: str = "balanced") -> Model:
    size = codec.pack(model, path, profile)
    assert path.stat().st_size == size == codec.packed_bytes(model, profile)
    return codec.unpack(path)


@pytest.mark.parametrize("profile", STATIC)
def test_every_way_of_storing_comes_back(profile, tmp_path, monkeypatch):
    model = every_kind()
    path = tmp_path / "model.onnxc"
    assert round_trip(model, path, profile).digest == model.digest
    with PackedFile(path) as file:
        kinds = {record.kind for record in file.head.records}
        coders = {part.coder for record in file.head.records for part in record.parts}
    assert kinds == set(Kind)
    expected = {CoderId.RAW, CoderId.CONSTANT, CoderId.LZMA, CoderId.RANS}
    assert coders == expected | ({CoderId.CONTEXTS} if profile == "balanced" else set())
    written = path.read_bytes()
    monkeypatch.setattr(rans, "kernels", lambda: None)
    assert codec.unpack(path).digest == model.digest
    codec.pack(model, path, profile)
    assert path.read_bytes() == written


@pytest.mark.parametrize("profile", ["fast", "balanced", "max"])
def test_subnormal_values_come_back_where_a_session_flushes_them(profile, tmp_path):
    rng = np.random.default_rng(0)
    kinds = np.array([0, 1, 2, 5, 2**31, 2**31 + 1, 0x3F800000], np.uint32)
    weights = {
        "few": kinds[rng.integers(0, len(kinds), (50, 40))].view(np.float32),
        "many": rng.integers(0, 2**23, (40, 30)).astype(np.uint32).view(np.float32),
    }
    model = model_of(weights)
    Session(model).run({"x": np.ones(1, np.float32)})
    assert not (np.full(1, 1e-40, np.float32) + 0).any()  # NumPy flushes on this thread now
    assert round_trip(model, tmp_path / "model.onnxc", profile).digest == model.digest


@pytest.mark.parametrize("path", small_models(), ids=lambda p: p.name)
def test_real_models_come_back(path, tmp_path):
    model = load(path)
    packed = tmp_path / "model.onnxc"
    unpacked = round_trip(model, packed, "fast")
    assert unpacked.digest == model.digest
    assert list(unpacked.weights) == list(model.weights)
    assert load(packed).digest == model.digest
    assert packed.stat().st_size < 0.9 * model.file_bytes


def test_tensors_of_the_same_bytes_are_stored_once(tmp_path):
    noise = np.random.default_rng(0).normal(size=(80, 80)).astype(np.float32)
    alone, path = model_of({"a": noise}), tmp_path / "model.onnxc"
    copies = {"b": noise.copy(), "c": noise.reshape(-1), "d": noise + 1, "e": noise.copy()}
    model = model_of({"a": noise, **copies})
    other = model_of({"a": noise, "d": noise + 1})
    for profile in STATIC:
        assert round_trip(model, path, profile).digest == model.digest
        assert path.stat().st_size < codec.packed_bytes(other, profile) + 100
        assert path.stat().st_size > 1.5 * codec.packed_bytes(alone, profile)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.name)
def test_never_larger_than_zstd(path, dtype, tmp_path):
    """All weights of a model together; prefix, checksums and lanes are 160 bytes."""
    zstd = pytest.importorskip("zstandard").ZstdCompressor(level=19)
    weights = {}
    for name, array in load(path).weights.items():
        if array.dtype == np.float32 and array.size >= 64:
            scale = np.abs(array).max() / 127 if dtype is np.int8 else 1.0
            weights[name] = (array / (scale or 1.0)).astype(dtype)
    model = model_of(weights)
    plain = len(zstd.compress(model.to_proto().SerializeToString()))
    for profile in STATIC:
        packed = tmp_path / "model.onnxc"
        assert round_trip(model, packed, profile).digest == model.digest
        assert packed.stat().st_size <= plain + 160, profile


@given(
    dtype=st.sampled_from(DTYPES),
    shape=arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    values=st.sampled_from([1, 2, 5, 300, None]),
    profile=st.sampled_from(STATIC),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_any_tensor_comes_back(dtype, shape, values, profile, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    bits = rng.integers(0, 256, (values or count) * np.dtype(dtype).itemsize, np.uint8)
    alphabet = (bits % 2 if dtype is np.bool_ else bits).view(dtype)
    array = alphabet[rng.integers(0, values, count)] if values else alphabet
    model = model_of({"w": array.reshape(shape), "again": array})
    path = tmp_path_factory.mktemp("packed") / "model.onnxc"
    unpacked = round_trip(model, path, profile)
    assert unpacked.digest == model.digest
    assert unpacked.skeleton.SerializeToString() == model.skeleton.SerializeToString()


def test_context_mixing_comes_back_and_is_smallest(tmp_path):
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(64, 64, 3, 4)) * rng.lognormal(size=(64, 1, 1, 1))
    kernels = np.rint(2 * (noise[..., 1:] + noise[..., :-1])).clip(-20, 20) + 0.0
    model = model_of({"w": kernels.astype(np.float32), "again": np.sign(kernels)})
    assert round_trip(model, tmp_path / "model.onnxc", "max").digest == model.digest
    with PackedFile(tmp_path / "model.onnxc") as file:
        parts = [part for record in file.head.records for part in record.parts]
    assert {part.coder for part in parts} == {CoderId.MIXING}
    sizes = [codec.packed_bytes(model, profile) for profile in ("max", "balanced", "fast")]
    assert sizes[0] < 0.99 * sizes[1] < 0.99 * sizes[2]


def test_segments_are_cut_and_joined(tmp_path):
    rng = np.random.default_rng(0)
    weights = np.rint(4 * rng.laplace(size=(700, 500))).astype(np.float32)
    model = model_of({"a": weights, "b": weights[::-1].copy(), "c": np.sign(weights)})
    for profile in STATIC:
        assert round_trip(model, tmp_path / "model.onnxc", profile).digest == model.digest
    with PackedFile(tmp_path / "model.onnxc") as file:
        assert len(file.head.segments) > 3


def test_symbols_have_a_slot_wherever_their_tensor_lies(tmp_path):
    """Lanes that began at kernels when a tensor was alone begin inside them in a stream."""
    rng = np.random.default_rng(0)
    pair = 5 * np.arange(2) + rng.integers(0, 2, (301, 1, 1, 2))
    kernels = 10 * np.arange(9).reshape(3, 3) + rng.integers(0, 4, (640, 1, 3, 3))
    model = model_of({"a": pair.astype(np.float32), "b": kernels.astype(np.float32)})
    assert round_trip(model, tmp_path / "model.onnxc").digest == model.digest
    with PackedFile(tmp_path / "model.onnxc") as file:
        assert len(file.head.tables.models) == 2


def test_equal_codebooks_are_stored_once(tmp_path):
    codebook = np.random.default_rng(0).normal(size=200).astype(np.float32)
    picks = np.random.default_rng(1).integers(0, 200, (6, 2000))
    model = model_of({f"w{i}": codebook[row] for i, row in enumerate(picks)})
    codec.pack(model, tmp_path / "model.onnxc")
    with PackedFile(tmp_path / "model.onnxc") as file:
        assert len(file.head.codebooks) == 1


def test_packing_is_deterministic(tmp_path):
    model = every_kind()
    for name in ("a", "b"):
        codec.pack(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("profile", STATIC)
def test_a_large_tensor_takes_its_entropy(profile, tmp_path):
    draws = np.random.default_rng(0).laplace(0, 3, (1000, 1000))
    levels = np.clip(np.rint(draws), -16, 15) + 0.0  # without -0.0, a value of its own
    _, counts = np.unique(levels, return_counts=True)
    bits = -(counts * np.log2(counts / levels.size)).sum()
    size = codec.pack(
        model_of({"w": (0.01 * levels).astype(np.float32)}), tmp_path / "w", profile
    )
    rest = codec.pack(
        model_of({"w": np.zeros((1000, 1000), np.float32)}), tmp_path / "r", profile
    )
    assert 8 * (size - rest) <= 1.006 * bits
    assert 8 * (size - rest) >= bits


def test_limits_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.onnxc"
    codec.pack(model_of({"w": np.zeros(2**20, np.float32)}), path)
    assert codec.unpack(path).weights["w"].shape == (2**20,)
    monkeypatch.setattr(container, "_FREE_EXPANSION", 2**16)
    with pytest.raises(InvalidModelError, match="decodes to 4194304 bytes; at most"):
        codec.unpack(path)
    codec.pack(every_kind(), path)
    with pytest.raises(InvalidModelError, match="at most 1000 are allowed"):
        codec.unpack(path, limits=LoadLimits(total_bytes=1000))
    with pytest.raises(InvalidModelError, match="elements"):
        codec.unpack(path, limits=LoadLimits(elements=100))


def test_a_file_that_would_be_refused_is_not_written(tmp_path, monkeypatch):
    """Both limits of the format that any model can break, at a smaller size."""
    path, model = tmp_path / "model.onnxc", model_of({"w": np.zeros(2**20, np.float32)})
    with monkeypatch.context() as patch:
        patch.setattr(container, "_FREE_EXPANSION", 2**16)
        with pytest.raises(UnsupportedModelError, match="4194304 bytes of weights"):
            codec.pack(model, path)
        assert codec.packed_bytes(model) < 2**16  # what is only measured is not refused
    with monkeypatch.context() as patch:
        patch.setattr(container, "_MAX_HEAD_BYTES", 100)
        with pytest.raises(UnsupportedModelError, match="Constant nodes"):
            codec.pack(model, path)
    assert not path.exists()
    codec.pack(model, path)
    assert codec.unpack(path).digest == model.digest


def test_constant_tensors_and_huge_outputs_are_not_mixed(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(64, 64, 3, 4))
    kernels = np.rint(2 * (noise[..., 1:] + noise[..., :-1])).astype(np.float32)
    arrays = {"w": kernels, "wide": -kernels.reshape(1, -1), "same": np.ones((64, 64), "f4")}
    monkeypatch.setattr("onnxcomp.codec.planning.MOST_INPUTS", 64 * 9)
    model = model_of(arrays)
    assert round_trip(model, tmp_path / "model.onnxc", "max").digest == model.digest
    with PackedFile(tmp_path / "model.onnxc") as file:
        coders = [record.parts[0].coder for record in file.head.records]
    assert coders == [CoderId.MIXING, CoderId.CONTEXTS, CoderId.CONSTANT]


def test_inputs_and_profiles_are_checked(tmp_path):
    path = tmp_path / "model.onnxc"
    codec.pack(every_kind(), path)
    with pytest.raises(ParameterError, match="never overwritten"):
        codec.pack(codec.unpack(path), path)
    with pytest.raises(ParameterError, match="'profile' must be one of"):
        codec.pack(every_kind(), tmp_path / "other", "smallest")
