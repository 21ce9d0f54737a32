"""Samples: the rank rule, feeds, splitting, checks and random inputs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import DataError, ParameterError, UnsupportedModelError
from onnxcomp.samples import Samples, as_samples, random_samples

FLOAT32, INT64 = np.dtype(np.float32), np.dtype(np.int64)


@dataclass(frozen=True)
class Spec:
    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: np.dtype[Any] = FLOAT32


IMAGE = (Spec("x", ("N", 3, 4, 5)),)
SILERO = (
    Spec("input", ("batch", "sequence")),
    Spec("state", (2, "batch", 6)),
    Spec("sr", (), INT64),
)
GTCRN = (Spec("mix", (1, 7, 1, 2)), Spec("cache", (2, 1, 3)))


def images(count: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 4, 5)).astype(dtype)


def fits(inputs: Sequence[Spec], feed: dict[str, np.ndarray]) -> bool:
    return all(
        feed[v.name].dtype == v.dtype
        and feed[v.name].ndim == len(v.shape)
        and all(
            a == b for a, b in zip(feed[v.name].shape, v.shape, strict=True) if type(b) is int
        )
        for v in inputs
    )


# --- split -------------------------------------------------------------------------------


@given(count=st.integers(2, 600), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_split_is_a_partition_of_the_promised_size(count: int, seed: int) -> None:
    samples = Samples({"x": np.arange(count)}, labels=np.arange(count) * 2)
    fit, holdout = samples.split(seed)
    assert fit.labels is not None
    assert holdout.labels is not None
    joined = np.concatenate([fit.arrays["x"], holdout.arrays["x"]])
    assert sorted(joined) == list(range(count))
    if count >= 192:
        assert holdout.count == max(round(0.25 * count), 64)
    else:  # between a quarter and a third
        assert round(0.25 * count) <= holdout.count <= max(count / 3, 1)
    assert fit.count >= holdout.count
    for part in (fit, holdout):
        assert np.array_equal(part.labels, part.arrays["x"] * 2)
        assert np.all(np.diff(part.arrays["x"]) > 0) or part.count == 1
    again = samples.split(seed)[1].arrays["x"]
    assert np.array_equal(again, holdout.arrays["x"])


@pytest.mark.parametrize(
    ("count", "held"),
    [(2, 1), (3, 1), (4, 1), (16, 5), (64, 21), (128, 42), (192, 64), (256, 64), (1024, 256)],
)
def test_small_sets_mostly_fit(count: int, held: int) -> None:
    assert Samples({"x": np.arange(count)}).split(0)[1].count == held


def test_split_never_holds_out_more_than_half() -> None:
    samples = Samples({"x": np.arange(3)})
    assert samples.split(0, holdout=0.5)[1].count == 1
    assert Samples({"x": np.arange(200)}).split(0, holdout=0.5)[1].count == 100
    assert Samples({"x": np.arange(200)}).split(0, minimum=1)[1].count == 50


def test_split_depends_on_the_seed_and_refuses_what_cannot_be_split() -> None:
    samples = Samples({"x": np.arange(200)})
    assert not np.array_equal(samples.split(0)[1].arrays["x"], samples.split(1)[1].arrays["x"])
    with pytest.raises(DataError, match="give at least 2"):
        samples.take([0]).split(0)
    with pytest.raises(ParameterError, match="holdout"):
        samples.split(0, holdout=0.6)


@given(count=st.integers(8, 400), groups=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_groups_stay_together_all_but_one(count: int, groups: int, seed: int) -> None:
    samples = Samples({"x": np.arange(count)})
    group = np.random.default_rng(seed).integers(groups, size=count)
    fit, holdout = samples.split(seed, groups=group)
    assert holdout.count == samples.split(seed)[1].count
    parts = [set(group[part.arrays["x"]]) for part in (fit, holdout)]
    assert len(parts[0] & parts[1]) <= 1
    joined = np.concatenate([fit.arrays["x"], holdout.arrays["x"]])
    assert sorted(joined) == list(range(count))


def test_without_groups_sources_are_on_both_sides() -> None:
    samples = Samples({"x": np.arange(200)})
    group = np.arange(200) % 8
    parts = [set(group[part.arrays["x"]]) for part in samples.split(0)]
    assert parts[0] == parts[1] == set(range(8))


def test_take_keeps_order_labels_and_origin() -> None:
    samples = Samples({"x": np.arange(5)}, np.arange(5) + 10, "random").take([3, 1, 3])
    assert samples.arrays["x"].tolist() == [3, 1, 3]
    assert samples.labels is not None
    assert samples.labels.tolist() == [13, 11, 13]
    assert samples.origin == "random"


def test_samples_are_read_only_without_freezing_the_callers_array() -> None:
    given_array = images(2)
    samples = as_samples(given_array, IMAGE)
    with pytest.raises(ValueError, match="read-only"):
        samples.arrays["x"][0] = 1
    with pytest.raises(TypeError):
        samples.arrays["y"] = given_array  # type: ignore[index]
    given_array[0] = 1
    assert given_array[0, 0, 0, 0] == 1


# --- batches -----------------------------------------------------------------------------


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 12),
    first=st.sampled_from([None, "N", 1, 2, 3, 8]),
    whole=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_batches_visit_every_sample_once_in_feeds_that_fit(
    count: int, size: int, first: int | str | None, whole: bool
) -> None:
    inputs = (Spec("x", (first, 2)), Spec("y", (first,)))
    shape = (first if isinstance(first, int) else 2,) if whole else ()
    x = np.arange(count * 2 * int(np.prod(shape)), dtype=np.float32).reshape(count, *shape, 2)
    samples = as_samples({"x": x, "y": x[..., 0]}, inputs)
    seen = []
    for batch in samples.batches(inputs, size):
        assert fits(inputs, batch.feed)
        assert np.array_equal(batch.feed["x"][..., 0], batch.feed["y"])
        assert batch.start == sum(len(rows) for rows in seen)
        rows = batch.feed["x"]
        kept = rows[None] if whole else batch.trim(rows)
        assert len(kept) == batch.count
        if whole:
            assert batch.rows is None
            assert batch.trim(rows) is rows
        elif not isinstance(first, int):
            assert batch.count == batch.rows == min(size, count - batch.start)
        else:
            assert batch.rows == first
            assert np.all(rows[batch.count :] == rows[batch.count - 1])
        seen.append(kept)
    assert np.array_equal(np.concatenate(seen), x)


def test_trim_leaves_outputs_without_the_batch_axis() -> None:
    inputs = (Spec("x", (4, 2)),)
    last = list(as_samples(np.zeros((6, 2), np.float32), inputs).batches(inputs, 1))[-1]
    assert (last.start, last.count, last.rows) == (4, 2, 4)
    assert last.trim(np.zeros((4, 9))).shape == (2, 9)
    assert last.trim(np.zeros((2, 4))).shape == (2, 4)
    assert last.trim(np.zeros(())).shape == ()


def test_recurrent_states_and_scalars_are_whole_inputs_fed_one_at_a_time() -> None:
    samples = as_samples(
        {
            "input": np.arange(15, dtype=np.float32).reshape(3, 5),
            "state": np.arange(36, dtype=np.float32).reshape(3, 2, 1, 6),
            "sr": np.full(3, 16000),
        },
        SILERO,
    )
    feeds = [batch.feed for batch in samples.batches(SILERO, 8)]
    assert len(feeds) == 3
    assert all(fits(SILERO, feed) for feed in feeds)
    assert feeds[1]["input"].shape == (1, 5)
    assert feeds[2]["state"][0, 0, 0] == 24
    assert feeds[0]["sr"].shape == ()
    assert feeds[0]["sr"] == 16000


def test_contradicting_batch_sizes_name_the_inputs_and_the_way_out() -> None:
    arrays = {"mix": np.zeros((4, 7, 1, 2)), "cache": np.zeros((4, 1, 3))}
    samples = as_samples(arrays, GTCRN)
    with pytest.raises(DataError, match=r"'mix' 1, 'cache' 2.*one rank more"):
        samples.batches(GTCRN, 1)
    with pytest.raises(ParameterError, match="size"):
        samples.batches(GTCRN, 0)
    with pytest.raises(DataError, match="no input 'mix'"):
        samples.batches(GTCRN[1:], 1)


# --- what as_samples takes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        images(6),
        {"x": images(6)},
        {"anything": images(6)},
        list(images(6)),
        [images(6)[:4], images(6)[4:]],
        ({"x": image} for image in images(6)),
        Samples({"x": images(6)}),
        images(6, np.float64).astype(np.float32).astype(np.float64),
    ],
    ids=["array", "dict", "any key", "items", "batches", "dicts", "samples", "float64"],
)
def test_all_forms_give_the_same_samples(data: Any) -> None:
    samples = as_samples(data, IMAGE)
    assert samples.arrays["x"].dtype == np.float32
    assert np.array_equal(samples.arrays["x"], images(6))
    assert samples.origin == "user"
    assert samples.labels is None


def test_items_without_a_common_batch_axis_are_whole_feeds() -> None:
    feed = {"mix": np.ones((1, 7, 1, 2)), "cache": np.ones((2, 1, 3))}
    samples = as_samples([feed, feed, feed], GTCRN)
    assert samples.arrays["mix"].shape == (3, 1, 7, 1, 2)
    assert samples.arrays["cache"].shape == (3, 2, 1, 3)
    assert all(fits(GTCRN, batch.feed) for batch in samples.batches(GTCRN, 4))


def test_items_may_carry_labels_one_by_one_or_in_batches() -> None:
    single = as_samples([{"x": image, "labels": 3} for image in images(4)], IMAGE)
    batch = as_samples([{"x": images(2), "labels": [3, 3]}] * 2, IMAGE)
    for samples in (single, batch):
        assert samples.labels is not None
        assert samples.labels.tolist() == [3, 3, 3, 3]


def test_an_input_called_labels_is_an_input() -> None:
    inputs = (*IMAGE, Spec("labels", ("N",), INT64))
    samples = as_samples({"x": images(2), "labels": np.array([1, 2])}, inputs)
    assert samples.labels is None
    assert samples.arrays["labels"].tolist() == [1, 2]


def with_value(value: float) -> np.ndarray:
    array = images(5)
    array[3, 1, 2, 2] = value
    return array


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((2, 3, 4, 6)), r"'x'.*\[2, 3, 4, 6\].*\[N, 3, 4, 5\]: axis 3.*must be 5"),
        (np.zeros((2, 1, 3, 4, 6)), "axis 4.*must be 5"),
        (np.zeros((3, 4, 5)), r"'x'.*\[3, 4, 5\].*give rank 4.*or rank 5"),
        (np.zeros((0, 3, 4, 5)), "no samples"),
        ([], "no samples"),
        (with_value(np.nan), "'x': sample 3 holds NaN"),
        (with_value(-np.inf), "'x': sample 3 holds NaN or infinite"),
        (np.full((2, 3, 4, 5), 2**24 + 1), "int64.*float32.*exact"),
        (np.full((2, 3, 4, 5), 1e39), "sample 0 holds NaN or infinite values in float32"),
        (np.zeros((2, 3, 4, 5), np.complex64), "complex64"),
        (np.full((2, 3, 4, 5), "a"), "only integers, floats and booleans"),
        ({"y": images(1), "z": images(1)}, "no samples for input 'x'; found 'y', 'z'"),
        ({"x": images(1), "z": images(1)}, "no input 'z'; it has 'x'"),
        ({}, "no samples for input 'x'; found nothing"),
        ({"x": images(3), "labels": np.zeros(2)}, "'x' 3, 'labels' 2"),
        ({"x": images(1), "labels": np.array(["cat"])}, "labels are"),
        ([images(1), np.zeros((3, 4, 6))], "item 1 have shape.*make them the same"),
        ([{"x": images(1)}, {"y": images(1)}], "item 1 has 'y', not 'x'"),
        ("samples.npz", "load_samples"),
        (3, "got int"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_samples(data, IMAGE)


def test_several_inputs_must_be_named_and_counted_alike() -> None:
    with pytest.raises(DataError, match="give the samples by name"):
        as_samples(np.zeros((2, 7, 1, 2)), GTCRN)
    with pytest.raises(DataError, match="'mix' 3, 'cache' 2"):
        as_samples({"mix": np.zeros((3, 7, 1, 2)), "cache": np.zeros((2, 2, 1, 3))}, GTCRN)


def test_an_endless_iterable_stops_at_the_limit() -> None:
    with pytest.raises(DataError, match="more than 10,000 bytes"):
        as_samples(itertools.repeat(images(1)), IMAGE, max_bytes=10_000)


def test_an_input_of_unknown_rank_is_not_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="'x' has no declared shape"):
        as_samples(images(1), (Spec("x", None),))


@pytest.mark.parametrize(
    ("values", "dtype", "exact"),
    [
        (np.array([0.0, 255.0]), np.uint8, True),
        (np.array([0.0, 255.5]), np.uint8, False),
        (np.array([-1]), np.uint64, False),
        (np.array([2**63], np.uint64), np.int64, False),
        (np.array([2**53 + 1]), np.float64, False),
        (np.array([0, 255], np.uint8), np.float32, True),
        (np.array([0, 1]), np.bool_, True),
        (np.array([0, 2]), np.bool_, False),
        (np.array([1.0 + 2**-30]), np.float32, True),
        (np.array([1.5]), ml_dtypes.bfloat16, True),
    ],
)
def test_floats_are_rounded_and_all_else_must_be_exact(
    values: np.ndarray, dtype: Any, exact: bool
) -> None:
    inputs = (Spec("x", ("N",), np.dtype(dtype)),)
    if exact:
        found = as_samples(values, inputs).arrays["x"]
        assert found.dtype == inputs[0].dtype
        assert np.allclose(found.astype(np.float64), values, rtol=1e-7, atol=0)
    else:
        with pytest.raises(DataError, match="exact"):
            as_samples(values, inputs)


# --- random ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [("N", 3, 64, 48), ("N", 64, 48, 3)])
def test_random_images_are_normalised_pink_and_correlated(shape: tuple[Any, ...]) -> None:
    inputs = (Spec("x", shape),)
    samples = random_samples(inputs, 20, 0, {})
    assert samples.origin == "random"
    array = samples.arrays["x"]
    assert array.shape == (20, *shape[1:])
    assert array.dtype == np.float32
    planes = np.moveaxis(array, 1 if shape[1] == 3 else -1, 0)
    assert np.allclose(planes.mean(axis=(2, 3)), 0, atol=1e-5)
    assert np.allclose(planes.std(axis=(2, 3)), 1, atol=1e-5)
    neighbours = (planes[..., 1:] * planes[..., :-1]).mean()
    assert neighbours > 0.6  # 0 for white noise
    assert (planes[0] * planes[1]).mean() == pytest.approx(0.9, abs=0.05)
    assert np.array_equal(array, random_samples(inputs, 20, 0, {}).arrays["x"])
    assert not np.array_equal(array, random_samples(inputs, 20, 1, {}).arrays["x"])


def test_random_maps_that_are_no_pictures_have_independent_channels() -> None:
    array = random_samples((Spec("x", ("N", 2, 64, 48)),), 40, 0, {}).arrays["x"]
    assert abs((array[:, 0] * array[:, 1]).mean()) < 0.2
    assert (array[..., 1:] * array[..., :-1]).mean() > 0.6


def test_random_pictures_lie_within_their_range() -> None:
    inputs = (Spec("x", ("N", 3, 32, 32)), Spec("y", ("N", 2, 32, 32)))
    found = random_samples(inputs, 20, 0, {}, {"x": (0.0, 255.0), "y": (0.0, 1.0)}).arrays
    assert 0 <= found["x"].min() < 20
    assert 220 < found["x"].max() <= 255
    assert found["y"].mean() == pytest.approx(0, abs=1e-3)  # no picture


def test_random_bytes_are_pictures_of_all_levels() -> None:
    inputs = (Spec("x", ("N", 32, 32, 1), np.dtype(np.uint8)),)
    pictures = random_samples(inputs, 20, 0, {}).arrays["x"]
    assert pictures.dtype == np.uint8
    assert pictures.mean() == pytest.approx(0.45 * 255, rel=0.05)
    assert pictures.std() == pytest.approx(0.225 * 255, rel=0.05)
    others = (Spec("x", ("N", 8, 8, 1), np.dtype(np.uint8)),)
    assert not random_samples(others, 20, 0, {}).arrays["x"].any()


def test_random_samples_of_recurrent_models_are_whole_feeds() -> None:
    shapes = {"input": (1, 512), "state": (2, 1, 6)}
    samples = random_samples(SILERO, 4, 0, shapes)
    assert samples.arrays["input"].shape == (4, 1, 512)
    assert samples.arrays["state"].shape == (4, 2, 1, 6)
    assert samples.arrays["sr"].tolist() == [1, 1, 1, 1]
    assert all(fits(SILERO, batch.feed) for batch in samples.batches(SILERO, 2))


def test_random_integers_and_booleans_are_harmless() -> None:
    inputs = (Spec("ids", ("N", 4), INT64), Spec("mask", ("N", 2), np.dtype(np.bool_)))
    samples = random_samples(inputs, 2, 0, {})
    assert not samples.arrays["ids"].any()
    assert not samples.arrays["mask"].any()
    assert samples.arrays["ids"].shape == (2, 4)


def test_random_samples_of_a_single_pixel_are_finite() -> None:
    assert random_samples((Spec("x", (1, 3, 1, 1)),), 2, 0, {}).arrays["x"].std() > 0


def test_random_samples_need_every_size() -> None:
    inputs = (Spec("x", ("N", 3, "h", "w")),)
    with pytest.raises(DataError, match=r"'x' is declared as \[N, 3, h, w\]; name the sizes"):
        random_samples(inputs, 1, 0, {})
    with pytest.raises(DataError, match="axis 1 of the samples must be 3, not 4"):
        random_samples(inputs, 1, 0, {"x": (1, 4, 8, 8)})
    with pytest.raises(DataError, match="all its 4 axes"):
        random_samples(inputs, 1, 0, {"x": (3, 8, 8)})
    with pytest.raises(ParameterError, match="count"):
        random_samples(inputs, 0, 0, {"x": (1, 3, 8, 8)})
    assert random_samples(inputs, 2, 0, {"x": (1, 3, 8, 6)}).arrays["x"].shape == (2, 3, 8, 6)
