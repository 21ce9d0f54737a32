import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import DataError, ParameterError
from onnxcomp.numerics.moments import Moments, MomentsBuilder, RowMoments

REL = 1e-9  # float64 rows; float32 rows carry 1e-5


def rows(seed, n, d, m, *, noise=0.3, offset=5.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset
    W = rng.normal(size=(m, d))
    y = x @ W.T + 1.5 + noise * rng.normal(size=(n, m))
    return x, y, W


def moments(x, y, parts=3):
    builder = MomentsBuilder(x.shape[1], y.shape[1])
    for a, b in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        builder.add(a, b)
    return builder.finish()


def both(x, y):
    return moments(x, y), RowMoments.of(x, y)


def ridge(x, y, prior, lam):
    """Ridge towards `prior` as one stacked least-squares problem (no normal equations)."""
    n, d = x.shape
    xc, yc = x - x.mean(0), y - y.mean(0)
    A = np.vstack([xc / np.sqrt(n), np.sqrt(lam) * np.eye(d)])
    b = np.vstack([yc / np.sqrt(n), np.sqrt(lam) * prior.T])
    return np.linalg.lstsq(A, b, rcond=None)[0].T


def test_moments_equal_numpy_and_are_not_shrunk_with_many_rows():
    x, y, _ = rows(0, 500, 6, 3)
    got = moments(x, y)
    assert got.shrinkage == 0
    assert (got.count, got.d, got.m) == (500, 6, 3)
    np.testing.assert_allclose(got.xx, np.cov(x.T, bias=True), rtol=REL)
    both_cov = np.cov(np.hstack([y, x]).T, bias=True)
    np.testing.assert_allclose(got.yx, both_cov[:3, 3:], rtol=REL, atol=1e-9)
    np.testing.assert_allclose(got.yy, y.var(0), rtol=REL)
    np.testing.assert_allclose(got.x_mean, x.mean(0), rtol=REL)
    np.testing.assert_allclose(got.y_mean, y.mean(0), rtol=REL)


def test_float32_rows_far_from_zero_do_not_cancel():
    x, y, _ = rows(1, 4000, 5, 2, offset=0.0)
    shifted = (x + 3000).astype(np.float32)
    got = moments(shifted, y.astype(np.float32))
    want = np.cov(shifted.astype(np.float64).T, bias=True)
    assert np.linalg.norm(got.xx - want) <= 1e-5 * np.linalg.norm(want)
    # what a plain float32 sum of squares would have given
    naive = shifted.T @ shifted / np.float32(len(x)) - np.outer(
        shifted.mean(0), shifted.mean(0)
    )
    assert np.linalg.norm(naive - want) > 1e-3 * np.linalg.norm(want)


def test_few_rows_shrink_the_off_diagonal_only():
    x, y, _ = rows(2, 12, 6, 2)
    got, raw = moments(x, y), np.cov(x.T, bias=True)
    rho = 6 / (6 + 12)
    assert got.shrinkage == rho
    np.testing.assert_allclose(
        got.xx, (1 - rho) * raw + rho * np.diag(np.diag(raw)), rtol=1e-8
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12), st.integers(1, 5))
def test_an_exact_prior_is_a_fixed_point(seed, n, d, m):
    x, _, W = rows(seed, n, d, m)
    for metric in both(x, x @ W.T + 0.5):
        np.testing.assert_allclose(metric.solve(W), W, rtol=1e-3, atol=1e-4)
        assert metric.error(W) <= 1e-6 * metric.target_energy + 1e-6
    wrong = moments(x, x @ W.T).error(W + 1.0)
    assert wrong == pytest.approx(m * x.sum(1).var(), rel=1e-6)


@pytest.mark.parametrize("columns", [None, np.array([4, 0, 3])])
def test_solve_is_the_ridge_towards_the_prior(columns):
    x, y, W = rows(3, 200, 6, 3)
    prior = W + 0.2 * np.random.default_rng(0).normal(size=W.shape)
    kept = np.arange(6) if columns is None else columns
    lam = 1e-3 * np.trace(np.cov(x.T, bias=True)) / 6
    want = ridge(x[:, kept], y, prior[:, kept], lam)
    for metric, tolerance in zip(both(x, y), (1e-8, 1e-4), strict=True):
        got = metric.solve(prior, columns=columns)
        assert got.shape == (3, len(kept))
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
    towards_zero = ridge(x[:, kept], y, 0 * prior[:, kept], lam)
    assert np.linalg.norm(towards_zero - want) > 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("columns", [None, np.array([1, 2])])
