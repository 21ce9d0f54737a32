"""Few values: as few as asked for, zeros where they were, and each quantizer's own law."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnxcomp.errors import ParameterError
from onnxcomp.numerics.quantizers import (
    QUANTIZERS,
    Shared,
    channel_scales,
    constrained_clusters,
    cws,
    share,
)

every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


def laplacian(count: int = 20_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).laplace(scale=0.05, size=count)


def entropy(shared: Shared) -> float:
    counts = np.bincount(shared.indices.reshape(-1)).astype(float)
    counts = counts[counts > 0]
    return float(counts @ np.log2(counts.sum() / counts) / counts.sum())


def snr(values: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.var(values) / np.mean((values - found) ** 2)))


@every_quantizer
@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.floats(-100, 100, allow_subnormal=False, width=32), min_size=1, max_size=60
    ),
    levels=st.integers(2, 20),
)
@example(values=[16.0, 16.0, 16.0, 2.7970957147682718e-11], levels=2)
def test_few_values_and_zeros_stay(name, values, levels):
    values = np.array(values)
    (found,) = share([values], name, levels)
    assert found.indices.shape == values.shape
    assert (found.dense[values == 0] == 0).all()
    assert not np.signbit(found.dense[found.dense == 0]).any()
    assert len(np.unique(found.dense[values != 0])) <= levels
    assert (np.diff(found.codebook) > 0).all()
    if name != "uq":  # whose step may be wider than all values
        low, high = np.minimum(values.min(), 0), np.maximum(values.max(), 0)
        assert found.dense.min() >= low - 1e-9
        assert found.dense.max() <= high + 1e-9


@every_quantizer
def test_as_few_values_as_there_are_stay_as_they_are(name):
    values = np.repeat([-0.5, 0.25, 1.0], 50)
    (found,) = share([values], name, 16)
    tolerance = 0.05 if name == "uq" else 1e-12  # a uniform grid need not hold them
    assert np.abs(found.dense - values).max() <= tolerance


def test_rates_and_errors_of_the_survey():
    """The measured table of the specification: k = 32, Laplacian; within 0.25 bit and 1 dB."""
    values = laplacian(200_000)
    expected = {"cws": (4.45, 23.9), "uq": (2.77, 15.6), "pws": (4.93, 5.3)}
    for name, (bits, decibels) in expected.items():
        (found,) = share([values], name, 32, seed=1)
        assert entropy(found) == pytest.approx(bits, abs=0.25), name
        assert snr(values, found.dense) == pytest.approx(decibels, abs=1.0), name
    clusters, constrained = (share([values], n, 32)[0] for n in ("cws", "ecsq"))
    # 6.02 dB a bit: at its own rate the constrained one is ahead of k-means
    rate = entropy(constrained) - entropy(clusters)
    assert rate < -0.1
    assert snr(values, constrained.dense) >= snr(values, clusters.dense) + 6.02 * rate + 0.5


def test_kmeans_is_a_fixed_point_and_beats_quantiles():
    values = laplacian()
    found = cws(values, 16, np.random.default_rng(0))
    centroids = np.unique(found)
    assert len(centroids) == 16
    means = np.array([values[found == c].mean() for c in centroids])
    assert np.allclose(means, centroids, atol=1e-6)
    nearest = centroids[np.abs(values[:, None] - centroids).argmin(axis=1)]
    assert np.abs(np.abs(values - found) - np.abs(values - nearest)).max() < 1e-6
    quantiles = np.quantile(values, (np.arange(16) + 0.5) / 16)
    by_quantile = quantiles[np.abs(values[:, None] - quantiles).argmin(axis=1)]
    assert snr(values, found) > snr(values, by_quantile) + 1.0


def test_the_probabilistic_one_is_unbiased():
    """Over a million draws, every weight to its standard error; the nearest end is not."""
    values = laplacian(1000)
    draws = share([np.tile(values, 1000)], "pws", 8, seed=1)[0].dense.reshape(1000, 1000)
    ends = np.unique(draws)
    upper = np.clip(np.searchsorted(ends, values, side="right"), 1, len(ends) - 1)
    variance = (values - ends[upper - 1]) * (ends[upper] - values) / 1000 + 1e-15
    assert 0.8 < np.mean((draws.mean(axis=0) - values) ** 2 / variance) < 1.25
    nearest = ends[np.abs(values[:, None] - ends).argmin(axis=1)]
    assert np.mean((nearest - values) ** 2 / variance) > 50


def test_uniform_levels_are_multiples_with_zero():
    (found,) = share([laplacian()], "uq", 33)
    gaps = np.diff(found.codebook)
    step = gaps.min()
    assert 0.0 in found.codebook
    assert np.allclose(found.codebook / step, np.rint(found.codebook / step), atol=1e-6)
    assert 25 <= len(found.codebook) <= 33


def test_uniform_levels_reach_small_values_beside_a_large_one():
    values = np.append(np.random.default_rng(0).uniform(-1e-3, 1e-3, 5000), 1.0)
    (found,) = share([values], "uq", 16)
    assert 12 <= len(found.codebook) <= 16
    assert np.count_nonzero(found.dense) > 4000


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 20), st.floats(1e-4, 1.0))
def test_the_constrained_cost_never_rises(seed, levels, lam):
    ordered = np.sort(np.random.default_rng(seed).laplace(size=500))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    *_, costs = constrained_clusters(ordered, sums, levels, lam)
    assert (np.diff(costs) <= 1e-9).all()


def test_a_unified_codebook_is_common():
    tensors = [laplacian(300).reshape(10, 30), laplacian(200, seed=1) * 3]
    found = share(tensors, "cws", 8)
    assert all(f.codebook is found[0].codebook for f in found)
    assert [f.indices.shape for f in found] == [(10, 30), (200,)]
    alone = share(tensors[:1], "cws", 8)[0]
    assert snr(tensors[0].ravel(), alone.dense.ravel()) > snr(
        tensors[0].ravel(), found[0].dense.ravel()
    )


def test_scales_make_channels_alike():
    kernel = laplacian(6 * 50).reshape(6, 2, 5, 5) * np.arange(6).reshape(6, 1, 1, 1)
    scaled = kernel / channel_scales(kernel)
    assert np.allclose(np.mean(scaled[1:] ** 2, axis=(1, 2, 3)), 1.0)
    assert (scaled[0] == 0).all()


def test_wrong_parameters_are_named():
    with pytest.raises(ParameterError, match="'quantizer' must be one of cws"):
        share([np.ones(3)], "kmeans", 4)
    with pytest.raises(ParameterError, match="'levels' must be at least 2"):
        share([np.ones(3)], "cws", 1)
