"""Common factors of several kernels in the metrics of their own inputs.

Each member is W_i (m_i, u_i, v), u inputs at each of v offsets, and is approximated by
``L_i (F_i kron I_v)``. Of the r inner channels, the first `right` have their columns of L in
common and the others their rows of F. What is minimised is

    sum_i w_i tr((W_i - W_i') S_i (W_i - W_i')^T).

All columns of L, common and private, follow from F by one exact least squares; F follows from
L by a few steps of conjugate gradients. A round does both, then tries the same step again,
longer and longer as long as that pays (line search for alternating least squares: R. Bro,
Multi-way analysis in the food industry, PhD thesis, University of Amsterdam, 1998). The images
``(F_i kron I_v) S_i`` follow every change of F, so that only the steps multiply by S.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr

from onnxcomp.numerics.joint_parts import (
    Part,
    Split,
    columns,
    product,
    tucker_alone,
    weights_alone,
)
from onnxcomp.numerics.joint_stacks import row_basis
from onnxcomp.numerics.least_squares import (
    basis_cross,
    basis_image,
    first_slope,
    fit_last,
    image_gram,
    mean_root,
    solve_right,
    step_first,
    symmetric,
    top_eigen,
)

Array: TypeAlias = NDArray[np.float64]

_ROUNDS = 3  # with 10, errors on ResNet-56 are at most 2 % lower
_STEPS = 3  # of conjugate gradients in a round; more of them hardly lower its error
_LONGER, _SHORTER = 1.5, 0.4  # factors of the extrapolation after it paid, or did not


@dataclass(frozen=True)
class _State:
    """Firsts with their images and their best lasts.

    Attributes:
        split: the factors.
        images: `basis_image` of each first in its member's metric, shape (r * v, d).
        loss: what is minimised.
    """

    split: Split
    images: tuple[Array, ...]
    loss: float


Products: TypeAlias = Sequence[tuple[Array, Array]]
Solve: TypeAlias = Callable[[Sequence[Part], Split, Products], tuple[Array, ...]]


# --------------------------------------------------------------------------------------- forms


def in_metrics(
    parts: Sequence[Part], right: int, left: int, rounds: int | None, order: str
) -> Split:
    """Return the factors in the metrics, never worse than `weights_alone` of as many rounds.

    Starts from the better of these and `_greedy`. Common last factors without offsets are
    optimal at once: the top eigenvectors of ``sum_i w_i W_i S_i W_i^T``.
    """
    if not left and parts[0].W.shape[2] == 1:
        return _greedy(parts, right, left, None)
    root = _pooled_root(parts) if left else None
    starts = [
        _greedy(parts, right, left, root),
        weights_alone(parts, right, left, None if rounds is None else max(rounds, 1), order),
    ]
    return _descend(parts, starts, rounds, _solve_lasts, root)


def tucker_in_metrics(parts: Sequence[Part], q: int, p: int, rounds: int | None) -> Split:
    """Return ``W_i ~ (A C_i) (B kron I_v)`` in the metrics, never worse than alone."""

    def solve(parts: Sequence[Part], split: Split, products: Products) -> tuple[Array, ...]:
        found = _solve_lasts(parts, split, products)
        K = [
            part.weight * L @ gram @ L.T
            for part, L, (gram, _) in zip(parts, found, products, strict=True)
        ]
        A = top_eigen(symmetric(np.sum(K, axis=0)), p)[1]
        return tuple(A @ (A.T @ L) for L in found)

    root = _pooled_root(parts)
    starts = [_greedy(parts, 0, q, root), tucker_alone(parts, q, p, rounds)]
    return _descend(parts, starts, rounds, solve, root)


# --------------------------------------------------------------------------------- alternation


def _descend(
    parts: Sequence[Part],
    starts: Sequence[Split],
    rounds: int | None,
    solve: Solve,
    root: Array | None,
) -> Split:
    """Alternate from the best of the starts; a round that does not pay ends the rounds."""

    def solved(split: Split, images: Sequence[Array]) -> _State:
        products = [
            (image_gram(image, F), basis_cross(F, part.seen))
            for part, F, image in zip(parts, split.firsts, images, strict=True)
        ]
        lasts = solve(parts, split, products)
        loss = 0.0
        for part, L, (gram, cross) in zip(parts, lasts, products, strict=True):
            loss += part.weight * (part.energy + float(np.vdot(L, L @ gram - 2 * cross)))
        return _State(replace(split, lasts=lasts), tuple(images), loss)

    state = min(
        (
            solved(s, [basis_image(F, p.xx) for p, F in zip(parts, s.firsts, strict=True)])
            for s in starts
        ),
        key=lambda s: s.loss,
    )
    stretch = 1.0
    for _ in range(_ROUNDS if rounds is None else rounds):
        moved = solved(*_move_firsts(parts, state, root))
        longer = [
            tuple(b + stretch * (b - a) for a, b in zip(old, new, strict=True))
            for old, new in (
                (state.split.firsts, moved.split.firsts),
                (state.images, moved.images),
            )
        ]
        further = solved(replace(moved.split, firsts=longer[0]), longer[1])
        paid = further.loss < moved.loss
        stretch *= _LONGER if paid else _SHORTER
        moved = further if paid else moved
        if not moved.loss < state.loss:
            break
        state = moved
    return state.split


def _solve_lasts(parts: Sequence[Part], split: Split, products: Products) -> tuple[Array, ...]:
    """Return the exact least squares of all lasts, centred on the present ones.

    The private columns of each member are eliminated; what is left of the normal equations is
    summed for the common ones.
    """
    r, width = len(split.firsts[0]), split.lasts[0].shape[1]
    n = split.right * width // r
    if not n:
        return tuple(
            fit_last(cross, gram, L)
            for L, (gram, cross) in zip(split.lasts, products, strict=True)
        )
    errors, common, gram_sum = [], np.zeros((len(split.lasts[0]), n)), np.zeros((n, n))
    for part, L, (gram, cross) in zip(parts, split.lasts, products, strict=True):
        error = cross - L @ gram
        X = solve_right(gram[:n, n:], gram[n:, n:]) if n < width else gram[:n, n:]
        common += part.weight * (error[:, :n] - error[:, n:] @ X.T)
        gram_sum += part.weight * (gram[:n, :n] - X @ gram[n:, :n])
        errors.append(error)
    step = solve_right(common, symmetric(gram_sum))
    lasts = []
    for L, error, (gram, _) in zip(split.lasts, errors, products, strict=True):
        own = error[:, n:] - step @ gram[:n, n:]
        own = solve_right(own, gram[n:, n:]) if n < width else own
        lasts.append(L + np.concatenate([step, own], axis=1))
    return tuple(lasts)


def _move_firsts(
    parts: Sequence[Part], state: _State, root: Array | None
) -> tuple[Split, list[Array]]:
    """Return firsts that lose less with the present lasts, and their images.

    The common rows move first, then the private ones of each member.
    """
    split = state.split
    firsts, images = [F.copy() for F in split.firsts], [image.copy() for image in state.images]
    right, r = split.right, len(firsts[0])
    n = right * split.lasts[0].shape[1] // r
    members = list(zip(parts, firsts, split.lasts, images, strict=True))
    if right < r:
        maps, slope = [], np.zeros_like(firsts[0][right:])
        for part, _, L, image in members:
            own = L[:, n:]
            maps.append((part.weight * (own.T @ own), part.xx))
            slope += part.weight * first_slope(own, part.seen - L @ image, r - right)
        step, moves = step_first(maps, slope, steps=_STEPS, root=root)
        for F, image, move in zip(firsts, images, moves, strict=True):
            F[right:] += step
            image[n:] += move
    if right:
        for part, F, L, image in members:
            A, error = L[:, :n], part.seen - L @ image
            if part.W.shape[2] == 1:
                other = part.matrix - L @ F
                F[:right] += solve_right((A.T @ other).T, A.T @ A).T
                image[:n] += solve_right((A.T @ error).T, A.T @ A).T
            else:
                slope = first_slope(A, error, right)
                gram = A.T @ A
                step, (move,) = step_first(
                    [(gram, part.xx)], slope, steps=_STEPS, root=part.root
                )
                F[:right] += step
                image[:n] += move
    return replace(split, firsts=tuple(firsts)), images


# -------------------------------------------------------------------------------------- starts


def _greedy(parts: Sequence[Part], right: int, left: int, root: Array | None) -> Split:
    """Return the common first part's start, then the common last part's of what that leaves.

    The lasts are those of uncorrelated inputs; the first solve of all lasts replaces them.
    """
    firsts, lasts, rest = [], [], parts
    if root is not None:
        B = _common_first(parts, left, root)
        lasts = [columns(B @ p.stacked / np.sqrt(p.weight), p) for p in parts]
        if right:
            lasts = [
                fit_last(cross, gram, L)
                for L, (gram, cross) in zip(lasts, (p.products(B) for p in parts), strict=True)
            ]
        firsts = [B] * len(parts)
        rest = [replace(p, W=p.W - product(B, L)) for p, L in zip(parts, lasts, strict=True)]
    if right:
        V = _common_last(rest, right)
        own = [(part.stacked @ V.T / np.sqrt(part.weight)).T for part in rest]
        shared = [columns(V, part) for part in parts]
        if not left:
            return Split(right, tuple(own), tuple(shared))
        firsts = [np.concatenate(pair) for pair in zip(own, firsts, strict=True)]
        lasts = [np.concatenate(pair, axis=1) for pair in zip(shared, lasts, strict=True)]
    return Split(right, tuple(firsts), tuple(lasts))


def _pooled_root(parts: Sequence[Part]) -> Array:
    """Return the Cholesky factor of the members' mean S, each by its share of the energy."""
    return mean_root([part.weight * part.energy / part.scale * part.mean for part in parts])


def _common_first(parts: Sequence[Part], rank: int, root: Array) -> Array:
    """Return orthonormal rows (rank, u): the best ones if all metrics were proportional.

    With the pooled ``S = C C^T``: the left singular vectors of the stacked ``C^T M``, taken
    back as combinations of the members' own columns, so that S is never inverted.
    """
    M = np.concatenate([np.sqrt(part.scale) * part.stacked for part in parts], axis=1)
    basis, _ = qr(M @ row_basis(root.T @ M, rank).T, mode="economic")
    return np.ascontiguousarray(basis.T)


def _common_last(parts: Sequence[Part], rank: int) -> Array:
    """Return orthonormal rows (rank, m * v): the best ones without correlated offsets.

    They are the right singular vectors of the stacked ``C_i^T M_i`` with ``S_i = C_i C_i^T``
    averaged over the offsets.
    """
    if parts[0].W.shape[2] == 1:
        K = np.sum([part.outputs() for part in parts], axis=0)
        return np.ascontiguousarray(top_eigen(K, rank)[1].T)
    return row_basis(np.concatenate([part.root.T @ part.stacked for part in parts]), rank)
