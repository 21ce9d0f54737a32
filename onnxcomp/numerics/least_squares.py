"""Damped solves, and the exact least squares of one factor of a kernel given the other.

A kernel of d inputs is seen as a matrix ``W`` of shape (m, u * v): a *basis* ``B`` of shape
(r, u) maps the u values at every one of v offsets, and ``A`` of shape (m, r * v) mixes the
mapped values, so that ``W ~ A (B kron I_v)``. With u = d and v = 1 this is the plain product
``A B``. All errors are ``tr((W - W') S (W - W')^T)`` in the metric S of shape (d, d).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh

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
    n = len(K)
    count = n if count is None else count
    few = (n - count, n - 1) if 0 < 2 * count < n else None
    values, vectors = eigh(K, subset_by_index=few)
    return np.clip(values[::-1][:count], 0.0, None), np.asarray(vectors[:, ::-1][:, :count])


def offset_mean(S: Array, v: int) -> Array:
    """Return the (u, u) metric of the basis mode: S averaged over the v equal offsets."""
    if v == 1:
        return S
    u = len(S) // v
    return np.asarray(np.einsum("avbv->ab", S.reshape(u, v, u, v), optimize=True)) / v


def basis_image(B: Array, S: Array) -> Array:
    """Return ``Phi S`` of shape (r * v, d), Phi = B kron I_v."""
    r, u = B.shape
    return np.asarray(B @ S.reshape(u, -1)).reshape(r * len(S) // u, len(S))


def basis_gram(B: Array, S: Array) -> Array:
    """Return ``Phi S Phi^T`` of shape (r * v, r * v)."""
    return image_gram(basis_image(B, S), B)


def image_gram(image: Array, B: Array) -> Array:
    """Return ``Phi S Phi^T`` from `basis_image`."""
    blocks = image.reshape(len(image), B.shape[1], -1)
    gram = np.einsum("xuv,ru->xrv", blocks, B, optimize=True)
    return symmetric(np.asarray(gram).reshape(len(image), len(image)))


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


def fit_first(
    WS: Array, S: Array, A: Array, start: Array, *, tolerance: float = CG_TOLERANCE
) -> Array:
    """Return the least-squares basis (r, u) for a fixed ``A`` (m, r * v), centred on `start`.

    Solved as in `step_first` (never worse than `start`).
    """
    error = WS - A @ basis_image(start, S)
    slope = first_slope(A, error, len(start))
    step, _ = step_first([(A.T @ A, S)], slope, tolerance=tolerance)
    return start + step


def first_slope(A: Array, error: Array, r: int) -> Array:
    """Return ``R_ru = sum_mv A_mrv E_muv`` of the error ``E = (W - W') S``, shape (m, d)."""
    m, v = len(A), A.shape[1] // r
    blocks = A.reshape(m, r, v), error.reshape(m, -1, v)
    return np.asarray(np.einsum("mrv,muv->ru", *blocks, optimize=True))


def step_first(
    maps: Sequence[tuple[Array, Array]],
    slope: Array,
    *,
    steps: int | None = None,
    root: Array | None = None,
    tolerance: float = CG_TOLERANCE,
) -> tuple[Array, list[Array]]:
    """Return the least-squares change D (r, u) of the basis that several fixed maps share.

    Solves ``sum_i sum_vw H_vw D S_wv = R``, densely up to `DIRECT_LIMIT` unknowns, else by
    `CG_STEPS` conjugate gradients preconditioned with the offset means of H and S.

    Args:
        maps: ``H = A^T A`` (r * v, r * v) and S (d, d) of each map; a weight of the map's
            error multiplies H.
        slope: R, the weighted sum of the maps' `first_slope`.
        steps: take as many conjugate gradients at any size.
        root: Cholesky factor (u, u) of a metric to precondition with; None takes the maps'.
        tolerance: residual, relative to the slope, that ends the conjugate gradients.

    Returns:
        D, and its `basis_image` in each map's S.
    """
    r, u = slope.shape
    if steps is None and r * u <= DIRECT_LIMIT:
        N = np.sum([_normal_matrix(H, S, r, u) for H, S in maps], axis=0)
        step = solve_right(slope.reshape(1, -1), symmetric(N)).reshape(r, u)
        return step, [basis_image(step, S) for _, S in maps]
    precondition = _preconditioner(maps, u, root)
    step, images = np.zeros((r, u)), [np.zeros((len(H), len(S))) for H, S in maps]
    rest, towards, size = slope, np.zeros((r, u)), 1.0
    for _ in range(CG_STEPS if steps is None else steps):
        upright = precondition(rest)
        before, size = size, float(np.vdot(rest, upright))
        towards = upright + size / before * towards
        seen = [basis_image(towards, S) for _, S in maps]
        bent = np.sum(
            [_normal(H, image, r) for (H, _), image in zip(maps, seen, strict=True)], axis=0
        )
        curvature = float(np.vdot(towards, bent))
        if curvature <= 0:
            break
        length = size / curvature
        step += length * towards
        rest = rest - length * bent
        for image, part in zip(images, seen, strict=True):
            image += length * part
        if np.linalg.norm(rest) <= tolerance * np.linalg.norm(slope):
            break
    return step, images


def mean_root(metrics: Sequence[Array]) -> Array:
    """Return the Cholesky factor of a sum of metrics, for preconditioning."""
    return damped_cholesky(np.sum(metrics, axis=0), 1e-6)[0]


def _preconditioner(
    maps: Sequence[tuple[Array, Array]], u: int, root: Array | None
) -> Callable[[Array], Array]:
    """Return the inverse of the product nearest to the normal equations."""
    rows = mean_root([np.trace(S) * offset_mean(H, len(S) // u) for H, S in maps])
    if root is None:
        root = mean_root([np.trace(H) * offset_mean(S, len(S) // u) for H, S in maps])

    def precondition(x: Array) -> Array:
        half = cho_solve((rows, True), x)
        return np.asarray(cho_solve((root, True), half.T).T)

    return precondition


def _normal(H: Array, image: Array, r: int) -> Array:
    """Return ``sum_vw H_vw B S_wv`` (r, u) from the image of B."""
    v = len(H) // r
    blocks = H.reshape(r, v, len(H)), image.reshape(len(H), -1, v)
    return np.asarray(np.einsum("rvx,xuv->ru", *blocks, optimize=True))


def _normal_matrix(H: Array, S: Array, r: int, u: int) -> Array:
    """Return the matrix (r * u, r * u) of the normal equations of one map."""
    v = len(S) // u
    H4 = H.reshape(r, v, r, v).transpose(0, 2, 1, 3).reshape(r * r, v * v)
    S4 = S.reshape(u, v, u, v).transpose(1, 3, 0, 2).reshape(v * v, u * u)
    N = (H4 @ S4).reshape(r, r, u, u).transpose(0, 2, 1, 3)
    return np.asarray(N.reshape(r * u, r * u))
