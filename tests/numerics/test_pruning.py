"""Which weights go, and what the others take over."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.errors import ParameterError
from onnxcomp.numerics.pruning import kept_above, prune_compensated, prune_smallest
from tests.numerics.test_rounding import error, metric


@given(st.integers(0, 10**6), st.sampled_from([0, 30, 50, 90, 99, 100]))
def test_strictly_above_the_percentile_stay(seed, percentile):
    W = np.round(np.random.default_rng(seed).normal(size=(6, 7)), 1)  # with ties
    found = prune_smallest(W, kept_above(W, [percentile])[0])
    mask = np.abs(W) > np.percentile(np.abs(W), percentile)
    assert np.array_equal(found, W * mask)


@given(st.integers(0, 10**6), st.integers(0, 42))
def test_no_more_stay_than_asked_for(seed, kept):
    W = np.round(np.random.default_rng(seed).normal(size=(6, 7)), 1)
    found = prune_smallest(W, kept)
    assert np.count_nonzero(found) <= kept
    unties = np.random.default_rng(seed).normal(size=(6, 7))
    assert np.count_nonzero(prune_smallest(unties, kept)) == kept


@pytest.mark.parametrize("share", [0.7, 0.5, 0.2])
def test_compensation_loses_less(share):
    W = np.random.default_rng(0).normal(size=(2, 16, 60))
    metrics = [metric(0, 60), metric(1, 60)]
    kept = int(share * W.size)
    found = prune_compensated(W, metrics, kept)
    assert 0.97 * kept <= np.count_nonzero(found) <= kept

    def total(Q: np.ndarray) -> float:
        return sum(error(W[g], Q[g], one.xx) for g, one in enumerate(metrics))

    assert total(found) < 0.7 * total(prune_smallest(W, kept))


@pytest.mark.parametrize("share", [0.1, 0.02, 0.01])
def test_inputs_of_very_unequal_variance_leave_as_many(share):
    rng = np.random.default_rng(0)
    scales = np.where(np.arange(20) < 2, 100, 1)
    one = replace(metric(0, 20), xx=np.diag(1000.0 * scales**2))
    W = rng.normal(size=(1, 32, 20))
    kept = int(share * W.size)
    assert 0.7 * kept <= np.count_nonzero(prune_compensated(W, [one], kept)) <= kept


def test_everything_and_nothing_may_stay():
    W = np.random.default_rng(0).normal(size=(1, 3, 4))
    one = [metric(0, 4)]
    assert np.array_equal(prune_compensated(W, one, 12), W)
    assert not prune_compensated(W, one, 0).any()
    assert np.array_equal(prune_smallest(W, 12), W)


def test_a_percentile_is_one():
    with pytest.raises(ParameterError, match="percentile"):
        kept_above(np.ones(3), [50, 101])
