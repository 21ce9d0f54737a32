"""Clusters of samples: pieces of one source are found together, whatever their scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.numerics.clusters import clusters


def from_sources(sources: int, each: int, shape: tuple[int, ...], apart: float) -> np.ndarray:
    """Noise around centres, in turn: sample i is of source i mod `sources`."""
    rng = np.random.default_rng(0)
    centres = apart * rng.standard_normal((sources, *shape))
    return np.tile(centres, (each, *[1] * len(shape))) + rng.standard_normal(
        (sources * each, *shape)
    )


def purity(found: np.ndarray, sources: int) -> float:
    """Share of samples that are of the source which is most frequent in their cluster."""
    source = np.arange(len(found)) % sources
    return sum(np.bincount(source[found == c]).max() for c in np.unique(found)) / len(found)


@pytest.mark.parametrize("shape", [(12,), (3, 8, 8), (3, 40, 40)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_sources_are_told_apart(shape, scale):
    array = scale * from_sources(6, 20, shape, apart=3.0) + 5 * scale
    assert purity(clusters([array.astype(np.float32)], 0), 6) > 0.95


def test_what_has_no_sources_is_not_told_apart():
    array = from_sources(6, 20, (12,), apart=0.0)
    assert purity(clusters([array], 0), 6) < 0.6


def test_samples_that_come_again_are_no_clusters():
    for kinds in (1, 2, 5, 16):
        array = from_sources(kinds, 1, (12,), apart=0.0)
        found = clusters([np.resize(array, (64, 12))], 0)
        assert len(np.unique(found)) == kinds


def test_every_input_counts_alike():
    told = from_sources(6, 20, (12,), apart=3.0)
    noise = 1e4 * np.random.default_rng(1).standard_normal((120, 500))
    assert purity(clusters([told, noise], 0), 6) > 0.95


@given(
    count=st.integers(1, 200),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["noise", "constant", "holes", "integers", "flags"]),
)
@settings(max_examples=60, deadline=None)
def test_any_samples_get_a_few_clusters(count, seed, kind):
    rng = np.random.default_rng(seed)
    array = rng.standard_normal((count, 3, 4))
    if kind == "constant":
        array[:] = 7
    elif kind == "holes":
        array[rng.random(array.shape) < 0.2] = np.nan
        array[rng.random(array.shape) < 0.1] = np.inf
    elif kind == "integers":
        array = (9 * array).astype(np.int64)
    elif kind == "flags":
        array = array > 0
    found = clusters([array], seed)
    assert found.shape == (count,)
    assert found.min() >= 0
    assert found.max() < 16
    assert np.array_equal(found, clusters([array], seed))
    if kind == "constant" or count < 8:
        assert not found.any()
