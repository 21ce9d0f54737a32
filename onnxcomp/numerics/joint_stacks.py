"""Common factors of several matrices: truncated singular vectors of their stacks.

    M_i ~ U_i V            V: right singular vectors of the matrices below each other
    M_i ~ U V_i            U: left singular vectors of the matrices side by side
    M_i ~ U_i V + U V_i    both in turn, each on what the other leaves

All spectra come from the Gram matrix of the smaller side.

References:
    S. Chen et al., Joint matrix decomposition for deep convolutional neural networks
    compression, Neurocomputing 516 (2023) 11-26 (RJSVD, LJSVD and, Algorithm 3, Bi-JSVD).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr

from onnxcomp.numerics.least_squares import symmetric, top_eigen

Array: TypeAlias = NDArray[np.float64]

_WARM = 9  # a warm start pays while the matrix is at least so many times as wide as the basis


@dataclass(frozen=True)
class Stacks:
    """``M_i ~ U_i V + U V_i`` with U (u, left) and V (right, w) common; a rank can be 0.

    Attributes:
        U: orthonormal columns, shape (u, left).
        V: orthonormal rows, shape (right, w).
        Us: U_i of each matrix, shape (u_i, right).
        Vs: V_i of each matrix, shape (left, w_i).
    """

    U: Array
    V: Array
    Us: tuple[Array, ...]
    Vs: tuple[Array, ...]


def row_basis(X: Array, rank: int) -> Array:
    """Return the first `rank` right singular vectors of X (p, q) as rows, strongest first."""
    p, q = X.shape
    if q <= p:
        return np.ascontiguousarray(top_eigen(X.T @ X, rank)[1].T)
    basis, _ = qr(X.T @ top_eigen(X @ X.T, rank)[1], mode="economic")
    return np.ascontiguousarray(basis.T)


def stacks(
    matrices: Sequence[Array], right: int, left: int, *, rounds: int, order: str
) -> Stacks:
    """Return the least-squares factors with V of rank `right` and U of rank `left` common.

    With one of the ranks 0 this is the global optimum. Else each of the `rounds` updates one
    part, then the other; the error never rises. From the second round on, wide matrices take
    `_top_vectors` warm, which changed the final error by less than 1e-4 of itself.

    Args:
        matrices: M_i (u_i, w_i); equal w unless `right` is 0, equal u unless `left` is 0.
        right: rank of the part with the right factor in common (RJSVD).
        left: rank of the part with the left factor in common (LJSVD).
        rounds: number of rounds, at least 1 (the paper takes 30).
        order: "last" updates the part with the right factor in common first, as in the
            paper's Algorithm 3; "first" the other one, as in its authors' code.
    """
    if not left:
        V = row_basis(np.concatenate(matrices), right)
        none = np.zeros((len(matrices[0]), 0))
        privates = tuple(np.zeros((0, M.shape[1])) for M in matrices)
        return Stacks(none, V, tuple(M @ V.T for M in matrices), privates)
    if not right:
        U = row_basis(np.concatenate(matrices, axis=1).T, left).T
        none = np.zeros((0, matrices[0].shape[1]))
        privates = tuple(np.zeros((len(M), 0)) for M in matrices)
        return Stacks(U, none, privates, tuple(U.T @ M for M in matrices))
    rows = _orthonormal(np.concatenate(matrices, axis=1))
    if rows is not None:
        matrices = [rows.T @ M for M in matrices]
    columns = _orthonormal(np.concatenate(matrices).T)
    if columns is not None:
        matrices = [M @ columns for M in matrices]
    first = _Side(matrices, left)
    last = _Side([M.T for M in matrices], right)
    turns = (
        ((last, first), (first, last)) if order == "last" else ((first, last), (last, first))
    )
    for _ in range(rounds):
        for side, other in turns:
            side.update(other)
    U, V = first.basis, last.basis.T
    Us, Vs = last.privates, [P.T for P in first.privates]
    if rows is not None:
        U, Us = rows @ U, [rows @ P for P in Us]
    if columns is not None:
        V, Vs = V @ columns.T, [P @ columns.T for P in Vs]
    return Stacks(U, V, tuple(Us), tuple(Vs))


def tucker_bases(blocks: Sequence[Array], q: int, p: int, rounds: int) -> tuple[Array, Array]:
    """Return B (q, c) and A (m, p), orthonormal, for ``W_i ~ A C_i (B kron I_v)``.

    Higher-order orthogonal iteration on the blocks W_i (m, c, v_i): from the singular vectors
    of the input mode, both bases in turn, each optimal for the other.
    """

    def inputs(slices: Sequence[Array]) -> Array:
        return row_basis(
            np.concatenate([W.transpose(0, 2, 1).reshape(-1, W.shape[1]) for W in slices]), q
        )

    def outputs(B: Array) -> Array:
        seen = [np.einsum("mcv,qc->mqv", W, B, optimize=True) for W in blocks]
        return row_basis(np.concatenate([Y.reshape(len(Y), -1) for Y in seen], axis=1).T, p).T

    B = inputs(blocks)
    for _ in range(rounds):
        A = outputs(B)
        B = inputs([np.einsum("mcv,mp->pcv", W, A, optimize=True) for W in blocks])
    return B, outputs(B)


class _Side:
    """One of the two common factors: an orthonormal basis of the matrices' column space.

    The other side has the transposed matrices, so that ``X_i ~ P_i O^T + basis private_i^T``
    with O and P_i its basis and its privates.
    """

    def __init__(self, matrices: Sequence[Array], rank: int) -> None:
        self._matrices = matrices
        self._rank = rank
        self._gram = np.zeros((len(matrices[0]), len(matrices[0])))
        for X in matrices:
            self._gram += X @ X.T
        self.basis = np.zeros((len(matrices[0]), 0))
        self.privates = [np.zeros((X.shape[1], 0)) for X in matrices]
        self._seen = self.privates  # X_i^T basis

    def update(self, other: "_Side") -> None:
        """Take the best basis for what the other side leaves, and its privates."""
        seen = np.concatenate(other._seen, axis=1)
        left = seen - np.concatenate(other.privates, axis=1)
        K = symmetric(self._gram - seen @ seen.T + left @ left.T)
        self.basis = _top_vectors(K, self._rank, self.basis)
        self._seen = [X.T @ self.basis for X in self._matrices]
        self.privates = [
            Y - other.basis @ (P.T @ self.basis)
            for Y, P in zip(self._seen, other.privates, strict=True)
        ]


def _top_vectors(K: Array, rank: int, start: Array) -> Array:
    """Return the top eigenvectors of K, `start` being those of a similar matrix, or empty.

    Warm: the best vectors in the span of start, K start and K^2 start. They hold at least the
    energy of `start`.
    """
    if not start.shape[1] or len(K) < _WARM * rank:
        return top_eigen(K, rank)[1]
    once = K @ start
    basis, _ = qr(np.concatenate([start, once, K @ once], axis=1), mode="economic")
    return np.asarray(basis @ top_eigen(symmetric(basis.T @ K @ basis), rank)[1])


def _orthonormal(X: Array) -> Array | None:
    """Return an orthonormal basis of the columns of X where they are fewer than the rows."""
    return np.asarray(qr(X, mode="economic")[0]) if X.shape[1] < len(X) else None