def test_error_and_bias_equal_the_rows_and_are_optimal(columns):
    x, y, W = rows(4, 30, 4, 2)  # few rows: shrunk, yet errors are those of the rows
    kept = np.arange(4) if columns is None else columns
    rng = np.random.default_rng(1)
    V = W[:, kept]
    for metric, tolerance in zip(both(x, y), (1e-9, 1e-5), strict=True):
        b = metric.bias(V, columns)
        achieved = np.square(y - x[:, kept] @ V.T - b).sum(1).mean()
        assert metric.error(V, columns) == pytest.approx(achieved, rel=tolerance)
        other = b + 0.1 * rng.normal(size=b.shape)
        assert np.square(y - x[:, kept] @ V.T - other).sum(1).mean() > achieved


def test_the_optimum_beats_every_perturbation():
    x, y, W = rows(5, 400, 5, 3, noise=1.0)
    metric = moments(x, y)
    best = metric.solve(W, damping=1e-12)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-1):
        step = scale * rng.normal(size=W.shape)
        assert metric.error(best + step) > metric.error(best)
        # (1): the excess is the quadratic form of the step
        excess = metric.error(best + step) - metric.error(best)
        assert excess == pytest.approx(np.trace(metric.quadratic(step)), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 30), st.integers(1, 5))
def test_dual_equals_primal(seed, n, d, m):
    x, y, W = rows(seed, n, d, m, offset=1.0)
    x = x.astype(np.float32).astype(np.float64)
    primal, dual = Moments(*_raw(x, y)), RowMoments.of(x, y)
    prior = W + 0.5
    V = np.random.default_rng(seed).normal(size=(2, d))
    for a, b in (
        (primal.times(V), dual.times(V)),
        (primal.quadratic(V), dual.quadratic(V)),
        (primal.column_energy(), dual.column_energy()),
        (primal.mean_energy, dual.mean_energy),
        (primal.target_energy, dual.target_energy),
        (primal.solve(prior), dual.solve(prior)),
    ):
        assert np.linalg.norm(np.subtract(a, b)) <= 2e-4 * np.linalg.norm(a)
    assert np.linalg.norm(primal.solve(prior) - dual.solve(prior + 1)) > 1e-6


def _raw(x, y):
    n = len(x)
    xc, yc = x - x.mean(0), y - y.mean(0)
    return n, x.mean(0), y.mean(0), xc.T @ xc / n, yc.T @ xc / n, (yc**2).mean(0)


def test_dead_and_constant_inputs_are_harmless():
    x, y, W = rows(6, 50, 4, 2)
    x[:, 1] = 0
    x[:, 2] = 7
    for metric in both(x, y):
        got = metric.solve(W)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[:, 1:3], W[:, 1:3], atol=1e-6)
    for metric in both(0 * x, y):
        np.testing.assert_allclose(metric.solve(W), W)


def test_unusable_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        MomentsBuilder(3, 2).finish()
    with pytest.raises(DataError, match="no rows"):
        RowMoments.of(np.zeros((0, 3)), np.zeros((0, 2)))
    bad = np.full((4, 3), np.nan)
    with pytest.raises(DataError, match="NaN"):
        moments(bad, np.zeros((4, 2)))
    with pytest.raises(DataError, match="NaN"):
        RowMoments.of(bad, np.zeros((4, 2)))
    x, y, _ = rows(0, 40, 3, 2)
    for large in (1e30, 1e10):
        with pytest.raises(DataError, match="NaN"):
            moments((large * x).astype(np.float32), (1e30 * y).astype(np.float32))
    with pytest.raises(ParameterError, match=r"\(n, 3\)"):
        MomentsBuilder(3, 2).add(np.zeros((4, 2)), np.zeros((4, 2)))
    with pytest.raises(ParameterError, match="prior"):
        moments(*rows(0, 9, 3, 2)[:2]).solve(np.zeros((3, 2)))
