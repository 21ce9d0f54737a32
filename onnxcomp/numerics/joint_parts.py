"""Members of a joint form as the solvers see them, and their factors from weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.factorization import PatchMetric, dense_metric
from onnxcomp.numerics.joint_stacks import row_basis, stacks, tucker_bases
from onnxcomp.numerics.least_squares import basis_cross, basis_gram, mean_root, offset_mean

Array: TypeAlias = NDArray[np.float64]

_PAPER_ROUNDS = 30  # of the weights alone where both sides are common
_TUCKER_ROUNDS = 5  # of the weights alone where the outer two of three are


@dataclass(frozen=True)
class Part:
    """A member.

    Attributes:
        W: shape (m, u, v).
        metric: moments of its patches (d = u * v); None for the weights alone.
        weight: factor of its error.
    """

    W: Array
    metric: PatchMetric | None
    weight: float

    @property
    def matrix(self) -> Array:
        """W as (m, d)."""
        return self.W.reshape(len(self.W), -1)

    @property
    def stacked(self) -> Array:
        """W as (u, m * v), scaled by the root of the weight."""
        M = self.W.transpose(1, 0, 2).reshape(self.W.shape[1], -1)
        return np.asarray(np.sqrt(self.weight) * M)

    @cached_property
    def xx(self) -> Array:
        """The metric's matrix S (d, d)."""
        return dense_metric(self._metric)

    @cached_property
    def mean(self) -> Array:
        """S averaged over the offsets, shape (u, u)."""
        return offset_mean(self.xx, self.W.shape[2])

    @cached_property
    def root(self) -> Array:
        """Cholesky factor of `mean`, barely damped."""
        return mean_root([self.mean])

    @property
    def scale(self) -> float:
        """The energy of all inputs at one offset."""
        return max(float(np.trace(self.mean)), np.finfo(float).tiny)

    @cached_property
    def seen(self) -> Array:
        """W S, shape (m, d)."""
        return self._metric.times(self.matrix)

    @cached_property
    def energy(self) -> float:
        """``tr(W S W^T)``."""
        return float(np.vdot(self.seen, self.matrix))

    @property
    def _metric(self) -> PatchMetric:
        assert self.metric is not None  # weights alone take other ways
        return self.metric

    def outputs(self) -> Array:
        """Return ``w W S W^T``."""
        return np.asarray(self.weight * self._metric.quadratic(self.matrix))

    def products(self, F: Array) -> tuple[Array, Array]:
        """Return ``Phi S Phi^T`` and ``W S Phi^T`` for Phi = F kron I_v."""
        one = self.W.shape[2] == 1
        gram = self._metric.quadratic(F) if one else basis_gram(F, self.xx)
        return gram, basis_cross(F, self.seen)


@dataclass(frozen=True)
class Split:
    """The factors of all members.

    Attributes:
        right: number of leading inner channels with their last factor in common.
        firsts: F_i, shape (r, u_i); the rows behind `right` are equal.
        lasts: L_i, shape (m_i, r * v); the columns before ``right * v`` are equal.
    """

    right: int
    firsts: tuple[Array, ...]
    lasts: tuple[Array, ...]


def product(F: Array, L: Array) -> Array:
    """Return ``L (F kron I_v)`` as (m, u, v)."""
    blocks = L.reshape(len(L), len(F), -1)
    return np.asarray(np.einsum("mrv,ru->muv", blocks, F, optimize=True))


def weights_alone(
    parts: Sequence[Part], right: int, left: int, rounds: int | None, order: str
) -> Split:
    """Return the factors from the weights alone (`joint_stacks.stacks`)."""
    rounds = _PAPER_ROUNDS if rounds is None else rounds
    found = stacks([p.stacked for p in parts], right, left, rounds=rounds, order=order)
    firsts, lasts = [], []
    for part, U, V in zip(parts, found.Us, found.Vs, strict=True):
        root = np.sqrt(part.weight)
        common = found.U.T if left else np.zeros((0, len(U)))
        firsts.append(np.concatenate([U.T / root, common]))
        lasts.append(np.concatenate([columns(found.V, part), columns(V / root, part)], 1))
    return Split(right, tuple(firsts), tuple(lasts))


def tucker_alone(parts: Sequence[Part], q: int, p: int, rounds: int | None) -> Split:
    """Return ``W_i ~ (A C_i) (B kron I_v)`` from the weights alone (`tucker_bases`)."""
    blocks = [np.sqrt(part.weight) * part.W for part in parts]
    B, A = tucker_bases(blocks, q, p, _TUCKER_ROUNDS if rounds is None else rounds)
    lasts = []
    for part in parts:
        core = np.einsum("mp,mcv,qc->pqv", A, part.W, B, optimize=True)
        lasts.append(A @ core.reshape(p, -1))
    return Split(0, (B,) * len(parts), tuple(lasts))


def outer_factor(split: Split, p: int) -> Array:
    """Return the common orthonormal A (m, p) of the lasts of a Tucker split."""
    return np.ascontiguousarray(row_basis(np.concatenate(split.lasts, axis=1).T, p).T)


def columns(V: Array, part: Part) -> Array:
    """Return rows (r, m * v) as the columns (m, r * v) of a last factor."""
    m, _, v = part.W.shape
    return np.ascontiguousarray(V.reshape(-1, m, v).transpose(1, 0, 2).reshape(m, -1))
