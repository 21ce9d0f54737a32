"""Light copies: originals first, same dtype and range, and only of what looks like images."""

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.augmentation import augmented
from onnxcomp.errors import ParameterError
from onnxcomp.samples import Samples

FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Spec:
    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any] = FLOAT32


def shape_of(channels: int, height: int, width: int, last: bool) -> tuple[int, int, int]:
    return (height, width, channels) if last else (channels, height, width)


def images(count: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    array = np.random.default_rng(0).random((count, *shape))
    return (array * 200 + 20).astype(dtype)


def grown(array: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    inputs = (Spec("x", ("N", *array.shape[1:]), array.dtype),)
    samples, note = augmented(Samples({"x": array}), inputs, count, seed=seed)
    assert note == f"{len(array)} samples and {count - len(array)} light copies of them"
    return samples.arrays["x"]


@given(
    known=st.integers(1, 6),
    count=st.integers(7, 20),
    channels=st.sampled_from([1, 3, 4]),
    height=st.integers(16, 30),
    width=st.integers(16, 30),
    last=st.booleans(),
    dtype=st.sampled_from([np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_copies_follow_the_originals_in_shape_dtype_and_range(
    known: int,
    count: int,
    channels: int,
    height: int,
    width: int,
    last: bool,
    dtype: Any,
    seed: int,
) -> None:
    array = images(known, shape_of(channels, height, width, last), dtype)
    found = grown(array, count, seed=seed)
    assert found.shape == (count, *array.shape[1:])
    assert found.dtype == array.dtype
    assert np.array_equal(found[:known], array)
    planes, copies = (
        np.moveaxis(a, -1 if last else 1, 0).reshape(channels, -1).astype(np.float64)
        for a in (array, found)
    )
    assert np.all(copies.max(axis=1) <= planes.max(axis=1))
    assert np.all(copies.min(axis=1) >= planes.min(axis=1))
    assert np.array_equal(found, grown(array, count, seed=seed))


def test_the_seed_decides() -> None:
    array = images(2, (3, 16, 16))
    assert not np.array_equal(grown(array, 5, seed=0), grown(array, 5, seed=1))


def test_every_copy_differs_and_each_original_has_as_many() -> None:
    array = images(5, (3, 32, 32))
    array += 1000 * np.arange(5, dtype=np.float32)[:, None, None, None]  # tells them apart
    found = grown(array, 20)
    for index, copy in enumerate(found[5:]):
        assert abs(copy.mean() - array[index % 5].mean()) < 300
        assert not any(np.array_equal(copy, other) for other in array)


def test_copies_in_many_pieces_are_as_varied(monkeypatch: pytest.MonkeyPatch) -> None:
    array = images(2, (3, 16, 16))
    monkeypatch.setattr("onnxcomp.augmentation._CHUNK", 3 * 16 * 16 * 2)
    found = grown(array, 11)
    assert len({copy.tobytes() for copy in found}) == 11


def spots(copies: np.ndarray) -> np.ndarray:
    """Positions (row, column) of the brightest pixel of the first channel."""
    flat = copies[:, 0].reshape(len(copies), -1).argmax(axis=1)
    return np.stack(np.unravel_index(flat, copies.shape[2:]), axis=1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shifts_are_short_and_only_three_channels_are_mirrored(channels: int) -> None:
    array = np.zeros((1, channels, 32, 48), np.float32)
    array[:, :, 20, 8] = 1.0
    rows, columns = spots(grown(array, 200)).T
    assert set(rows) == set(range(16, 25))
    plain, turned = set(range(2, 15)), set(range(33, 46))
    assert set(columns) == (plain | turned if channels == 3 else plain)


def test_borders_are_reflected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shifted ramp turns back at its border; repeated edge pixels would be flat."""
    monkeypatch.setattr("onnxcomp.augmentation._CONTRAST", 0.0)
    monkeypatch.setattr("onnxcomp.augmentation._BRIGHTNESS", 0.0)
    array = np.broadcast_to(np.arange(32, dtype=np.float64), (1, 1, 32, 32))
    steps = np.diff(grown(array, 50)[1:], axis=-1)
    assert np.all(np.abs(steps) == 1)
    assert 0 < (steps < 0).mean() < 0.25


def test_tones_change_lightly() -> None:
    array = np.full((1, 1, 16, 16), 100, np.uint8)
    array[..., 8:] = 150
    array[0, 0, 0, 0], array[0, 0, -1, -1] = 0, 255
    found = grown(array, 100)[1:].astype(float)
    low, high = (
        np.median(found[..., :4], axis=(1, 2, 3)),
        np.median(found[..., 12:], (1, 2, 3)),
    )
    assert np.abs(low - 100).max() <= 0.05 * 255 + 0.1 * 30 + 1
    assert np.abs((high - low) / 50 - 1).max() <= 0.1 + 1 / 25
    assert low.std() > 3
    assert (high - low).std() > 1


def test_labels_are_dropped_and_the_origin_is_kept() -> None:
    samples = Samples({"x": images(3, (1, 16, 16))}, np.arange(3), "random")
    inputs = (Spec("x", ("N", 1, 16, 16)),)
    found = augmented(samples, inputs, 8, seed=0).samples
    assert found.labels is None
    assert found.origin == "random"
    assert found.count == 8


IMAGE = Spec("x", ("N", 3, 16, 16))


@pytest.mark.parametrize(
    ("arrays", "inputs", "count", "note"),
    [
        ({"x": images(8, (3, 16, 16))}, (IMAGE,), 8, ""),
        ({"x": images(8, (3, 16, 16))}, (IMAGE,), 3, ""),
        ({"x": images(2, (640,))}, (Spec("x", ("N", 640)),), 8, r"\[640\] is no image"),
        ({"x": images(2, (900, 120))}, (Spec("x", ("N", 900, 120)),), 8, "is no image"),
        ({"x": images(2, (2, 32, 32))}, (Spec("x", ("N", 2, 32, 32)),), 8, "is no image"),
        ({"x": images(2, (49, 10, 1))}, (Spec("x", ("N", 49, 10, 1)),), 8, "is no image"),
        (
            {"x": images(2, (3, 16, 16), np.int64)},
            (Spec("x", ("N", 3, 16, 16), np.dtype(np.int64)),),
            8,
            "'x' is int64",
        ),
        ({"x": images(2, (4, 3, 16, 16))}, (Spec("x", (4, 3, 16, 16)),), 8, "as a whole"),
        (
            {"x": images(2, (3, 16, 16)), "state": images(2, (5,))},
            (IMAGE, Spec("state", ("N", 5))),
            8,
            "what 2 inputs get belongs together",
        ),
    ],
)
def test_nothing_else_is_copied(
    arrays: dict[str, np.ndarray], inputs: tuple[Spec, ...], count: int, note: str
) -> None:
    samples = Samples(arrays, labels=np.zeros(len(arrays["x"])))
    found = augmented(samples, inputs, count, seed=0)
    assert found.samples is samples
    if note:
        assert re.search(note, found.note)
        assert found.note.startswith("no copies of the 2 samples")
    else:
        assert found.note == ""


def test_the_count_is_checked() -> None:
    with pytest.raises(ParameterError, match="count"):
        augmented(Samples({"x": images(2, (3, 16, 16))}), (IMAGE,), 0, seed=0)
