import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxcomp.codec.symbols import (
    MAX_VALUES,
    Geometry,
    distinct,
    ranked,
    ranks,
    values_of,
)

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64, np.bool_]


def patterns(count: int, dtype, seed: int = 0) -> np.ndarray:
    """Random bit patterns of a dtype: infinities and NaN of every payload among them."""
    size = np.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, count * size, np.uint8)
    return (data % 2 if dtype is np.bool_ else data).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@given(
    shape=arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5),
    values=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_ranks_give_the_tensor_back(dtype, shape, values, seed):
    rng = np.random.default_rng(seed)
    array = np.asarray(patterns(values, dtype, seed)[rng.integers(0, values, shape)])
    found = ranked(array)
    assert found is not None
    codebook, rank = found
    back = codebook[rank].reshape(array.shape)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()
    meant = values_of(codebook)
    assert meant.dtype == np.float32
    assert np.isfinite(meant).all()
    assert (np.diff(meant) >= 0).all()


def test_signed_zeros_and_payloads_are_told_apart():
    bits = np.array([0, 0x80000000, 0x7FC00001, 0x7FC00002, 0xFF800000], np.uint32)
    codebook = distinct(bits.view(np.float32))
    assert codebook is not None
    assert codebook.view(np.uint32).tolist() == [
        *(0xFF800000, 0x80000000, 0, 0x7FC00001, 0x7FC00002)
    ]
    largest = np.finfo(np.float32).max
    assert values_of(codebook).tolist() == [-largest, 0, 0, largest, largest]


def test_too_many_values_are_refused():
    array = np.arange(MAX_VALUES + 1, dtype=np.float32)
    assert distinct(array) is None
    assert ranked(array) is None
    assert distinct(array[1:]) is not None


def test_values_beyond_the_first_look_are_found():
    array = np.zeros(300_000, np.float32)
    array[-1] = 1
    codebook = distinct(array)
    assert codebook is not None
    assert codebook.tolist() == [0, 1]
    assert ranks(array, codebook).sum() == 1


def test_kernels_stay_contiguous():
    assert Geometry.of((8, 4, 3, 5)) == Geometry(8, 4, 15, 5)
    assert Geometry.of((8, 4)) == Geometry(8, 4, 1)
    assert Geometry.of((7,)) == Geometry(7, 1, 1)
    assert Geometry.of(()) == Geometry(1, 1, 1)
