"""Rounding with compensation: errors as predicted, less than those of the nearest level."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import ParameterError
from onnxcomp.numerics import compensation
from onnxcomp.numerics.moments import Moments, RowMoments
from onnxcomp.numerics.rounding import Rounder, short


def metric(seed: int, d: int, m: int = 1) -> Moments:
    """Correlated inputs, as patches of images are."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(d, d)) * 0.9 ** np.arange(d)
    return Moments(1000, np.zeros(d), np.zeros(m), A @ A.T, np.zeros((m, d)), np.ones(m))


def damped(one: Moments) -> np.ndarray:
    return one.xx + compensation.DAMPING * one.mean_energy * np.eye(one.d)


def error(W: np.ndarray, Q: np.ndarray, S: np.ndarray) -> float:
    return float(np.trace((W - Q) @ S @ (W - Q).T))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 150),
    st.floats(0.05, 2.0),
    st.sampled_from([0.0, 0.2]),
)
def test_the_error_it_tells_is_the_error_it_makes(seed, groups, m, d, step, price):
    W = np.random.default_rng(seed).normal(size=(groups, m, d))
    metrics = [metric(seed + g, d) for g in range(groups)]
    found = Rounder(metrics).round(W, step, price)
    true = sum(error(W[g], found.dense[g], damped(one)) for g, one in enumerate(metrics))
    assert found.error == pytest.approx(true, rel=1e-6)
    assert np.array_equal(found.indices * found.step, found.dense)
    _, counts = np.unique(found.indices, return_counts=True)
    entropy = float(counts @ np.log2(counts.sum() / counts))
    assert found.bits >= entropy + 8 * len(counts) - 1e-6


def test_compensation_beats_the_nearest_level():
    """And in a metric without correlations it is the nearest level."""
    W = np.random.default_rng(0).normal(size=(1, 32, 200))
    one, step = metric(0, 200), short(0.5)
    found = Rounder([one]).round(W, step)
    nearest = np.rint(W[0] / step) * step
    assert error(W[0], found.dense[0], one.xx) < 0.6 * error(W[0], nearest, one.xx)
    flat = Moments(1, np.zeros(200), np.zeros(1), np.eye(200), np.zeros((1, 200)), np.ones(1))
    assert np.array_equal(Rounder([flat]).round(W, step).dense[0], nearest)


def test_a_price_on_bits_buys_zeros():
    W = np.random.default_rng(0).laplace(size=(1, 32, 100))
    rounder = Rounder([metric(1, 100)])
    free, priced = rounder.round(W, 0.7), rounder.round(W, 0.7, 0.3)
    assert priced.bits < 0.95 * free.bits
    assert np.count_nonzero(priced.indices) < np.count_nonzero(free.indices)
    assert priced.error > free.error


def test_wide_maps_are_rounded_part_by_part(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 50)) @ rng.normal(size=(50, 50))
    W = rng.normal(size=(1, 4, 50))
    rows = RowMoments.of(x, x @ W[0].T)
    whole = Rounder([rows]).round(W, 0.5)
    monkeypatch.setattr(compensation, "_WIDEST", 20)
    parts = Rounder([rows]).round(W, 0.5)
    nearest = np.rint(W[0] / 0.5) * 0.5
    assert rows.error(whole.dense[0]) < rows.error(parts.dense[0]) < rows.error(nearest)


@given(st.floats(1e-6, 1e3), st.integers(-(2**15), 2**15))
def test_multiples_of_a_short_step_are_exact_in_float32(step, index):
    value = short(step) * index
    assert float(np.float32(value)) == value
    assert short(step) == pytest.approx(step, rel=1 / 256)


@pytest.mark.parametrize("step", [0.0, -1.0, np.nan])
def test_a_step_is_positive(step):
    with pytest.raises(ParameterError, match="step"):
        Rounder([metric(0, 2)]).round(np.ones((1, 1, 2)), step)
