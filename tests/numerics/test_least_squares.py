import numpy as np
import pytest

from onnxcomp.errors import DataError
from onnxcomp.numerics import least_squares
from onnxcomp.numerics.least_squares import (
    basis_cross,
    basis_gram,
    basis_image,
    damped_cholesky,
    first_slope,
    fit_first,
    fit_last,
    offset_mean,
    solve_right,
    step_first,
    top_eigen,
)

M, R, U, V = 5, 2, 6, 3


def problem(seed, spread=1.0):
    """W (m, u v), a metric S with its root, A (m, r v) and B (r, u)."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(U * V, 200)) * np.geomspace(1, spread, U).repeat(V)[:, None]
    W, A, B = (rng.normal(size=s) for s in ((M, U * V), (M, R * V), (R, U)))
    return W, root @ root.T / 200, root / np.sqrt(200), A, B


def test_basis_products_are_those_of_the_kronecker_product():
    W, S, _, _, B = problem(0)
    Phi = np.kron(B, np.eye(V))
    np.testing.assert_allclose(basis_gram(B, S), Phi @ S @ Phi.T, atol=1e-10)
    np.testing.assert_allclose(basis_cross(B, W @ S), W @ S @ Phi.T, atol=1e-10)
    assert not np.allclose(basis_gram(B, S), np.kron(np.eye(V), B @ B.T), atol=1e-2)
    blocks = [S[np.ix_(range(v, U * V, V), range(v, U * V, V))] for v in range(V)]
    np.testing.assert_allclose(offset_mean(S, V), np.mean(blocks, axis=0))


def test_fit_last_equals_lstsq_and_keeps_the_prior_where_data_is_silent():
    W, S, root, A, B = problem(1)
    Phi = np.kron(B, np.eye(V))
    want = np.linalg.lstsq((Phi @ root).T, (W @ root).T, rcond=None)[0].T
    got = fit_last(basis_cross(B, W @ S), basis_gram(B, S), A)
    np.testing.assert_allclose(got, want, atol=1e-7)
    silent = fit_last(basis_cross(B, 0 * W), basis_gram(B, 0 * S), A)
    np.testing.assert_array_equal(silent, A)


@pytest.mark.parametrize(("direct", "tolerance"), [(True, 1e-6), (False, 1e-3)])
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_fit_first_equals_lstsq(monkeypatch, direct, tolerance, spread):
    W, S, root, A, B = problem(2, spread)
    units = np.eye(R * U).reshape(-1, R, U)
    design = [(A @ np.kron(unit, np.eye(V)) @ root).reshape(-1) for unit in units]
    want = np.linalg.lstsq(np.stack(design, 1), (W @ root).reshape(-1), rcond=None)[0]
    if not direct:
        monkeypatch.setattr(least_squares, "DIRECT_LIMIT", 0)
    got = fit_first(W @ S, S, A, B)
    assert np.linalg.norm(got.reshape(-1) - want) <= tolerance * np.linalg.norm(want)
    assert np.linalg.norm(B.reshape(-1) - want) > 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize(("steps", "tolerance"), [(None, 1e-6), (40, 1e-4)])
def test_a_basis_of_several_maps_equals_lstsq_over_all_of_them(steps, tolerance):
    maps = [problem(seed, spread) for seed, spread in ((4, 1.0), (5, 0.1), (6, 10.0))]
    weights, start = (1.0, 0.3, 2.0), maps[0][4]
    units = np.eye(R * U).reshape(-1, R, U)
    design, wanted, grams, slope = [], [], [], 0.0
    for weight, (W, S, root, A, _) in zip(weights, maps, strict=True):
        seen = [np.sqrt(weight) * (A @ np.kron(unit, np.eye(V)) @ root) for unit in units]
        design.append(np.stack([s.reshape(-1) for s in seen], 1))
        wanted.append(np.sqrt(weight) * (W @ root).reshape(-1))
        grams.append((weight * A.T @ A, S))
        slope = slope + weight * first_slope(A, W @ S - A @ basis_image(start, S), R)
    want = np.linalg.lstsq(np.concatenate(design), np.concatenate(wanted), rcond=None)[0]
    step, images = step_first(grams, slope, steps=steps)
    got = (start + step).reshape(-1)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
    for image, (_, S) in zip(images, grams, strict=True):
        np.testing.assert_allclose(image, np.kron(step, np.eye(V)) @ S, atol=1e-9)
    alone, _ = step_first(grams[:1], slope, steps=steps)
    assert np.linalg.norm(start + alone - want.reshape(R, U)) > 0.1 * np.linalg.norm(want)


def test_few_preconditioned_steps_are_enough_for_unequal_inputs(monkeypatch):
    W, S, _, A, B = problem(2, 0.01)
    want = fit_first(W @ S, S, A, B)
    monkeypatch.setattr(least_squares, "DIRECT_LIMIT", 0)
    monkeypatch.setattr(least_squares, "CG_STEPS", 7)
    got = fit_first(W @ S, S, A, B)
    assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want)
    monkeypatch.setattr(least_squares, "_preconditioner", lambda *a: lambda x: x)
    slow = fit_first(W @ S, S, A, B)
    assert np.linalg.norm(slow - want) > 0.1 * np.linalg.norm(want)


def test_solve_right_is_damped_relative_to_the_mean_energy():
    W, S, _, _, _ = problem(3)
    lam = 0.1 * np.trace(S) / len(S)
    want = W @ np.linalg.inv(S + lam * np.eye(len(S)))
    np.testing.assert_allclose(solve_right(W, S, 0.1), want, rtol=1e-8)
    assert not np.allclose(solve_right(W, S, 0.2), want, rtol=1e-2)


def test_damping_rises_until_it_succeeds_or_is_given_up():
    indefinite = np.diag([1.0, 1.0, -1e-6])
    factor, lam = damped_cholesky(indefinite, 1e-8)
    assert 1e-6 < lam < 1e-4
    np.testing.assert_allclose(factor @ factor.T, indefinite + lam * np.eye(3), atol=1e-12)
    with pytest.raises(DataError, match="not positive semidefinite"):
        damped_cholesky(np.array([[1.0, 1e9], [1e9, 1.0]]), 1e-10)
    with pytest.raises(DataError, match="NaN"):
        damped_cholesky(np.full((2, 2), np.nan), 1e-3)


def test_few_eigenvectors_are_those_of_the_whole_decomposition():
    rng = np.random.default_rng(7)
    X = rng.normal(size=(30, 12))
    X[:, 6:] = X[:, :6]  # twice the same: every eigenvalue but six is 0
    values, vectors = top_eigen(X.T @ X)
    for count in (1, 5, 6, 12):
        few, top = top_eigen(X.T @ X, count)
        np.testing.assert_allclose(few, values[:count], atol=1e-10 * values[0])
        np.testing.assert_allclose(top.T @ top, np.eye(count), atol=1e-12)
    five = top_eigen(X.T @ X, 5)[1]
    np.testing.assert_allclose(five @ five.T, vectors[:, :5] @ vectors[:, :5].T, atol=1e-9)
    assert not np.allclose(five @ five.T, vectors[:, 1:6] @ vectors[:, 1:6].T, atol=1e-2)
