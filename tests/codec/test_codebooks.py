import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxcomp.codec.codebooks import read_codebook, write_codebook
from onnxcomp.codec.fields import FieldReader, FieldWriter
from onnxcomp.codec.symbols import distinct
from onnxcomp.errors import InvalidModelError


def written(codebook: np.ndarray) -> bytes:
    fields = FieldWriter()
    write_codebook(codebook, fields)
    return bytes(fields.data)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int8, np.int64])
@given(
    scale=st.floats(1e-3, 1e3),
    levels=st.lists(st.integers(-50, 50), min_size=3, max_size=60, unique=True),
)
@example(scale=1.0, levels=[0, 9, 18, 27, 36, -10])  # whose least gap is nine steps
def test_grids_come_back_in_few_bytes(dtype, scale, levels):
    scale = 3.0 if np.dtype(dtype).kind == "i" else scale
    grid = (scale * np.sort(levels)).astype(dtype)
    codebook = distinct(grid)
    assert codebook is not None
    data = written(codebook)
    fields = FieldReader(data)
    found = read_codebook(fields, codebook.dtype, codebook.nbytes)
    assert found.tobytes() == codebook.tobytes()
    fields.end()
    if dtype is np.float32:
        assert len(data) <= 13 + 2 * codebook.size < 4 * codebook.size + 13


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_]
)
@given(count=st.integers(1, 50), seed=st.integers(0, 999))
def test_any_values_come_back(dtype, count, seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, count * np.dtype(dtype).itemsize, np.uint8)
    codebook = distinct((bits % 2 if dtype is np.bool_ else bits).view(dtype))
    assert codebook is not None
    fields = FieldReader(written(codebook))
    found = read_codebook(fields, codebook.dtype, codebook.nbytes)
    assert found.tobytes() == codebook.tobytes()
    fields.end()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\x02\x00\x01",
        b"\x03\x02",
        b"\x02\x01" + np.float64("nan").tobytes() + b"\0\0",
    ],
    ids=["nothing", "empty", "short", "kind", "scale"],
)
def test_damage_is_refused(data):
    with pytest.raises(InvalidModelError):
        read_codebook(FieldReader(data), np.dtype(np.float32), 2**20)
