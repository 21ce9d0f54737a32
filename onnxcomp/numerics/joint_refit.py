"""Private factors solved anew for another kernel in another metric, common ones frozen.

Given the common factors, all of a member's own are one linear least squares, solved exactly:
conjugate gradients are taken only where a first factor sees correlated offsets.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from onnxcomp.numerics.factorization import last_factor
from onnxcomp.numerics.joint_parts import Part, product
from onnxcomp.numerics.least_squares import (
    EXACT,
    basis_image,
    damped_cholesky,
    fit_first,
    image_gram,
    solve_right,
    symmetric,
)

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class _Dense:
    """A metric that is only its matrix."""

    xx: Array

    def times(self, W: Array) -> Array:
        """Return ``W S``."""
        return np.asarray(W @ self.xx)

    def quadratic(self, W: Array) -> Array:
        """Return ``W S W^T``."""
        return symmetric(W @ self.xx @ W.T)


def refit_first(part: Part, A: Array, prior: Array | None) -> Array:
    """Return F (r, u) for the common columns A (m, r * v), centred on `prior`.

    None starts from the least squares of the weights alone.
    """
    m, u, v = part.W.shape
    blocks = A.reshape(m, -1, v)
    start = np.zeros((blocks.shape[1], u)) if prior is None else prior
    if prior is None or part.metric is None or v == 1:  # the offsets separate
        gram = np.einsum("mrv,msv->rs", blocks, blocks, optimize=True)
        cross = np.einsum("muv,mrv->ur", part.W - product(start, A), blocks, optimize=True)
        start = start + solve_right(cross, gram).T
    if part.metric is None or v == 1:
        return start
    return fit_first(part.seen, part.xx, A, start)


def refit_last(part: Part, B: Array, prior: Array | None) -> Array:
    """Return L (m, r * v) for the common rows B (r, u), centred on `prior` (None: on 0)."""
    m, _, v = part.W.shape
    start = np.zeros((m, len(B), v)) if prior is None else prior.reshape(m, -1, v)
    return last_factor(part.W, part.metric, B, start).reshape(m, -1)


def refit_pair(
    part: Part, B: Array, A: Array, priors: tuple[Array | None, Array | None]
) -> tuple[Array, Array]:
    """Return F and L of ``W ~ A (F kron I_v) + L (B kron I_v)`` for common B and A.

    L follows from F, and with it everything that B sees: what is left for F is a least squares
    in the metric ``S - S Phi^T (Phi S Phi^T)^-1 Phi S`` with Phi = B kron I_v.
    """
    unseen = part if priors[1] is None else replace(part, W=part.W - product(B, priors[1]))
    if part.metric is not None and part.W.shape[2] > 1:
        image = basis_image(B, part.xx)
        root, _ = damped_cholesky(image_gram(image, B), EXACT)
        white = solve_triangular(root, image, lower=True)
        unseen = replace(unseen, metric=_Dense(part.xx - white.T @ white))
    F = refit_first(unseen, A, priors[0])
    return F, refit_last(replace(part, W=part.W - product(F, A)), B, priors[1])


def refit_core(part: Part, B: Array, A: Array, prior: Array | None) -> Array:
    """Return C (p, q * v) of ``W ~ A C (B kron I_v)``, centred on `prior` (None: on 0)."""
    p, v = A.shape[1], part.W.shape[2]
    start = np.zeros((p, len(B) * v)) if prior is None else prior
    rest = replace(part, W=part.W - product(B, A @ start))
    return start + solve_right(refit_last(rest, B, None).T @ A, A.T @ A).T
