"""Damped solves, and the exact least squares of one factor of a kernel given the other.

A kernel of d inputs is seen as a matrix ``W`` of shape (m, u * v): a *basis* ``B`` of shape
(r, u) maps the u values at every one of v offsets, and ``A`` of shape (m, r * v) mixes the
mapped values, so that ``W ~ A (B kron I_v)``. With u = d and v = 1 this is the plain product
``A B``. All errors are ``tr((W - W') S (W - W')^T)`` in the metric S of shape (d, d).
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh
from scipy.sparse.linalg import LinearOperator, cg

from onnxcomp.errors import DataError

Array: TypeAlias = NDArray[np.float64]

EXACT = 1e-10  # damping, relative to the mean energy, that only makes a solve well defined
DIRECT_LIMIT = 1500  # unknowns up to which the first factor is solved densely
CG_STEPS = 20
CG_TOLERANCE = 1e-5


def damped_cholesky(S: Array, damping: float) -> tuple[Array, float]:
    """Return the lower Cholesky factor of ``S + lam I`` and lam.

    Args:
        S: symmetric positive semidefinite, shape (d, d).
        damping: lam relative to the mean of S's diagonal; raised tenfold until it succeeds.

    Raises:
        DataError: S holds values that are not finite, or is far from semidefinite.
    """
    energy = float(np.trace(S)) / max(len(S), 1)
    if not np.isfinite(energy):
        raise DataError("second moments are not finite; look for NaN or Inf in the samples")
    lam = damping * energy if energy > 0 and damping > 0 else EXACT * max(energy, 1.0)
    diagonal = np.diag_indices(len(S))
    for _ in range(12):
        shifted = S.copy()
        shifted[diagonal] += lam
        try:
            factor, _ = cho_factor(shifted, lower=True, overwrite_a=True)
        except np.linalg.LinAlgError:
            lam *= 10
        else:
            return np.tril(factor), lam
    raise DataError(f"second moments of size {len(S)} are not positive semidefinite")


def solve_right(T: Array, S: Array, damping: float = EXACT) -> Array:
    """Return ``T (S + lam I)^-1`` for T of shape (p, d); lam as in `damped_cholesky`."""
    factor, _ = damped_cholesky(S, damping)
    return np.asarray(cho_solve((factor, True), T.T).T)


def symmetric(S: Array) -> Array:
    """Return the symmetric part of S."""
    return np.asarray(0.5 * (S + S.T))


def top_eigen(K: Array, count: int | None = None) -> tuple[Array, Array]:
    """Return the largest `count` eigenvalues of K, descending and >= 0, and their vectors."""
    values, vectors = eigh(K)
    count = len(K) if count is None else count
    return np.clip(values[::-1][:count], 0.0, None), np.asarray(vectors[:, ::-1][:, :count])


def offset_mean(S: Array, v: int) -> Array:
    """Return the (u, u) metric of the basis mode: S averaged over the v equal offsets."""
    u = len(S) // v
    return np.asarray(np.einsum("avbv->ab", S.reshape(u, v, u, v), optimize=True)) / v


def basis_gram(B: Array, S: Array) -> Array:
    """Return ``Phi S Phi^T`` of shape (r * v, r * v), Phi = B kron I_v."""
    r, u = B.shape
    v = len(S) // u
    left = (B @ S.reshape(u, -1)).reshape(r * v, u, v)
    gram = np.einsum("xuv,ru->xrv", left, B, optimize=True)
    return symmetric(gram.reshape(r * v, r * v))


def basis_cross(B: Array, WS: Array) -> Array:
    """Return ``W S Phi^T`` of shape (m, r * v) from ``W S`` of shape (m, d)."""
    m, u = len(WS), B.shape[1]
    cross = np.einsum("muv,ru->mrv", WS.reshape(m, u, -1), B, optimize=True)
    return np.asarray(cross).reshape(m, -1)


def fit_last(cross: Array, gram: Array, prior: Array) -> Array:
    """Return the exact least-squares ``A = W S Phi^T (Phi S Phi^T)^-1`` of a fixed basis.

    Centred on `prior`, so that directions which the data does not show keep its values.

    Args:
        cross: `basis_cross`, shape (m, r * v).
        gram: `basis_gram`, shape (r * v, r * v).
        prior: a value of A, shape (m, r * v).
    """
    return prior + solve_right(cross - prior @ gram, gram)


def fit_first(WS: Array, S: Array, A: Array, start: Array) -> Array:
    """Return the least-squares basis (r, u) for a fixed ``A`` (m, r * v), centred on `start`.

    Solves ``sum_vw H_vw B S_wv = R`` with ``H = A^T A`` and ``R_ru = sum_mv A_mrv (WS)_muv``:
    densely up to `DIRECT_LIMIT` unknowns, else by `CG_STEPS` steps of conjugate gradients
    preconditioned with the offset means of H and S (never worse than `start`).
    """
    r, u = start.shape
    v = len(S) // u
    m = len(A)
    H = A.T @ A
    R = np.einsum("mrv,muv->ru", A.reshape(m, r, v), WS.reshape(m, u, v), optimize=True)

    def normal(B: Array) -> Array:
        left = (B @ S.reshape(u, -1)).reshape(r * v, u, v)
        return np.asarray(
            np.einsum("rvx,xuv->ru", H.reshape(r, v, r * v), left, optimize=True)
        )

    residual = R - normal(start)
    if r * u <= DIRECT_LIMIT:
        H4 = H.reshape(r, v, r, v).transpose(0, 2, 1, 3).reshape(r * r, v * v)
        S4 = S.reshape(u, v, u, v).transpose(1, 3, 0, 2).reshape(v * v, u * u)
        N = (H4 @ S4).reshape(r, r, u, u).transpose(0, 2, 1, 3).reshape(r * u, r * u)
        return start + solve_right(residual.reshape(1, -1), symmetric(N)).reshape(r, u)
    rows, _ = damped_cholesky(v * offset_mean(H, v), 1e-6)
    columns, _ = damped_cholesky(offset_mean(S, v), 1e-6)

    def precondition(x: Array) -> Array:
        half = cho_solve((rows, True), x.reshape(r, u))
        return np.asarray(cho_solve((columns, True), half.T).T).reshape(-1)

    size = (r * u, r * u)
    step, _ = cg(
        LinearOperator(
            size, matvec=lambda x: normal(x.reshape(r, u)).reshape(-1), dtype=float
        ),
        residual.reshape(-1),
        rtol=CG_TOLERANCE,
        maxiter=CG_STEPS,
        M=LinearOperator(size, matvec=precondition, dtype=float),
    )
    return start + step.reshape(r, u)
